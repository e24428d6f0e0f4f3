"""One worker, looked at from here: can it be connected to, is it healthy, what does it say it is.

Owns the probes of `smg doctor` for workers and the advice that belongs to each failure. It asks the same paths with the same
rules as a running gateway (WRK-1, WRK-4, WRK-5), but blocking, once, and in words for a person. It must never print a key.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec

from smg.fleet.recognition import (
    MODELS_PATH,
    SERVER_INFO_PATHS,
    VERSION_PATH,
    answered_models,
    dp_size,
    recognised_engine,
)
from smg.fleet.worker import Engine, WorkerSpec

ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""Longest answer of a worker that is read; model lists are a few KiB."""

_ANSWERS_WITHOUT_HEALTH = frozenset({401, 403, 404, 405, 501})
"""Status of a server that runs but has no health endpoint for us (WRK-1)."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the report: OK, WARN or FAIL, what was looked at, what was seen, and what to do about it."""

    status: str
    check: str
    seen: str
    fix: str = ""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as the configuration names it. `source` is the flag or file."""

    spec: WorkerSpec
    source: str


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found at one worker. `models` are the names it serves; None when it could not be asked."""

    url: str
    findings: tuple[Finding, ...]
    models: tuple[str, ...] | None = None


def examine(
    candidate: Candidate, health_path: str, timeout_s: float, context: ssl.SSLContext | None = None
) -> WorkerReport:
    """Look at one worker; blocks for at most a few times `timeout_s`. Raises nothing for what a worker may do.

    `context` is what the node would ask https workers with; None: the default one.
    """
    spec = candidate.spec
    connected = _connect(spec, timeout_s)
    findings = [connected]
    if connected.status == "FAIL":
        return WorkerReport(url=spec.url, findings=tuple(findings))
    findings.append(_health(spec, health_path, timeout_s, context))
    models, described = _description(spec, timeout_s, context)
    findings.append(described)
    if spec.worker_type == "prefill" and spec.bootstrap_port is not None:
        findings.append(_bootstrap(spec, timeout_s))
    return WorkerReport(url=spec.url, findings=tuple(findings), models=models)


def _connect(spec: WorkerSpec, timeout_s: float) -> Finding:
    check = f"{spec.url} connect"
    host, port = _address(spec.url)
    began = time.monotonic()
    try:
        with socket.create_connection((host, port), timeout_s):
            pass
    except OSError as wrong:
        seen, fix = _weather(wrong, host, port)
        return Finding("FAIL", check, seen, fix)
    return Finding("OK", check, f"accepts connections ({(time.monotonic() - began) * 1000:.0f} ms)")


def _health(spec: WorkerSpec, path: str, timeout_s: float, context: ssl.SSLContext | None) -> Finding:
    path = spec.health.health_check_endpoint or path
    check = f"{spec.url} health"
    try:
        status, _ = _get(spec, path, timeout_s, context)
    except (OSError, http.client.HTTPException) as wrong:
        host, port = _address(spec.url)
        seen, fix = _weather(wrong, host, port)
        return Finding("FAIL", check, f"GET {path}: {seen}", fix)
    if 200 <= status < 300:
        return Finding("OK", check, f"GET {path} answers {status}")
    if status in _ANSWERS_WITHOUT_HEALTH:
        fix = "" if status not in (401, 403) else "give its key with --worker-api-key"
        return Finding("OK", check, f"GET {path} answers {status}: counts as up", fix)
    return Finding(
        "FAIL",
        check,
        f"GET {path} answers {status}",
        "wait until the engine has loaded its model, or name another path with --health-check-endpoint",
    )


