"""The narrow window through which sticky policies see other nodes' keys; without a mesh it shows none (contract RT-6).

Owns the protocol between a policy that remembers keys and whatever connects nodes (`smg/bridge` in production). A key is
its 64-bit position (`fleet/hash_ring.position_of`), never the text that a client sent.
"""

from __future__ import annotations

from typing import Protocol


class SharedKeys(Protocol):
    """The keys of one model on all nodes."""

    def worker_of(self, position: int) -> str | None:
        """The id of the worker that some node says the key is on; None when nobody knows the key."""
        ...

    def placed(self, position: int, worker_id: str, now: float) -> None:
        """The key is on this worker now, and was used. Must not wait and must not fail."""
        ...


class OwnKeys:
    """No other nodes."""

    def worker_of(self, position: int) -> str | None:
        """Nobody else knows any key."""
        return None

    def placed(self, position: int, worker_id: str, now: float) -> None:
        """Nobody listens."""


OWN_KEYS = OwnKeys()
