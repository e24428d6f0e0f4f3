"""What the request path counts, bound once per kind of request.

Owns the label values of router metrics (section 19): served model names or `other`, so that clients cannot grow the
series. The hot path touches bound counters only. Never reads a clock.
"""

from __future__ import annotations

from smg.api.endpoints import Endpoint
from smg.fleet.worker import Kind, Worker
from smg.gateway.relay import Usage
from smg.telemetry.metrics import OTHER, Counter, Metrics

ROUTER_TYPE = "http"
CONNECTION_MODE = "http"
LANES_MAX = 4096  # endpoints x served models x stream or not; beyond it lanes are made per request

_ERROR_TYPES = {
    400: "validation_error",
    404: "no_workers",
    413: "validation_error",
    415: "validation_error",
    500: "internal_error",
    502: "backend_error",
    503: "no_workers",
    504: "timeout",
}


class Lane:
    """The counters of one endpoint, model, policy and stream mode."""

    __slots__ = ("_selected", "_tallies", "model", "policy_name", "series")

    def __init__(
        self, tallies: Tallies, endpoint: Endpoint, model: str, policy_name: str, is_stream: bool
    ) -> None:
        self._tallies = tallies
        self.model = model
        self.policy_name = policy_name
        self.series = tallies.metrics.request_series(
            "POST", endpoint.path, model, endpoint.name, is_stream, ROUTER_TYPE, "regular", CONNECTION_MODE
        )
        self._selected: dict[Kind, Counter] = {}

    def selected(self, worker: Worker) -> None:
        """A worker was chosen."""
        counter = self._selected.get(worker.kind)
        if counter is None:
            counter = self._selected[worker.kind] = self._tallies.metrics.counter(
                "smg_worker_selection_total",
                worker_type=worker.kind.value,
                connection_mode=CONNECTION_MODE,
                model=self.model,
                policy=self.policy_name,
            )
        counter.value += 1

    def upstream(self, status: int) -> None:
        """A worker's answer that was not relayed, because another worker is tried."""
        self.series.upstream(status, "")

    def generated(self, ttft_s: float | None, duration_s: float, usage: Usage | None) -> None:
        """An answer with usage or a stream came to its end."""
        if usage is None:
            self.series.generated(ttft_s, duration_s, 0, 0)
        else:
            self.series.generated(ttft_s, duration_s, usage.prompt_tokens or 0, usage.completion_tokens or 0)

    def failed(self, status: int, code: str, duration_s: float) -> None:
        """The gateway answered with an error of its own."""
        self.series.finished(status, code, duration_s)
        kind = _ERROR_TYPES.get(status)
        if kind is not None:
            self.series.failed(kind)


class Tallies:
    """All lanes, and what is counted per worker type."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._lanes: dict[tuple[str, str, str, bool], Lane] = {}

    def lane(self, endpoint: Endpoint, model: str, policy_name: str, is_stream: bool) -> Lane:
        """The lane of a request; `model` is "" for a name that no worker claims."""
        key = (endpoint.path, model, policy_name, is_stream)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(self, endpoint, model or OTHER, policy_name, is_stream)
            if len(self._lanes) < LANES_MAX:
                self._lanes[key] = lane
        return lane

    def forget_model(self, model: str) -> None:
        """A model is served no more: its series go (MET-10)."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if key[1] != model}
        self.metrics.forget(model=model)

    def worker_error(self, worker: Worker, kind: str) -> None:
        """An attempt on `worker` failed without an answer, or its stream broke off (STR-9)."""
        self.metrics.counter(
            "smg_worker_errors_total",
            worker_type=worker.kind.value,
            connection_mode=CONNECTION_MODE,
            error_type=kind,
        ).value += 1

    def retried(self, endpoint: Endpoint, worker: Worker) -> None:
        """Another attempt begins."""
        self.metrics.counter(
            "smg_worker_retries_total", worker_type=worker.kind.value, endpoint=endpoint.name
        ).value += 1

    def exhausted(self, endpoint: Endpoint, worker: Worker) -> None:
        """The retry budget refused another attempt (RTY-4)."""
        self.metrics.counter(
            "smg_worker_retries_exhausted_total", worker_type=worker.kind.value, endpoint=endpoint.name
        ).value += 1
