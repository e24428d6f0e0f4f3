"""Spans on their way to a real HTTP collector on a loopback socket."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Iterator
from random import Random

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from smg.errors import SettingsError
from smg.telemetry.metrics import Metrics
from smg.telemetry.otlp import OtlpSender, traces_url
from smg.telemetry.trace import Tracer

INBOUND = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP as a collector does, or answers `status`."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, ExportTraceServiceRequest]] = []
        self.status = 200
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        request = ExportTraceServiceRequest.FromString(body)
        self.server.requests.append((self.path, self.headers["content-type"], request))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


async def test_a_span_arrives_with_ids_times_attributes_and_status(collector: Collector) -> None:
    sender = OtlpSender(collector.address, "1.2.3")
    ticks = iter((1_000, 5_000, 2_000, 9_000))
    metrics = Metrics()
    tracer = Tracer(metrics, sender, Random(7), clock_ns=lambda: next(ticks))
    child = tracer.start(INBOUND, b"vendor=1")
    assert child is not None
    child.set("http.response.status_code", 502)
    child.set("smg.model", "m")
    child.set("smg.streaming", False)
    child.end(is_error=True)
    root = tracer.start(None, None)
    assert root is not None
    root.end()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tracer.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()  # the last spans go out at shutdown
    sender.close()

    [(path, content_type, request)] = collector.requests
    assert (path, content_type) == ("/v1/traces", "application/x-protobuf")
    [resource_spans] = request.resource_spans
    resource = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("smg", "1.2.3")
    [scope_spans] = resource_spans.scope_spans
    first, second = scope_spans.spans
    assert first.name == second.name == "http_request"
    assert first.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert first.parent_span_id.hex() == "b7ad6b7169203331"
    assert first.span_id.hex() == child.span_id
    assert first.trace_state == "vendor=1"
    assert (first.start_time_unix_nano, first.end_time_unix_nano) == (1_000, 5_000)
    assert first.kind == first.SPAN_KIND_SERVER
    assert first.status.code == first.status.STATUS_CODE_ERROR
    attributes = {item.key: item.value for item in first.attributes}
    assert attributes["http.response.status_code"].int_value == 502
    assert attributes["smg.model"].string_value == "m"
    assert attributes["smg.streaming"].WhichOneof("value") == "bool_value"
    assert second.trace_id.hex() == root.trace_id
    assert second.parent_span_id == b""
    assert second.status.code == second.status.STATUS_CODE_UNSET
    assert metrics.counter("smg_telemetry_spans_total", result="exported").value == 2


def test_an_answer_that_is_no_success_is_a_failure(collector: Collector) -> None:
    collector.status = 400
    sender = OtlpSender(f"http://{collector.address}/custom/path", "1")
    tracer = Tracer(Metrics(), sender, Random(7))
    span = tracer.start(None, None)
    assert span is not None
    span.end()
    assert sender([span]) is False
    assert collector.requests[0][0] == "/custom/path"
    collector.status = 200
    assert sender([span]) is True
    sender.close()


def test_whatever_the_library_raises_costs_the_spans_only(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = OtlpSender(collector.address, "1")

    def fail(spans: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(sender._exporter, "export", fail)
    assert sender([]) is False
    sender.close()


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"--enable-trace.*smg-mesh\[otel\]"):
        OtlpSender("localhost:4317", "1")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("localhost:4317", "http://localhost:4318/v1/traces"),
        ("collector", "http://collector:4318/v1/traces"),
        ("collector:4318", "http://collector:4318/v1/traces"),
        ("collector:8080", "http://collector:8080/v1/traces"),
        ("[::1]:4317", "http://[::1]:4318/v1/traces"),
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("http://collector:4317", "http://collector:4317/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
    ],
)
def test_the_endpoint_becomes_a_url(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        ":4317",
        "grpc://collector:4317",
        "http://",
        "host:port",
        "host:99999",
        "host:1/path",
        "a b:1",
        "[::1",
    ],
)
def test_an_endpoint_that_cannot_work_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="--otlp-traces-endpoint"):
        traces_url(endpoint)
