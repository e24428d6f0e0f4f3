"""Every setting of the gateway, declared once: name, type, default, unit, bounds, and why the default is what it is.

Owns the frozen structs, one per group, that the composition root reads, and the facts that follow from several settings at
once. Flags, environment names, `--help` and `docs/reference/settings.md` are derived from the annotations here and never
repeat them. It must never read a file, a variable or a clock, and knows no other room. A field has exactly the name of its
flag (`--retry-max-retries` is `settings.retries.retry_max_retries`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from smg.settings_access import Auth, Tls
from smg.settings_flag import (
    Field,
    Flag,
    Group,
    Prefill,
    declared_fields,
    header_name,
    listen_host,
    model_alias,
    origin,
    worker_url,
)
from smg.settings_mesh import Mesh
from smg.settings_traffic import Breaker, Health, Limits, LoadPolls, Retries, Routing

__all__ = [
    "FIELDS",
    "GROUPS",
    "Auth",
    "Breaker",
    "Discovery",
    "Health",
    "Limits",
    "Listening",
    "LoadPolls",
    "Mesh",
    "Prefill",
    "PrefillDecode",
    "Retries",
    "Routing",
    "Settings",
    "Telemetry",
    "Tls",
    "Workers",
]


class Listening(Group, frozen=True, kw_only=True):
    """Listening: the serving port, its limits and its end."""

    host: Annotated[
        str,
        Flag(
            form=listen_host,
            doc="Address to serve on. All interfaces, since clients are on other hosts (CLI-4).",
        ),
    ] = "0.0.0.0"
    port: Annotated[int, Flag(at_least=1, at_most=65535, doc="Port to serve on (CLI-4).")] = 30000
    health_check_port: Annotated[
        int | None,
        Flag(
            at_least=1,
            at_most=65535,
            shown_default="off",
            doc="Port of a second listener with the three probes only (LIFE-4), for networks where the serving port is closed to "
            "the prober.",
        ),
    ] = None
    processes: Annotated[
        int,
        Flag(
            unit="processes",
            at_least=1,
            at_most=256,
            doc="Processes that serve the port together, each a member of the mesh: one per core is good. --node-name gets a "
            "number, --mesh-port counts upwards; without --ha-mesh they are a mesh of their own on the loopback.",
        ),
    ] = 1
    max_payload_size: Annotated[
        int,
        Flag(
            unit="bytes",
            above=0,
            doc="Largest request body (HTTP-8). Half a GiB leaves room for images and audio.",
        ),
    ] = 536_870_912
    max_buffered_request_bytes: Annotated[
        int,
        Flag(
            unit="bytes",
            at_least=0,
            doc="A body that the gateway need not read may be held up to this size, so that it can be sent again to another "
            "worker; a longer one is passed on as it comes. 1 MiB is a prompt of some 200,000 tokens. 0: never held.",
        ),
    ] = 1_048_576
    header_read_timeout_secs: Annotated[
        float,
        Flag(unit="seconds", above=0, doc="A request head must be complete within this time (HTTP-7)."),
    ] = 30.0
    idle_connection_timeout_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="A kept connection without a request is closed after this time (HTTP-7). Longer than the 60 s of usual load "
            "balancers, so that they close first and never send into a closing connection.",
        ),
    ] = 90.0
    stream_body_stall_timeout_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="A request body of which nothing comes is given up after this time. Minutes, since phones lose their network.",
        ),
    ] = 300.0
    cors_allowed_origins: Annotated[
        tuple[str, ...],
        Flag(
            form=origin,
            metavar="ORIGIN",
            doc="Browser pages of these origins may call the gateway; * allows all (SEC-9). None, since most callers are "
            "servers.",
        ),
    ] = ()
    shutdown_grace_period_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            at_least=0,
            doc="After SIGTERM requests in flight have this long to end (LIFE-5). Long answers take minutes; nothing in "
            "flight, no waiting.",
        ),
    ] = 180.0


class Workers(Group, frozen=True, kw_only=True):
    """Workers: who they are and how they are met."""

    worker_urls: Annotated[
        tuple[str, ...],
        Flag(
            form=worker_url,
            metavar="URL",
            doc="Workers known from the start. More can come at any time (CLI-2).",
        ),
    ] = ()
    worker_api_key: Annotated[
        str | None,
        Flag(
            is_secret=True,
            metavar="KEY",
            doc="Credential sent to workers given by flag or discovery (FLG-4). The gateway's own key never leaves it.",
        ),
    ] = None
    worker_startup_timeout_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="A worker that is not ready after this time counts as failed, and is still probed (WRK-3). Large models load "
            "for many minutes.",
        ),
    ] = 1800.0
    worker_startup_delay: Annotated[
        float,
        Flag(unit="seconds", at_least=0, doc="Wait before the first probe of a worker."),
    ] = 0.0
    worker_startup_check_interval: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="Longest pause between two probes of a worker that is not up yet (WRK-2).",
        ),
    ] = 2.0
    model_alias: Annotated[
        tuple[str, ...],
        Flag(
            form=model_alias,
            metavar="ALIAS=MODEL",
            doc="Another name for a model, wherever clients name one; workers read the canonical name (MOD-4).",
        ),
    ] = ()
    backend: Annotated[
        str,
        Flag(
            aliases=("runtime",),
            choices=("auto", "sglang", "vllm", "trtllm", "openai", "anthropic", "generic"),
            doc="Engine of workers given by flag. auto asks each worker (WRK-4).",
        ),
    ] = "auto"
    enable_igw: Annotated[
        bool,
        Flag(doc="Accepted for existing start scripts; several models always work."),
    ] = False
    dp_aware: Annotated[
        bool,
        Flag(doc="Route to each data-parallel rank of a worker by itself (WRK-17)."),
    ] = False
    upstream_pool_idle_timeout_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="An idle connection to a worker is closed after this time. Below the 5 s after which common engines close "
            "theirs, so that no request is sent into a closing connection.",
        ),
    ] = 3.0
    drain_timeout_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            above=0,
            doc="A removed worker leaves when it is idle, at the latest after this time (WRK-13).",
        ),
    ] = 600.0

    def aliases(self) -> dict[str, str]:
        """Alias to canonical model name."""
        return dict(_alias_and_model(text) for text in self.model_alias)


class Telemetry(Group, frozen=True, kw_only=True):
    """Logs, metrics, traces: what operators see."""

    log_level: Annotated[
        str,
        Flag(
            choices=("debug", "info", "warn", "error"),
            synonyms=(("warning", "warn"), ("critical", "error")),
            doc="Lowest level that is logged.",
        ),
    ] = "info"
    log_dir: Annotated[
        str | None,
        Flag(metavar="DIR", doc="Log to a file in this directory too. stderr alone is what containers want."),
    ] = None
    log_json: Annotated[bool, Flag(doc="One JSON object per log line (LOG-1).")] = False
    prometheus_port: Annotated[
        int,
        Flag(
            at_least=1,
            at_most=65535,
            doc="Port of /metrics (CLI-4). Not the serving port, so that clients cannot read it.",
        ),
    ] = 29000
    prometheus_host: Annotated[
        str | None,
        Flag(
            form=listen_host,
            metavar="HOST",
            shown_default=":: with an IPv6 --host, else 0.0.0.0",
            doc="Address of the metrics listener. All interfaces, since scrapers are on other hosts (CLI-4).",
        ),
    ] = None
    prometheus_duration_buckets: Annotated[
        tuple[float, ...],
        Flag(
            unit="seconds",
            above=0,
            metavar="SECS",
            shown_default="1 ms to 7200 s",
            doc="Upper bounds of the duration histograms, rising.",
        ),
    ] = ()
    ui: Annotated[
        bool,
        Flag(
            off_flag="no-ui",
            doc="Show members, workers and recent decisions, live, at /ui of the metrics port. It holds no secret and costs nothing "
            "while nobody looks.",
        ),
    ] = True
    enable_trace: Annotated[
        bool, Flag(doc="Send OpenTelemetry spans (TRC-1). Off: nothing is measured for it.")
    ] = False
    otlp_traces_endpoint: Annotated[
        str,
        Flag(metavar="HOST:PORT", doc="Where spans go: host:port or an http(s) URL of an OTLP collector."),
    ] = "localhost:4317"
    request_id_headers: Annotated[
        tuple[str, ...],
        Flag(
            form=header_name,
            metavar="HEADER",
            doc="Headers that may carry the request id, first valid one wins (RID-1).",
        ),
    ] = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")
    sse_keepalive_secs: Annotated[
        float,
        Flag(
            unit="seconds",
            at_least=0,
            doc="A silent stream gets a comment line after this time, so that proxies keep it open (STR-4). 0: never.",
        ),
    ] = 15.0


class Discovery(Group, frozen=True, kw_only=True):
    """Discovery: workers that come and go by themselves."""

    service_discovery: Annotated[
        bool, Flag(doc="Find workers by discovery. Naming a file or provider does the same.")
    ] = False
    discovery_provider: Annotated[
        str | None,
        Flag(choices=("file",), later=("kubernetes",), shown_default="file", doc="Where workers are found."),
    ] = None
    discovery_file: Annotated[
        str | None,
        Flag(
            metavar="PATH",
            doc='File {"version":1,"workers":[{"url":...}]}, read again when it changes (WRK-18).',
        ),
    ] = None
    discovery_check_interval_secs: Annotated[
        float,
        Flag(unit="seconds", above=0, doc="A change of the file is seen within this time."),
    ] = 30.0

    def is_on(self) -> bool:
        """Whether workers are found by discovery."""
        return (
            self.service_discovery or self.discovery_provider is not None or self.discovery_file is not None
        )


class PrefillDecode(Group, frozen=True, kw_only=True):
    """PD: prefill and decode on different workers."""

    pd_disaggregation: Annotated[
        bool, Flag(doc="Send each request to a prefill and a decode worker (PD-1).")
    ] = False
    prefill: Annotated[
        tuple[Prefill, ...],
        Flag(metavar="URL [PORT]", doc="Prefill workers, each with its bootstrap port or the word none."),
    ] = ()
    decode: Annotated[
        tuple[str, ...],
        Flag(form=worker_url, metavar="URL", doc="Decode workers, each of which answers the client."),
    ] = ()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of one gateway node. Made by `smg.cli.flags.parse`; tests may build it directly."""

    listening: Listening = Listening()
    workers: Workers = Workers()
    routing: Routing = Routing()
    retries: Retries = Retries()
    breaker: Breaker = Breaker()
    health: Health = Health()
    load_polls: LoadPolls = LoadPolls()
    limits: Limits = Limits()
    auth: Auth = Auth()
    tls: Tls = Tls()
    telemetry: Telemetry = Telemetry()
    discovery: Discovery = Discovery()
    pd: PrefillDecode = PrefillDecode()
    mesh: Mesh = Mesh()

    def removes_unhealthy_workers(self) -> bool:
        """Whether a failed worker leaves the list (HLT-4): as told, else with discovery."""
        told = self.health.remove_unhealthy_workers
        return self.discovery.is_on() if told is None else told

    def metrics_host(self) -> str:
        """Address of the metrics listener: as told, else all interfaces of the serving address's family (CLI-4)."""
        return self.telemetry.prometheus_host or ("::" if ":" in self.listening.host else "0.0.0.0")


GROUPS: dict[str, type[Group]] = {
    "listening": Listening,
    "workers": Workers,
    "routing": Routing,
    "retries": Retries,
    "breaker": Breaker,
    "health": Health,
    "load_polls": LoadPolls,
    "limits": Limits,
    "auth": Auth,
    "tls": Tls,
    "telemetry": Telemetry,
    "discovery": Discovery,
    "pd": PrefillDecode,
    "mesh": Mesh,
}
"""Attribute of `Settings` to its struct, in the order of help and reference."""

FIELDS: tuple[Field, ...] = tuple(
    field for group, struct in GROUPS.items() for field in declared_fields(group, struct)
)
"""Every setting there is, in the order of help and reference."""


def _alias_and_model(text: str) -> tuple[str, str]:
    alias, _, model = text.partition("=")
    return alias, model
