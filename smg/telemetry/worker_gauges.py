"""What a scrape reads off the workers: pool size, requests, health, breakers (MET-4, MET-5).

Owns the names and label values of worker gauges. A worker that left is not yielded any more, so its series vanish with
it (MET-10). Keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from smg.fleet.breaker import CLOSED, HALF_OPEN, OPEN
from smg.fleet.worker import Status, Worker

CONNECTION_MODE = "http"
_STATES = {CLOSED: 0.0, OPEN: 1.0, HALF_OPEN: 2.0}


def worker_samples(workers: Iterable[Worker], now: float) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """(family, label values, value) of every worker."""
    for worker in workers:
        url = worker.url
        breaker = worker.breaker
        for model in worker.models or ("unknown",):
            yield "smg_worker_pool_size", (worker.kind.value, CONNECTION_MODE, model), 1.0
        yield "smg_worker_requests_active", (url,), float(worker.in_flight)
        yield "smg_worker_health", (url,), float(worker.status is Status.READY)
        yield "smg_worker_cb_state", (url,), _STATES[breaker.state_at(now)]
        yield "smg_worker_cb_consecutive_failures", (url,), float(breaker.consecutive_failures)
        yield "smg_worker_cb_consecutive_successes", (url,), float(breaker.consecutive_successes)
        yield "smg_worker_cb_outcomes_total", (url, "success"), float(breaker.successes_total)
        yield "smg_worker_cb_outcomes_total", (url, "failure"), float(breaker.failures_total)
        for (old, new), count in breaker.transitions.items():
            yield "smg_worker_cb_transitions_total", (url, old, new), float(count)
