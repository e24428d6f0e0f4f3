"""Specifications of workers as people write them: read, checked, merged.

Owns the rules of WRK-7 (what is refused), WRK-11 (what PATCH changes) and WRK-12 (what PUT replaces), so that the
worker API, discovery files and flags agree on them. Values in, values out; errors are `GatewayError` 400
`BAD_REQUEST` whose text names the member and never shows a key (WRK-14). It knows no registry and adds nobody.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import msgspec

from smg.errors import GatewayError
from smg.fleet.worker import Engine, HealthOverrides, Kind, Worker, WorkerSpec, normalised_url

PRIORITY_MAX = 1000
"""Highest priority; the range of the existing system."""
COST_MAX = 1e6
"""Highest cost; a factor beyond this means a typing error, not a slow worker."""

_KINDS = frozenset(kind.value for kind in Kind)
_ENGINES = frozenset(engine.value for engine in Engine)
_NO_ENGINE = frozenset({"", "auto", "unspecified"})
_MEMBERS = frozenset(WorkerSpec.__struct_fields__)
_ALSO_ACCEPTED = frozenset({"connection_mode", "id", "is_healthy", "status", "load", "job_status"})
"""Members of `GET /workers/{id}` that may come back in a POST or PUT and mean nothing there."""


_S = TypeVar("_S", bound=msgspec.Struct)


class _Patch(msgspec.Struct, frozen=True):
    """What PATCH may change (WRK-11); other members are ignored."""

    priority: int | msgspec.UnsetType = msgspec.UNSET
    cost: float | msgspec.UnsetType = msgspec.UNSET
    labels: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    api_key: str | msgspec.UnsetType | None = msgspec.UNSET
    health: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


def spec_of(document: Any) -> WorkerSpec:
    """The checked specification in a decoded JSON document. Raises `GatewayError` 400 `BAD_REQUEST` (WRK-7)."""
    if not isinstance(document, dict):
        raise _bad("a worker is a JSON object with the member url", None)
    if not isinstance(document.get("url"), str):
        raise _bad("url is missing; give http://host:port", "url")
    mode = document.get("connection_mode")
    if mode not in (None, "http"):
        raise _bad(f"connection_mode {mode!r} is not supported by this release", "connection_mode")
    return checked(_converted(document, WorkerSpec))


def unknown_members(document: dict[str, Any]) -> list[str]:
    """Members that no rule reads: ignored, but worth a line in a log since they are often typing errors."""
    return sorted(str(member)[:64] for member in document if member not in _MEMBERS | _ALSO_ACCEPTED)


def checked(spec: WorkerSpec) -> WorkerSpec:
    """The specification with its URL normalised and its engine resolved. Raises `GatewayError` 400 `BAD_REQUEST`."""
    url, rank = normalised_url(spec.url)
    if spec.worker_type not in _KINDS:
        raise _bad(f"worker_type must be one of {', '.join(sorted(_KINDS))}", "worker_type")
    runtime = (spec.runtime_type or "").lower()
    if runtime not in _NO_ENGINE and runtime not in _ENGINES:
        raise _bad(f"runtime_type must be one of {', '.join(sorted(_ENGINES))}", "runtime_type")
    if not 0 <= spec.priority <= PRIORITY_MAX:
        raise _bad(f"priority must be between 0 and {PRIORITY_MAX}", "priority")
    if not (math.isfinite(spec.cost) and 0 < spec.cost <= COST_MAX):
        raise _bad("cost must be greater than 0", "cost")
    if spec.bootstrap_port is not None and not 1 <= spec.bootstrap_port <= 65535:
        raise _bad("bootstrap_port must be between 1 and 65535", "bootstrap_port")
    key = spec.api_key
    if key is not None and (
        not key or not key.isascii() or any(char < " " or char == "\x7f" for char in key)
    ):
        raise _bad("api_key must be printable ASCII text", "api_key")
    if spec.max_connections is not None and spec.max_connections < 1:
        raise _bad("max_connections must be at least 1", "max_connections")
    if rank is None:
        rank = spec.dp_rank
    if rank is not None and not 0 <= rank < (spec.dp_size or 2**16):
        raise _bad("dp_rank must be at least 0 and below dp_size", "dp_rank")
    _check_overrides(spec)
    return msgspec.structs.replace(
        spec,
        url=url if rank is None else f"{url}@{rank}",
        dp_rank=rank,
        runtime_type=None if runtime in _NO_ENGINE else runtime,
    )


def patched(spec: WorkerSpec, document: Any) -> WorkerSpec:
    """What PATCH makes of a specification (WRK-11): labels are merged, `health` changes member by member.

    Raises `GatewayError` 400 `BAD_REQUEST`; then nothing of the patch counts.
    """
    if not isinstance(document, dict):
        raise _bad("a patch is a JSON object", None)
    patch = _converted(document, _Patch)
    changes: dict[str, Any] = {
        member: value
        for member in ("priority", "cost", "api_key")
        if (value := getattr(patch, member)) is not msgspec.UNSET
    }
    if patch.labels is not msgspec.UNSET:
        changes["labels"] = {**spec.labels, **patch.labels}
    if patch.health is not msgspec.UNSET:
        known = {
            member: value
            for member, value in patch.health.items()
            if member in HealthOverrides.__struct_fields__
        }
        before = msgspec.structs.asdict(spec.health)
        changes["health"] = _converted({**before, **known}, HealthOverrides, "health")
    return checked(msgspec.structs.replace(spec, **changes))


def replaced(worker: Worker, document: Any) -> WorkerSpec:
    """What PUT makes of a worker's specification (WRK-12): the new one, defaults where it tells nothing.

    A rank of a data-parallel worker may be named by its own URL or by its base URL and stays this rank. Raises
    `GatewayError` 400 `BAD_REQUEST`, `URL mismatch...` for another URL.
    """
    spec = spec_of(document)
    if spec.url not in (worker.url, worker.base_url):
        raise _bad(f"URL mismatch: the worker has URL {worker.url}, not {spec.url}", "url")
    rank = worker.spec.dp_rank
    if rank is None:
        return spec
    return msgspec.structs.replace(spec, url=worker.url, dp_rank=rank, dp_size=worker.spec.dp_size)


def _check_overrides(spec: WorkerSpec) -> None:
    health, resilience = spec.health, spec.resilience
    positive: dict[str, float | None] = {
        "health.check_interval_secs": health.check_interval_secs,
        "health.timeout_secs": health.timeout_secs,
        "health.failure_threshold": health.failure_threshold,
        "health.success_threshold": health.success_threshold,
        "resilience.cb_failure_threshold": resilience.cb_failure_threshold,
        "resilience.cb_success_threshold": resilience.cb_success_threshold,
        "resilience.cb_timeout_duration_secs": resilience.cb_timeout_duration_secs,
    }
    for member, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise _bad(f"{member} must be greater than 0", member)
    path = health.health_check_endpoint
    if path is not None and (
        not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path
    ):
        raise _bad("health.health_check_endpoint must be a path", "health.health_check_endpoint")
    for status in resilience.retryable_status_codes or ():
        if not 100 <= status <= 599:
            raise _bad(
                "resilience.retryable_status_codes must be HTTP statuses", "resilience.retryable_status_codes"
            )


def _converted(document: Any, kind: type[_S], where: str = "") -> _S:
    """`document` as `kind`; the error names the member, never its value."""
    try:
        return msgspec.convert(document, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        # "Expected `int`, got `str` - at `$.priority`": types and a path, never a value.
        text, _, path = str(error).partition(" - at `$")
        member = (where + path.rstrip("`")).lstrip(".") or None
        raise _bad(f"{member}: {text}" if member else text, member) from None


def _bad(message: str, param: str | None) -> GatewayError:
    return GatewayError(400, "BAD_REQUEST", message, param=param)
