"""Rosters: what each source of discovery lists, and how the fleet follows it (WRK-18).

Owns who listed which worker. A source reports everything it knows each time; here that becomes additions, updates
and drains of that source's own workers. Workers that others added are never touched, a worker that somebody deleted
by hand stays away until its source has dropped it, and one that left because it failed (HLT-4) comes back when it
answers again. It finds nobody itself: `smg/discovery` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import trio

from smg.errors import GatewayError
from smg.fleet.health import is_alive
from smg.fleet.registry import Added, Change, Registry, Removed, StatusChanged
from smg.fleet.worker import Status, Worker, WorkerSpec, worker_id
from smg.services.asking import Fetch, Log, ask
from smg.services.worker_jobs import WorkerJobs

REVIVE_INTERVAL_S = 10.0
"""Pause between two looks at listed workers that left because they failed: the gateway's own file interval is three
times that, so a repaired worker is back before anybody would edit the file."""


class _Listing(msgspec.Struct, frozen=True):
    """One line of one roster."""

    source: str
    url: str


class Rosters:
    """The rosters of all sources. Make it before sources report."""

    def __init__(self, registry: Registry, jobs: WorkerJobs, fetch: Fetch, *, log: Log) -> None:
        self._registry = registry
        self._jobs = jobs
        self._fetch = fetch
        self._log = log
        self._listed: dict[str, dict[str, WorkerSpec]] = {}  # source -> url -> specification
        self._owned: dict[str, _Listing] = {}  # worker id -> the line that brought it
        self._brought: dict[_Listing, dict[str, None]] = {}  # the same, the other way round
        self._dismissed: set[str] = set()  # listed URLs whose worker was deleted by hand
        self._failed_out: set[str] = set()  # ids of workers that drain because they failed
        self._lost: dict[_Listing, Worker] = {}  # lines whose worker failed and left
        self._again: dict[
            _Listing, None
        ] = {}  # lines to add once the registry has told everybody of the removal
        self._has_work = trio.Event()
        registry.subscribe(self._changed)
        jobs.subscribe_deleted(self._dismiss)

    def reporter(self, source: str) -> Callable[[tuple[WorkerSpec, ...]], None]:
        """What a source of this name reports to (`discovery/source.py`)."""

        def report(specs: tuple[WorkerSpec, ...]) -> None:
            self.report(source, specs)

        return report

    def report(self, source: str, specs: tuple[WorkerSpec, ...]) -> None:
        """The whole truth of a source."""
        before = self._listed.get(source, {})
        now = self._listed[source] = {spec.url: spec for spec in specs}
        for url in before:
            if url not in now:
                self._unlist(_Listing(source, url))
        for url, spec in now.items():
            listing = _Listing(source, url)
            owned = self._workers_of(listing)
            if not owned and listing not in self._lost:
                self._add(listing, spec)
            elif before.get(url) != spec:
                for worker in owned:
                    self._update(worker, spec)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Brings back workers that are still listed, until cancelled."""
        task_status.started()
        while True:
            has_work = self._has_work = trio.Event()
            again, self._again = self._again, {}
            for listing in again:
                self._add_listed(listing)
            with trio.move_on_after(REVIVE_INTERVAL_S if self._lost else math.inf) as pause:
                await has_work.wait()
            if pause.cancelled_caught:
                await self._look_for_lost()

    async def _look_for_lost(self) -> None:
        for listing, worker in list(self._lost.items()):
            rules = worker.health.rules
            heard = await ask(self._fetch, worker, rules.endpoint, rules.timeout_s)
            if is_alive(heard.status) and self._lost.pop(listing, None) is not None:
                self._add_listed(listing)

    def _add_listed(self, listing: _Listing) -> None:
        spec = self._listed[listing.source].get(listing.url)
        if spec is not None and not self._workers_of(listing):
            self._add(listing, spec)

    def _add(self, listing: _Listing, spec: WorkerSpec) -> None:
        if spec.url in self._dismissed or self._registry.by_url(spec.url) is not None:
            return
        try:
            worker = self._jobs.add_spec(spec)
        except GatewayError as error:
            self._log.warn(
                "listed worker is not added", worker=spec.url, source=listing.source, reason=error.message
            )
            return
        self._own(worker, listing)
        self._log.info("listed worker is added", worker=spec.url, source=listing.source)

    def _update(self, worker: Worker, spec: WorkerSpec) -> None:
        if worker.status is Status.DRAINING:
            return
        if worker.url != spec.url:  # a rank of the worker that was listed
            spec = msgspec.structs.replace(
                spec, url=worker.url, dp_rank=worker.spec.dp_rank, dp_size=worker.spec.dp_size
            )
        try:
            self._registry.update(worker, spec, trio.current_time())
        except GatewayError as error:
            self._log.warn("listed worker is not updated", worker=worker.url, reason=error.message)

    def _unlist(self, listing: _Listing) -> None:
        self._dismissed.discard(listing.url)
        self._lost.pop(listing, None)
        for worker in self._workers_of(listing):
            if worker.status is not Status.DRAINING:
                self._log.info(
                    "worker is not listed any more and drains", worker=worker.url, source=listing.source
                )
                self._jobs.drain(worker)

    def _own(self, worker: Worker, listing: _Listing) -> None:
        self._owned[worker.id] = listing
        self._brought.setdefault(listing, {})[worker.id] = None

    def _workers_of(self, listing: _Listing) -> list[Worker]:
        """The workers that a line brought: one, or its ranks."""
        found = (self._registry.by_id(owned_id) for owned_id in self._brought.get(listing, ()))
        return [worker for worker in found if worker is not None]

    def _dismiss(self, worker: Worker) -> None:
        listing = self._owned.get(worker.id)
        if listing is not None and len(self._workers_of(listing)) == 1:
            self._dismissed.add(listing.url)

    def _changed(self, change: Change) -> None:
        worker = change.worker
        if isinstance(change, Added):
            self._dismissed.discard(worker.url)
            if worker.spec.dp_rank is not None:  # a rank belongs to whoever listed the worker it is of
                listing = self._owned.get(worker_id(worker.base_url))
                if listing is not None:
                    self._own(worker, listing)
        elif isinstance(change, StatusChanged):
            if worker.status is Status.DRAINING and change.old is Status.FAILED:
                self._failed_out.add(worker.id)
        elif isinstance(change, Removed):
            self._gone(worker)

    def _gone(self, worker: Worker) -> None:
        has_failed = worker.id in self._failed_out
        self._failed_out.discard(worker.id)
        listing = self._owned.pop(worker.id, None)
        if listing is None:
            return
        brought = self._brought[listing]
        del brought[worker.id]
        if not brought:
            del self._brought[listing]
        is_listed = listing.url in self._listed[listing.source]
        if not is_listed or listing.url in self._dismissed or brought:
            return
        if has_failed:
            self._lost[listing] = worker
        else:
            self._again[listing] = None  # it was dropped and listed again while it drained
        self._has_work.set()
