"""Version vectors and fingerprints: what I know of each source, and what you lack.

Owns the comparison of two vectors. A source is one life of one owner, `(owner, life)`; what a node has of it
is the version up to which it lacks nothing. It must never know what is done about a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
from xxhash import xxh3_64_intdigest

Source: TypeAlias = tuple[str, int]
"""(owner, life): life numbers of one owner grow from one start of it to the next."""

U64 = Annotated[int, msgspec.Meta(ge=0)]
"""MessagePack has no integers above 64 bits, so only the sign needs a check."""
OwnerName = Annotated[str, msgspec.Meta(max_length=128)]


class Row(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One line of a vector: the source, up to where the sender has it, and a mark to check it by.

    For owner maps `mark` is the fingerprint of the live entries (0: not checked). For streams it is the oldest
    sequence the sender can still deliver, and `keys` (key, count, xor) are its producer's own fingerprints.
    For last-writer-wins there is one row: the tombstone watermark as (owner, life), and the map's fingerprint.
    """

    owner: OwnerName
    life: U64
    have: U64
    mark: U64 = 0
    keys: tuple[tuple[bytes, U64, U64], ...] = ()


class Position(NamedTuple):
    """What this node has of a source."""

    have: int
    mark: int = 0


class Comparison(NamedTuple):
    """`lacking`: they have more. `behind`: they lack what follows the number. `differing`: same version,
    other content (both marks known). All three are empty when the vectors say the same."""

    lacking: list[Row]
    behind: list[tuple[Source, int]]
    differing: list[Row]


def compare(mine: Mapping[Source, Position], theirs: Iterable[Row]) -> Comparison:
    """Compare what I know with the vector of a peer. Sources they do not list they have nothing of."""
    lacking: list[Row] = []
    behind: list[tuple[Source, int]] = []
    differing: list[Row] = []
    listed: set[Source] = set()
    for row in theirs:
        source = (row.owner, row.life)
        listed.add(source)
        position = mine.get(source)
        if position is None or row.have > position.have:
            lacking.append(row)
        elif row.have < position.have:
            behind.append((source, row.have))
        elif row.mark != position.mark and row.mark and position.mark:
            differing.append(row)
    behind.extend((source, 0) for source in mine if source not in listed)
    return Comparison(lacking, behind, differing)


def fingerprint(key: bytes, value: bytes) -> int:
    """64 bits of one entry; the fingerprint of a set of entries is the xor of theirs. Not against forgers."""
    return xxh3_64_intdigest(value, xxh3_64_intdigest(key))


def sealed_fingerprint(owner: str, life: int, mark: int) -> int:
    """64 bits of one source and its mark, to be xored with those of other sources."""
    return xxh3_64_intdigest(
        mark.to_bytes(8, "big") + (life & (2**64 - 1)).to_bytes(8, "big") + owner.encode()
    )
