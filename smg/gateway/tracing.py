"""The span of a request, around the gateway's handler (TRC-1).

Owns the life of a span: begun with the head of a request, ended when it was answered, refused or given up, with what the
catalog declares for `http_request`. These rooms stand between others only while tracing is on; off, none of them
exists and nothing is asked. Never exports anything, never waits for a collector.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from smg.api.call import Call
from smg.backends.http_worker import Asker, HttpWorkers, Lines
from smg.errors import ClientGone, GatewayError, ShuttingDown
from smg.fleet.worker import Worker
from smg.gateway import routes
from smg.gateway.problem import INTERRUPTED_CODE
from smg.net.exchange import Exchange
from smg.net.upstream import Upstream
from smg.telemetry.metrics import METHODS, OTHER
from smg.telemetry.trace import Span, Tracer
from smg.wire.headers import split_target

CLIENT_GONE_STATUS = 499  # as metrics count it; nobody is sent it
SERVER_ERROR_STATUS_MIN = 500

Handle = Callable[[Exchange], Awaitable[None]]


class Tracing:
    """A handler for `net.Server` that has a span around each request of `handle`."""

    def __init__(self, handle: Handle, tracer: Tracer) -> None:
        self._handle = handle
        self._tracer = tracer

    def handle(self, exchange: Exchange) -> Awaitable[None]:
        """Serves one request; raises what the inner handler raises. Without a span when the parent is not sampled."""
        fields = exchange.head.fields
        span = self._tracer.start(fields.get(b"traceparent"), _tracestate(exchange))
        if span is None:
            return self._handle(exchange)
        return self._serve(exchange, span)

    async def _serve(self, exchange: Exchange, span: Span) -> None:
        exchange.span = span
        exchange.status = 0
        exchange.trace_lines = _lines(span)
        status, code = 500, "internal_error"
        try:
            await self._handle(exchange)
            status, code = exchange.status, ""
        except GatewayError as error:
            status, code = exchange.status or error.status, error.code
            raise
        except ClientGone:
            status, code = exchange.status or CLIENT_GONE_STATUS, "client_gone"
            raise
        except ShuttingDown:
            status = exchange.status or 503
            code = INTERRUPTED_CODE if exchange.has_begun_answer else "no_available_workers"
            raise
        finally:
            exchange.span = None
            _finish(exchange, span, status, code)


class TracedWorkers(HttpWorkers):
    """The backend of HTTP workers, which tells the span where each attempt went."""

    async def open(self, call: Call, worker: Worker, lines: Lines, query: bytes, exchange: Asker) -> Upstream:
        """As `HttpWorkers.open`."""
        # The prefill leg of a pair asks without an exchange: its worker is not the one that answers.
        span = exchange.span if isinstance(exchange, Exchange) else None
        if span is not None:
            attempts = span.attributes.get("smg.attempts", 0)
            assert isinstance(attempts, int)
            span.set("smg.attempts", attempts + 1)
            span.set("smg.worker", worker.url)
            span.set("smg.model", call.model)
        return await super().open(call, worker, lines, query, exchange)


def _lines(span: Span) -> bytes:
    """The header lines that make the worker's spans children of ours."""
    lines = b"traceparent: %b\r\n" % span.traceparent
    return lines + b"tracestate: %b\r\n" % span.tracestate if span.tracestate else lines


def _tracestate(exchange: Exchange) -> bytes | None:
    """The client's `tracestate`; several lines are one list (W3C Trace Context, section 3.3.1)."""
    if b"tracestate" not in exchange.head.fields:
        return None
    return b",".join(value for name, value in exchange.head.headers if name == b"tracestate")


def _finish(exchange: Exchange, span: Span, status: int, code: str) -> None:
    head = exchange.head
    method = head.method.decode("ascii", "replace")
    found = routes.find(split_target(head.target)[0])
    span.set("http.request.method", method if method in METHODS else OTHER)
    span.set("http.route", found[0].template if found is not None else routes.UNKNOWN_TEMPLATE)
    span.set("http.response.status_code", status)
    span.set("smg.request_id", exchange.request_id)
    span.set("smg.streaming", exchange.is_streaming)
    if code:
        span.set("error.type", code)
    span.end(is_error=status >= SERVER_ERROR_STATUS_MIN)
