"""`bucket`: workers own ranges of prompt length, so that short prompts do not wait behind long ones.

The ranges are cut so that each worker gets an equal share of the characters of the prompts seen lately: the i-th of n
workers owns the prompts whose place in the cumulative distribution of characters lies in [i/n, (i+1)/n). The
distribution is taken anew every `--bucket-adjust-interval-secs`. A length that alone fills several shares belongs to
several workers; among them, and among all as long as nothing was seen, the one that was sent least lately takes the
call. So no worker ever owns everything.

When the characters sent within the interval are out of balance (difference and ratio above the thresholds), the least
burdened worker takes the call whatever its range.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.load import CHARS_PER_TOKEN
from smg.fleet.worker import Worker
from smg.policies.candidates import least
from smg.policies.policy import Stateless, Terms, Wants
from smg.settings import Routing

SAMPLE_MAX = 2048
"""Prompt lengths the distribution is made of: a quantile is then off by 1 to 2 %, and sorting takes a fraction of a
millisecond per interval."""

SAMPLE_FIRST = 32
"""Prompts after which the first distribution is taken without waiting for the interval to end."""

WINDOW_MAX = 16_384
"""Placements within the interval that are remembered one by one; above some 3,000 requests/s the window is shorter
than the interval, which is long enough to see an imbalance."""


class Ranges:
    """The share of characters in prompts up to each length, frozen."""

    __slots__ = ("_lengths", "_shares")

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths: list[int] = []  # distinct, rising
        self._shares: list[float] = []  # share of all characters in prompts of up to this length, rising to 1
        total = sum(lengths)
        chars = 0
        for length in sorted(lengths):
            chars += length
            if self._lengths and self._lengths[-1] == length:
                self._shares[-1] = chars / total
            else:
                self._lengths.append(length)
                self._shares.append(chars / total)

    def owners(self, length: int, count: int) -> tuple[int, int]:
        """First and last of `count` workers that own prompts of `length` characters."""
        at = bisect_left(self._lengths, length)
        below = self._shares[at - 1] if at else 0.0
        if at == len(self._lengths):
            return count - 1, count - 1
        upto = self._shares[at] if self._lengths[at] == length else below
        first = min(int(below * count + 1e-9), count - 1)
        last = min(math.ceil(upto * count - 1e-9) - 1, count - 1)
        return first, max(first, last)


class Bucket(Stateless):
    """The range that the prompt's length is in."""

    name = "bucket"
    wants = Wants.TEXT | Wants.CHARS

    def __init__(self, settings: Routing) -> None:
        self._interval_s = settings.bucket_adjust_interval_secs
        self._abs = settings.balance_abs_threshold
        self._rel = settings.balance_rel_threshold
        self._ranges: Ranges | None = None
        self._sample: deque[int] = deque(maxlen=SAMPLE_MAX)
        self._adjusted_s = -math.inf
        self._window: deque[tuple[float, str, int]] = deque()  # (time, worker id, characters), oldest first
        self._sent: dict[
            str, int
        ] = {}  # worker id -> characters within the window; equal to the sums of _window

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The least burdened owner of the prompt's length, or of all when the balance is lost."""
        count = len(workers)
        if count < 2:
            return workers[0] if count else None
        sent = self._recently_sent(now)
        if self._ranges is None or self._is_unbalanced(workers, sent):
            return least(workers, _Burden(sent), rng)
        first, last = self._ranges.owners(_chars(call), count)
        if first == last:
            return workers[first]
        return least(workers, _Burden(sent), rng, first, last)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Counts the characters, and adjusts the ranges when it is time."""
        chars = _chars(call)
        self._sample.append(chars)
        self._window.append((now, worker.id, chars))
        self._sent[worker.id] = self._sent.get(worker.id, 0) + chars
        while len(self._window) > WINDOW_MAX or self._window[0][0] < now - self._interval_s:
            self._forget_oldest()
        is_first = self._ranges is None and len(self._sample) >= SAMPLE_FIRST
        if is_first or now - self._adjusted_s >= self._interval_s:
            if self._adjusted_s > -math.inf or is_first:
                self._ranges = Ranges(self._sample)
            self._adjusted_s = now

    def removed(self, worker: Worker) -> None:
        """Nothing was sent to it."""
        self._window = deque(entry for entry in self._window if entry[1] != worker.id)
        self._sent.pop(worker.id, None)

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """No costs; every row tells the characters sent and whether the length belongs there."""
        burden = _Burden(self._recently_sent(now))
        first, last = (
            self._ranges.owners(_chars(call), len(workers)) if self._ranges else (0, len(workers) - 1)
        )
        return [
            Terms(
                worker.id,
                reason=f"{int(burden(worker))} characters within {self._interval_s:g} s"
                + (", owns this length" if first <= index <= last else ""),
            )
            for index, worker in enumerate(workers)
        ]

    def _recently_sent(self, now: float) -> dict[str, int]:
        """Characters sent by worker id; none when nothing was sent for a whole interval."""
        window = self._window
        return self._sent if window and window[-1][0] >= now - self._interval_s else {}

    def _is_unbalanced(self, workers: Sequence[Worker], sent: dict[str, int]) -> bool:
        lowest, highest = math.inf, 0.0
        for worker in workers:
            burden = sent.get(worker.id, 0) * worker.spec.cost
            if burden < lowest:
                lowest = burden
            if burden > highest:
                highest = burden
        return highest - lowest > self._abs and highest > self._rel * lowest

    def _forget_oldest(self) -> None:
        _, worker_id, chars = self._window.popleft()
        left = self._sent[worker_id] - chars
        if left > 0:
            self._sent[worker_id] = left
        else:
            del self._sent[worker_id]


class _Burden:
    """Characters sent to a worker, times its cost (WRK-16), as a function of the worker."""

    __slots__ = ("_sent",)

    def __init__(self, sent: dict[str, int]) -> None:
        self._sent = sent

    def __call__(self, worker: Worker) -> float:
        return self._sent.get(worker.id, 0) * worker.spec.cost


def _chars(call: Call) -> int:
    """Length of the prompt in characters, at least 1; token ids count as four each."""
    chars = len(call.text())
    if not chars:
        tokens = call.token_ids()
        chars = CHARS_PER_TOKEN * len(tokens) if tokens else 0
    return chars or 1
