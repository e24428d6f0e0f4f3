"""The health of one worker as its probes tell it: a state machine (contract HLT-1 to HLT-3, WRK-1 to WRK-3).

Owns the counting of hits and misses, the table of legal changes of status, and the time of the next probe. It never
sends a probe (`services/health_probes.py` does) and never changes a worker: it returns the status a worker should
have, `Registry.set_status` makes it so and tells it back through `entered`.
"""

from __future__ import annotations

import math
from random import Random

import msgspec

from smg.fleet.worker import HealthOverrides, Status
from smg.settings import Health as HealthSettings
from smg.settings import Workers

TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.READY, Status.FAILED, Status.DRAINING}),
    Status.READY: frozenset({Status.NOT_READY, Status.DRAINING}),
    Status.NOT_READY: frozenset({Status.READY, Status.FAILED, Status.DRAINING}),
    Status.FAILED: frozenset({Status.READY, Status.DRAINING}),
    Status.DRAINING: frozenset(),
}
"""Every change of status that exists. Nothing leaves `DRAINING` but the worker itself."""

ALIVE_STATUSES = frozenset({401, 403, 404, 405, 501})
"""Probe answers of a server that lives but has no such endpoint, or guards it (WRK-1)."""

FIRST_DELAY_S = 0.1
"""Delay after the first probe of a pending worker; it doubles up to `--worker-startup-check-interval` (WRK-2)."""

REFUSED_DELAY_S = 0.2
"""A ready worker that refused a probe is asked again after this, so that the second refusal comes well within the
second that HLT-2 allows."""

REFUSED_MISSES = 2
"""Refused probes in a row that take a ready worker out: one may be a full backlog, two are nobody at home."""

RETURN_DELAY_S = 1.0
"""Probe interval of a worker that refuses connections, and of one that is on its way back (HLT-2)."""

JITTER_RATIO = 0.1
"""Regular probes come within 10 % of the interval (HLT-1), so that gateways started together do not probe together."""

FAILED_MULTIPLE = 3
"""`not_ready` becomes `failed` after this many times the failure threshold of further misses (HLT-1)."""


class HealthRules(msgspec.Struct, frozen=True):
    """The numbers of one worker's probes; defaults are those of the command line."""

    endpoint: str = "/health"
    interval_s: float = 60.0
    timeout_s: float = 5.0
    failure_threshold: int = 3
    success_threshold: int = 2
    startup_timeout_s: float = 1800.0
    startup_delay_s: float = 0.0
    startup_check_interval_s: float = 2.0
    is_disabled: bool = False


def health_rules(health: HealthSettings, workers: Workers, own: HealthOverrides) -> HealthRules:
    """The rules of one worker: what its specification says, else the command line."""
    disabled = own.disable_health_check
    return HealthRules(
        endpoint=own.health_check_endpoint or health.health_check_endpoint,
        interval_s=own.check_interval_secs or health.health_check_interval_secs,
        timeout_s=own.timeout_secs or health.health_check_timeout_secs,
        failure_threshold=own.failure_threshold or health.health_failure_threshold,
        success_threshold=own.success_threshold or health.health_success_threshold,
        startup_timeout_s=workers.worker_startup_timeout_secs,
        startup_delay_s=workers.worker_startup_delay,
        startup_check_interval_s=workers.worker_startup_check_interval,
        is_disabled=health.disable_health_check if disabled is None else disabled,
    )


def is_alive(status: int) -> bool:
    """Does this HTTP status of a probe say that the worker lives (WRK-1)?"""
    return 200 <= status < 300 or status in ALIVE_STATUSES


