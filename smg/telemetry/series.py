"""What one finished HTTP request raises, bound once per combination of labels.

This room owns which families a request belongs to. The hot path calls it once per request (twice when the worker
told its usage), so it adds to plain attributes and looks nothing up for the usual answer, a relayed 200. It must
never make a label value: routes, models and codes are given to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smg.telemetry.metrics import Metrics


class HttpSeries:
    """The series of one method and route template that no model belongs to: probes, worker API, refusals."""

    __slots__ = ("_duration", "_metrics", "_ok", "_path", "_requests")

    def __init__(self, metrics: Metrics, method: str, path: str) -> None:
        self._metrics = metrics
        self._path = path
        self._requests = metrics.counter("smg_http_requests_total", method=method, path=path)
        self._duration = metrics.histogram("smg_http_request_duration_seconds", method=method, path=path)
        self._ok = metrics.response(path, 200, "")

    def finished(self, status: int, error_code: str, duration_s: float) -> None:
        """Count one answered request; `error_code` is empty unless the gateway made an error answer."""
        self._requests.value += 1
        duration = self._duration
        duration.counts[bisect_left(duration.bounds_s, duration_s)] += 1
        duration.sum_s += duration_s
        if status == 200 and not error_code:
            self._ok.value += 1
        else:
            self._metrics.response(self._path, status, error_code).value += 1


class RequestSeries:
    """Everything that one finished inference request raises, bound once per combination of labels.

    One call of `finished` per request; one of `generated` when the worker told its usage.
    """

    __slots__ = (
        "_bounds_s",
        "_duration",
        "_generation",
        "_metrics",
        "_ok",
        "_path",
        "_requests",
        "_route",
        "_router_duration",
        "_router_requests",
        "_router_type",
        "_upstream_ok",
    )

    def __init__(
        self,
        metrics: Metrics,
        method: str,
        path: str,
        model: str,
        endpoint: str,
        streaming: str,
        router_type: str,
        backend_type: str,
        connection_mode: str,
    ) -> None:
        self._metrics = metrics
        self._path = path
        self._router_type = router_type
        self._requests = metrics.counter("smg_http_requests_total", method=method, path=path)
        self._duration = metrics.histogram("smg_http_request_duration_seconds", method=method, path=path)
        self._bounds_s = self._duration.bounds_s
        self._ok = metrics.response(path, 200, "")
        self._upstream_ok = metrics.upstream_response(router_type, 200, "")
        self._route = route = {
            "router_type": router_type,
            "backend_type": backend_type,
            "connection_mode": connection_mode,
            "model": model,
            "endpoint": endpoint,
        }
        self._router_requests = metrics.counter("smg_router_requests_total", **route, streaming=streaming)
        self._router_duration = metrics.histogram("smg_router_request_duration_seconds", **route)
        self._generation: _Generation | None = None

    def finished(self, status: int, error_code: str, duration_s: float, queued_s: float = 0.0) -> None:
        """Count one finished request.

        `error_code` is empty for a relayed answer, which then also counts as an upstream response; a gateway
        error has its code. `duration_s` runs from the request's head, `queued_s` is the part of it spent waiting
        for admission.
        """
        self._requests.value += 1
        self._router_requests.value += 1
        bucket = bisect_left(self._bounds_s, duration_s)
        duration = self._duration
        duration.counts[bucket] += 1
        duration.sum_s += duration_s
        if queued_s:
            self._router_duration.observe(duration_s - queued_s)
        else:
            duration = self._router_duration
            duration.counts[bucket] += 1
            duration.sum_s += duration_s
        if status == 200 and not error_code:
            self._ok.value += 1
            self._upstream_ok.value += 1
            return
        metrics = self._metrics
        metrics.response(self._path, status, error_code).value += 1
        if not error_code:
            metrics.upstream_response(self._router_type, status, "").value += 1

    def upstream(self, status: int, error_code: str) -> None:
        """Count a worker's answer that `finished` does not: of a retried attempt, or of a stream that died."""
        self._metrics.upstream_response(self._router_type, status, error_code).value += 1

    def failed(self, error_type: str) -> None:
        """Count a failed request: no_workers, timeout, backend_error, validation_error or internal_error."""
        self._metrics.counter(
            "smg_router_request_errors_total", **self._route, error_type=error_type
        ).value += 1

    def generated(
        self, ttft_s: float | None, generation_s: float, input_tokens: int, output_tokens: int
    ) -> None:
        """Count one generation. `ttft_s` is None when the answer was no stream; tokens are 0 when not told.

        Time per output token is the time after the first token over the tokens after the first.
        """
        generation = self._generation
        if generation is None:
            generation = self._generation = _Generation(self._metrics, self._route)
        generation.duration.observe(generation_s)
        if ttft_s is not None:
            generation.ttft.observe(ttft_s)
            if output_tokens > 1:
                generation.tpot.observe((generation_s - ttft_s) / (output_tokens - 1))
        generation.input_tokens.value += input_tokens
        generation.output_tokens.value += output_tokens


class _Generation:
    """The part of `RequestSeries` that endpoints without tokens never bind: three histograms are 90 lines of text."""

    __slots__ = ("duration", "input_tokens", "output_tokens", "tpot", "ttft")

    def __init__(self, metrics: Metrics, route: Mapping[str, str]) -> None:
        labels = {name: value for name, value in route.items() if name != "connection_mode"}
        self.ttft = metrics.histogram("smg_router_ttft_seconds", **labels)
        self.tpot = metrics.histogram("smg_router_tpot_seconds", **labels)
        self.duration = metrics.histogram("smg_router_generation_duration_seconds", **labels)
        tokens = "smg_router_tokens_total"
        self.input_tokens = metrics.counter(tokens, **labels, token_type="input")
        self.output_tokens = metrics.counter(tokens, **labels, token_type="output")
