"""`passthrough`: always the first candidate in order of registration.

For one worker, or one worker and its stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.policies.policy import Stateless
from smg.settings import Routing


class Passthrough(Stateless):
    """The first candidate."""

    name = "passthrough"

    def __init__(self, settings: Routing) -> None:
        pass

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The first of `workers`."""
        return workers[0] if workers else None
