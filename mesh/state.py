"""The replicated state as the library's users see it: the replica's verbs without a clock.

Owns nothing but the way from a user's call to the agent's loop: it fills in `now` and wakes the loop, so that a change
is on its way within the same turn of the scheduler. Must never wait; several calls between two awaits leave together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from mesh.replica import Replica


class State:
    """See `Replica` for bounds and errors; all calls return at once."""

    __slots__ = ("_replica", "_wake")

    def __init__(self, replica: Replica, wake: Callable[[], None]) -> None:
        self._replica = replica
        self._wake = wake

    def put(self, namespace: str, key: bytes, value: bytes) -> None:
        """Set a key (last writer wins, owned, ephemeral). Raises BoundError."""
        self._replica.put(namespace, key, value, trio.current_time())
        self._wake()

    def remove(self, namespace: str, key: bytes) -> None:
        """Delete a key (owned and ephemeral: our own)."""
        self._replica.remove(namespace, key, trio.current_time())
        self._wake()

    def add(self, namespace: str, key: bytes, amount: int) -> int:
        """Add to this node's shard of a counter; the new sum. Raises BoundError."""
        total = self._replica.add(namespace, key, amount, trio.current_time())
        self._wake()
        return total

    def append(self, namespace: str, payload: bytes) -> int:
        """Append a delta to this node's stream; its sequence number. Raises BoundError."""
        sequence = self._replica.append(namespace, payload, trio.current_time())
        self._wake()
        return sequence

    def get(self, namespace: str, key: bytes, owner: str | None = None) -> bytes | None:
        """The value of a key; `owner` None means our own map (last writer wins: anyone's)."""
        return self._replica.get(namespace, key, owner)

    def items(self, namespace: str, owner: str | None = None) -> Iterator[tuple[str, bytes, bytes]]:
        """(owner, key, value) of one owner or all. Do not await or change the state meanwhile."""
        return self._replica.items(namespace, owner)

    def total(self, namespace: str, key: bytes, window: int | None = None) -> int:
        """Sum of all shards of a counter, in the current window unless one is named."""
        return self._replica.total(namespace, key, trio.current_time(), window)

    def totals(self, namespace: str) -> Iterator[tuple[bytes, int, int]]:
        """(key, window, sum) of all counters of a namespace."""
        return self._replica.totals(namespace)

    def window(self, namespace: str) -> int:
        """Number of the current window of a counter namespace."""
        return self._replica.window(namespace, trio.current_time())

    def digest(self, namespace: str | None = None) -> int:
        """64 bits over one namespace or all; equal digests mean equal state."""
        return self._replica.digest(namespace)

    def stats(self) -> dict[str, int]:
        """Counters and sizes, see `Replica.stats`."""
        return self._replica.stats()
