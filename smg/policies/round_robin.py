"""`round_robin`: the candidates in turn, in order of registration.

Remembers the place of the worker that was served last, not a count: when a worker leaves, fails or is skipped by a
retry, the turn goes on behind the last one instead of jumping, so any n requests in a row over the same n candidates
touch each once. A request that named its worker (RT-4) takes nobody's turn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from random import Random

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.policies.policy import Stateless
from smg.settings import Routing

_ORDER = attrgetter("order")


class RoundRobin(Stateless):
    """The next in turn."""

    name = "round_robin"

    def __init__(self, settings: Routing) -> None:
        self._last_order = -1

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The first of `workers` registered after the last one served, else the first of all."""
        if not workers:
            return None
        index = bisect_right(workers, self._last_order, key=_ORDER)
        return workers[index] if index < len(workers) else workers[0]

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """The turn is behind `worker` now."""
        if not call.target:
            self._last_order = worker.order
