"""The slots of the prefix index: the blocks of one worker, in order of use.

Owns the order (least recently used first, parents younger than their children) and the bit that stands for the slot in
masks of owners. It never evicts and knows no other slot: bounds are the index's business.
"""

from __future__ import annotations

from collections.abc import Iterator

RECENT_SHARE = 4
"""A chain among the youngest 1/16 of a slot (2 to this power) is young enough: a use of it need not move it."""
RECENT_MAX = 1_024
"""Chains of a slot whose youth is remembered; then all are forgotten, which costs one move each."""


class Slot:
    """One bit of the owner masks and the blocks it owns."""

    __slots__ = ("bit", "capacity", "moves", "position", "recent", "used")

    def __init__(self, position: int, capacity: int) -> None:
        self.position = position
        self.bit = 1 << position
        self.capacity = capacity
        self.used: dict[int, int] = {}  # block -> parent, least recently used first
        self.moves = 0  # blocks made the most recent ones, ever
        self.recent: dict[
            int, int
        ] = {}  # last block of a chain -> `moves` when the chain was made the most recent

    def is_young(self, leaf: int, blocks: int) -> bool:
        """Whether the chain of so many blocks that ends with `leaf` is among the youngest anyway, so that a use of it
        need not move it. If not, it is about to be moved: that is noted."""
        recent, moves = self.recent, self.moves
        if leaf in recent:
            is_young = moves - recent[leaf] < self.capacity >> RECENT_SHARE
            if is_young and leaf in self.used and len(self.used) <= self.capacity:
                return True
        elif len(recent) >= RECENT_MAX:
            recent.clear()
        self.moves = recent[leaf] = moves + blocks
        return False


class Holdings:
    """The slots of one worker."""

    __slots__ = ("capacity", "older", "placed", "stored")

    def __init__(self, placed: Slot) -> None:
        self.placed = placed
        self.older: Slot | None = None  # the placements before the last `fade`
        self.stored: Slot | None = None
        self.capacity = placed.capacity

    def slots(self) -> Iterator[Slot]:
        """All of them; `placed` first."""
        yield self.placed
        if self.older is not None:
            yield self.older
        if self.stored is not None:
            yield self.stored
