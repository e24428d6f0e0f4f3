"""What the request path counts, bound once per kind of request.

Owns the label values of router metrics (section 19): served model names or `other`, so that clients cannot grow the
series. The hot path touches bound counters only. Never reads a clock.
"""

from __future__ import annotations

from smg.api.endpoints import Endpoint
from smg.fleet.worker import Worker
from smg.gateway.relay import Usage
from smg.policies.pair import Pair
from smg.policies.policy import Policy, Stateless, Wants
from smg.telemetry.metrics import OTHER, Counter, Metrics
from smg.tenancy.usage import Entry

ROUTER_TYPE = "http"
REGULAR = "regular"
PAIR = "pd"
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
    """What is the same for every request of one endpoint, model and stream mode: the policy, what it wants, and the
    counters.

    `tells_placed` and `tells_finished` are False for policies that remember nothing: then dispatch need not tell them.
    `entries` are the lines of the usage book by tenant, for those that have one of their own.
    """

    __slots__ = (
        "_selected",
        "_tallies",
        "counts_chars",
        "entries",
        "model",
        "needs_key",
        "policy",
        "series",
        "tells_finished",
        "tells_placed",
    )

    def __init__(
        self,
        tallies: Tallies,
        endpoint: Endpoint,
        model: str,
        policy: Policy,
        is_stream: bool,
        needs_key: bool,
        backend_type: str = REGULAR,
    ) -> None:
        self._tallies = tallies
        self.model = model
        self.policy = policy
        self.needs_key = needs_key or Wants.KEY in policy.wants
        self.counts_chars = Wants.CHARS in policy.wants
        kind = type(policy)
        self.tells_placed = getattr(kind, "placed", None) is not Stateless.placed
        self.tells_finished = getattr(kind, "finished", None) is not Stateless.finished
        self.series = tallies.metrics.request_series(
            "POST", endpoint.path, model, endpoint.name, is_stream, ROUTER_TYPE, backend_type, CONNECTION_MODE
        )
        self._selected: dict[str, Counter] = {}
        self.entries: dict[str, Entry] = {}

    def selected(self, worker: Worker) -> None:
        """A worker was chosen."""
        counter = self._selected.get(worker.spec.worker_type)
        if counter is None:
            counter = self._selected[worker.spec.worker_type] = self._tallies.metrics.counter(
                "smg_worker_selection_total",
                worker_type=worker.kind.value,
                connection_mode=CONNECTION_MODE,
                model=self.model,
                policy=self.policy.name,
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


class PrefillLane(Lane):
    """The lane of the prefill leg: its own policy; tokens and times are counted once, with the decode worker's answer."""

    __slots__ = ()

    def generated(self, ttft_s: float | None, duration_s: float, usage: Usage | None) -> None:
        """Nothing: the decode leg counts."""


class PairLane(Lane):
    """A lane whose requests go to two workers: itself for the decode leg, `prefill` for the other (section 18)."""

    __slots__ = ("prefill",)

    def __init__(
        self, tallies: Tallies, endpoint: Endpoint, model: str, pair: Pair, is_stream: bool, needs_key: bool
    ) -> None:
        super().__init__(tallies, endpoint, model, pair.decode, is_stream, needs_key, PAIR)
        self.prefill = PrefillLane(tallies, endpoint, model, pair.prefill, is_stream, needs_key, PAIR)
        self.needs_key = self.needs_key or self.prefill.needs_key


class Tallies:
    """All lanes, and what is counted per worker type."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def lane(
        self, endpoint: Endpoint, model: str, policy: Policy, is_stream: bool, needs_key: bool = False
    ) -> Lane:
        """A new lane; `model` is "" for a name that no worker claims."""
        return Lane(self, endpoint, model or OTHER, policy, is_stream, needs_key)

    def pair_lane(
        self, endpoint: Endpoint, model: str, pair: Pair, is_stream: bool, needs_key: bool = False
    ) -> PairLane:
        """As `lane`, for pairs of workers."""
        return PairLane(self, endpoint, model or OTHER, pair, is_stream, needs_key)

    def forget_model(self, model: str) -> None:
        """A model is served no more: its series go (MET-10)."""
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
