"""Local health: how much this node may trust its own clock and network before it accuses others.

Owns the health score (Lifeguard, arXiv 1707.00788, section IV.A), what the own loop's lateness does to it, and the
hold on death verdicts after a freeze. Must never know members.

Deviations from the paper: a late own loop counts like a missed nack; a merge after a partition forgives the score
(being cut off says nothing about us); refuting a *death* does not count, only refuting a suspicion does.
"""

from __future__ import annotations

from mesh.settings import SwimSettings

LAG_SHOWN_S = 5.0
"""A late loop is reported in acks for this long after it was measured."""


class Awareness:
    """The score, 0 (well) to `health_max`."""

    __slots__ = ("_hold_until_s", "_lag_s", "_lag_seen_s", "_max", "_raised_s", "_settings", "score")

    def __init__(self, settings: SwimSettings) -> None:
        self._settings = settings
        self._max = settings.health_max
        self.score = 0
        self._hold_until_s = float("-inf")
        self._lag_s = 0.0
        self._lag_seen_s = float("-inf")
        self._raised_s = float("-inf")

    def add(self, points: int) -> None:
        """Good news is negative. The score stays within its bounds."""
        self.score = max(0, min(self._max, self.score + points))

    def forgive(self) -> None:
        """A partition healed: what we suffered was the cut, not us."""
        self.score = 0

    def stretch(self) -> int:
        """By what our intervals are multiplied."""
        return 1 + self.score

    def note_lag(self, lag_s: float, now: float) -> bool:
        """The own loop ran `lag_s` late. True if that voids what is being measured just now.

        Counts at most once per probe interval, since a shell and the machine itself may both report one lateness.
        """
        settings = self._settings
        if lag_s <= settings.lag_unhealthy_s:
            return False
        self._lag_s = max(lag_s, self._lag_s) if now - self._lag_seen_s < LAG_SHOWN_S else lag_s
        self._lag_seen_s = now
        if now - self._raised_s >= settings.probe_interval_s:
            self._raised_s = now
            self.add(1)
        if lag_s > settings.lag_frozen_s:
            self._hold_until_s = max(self._hold_until_s, now + settings.frozen_hold_s)
        return True

    def hold_until(self) -> float:
        """Before this time we declare nobody dead ourselves."""
        return self._hold_until_s

    def lag_ms(self, now: float) -> int:
        """What to say in an ack."""
        return int(self._lag_s * 1000) if now - self._lag_seen_s < LAG_SHOWN_S else 0
