"""`consistent_hashing`: the routing key on a ring of 150 points per worker; without a key, chance.

One worker more or less moves about 1/n of the keys. A key whose worker is no candidate for a while goes to the next on
the ring and stays there (RT-6): the ring alone would take it back, and the caches would be cold twice. Only such keys
are remembered, in a map of bounded size; the rest is arithmetic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.hash_ring import position_of
from smg.fleet.worker import Worker
from smg.policies.candidates import could_serve
from smg.policies.policy import Stateless, Terms, Wants
from smg.policies.ring_members import RingMembers
from smg.policies.shared_keys import OWN_KEYS, SharedKeys
from smg.settings import Routing

MOVED_MAX = 65_536
"""Keys away from their place on the ring that are remembered; the longest unused go first, and then follow the ring.
About 10 MB when full."""


class ConsistentHash(Stateless):
    """The key's worker on the ring.

    `branches` counts placements by what decided (MET-6).
    """

    name = "consistent_hashing"
    wants = Wants.KEY

    def __init__(self, settings: Routing, shared: SharedKeys = OWN_KEYS) -> None:
        self._members = RingMembers()
        self._shared = shared
        self._moved: OrderedDict[int, str] = OrderedDict()  # position of a key -> worker it moved to
        self.branches: dict[str, int] = {
            "target_worker_hit": 0,
            "routing_key_hit": 0,
            "random_fallback": 0,
        }

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """Where the key moved to, else its next candidate on the ring."""
        if not workers:
            return None
        key = call.routing_key
        if not key:
            return workers[int(rng.random() * len(workers))]
        return self._of_key(position_of(key), workers)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Remembers a key that had to move."""
        key = call.routing_key
        if call.target:
            self.branches["target_worker_hit"] += 1
            return
        if not key:
            self.branches["random_fallback"] += 1
            return
        self.branches["routing_key_hit"] += 1
        members = self._members
        members.learn((worker,))
        position = position_of(key)
        natural = members.ring.natural_owner(position)
        keeper = members.known.get(self._moved_to(position) or natural or "")
        if keeper is not None and keeper is not worker and could_serve(keeper, now):
            return  # left out for this call only
        if worker.id == natural:
            if self._moved_to(position) is not None:
                self._shared.placed(position, worker.id, now)
            self._moved.pop(position, None)
            return
        self._shared.placed(position, worker.id, now)
        self._move(position, worker)

    def heard_key(self, position: int, worker: Worker, now: float) -> None:
        """Another node has put this key onto `worker`, away from its place on the ring or back to it."""
        if worker.id == self._members.ring.natural_owner(position):
            self._moved.pop(position, None)
        else:
            self._move(position, worker)

    def _move(self, position: int, worker: Worker) -> None:
        self._moved[position] = worker.id
        self._moved.move_to_end(position)
        if len(self._moved) > MOVED_MAX:
            self._moved.popitem(last=False)

    def _moved_to(self, position: int) -> str | None:
        """Where a key was put instead of its place, by us or by another node."""
        return self._moved.get(position) or self._shared.worker_of(position)

    def removed(self, worker: Worker) -> None:
        """Its points go, and so do the keys that had moved to it."""
        self._members.remove(worker)
        for position in [position for position, owner in self._moved.items() if owner == worker.id]:
            del self._moved[position]

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """No costs; the key's worker is marked."""
        chosen = (
            self._of_key(position_of(call.routing_key), workers) if call.routing_key and workers else None
        )
        return [
            Terms(worker.id, reason="holds the routing key" if worker is chosen else "") for worker in workers
        ]

    def _of_key(self, position: int, workers: Sequence[Worker]) -> Worker | None:
        members = self._members.of(workers)
        moved = members.get(self._moved_to(position) or "")
        if moved is not None:
            return moved
        owner = self._members.ring.owner(position, members)
        return None if owner is None else members[owner]
