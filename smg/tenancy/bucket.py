"""A token bucket: a rate with a burst, of which a node of a cluster gives out its part.

Owns one number and the time it was true. It never waits and never refuses by itself: it answers whether there was a
token, and when there will be.
"""

from __future__ import annotations

import math

SLACK = 1e-9
"""Tokens that may be missing: refilling is float arithmetic, and a client that came back exactly at `next_at_s` must
not be sent away for the last bit."""


class TokenBucket:
    """`burst` tokens at most, refilled with `rate_per_s` tokens per second; full at first.

    `key` is the same on every node. `capacity` and `refill_s` are the limit's own; `set_share` makes `burst` and `rate_per_s`
    a part of it (see `tenancy.shares.SharedLimit`). A request for more than the part, though not for more than the whole, is
    let in when the bucket is full, and the rest is owed: then the balance is negative.
    """

    __slots__ = ("_asked", "_at_s", "_tokens", "burst", "capacity", "key", "rate_per_s", "refill_s")

    def __init__(self, rate_per_s: float, burst: float, now: float = 0.0, key: bytes = b"") -> None:
        if not rate_per_s > 0.0 or not burst > 0.0:
            raise ValueError("rate and burst must be positive")
        self.key = key
        self.capacity = burst
        self.refill_s = burst / rate_per_s
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._tokens = burst
        self._at_s = now
        self._asked = 0.0

    def tokens(self, now: float) -> float:
        """Tokens there are now, negative for a debt; changes nothing."""
        elapsed_s = max(now - self._at_s, 0.0)
        return min(self._tokens + elapsed_s * self.rate_per_s, self.burst)

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Takes `amount` tokens if there are so many; False, and nothing is taken, if not."""
        self._asked += amount
        tokens = self.tokens(now)
        if tokens + SLACK < min(amount, self.burst) or amount > self.capacity + SLACK:
            return False
        left = tokens - amount
        self._tokens = left if left > 0.0 or left < -SLACK else 0.0
        self._at_s = max(now, self._at_s)
        return True

    def next_at_s(self, now: float, amount: float = 1.0) -> float:
        """When `amount` could be taken if nobody takes any; infinity when it never fits into the bucket."""
        missing = min(amount, self.burst) - self.tokens(now)
        if amount > self.capacity + SLACK or (missing > 0.0 and self.rate_per_s <= 0.0):
            return math.inf
        return now + missing / self.rate_per_s if missing > 0.0 else now

    # -- as a part of a cluster's limit

    @property
    def was_asked(self) -> bool:
        """Is there demand that was not read yet?"""
        return self._asked > 0.0

    def read_demand(self) -> float:
        """Tokens asked for since this was last read, given out or not; begins anew."""
        asked, self._asked = self._asked, 0.0
        return asked

    def balance(self, now: float) -> float:
        """As `tokens`, and remembers it."""
        self._tokens = self.tokens(now)
        self._at_s = max(now, self._at_s)
        return self._tokens

    def set_share(self, now: float, fraction: float) -> None:
        """From now on give out `fraction` (0 to 1) of the limit. What does not fit any more is lost; a debt stays."""
        assert 0.0 <= fraction <= 1.0, "a share is a part of the whole"
        self.balance(now)
        self.burst = self.capacity * fraction
        self.rate_per_s = self.burst / self.refill_s
        self._tokens = min(self._tokens, self.burst)

    def give_back(self, amount: float, now: float) -> None:
        """Adds tokens, as far as they fit; a negative amount takes some."""
        self._tokens = min(self.balance(now) + amount, self.burst)
