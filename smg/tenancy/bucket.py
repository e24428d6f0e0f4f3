"""A token bucket: a rate with a burst.

Owns one number and the time it was true. It never waits and never refuses by itself: it answers whether there was a
token, and when there will be.
"""

from __future__ import annotations

import math

SLACK = 1e-9
"""Tokens that may be missing: refilling is float arithmetic, and a client that came back exactly at `next_at_s` must
not be sent away for the last bit."""


class TokenBucket:
    """`burst` tokens at most, refilled with `rate_per_s` tokens per second; full at first."""

    __slots__ = ("_at_s", "_tokens", "burst", "rate_per_s")

    def __init__(self, rate_per_s: float, burst: float, now: float = 0.0) -> None:
        if not rate_per_s > 0.0 or not burst > 0.0:
            raise ValueError("rate and burst must be positive")
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._tokens = burst
        self._at_s = now

    def tokens(self, now: float) -> float:
        """Tokens there are now; changes nothing."""
        elapsed_s = max(now - self._at_s, 0.0)
        return min(self._tokens + elapsed_s * self.rate_per_s, self.burst)

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Takes `amount` tokens if there are so many; False, and nothing is taken, if not."""
        tokens = self.tokens(now)
        if tokens + SLACK < amount:
            return False
        self._tokens = max(tokens - amount, 0.0)
        self._at_s = max(now, self._at_s)
        return True

    def next_at_s(self, now: float, amount: float = 1.0) -> float:
        """When `amount` tokens will be there if nobody takes any; infinity when they never fit into the bucket."""
        if amount > self.burst + SLACK:
            return math.inf
        return now + max(amount - self.tokens(now), 0.0) / self.rate_per_s
