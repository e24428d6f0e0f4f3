"""When a failed attempt is tried again: rules, backoff and the retry budget (contract RTY-1 to RTY-4, CB-1).

Owns the numbers and the budget's window. It never sends anything, never picks a worker and never waits: dispatch asks
and obeys.
"""

from __future__ import annotations

from random import Random

import msgspec

from smg.errors import UpstreamError
from smg.fleet.worker import Worker
from smg.settings import Retries

FAILURE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""Answers that are retried (RTY-1) and that count as failures for the breaker (CB-1)."""

REPEATABLE_STATUSES = frozenset({500, 502, 503, 504})
"""Answers after which the same worker may be asked again when there is no other (RTY-2); 408 and 429 are not: the
worker said that this request came too late or too soon."""

REPEATABLE_KINDS = frozenset({UpstreamError.REFUSED, UpstreamError.RESET})
"""Failures without an answer that are retried; a timeout is not (RTY-5)."""

WINDOW_S = 10
"""Seconds over which the budget looks back (RTY-4), one slot each."""


class RetryRules(msgspec.Struct, frozen=True):
    """How often and how fast is tried again; defaults are those of the command line. `attempts_max` counts the first."""

    attempts_max: int = 5
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 30.0
    backoff_multiplier: float = 1.5
    jitter_ratio: float = 0.2

    def is_retryable(self, status: int) -> bool:
        """May another worker be asked after this answer (RTY-1)?"""
        return status in FAILURE_STATUSES

    def is_retryable_kind(self, kind: str) -> bool:
        """May another worker, or the only one, be asked after this `UpstreamError.kind` (RTY-1, RTY-2, RTY-5)?"""
        return kind in REPEATABLE_KINDS

    def is_repeatable(self, status: int, has_retry_after: bool) -> bool:
        """May the same, only worker be asked again after this answer (RTY-2)?"""
        return not has_retry_after and status in REPEATABLE_STATUSES

    def backoff_s(self, repeats: int, rng: Random) -> float:
        """Seconds before the repeat number `repeats` (0 = first) on the same worker (RTY-3).

        min(initial x multiplier^repeats, maximum) x (1 +- jitter).
        """
        try:
            delay_s = min(self.initial_backoff_s * self.backoff_multiplier**repeats, self.max_backoff_s)
        except OverflowError:
            delay_s = self.max_backoff_s
        return delay_s * (1.0 + self.jitter_ratio * (2.0 * rng.random() - 1.0))


def retry_rules(retries: Retries) -> RetryRules:
    """The rules that the command line gives; `--disable-retries` is one attempt (RTY-2)."""
    return RetryRules(
        attempts_max=1 if retries.disable_retries else retries.retry_max_retries,
        initial_backoff_s=retries.retry_initial_backoff_ms / 1000.0,
        max_backoff_s=retries.retry_max_backoff_ms / 1000.0,
        backoff_multiplier=retries.retry_backoff_multiplier,
        jitter_ratio=retries.retry_jitter_factor,
    )


def is_failure(status: int, worker: Worker) -> bool:
    """Does this answer count against the worker's breaker (CB-1)?"""
    own = worker.spec.resilience.retryable_status_codes
    return status in (FAILURE_STATUSES if own is None else own)


class RetryBudget:
    """Share of requests that may be retries, over the last ten seconds (RTY-4).

    Retries in the window never exceed `ratio` x requests in the window + `min_per_sec` x 10, so that a fleet in
    trouble is not finished off by its own gateway. Ten slots of one second: memory does not grow with traffic.
    """

    __slots__ = ("_floor", "_ratio", "_requests", "_requests_sum", "_retries", "_retries_sum", "_second")

    def __init__(self, ratio: float, min_per_sec: float) -> None:
        self._ratio = ratio
        self._floor = min_per_sec * WINDOW_S
        self._requests = [0] * WINDOW_S
        self._retries = [0] * WINDOW_S
        self._requests_sum = 0
        self._retries_sum = 0
        self._second = 0  # the second, by the caller's clock, that the newest slot counts

    def requested(self, now: float) -> None:
        """A client's request begins (not an attempt)."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        self._requests[second % WINDOW_S] += 1
        self._requests_sum += 1

    def may_retry(self, now: float) -> bool:
        """Takes one retry from the budget; False when it is used up, and nothing is taken."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        if self._retries_sum + 1 > self._ratio * self._requests_sum + self._floor:
            return False
        self._retries[second % WINDOW_S] += 1
        self._retries_sum += 1
        return True

    def _advance(self, second: int) -> None:
        """Forgets the slots that fell out of the window. A clock that stands still or goes back forgets nothing."""
        if second <= self._second:
            return
        for gone in range(max(self._second + 1, second - WINDOW_S + 1), second + 1):
            slot = gone % WINDOW_S
            self._requests_sum -= self._requests[slot]
            self._retries_sum -= self._retries[slot]
            self._requests[slot] = 0
            self._retries[slot] = 0
        self._second = second
