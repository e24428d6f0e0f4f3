"""`smg doctor`: would a gateway with these flags start here, and would it reach its workers and peers?

Owns the list of checks, their order, and the report (a table, or JSON for machines). It takes the flags of `smg launch`, binds
ports only to let them go at once, and changes nothing. Exit code 1 when a check fails, so that a deployment can stop there.
"""

from __future__ import annotations

import errno
import http.client
import os
import resource
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec

from smg.cli.accounting import doubts, read_plans
from smg.cli.doctor_mesh import examine_mesh
from smg.cli.doctor_workers import Candidate, Finding, WorkerReport, examine
from smg.cli.flags import (
    launch_parser,
    policy_names,
    positive_seconds,
    read_arguments,
    settings_from,
    unknown_variables,
)
from smg.cli.scheduling import FLAG as SCHEDULER_FLAG
from smg.discovery.file import FILE_BYTES_MAX, BrokenFile, parse
from smg.errors import SettingsError
from smg.fleet.worker import WorkerSpec
from smg.net.tls import describe, server_context, worker_context
from smg.settings import Settings
from smg.settings_rules import warnings
from smg.tenancy.priorities import PriorityFile
from smg.yaml_config import load_yaml

WORKERS_AT_ONCE = 16
"""Workers that are examined at the same time: enough for a fleet in seconds, few enough for the smallest host."""

_DESCRIPTORS_SPARE = 256
"""File descriptors that are not connections: listeners, logs, libraries."""


def main(arguments: Sequence[str]) -> int:
    """Examine the configuration that the arguments and the environment mean. Returns 0, or 1 when a check failed."""
    policies = policy_names()
    parser = launch_parser("smg doctor", policies)
    parser.description = (
        "Check a configuration and the reachability of its workers. Takes the flags of smg launch."
    )
    own = parser.add_argument_group("Report: how doctor looks and tells")
    own.add_argument("--json", action="store_true", help="print JSON instead of a table")
    own.add_argument(
        "--timeout-secs",
        type=positive_seconds,
        default=3.0,
        metavar="SECS",
        help="patience per answer (default: 3)",
    )
    given = read_arguments(parser, arguments)
    findings = _variables(os.environ)
    try:
        settings = settings_from(given, os.environ, policies)
    except SettingsError as wrong:
        findings.append(
            Finding("FAIL", "configuration", str(wrong), f"change {wrong.flag}; see smg launch --help")
        )
    else:
        findings.append(Finding("OK", "configuration", "every flag and variable is valid"))
        findings += look(settings, given.timeout_secs)
    has_failed = any(finding.status == "FAIL" for finding in findings)
    if given.json:
        report = {"ok": not has_failed, "checks": findings}
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        _print_table(findings)
    return int(has_failed)


def look(settings: Settings, timeout_s: float) -> list[Finding]:
    """Everything that can be seen from here of a valid configuration."""
    findings = [Finding("WARN", "configuration", text) for text in warnings(settings)]
    findings += _ports(settings, timeout_s)
    findings += _surroundings(settings, timeout_s)
    findings += _tenancy(settings)
    context, certified = _certificates(settings)
    findings += certified
    if settings.mesh.ha_mesh:
        findings += examine_mesh(settings.mesh, timeout_s)
    candidates, discovered = _candidates(settings)
    findings += discovered
    if not candidates:
        findings.append(
            Finding(
                "WARN",
                "workers",
                "none is configured",
                "add some later with: smg workers add http://HOST:PORT",
            )
        )
        return findings
    path = settings.health.health_check_endpoint
    with ThreadPoolExecutor(WORKERS_AT_ONCE) as threads:
        reports = list(
            threads.map(lambda candidate: examine(candidate, path, timeout_s, context), candidates)
        )
    for report in reports:
        findings += report.findings
    return findings + _aliases(settings, reports)


def _variables(environment: Mapping[str, str]) -> list[Finding]:
    return [
        Finding("WARN", name, "is no variable of smg and is ignored", f"did you mean {close}?")
        for name, close in unknown_variables(environment).items()
    ]


