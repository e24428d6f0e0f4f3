"""All workers of one model, and which of them may get a request now (contract RT-1, CB-4).

Owns the rule for candidates and its cache. The registry alone fills a pool and tells it what changed; policies and
dispatch read. It never chooses among candidates.

Nothing that happens to a worker passes unseen: status, overload, membership and breaker changes are told through
`invalidate`, and what changes by time alone (a breaker's timeout, a `Retry-After`, the age of a load report) has a
time that is known beforehand. So the steady state is one comparison of `now` with that time.
"""

from __future__ import annotations

import math

from smg.fleet.breaker import CLOSED
from smg.fleet.worker import Status, Worker


class Pool:
    """The workers of `model` in order of registration, whatever their status.

    `model` is "" for the pool of workers that told no model and so serve every name nobody claims (MOD-3). `version`
    is raised whenever `workers` changes. A pool lives as long as its model has workers; one that is kept longer is
    empty.
    """

    __slots__ = ("_candidates", "_is_shed", "_valid_until_s", "model", "version", "workers")

    def __init__(self, model: str) -> None:
        self.model = model
        self.version = 0
        self.workers: tuple[Worker, ...] = ()
        self._candidates: tuple[Worker, ...] = ()
        self._is_shed = False
        self._valid_until_s = -math.inf

    def __repr__(self) -> str:
        return f"<Pool {self.model!r} workers={len(self.workers)} version={self.version}>"

    def candidates(self, now: float) -> tuple[Worker, ...]:
        """Who may get a request, in order of registration; the same object while nothing changed."""
        if now < self._valid_until_s:
            return self._candidates
        return self._judge(now)

    def is_overloaded(self, now: float) -> bool:
        """Are there candidates, all of them over the overload limits (ERR-19)?"""
        self.candidates(now)
        return self._is_shed

    def excluded_by(self, worker: Worker, now: float) -> str | None:
        """Why `worker` is no candidate: `status`, `draining`, `circuit` or `overload` (EXP-2); None when it is one.

        A worker that asked for rest with `Retry-After` is excluded by `circuit`.
        """
        if worker.status is Status.DRAINING:
            return "draining"
        if worker.status is not Status.READY:
            return "status"
        if not worker.breaker.permits(now):
            return "circuit"
        if worker in self.candidates(now):
            return None
        return "circuit" if worker.breaker.avoid_until_s > now else "overload"

    def invalidate(self) -> None:
        """Something about a worker of this pool changed."""
        self._valid_until_s = -math.inf

    def set_workers(self, workers: tuple[Worker, ...]) -> None:
        """The pool has these workers from now on, in order of registration."""
        self.workers = workers
        self.version += 1
        self._valid_until_s = -math.inf

    def _judge(self, now: float) -> tuple[Worker, ...]:
        """Works the candidates out anew, and until when they hold.

        Rest (CB-4) goes before overload: a worker that sends requests away is no help against the queue of another.
        """
        until_s = math.inf
        permitted: list[Worker] = []
        has_rest = has_overload = False
        for worker in self.workers:
            if worker.status is not Status.READY:
                continue
            breaker = worker.breaker
            if breaker.state is CLOSED and breaker.avoid_until_s <= now:  # nearly always: without a call
                permitted.append(worker)
            else:
                has_rest = True
                if breaker.permits(now):
                    permitted.append(worker)
                until_s = min(until_s, breaker.next_change_s(now))
            if worker.is_overloaded and worker.report_until_s > now:
                has_overload = True
                until_s = min(until_s, worker.report_until_s)
        rested = relaxed = permitted
        if has_rest:
            rested = [worker for worker in permitted if worker.breaker.avoid_until_s <= now] or permitted
            relaxed = rested
        if has_overload:
            relaxed = [
                worker for worker in rested if not (worker.is_overloaded and worker.report_until_s > now)
            ]
        self._is_shed = bool(rested) and not relaxed
        chosen = tuple(relaxed or rested)
        if chosen != self._candidates:
            self._candidates = chosen
        self._valid_until_s = until_s
        return self._candidates