class Health:
    """Hits and misses of one worker. `status` mirrors the worker's, set by `entered` alone."""

    __slots__ = (
        "_counted_at_s",
        "_hits",
        "_is_refusing",
        "_last_s",
        "_misses",
        "_next_s",
        "_probes",
        "_since_s",
        "rules",
        "status",
    )

    def __init__(self, rules: HealthRules) -> None:
        self.rules = rules
        self.status = Status.PENDING
        self._hits = 0  # hits in a row
        self._misses = 0  # misses in a row since the status was entered
        self._probes = 0  # probes since the status was entered
        self._is_refusing = False  # the last probe was refused
        self._last_s = 0.0  # last observation, or when the status was entered
        self._since_s = 0.0  # when the worker was added
        self._counted_at_s = -math.inf  # last miss that counted towards `failed`
        self._next_s: float | None = None  # drawn once per observation, so that asking twice changes nothing

    def __repr__(self) -> str:
        return f"<Health {self.status.value} hits={self._hits} misses={self._misses}>"

    @property
    def is_disabled(self) -> bool:
        """Never probed: the worker is ready at once and only the breaker judges (HLT-3)."""
        return self.rules.is_disabled

    @property
    def is_untried(self) -> bool:
        """No probe has come back yet, so nothing is known about this worker."""
        return self.status is Status.PENDING and self._probes == 0

    def entered(self, status: Status, now: float) -> None:
        """The worker has this status from now on; counts begin anew. The registry calls this, nobody else."""
        self.status = status
        self._misses = 0
        self._probes = 0
        self._last_s = now
        self._counted_at_s = now
        self._next_s = None
        if status is Status.PENDING:
            self._since_s = now
        if status is not Status.NOT_READY:
            self._is_refusing = False
        if status is Status.READY:
            self._hits = 0

    def set_rules(self, rules: HealthRules) -> None:
        """Other numbers, same counts."""
        self.rules = rules
        self._next_s = None

    def observed_ok(self, now: float) -> Status | None:
        """A probe was answered by a living server. Returns the status the worker should enter, or None."""
        self._observed(now)
        self._is_refusing = False
        self._misses = 0
        self._hits += 1
        if self.status is Status.PENDING:
            return Status.READY
        if self.status in (Status.NOT_READY, Status.FAILED) and self._hits >= self.rules.success_threshold:
            return Status.READY
        return None

    def observed_miss(self, now: float, refused: bool) -> Status | None:
        """A probe failed: timeout, 5xx, or the connection was `refused`. Returns the status to enter, or None.

        While a worker refuses, it is probed every second; these hasty misses count towards `failed` no faster than
        regular ones would, or every restart of an engine would be a failure.
        """
        self._observed(now)
        self._hits = 0
        rules = self.rules
        if self.status is Status.READY:
            self._misses += 1
            refusals = self._misses if refused and (self._is_refusing or self._misses == 1) else 0
            self._is_refusing = refused
            if self._misses >= rules.failure_threshold or refusals >= REFUSED_MISSES:
                return Status.NOT_READY
            return None
        self._is_refusing = refused
        if self.status is Status.PENDING:
            return Status.FAILED if now - self._since_s >= rules.startup_timeout_s else None
        if self.status is Status.NOT_READY:
            if now - self._counted_at_s >= rules.interval_s * (1.0 - JITTER_RATIO):
                self._counted_at_s = now
                self._misses += 1
            if self._misses >= FAILED_MULTIPLE * rules.failure_threshold:
                return Status.FAILED
        return None

    def note_refused(self, now: float) -> None:
        """A request found nobody (refused or reset): the next probe is due at once (HLT-2)."""
        if self.status is Status.READY:
            self._next_s = now

    def next_probe_at(self, rng: Random) -> float:
        """When to probe next, by the caller's clock; infinity = never. Asking again gives the same answer."""
        if self.rules.is_disabled or self.status is Status.DRAINING:
            return math.inf
        if self._next_s is None:
            self._next_s = self._last_s + self._delay_s(rng)
        return self._next_s

    def _observed(self, now: float) -> None:
        self._probes += 1
        self._last_s = now
        self._next_s = None

    def _delay_s(self, rng: Random) -> float:
        rules = self.rules
        regular_s = rules.interval_s * (1.0 + JITTER_RATIO * (2.0 * rng.random() - 1.0))
        if self.status is Status.PENDING:
            if self._probes == 0:
                return rules.startup_delay_s
            doublings = min(self._probes - 1, 30)  # 0.1 s x 2^30 is longer than any check interval
            return min(FIRST_DELAY_S * 2.0**doublings, rules.startup_check_interval_s)
        if self.status is Status.READY:
            return min(REFUSED_DELAY_S, regular_s) if self._is_refusing else regular_s
        if self._is_refusing or self._hits:
            return min(RETURN_DELAY_S, regular_s)
        return regular_s
