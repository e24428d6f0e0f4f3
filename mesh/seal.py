"""Sealing of datagrams: authentication, encryption, replay protection, and the label that keeps clusters apart.

Owns the outer 24 bytes of every datagram, the sub-keys and replay windows of senders, and the counters of what was
turned away. It must never look into a body. Turning a packet away changes nothing but a counter, costs at most one
derivation and one failed decryption, and for senders never heard before at most `STRANGERS_PER_S` times a second.

Layout, big-endian (docs/mesh/security.md)::

    magic 2 | version 1 | flags 1 | key id 4 | boot 8 | counter 8 | body | tag 16 (sealed only)

AES-256-GCM with a key of the sender's own, HKDF(secret, "datagram" | boot), so that counters of two senders can never
meet under one key; nonce = four zero bytes and the counter; the header and the cluster label are authenticated. Plain
packets have the same header, with the label's id in place of the key id, and no protection whatever.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from xxhash import xxh3_64_intdigest

from mesh.errors import DecodeError, SealError, SettingsError
from mesh.keyring import Keyring

MAGIC = b"\xa7M"
VERSION = 1
FLAG_SEALED = 1
HEADER = struct.Struct(">2sBBI8sQ")
HEADER_BYTES = HEADER.size
TAG_BYTES = 16
OVERHEAD_BYTES = HEADER_BYTES + TAG_BYTES
NONCE_PREFIX = b"\0\0\0\0"

REPLAY_WINDOW = 1024
"""Packets of one sender may overtake each other by this much; older ones are dropped unread."""

SENDERS_MAX = 8192
"""Senders whose sub-key and window are kept: twice the member table, for lives that ended. The one not heard for
longest goes; a packet of its old days could then be replayed once, which membership's incarnations make harmless."""

STRANGERS_PER_S = 100
"""Packets of unknown senders that are looked at per second; a join needs a handful."""

LABEL_BYTES_MAX = 255
UNKNOWN_KEY_IDS_MAX = 64


class Mode(Enum):
    """How plain packets are treated. A cluster goes from plain to sealed by one rolling restart into ACCEPT and one
    into REQUIRE; keys must be held for both."""

    PLAIN = "plain"
    """No keys; sealed packets cannot be read."""
    ACCEPT = "accept"
    """Both are read; sealed is sent to members that hold our key, plain to the others."""
    REQUIRE = "require"
    """Only sealed."""


class Opened(NamedTuple):
    """A datagram that was let in. Only if `is_sealed` does its boot id prove anything."""

    boot: bytes
    body: bytes
    is_sealed: bool


class _Sender:
    """Sub-key and replay window of one boot id under one key. Invariant: bit i of `seen` is counter `highest - i`."""

    __slots__ = ("cipher", "highest", "seen")

    def __init__(self, cipher: AESGCM) -> None:
        self.cipher = cipher
        self.highest = -1
        self.seen = 0

    def is_replay(self, counter: int) -> bool:
        """Was it seen, or is it too old to know?"""
        age = self.highest - counter
        return age >= 0 and (age >= REPLAY_WINDOW or bool(self.seen >> age & 1))

    def book(self, counter: int) -> None:
        """It was let in."""
        ahead = counter - self.highest
        if ahead > 0:
            self.seen = 1 if ahead >= REPLAY_WINDOW else (self.seen << ahead | 1) & ((1 << REPLAY_WINDOW) - 1)
            self.highest = counter
        else:
            self.seen |= 1 << -ahead


def label_id(label: bytes) -> int:
    """32 bits of a cluster label, for plain headers."""
    return xxh3_64_intdigest(label) & 0xFFFFFFFF


def datagram_cipher(keyring: Keyring, key_id: int, boot: bytes) -> AESGCM | None:
    """The cipher of one sender; None if the key is not held."""
    key = keyring.get(key_id)
    return None if key is None else AESGCM(key.derive(b"datagram" + boot))


