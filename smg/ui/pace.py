"""How fast counters move: rates, shares and quantiles over the last seconds, out of readings of what only grows.

Owns the few minutes of readings that the page's numbers and curves are made of. A machine: it is told what was read and when,
and gives numbers. Counters that fall, because a model left and its series with it, count as standing still.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import msgspec

HEADLINE_S = 60.0
"""What the large numbers look back over: long enough to be steady, short enough to show what was just changed."""
CURVE_S = 10.0
"""What one point of a curve looks back over, for ratios and quantiles: at a few requests a second, fewer would be noise."""
RATE_S = 5.0
"""What rates look back over; engines answer in bursts."""
POINTS_MAX = 120
"""Two minutes of curve at one reading a second."""
READINGS_MAX = 90
"""Readings that are kept: `HEADLINE_S` and some, at one a second."""
SHARE_S = 30.0
"""Half of a worker's share of requests is older than about two thirds of this."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Counters at one moment; every number only grows. `ttft` are the counts of the histogram's buckets."""

    at_s: float
    requests: float = 0.0
    failures: float = 0.0
    tokens_in: float = 0.0
    tokens_out: float = 0.0
    prompt_chars: float = 0.0
    matched_chars: float = 0.0
    cached_tokens: float = 0.0
    mesh_in: float = 0.0
    mesh_out: float = 0.0
    ttft: tuple[int, ...] = ()
    delay: tuple[int, ...] = ()


class Pace:
    """See the module. `read` about once a second; everything else answers for the last reading."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque(maxlen=READINGS_MAX)
        self._totals: dict[str, int] = {}
        self._recent: dict[str, float] = {}

    @property
    def last(self) -> Reading:
        """The last reading."""
        return self._readings[-1]

    def read(self, reading: Reading, finished: Mapping[str, int]) -> None:
        """The counters now, and requests finished by each worker since it came.

        After a pause as long as the headline looks back, what was read before says nothing any more.
        """
        readings = self._readings
        elapsed_s = reading.at_s - readings[-1].at_s if readings else 0.0
        if elapsed_s > HEADLINE_S:
            readings.clear()
            self._totals, self._recent = {}, {}
        readings.append(reading)
        kept = math.exp(-elapsed_s / SHARE_S)
        recent = {}
        for worker, total in finished.items():
            grown = max(0, total - self._totals.get(worker, total))
            recent[worker] = self._recent.get(worker, 0.0) * kept + grown
        self._totals, self._recent = dict(finished), recent

    def shares(self) -> Mapping[str, float]:
        """Each worker's share of the recently finished requests; empty while there are none."""
        total = sum(self._recent.values())
        if total < 0.5:  # what is left of requests long ago
            return {}
        return {worker: recent / total for worker, recent in self._recent.items()}

    def per_s(self, *names: str, over_s: float = RATE_S) -> float:
        """Growth of these counters together, per second; 0 with a single reading."""
        before, last = self._before(over_s), self.last
        elapsed_s = last.at_s - before.at_s
        if elapsed_s <= 0.0:
            return 0.0
        return sum(_grown(before, last, name) for name in names) / elapsed_s

    def ratio(self, part: str, whole: str, over_s: float) -> float | None:
        """Growth of one counter over that of another; None when the second stood still."""
        before, last = self._before(over_s), self.last
        grown = _grown(before, last, whole)
        return min(1.0, _grown(before, last, part) / grown) if grown > 0 else None

    def counts(self, name: str, over_s: float) -> list[int]:
        """Observations of a histogram, by bucket."""
        before, last = getattr(self._before(over_s), name), getattr(self.last, name)
        if len(before) != len(last):
            return list(last)
        return [max(0, new - old) for old, new in zip(before, last, strict=True)]

    def _before(self, over_s: float) -> Reading:
        """The newest reading that is at least `over_s` old, else the oldest there is."""
        found = self._readings[0]
        until_s = self.last.at_s - over_s
        for reading in self._readings:
            if reading.at_s > until_s + 0.05:  # readings come some milliseconds early or late
                break
            found = reading
        return found


def total(counts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The sum of histograms with equal bounds."""
    return tuple(map(sum, zip(*counts, strict=True)))


def quantile(bounds_s: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value below which `share` of the observations lie, or None without any.

    Within a bucket observations are taken to lie evenly, and what is above the last bound counts as at it, so that the result
    is what Prometheus' `histogram_quantile` gives.
    """
    whole = sum(counts)
    if not whole:
        return None
    rank = share * whole
    passed, low = 0, 0.0
    for bound, count in zip(bounds_s, counts, strict=False):
        if count and passed + count >= rank:
            return low + (bound - low) * max(0.0, rank - passed) / count
        passed += count
        low = bound
    return bounds_s[-1]


def _grown(before: Reading, last: Reading, name: str) -> float:
    return max(0.0, float(getattr(last, name) - getattr(before, name)))
