"""Drains: lets workers that leave go as soon as nothing is in flight on them (WRK-13).

Owns the waiting only: who drains, and until when, the registry knows. In-flight counts change on the hot path, which
must not call anybody for this, so a draining fleet is looked at ten times a second; with nobody draining it sleeps.
"""

from __future__ import annotations

import trio

from smg.fleet.registry import Change, Registry, StatusChanged
from smg.fleet.worker import Status
from smg.services.asking import Log

LOOK_INTERVAL_S = 0.1
"""Pause between two looks while a worker drains: an idle one is to be gone within a second."""


class Drains:
    """The service that ends drains. Make it before workers are drained."""

    def __init__(self, registry: Registry, *, log: Log) -> None:
        self._registry = registry
        self._log = log
        self._begun = trio.Event()
        registry.subscribe(self._changed)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Removes drained workers until cancelled."""
        task_status.started()
        while True:
            self._begun = trio.Event()
            if self._registry.next_drain_deadline() is None:
                await self._begun.wait()
            self._remove_drained()
            if self._registry.next_drain_deadline() is not None:
                await trio.sleep(LOOK_INTERVAL_S)

    def _remove_drained(self) -> None:
        for worker in self._registry.drained(trio.current_time()):
            if worker.in_flight:
                self._log.warn(
                    "worker is removed with requests in flight: the drain timeout is over",
                    worker=worker.url,
                    in_flight=worker.in_flight,
                )
            else:
                self._log.info("worker is removed", worker=worker.url)
            self._registry.remove(worker)

    def _changed(self, change: Change) -> None:
        if isinstance(change, StatusChanged) and change.worker.status is Status.DRAINING:
            self._begun.set()
