"""Sealing of streams: one opening by each side, then frames, sealed or plain.

Owns the 32 bytes that open a stream, the keys of both directions and their counters, and the cutting into frames. It
must never wait or look into a frame. Over TLS (`is_protected`) frames stay plain inside, but the label still counts.

Layout, big-endian (docs/mesh/security.md)::

    opening: magic 2 | version 1 | flags 1 | key id 4 | boot 8 | salt 16
    frame:   length 4 | type 1 | body          plain
             length 4 | AEAD(type 1 | body)    sealed; length counts the tag

The key of a direction is HKDF(secret of the sender's key id, "stream dialer" or "stream acceptor" | the dialer's opening
| the acceptor's opening). Both salts are fresh, so nothing of one stream can be played into another, and an opening that
was touched gives keys that fit nothing; the nonce is the number of the frame in its
direction, so nothing can be dropped, repeated or moved within one. The acceptor follows the dialer's choice of form.
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.errors import DecodeError, EchoError, SealError
from mesh.frames import FRAME_BYTES_MAX, HEADER_BYTES, Frame, FrameReader, encode_frame
from mesh.seal import FLAG_SEALED, MAGIC, NONCE_PREFIX, TAG_BYTES, VERSION, Mode, Sealer, label_id

SALT_BYTES = 16
OPENING = struct.Struct(">2sBBI8s16s")
OPENING_BYTES = OPENING.size


class StreamSeal:
    """One end of one stream. Feed it what comes; it is open when the peer's opening has been read.

    A dialer sends `opening()` at once, an acceptor when `is_open`; frames may be sealed by `seal` from then on.
    `salt` are 16 fresh random bytes.
    """

    def __init__(
        self,
        sealer: Sealer,
        salt: bytes,
        *,
        is_dialer: bool,
        is_protected: bool = False,
        peer_holds_key: bool = False,
    ) -> None:
        assert len(salt) == SALT_BYTES
        self._sealer = sealer
        self._keyring = sealer.keyring  # of the moment: a rotation does not touch open streams
        self._salt = salt
        self._is_dialer = is_dialer
        self._is_protected = is_protected
        wants_seal = sealer.mode is Mode.REQUIRE or (sealer.mode is Mode.ACCEPT and peer_holds_key)
        self.is_sealed = wants_seal and not is_protected
        """Meaningful for an acceptor once open."""
        self.is_open = False
        self.peer_boot = b""
        self._head = bytearray()
        self._reader = FrameReader(FRAME_BYTES_MAX + TAG_BYTES)
        self._out: AESGCM | None = None
        self._in: AESGCM | None = None
        self._sent = 0
        self._received = 0

    def opening(self) -> bytes:
        """Our opening. An acceptor must be open first, because it answers in the dialer's form."""
        assert self._is_dialer or self.is_open
        return self._opening(self.is_sealed)

    def _opening(self, is_sealed: bool) -> bytes:
        first = self._keyring.first
        if not is_sealed or first is None:
            return OPENING.pack(
                MAGIC, VERSION, 0, label_id(self._sealer.label), self._sealer.boot, self._salt
            )
        return OPENING.pack(MAGIC, VERSION, FLAG_SEALED, first.id, self._sealer.boot, self._salt)

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by these bytes. Raises DecodeError or SealError; the stream must then be closed, and frames
        completed by the same bytes are lost with it."""
        if not self.is_open:
            room = OPENING_BYTES - len(self._head)
            self._head += data[:room]
            data = data[room:]
            # A stranger is turned away at its first wrong byte, not when it has sent enough.
            if self._head[:2] != MAGIC[: len(self._head[:2])]:
                self._sealer.count("stream_garbage")
                raise DecodeError("not a mesh stream")
            if len(self._head) < OPENING_BYTES:
                return []
            self._open(bytes(self._head))
        frames = self._reader.feed(data)
        return [self._unseal(frame) for frame in frames] if self.is_sealed else self._capped(frames)

    def _capped(self, frames: list[Frame]) -> list[Frame]:
        for frame in frames:
            if len(frame.body) >= FRAME_BYTES_MAX:
                raise DecodeError("frame too long")
        return frames

    def _open(self, head: bytes) -> None:
        _, version, flags, key_id, boot, _ = OPENING.unpack(head)
        if version != VERSION:
            self._sealer.count("stream_garbage")
            raise DecodeError("another version of the mesh stream")
        is_sealed = bool(flags & FLAG_SEALED)
        if boot == self._sealer.boot:
            self._sealer.count("stream_own")
            raise EchoError("we talk to ourselves")
        if self._is_dialer and is_sealed != self.is_sealed:
            raise SealError("the acceptor answers in another form")
        if is_sealed:
            self._derive(key_id, head)
        elif self._sealer.mode is Mode.REQUIRE and not self._is_protected:
            self._sealer.count("stream_plain_refused")
            raise SealError("plain stream")
        elif key_id != label_id(self._sealer.label):
            self._sealer.count("stream_foreign_label")
            raise SealError("another cluster")
        self.is_sealed = is_sealed
        self.peer_boot = boot
        self.is_open = True

    def _derive(self, key_id: int, head: bytes) -> None:
        theirs, ours = self._keyring.get(key_id), self._keyring.first
        if theirs is None or ours is None:
            self._sealer.count("stream_unknown_key")
            raise SealError("unknown key")
        own = self._opening(True)
        both = own + head if self._is_dialer else head + own
        dialer, acceptor = b"stream dialer", b"stream acceptor"
        self._out = AESGCM(ours.derive((dialer if self._is_dialer else acceptor) + both))
        self._in = AESGCM(theirs.derive((acceptor if self._is_dialer else dialer) + both))

    def seal(self, frame: Frame) -> bytes:
        """Bytes of a frame on the stream, in order."""
        assert self.is_open
        if self._out is None:
            return encode_frame(frame)
        assert len(frame.body) < FRAME_BYTES_MAX
        head = (1 + len(frame.body) + TAG_BYTES).to_bytes(HEADER_BYTES, "big")
        nonce = NONCE_PREFIX + self._sent.to_bytes(8, "big")
        self._sent += 1
        plain = bytes((frame.type,)) + frame.body
        return head + self._out.encrypt(nonce, plain, head + self._sealer.label)

    def _unseal(self, frame: Frame) -> Frame:
        sealed = bytes((frame.type,)) + frame.body  # the reader took the first byte for a type
        head = len(sealed).to_bytes(HEADER_BYTES, "big")
        nonce = NONCE_PREFIX + self._received.to_bytes(8, "big")
        self._received += 1
        assert self._in is not None
        try:
            plain = self._in.decrypt(nonce, sealed, head + self._sealer.label)
        except (InvalidTag, ValueError, OverflowError) as error:
            self._sealer.count("stream_unauthentic")
            raise SealError(
                "does not authenticate; the key id is ours, so perhaps the label differs"
            ) from error
        if not plain:
            raise DecodeError("frame without a type")
        return Frame(plain[0], plain[1:])

    @property
    def heard_salt(self) -> bytes:
        """The salt in the peer's opening, as far as it came; the dialer's is unlike any other."""
        return bytes(self._head[OPENING_BYTES - SALT_BYTES :])

    def finish(self) -> None:
        """The stream ended. Raises DecodeError if it ended inside the opening or a frame."""
        if not self.is_open:
            raise DecodeError("stream ended before it was open")
        self._reader.finish()
