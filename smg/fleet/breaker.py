"""The circuit breaker of one worker: closed, open, half open (contract CB-1 to CB-5).

Owns the judgement whether requests may go to a worker, made from what became of earlier requests. It never looks at
probes (`fleet/health.py` does), never counts a client's departure, and never decides which worker to use.

A request that starts gets a permit, a plain int, and gives it back with its outcome. Permits make half open exact:
only requests let through as trials use one up, late news of requests from before an outage neither closes nor opens
anything, and a client that leaves gives its trial back without a verdict.

    closed    --failure_threshold failures in a row within window_s-->  open
    open      --timeout_s passed and a request starts-->                half open
    half open --success_threshold successes-->                          closed
    half open --one failure-->                                          open
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import msgspec

from smg.fleet.worker import ResilienceOverrides
from smg.settings import Breaker as BreakerSettings

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half_open"

TRANSITIONS: tuple[tuple[str, str], ...] = (
    (CLOSED, OPEN),
    (OPEN, HALF_OPEN),
    (HALF_OPEN, CLOSED),
    (HALF_OPEN, OPEN),
    (OPEN, CLOSED),  # only by switching the breaker off while it is open
)
"""Every change of state that exists; `Breaker.transitions` counts them (MET-5)."""

AVOID_MAX_S = 60.0
"""Longest time that a `Retry-After` of a worker is honoured (CB-4): a wrong header may not take it out for a day."""

NOT_A_TRIAL = 0
"""The permit of a request that started while the breaker was closed."""


class BreakerRules(msgspec.Struct, frozen=True):
    """The numbers of one breaker; defaults are those of the command line."""

    failure_threshold: int = 10
    success_threshold: int = 3
    timeout_s: float = 60.0
    window_s: float = 120.0
    is_disabled: bool = False


def breaker_rules(breaker: BreakerSettings, own: ResilienceOverrides) -> BreakerRules:
    """The rules of one worker: what its specification says, else the command line."""
    disabled = own.disable_circuit_breaker
    return BreakerRules(
        failure_threshold=own.cb_failure_threshold or breaker.cb_failure_threshold,
        success_threshold=own.cb_success_threshold or breaker.cb_success_threshold,
        timeout_s=own.cb_timeout_duration_secs or breaker.cb_timeout_duration_secs,
        window_s=breaker.cb_window_duration_secs,
        is_disabled=breaker.disable_circuit_breaker if disabled is None else disabled,
    )


def _nobody() -> None:
    """Nobody wants to know."""


class Breaker:
    """State machine of one worker's circuit.

    `on_change` is called whenever `permits` may answer differently than before for another reason than time; the
    registry puts it there to invalidate its pools. `successes_total`, `failures_total` and `transitions` only grow.
    """

    __slots__ = (
        "_epoch",
        "_failures",
        "_trial_successes",
        "_trials",
        "avoid_until_s",
        "consecutive_successes",
        "failures_total",
        "on_change",
        "open_until_s",
        "rules",
        "state",
        "successes_total",
        "transitions",
    )

    def __init__(self, rules: BreakerRules) -> None:
        self.rules = rules
        self.state = CLOSED
        self.open_until_s = 0.0
        self.avoid_until_s = 0.0
        self.on_change: Callable[[], None] = _nobody
        self.consecutive_successes = 0
        self.successes_total = 0
        self.failures_total = 0
        self.transitions: dict[tuple[str, str], int] = {}
        # Times of the failures in a row, oldest first; never longer than the threshold, which opens.
        self._failures: deque[float] = deque()
        self._epoch = 0  # raised by every half-open period; the permit of its trials
        self._trials = (
            0  # trials in flight, of every period: 0 <= _trials <= success_threshold at the time of start
        )
        self._trial_successes = 0

    def __repr__(self) -> str:
        return f"<Breaker {self.state} failures={len(self._failures)} trials={self._trials}>"

    @property
    def consecutive_failures(self) -> int:
        """Failures in a row that still count."""
        return len(self._failures)

    def permits(self, now: float) -> bool:
        """May a request start on this worker? Changes nothing."""
        state = self.state
        if state is CLOSED:
            return True
        if state is OPEN and now < self.open_until_s:
            return False
        return self._trials < self.rules.success_threshold

    def state_at(self, now: float) -> str:
        """The state as an observer sees it: an open breaker whose time is over is half open."""
        return HALF_OPEN if self.state is OPEN and now >= self.open_until_s else self.state

    def next_change_s(self, now: float) -> float:
        """When `permits`, or being avoided, changes by time alone; infinity when never."""
        until = math.inf
        if self.state is OPEN and self.open_until_s > now:
            until = self.open_until_s
        return min(until, self.avoid_until_s) if self.avoid_until_s > now else until

    def started(self, now: float) -> int:
        """A request goes to the worker. Returns its permit, which its outcome must bring back exactly once.

        Without `permits(now)` the request is let through all the same (somebody else decided so) and is no trial.
        """
        if self.state is CLOSED:
            return NOT_A_TRIAL
        if not self.permits(now):
            return NOT_A_TRIAL
        if self.state is OPEN:
            self._epoch += 1
            self._trial_successes = 0
            self._enter(HALF_OPEN)
        self._trials += 1
        self.on_change()
        return self._epoch

    def succeeded(self, now: float, permit: int) -> None:
        """The request of `permit` was answered well, to its end."""
        self.successes_total += 1
        self.consecutive_successes += 1
        if permit:
            self._trial_ended()
        if self.state is CLOSED:
            if self._failures:
                self._failures.clear()
        elif permit == self._epoch and self.state is HALF_OPEN:
            self._trial_successes += 1
            if self._trial_successes >= self.rules.success_threshold:
                self._failures.clear()
                self._enter(CLOSED)
                self.on_change()

    def failed(self, now: float, permit: int) -> None:
        """The request of `permit` failed as CB-1 says: no connection, timeout, dead stream or a failure status."""
        self.failures_total += 1
        self.consecutive_successes = 0
        if permit:
            self._trial_ended()
        if self.rules.is_disabled:
            return
        if self.state is CLOSED:
            failures = self._failures
            failures.append(now)
            while failures[0] < now - self.rules.window_s:
                failures.popleft()
            if len(failures) >= self.rules.failure_threshold:
                self._open(now)
        elif permit and permit == self._epoch and self.state is HALF_OPEN:
            self._open(now)

    def abandoned(self, permit: int) -> None:
        """The client of the request left, or somebody else failed: the permit comes back, nothing is judged."""
        if permit:
            self._trial_ended()

    def avoid(self, now: float, retry_after_s: float) -> None:
        """The worker asked for rest (CB-4): avoided while another candidate exists, at most `AVOID_MAX_S`."""
        until_s = now + min(max(retry_after_s, 0.0), AVOID_MAX_S)
        if until_s > self.avoid_until_s:
            self.avoid_until_s = until_s
            self.on_change()

    def set_rules(self, rules: BreakerRules) -> None:
        """Other numbers, same state (CB-5); only switching it off closes an open breaker."""
        self.rules = rules
        if rules.is_disabled and self.state is not CLOSED:
            self._failures.clear()
            self._enter(CLOSED)
        while len(self._failures) >= max(rules.failure_threshold, 1):
            self._failures.popleft()  # a lower threshold asks for one more failure, it does not open by itself
        self.on_change()

    def _open(self, now: float) -> None:
        self._failures.clear()
        self.open_until_s = now + self.rules.timeout_s
        self._enter(OPEN)
        self.on_change()

    def _trial_ended(self) -> None:
        self._trials -= 1
        assert self._trials >= 0, "a permit came back twice"
        if self.state is not CLOSED:
            self.on_change()

    def _enter(self, state: str) -> None:
        change = (self.state, state)
        assert change in TRANSITIONS, change
        self.transitions[change] = self.transitions.get(change, 0) + 1
        self.state = state
