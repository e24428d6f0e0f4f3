"""The contract of a routing policy; this docstring is the manual.

A policy is one file with one class, listed by one line in `smg/policies/__init__.py`. One instance exists per model
(RT-2, RT-8). The life of one request:

1. `choose(call, workers, now, rng)` names a worker of the candidates or None when there is none. It must not change
   the policy: `explain` and `choose` share it, and two calls with equal inputs and an equal rng give the same answer
   (EXP-1, EXP-3). `workers` is never empty, in order of registration, all of them allowed (RT-1); the sequence
   belongs to the registry and may be the same object for many calls: read it, keep nothing of it but ids.
2. `placed(call, worker, now)` tells that the request goes to this worker (also when another rule than this policy
   chose it, e.g. `X-SMG-Target-Worker`). Counters move here.
3. `first_byte(call, worker, ttft_s, now)` tells that the body of a streamed answer began, at most once per `placed`
   and before `finished`: the prefill of this call is over on the worker. Dispatch tells it for streams only; the
   first byte of a plain answer comes with its last token and says nothing about prefill.
4. `finished(call, worker, outcome, now)` tells how it ended, exactly once per `placed`.

Policies that keep state per worker implement `removed(worker)`: it left the fleet and owns nothing any more, also not
when it comes back under the same id. Those that believe something about its KV cache implement `flushed(worker)` too:
it failed or flushed, and its cache is empty; its routing keys stay (RT-6). `terms` explains: what each candidate
costs, in seconds where the policy thinks in seconds.

Everything runs on the hot path: `choose` allocates nothing proportional to the fleet (house rule 41).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from random import Random
from typing import Protocol

import msgspec

from smg.api.call import Call
from smg.fleet.worker import Worker


class Wants(enum.Flag):
    """What a policy needs to be prepared; dispatch prepares nothing else."""

    NOTHING = 0
    KEY = enum.auto()  # the routing key (RT-5)
    TEXT = enum.auto()  # the prompt text (RT-7)
    CHARS = enum.auto()  # the characters in flight on each worker, counted (RT-3)


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """How an attempt ended.

    `status` is the worker's HTTP status, 0 when there was none (refused, reset, timeout, client gone before).
    `ttft_s` is the time from sending to the first byte of the answer's body (head for plain answers), None when none
    came. Token counts come from the worker's `usage`, None when it told none. `is_success` is what the breaker was
    told; a client that left counts as neither (`is_success` None).
    """

    status: int
    is_success: bool | None
    ttft_s: float | None = None
    duration_s: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


class Terms(msgspec.Struct, frozen=True):
    """What one candidate costs in the eyes of a policy (EXP-2): seconds, lower is better; None = has no cost."""

    worker_id: str
    cost: float | None = None
    wait: float | None = None
    prefill: float | None = None
    penalty: float | None = None
    matched_blocks: int = 0
    reason: str = ""


class Policy(Protocol):
    """What every policy is; see the module's docstring."""

    name: str
    wants: Wants
    is_random: bool  # `explain` then names candidates instead of one choice (EXP-1)

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The worker for this call, or None; changes nothing but `rng`."""
        ...

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """The call goes to `worker`."""
        ...

    def first_byte(self, call: Call, worker: Worker, ttft_s: float, now: float) -> None:
        """The streamed answer's body began, `ttft_s` seconds after the call was sent to `worker`."""
        ...

    def finished(self, call: Call, worker: Worker, outcome: Outcome, now: float) -> None:
        """The call ended on `worker`."""
        ...

    def removed(self, worker: Worker) -> None:
        """`worker` left the fleet: forget everything about it."""
        ...

    def flushed(self, worker: Worker) -> None:
        """`worker` failed or flushed: forget what was known of its cache, keep its keys."""
        ...

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """The cost of every candidate, in the order of `workers`; changes nothing."""
        ...


class Stateless:
    """The verbs of `Policy` for policies that keep no state; items inherit it and write `choose` alone."""

    name = ""
    wants = Wants.NOTHING
    is_random = False

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Nothing to remember."""

    def first_byte(self, call: Call, worker: Worker, ttft_s: float, now: float) -> None:
        """Nothing to learn."""

    def finished(self, call: Call, worker: Worker, outcome: Outcome, now: float) -> None:
        """Nothing to settle."""

    def removed(self, worker: Worker) -> None:
        """Nothing to forget."""

    def flushed(self, worker: Worker) -> None:
        """Nothing is believed about caches."""

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """No cost in seconds: one row per candidate without numbers."""
        return [Terms(worker.id) for worker in workers]


class Around:
    """A policy around another one: whoever inherits it writes only the verbs in which it is not `inner`."""

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.name = inner.name
        self.wants = inner.wants
        self.is_random = inner.is_random

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """As `inner` does."""
        return self.inner.choose(call, workers, now, rng)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """As `inner` does."""
        self.inner.placed(call, worker, now)

    def first_byte(self, call: Call, worker: Worker, ttft_s: float, now: float) -> None:
        """As `inner` does."""
        self.inner.first_byte(call, worker, ttft_s, now)

    def finished(self, call: Call, worker: Worker, outcome: Outcome, now: float) -> None:
        """As `inner` does."""
        self.inner.finished(call, worker, outcome, now)

    def removed(self, worker: Worker) -> None:
        """As `inner` does."""
        self.inner.removed(worker)

    def flushed(self, worker: Worker) -> None:
        """As `inner` does."""
        self.inner.flushed(worker)

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """As `inner` does."""
        return self.inner.terms(call, workers, now, rng)
