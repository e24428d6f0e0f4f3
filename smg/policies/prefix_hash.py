"""`prefix_hash`: the beginning of the prompt (or the routing key) on a ring, with bounded load.

Prompts that begin alike go to one worker as long as it has at most load-factor times the mean in flight; above that the
next on the ring takes the call. Keeps nothing but the ring. A prompt without text goes to the least burdened worker.
Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2018), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.hash_ring import position_of
from smg.fleet.load import CHARS_PER_TOKEN
from smg.fleet.worker import Worker
from smg.policies.candidates import in_flight_cost, least
from smg.policies.policy import Stateless, Terms, Wants
from smg.policies.ring_members import RingMembers
from smg.settings import Routing


class PrefixHash(Stateless):
    """The prompt's worker on the ring. `branches` counts placements by what decided (MET-6)."""

    name = "prefix_hash"
    wants = Wants.KEY | Wants.TEXT | Wants.CHARS

    def __init__(self, settings: Routing) -> None:
        self._chars = CHARS_PER_TOKEN * settings.prefix_token_count
        self._load_factor = settings.prefix_hash_load_factor
        self._members = RingMembers()
        self.branches: dict[str, int] = {
            "target_worker_hit": 0,
            "ring_hit": 0,
            "load_balanced": 0,
            "no_prefix": 0,
        }

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The next candidate on the ring that is not above its share."""
        if not workers:
            return None
        prefix = self._prefix(call)
        if not prefix:
            return least(workers, in_flight_cost, rng)
        members = self._members.of(workers)
        ring = self._members.ring
        position = position_of(prefix)
        first = ring.owner(position, members)
        assert first is not None, "every candidate is on the ring"
        bound = self._bound(workers)
        if in_flight_cost(members[first]) <= bound:
            return members[first]
        heavy = {first}
        for worker_id in ring.clockwise(position):
            if worker_id in members and worker_id not in heavy:
                if in_flight_cost(members[worker_id]) <= bound:
                    return members[worker_id]
                heavy.add(worker_id)
                if len(heavy) == len(members):
                    break
        return members[first]

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Counts what decided."""
        if call.target:
            branch = "target_worker_hit"
        elif not (prefix := self._prefix(call)):
            branch = "no_prefix"
        elif self._members.ring.natural_owner(position_of(prefix)) == worker.id:
            branch = "ring_hit"
        else:
            branch = "load_balanced"
        self.branches[branch] += 1

    def removed(self, worker: Worker) -> None:
        """Its points go."""
        self._members.remove(worker)

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """No costs; workers above their share are marked."""
        bound = self._bound(workers)
        return [
            Terms(
                worker.id,
                reason=f"{worker.in_flight} in flight"
                + (f", above {bound:.2f}" if in_flight_cost(worker) > bound else ""),
            )
            for worker in workers
        ]

    def _prefix(self, call: Call) -> str:
        return call.routing_key or call.text()[: self._chars]

    def _bound(self, workers: Sequence[Worker]) -> float:
        """Load-factor x mean load, with the call that is to be placed counted in."""
        total = 1.0
        for worker in workers:
            total += in_flight_cost(worker)
        return self._load_factor * total / len(workers)
