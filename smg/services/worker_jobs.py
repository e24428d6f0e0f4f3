"""Jobs of the worker API and of discovery: workers come, change and leave here.

Owns what happens between a wish ("add this URL") and the registry: checked specifications, jobs and their status
(WRK-6 to WRK-13), metadata (WRK-4, WRK-5) and the expansion into ranks (WRK-17). All
verbs answer at once; what takes time runs in `run`. Whether a worker is ready is no business of this room: metadata
never delays it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any
from uuid import UUID

import msgspec
import trio

from smg.errors import GatewayError
from smg.fleet.recognition import dp_size
from smg.fleet.registry import Added, Change, Registry, Removed, StatusChanged, Updated
from smg.fleet.worker import Status, Worker, WorkerSpec, worker_id
from smg.fleet.worker_spec import patched, replaced, spec_of
from smg.services.asking import Fetch, Log
from smg.services.metadata import ask_about, ask_models
from smg.services.timetable import Timetable

CONCURRENT_MAX = 32
"""Most workers whose metadata is read at once; it is never urgent for more."""
REFRESH_INTERVAL_S = 60.0
"""Metadata is read again after this (WRK-5)."""
RETRY_FIRST_S = 0.5
"""... and after this when a ready worker could not tell, then after twice as long each time."""


class Job(msgspec.Struct, frozen=True):
    """A job under way or failed, in the words of WRK-10. `timestamp` is its start, seconds since 1970."""

    job_type: str
    worker_url: str
    status: str
    message: str
    timestamp: int


class WorkerJobs:
    """The service behind the worker API and the sources of discovery. Make it before workers are added."""

    def __init__(
        self,
        registry: Registry,
        fetch: Fetch,
        *,
        rng: Random,
        log: Log,
        is_dp_aware: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._fetch = fetch
        self._rng = rng
        self._log = log
        self._is_dp_aware = is_dp_aware
        self._wall_clock = wall_clock
        self._started: dict[str, int] = {}  # worker id -> start of its add or remove job
        self._specs: dict[
            str, WorkerSpec
        ] = {}  # worker id -> the specification that metadata was asked under
        self._unfinished: dict[str, int] = {}  # worker id -> tries so far, while not everything was told
        self._deleted: list[Callable[[Worker], None]] = []
        self._added: list[Callable[[Worker], None]] = []
        self._edited: list[Callable[[Worker], None]] = []
        self._table = Timetable(self._read, CONCURRENT_MAX)
        registry.subscribe(self._changed)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reads metadata until cancelled."""
        await self._table.run(task_status=task_status)

    # Verbs of the worker API

    def add(self, document: Any) -> Worker:
        """`POST /workers`: registers what the document says. Raises `GatewayError` 400 and 409 (WRK-7)."""
        worker = self.add_spec(spec_of(document))
        for callback in self._added:
            callback(worker)
        return worker

    def add_spec(self, spec: WorkerSpec) -> Worker:
        """As `add`, of a checked specification."""
        if self._is_dp_aware and spec.dp_rank is None:
            self._refuse_expanded(spec)
        return self._registry.add(spec, trio.current_time())

    def patch(self, text_id: str, document: Any) -> Worker:
        """`PATCH /workers/{id}` (WRK-11). Raises `GatewayError` 400 and 404."""
        worker = self.find(text_id)
        self._registry.update(worker, patched(worker.spec, document), trio.current_time())
        self._tell_edited(worker)
        return worker

    def replace(self, text_id: str, document: Any) -> Worker:
        """`PUT /workers/{id}` (WRK-12). Raises `GatewayError` 400 and 404."""
        worker = self.find(text_id)
        self._registry.update(worker, replaced(worker, document), trio.current_time())
        self._tell_edited(worker)
        return worker

    def delete(self, text_id: str) -> Worker:
        """`DELETE /workers/{id}`: the worker drains and goes when it is idle (WRK-13). Raises `GatewayError` 400, 404."""
        worker = self.find(text_id)
        for callback in self._deleted:
            callback(worker)
        self.drain(worker)
        return worker

    def subscribe_deleted(self, callback: Callable[[Worker], None]) -> None:
        """`callback` is told of each worker that `delete` is asked for, before it drains."""
        self._deleted.append(callback)

    def subscribe_added(self, callback: Callable[[Worker], None]) -> None:
        """`callback` is told of each worker that `add` has registered; discovery's are not among them."""
        self._added.append(callback)

    def subscribe_edited(self, callback: Callable[[Worker], None]) -> None:
        """`callback` is told of each worker that `patch` or `replace` has changed."""
        self._edited.append(callback)

    def _tell_edited(self, worker: Worker) -> None:
        for callback in self._edited:
            callback(worker)

    def drain(self, worker: Worker) -> None:
        """As `delete`, of a worker that is at hand. Draining twice changes nothing."""
        if worker.status is not Status.DRAINING:
            self._started[worker.id] = int(self._wall_clock())
        self._registry.drain(worker, trio.current_time())

    def find(self, text_id: str) -> Worker:
        """The worker of an id as a client wrote it. Raises `GatewayError` 400 for no UUID, 404 for an unknown one."""
        try:
            canonical = str(UUID(text_id))
        except ValueError:
            raise GatewayError(
                400, "BAD_REQUEST", f"Invalid worker_id {text_id[:64]!r} (expected UUID)"
            ) from None
        worker = self._registry.by_id(canonical)
        if worker is None:
            raise GatewayError(404, "WORKER_NOT_FOUND", f"Worker {canonical} not found")
        return worker

    def job_of(self, worker: Worker) -> Job | None:
        """The job that runs for a worker, or that failed (WRK-10); None when nothing is under way."""
        started = self._started.get(worker.id)
        if started is None:
            return None
        if worker.status is Status.DRAINING:
            message = f"waits for {worker.in_flight} requests in flight"
            return Job("RemoveWorker", worker.url, "processing", message, started)
        if worker.status is Status.FAILED:
            return Job("AddWorker", worker.url, "failed", worker.message, started)
        if worker.message:
            return Job("AddWorker", worker.url, "processing", worker.message, started)
        return Job("AddWorker", worker.url, "pending", "waits for the first answer of the worker", started)

    # Metadata

    def _changed(self, change: Change) -> None:
        worker = change.worker
        if isinstance(change, Removed):
            for book in (self._started, self._unfinished, self._specs):
                book.pop(worker.id, None)
            self._table.drop(worker.id)
        elif isinstance(change, Added):
            self._started[worker.id] = int(self._wall_clock())
            self._specs[worker.id] = worker.spec
            self._want(worker, worker.health.rules.startup_delay_s)
        elif isinstance(change, StatusChanged):
            if worker.status is Status.READY:
                self._started.pop(worker.id, None)
                self._came_up(worker, change.old)
            elif worker.status is Status.DRAINING:
                self._table.drop(worker.id)
        elif isinstance(change, Updated) and self._specs.get(worker.id) is not worker.spec:
            self._specs[worker.id] = worker.spec  # a key, a URL or model names: ask anew, in any case
            if worker.status is not Status.DRAINING:
                self._want(worker, 0.0)

    def is_first_asked(self, worker: Worker) -> bool:
        """Whether the first question for its models has not come back yet: until then it serves every name (MOD-3)."""
        return self._unfinished.get(worker.id) == 0

    def _want(self, worker: Worker, delay_s: float) -> None:
        """Everything about the worker is to be asked after `delay_s`."""
        self._unfinished[worker.id] = 0
        self._table.bring_forward(worker.id, trio.current_time() + delay_s)

    def _came_up(self, worker: Worker, old: Status) -> None:
        if old is not Status.PENDING:
            self._want(worker, 0.0)  # what comes back may be another engine with other models
        elif worker.id in self._unfinished and self._table.due_at(worker.id) is not None:
            # It was asked before it was up. When it is being asked right now, that will do.
            self._table.bring_forward(worker.id, trio.current_time())

    async def _read(self, key: str) -> float | None:
        """Reads a worker's metadata and applies it as it comes; when to read it again."""
        worker = self._registry.by_id(key)
        if worker is None:
            return None
        models = await ask_models(self._fetch, worker)
        if not self._is_here(worker):
            return None
        if models.cards is not None:
            self._registry.set_models(worker, models.cards)
        is_final = models.is_final
        wants_info = self._is_dp_aware and worker.spec.dp_rank is None
        if wants_info or key in self._unfinished or worker.engine is None:
            about = await ask_about(self._fetch, worker, models.document, wants_server_info=wants_info)
            if not self._is_here(worker):
                return None
            if about.engine is not None:
                self._registry.set_engine(worker, about.engine)
            if wants_info and self._expand(worker, dp_size(worker.spec, about.server_info)):
                return None
            is_final = is_final and about.is_final
        now = trio.current_time()
        if is_final:
            self._unfinished.pop(key, None)
            return now + REFRESH_INTERVAL_S * (0.9 + 0.2 * self._rng.random())
        tries = self._unfinished.get(key, 0)
        self._unfinished[key] = min(tries + 1, 30)
        if worker.status is not Status.READY:
            return (
                now + REFRESH_INTERVAL_S
            )  # coming up asks again at once; this is for workers that nobody probes
        return now + min(RETRY_FIRST_S * 2.0**tries, REFRESH_INTERVAL_S)

    def _is_here(self, worker: Worker) -> bool:
        """Whether the worker is still wanted; while it was asked, it or its successor may have come and gone."""
        return self._registry.by_id(worker.id) is worker and worker.status is not Status.DRAINING

    # Ranks

    def _expand(self, worker: Worker, size: int) -> bool:
        """Replaces a worker that has several ranks by one worker per rank; whether it did (WRK-17)."""
        if size <= 1:
            return False
        now = trio.current_time()
        for rank in range(size):
            url = f"{worker.base_url}@{rank}"
            if self._registry.by_url(url) is not None:
                continue
            spec = msgspec.structs.replace(worker.spec, url=url, dp_rank=rank, dp_size=size)
            try:
                added = self._registry.add(spec, now)
            except GatewayError as error:
                self._log.warn("rank is not added", worker=url, reason=error.message)
                break
            if worker.engine is not None:
                self._registry.set_engine(added, worker.engine)
            if not added.models:
                self._registry.set_models(added, worker.cards)
            if worker.status is Status.READY and added.status is Status.PENDING:
                self._registry.set_status(
                    added, Status.READY, now
                )  # it is the same server: no gap in service
        self._log.info("worker is expanded into its ranks", worker=worker.url, ranks=size)
        if worker.in_flight:
            self._registry.drain(worker, now)
        else:
            self._registry.remove(worker)
        return True

    def _refuse_expanded(self, spec: WorkerSpec) -> None:
        """Raises 409 when the URL is there already, as its ranks."""
        for worker in self._registry.workers():
            if worker.base_url == spec.url and worker.spec.dp_rank is not None:
                raise GatewayError(
                    409, "WORKER_ALREADY_EXISTS", f"Worker {worker_id(spec.url)} exists already, as its ranks"
                )
