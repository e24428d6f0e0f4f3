"""Are we cut off? A judgement from membership alone, for users who divide limits or widen slack while it lasts.

Owns the memory of recent losses. Nothing in the mesh itself depends on it: both sides of a partition serve, and no
quorum is needed. Must never change membership.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec

from mesh.messages import Event, Left, MemberDown, MemberUp

LOST_TOGETHER_S = 15.0
"""Losses within this span belong together: the slowest detection at 1,000 members takes about half of it."""
LOST_SHARE = 0.25
"""A crash takes one; a cut takes a share. Together lost and at least this share of all: a partition is likely."""


class Standing(msgspec.Struct, frozen=True, gc=False):
    """The judgement at one moment. Counts include ourselves."""

    live: int
    last_known: int
    """Live members and those lost within the memory: by this number limits may be divided."""
    is_partitioned: bool
    is_minority: bool
    """Partitioned, and not more than half of the last known are with us."""


class PartitionWatch:
    """Feed it every membership event, ask `standing`.

    `memory_s`: a member lost for longer is taken as gone for good. Bounded by the names in the member table: an entry
    exists only between a member's death and its return, its leave, or the end of the memory.
    """

    __slots__ = ("_live", "_lost", "_memory_s")

    def __init__(self, memory_s: float = 600.0) -> None:
        self._memory_s = memory_s
        self._live: set[str] = set()
        self._lost: dict[str, float] = {}

    def note(self, event: Event, now: float) -> None:
        """One event of the membership machine."""
        if isinstance(event, MemberUp):
            self._live.add(event.record.name)
            self._lost.pop(event.record.name, None)
        elif isinstance(event, MemberDown):
            self._live.discard(event.record.name)
            self._lost[event.record.name] = now
        elif isinstance(event, Left):
            self._live.discard(event.record.name)
            self._lost.pop(event.record.name, None)

    def standing(self, now: float) -> Standing:
        """Where we stand now."""
        self._lost = {name: lost_s for name, lost_s in self._lost.items() if now - lost_s < self._memory_s}
        live = len(self._live) + 1
        known = live + len(self._lost)
        times = sorted(self._lost.values())
        together = max(
            (bisect_right(times, first + LOST_TOGETHER_S) - place for place, first in enumerate(times)),
            default=0,
        )
        is_alone = live == 1 and known > 1
        is_partitioned = is_alone or (together >= 2 and together >= LOST_SHARE * known)
        return Standing(live, known, is_partitioned, is_partitioned and 2 * live <= known)
