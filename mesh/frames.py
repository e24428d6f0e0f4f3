"""Frames of the stream between two members: length 4, type 1, body.

Owns the cutting of a byte stream into frames and the list of frame types. The length counts the type and
the body, big-endian. It must never look into a body, wait, or allocate by a length that a peer claims:
only bytes that really came are kept.

No frame is ever answered by a frame of the same type. Two ends that answer like with like talk for ever.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from mesh.errors import DecodeError

FRAME_BYTES_MAX = 1024 * 1024
"""Cap of type and body together; a longer frame is the peer's fault and ends the stream."""

HEADER_BYTES = 4


class FrameType(IntEnum):
    """Frame types. Unknown types are skipped, so that a later version can add some."""

    HELLO = 1
    """First frame of the dialer: who I am, what I speak; answered by WELCOME or REFUSED."""
    MEMBERS = 2
    """Member table of the side that asks (push-pull); answered by MEMBERS_REPLY."""
    MEMBERS_REPLY = 3
    PING = 4
    """Fall-back probe where datagrams do not pass; answered by ACK."""
    ACK = 5
    KEEPALIVE = 6
    """One-way, never answered."""
    WELCOME = 7
    """First frame of the acceptor: who I am; the stream is open."""
    NEWS = 8
    """Any other membership packet (codec.py knows its kind); answered, if at all, by another kind."""
    ASK = 9
    """A question of the library's user; answered by ANSWER."""
    ANSWER = 10
    REFUSED = 11
    """Last frame of a stream: why it is closed (greeting.py has the codes); never answered."""
    DATAGRAM = 12
    """What would be a datagram, in meshes where only streams are protected (TLS without a secret)."""
    NOTICE = 13
    """Something the peer should tell its operator (its advertised address cannot be dialled); never answered."""

    VECTOR = 32
    """What I have, per namespace and owner; answered by DELTA, WANT, SUMS or SNAP_WANT."""
    DELTA = 33
    """Entries or payloads of one owner."""
    WANT = 34
    """Send me what follows this version; answered by DELTA."""
    SUMS = 35
    """Bucket sums of a last-writer-wins map; answered by DELTA and WANT_KEYS."""
    WANT_KEYS = 36
    """Send me these buckets of a last-writer-wins map; answered by DELTA."""
    SNAP_WANT = 37
    """Send me a snapshot of one stream; answered by SNAP."""
    SNAP = 38
    """One chunk of a snapshot, or a refusal."""


STATE_TYPES = frozenset(range(32, 48))
"""Types that belong to `Replica.receive`."""


class Frame(NamedTuple):
    """One frame without its length."""

    type: int
    body: bytes


def encode_frame(frame: Frame) -> bytes:
    """Bytes of a frame on the stream. The body must fit the cap (asserted: it is our own)."""
    size = 1 + len(frame.body)
    assert size <= FRAME_BYTES_MAX, size
    return size.to_bytes(HEADER_BYTES, "big") + bytes((frame.type,)) + frame.body


class FrameReader:
    """Cuts received bytes into frames; holds at most one unfinished frame."""

    __slots__ = ("_buffer", "_frame_bytes_max")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._frame_bytes_max = frame_bytes_max

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by these bytes.

        Raises DecodeError when a frame has no type or is longer than the cap; the reader is then of no
        further use and the stream must be closed. Frames completed before it are lost with the stream.
        """
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            size = int.from_bytes(buffer[start : start + HEADER_BYTES], "big")
            if not 1 <= size <= self._frame_bytes_max:
                raise DecodeError(f"frame of {size} bytes")
            end = start + HEADER_BYTES + size
            if len(buffer) < end:
                break
            frames.append(Frame(buffer[start + HEADER_BYTES], bytes(buffer[start + HEADER_BYTES + 1 : end])))
            start = end
        if start:
            del buffer[:start]
        return frames

    def finish(self) -> None:
        """The stream ended. Raises DecodeError if it ended inside a frame."""
        if self._buffer:
            raise DecodeError("stream ended inside a frame")

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the unfinished frame."""
        return len(self._buffer)