def _tenancy(settings: Settings) -> list[Finding]:
    """The files that say what tenants may use and who goes first."""
    limits = settings.limits
    found = []
    if limits.tenant_rate_limit_enabled and limits.tenant_rate_limit_config is not None:
        try:
            plans = read_plans(limits.tenant_rate_limit_config)
        except SettingsError as wrong:
            found.append(Finding("FAIL", "tenant limits", str(wrong), "see docs/operate/tenants.md"))
        else:
            seen = f"{len(plans.tenants)} tenants are named, the others have " + (
                "no limit" if plans.default_policy is None else "the default policy"
            )
            found.append(Finding("OK", "tenant limits", seen))
            found += [Finding("WARN", "tenant limits", doubt) for doubt in doubts(plans, settings)]
    if limits.priority_scheduler_enabled and limits.priority_scheduler_config is not None:
        try:
            load_yaml(limits.priority_scheduler_config, PriorityFile, SCHEDULER_FLAG)
        except SettingsError as wrong:
            found.append(Finding("FAIL", "priorities", str(wrong)))
        else:
            found.append(Finding("OK", "priorities", "the file can be used"))
    return found


def _ports(settings: Settings, timeout_s: float) -> list[Finding]:
    listening = settings.listening
    listeners = [
        ("--port", listening.host, listening.port),
        ("--prometheus-port", settings.metrics_host(), settings.telemetry.prometheus_port),
    ]
    if listening.health_check_port is not None:
        listeners.append(("--health-check-port", listening.host, listening.health_check_port))
    mesh = settings.mesh
    if mesh.ha_mesh:  # the first one is visited (`doctor_mesh`)
        listeners += [
            ("--mesh-port", mesh.mesh_host, mesh.mesh_port + place) for place in range(1, listening.processes)
        ]
    return [_bindable(flag, host, port, timeout_s) for flag, host, port in listeners]


def _bindable(flag: str, host: str, port: int, timeout_s: float) -> Finding:
    check = f"{flag} {host}:{port}"
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror:
        return Finding(
            "FAIL", check, "the address is not known here", "name an address of this host, or 0.0.0.0"
        )
    except OSError as wrong:
        if wrong.errno == errno.EADDRINUSE:
            if flag == "--port" and _is_gateway(host, port, timeout_s):
                return Finding(
                    "WARN", check, "a gateway is running there already", "stop it before starting another"
                )
            return Finding(
                "FAIL", check, "is in use", f"stop what listens there, or choose another port with {flag}"
            )
        if wrong.errno == errno.EADDRNOTAVAIL:
            return Finding(
                "FAIL", check, "is no address of this host", "name one of its addresses, or 0.0.0.0"
            )
        if wrong.errno == errno.EACCES:
            return Finding("FAIL", check, "needs more rights", f"choose a port of 1024 or above with {flag}")
        return Finding(
            "FAIL", check, wrong.strerror or str(wrong), f"choose another address or port ({flag})"
        )
    return Finding("OK", check, "can be listened on")


