"""`random`: any candidate, all alike.

Keeps nothing and looks at nothing; the yardstick for policies that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.policies.policy import Stateless
from smg.settings import Routing


class RandomChoice(Stateless):
    """Uniform choice."""

    name = "random"
    is_random = True

    def __init__(self, settings: Routing) -> None:
        pass

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """Any of `workers`."""
        return workers[int(rng.random() * len(workers))] if workers else None
