"""Bodies of the state frames: MessagePack arrays, one struct per frame type.

Owns their layout (docs/mesh/state.md has it byte by byte). Arrays grow at the tail: elements we do not know
are skipped in headers and kept in entries, which may be forwarded. Decoding raises DecodeError and nothing
else, and allocates in proportion to the bytes that came, never to a length they claim.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, TypeVar

import msgspec

from mesh.digest import U64, OwnerName, Row
from mesh.errors import DecodeError
from mesh.frames import Frame, FrameType
from mesh.namespace import KEY_BYTES_MAX, VALUE_BYTES_MAX

TAIL_BYTES_MAX = 1024
"""Unknown trailing elements of one entry are kept up to this size, else dropped."""

NamespaceName = Annotated[str, msgspec.Meta(max_length=64)]
Key = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES_MAX)]
Chunk = Annotated[bytes, msgspec.Meta(max_length=VALUE_BYTES_MAX)]


class Kind(IntEnum):
    """Merge rules on the wire; a namespace whose rules differ at two nodes is not exchanged."""

    LWW = 1
    OWNED = 2
    EPHEMERAL = 3
    COUNTER = 4
    STREAM = 5


PUSH = 1
"""Vector flag: send me what I lack, of all sources (else only what is your own)."""
QUIET = 2
"""Vector flag of last-writer-wins: the end of an exchange, to share the watermark if we are equal now; say nothing."""
RESET = 1
"""Delta and want flag: the whole map of the source; entries not in it are gone."""
FIRST = 2
LAST = 4
"""Delta and snapshot flags: first and last part."""
LOST = 8
"""Delta flag: what lies between what you have and `since` is no longer in my ring.
Snapshot flag: I cannot tell; `at` is where my ring can take you on."""


class Vector(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """All sources of one namespace."""

    namespace: NamespaceName
    kind: U64
    flags: U64
    rows: tuple[Row, ...]


class Delta(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """All entries of a source with since < version <= upto that are still current, by rising version.

    Owner maps: [key, version, value or nil, ...], ephemeral [key, version, value or nil, age in ms, ...].
    Streams: payload, or [payload, ...]. Last writer wins: [key, value or nil, time, node, ...].
    """

    namespace: NamespaceName
    owner: OwnerName
    life: U64
    since: U64
    upto: U64
    flags: U64
    entries: list[Any]


class WantRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Send what follows `since` of this source."""

    owner: OwnerName
    life: U64
    since: U64
    flags: U64 = 0


class Want(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Questions about one namespace."""

    namespace: NamespaceName
    rows: tuple[WantRow, ...]


class Sums(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Fingerprints of the buckets of a last-writer-wins map."""

    namespace: NamespaceName
    sums: tuple[U64, ...]


class WantKeys(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Bits of the buckets whose entries are wanted."""

    namespace: NamespaceName
    mask: U64


class SnapWant(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Send a snapshot of this source, of one key or (nil) of all. Its chunks carry the ticket, so that those of
    an abandoned one are known as such."""

    namespace: NamespaceName
    owner: OwnerName
    life: U64
    key: Key | None
    ticket: U64


class Snap(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Chunk number `index` of a snapshot that holds the work of all deltas up to `at`."""

    namespace: NamespaceName
    owner: OwnerName
    life: U64
    key: Key | None
    ticket: U64
    at: U64
    flags: U64
    index: U64
    chunk: Chunk


Body = Vector | Delta | Want | Sums | WantKeys | SnapWant | Snap

_TYPES: dict[type, FrameType] = {
    Vector: FrameType.VECTOR,
    Delta: FrameType.DELTA,
    Want: FrameType.WANT,
    Sums: FrameType.SUMS,
    WantKeys: FrameType.WANT_KEYS,
    SnapWant: FrameType.SNAP_WANT,
    Snap: FrameType.SNAP,
}
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {
    int(number): msgspec.msgpack.Decoder(kind) for kind, number in _TYPES.items()
}
_encode = msgspec.msgpack.Encoder().encode

_FOREIGN_ERRORS = (msgspec.MsgspecError, RecursionError, ValueError, TypeError, OverflowError)
"""All that msgspec was seen to raise on hostile input: its own, deep nesting, odd extension values."""

T = TypeVar("T")


def encode_body(body: Body) -> Frame:
    """The frame of a body."""
    return Frame(_TYPES[type(body)], _encode(body))


def decode_body(frame: Frame) -> Body | None:
    """The body of a state frame; None for a type we do not know. Raises DecodeError for garbage."""
    decoder = _DECODERS.get(frame.type)
    if decoder is None:
        return None
    try:
        body: Body = decoder.decode(frame.body)
    except _FOREIGN_ERRORS as error:
        raise DecodeError(f"state frame {frame.type}") from error
    return body


def keep_tail(entry: list[Any], known: int) -> bytes:
    """Elements of an entry behind the ones we know, to be forwarded with it; none if they are too long.

    Encoded, because that is what they are counted by: as objects they could be sixty times as large."""
    if len(entry) == known:
        return b""
    tail = _encode(entry[known:])
    return tail if len(tail) <= TAIL_BYTES_MAX else b""


def with_tail(entry: list[Any], tail: bytes) -> list[Any]:
    """An entry with the elements that `keep_tail` kept."""
    return [*entry, *msgspec.msgpack.decode(tail)] if tail else entry


def checked_key(value: object) -> bytes:
    """The key of an entry. Raises DecodeError."""
    if type(value) is not bytes or not 0 < len(value) <= KEY_BYTES_MAX:
        raise DecodeError("entry key")
    return value


def checked_value(value: object) -> bytes | None:
    """The value of an entry, None for a deletion. Raises DecodeError."""
    if value is None:
        return None
    if type(value) is not bytes or len(value) > VALUE_BYTES_MAX:
        raise DecodeError("entry value")
    return value


def checked_number(value: object) -> int:
    """An integer that is not negative. Raises DecodeError."""
    if type(value) is not int or value < 0:
        raise DecodeError("entry number")
    return value


def checked_entry(value: object, known: int) -> list[Any]:
    """An array of at least `known` elements. Raises DecodeError."""
    if type(value) is not list or len(value) < known:
        raise DecodeError("entry")
    return value
