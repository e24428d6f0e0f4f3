"""`manual`: a sticky map from routing keys to workers.

A new key is assigned by `--assignment-mode`: any worker, the one with least in flight, or the one with fewest keys. A
call without a key is assigned the same way and not remembered. The map's rules are in `sticky_map.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.policies.candidates import ById, in_flight_cost, least
from smg.policies.policy import Stateless, Terms, Wants
from smg.policies.shared_keys import OWN_KEYS, SharedKeys
from smg.policies.sticky_map import HIT, MISS, VACANT, StickyMap
from smg.settings import Routing


class Manual(Stateless):
    """The key's worker. `branches` counts placements by what decided, `entries` are the keys remembered (MET-6)."""

    name = "manual"
    wants = Wants.KEY

    def __init__(self, settings: Routing, shared: SharedKeys = OWN_KEYS) -> None:
        self._mode = settings.assignment_mode
        self._map = StickyMap(settings.max_idle_secs, shared)
        self._by_id = ById()
        self.branches: dict[str, int] = {HIT: 0, MISS: 0, VACANT: 0, "no_routing_id": 0}

    @property
    def entries(self) -> int:
        """Keys remembered (`smg_manual_policy_cache_entries`)."""
        return len(self._map)

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The worker the key sticks to, else an assignment."""
        if not workers:
            return None
        key = call.routing_key
        if key:
            worker = self._map.worker_of(key, self._by_id.of(workers), now)
            if worker is not None:
                return worker
        if self._mode == "min_load":
            return least(workers, in_flight_cost, rng)
        if self._mode == "min_group":
            return least(workers, self._map.keys_of, rng)
        return workers[int(rng.random() * len(workers))]

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Remembers the key's worker. A call that named its worker (RT-4) leaves the key where it is."""
        if call.target:
            return
        key = call.routing_key
        if not key:
            self.branches["no_routing_id"] += 1
            return
        self.branches[self._map.place(key, worker, now)] += 1

    def heard_key(self, position: int, worker: Worker, now: float) -> None:
        """Another node has put this key onto `worker`."""
        self._map.heard(position, worker, now)

    def removed(self, worker: Worker) -> None:
        """Its keys are homeless."""
        self._map.forget(worker)

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """No costs; the key's worker is marked, and every row tells how many keys stick there."""
        key = call.routing_key
        home = self._map.worker_of(key, self._by_id.of(workers), now) if key else None
        return [
            Terms(
                worker.id,
                reason=("holds the routing key, " if worker is home else "")
                + f"{self._map.keys_of(worker)} keys, {worker.in_flight} in flight",
            )
            for worker in workers
        ]
