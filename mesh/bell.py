"""The one sleep of an agent: until a deadline, a datagram, or until someone rings.

Owns the sleeping and the measure of how late it woke. No part of an agent has a timer of its own; whoever makes a
deadline come sooner says so here. Must never know what it is woken for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

SLEEP_MIN_S = 0.001
"""Least sleep, so that a deadline that does not move can never eat the processor."""


class Bell:
    """Rung from synchronous code, heard by the one task that waits."""

    __slots__ = ("_due_s", "_is_rung", "_scope")

    def __init__(self) -> None:
        self._is_rung = False
        self._scope = trio.CancelScope()
        self._due_s = float("-inf")

    def ring(self) -> None:
        """Wake now; if nobody sleeps, the next sleep is none."""
        self._is_rung = True
        self._scope.cancel()

    def sooner(self, due_s: float) -> None:
        """The deadline moved; wake then if that is sooner than planned."""
        due_s = max(due_s, trio.current_time() + SLEEP_MIN_S)
        if due_s < self._due_s:
            self._due_s = due_s
            self._scope.deadline = due_s

    async def wait(self, due_s: float, wait_input: Callable[[], Awaitable[None]]) -> float:
        """Sleep until `due_s`, a ring, or the end of `wait_input`. Seconds by which a deadline was missed, else 0."""
        if self._is_rung:
            self._is_rung = False
            await trio.lowlevel.checkpoint()
            return 0.0
        self._due_s = max(due_s, trio.current_time() + SLEEP_MIN_S)
        with trio.CancelScope(deadline=self._due_s) as self._scope:
            await wait_input()
        is_due = self._scope.cancelled_caught and not self._is_rung
        self._is_rung = False
        lag_s = trio.current_time() - self._due_s if is_due else 0.0
        self._due_s = float("-inf")
        return lag_s
