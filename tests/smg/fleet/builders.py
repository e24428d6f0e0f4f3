"""Small fleets for tests of machines: real workers, real registry, no mocks."""

from __future__ import annotations

from typing import Any

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.fleet.breaker import Breaker, BreakerRules
from smg.fleet.health import Health, HealthRules
from smg.fleet.registry import Registry
from smg.fleet.worker import LoadReport, Worker, WorkerSpec

PROBED = HealthRules()
NEVER_PROBED = HealthRules(is_disabled=True)


def registry(
    *,
    aliases: dict[str, str] | None = None,
    health: HealthRules = NEVER_PROBED,
    breaker: BreakerRules | None = None,
    drain_timeout_s: float = 600.0,
) -> Registry:
    """A registry whose workers are ready at once, unless `health` probes them."""
    rules = breaker or BreakerRules()
    return Registry(
        aliases=aliases or {},
        make_health=lambda spec: Health(health),
        make_breaker=lambda spec: Breaker(rules),
        drain_timeout_s=drain_timeout_s,
    )


def url_of(index: int) -> str:
    return f"http://worker-{index}:8000"


def fleet(count: int, model: str = "m", **spec: Any) -> tuple[Registry, tuple[Worker, ...]]:
    """`count` ready workers of one model."""
    built = registry()
    workers = tuple(built.add(WorkerSpec(url_of(i), model_id=model, **spec), 0.0) for i in range(count))
    return built, workers


def workers_of(count: int, **spec: Any) -> tuple[Worker, ...]:
    return fleet(count, **spec)[1]


def call(text: str = "hello", *, key: str | None = None, target: str | None = None, model: str = "m") -> Call:
    return Call(
        CHAT,
        model,
        b"",
        {"messages": [{"role": "user", "content": text}]},
        routing_key=key,
        target=target,
    )


def reported(worker: Worker, now: float = 0.0, until_s: float = 1e9, **told: Any) -> None:
    """Gives the worker a report that counts for long."""
    worker.report = LoadReport(now, **told)
    worker.report_until_s = until_s
    worker.sent_since_report = 0
    worker.chars_since_report = 0
