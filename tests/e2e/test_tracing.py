"""Spans of requests at a real OTLP/HTTP collector, and trace headers at the worker (contract TRC-1)."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from smg.cli.flags import parse
from smg.cli.node import Node
from smg.errors import SettingsError
from smg.net.readiness import Readiness
from tests.e2e.fake_worker import (
    SSE_HEAD,
    FakeWorker,
    answers,
    chunk,
    event,
    fake_worker,
    fake_workers,
    hangs,
    resets,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, Gateway, eventually, request, running_gateway

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-00"


class Collected:
    """What a collector has received: spans in order, with attributes as a dictionary."""

    def __init__(self, collector: FakeWorker) -> None:
        self.collector = collector
        self.url = collector.url

    @property
    def spans(self) -> list[Any]:
        found = []
        for turn in self.collector.turns:
            assert turn.path == "/v1/traces"
            assert turn.header("content-type") == b"application/x-protobuf"
            batch = ExportTraceServiceRequest.FromString(turn.body)
            for resource in batch.resource_spans:
                named = {each.key: each.value.string_value for each in resource.resource.attributes}
                assert named["service.name"] == "smg"
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found

    async def span(self, number: int = 0) -> Any:
        await eventually(lambda: len(self.spans) > number)
        return self.spans[number]


def facts(span: Any) -> dict[str, Any]:
    """The attributes of a span as Python values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def free_port() -> int:
    """A port that was free a moment ago; the system hands it to nobody else soon."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def traced(*flags: str, workers: Any = ()) -> AsyncIterator[tuple[Gateway, Collected]]:
    """A gateway that sends its spans to a collector, which outlives it."""
    async with fake_worker(name="collector") as collector:
        collector.play = answers(200, body=b"", type="application/x-protobuf")
        trace = ["--enable-trace", "--otlp-traces-endpoint", collector.url]
        async with running_gateway(*trace, *flags, workers=workers) as gateway:
            yield gateway, Collected(collector)


async def test_trc_1_the_span_is_a_child_of_the_inbound_parent_and_the_parent_of_the_workers_spans():
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):
        answer = await gateway.ask(CHAT, HELLO, SAMPLED, "tracestate: a=1", "tracestate: b=2")
        turn = await worker.next_turn()
        span = await collected.span()
    assert span.name == "http_request"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert turn.header("traceparent") == f"00-{TRACE}-{span.span_id.hex()}-01".encode()
    assert turn.header("tracestate") == b"a=1,b=2"
    assert span.end_time_unix_nano > span.start_time_unix_nano > 0
    assert facts(span) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "smg.request_id": answer["x-request-id"],
        "smg.model": "m",
        "smg.worker": worker.url,
        "smg.attempts": 1,
        "smg.streaming": False,
    }


@pytest.mark.parametrize("inbound", [(), ("traceparent: 00-junk-01-01", "tracestate: a=1")])
async def test_trc_1_without_a_valid_parent_a_new_trace_begins(inbound):
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):
        await gateway.ask(CHAT, HELLO, *inbound)
        turn = await worker.next_turn()
        span = await collected.span()
    assert not span.parent_span_id
    assert turn.header("traceparent") == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01".encode()
    assert turn.header("tracestate") is None


async def test_trc_1_requests_of_one_connection_have_spans_of_their_own():
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):
        client = await gateway.connect()
        for _ in range(3):
            await client.ask(CHAT, HELLO)
        parents = [(await worker.next_turn()).header("traceparent") for _ in range(3)]
        await collected.span(2)
        ids = [span.span_id.hex() for span in collected.spans]
    assert len(set(ids)) == 3
    assert [parent.decode().split("-")[2] for parent in parents] == ids


async def test_trc_1_a_parent_that_is_not_sampled_passes_through_and_has_no_span():
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):
        await gateway.ask(CHAT, HELLO, UNSAMPLED, "tracestate: a=1")
        turn = await worker.next_turn()
        await gateway.ask(CHAT, HELLO, SAMPLED)
        span = await collected.span()
        assert span.parent_span_id.hex() == PARENT and len(collected.spans) == 1
    assert turn.header("traceparent") == UNSAMPLED.partition(": ")[2].encode()
    assert turn.header("tracestate") == b"a=1"


async def test_trc_1_off_inbound_headers_pass_through():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        await gateway.ask(CHAT, HELLO, SAMPLED, "tracestate: a=1")
        turn = await worker.next_turn()
    assert turn.header("traceparent") == SAMPLED.partition(": ")[2].encode()
    assert turn.header("tracestate") == b"a=1"


async def test_trc_1_a_stream_has_one_span_that_ends_with_it():
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):
        worker.play = streams(event({"a": 1}))
        await gateway.ask(CHAT, STREAM)
        assert facts(await collected.span())["smg.streaming"] is True


async def test_trc_1_attempts_are_counted_and_the_worker_is_the_one_that_answered():
    async with (
        fake_workers(2, "m") as workers,
        traced("--policy", "passthrough", workers=workers) as (gateway, collected),
    ):
        workers[0].play = resets
        answer = await gateway.ask(CHAT, HELLO)
        told = facts(await collected.span())
    assert answer.worker == workers[1].id
    assert (told["smg.attempts"], told["smg.worker"]) == (2, workers[1].url)


@pytest.mark.parametrize(
    ("ask", "status", "code", "route"),
    [
        (request(CHAT, {**HELLO, "model": "x"}), 404, "model_not_found", CHAT),
        (request(CHAT, body=b"{"), 400, "invalid_json", CHAT),
        (request("/nowhere/else?key=secret"), 404, "unknown_url", "other"),
        (request("/v1/models/m"), 200, None, "/v1/models/{id...}"),
        (request("/health"), 200, None, "/health"),
        (request(CHAT, HELLO, method="PATCH"), 405, "method_not_allowed", CHAT),
    ],
)
async def test_trc_1_every_answer_ends_its_span(ask, status, code, route):
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):
        client = await gateway.connect()
        await client.send(ask)
        answer = await client.read()
        span = await collected.span()
        told = facts(span)
    assert answer.status == told["http.response.status_code"] == status
    assert (told.get("error.type"), told["http.route"]) == (code, route)
    assert told["http.request.method"] == ask.split()[0].decode()
    assert told["smg.request_id"] == answer["x-request-id"]
    assert span.status.code == 0
    assert "secret" not in str(span)


async def test_trc_1_a_worker_that_cannot_be_used_makes_the_span_an_error():
    async with (
        fake_worker("m") as worker,
        traced("--disable-retries", workers=[worker]) as (gateway, collected),
    ):
        worker.play = resets
        assert (await gateway.ask(CHAT, HELLO)).status == 502
        span = await collected.span()
    assert span.status.code == 2
    assert facts(span)["error.type"] == "call_upstream_response_failed"


@pytest.mark.parametrize("is_begun", [False, True])
async def test_trc_1_a_client_that_leaves_ends_the_span(is_begun):
    async with fake_worker("m") as worker, traced(workers=[worker]) as (gateway, collected):

        async def begin(turn):
            await turn.send(SSE_HEAD, chunk(event({"a": 1})))
            await turn.wait_gone()

        worker.play = begin if is_begun else hangs
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await worker.next_turn()
        if is_begun:
            await client.read_head()
        client.reset()
        span = await collected.span()
    told = facts(span)
    assert (told["error.type"], told["http.response.status_code"]) == (
        "client_gone",
        200 if is_begun else 499,
    )
    assert span.status.code == 0


async def test_trc_1_both_workers_of_a_pair_are_children_of_one_span():
    async with fake_workers(2, "m") as [prefill, decode]:
        flags = ["--pd-disaggregation", "--prefill", prefill.url, "none", "--decode", decode.url]
        async with traced(*flags) as (gateway, collected):
            await eventually(lambda: gateway.ready_count == 2)
            assert (await gateway.ask(CHAT, HELLO)).status == 200
            told = facts(span := await collected.span())
            parents = [(await worker.next_turn()).header("traceparent") for worker in (prefill, decode)]
    assert parents == [f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01".encode()] * 2
    assert (told["smg.worker"], told["smg.attempts"]) == (decode.url, 1)


async def test_trc_1_a_collector_that_is_away_costs_no_request():
    async with fake_worker("m") as worker:
        flags = ["--enable-trace", "--otlp-traces-endpoint", "127.0.0.1:9"]
        async with running_gateway(*flags, workers=[worker]) as gateway:
            for _ in range(5):
                assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_trc_1_the_last_spans_are_sent_when_the_process_is_told_to_stop(tmp_path):
    async with fake_worker(name="collector") as collector, fake_worker("m") as worker:
        collector.play = answers(200, body=b"", type="application/x-protobuf")
        collected = Collected(collector)
        log = tmp_path / "log"
        command = [sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(free_port())]
        command += ["--prometheus-port", str(free_port()), "--worker-urls", worker.url, "--enable-trace"]
        command += ["--otlp-traces-endpoint", collector.url, "--shutdown-grace-period-secs", "1"]
        with log.open("wb") as errors:
            process = await trio.lowlevel.open_process(command, stderr=errors, env=dict(os.environ))
        try:
            with trio.fail_after(20):
                while "listening on http://" not in (text := log.read_text()):
                    await trio.sleep(0.02)
                port = int(text.partition("listening on http://127.0.0.1:")[2].split()[0])
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                answer = b""
                while b"200 OK" not in answer:  # the worker is ready within a moment
                    await stream.send_all(request(CHAT, HELLO))
                    answer = await stream.receive_some()
                    await trio.sleep(0.02)
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
        assert facts(collected.spans[-1])["http.response.status_code"] == 200


async def test_a_wrong_endpoint_is_refused_before_anything_starts():
    settings = parse(["--enable-trace", "--otlp-traces-endpoint", "ftp://host"], {})
    with pytest.raises(SettingsError) as caught:
        Node(settings, Readiness(), Random(1))
    assert caught.value.flag == "--otlp-traces-endpoint"
