"""When a process that ended is started again: soon, then later and later, and soon again once it has lived.

Owns the pauses between two lives of one process; pure, the supervisor waits. It must never give up by itself: as long as
another process serves, trying again costs nothing, and the supervisor ends when nobody serves.
"""

from __future__ import annotations

from random import Random

FIRST_PAUSE_S = 0.1
"""After one death: a process that was killed is back before its clients' second try."""

PAUSE_MAX_S = 10.0
"""Between two tries of one that cannot start: a try takes half a second of a core."""

JITTER_RATIO = 0.2
"""Processes that died together are not started together again."""

CALM_S = 30.0
"""Who lived for so long did not die of its start; the pauses begin anew."""


class Restarts:
    """The pauses of one process."""

    __slots__ = ("count", "in_a_row")

    def __init__(self) -> None:
        self.count = 0
        """Lives that ended."""
        self.in_a_row = 0
        """Of those, how many one after another were short."""

    def pause_s(self, lived_s: float, rng: Random) -> float:
        """A life that lasted `lived_s` has ended: how long to wait before the next one."""
        self.count += 1
        if lived_s >= CALM_S:
            self.in_a_row = 0
        self.in_a_row += 1
        # 2 ** 30 is far above the most, and a float for any number of deaths.
        longest_s = min(PAUSE_MAX_S, FIRST_PAUSE_S * 2.0 ** min(self.in_a_row - 1, 30))
        return longest_s * (1.0 - JITTER_RATIO * rng.random())