class Sealer:
    """Seals what this node sends and opens what it receives. `boot` are the 8 random bytes of this life; they must
    not be used again by another life, or its packets would repeat nonces."""

    def __init__(
        self, boot: bytes, label: str = "", keyring: Keyring | None = None, mode: Mode | None = None
    ) -> None:
        if len(label.encode()) > LABEL_BYTES_MAX:
            raise SettingsError(f"a cluster label has at most {LABEL_BYTES_MAX} bytes")
        assert len(boot) == 8
        self.boot = boot
        self.label = label.encode()
        self.counts: dict[str, int] = {}
        self.unknown_key_ids: dict[int, int] = {}
        """Key ids we do not hold, with how often they came; for the log, once each."""
        self._label_id = label_id(self.label)
        self._counter = 0
        self._senders: dict[tuple[int, bytes], _Sender] = {}
        self._strangers_left = float(STRANGERS_PER_S)
        self._strangers_at_s = 0.0
        self.set_keyring(keyring or Keyring(), mode)

    def set_keyring(self, keyring: Keyring, mode: Mode | None = None) -> None:
        """Change keys or mode between two packets. Default mode: REQUIRE if there are keys, else PLAIN.

        Raises SettingsError when the mode needs a key and there is none; nothing changed then."""
        mode = mode or (Mode.REQUIRE if keyring.keys else Mode.PLAIN)
        if (mode is Mode.PLAIN) != (not keyring.keys):
            raise SettingsError("sealing needs a key, and a key needs sealing")
        self.keyring = keyring
        self.mode = mode
        self._senders = {at: one for at, one in self._senders.items() if keyring.get(at[0]) is not None}
        first = keyring.first
        self._own = None if first is None else datagram_cipher(keyring, first.id, self.boot)

    def count(self, what: str) -> None:
        """Count a packet."""
        self.counts[what] = self.counts.get(what, 0) + 1

    # ---- sending ----------------------------------------------------------------------------------------

    def seal(self, body: bytes, *, peer_holds_key: bool = False) -> bytes:
        """The datagram of a body. `peer_holds_key` matters in mode ACCEPT: the peer's record shows our sending key,
        or it was heard sealed."""
        self._counter += 1
        first = self.keyring.first
        is_sealed = self.mode is Mode.REQUIRE or (self.mode is Mode.ACCEPT and peer_holds_key)
        if not is_sealed or first is None or self._own is None:
            return HEADER.pack(MAGIC, VERSION, 0, self._label_id, self.boot, self._counter) + body
        header = HEADER.pack(MAGIC, VERSION, FLAG_SEALED, first.id, self.boot, self._counter)
        return header + self._own.encrypt(NONCE_PREFIX + header[16:24], body, header + self.label)

    # ---- receiving --------------------------------------------------------------------------------------

    def open(self, packet: bytes, now: float) -> Opened:
        """The body of a datagram. Raises DecodeError for what is no packet of ours, SealError for what does not
        authenticate, is replayed or not welcome; both change nothing but counters."""
        if len(packet) < HEADER_BYTES or packet[:2] != MAGIC or packet[2] != VERSION:
            self.count("garbage")
            raise DecodeError("not a mesh packet")
        _, _, flags, key_id, boot, counter = HEADER.unpack_from(packet)
        if boot == self.boot:
            self.count("own")
            raise SealError("our own packet came back")
        if flags & FLAG_SEALED:
            return self._open_sealed(packet, key_id, boot, counter, now)
        if self.mode is Mode.REQUIRE:
            self.count("plain_refused")
            raise SealError("plain packet")
        if key_id != self._label_id:
            self.count("foreign_label")
            raise SealError("another cluster")
        self.count("plain")
        return Opened(boot, packet[HEADER_BYTES:], False)

    def _open_sealed(self, packet: bytes, key_id: int, boot: bytes, counter: int, now: float) -> Opened:
        sender = self._senders.get((key_id, boot))
        is_new = sender is None
        if sender is None:
            sender = self._stranger(key_id, boot, now)
        elif sender.is_replay(counter):
            self.count("replayed")
            raise SealError("replay")
        nonce = NONCE_PREFIX + packet[16:24]
        aad = packet[:HEADER_BYTES] + self.label
        try:
            body = sender.cipher.decrypt(nonce, packet[HEADER_BYTES:], aad)
        except (InvalidTag, ValueError, OverflowError) as error:
            self.count("unauthentic")
            raise SealError(
                "does not authenticate; the key id is ours, so perhaps the label differs"
            ) from error
        sender.book(counter)
        if is_new:
            self._remember((key_id, boot), sender)
        self.count("sealed")
        return Opened(boot, body, True)

    def _stranger(self, key_id: int, boot: bytes, now: float) -> _Sender:
        """A sender never heard before under this key: worth a derivation only so often."""
        if self.keyring.get(key_id) is None:
            self.count("unknown_key")
            if key_id in self.unknown_key_ids or len(self.unknown_key_ids) < UNKNOWN_KEY_IDS_MAX:
                self.unknown_key_ids[key_id] = self.unknown_key_ids.get(key_id, 0) + 1
            raise SealError("unknown key")
        gained = max(0.0, now - self._strangers_at_s) * STRANGERS_PER_S
        self._strangers_left = min(float(STRANGERS_PER_S), self._strangers_left + gained)
        self._strangers_at_s = now
        if self._strangers_left < 1.0:
            self.count("strangers_dropped")
            raise SealError("too many strangers")
        self._strangers_left -= 1.0
        cipher = datagram_cipher(self.keyring, key_id, boot)
        assert cipher is not None
        return _Sender(cipher)

    def _remember(self, at: tuple[int, bytes], sender: _Sender) -> None:
        if len(self._senders) >= SENDERS_MAX:
            # In order of first hearing; good enough to choose one of thousands, and free for those who stay.
            del self._senders[next(iter(self._senders))]
        self._senders[at] = sender

    def forget(self, boot: bytes) -> None:
        """Membership has forgotten this life."""
        for key_id in self.keyring.ids:
            self._senders.pop((key_id, boot), None)

    @property
    def senders(self) -> int:
        """Senders tracked."""
        return len(self._senders)
