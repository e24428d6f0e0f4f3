"""What several policies ask about candidates: who is among them by id, who has least of something.

Owns no state but a cache that nobody can see: the registry hands out the same tuple while nothing changed, so its
index by id is made once per change and not once per request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from smg.fleet.worker import Status, Worker


class ById:
    """Candidates by id; `of` is one comparison while the registry hands out the same tuple."""

    __slots__ = ("_index", "_of")

    def __init__(self) -> None:
        self._of: Sequence[Worker] = ()
        self._index: dict[str, Worker] = {}

    def of(self, workers: Sequence[Worker]) -> dict[str, Worker]:
        """The index of `workers`; the caller may not change it. Lists are indexed anew: they may have changed."""
        if workers is self._of:
            return self._index
        index = {worker.id: worker for worker in workers}
        if isinstance(workers, tuple):
            self._of, self._index = workers, index
        return index


def could_serve(worker: Worker, now: float) -> bool:
    """Is this worker a candidate by itself: ready, its breaker permits, not at rest and not overloaded?

    A policy asks when a call was placed elsewhere than its key says: a worker that could serve was left out for this
    one call only (a retry goes to another worker, RTY-2), and so keeps its keys (RT-6).
    """
    breaker = worker.breaker
    return (
        worker.status is Status.READY
        and breaker.permits(now)
        and breaker.avoid_until_s <= now
        and not (worker.is_overloaded and worker.report_until_s > now)
    )


def in_flight_cost(worker: Worker) -> float:
    """Requests in flight, those of the mesh too, times cost: the load where no seconds are known (WRK-16)."""
    return (worker.in_flight + worker.peers_in_flight) * worker.spec.cost


def least(
    workers: Sequence[Worker],
    amount: Callable[[Worker], float],
    rng: Random,
    first: int = 0,
    last: int | None = None,
) -> Worker:
    """The worker with the smallest amount among `workers[first]` to `workers[last]`, equal ones at random.

    Reservoir sampling: no list is made. `workers` is not empty; `last` None is the end.
    """
    best = workers[first]
    best_amount = amount(best)
    ties = 1
    for index in range(first + 1, len(workers) if last is None else last + 1):
        worker = workers[index]
        own = amount(worker)
        if own < best_amount:
            best, best_amount, ties = worker, own, 1
        elif own == best_amount:
            ties += 1
            if rng.random() * ties < 1.0:
                best = worker
    return best
