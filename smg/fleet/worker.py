"""A worker: one inference endpoint we may send to.

Owns the words (kind, status, specification) and the one mutable record per worker that policies read. Only
`fleet/registry.py` changes status and specification, only `fleet/load.py` changes load; policies read and never
write. Nothing here decides anything.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, uuid5

import msgspec

from smg.errors import GatewayError

if TYPE_CHECKING:
    from smg.fleet.breaker import Breaker
    from smg.fleet.health import Health


class Kind(enum.Enum):
    """What a worker computes (contract: `worker_type`)."""

    REGULAR = "regular"
    PREFILL = "prefill"
    DECODE = "decode"


class Status(enum.Enum):
    """Life of a worker (WRK-15). Only `READY` workers are candidates."""

    PENDING = "pending"
    READY = "ready"
    NOT_READY = "not_ready"
    FAILED = "failed"
    DRAINING = "draining"


class Engine(enum.Enum):
    """The software in a worker (contract: `runtime_type`, WRK-4)."""

    SGLANG = "sglang"
    VLLM = "vllm"
    TRTLLM = "trtllm"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GENERIC = "generic"


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that a worker serves: canonical `id` and its aliases (MOD-4)."""

    id: str
    aliases: tuple[str, ...] = ()


class HealthOverrides(msgspec.Struct, frozen=True, omit_defaults=True):
    """Health settings of one worker; None means the gateway's own setting."""

    disable_health_check: bool | None = None
    check_interval_secs: float | None = None
    timeout_secs: float | None = None
    failure_threshold: int | None = None
    success_threshold: int | None = None
    health_check_endpoint: str | None = None


class ResilienceOverrides(msgspec.Struct, frozen=True, omit_defaults=True):
    """Retry and breaker settings of one worker; None means the gateway's own setting (CB-1)."""

    retryable_status_codes: tuple[int, ...] | None = None
    disable_circuit_breaker: bool | None = None
    cb_failure_threshold: int | None = None
    cb_success_threshold: int | None = None
    cb_timeout_duration_secs: float | None = None


class WorkerSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What somebody told us about a worker: a flag, the worker API or a discovery source (contract section 10).

    `priority` 0..1000 (default 50), `cost` > 0 (default 1.0; 2.0 = gets half, WRK-16). `api_key` never appears in an
    answer or a log (WRK-14). `dp_rank`/`dp_size` are set on the ranks of a data-parallel worker (WRK-17).
    """

    url: str
    model_id: str | None = None
    models: tuple[ModelCard, ...] = ()
    worker_type: str = "regular"
    runtime_type: str | None = None
    labels: dict[str, str] = {}
    priority: int = 50
    cost: float = 1.0
    api_key: str | None = None
    bootstrap_port: int | None = None
    dp_rank: int | None = None
    dp_size: int | None = None
    max_connections: int | None = None
    health: HealthOverrides = HealthOverrides()
    resilience: ResilienceOverrides = ResilienceOverrides()


class LoadReport(msgspec.Struct, frozen=True):
    """What an engine said of its own load.

    `at_s` is our monotonic clock when the answer came. Counts are requests; `waiting_tokens` are prompt tokens not
    yet prefilled, None when the engine tells only counts. `kv_usage` is 0..1. `kv_capacity_tokens` is the size of
    the KV cache. `throughput_tps` are tokens per second.
    """

    at_s: float
    running: int = 0
    waiting: int = 0
    waiting_tokens: int | None = None
    running_tokens: int | None = None
    kv_usage: float | None = None
    kv_capacity_tokens: int | None = None
    throughput_tps: float | None = None
    cache_hit_rate: float | None = None


class Worker:
    """One worker as the gateway knows it; the record that policies, dispatch, probes and metrics share.

    `models` are the canonical names it serves, empty when it told none (MOD-3); `cards` the same with aliases. `in_flight` are requests from the
    choice of the worker until its answer's last byte is with the client (RT-3); `chars_in_flight` their routing
    characters (0 where no policy asked for text). `sent_since_report` counts requests placed since `report` came, which
    counts until `report_until_s` (`fleet/load.py`). `is_overloaded` tells that the report was over the
    `--worker-overload-*` limits; it means nothing once the report is too old. `order` is the rank of registration.
    `peers_in_flight` are the requests that other nodes of a mesh have in flight here, as far as heard; `peers_at_report`
    those of them that `report` has counted.
    """

    __slots__ = (
        "base_url",
        "breaker",
        "cards",
        "chars_in_flight",
        "chars_since_report",
        "engine",
        "health",
        "host",
        "host_header",
        "id",
        "in_flight",
        "is_overloaded",
        "is_tls",
        "kind",
        "message",
        "models",
        "order",
        "peers_at_report",
        "peers_in_flight",
        "port",
        "report",
        "report_until_s",
        "sent_since_report",
        "spec",
        "status",
        "url",
    )

    def __init__(
        self, spec: WorkerSpec, order: int, health: Health, breaker: Breaker, kind: Kind | None = None
    ) -> None:
        url, rank = normalised_url(spec.url)
        if spec.dp_rank is not None:
            rank = spec.dp_rank
        self.spec = spec
        self.base_url = url
        self.url = url if rank is None else f"{url}@{rank}"
        self.id = worker_id(self.url)
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.is_tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self.host_header = parts.netloc.rpartition("@")[2].encode("ascii")
        self.order = order
        self.kind = kind or Kind(spec.worker_type)
        self.engine: Engine | None = Engine(spec.runtime_type) if spec.runtime_type else None
        self.cards: tuple[ModelCard, ...] = ()
        self.models: tuple[str, ...] = ()
        self.status = Status.PENDING
        self.message = ""
        self.health = health
        self.breaker = breaker
        self.in_flight = 0
        self.chars_in_flight = 0
        self.peers_in_flight = 0
        self.peers_at_report = 0
        self.sent_since_report = 0
        self.chars_since_report = 0
        self.report: LoadReport | None = None
        self.report_until_s = 0.0
        self.is_overloaded = False

    def __repr__(self) -> str:
        return f"<Worker {self.url} {self.status.value} in_flight={self.in_flight}>"


def normalised_url(url: str) -> tuple[str, int | None]:
    """Splits `scheme://Host:port/path/@rank` into a comparable base URL and the data-parallel rank (WRK-7).

    Scheme and host are lower-cased, a last `/` is dropped. Raises `GatewayError` 400 `BAD_REQUEST` for an empty or
    schemeless URL, a scheme that is not served, or a port that is none.
    """
    text = url.strip()
    rank: int | None = None
    head, at, tail = text.rpartition("@")
    if at and tail.isascii() and tail.isdigit() and "://" in head:
        text, rank = head, int(tail)
    if not text:
        raise GatewayError(400, "BAD_REQUEST", "url is empty; give http://host:port", param="url")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise GatewayError(400, "BAD_REQUEST", f"url is not valid: {error}", param="url") from None
    scheme = parts.scheme.lower()
    if "://" not in text:
        raise GatewayError(400, "BAD_REQUEST", "url has no scheme; give http://host:port", param="url")
    if scheme in ("grpc", "grpcs", "ipc"):
        raise GatewayError(
            400, "BAD_REQUEST", f"{scheme}:// workers are not supported by this release", param="url"
        )
    if scheme not in ("http", "https"):
        raise GatewayError(400, "BAD_REQUEST", f"url scheme {scheme!r} is not http or https", param="url")
    host = parts.hostname
    if not host or not host.isascii() or any(char <= " " for char in text):
        raise GatewayError(400, "BAD_REQUEST", "url has no valid host", param="url")
    if parts.username is not None or parts.query or parts.fragment:
        raise GatewayError(400, "BAD_REQUEST", "url may have no user, query or fragment", param="url")
    if port == 0:
        raise GatewayError(400, "BAD_REQUEST", "url has port 0", param="url")
    shown = f"[{host}]" if ":" in host else host
    where = shown if port is None else f"{shown}:{port}"
    return f"{scheme}://{where}{parts.path.rstrip('/')}", rank


def worker_id(url: str) -> str:
    """The id of a worker: UUIDv5 of its normalised URL with its `@rank`, equal on every node (WRK-6)."""
    return str(uuid5(NAMESPACE_URL, url))
