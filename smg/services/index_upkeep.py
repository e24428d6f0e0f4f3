"""Upkeep of the prefix index: what departed workers held is swept, and what nobody used for long is forgotten.

Owns the rhythm only (`--eviction-interval-secs`, `--cache-ttl-secs`); the bounds of the index hold at every moment
without it. It works in short turns, so that a large index never holds up a request.
"""

from __future__ import annotations

import trio

from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.registry import Registry

SWEEP_ENTRIES = 1_024
"""Entries removed in one turn: about half a millisecond."""


class IndexUpkeep:
    """The cleaning service. `ttl_s` 0: nothing is forgotten for its age."""

    def __init__(self, registry: Registry, index: PrefixIndex, *, interval_s: float, ttl_s: float) -> None:
        self._registry = registry
        self._index = index
        self._interval_s = interval_s
        self._ttl_s = ttl_s
        self._faded_s = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Cleans until cancelled."""
        self._faded_s = trio.current_time()
        task_status.started()
        while True:
            await trio.sleep(self._pause_s())
            if self._ttl_s and trio.current_time() >= self._faded_s + self._ttl_s:
                self._faded_s = trio.current_time()
                for worker in self._registry.workers():
                    self._index.fade(worker.id)
                    await trio.lowlevel.checkpoint()
            while self._index.sweep(SWEEP_ENTRIES):
                await trio.lowlevel.checkpoint()

    def _pause_s(self) -> float:
        if not self._ttl_s:
            return self._interval_s
        return min(self._interval_s, max(0.001, self._faded_s + self._ttl_s - trio.current_time()))
