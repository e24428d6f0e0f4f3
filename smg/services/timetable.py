"""When to do what for whom: one job per key at its due time, never two of one key at once.

Owns the waiting of probes, load polls and metadata reads, which all have this shape: many workers, each with its own
next time, a bound on how many run together, and events that bring a time forward. It knows nothing of workers; the
job says when it wants to run again. A job that raises ends `run` (house rule 38).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from heapq import heapify, heappop, heappush

import trio

Job = Callable[[str], Awaitable[float | None]]
"""Does one thing for a key; returns when it is due again (trio's clock, seconds) or None for never."""


class Timetable:
    """Due times of keys, and the task that keeps them.

    At most `concurrent_max` jobs run together; further ones that are due wait in order of their time. A key that is
    brought forward while its job runs, runs again right after it.
    """

    def __init__(self, job: Job, concurrent_max: int) -> None:
        self._job = job
        self._limiter = trio.CapacityLimiter(concurrent_max)
        self._due: dict[str, float] = {}  # keys that wait; those in _running are not here
        self._heap: list[tuple[float, str]] = []  # may hold outdated entries, recognised by _due
        self._running: dict[str, float] = {}  # key -> time it was brought forward to meanwhile, inf when not
        self._dropped: set[str] = set()  # keys dropped while their job runs
        self._changed = trio.Event()

    def __contains__(self, key: str) -> bool:
        return key in self._due or (key in self._running and key not in self._dropped)

    def __len__(self) -> int:
        return len(self._due) + len(self._running)

    def due_at(self, key: str) -> float | None:
        """When the key's job runs next; None when it has no time (unknown, or its job runs now)."""
        return self._due.get(key)

    def bring_forward(self, key: str, at_s: float) -> None:
        """Run the key's job at this time or earlier; a new key is added. Does not wait."""
        if key in self._running:
            if key in self._dropped:
                self._dropped.discard(key)
                self._running[key] = at_s
            else:
                self._running[key] = min(self._running[key], at_s)
            return
        if at_s < self._due.get(key, math.inf):
            self._plan(key, at_s)

    def drop(self, key: str) -> None:
        """Forget the key. A job that runs now is not cut, but not repeated either. Does not wait."""
        self._due.pop(key, None)
        if key in self._running:
            self._dropped.add(key)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the timetable until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                changed = self._changed = trio.Event()
                now = trio.current_time()
                for key in self._take_due(now):
                    nursery.start_soon(self._run_one, key)
                with trio.move_on_at(self._next_due()):
                    await changed.wait()

    async def _run_one(self, key: str) -> None:
        async with self._limiter:
            again_s = None if key in self._dropped else await self._job(key)
        forward_s = self._running.pop(key)
        if key in self._dropped:
            self._dropped.discard(key)
            return
        at_s = min(forward_s, math.inf if again_s is None else again_s)
        if at_s < math.inf:
            self._plan(key, at_s)

    def _plan(self, key: str, at_s: float) -> None:
        if at_s < self._next_due():
            self._changed.set()
        self._due[key] = at_s
        heappush(self._heap, (at_s, key))
        if len(self._heap) > 4 * len(self._due) + 64:  # outdated entries must not pile up
            self._heap = [(due_s, name) for name, due_s in self._due.items()]
            heapify(self._heap)

    def _next_due(self) -> float:
        heap = self._heap
        while heap and self._due.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    def _take_due(self, now: float) -> list[str]:
        """The keys that are due, earliest first; they count as running from here on."""
        taken = []
        while self._next_due() <= now:
            _, key = heappop(self._heap)
            del self._due[key]
            self._running[key] = math.inf
            taken.append(key)
        return taken
