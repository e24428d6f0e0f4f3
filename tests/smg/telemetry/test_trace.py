"""Trace context and the queue of spans, without a collector."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from smg.telemetry import trace as trace_room
from smg.telemetry.metrics import Metrics
from smg.telemetry.trace import (
    BATCH_SPANS,
    EXPORT_INTERVAL_S,
    QUEUE_SPANS_MAX,
    Span,
    TraceContext,
    Tracer,
    parse_traceparent,
)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
INBOUND = f"00-{TRACE_ID}-{SPAN_ID}-01".encode()


class Collector:
    """A `send` that keeps what it gets."""

    def __init__(self) -> None:
        self.batches: list[list[Span]] = []
        self.takes = True
        self._calls = 0
        self._called = trio.Event()

    def __call__(self, spans: Sequence[Span]) -> bool:
        if self.takes:
            self.batches.append(list(spans))
        trio.from_thread.run_sync(self._count)
        return self.takes

    def _count(self) -> None:
        self._calls += 1
        self._called.set()
        self._called = trio.Event()

    async def called(self, times: int) -> None:
        """Until `send` was called so often and its caller has seen the result."""
        while self._calls < times:
            await self._called.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)

    @property
    def spans(self) -> list[Span]:
        return [span for batch in self.batches for span in batch]


def tracer(collector: Collector, metrics: Metrics | None = None) -> Tracer:
    ticks = iter(range(1_000, 10_000_000))
    return Tracer(metrics or Metrics(), collector, Random(7), clock_ns=lambda: next(ticks))


def fate(metrics: Metrics) -> tuple[float, float, float]:
    name = "smg_telemetry_spans_total"
    results = [metrics.counter(name, result=result).value for result in ("exported", "failed", "dropped")]
    return (results[0], results[1], results[2])


# -- the header


def test_a_valid_traceparent_is_read() -> None:
    assert parse_traceparent(INBOUND) == TraceContext(TRACE_ID, SPAN_ID, True)
    assert parse_traceparent(INBOUND[:-1] + b"0") == TraceContext(TRACE_ID, SPAN_ID, False)


def test_flags_other_than_sampled_do_not_matter() -> None:
    assert parse_traceparent(INBOUND[:-2] + b"fe") == TraceContext(TRACE_ID, SPAN_ID, False)
    assert parse_traceparent(INBOUND[:-2] + b"ff") == TraceContext(TRACE_ID, SPAN_ID, True)


def test_a_later_version_may_have_more_fields() -> None:
    assert parse_traceparent(b"cc" + INBOUND[2:] + b"-what-the-future-brings") is not None
    assert parse_traceparent(b"cc" + INBOUND[2:]) is not None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"ff" + INBOUND[2:],
        INBOUND + b"-more",
        INBOUND + b".",
        b"cc" + INBOUND[2:] + b".more",
        INBOUND.upper(),
        INBOUND[1:],
        INBOUND[:-1],
        INBOUND + b"\n",
        b" " + INBOUND,
        f"00-{'0' * 32}-{SPAN_ID}-01".encode(),
        f"00-{TRACE_ID}-{'0' * 16}-01".encode(),
        INBOUND.replace(b"-", b"_"),
        f"00-{TRACE_ID}-{SPAN_ID}-0g".encode(),
        f"00-{TRACE_ID[:-1]}\u0664-{SPAN_ID}-01".encode(),
    ],
)
def test_an_invalid_traceparent_is_as_good_as_none(value: bytes) -> None:
    assert parse_traceparent(value) is None


@given(st.binary(max_size=80))
def test_no_bytes_make_the_reader_fail(value: bytes) -> None:
    context = parse_traceparent(value)
    assert context is None or len(context.trace_id) == 32


# -- spans


def test_a_child_keeps_the_trace_and_names_its_parent() -> None:
    span = tracer(Collector()).start(INBOUND, b"vendor=1")
    assert span is not None
    assert (span.name, span.trace_id, span.parent_id) == ("http_request", TRACE_ID, SPAN_ID)
    assert span.span_id != SPAN_ID
    assert span.tracestate == b"vendor=1"
    assert parse_traceparent(span.traceparent) == TraceContext(TRACE_ID, span.span_id, True)


def test_an_invalid_parent_starts_a_new_trace_and_drops_its_state() -> None:
    made = tracer(Collector())
    first, second = made.start(b"junk", b"vendor=1"), made.start(None, b"vendor=1")
    assert first is not None and second is not None
    assert first.trace_id != second.trace_id
    assert first.parent_id == second.parent_id == ""
    assert first.tracestate == second.tracestate == b""
    assert parse_traceparent(first.traceparent) is not None


def test_a_parent_that_is_not_sampled_is_left_alone() -> None:
    assert tracer(Collector()).start(INBOUND[:-1] + b"0", b"vendor=1") is None


def test_an_id_is_never_zero() -> None:
    class Zeros(Random):
        def getrandbits(self, k: int, /) -> int:
            return 0

    span = Tracer(Metrics(), Collector(), Zeros()).start(None, None)
    assert span is not None
    assert parse_traceparent(span.traceparent) is not None


def test_an_attribute_that_the_catalog_lacks_is_a_bug() -> None:
    span = tracer(Collector()).start(None, None)
    assert span is not None
    with pytest.raises(AssertionError, match=r"smg\.prompt"):
        span.set("smg.prompt", "secret")


def test_a_span_ends_once() -> None:
    span = tracer(Collector()).start(None, None)
    assert span is not None
    span.end()
    with pytest.raises(AssertionError, match="once"):
        span.end()


# -- the queue


def finish(made: Tracer, count: int) -> None:
    for _ in range(count):
        span = made.start(None, None)
        assert span is not None
        span.end()


async def test_spans_are_exported_in_bounded_batches_and_each_once(
    mock_clock: trio.testing.MockClock,
) -> None:
    collector, metrics = Collector(), Metrics()
    made = tracer(collector, metrics)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked()
        finish(made, BATCH_SPANS - 1)
        await trio.testing.wait_all_tasks_blocked()
        assert collector.batches == []  # neither full nor old
        finish(made, BATCH_SPANS + 6)
        await collector.called(3)
        finish(made, 3)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(EXPORT_INTERVAL_S)
        await collector.called(4)
        nursery.cancel_scope.cancel()
    assert [len(batch) for batch in collector.batches] == [BATCH_SPANS, BATCH_SPANS, 5, 3]
    assert len({span.span_id for span in collector.spans}) == 2 * BATCH_SPANS + 8
    assert fate(metrics) == (2 * BATCH_SPANS + 8, 0, 0)


async def test_the_last_spans_are_exported_at_shutdown() -> None:
    collector, metrics = Collector(), Metrics()
    made = tracer(collector, metrics)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked()
        finish(made, 4)
        nursery.cancel_scope.cancel()
    assert len(collector.spans) == 4


def test_a_full_queue_drops_and_counts() -> None:
    metrics = Metrics()
    made = tracer(Collector(), metrics)
    finish(made, QUEUE_SPANS_MAX + 9)
    assert fate(metrics) == (0, 0, 9)


class Lines:
    """A logger that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def warn(self, message: str) -> None:
        self.lines.append(("warn", message))

    def info(self, message: str) -> None:
        self.lines.append(("info", message))


async def test_a_collector_that_refuses_costs_the_spans_and_one_log_line(
    mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Lines()
    monkeypatch.setattr(trace_room, "_log", log)
    collector, metrics = Collector(), Metrics()
    made = tracer(collector, metrics)
    collector.takes = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        for turn in range(4):
            await trio.testing.wait_all_tasks_blocked()
            collector.takes = turn == 3
            finish(made, 2)
            mock_clock.jump(EXPORT_INTERVAL_S)
            await collector.called(turn + 1)
        nursery.cancel_scope.cancel()
    assert fate(metrics) == (2, 6, 0)
    assert [level for level, _ in log.lines] == ["warn", "info"]


async def test_a_collector_that_hangs_does_not_hold_the_loop_or_the_shutdown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    hang = threading.Event()

    def send(spans: Sequence[Span]) -> bool:
        return hang.wait(60)

    metrics = Metrics()
    made = Tracer(metrics, send, Random(7))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            finish(made, 2 * BATCH_SPANS)
            await trio.sleep(EXPORT_INTERVAL_S)
            nursery.cancel_scope.cancel()
    finally:
        hang.set()
    exported, failed, dropped = fate(metrics)
    assert (exported, failed + dropped) == (0, 2 * BATCH_SPANS)
