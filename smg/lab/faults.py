"""Faults on order: what a simulated engine does wrong because a test asked for it (`POST /lab/faults`).

Owns the words of that order and the dice. The engine's server obeys; nothing else knows of it.
"""

from __future__ import annotations

from random import Random

import msgspec


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do wrong with inference requests. Everything is off by default; times are seconds.

    `error_rate` is the share of requests answered with `status` (and `retry_after` as a header). `delay_s` waits
    before the head; `hang` never answers; `close_before_head` resets the connection instead of answering.
    `reset_after_chunks` resets a stream (or a plain answer in the middle of its body) after so many events,
    `stall_after_chunks` falls silent there. `health_status` is the answer of the health endpoint, `health_hang`
    silences it. `count` bounds how many requests are treated so; afterwards all is well. `paths` names the paths
    concerned, empty means every inference path.
    """

    error_rate: float = 0.0
    status: int = 500
    retry_after: int | None = None
    delay_s: float = 0.0
    hang: bool = False
    close_before_head: bool = False
    reset_after_chunks: int | None = None
    stall_after_chunks: int | None = None
    health_status: int | None = None
    health_hang: bool = False
    count: int | None = None
    paths: tuple[str, ...] = ()


NO_FAULTS = Faults()


class FaultBox:
    """The order in force, and how many requests it still concerns."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.faults = NO_FAULTS
        self._left: int | None = None

    def order(self, faults: Faults) -> None:
        """From now on these faults and no others."""
        self.faults = faults
        self._left = faults.count

    def draw(self, path: str) -> Faults:
        """The faults of one inference request; `error_rate` comes out as 0 or 1."""
        faults = self.faults
        if faults is NO_FAULTS or (faults.paths and path not in faults.paths) or self._left == 0:
            return NO_FAULTS
        if self._left is not None:
            self._left -= 1
        if not faults.error_rate:
            return faults
        is_hit = self._rng.random() < faults.error_rate
        return msgspec.structs.replace(faults, error_rate=1.0 if is_hit else 0.0)