def _description(
    spec: WorkerSpec, timeout_s: float, context: ssl.SSLContext | None
) -> tuple[tuple[str, ...] | None, Finding]:
    """(names of its models, the finding) from what the worker says of itself."""
    check = f"{spec.url} models"
    status, models = _document(spec, MODELS_PATH, timeout_s, context)
    if status in (401, 403):
        return None, Finding(
            "FAIL", check, f"GET {MODELS_PATH} answers {status}", "give its key with --worker-api-key"
        )
    _, version = _document(spec, VERSION_PATH, timeout_s, context)
    server_info = None
    for path in SERVER_INFO_PATHS:
        if server_info is None:
            _, server_info = _document(spec, path, timeout_s, context)
    engine = (
        Engine(spec.runtime_type) if spec.runtime_type else recognised_engine(models, version, server_info)
    )
    names = tuple(card.id for card in answered_models(models))
    seen = f"looks like {engine.value}"
    ranks = dp_size(spec, server_info)
    if ranks > 1:
        seen += f", {ranks} data-parallel ranks"
    if not names and spec.model_id is None:
        return names, Finding(
            "WARN",
            check,
            f"{seen}; names no model, so it serves every name that no other worker claims",
            "fine for a single model; else add it through the worker API with a model_id",
        )
    return names or (spec.model_id or "",), Finding(
        "OK", check, f"{seen}; serves {', '.join(names) or spec.model_id}"
    )


def _bootstrap(spec: WorkerSpec, timeout_s: float) -> Finding:
    check = f"{spec.url} bootstrap"
    host, _ = _address(spec.url)
    port = spec.bootstrap_port or 0
    try:
        with socket.create_connection((host, port), timeout_s):
            pass
    except OSError as wrong:
        seen, _ = _weather(wrong, host, port)
        return Finding(
            "WARN", check, f"port {port}: {seen}", "decode workers fetch the KV cache there; check the port"
        )
    return Finding("OK", check, f"port {port} accepts connections")


def _document(
    spec: WorkerSpec, path: str, timeout_s: float, context: ssl.SSLContext | None
) -> tuple[int, Any]:
    """(status, decoded JSON) of a GET; (0, None) without an answer, None as document unless it is 2xx with JSON."""
    try:
        status, content = _get(spec, path, timeout_s, context)
    except (OSError, http.client.HTTPException):
        return 0, None
    if not 200 <= status < 300:
        return status, None
    try:
        return status, json.loads(content)
    except ValueError:
        return status, None


def _get(spec: WorkerSpec, path: str, timeout_s: float, context: ssl.SSLContext | None) -> tuple[int, bytes]:
    parts = urlsplit(spec.url)
    host, port = _address(spec.url)
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    headers = {"accept": "application/json"}
    if spec.api_key is not None:
        headers["authorization"] = f"Bearer {spec.api_key}"
    try:
        connection.request("GET", parts.path + path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(ANSWER_BYTES_MAX)
    finally:
        connection.close()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _weather(wrong: Exception, host: str, port: int) -> tuple[str, str]:
    """(what happened, what to do) for a failure between here and the worker."""
    if isinstance(wrong, socket.gaierror):
        return f"the name {host} is not known here", "check the name, or the DNS of this host"
    if isinstance(wrong, ConnectionRefusedError):
        return (
            "connection refused",
            f"start the engine, and let it listen on an address this host reaches, port {port}",
        )
    if isinstance(wrong, TimeoutError):
        return "no answer in time", f"check routes and firewalls between this host and {host}:{port}"
    if isinstance(wrong, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {wrong.verify_message}",
            "name its CA with --ca-cert-paths, or add it to the trust store of this host",
        )
    if isinstance(wrong, ssl.SSLError):
        return "no TLS spoken there", "use http:// if the worker has no certificate"
    if isinstance(wrong, http.client.HTTPException):
        return (
            f"no HTTP spoken there ({type(wrong).__name__})",
            "check that the port is the engine's HTTP port",
        )
    reason = getattr(wrong, "strerror", None) or str(wrong) or type(wrong).__name__
    return reason, f"check routes and firewalls between this host and {host}:{port}"
