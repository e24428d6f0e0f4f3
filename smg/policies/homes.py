"""Rendezvous: which two workers a session would live on if nobody had ever seen it.

This room owns the mapping from a session key to its homes (highest random weight; Thaler and
Ravishankar 1998): every gateway computes the same pair without asking, and a worker more or less moves
only its own share of the keys. It keeps one small table for the present fleet and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from smg.fleet.worker import Worker

BUCKETS = 1_024
"""Keys are folded into so many buckets, so that a fleet of hundreds is hashed once per bucket and not per call."""


def key_of(name: str) -> int:
    """The session key of a name that the client gave (a routing key)."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


class Homes:
    """The homes of all keys among the present candidates."""

    __slots__ = ("_fleet", "_pairs")

    def __init__(self) -> None:
        self._fleet: Sequence[Worker] = ()
        self._pairs: dict[int, tuple[str, ...]] = {}  # at most BUCKETS

    def pair(self, key: int, workers: Sequence[Worker]) -> tuple[str, ...]:
        """The ids of the two homes of `key`, the first one first; one id if there is one worker only.

        Pairs are kept as long as `workers` is the same object, for candidates rarely change.
        """
        if workers is not self._fleet:
            self._fleet = workers
            self._pairs.clear()
        bucket = key % BUCKETS
        pair = self._pairs.get(bucket)
        if pair is None:
            weigh = xxhash.xxh3_64_intdigest
            ranked = sorted(
                ((weigh(worker.id.encode(), bucket), worker.id) for worker in workers), reverse=True
            )
            pair = self._pairs[bucket] = tuple(worker_id for _, worker_id in ranked[:2])
        return pair
