"""A heap of things to do later: the only notion of time inside the membership machine.

Owns pending calls and their order (by time, then by the order they were set: runs are reproducible). Must never read
a clock; `run` is told `now`.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import TypeAlias

Action: TypeAlias = Callable[[float], None]

CANCELLED_MAX = 1024
"""Cancelled entries stay in the heap until they surface; when this many wait there, the heap is swept."""


class Timer:
    """One pending call. `cancel` is free; the entry dies when it surfaces."""

    __slots__ = ("action", "timers", "when_s")

    def __init__(self, timers: Timers, when_s: float, action: Action) -> None:
        self.timers = timers
        self.when_s = when_s
        self.action: Action | None = action

    def cancel(self) -> None:
        """Never run. Harmless when it already ran."""
        if self.action is not None:
            self.action = None
            self.timers.note_cancelled()


class Timers:
    """The heap."""

    __slots__ = ("_cancelled", "_count", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._cancelled = 0

    def at(self, when_s: float, action: Action) -> Timer:
        """Call `action(now)` in the first `run` at or after `when_s`."""
        timer = Timer(self, when_s, action)
        self._count += 1
        heappush(self._heap, (when_s, self._count, timer))
        return timer

    def next_s(self) -> float:
        """Time of the earliest pending call; infinity if none."""
        heap = self._heap
        while heap:
            if heap[0][2].action is not None:
                return heap[0][0]
            heappop(heap)
            self._cancelled -= 1
        return float("inf")

    def run(self, now: float) -> None:
        """Run all calls that are due, also those that due calls set for now."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            timer = heappop(heap)[2]
            action = timer.action
            if action is None:
                self._cancelled -= 1
                continue
            timer.action = None
            action(now)

    def clear(self) -> None:
        """Forget everything: the machine stops."""
        self._heap.clear()
        self._cancelled = 0

    def note_cancelled(self) -> None:
        """Called by Timer.cancel; sweeps when half-dead entries pile up."""
        self._cancelled += 1
        if self._cancelled > CANCELLED_MAX:
            self._heap[:] = [entry for entry in self._heap if entry[2].action is not None]
            heapify(self._heap)
            self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap)
