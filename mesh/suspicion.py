"""One suspicion: how long a doubt lasts before it becomes a death.

Owns the Lifeguard formula (arXiv 1707.00788, section IV.B): the timer starts long and shrinks towards its minimum as
independent accusers confirm. Must never decide a death itself; the judge asks `deadline_s`.
"""

from __future__ import annotations

import math

from mesh.settings import SwimSettings


def suspicion_min_s(settings: SwimSettings, members: int, has_eof: bool) -> float:
    """Shortest life of a suspicion in seconds, for a mesh of `members` (ourselves included)."""
    if has_eof:
        return settings.suspicion_mult_eof * settings.probe_interval_s
    return settings.suspicion_mult * max(1.0, math.log10(max(1, members))) * settings.probe_interval_s


class Suspicion:
    """A running doubt about one life of one member.

    Invariant: `deadline_s` never moves later, except by `hold`.
    """

    __slots__ = ("_condemned_s", "_held_s", "_max_s", "_min_s", "_needed", "accusers", "start_s")

    def __init__(
        self, settings: SwimSettings, members: int, accuser: str, now: float, has_eof: bool = False
    ) -> None:
        self.start_s = now
        self.accusers = {accuser}
        self._min_s = suspicion_min_s(settings, members, has_eof)
        # Who could confirm: all but the accused and the first accuser. With fewer than we would wait for, waiting
        # six times longer for them is pointless: memberlist does the same.
        self._needed = settings.confirmations if members - 2 >= settings.confirmations else 0
        self._max_s = self._min_s * (settings.suspicion_max_mult if self._needed else 1.0)
        self._condemned_s = float("inf")
        self._held_s = float("-inf")

    def confirm(self, accuser: str) -> bool:
        """Another accuser. True if it is new and still shortens the timer: then its accusation is worth spreading."""
        if accuser in self.accusers or len(self.accusers) - 1 >= self._needed:
            return False
        self.accusers.add(accuser)
        return True

    def saw_eof(self, settings: SwimSettings, members: int) -> None:
        """The accused's stream ended: only the short form of the minimum is waited for."""
        shorter = suspicion_min_s(settings, members, has_eof=True)
        if shorter < self._min_s:
            self._max_s = self._max_s * shorter / self._min_s
            self._min_s = shorter

    def condemn(self, at_s: float) -> None:
        """Its port refuses (seen twice): dead at this time, whatever the timer says."""
        self._condemned_s = min(self._condemned_s, at_s)

    def hold(self, until_s: float) -> None:
        """We were frozen ourselves: no verdict before this time."""
        self._held_s = max(self._held_s, until_s)

    def deadline_s(self) -> float:
        """When the doubt becomes a death."""
        wait_s = self._max_s
        if self._needed:
            share = math.log(len(self.accusers)) / math.log(self._needed + 1)
            wait_s = max(self._min_s, self._max_s - share * (self._max_s - self._min_s))
        return max(self._held_s, min(self._condemned_s, self.start_s + wait_s))
