"""Stamps for last-writer-wins: hybrid logical time and the writer's name, a total order.

Owns the clock that gives them out (Kulkarni and others, "Logical Physical Clocks", 2014, section 4). A stamp
never runs behind one that was seen, and stays within the bound of the fastest wall clock in the cluster. It
must never read a clock: wall time is handed in.

Deviation from the paper: physical time is milliseconds in the upper 48 bits of one integer and the logical
counter the lower 16. When the counter is full it carries into the milliseconds, so order is never lost.
"""

from __future__ import annotations

from typing import NamedTuple

COUNTER_BITS = 16
TIME_MAX = (1 << 63) - 1
"""Largest time of a stamp; 48 bits of milliseconds reach the year 6429."""


class Stamp(NamedTuple):
    """`time` is milliseconds << 16 | counter; `node` breaks ties."""

    time: int
    node: str

    @property
    def wall_s(self) -> float:
        """The wall time it claims, in seconds."""
        return (self.time >> COUNTER_BITS) / 1000.0


ZERO = Stamp(0, "")
"""Earlier than every stamp given out."""


def time_of(wall_s: float) -> int:
    """Time part of a stamp for this wall time with counter zero."""
    return max(0, int(wall_s * 1000.0)) << COUNTER_BITS


class Clock:
    """Gives out stamps of one node, each later than all it gave out or observed."""

    __slots__ = ("_last", "_node")

    def __init__(self, node: str) -> None:
        self._node = node
        self._last = 0

    def stamp(self, wall_s: float) -> Stamp:
        """The next stamp."""
        self._last = max(self._last + 1, time_of(wall_s))
        assert self._last <= TIME_MAX
        return Stamp(self._last, self._node)

    def observe(self, stamp: Stamp) -> None:
        """A stamp of another node was accepted; later ones of ours must beat it. The caller has checked that it
        is not further ahead than it tolerates: one accepted stamp of the far future would stay for ever."""
        self._last = max(self._last, stamp.time)
