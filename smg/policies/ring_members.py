"""The ring of a policy and the candidates on it, kept in step.

Owns who is on the ring: everyone who was a candidate once and has not left the fleet. The points of workers that are no
candidates now are stepped over, so being on the ring decides nothing; it only saves rebuilding it whenever a worker
comes and goes. It never chooses.
"""

from __future__ import annotations

from collections.abc import Sequence

from smg.fleet.hash_ring import HashRing
from smg.fleet.worker import Worker


class RingMembers:
    """`ring` holds exactly the ids in `known`."""

    __slots__ = ("_index", "_of", "known", "ring")

    def __init__(self) -> None:
        self.ring = HashRing()
        self.known: dict[str, Worker] = {}
        self._of: Sequence[Worker] = ()
        self._index: dict[str, Worker] = {}

    def of(self, workers: Sequence[Worker]) -> dict[str, Worker]:
        """`workers` by id, all on the ring; one comparison while the registry hands out the same tuple."""
        if workers is self._of:
            return self._index
        index = {worker.id: worker for worker in workers}
        self.learn(workers)
        if isinstance(workers, tuple):
            self._of, self._index = workers, index
        return index

    def learn(self, workers: Sequence[Worker]) -> None:
        """Puts new workers on the ring."""
        known = self.known
        new = [worker for worker in workers if known.get(worker.id) is not worker]
        if new:
            self.ring.add(worker.id for worker in new)
            known.update((worker.id, worker) for worker in new)

    def remove(self, worker: Worker) -> None:
        """`worker` left the fleet."""
        self.ring.discard(worker.id)
        self.known.pop(worker.id, None)
        self._of, self._index = (), {}
