"""Trace context of the W3C and the spans of this node (TRC-1).

This room owns ids, sampling and the queue of finished spans. Nothing of it runs unless `--enable-trace` is given:
without a `Tracer` the gateway passes inbound `traceparent` and `tracestate` through and pays one `is None`. It must
never wait for the collector, and knows no export format: batches go to a `send` callable in a thread
(`otlp.py` has one).

Deviation from the W3C text: flags other than `sampled` are not passed on, as its level 1 asks.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeAlias

import msgspec
import trio

from smg.telemetry import log as log_room
from smg.telemetry.catalog import HTTP_REQUEST
from smg.telemetry.metrics import Metrics

QUEUE_SPANS_MAX = 4096
"""Finished spans that wait for the collector: a second or two of a busy node. Later ones are dropped and counted."""

BATCH_SPANS = 128
"""Spans of one export. Encoding holds the interpreter's lock, so a batch is kept to a few milliseconds."""

EXPORT_INTERVAL_S = 1.0
"""Spans wait at most this long for a full batch."""

LAST_EXPORT_S = 3.0
"""What the last spans may cost at shutdown."""

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)

_log = log_room.logger("smg.telemetry.trace")


class TraceContext(msgspec.Struct, frozen=True):
    """An inbound parent: ids in lower-case hex."""

    trace_id: str
    span_id: str
    is_sampled: bool


def parse_traceparent(value: bytes) -> TraceContext | None:
    """The context in a `traceparent` header; None when it is not valid, which means: start a new trace.

    Version 00 has exactly four fields; a later version may have more, which are ignored; ff and all-zero ids are
    invalid (W3C Trace Context, section 3.2).
    """
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return None
    if trace_id == b"0" * 32 or span_id == b"0" * 16:
        return None
    return TraceContext(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & 1))


class Span:
    """One span that is being measured. `traceparent` and `tracestate` are the headers the worker gets.

    `tracestate` is empty when there is none to send. Call `end` exactly once.
    """

    __slots__ = (
        "_tracer",
        "attributes",
        "end_ns",
        "is_error",
        "name",
        "parent_id",
        "span_id",
        "start_ns",
        "trace_id",
        "tracestate",
    )

    def __init__(
        self, tracer: Tracer, name: str, trace_id: str, span_id: str, parent_id: str, tracestate: bytes
    ) -> None:
        self._tracer = tracer
        self.name = name
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.tracestate = tracestate
        self.start_ns = tracer.clock_ns()
        self.end_ns = 0
        self.attributes: dict[str, str | int | bool] = {}
        self.is_error = False

    @property
    def traceparent(self) -> bytes:
        """The header that makes the receiver's spans children of this one."""
        return f"00-{self.trace_id}-{self.span_id}-01".encode()

    def set(self, name: str, value: str | int | bool) -> None:
        """Add an attribute, which the catalog must declare."""
        assert name in HTTP_REQUEST.attributes, name
        self.attributes[name] = value

    def end(self, is_error: bool = False) -> None:
        """Stop the clock and queue the span for export; never waits."""
        assert self.end_ns == 0, "a span ends once"
        self.end_ns = self._tracer.clock_ns()
        self.is_error = is_error
        self._tracer.queue(self)


Send: TypeAlias = Callable[[Sequence[Span]], bool]
"""Delivers a batch, in a thread, within some ten seconds; False when the collector did not take it."""


class Tracer:
    """Makes spans and hands the finished ones to `send` in batches. `rng` makes the ids."""

    def __init__(
        self, metrics: Metrics, send: Send, rng: Random, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.clock_ns = clock_ns
        self._send = send
        self._rng = rng
        self._finished: deque[Span] = deque()
        self._is_batch_full = trio.Event()
        self._exported = metrics.counter("smg_telemetry_spans_total", result="exported")
        self._failed = metrics.counter("smg_telemetry_spans_total", result="failed")
        self._dropped = metrics.counter("smg_telemetry_spans_total", result="dropped")
        self._is_refused = False

    def start(self, traceparent: bytes | None, tracestate: bytes | None) -> Span | None:
        """A span `http_request`, child of the inbound parent if that is valid, else the root of a new trace.

        None when the parent decided not to sample: then the inbound headers pass through as if tracing were off. A
        `tracestate` without a valid `traceparent` is dropped, as the W3C asks.
        """
        parent = parse_traceparent(traceparent) if traceparent is not None else None
        if parent is None:
            return Span(self, HTTP_REQUEST.name, self._new_id(128), self._new_id(64), "", b"")
        if not parent.is_sampled:
            return None
        return Span(
            self, HTTP_REQUEST.name, parent.trace_id, self._new_id(64), parent.span_id, tracestate or b""
        )

    def queue(self, span: Span) -> None:
        """Keep a finished span for export, or count it as dropped."""
        finished = self._finished
        if len(finished) >= QUEUE_SPANS_MAX:
            self._dropped.value += 1
            return
        finished.append(span)
        if len(finished) >= BATCH_SPANS:
            self._is_batch_full.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Export until cancelled, then export what is left for at most `LAST_EXPORT_S`."""
        task_status.started()
        # One export at a time: a slow collector must not gather threads.
        limiter = trio.CapacityLimiter(1)
        try:
            while True:
                with trio.move_on_after(EXPORT_INTERVAL_S):
                    await self._is_batch_full.wait()
                await self._export(limiter)
        finally:
            with trio.move_on_after(LAST_EXPORT_S, shield=True):
                await self._export(limiter)
            self._dropped.value += len(self._finished)
            self._finished.clear()

    async def _export(self, limiter: trio.CapacityLimiter) -> None:
        """Send all that waits."""
        self._is_batch_full = trio.Event()
        while self._finished:
            batch = [self._finished.popleft() for _ in range(min(BATCH_SPANS, len(self._finished)))]
            is_taken = False
            try:
                # Abandoned on cancellation: the thread ends by the exporter's own timeout.
                is_taken = await trio.to_thread.run_sync(
                    self._send, batch, limiter=limiter, abandon_on_cancel=True
                )
            finally:
                (self._exported if is_taken else self._failed).value += len(batch)
            if is_taken is self._is_refused:
                # Once per change: a collector that is down for a day is one line.
                self._is_refused = not is_taken
                if is_taken:
                    _log.info("spans are exported again")
                else:
                    _log.warn("spans are lost: the collector does not take them")

    def _new_id(self, bits: int) -> str:
        """Random and never zero, which would be invalid."""
        return f"{self._rng.getrandbits(bits) or 1:0{bits // 4}x}"
