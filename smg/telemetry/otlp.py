"""Spans to an OpenTelemetry collector, by OTLP over HTTP with protobuf bodies.

This room owns the foreign exporter: it is imported here and only when `--enable-trace` asks for it (the extra
`otel`). It runs in the thread that `Tracer.run` gives it and must never be called on the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from smg.errors import SettingsError
from smg.telemetry import log as log_room
from smg.telemetry.trace import Span

TRACES_PATH = "/v1/traces"
GRPC_PORT = 4317
HTTP_PORT = 4318

TIMEOUT_S = 10.0
"""Per batch, retries of the exporter among it."""

_FLAG = "--otlp-traces-endpoint"

_log = log_room.logger("smg.telemetry.otlp")


def traces_url(endpoint: str) -> str:
    """The URL that spans are posted to.

    An http or https URL is taken as it is, with `/v1/traces` added when it has no path. `host` and `host:port` mean
    OTLP over HTTP on that host; port 4317, where collectors speak gRPC, becomes 4318, where the same collectors
    speak HTTP. Raises SettingsError for anything else.
    """
    has_scheme = "://" in endpoint
    try:
        parts = urlsplit(endpoint if has_scheme else f"http://{endpoint}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError(_FLAG, endpoint, str(error)) from error
    if parts.scheme not in ("http", "https"):
        raise SettingsError(_FLAG, endpoint, "only http:// and https:// URLs and host:port are supported")
    if not host or any(letter.isspace() for letter in endpoint):
        raise SettingsError(_FLAG, endpoint, "no host")
    if has_scheme:
        return endpoint if parts.path not in ("", "/") else parts._replace(path=TRACES_PATH).geturl()
    if parts.path not in ("", "/") or parts.query or parts.username is not None:
        raise SettingsError(_FLAG, endpoint, "host:port has no path; write http:// for a URL")
    if port is None or port == GRPC_PORT:
        port = HTTP_PORT
    return f"http://[{host}]:{port}{TRACES_PATH}" if ":" in host else f"http://{host}:{port}{TRACES_PATH}"


class OtlpSender:
    """A `Send` over the exporter of opentelemetry-sdk; `close` it when the tracer has ended.

    Raises SettingsError when the extra is not installed or the endpoint is wrong. Further headers and TLS files are
    taken from the exporter's environment (`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`).
    """

    def __init__(self, endpoint: str, version: str) -> None:
        self.url = traces_url(endpoint)
        try:
            # Here and not at the top: without the extra the rest of smg works, and the import takes 0.1 s.
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import ReadableSpan
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
            from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
        except ImportError as error:
            raise SettingsError(
                "--enable-trace",
                "",
                "needs the extra otel: pip install 'smg-mesh[otel]'",
                is_combination=True,
            ) from error
        # The tracer tells once that a collector is down; the library would tell with each try.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(endpoint=self.url, timeout=TIMEOUT_S)
        resource = Resource.create({"service.name": "smg", "service.version": version})
        scope = InstrumentationScope("smg", version)
        flags = TraceFlags(TraceFlags.SAMPLED)
        plain, failed = Status(StatusCode.UNSET), Status(StatusCode.ERROR)

        def readable(span: Span) -> ReadableSpan:
            trace_id = int(span.trace_id, 16)
            state = TraceState.from_header([span.tracestate.decode("latin-1")]) if span.tracestate else None
            parent = None
            if span.parent_id:
                parent = SpanContext(trace_id, int(span.parent_id, 16), True, flags, state)
            return ReadableSpan(
                name=span.name,
                context=SpanContext(trace_id, int(span.span_id, 16), False, flags, state),
                parent=parent,
                resource=resource,
                attributes=span.attributes,
                kind=SpanKind.SERVER,
                status=failed if span.is_error else plain,
                start_time=span.start_ns,
                end_time=span.end_ns,
                instrumentation_scope=scope,
            )

        self._readable = readable

    def __call__(self, spans: Sequence[Span]) -> bool:
        """Post one batch; blocks for at most `TIMEOUT_S`. False when it was not taken."""
        try:
            result = self._exporter.export([self._readable(span) for span in spans])
        except Exception as error:
            # The library's room ends here: whatever it raises costs these spans, never the node.
            _log.exception("the span exporter failed", error=error)
            return False
        return bool(result.name == "SUCCESS")

    def close(self) -> None:
        """Close the exporter's connections."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the library's own annotation is missing
