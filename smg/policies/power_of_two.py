"""`power_of_two`: two distinct candidates by chance, the less burdened of them.

Looks at two workers whatever the size of the fleet, and never sends the whole herd to the one that looked idle a moment
ago, so it stays good when load reports are late. The wait is that of `least_load` when both have a report that counts,
else requests in flight times cost. Equal ones go to the higher priority, then to chance (WRK-16).
Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.load import fresh_report, reported_wait_s, wait_rules
from smg.fleet.worker import Worker
from smg.policies.candidates import in_flight_cost
from smg.policies.policy import Stateless, Terms
from smg.settings import Routing


class PowerOfTwo(Stateless):
    """The better of two."""

    name = "power_of_two"
    is_random = True

    def __init__(self, settings: Routing) -> None:
        self._rules = wait_rules(settings)

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The less burdened of two that chance drew."""
        count = len(workers)
        if count < 2:
            return workers[0] if count else None
        index = int(rng.random() * count)
        other = int(rng.random() * (count - 1))
        first, second = workers[index], workers[other if other < index else other + 1]
        told_first, told_second = fresh_report(first, now), fresh_report(second, now)
        if told_first is not None and told_second is not None:
            ahead = reported_wait_s(second, told_second, self._rules) - reported_wait_s(
                first, told_first, self._rules
            )
        else:
            ahead = in_flight_cost(second) - in_flight_cost(first)
        if ahead == 0.0:
            ahead = first.spec.priority - second.spec.priority
        return first if ahead >= 0 else second  # equal: `first` was drawn by chance already

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """The expected wait where a report counts, else the requests in flight."""
        rows = []
        for worker in workers:
            told = fresh_report(worker, now)
            if told is None:
                rows.append(Terms(worker.id, reason=f"{worker.in_flight} in flight, no load report"))
            else:
                wait_s = reported_wait_s(worker, told, self._rules)
                rows.append(Terms(worker.id, cost=wait_s, wait=wait_s, reason=f"{told.waiting} waiting"))
        return rows
