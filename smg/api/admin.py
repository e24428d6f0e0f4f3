"""The words of the worker API: what `GET /workers` shows (contract section 10).

Plain frozen structs; how they are filled is the business of `gateway/workers_api`. There is no member for a key, so
that none can be shown (WRK-14).
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class ModelView(msgspec.Struct, frozen=True):
    """A model of a worker: its name and what else it answers to."""

    id: str
    aliases: tuple[str, ...] = ()


class HealthView(msgspec.Struct, frozen=True):
    """How a worker is probed: its own settings, else the gateway's. Seconds and counts."""

    disable_health_check: bool
    check_interval_secs: float
    timeout_secs: float
    failure_threshold: int
    success_threshold: int
    health_check_endpoint: str


class ResilienceView(msgspec.Struct, frozen=True):
    """When a worker's breaker opens and closes: its own settings, else the gateway's."""

    disable_circuit_breaker: bool
    cb_failure_threshold: int
    cb_success_threshold: int
    cb_timeout_duration_secs: float
    cb_window_duration_secs: float
    retryable_status_codes: tuple[int, ...]


class JobStatus(msgspec.Struct, frozen=True):
    """A job that runs for a worker, or failed (WRK-10). `timestamp` is Unix time in seconds."""

    job_type: str
    worker_url: str
    status: str
    message: str | None
    timestamp: float


class WorkerView(msgspec.Struct, frozen=True):
    """One worker (WRK-9)."""

    id: str
    url: str
    model_id: str | None
    models: tuple[ModelView, ...]
    worker_type: str
    connection_mode: str
    runtime_type: str | None
    labels: dict[str, str]
    priority: int
    cost: float
    health: HealthView
    resilience: ResilienceView
    is_healthy: bool
    status: str
    load: int
    bootstrap_port: int | UnsetType = UNSET
    dp_rank: int | UnsetType = UNSET
    dp_size: int | UnsetType = UNSET
    job_status: JobStatus | UnsetType = UNSET


class WorkerStats(msgspec.Struct, frozen=True):
    """How many of the listed workers are of which kind."""

    prefill_count: int
    decode_count: int
    regular_count: int


class WorkerList(msgspec.Struct, frozen=True):
    """The answer of `GET /workers` (WRK-8)."""

    workers: tuple[WorkerView, ...]
    total: int
    stats: WorkerStats


class Accepted(msgspec.Struct, frozen=True):
    """The answer 202 to a change of a worker (WRK-6, WRK-11 to WRK-13)."""

    status: str
    worker_id: str
    url: str
    location: str
    message: str
