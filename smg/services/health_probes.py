"""Probes: asks every worker for its health when its machine says so, and feeds the machine with what came.

Owns the questions of HLT-1 to HLT-4 and WRK-1 to WRK-3; the counting is `fleet/health.py`'s, the status the
registry's. A worker that refuses connections is found within a second: requests and load polls that meet a refusal
call `note_refused`, and that brings its probe forward to now.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import trio

from smg.errors import UpstreamError
from smg.fleet.health import is_alive
from smg.fleet.registry import Added, Change, Registry, Removed, StatusChanged, Updated
from smg.fleet.worker import Status, Worker
from smg.services.asking import Fetch, Heard, Log, ask
from smg.services.timetable import Timetable

CONCURRENT_MAX = 128
"""Most probes at once: with a 5 s timeout, 128 hanging workers delay the others' probes by no more than that."""
ANSWER_BYTES_MAX = 1 << 20
"""Longest health answer that is read; only its status counts."""

Counted = Callable[[Worker, bool], None]
"""Told of every probe and whether it was a hit (`smg_worker_health_checks_total`)."""


class HealthProbes:
    """The probing service. Make it before workers are added: it follows the registry's changes.

    `removes_failed` is HLT-4: a worker that fails is drained and leaves the list.
    """

    def __init__(
        self,
        registry: Registry,
        fetch: Fetch,
        *,
        rng: Random,
        log: Log,
        removes_failed: bool = False,
        counted: Counted | None = None,
    ) -> None:
        self._registry = registry
        self._fetch = fetch
        self._rng = rng
        self._log = log
        self._removes_failed = removes_failed
        self._counted = counted
        self._table = Timetable(self._probe, CONCURRENT_MAX)
        registry.subscribe(self._changed)
        for worker in registry.workers():
            self._plan(worker)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probes until cancelled."""
        await self._table.run(task_status=task_status)

    def note_refused(self, worker: Worker) -> None:
        """A request found nobody at `worker` (refused or reset): probe it now (HLT-2). Cheap, does not wait."""
        now = trio.current_time()
        worker.health.note_refused(now)
        if worker.id in self._table and worker.health.next_probe_at(self._rng) <= now:
            self._table.bring_forward(worker.id, now)

    def _changed(self, change: Change) -> None:
        worker = change.worker
        if isinstance(change, Removed):
            self._table.drop(worker.id)
        elif isinstance(change, (Added, Updated)):
            self._plan(worker)
        elif isinstance(change, StatusChanged) and worker.status is Status.DRAINING:
            self._table.drop(worker.id)

    def _plan(self, worker: Worker) -> None:
        """Gives the worker its next probe; new rules may also put it off, so the old time is forgotten first."""
        self._table.drop(worker.id)
        due = worker.health.next_probe_at(self._rng)
        if due < math.inf:
            self._table.bring_forward(worker.id, due)

    async def _probe(self, worker_id: str) -> float | None:
        """One probe; when the next one is due."""
        worker = self._registry.by_id(worker_id)
        if worker is None or worker.health.is_disabled:
            return None
        rules = worker.health.rules
        heard = await ask(self._fetch, worker, rules.endpoint, rules.timeout_s, bytes_max=ANSWER_BYTES_MAX)
        if self._registry.by_id(worker_id) is not worker or worker.status is Status.DRAINING:
            return None  # it left, or another of the same URL came, while we asked
        self._judge(worker, heard, rules.timeout_s)
        due = worker.health.next_probe_at(self._rng)
        return due if due < math.inf else None

    def _judge(self, worker: Worker, heard: Heard, timeout_s: float) -> None:
        """Tells the worker's machine what came and makes its status what the machine says."""
        now = trio.current_time()
        is_hit = is_alive(heard.status)
        if is_hit:
            message = ""
            status = worker.health.observed_ok(now)
        else:
            message = f"health probe: {heard.reason(timeout_s)}"
            # A connection that is taken and cut without a word is nobody at home, too: a port forward without a
            # process behind it looks so.
            nobody = heard.failure in (UpstreamError.REFUSED, UpstreamError.RESET)
            status = worker.health.observed_miss(now, refused=nobody)
        if self._counted is not None:
            self._counted(worker, is_hit)
        old = worker.status
        if status is None:
            if not is_hit or not _is_in_doubt(old):
                self._registry.set_status(worker, old, now, message)
            return
        self._registry.set_status(worker, status, now, message)
        if status is Status.READY:
            self._log.info("worker is ready", worker=worker.url, was=old.value)
        else:
            self._log.warn(f"worker is {status.value}", worker=worker.url, was=old.value, reason=message)
        if status is Status.FAILED and self._removes_failed:
            self._registry.drain(worker, now)


def _is_in_doubt(status: Status) -> bool:
    """Whether the message of earlier misses still tells why the worker is not ready."""
    return status in (Status.NOT_READY, Status.FAILED)