def _is_gateway(host: str, port: int, timeout_s: float) -> bool:
    """Whether what listens there answers the liveness probe like a gateway (LIFE-1)."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(reachable, port, timeout=timeout_s)
    try:
        connection.request("GET", "/liveness")
        answer = connection.getresponse()
        return answer.status == 200 and answer.read(16) == b"OK"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _certificates(settings: Settings) -> tuple[ssl.SSLContext | None, list[Finding]]:
    """What https workers are asked with, and whether the files of both sides can be used."""
    tls = settings.tls
    context, findings = None, []
    try:
        if tls.tls_cert_path is not None and tls.tls_key_path is not None:
            server_context(tls.tls_cert_path, tls.tls_key_path)
            findings.append(Finding("OK", "--tls-cert-path", describe(tls.tls_cert_path)))
        if tls.client_cert_path is not None or tls.ca_cert_paths:
            context = worker_context(tls.ca_cert_paths, tls.client_cert_path, tls.client_key_path)
            if tls.client_cert_path is not None:
                findings.append(Finding("OK", "--client-cert-path", describe(tls.client_cert_path)))
            if tls.ca_cert_paths:
                findings.append(
                    Finding("OK", "--ca-cert-paths", f"{len(tls.ca_cert_paths)} file(s) can be used")
                )
    except SettingsError as wrong:
        findings.append(Finding("FAIL", wrong.flag, f"{wrong.value}: {wrong.reason}", "name another file"))
    return context, findings


def _surroundings(settings: Settings, timeout_s: float) -> list[Finding]:
    findings = [_descriptors(settings)]
    cores, processes = os.cpu_count() or 1, settings.listening.processes
    if processes > cores:
        findings.append(
            Finding(
                "WARN", "--processes", f"{processes} share {cores} core(s)", "one process per core is good"
            )
        )
    directory = settings.telemetry.log_dir
    if directory is not None:
        parent = directory
        while not os.path.exists(parent) and os.path.dirname(parent) != parent:
            parent = os.path.dirname(parent) or "."
        if os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK):
            findings.append(Finding("OK", "--log-dir", f"{directory} can be written"))
        else:
            findings.append(
                Finding(
                    "FAIL",
                    "--log-dir",
                    f"{directory} cannot be written",
                    f"give this user write access to {parent}",
                )
            )
    if settings.telemetry.enable_trace:
        findings.append(_collector(settings.telemetry.otlp_traces_endpoint, timeout_s))
    return findings


def _descriptors(settings: Settings) -> Finding:
    """Each request in flight holds two sockets: the client's and the worker's."""
    in_flight = settings.limits.in_flight_max(os.cpu_count() or 1)
    wanted = (in_flight or 4096) * 2 + _DESCRIPTORS_SPARE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return Finding("OK", "open files", f"limit {'none' if hard == resource.RLIM_INFINITY else hard}")
    return Finding(
        "WARN",
        "open files",
        f"limit {hard}, {wanted} wanted for {in_flight or 4096} requests in flight",
        "raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower --max-concurrent-requests",
    )


def _collector(endpoint: str, timeout_s: float) -> Finding:
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 4317)
        with socket.create_connection((parts.hostname or "", port), timeout_s):
            pass
    except (OSError, ValueError) as wrong:
        reason = getattr(wrong, "strerror", None) or str(wrong)
        return Finding(
            "WARN",
            "--otlp-traces-endpoint",
            f"{endpoint}: {reason}",
            "start the collector; until then spans are lost",
        )
    return Finding("OK", "--otlp-traces-endpoint", f"{endpoint} accepts connections")


def _candidates(settings: Settings) -> tuple[list[Candidate], list[Finding]]:
    """Every worker that the configuration names, once each, and what was found about the discovery file."""
    workers, pd = settings.workers, settings.pd
    engine = None if workers.backend == "auto" else workers.backend
    key = workers.worker_api_key
    named = [("--worker-urls", WorkerSpec(url, runtime_type=engine)) for url in workers.worker_urls]
    named += [
        (
            "--prefill",
            WorkerSpec(
                worker.url, worker_type="prefill", bootstrap_port=worker.bootstrap_port, runtime_type=engine
            ),
        )
        for worker in pd.prefill
    ]
    named += [("--decode", WorkerSpec(url, worker_type="decode", runtime_type=engine)) for url in pd.decode]
    findings: list[Finding] = []
    if settings.discovery.discovery_file is not None:
        found, findings = _read_discovery(settings.discovery.discovery_file)
        named += [("--discovery-file", spec) for spec in found]
    once: dict[str, Candidate] = {}
    for source, spec in named:
        spec = msgspec.structs.replace(spec, api_key=spec.api_key or key)
        once.setdefault(spec.url, Candidate(spec=spec, source=source))
    return list(once.values()), findings


def _read_discovery(path: str) -> tuple[tuple[WorkerSpec, ...], list[Finding]]:
    check = "--discovery-file"
    form = 'write {"version":1,"workers":[{"url":"http://HOST:PORT"}]}'
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise BrokenFile(f"is larger than {FILE_BYTES_MAX} bytes")
        specs, remarks = parse(content)
    except FileNotFoundError:
        return (), [
            Finding("WARN", check, f"{path} is not there yet", "create it; it is read as soon as it appears")
        ]
    except OSError as wrong:
        return (), [Finding("FAIL", check, f"{path}: {wrong.strerror}", "let this user read it")]
    except BrokenFile as wrong:
        return (), [Finding("FAIL", check, f"{path}: {wrong}", form)]
    findings = [Finding("OK", check, f"{path} names {len(specs)} worker(s)")]
    return specs, findings + [Finding("WARN", check, f"{path}: {remark}") for remark in remarks]


def _aliases(settings: Settings, reports: list[WorkerReport]) -> list[Finding]:
    """An alias of a model that no worker serves is a typing mistake, unless workers could not be asked."""
    told = [report.models for report in reports]
    if not all(told):
        return []
    served = {name for models in told for name in models or ()}
    return [
        Finding(
            "WARN",
            "--model-alias",
            f"{alias}={model}: no worker serves {model}",
            f"one of: {', '.join(sorted(served))}",
        )
        for alias, model in settings.workers.aliases().items()
        if model not in served
    ]


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "CHECK", "FOUND", "WHAT TO DO"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.status, styles[finding.status]),
            Text(finding.check),
            Text(finding.seen),
            Text(finding.fix),
        )
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in styles}
    console.print(f"\n{counts['OK']} ok, {counts['WARN']} to look at, {counts['FAIL']} failed")
