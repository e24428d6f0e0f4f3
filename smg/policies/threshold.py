"""The threshold rule, for those who come from the existing system (`--cache-aware-mode threshold`).

Owns one sentence of contract section 12: out of balance, the least loaded; else the holder of the
longest prefix when it covers more than a threshold; else the least loaded. Load is requests in flight.
It has two regimes with a cliff between them and knows nothing of seconds; `price` is the better rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

from smg.fleet.load import everybodys
from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.worker import Worker
from smg.policies.price import pick


class ThresholdRule(msgspec.Struct, frozen=True, kw_only=True):
    """The five numbers of the rule, with the defaults of the existing system's command line."""

    threshold: float = 0.3
    """Share of the prompt that must be cached for the cache to decide."""
    balance_abs: int = 64
    balance_rel: float = 1.5
    """Out of balance: most and least in flight differ by more than `balance_abs` and by this factor."""
    token_usage: float = 1.0
    """Out of balance as well: KV usages differ by more than this; 1.0 is off."""
    overload: float = 1.0
    """Out of balance as well: any KV usage is above this; 1.0 is off."""

    def choose(
        self, blocks: Sequence[int], workers: Sequence[Worker], index: PrefixIndex, rng: Random
    ) -> tuple[Worker, str]:
        """The worker and the reason; `workers` must not be empty."""
        loads = [everybodys(worker) for worker in workers]
        lowest, highest = min(loads), max(loads)
        least = [worker for worker, load in zip(workers, loads, strict=True) if load == lowest]
        if highest - lowest > self.balance_abs and highest > self.balance_rel * lowest:
            return pick(least, rng), f"out of balance: {lowest} to {highest} in flight"
        if self.token_usage < 1.0 or self.overload < 1.0:
            usages = [worker.report.kv_usage or 0.0 for worker in workers if worker.report is not None]
            if usages and max(usages) - min(usages) > self.token_usage:
                return pick(least, rng), "out of balance: KV usage"
            if usages and max(usages) > self.overload:
                return pick(least, rng), f"overload: KV usage {max(usages):.0%}"
        match = index.match(blocks)
        depths = [match.depth_of(index.bits_of(worker.id)) for worker in workers]
        deepest = max(depths)
        ratio = deepest / len(blocks) if blocks else 0.0
        if deepest and ratio > self.threshold:
            holders = [worker for worker, depth in zip(workers, depths, strict=True) if depth == deepest]
            return pick(holders, rng), f"longest prefix {ratio:.0%} > {self.threshold:.0%}"
        return pick(least, rng), f"longest prefix {ratio:.0%}, the least in flight"
