"""Queues of news for users who wait: a bounded channel per subscriber, oldest dropped, and the loss is told.

Owns the channels of subscribers and their bound. It must never look into the news. Users who can act at once should
hang a callback into the agent instead: only those are done before the agent goes on.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Watch(Generic[T]):
    """What one subscriber has not read yet. An async iterator that ends when the agent does.

    When more than `waiting_max` items wait, the oldest go and `lost` counts them: read the state anew when it moved.
    """

    __slots__ = ("_items", "_max", "_ready", "is_closed", "lost")

    def __init__(self, waiting_max: int) -> None:
        assert waiting_max > 0
        self._items: deque[T] = deque()
        self._max = waiting_max
        self._ready = trio.Event()
        self.is_closed = False
        self.lost = 0

    def put(self, item: T) -> None:
        """The agent's side: one more."""
        if self.is_closed:
            return
        if len(self._items) >= self._max:
            self._items.popleft()
            self.lost += 1
        self._items.append(item)
        self._ready.set()

    def close(self) -> None:
        """Nothing will follow; what waits can still be read. Either side may say so."""
        self.is_closed = True
        self._ready.set()

    def __aiter__(self) -> Watch[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self.is_closed:
                raise StopAsyncIteration
            self._ready = trio.Event()
            await self._ready.wait()
        await trio.lowlevel.checkpoint()
        return self._items.popleft()
