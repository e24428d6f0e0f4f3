"""The narrow window through which `cache_aware` sees other gateways; without a mesh it shows nobody.

Owns the protocol between the policy and whatever connects gateways (`smg/bridge` in production, the
laboratory's world in a simulation), and the words that cross it. It sends nothing itself: `tell` hands
a placement over, `CacheAware.heard` takes one in, `CacheAware.decide` answers a question of a peer.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from smg.fleet.prefix_index import Placement


class News(msgspec.Struct, frozen=True, gc=False):
    """One placement as peers hear it: where, which blocks are new there, and how many seconds of prefill it costs."""

    placement: Placement
    seconds: float


class Question(msgspec.Struct, frozen=True, gc=False):
    """All that deciding needs of a request: its block hashes and its length. No text, so it may travel."""

    blocks: tuple[int, ...]
    tokens: int
    """Prompt tokens, estimated."""
    block_tokens: float
    """Prompt tokens per block."""
    key: int | None
    """The session: chosen by the client (hashed routing key) or None for the block below the trunk."""
    chars: int
    """UTF-8 bytes of its text, 0 for token ids."""


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a request goes and what that will cost."""

    worker_id: str
    seconds: float
    """Expected prefill seconds on that worker."""
    matched_blocks: int
    owner: str = ""
    """The gateway that decided, where another one asked it."""


class Neighbours(Protocol):
    """The other gateways that send to the same workers."""

    def count(self) -> int:
        """Gateways alive, this one included; 1 without a mesh."""
        ...

    def delay_s(self) -> float:
        """Age of the peers' placements when they arrive here; infinite when they do not arrive."""
        ...

    def tell(self, news: News, now: float) -> None:
        """A placement of ours, for the peers. Must not wait and must not fail."""
        ...


class Alone:
    """No other gateways."""

    def count(self) -> int:
        """This one."""
        return 1

    def delay_s(self) -> float:
        """Nobody is late."""
        return 0.0

    def tell(self, news: News, now: float) -> None:
        """Nobody listens."""
