"""`smg doctor`: each thing that can be wrong with a configuration or a worker is found and comes with advice (CLI-13)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from smg.cli import doctor
from smg.cli.doctor import look, main
from smg.cli.doctor_workers import Finding
from smg.settings import (
    Auth,
    Discovery,
    Limits,
    Listening,
    Mesh,
    Prefill,
    PrefillDecode,
    Settings,
    Telemetry,
    Tls,
    Workers,
)
from tests.smg.cli.fake_gateway import Answer, serving


def worker(answers: dict[str, Any], key: str | None = None, health: int = 200) -> Any:
    """An engine: JSON per path, 404 elsewhere; with a key, 401 without it."""

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if key is not None and headers.get("authorization") != f"Bearer {key}":
            return 401, b""
        if target == "/health":
            return health, b""
        return (
            (200, json.dumps(answers[target]).encode())
            if target in answers
            else (404, b'{"detail":"Not Found"}')
        )

    return serving(answer)


VLLM = {"/v1/models": {"data": [{"id": "m1", "owned_by": "vllm"}]}, "/version": {"version": "1"}}


@pytest.fixture
def free() -> Iterator[Listening]:
    """Ports nobody listens on."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    yield Listening(host="127.0.0.1", port=ports[0], health_check_port=ports[1])


def settings(listening: Listening, *urls: str, **groups: Any) -> Settings:
    telemetry = groups.pop(
        "telemetry", Telemetry(prometheus_host="127.0.0.1", prometheus_port=listening.port)
    )
    return Settings(
        listening=listening,
        workers=groups.pop("workers", Workers(worker_urls=urls)),
        telemetry=telemetry,
        **groups,
    )


def of(findings: list[Finding], check: str) -> Finding:
    found = [finding for finding in findings if check in finding.check]
    assert len(found) == 1, findings
    return found[0]


def test_all_is_well_with_free_ports_and_a_good_worker(free: Listening) -> None:
    with worker(VLLM) as url:
        findings = look(settings(free, url), 5.0)
    assert {finding.status for finding in findings} == {"OK"}
    assert of(findings, "models").seen == "looks like vllm; serves m1"


def test_every_failure_and_warning_comes_with_advice(free: Listening) -> None:
    with worker({}, health=500) as sick, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listening = Listening(host="127.0.0.1", port=taken.getsockname()[1])
        findings = look(settings(listening, sick, "http://127.0.0.1:1", "http://no-such-host.invalid"), 5.0)
    failed = [finding for finding in findings if finding.status != "OK"]
    assert len(failed) >= 5
    assert all(finding.fix and finding.seen for finding in failed)


def test_a_port_in_use_fails_unless_a_gateway_runs_there(free: Listening) -> None:
    with serving(lambda *_: (200, b"other")) as url:
        listening = Listening(host="127.0.0.1", port=int(url.rpartition(":")[2]))
        assert of(doctor._ports(settings(listening), 5.0)[:1], "--port").status == "FAIL"
    with serving(lambda *_: (200, b"OK")) as url:
        listening = Listening(host="127.0.0.1", port=int(url.rpartition(":")[2]))
        found = doctor._ports(settings(listening), 5.0)[0]
        assert found.status == "WARN" and "a gateway is running" in found.seen


def test_every_process_needs_its_mesh_port(free: Listening) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listening = msgspec.structs.replace(free, processes=2)
        mesh = Mesh(ha_mesh=True, mesh_host="127.0.0.1", mesh_port=port - 1)
        found = doctor._ports(msgspec.structs.replace(settings(listening), mesh=mesh), 1.0)
        assert of(found, f"--mesh-port 127.0.0.1:{port}").status == "FAIL"


def test_more_processes_than_cores_are_a_warning(free: Listening) -> None:
    many = msgspec.structs.replace(free, processes=256)
    assert of(doctor._surroundings(settings(many), 1.0), "--processes").status == "WARN"
    assert not [each for each in doctor._surroundings(settings(free), 1.0) if each.check == "--processes"]


def test_an_address_that_is_not_ours_fails(free: Listening) -> None:
    found = doctor._ports(settings(Listening(host="192.0.2.1", port=free.port)), 5.0)[0]
    assert found.status == "FAIL" and "no address of this host" in found.seen
    found = doctor._ports(settings(Listening(host="no-such-host.invalid", port=free.port)), 5.0)[0]
    assert found.status == "FAIL" and "not known" in found.seen


def test_ports_are_free_again_after_a_look(free: Listening) -> None:
    assert look(settings(free), 5.0) == look(settings(free), 5.0)


def test_no_workers_is_a_warning_since_more_may_come(free: Listening) -> None:
    assert of(look(settings(free), 5.0), "workers").status == "WARN"


@pytest.mark.parametrize(
    ("answers", "engine"),
    [
        ({"/v1/models": {"data": [{"id": "m"}]}}, "generic"),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "sglang"}]}}, "sglang"),
        (
            {"/v1/models": {"data": [{"id": "m"}]}, "/get_server_info": {"model_path": "m", "dp_size": 4}},
            "sglang",
        ),
        ({"/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": "0.9"}}, "vllm"),
    ],
)
def test_the_engine_is_recognised_like_in_the_gateway(
    answers: dict[str, Any], engine: str, free: Listening
) -> None:
    with worker(answers) as url:
        found = of(look(settings(free, url), 5.0), "models")
    assert found.status == "OK"
    assert found.seen.startswith(f"looks like {engine}")
    assert ("4 data-parallel ranks" in found.seen) == ("/get_server_info" in answers)


def test_an_engine_that_was_named_is_believed(free: Listening) -> None:
    with worker(VLLM) as url:
        found = look(settings(free, workers=Workers(worker_urls=(url,), backend="trtllm")), 5.0)
    assert of(found, "models").seen.startswith("looks like trtllm")


@pytest.mark.parametrize(
    ("status", "verdict"), [(204, "OK"), (404, "OK"), (405, "OK"), (501, "OK"), (500, "FAIL"), (503, "FAIL")]
)
def test_health_answers_are_judged_like_in_the_gateway(status: int, verdict: str, free: Listening) -> None:
    with worker(VLLM, health=status) as url:
        assert of(look(settings(free, url), 5.0), " health").status == verdict


def test_a_worker_that_wants_a_key_is_told_apart_and_the_key_is_not_shown(
    free: Listening, capsys: pytest.CaptureFixture[str]
) -> None:
    with worker(VLLM, key="hidden-key") as url:
        found = of(look(settings(free, url), 5.0), "models")
        assert found.status == "FAIL" and "--worker-api-key" in found.fix
        with_key = settings(free, workers=Workers(worker_urls=(url,), worker_api_key="hidden-key"))
        findings = look(with_key, 5.0)
    assert of(findings, "models").status == "OK"
    assert "hidden-key" not in repr(findings)


def test_a_worker_without_a_model_list_is_a_warning(free: Listening) -> None:
    with worker({}) as url:
        found = of(look(settings(free, url), 5.0), "models")
    assert found.status == "WARN" and "names no model" in found.seen


def test_a_port_that_speaks_something_else_fails(free: Listening) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        found = of(look(settings(free, url), 0.05), " health")
        assert found.status == "FAIL" and "no answer in time" in found.seen


def test_the_bootstrap_port_of_a_prefill_worker_is_tried(free: Listening) -> None:
    with worker(VLLM) as url:
        pd = PrefillDecode(pd_disaggregation=True, prefill=(Prefill(url, 1),), decode=(f"{url}/d",))
        findings = look(settings(free, pd=pd), 5.0)
    assert of(findings, "bootstrap").status == "WARN"
    assert sum(finding.check.endswith("connect") for finding in findings) == 2


def test_an_alias_of_a_model_that_nobody_serves_is_a_warning(free: Listening) -> None:
    with worker(VLLM) as url:
        workers = Workers(worker_urls=(url,), model_alias=("gpt=m1", "other=m9"))
        found = of(look(settings(free, workers=workers), 5.0), "--model-alias")
    assert found.status == "WARN" and "m9" in found.seen and found.fix == "one of: m1"


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"not json", "FAIL", "JSON"),
        (b'{"version":2,"workers":[]}', "FAIL", "version"),
        (b'{"version":1,"workers":[{"url":"grpc://w:1"}]}', "FAIL", "workers[0]"),
        (b'{"version":1,"workers":[]}', "OK", "names 0 worker(s)"),
        (None, "WARN", "not there yet"),
    ],
)
def test_the_discovery_file_is_read_by_the_rules_of_discovery(
    content: bytes | None, status: str, words: str, free: Listening, tmp_path: Path
) -> None:
    file = tmp_path / "workers.json"
    if content is not None:
        file.write_bytes(content)
    found = of(look(settings(free, discovery=Discovery(discovery_file=str(file))), 5.0), "--discovery-file")
    assert found.status == status
    assert words in found.seen


def test_workers_of_the_discovery_file_are_examined_once_each(free: Listening, tmp_path: Path) -> None:
    file = tmp_path / "workers.json"
    with worker(VLLM) as url:
        file.write_text(json.dumps({"version": 1, "workers": [{"url": url}, {"url": f"{url}/b"}]}))
        findings = look(settings(free, url, discovery=Discovery(discovery_file=str(file))), 5.0)
    assert sum(finding.check.endswith("connect") for finding in findings) == 2


def test_the_log_directory_must_be_writable_or_makeable(free: Listening, tmp_path: Path) -> None:
    def found(path: Path) -> str:
        telemetry = Telemetry(prometheus_host="127.0.0.1", prometheus_port=free.port, log_dir=str(path))
        return of(look(settings(free, telemetry=telemetry), 5.0), "--log-dir").status

    file = tmp_path / "file"
    file.write_text("")
    assert found(tmp_path) == "OK"
    assert found(tmp_path / "new" / "logs") == "OK"
    assert found(file) == "FAIL"
    assert found(file / "logs") == "FAIL"


def test_a_missing_trace_collector_is_a_warning(free: Listening) -> None:
    def found(endpoint: str) -> str:
        telemetry = Telemetry(
            prometheus_host="127.0.0.1",
            prometheus_port=free.port,
            enable_trace=True,
            otlp_traces_endpoint=endpoint,
        )
        return of(look(settings(free, telemetry=telemetry), 5.0), "--otlp-traces-endpoint").status

    with serving(lambda *_: (200, b"")) as url:
        assert found(url) == "OK"
        assert found(url.removeprefix("http://")) == "OK"
    assert found("127.0.0.1:1") == "WARN"
    assert found("127.0.0.1:bad") == "WARN"


def test_too_few_file_descriptors_are_a_warning(free: Listening) -> None:
    found = of(look(settings(free, limits=Limits(max_concurrent_requests=10**9)), 5.0), "open files")
    assert found.status in ("WARN", "OK")
    assert (
        of(look(settings(free, limits=Limits(max_concurrent_requests=1)), 5.0), "open files").status == "OK"
    )


def arguments(free: Listening, *more: str) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(free.port), "--prometheus-host", "127.0.0.1",
            "--prometheus-port", str(free.health_check_port), *more]  # fmt: skip


def test_the_exit_code_and_the_json_tell_whether_anything_failed(
    free: Listening, capsys: pytest.CaptureFixture[str]
) -> None:
    with worker(VLLM) as url:
        assert main(arguments(free, "--json", "--worker-urls", url)) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is True
        assert {check["status"] for check in report["checks"]} == {"OK"}
        assert main(arguments(free, "--json", "--worker-urls", url, "http://127.0.0.1:1")) == 1
        assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_table_has_one_line_per_check_and_a_sum(
    free: Listening, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(free, "--worker-urls", "http://127.0.0.1:1")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["CHECK", "FOUND", "WHAT", "TO", "DO"]
    assert any(
        line.startswith("FAIL") and "connection refused" in line and "start the engine" in line
        for line in lines
    )
    assert lines[-1].endswith("1 failed")


def test_a_configuration_that_may_not_start_is_the_only_failure_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--json", "--port", "0"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["status"] for check in checks] == ["FAIL"]
    assert "--port" in checks[0]["seen"] and "--port" in checks[0]["fix"]


def test_a_variable_that_is_nearly_ours_is_a_warning(
    free: Listening, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMG_WORKER_URL", "http://127.0.0.1:1")
    assert main(arguments(free, "--json")) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    found = next(check for check in checks if check["check"] == "SMG_WORKER_URL")
    assert found["status"] == "WARN" and "SMG_WORKER_URLS" in found["fix"]


def test_certificates_are_read_as_the_node_would(free: Listening, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "cert.key")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "cert.key")
    good = Tls(
        tls_cert_path=cert,
        tls_key_path=key,
        client_cert_path=cert,
        client_key_path=key,
        ca_cert_paths=(str(tmp_path / "ca.pem"),),
    )
    found = {finding.check: finding for finding in look(settings(free, tls=good), 1)}
    for flag in ("--tls-cert-path", "--client-cert-path", "--ca-cert-paths"):
        assert found[flag].status == "OK", found[flag]
    assert "valid until" in found["--tls-cert-path"].seen
    broken = Tls(tls_cert_path=cert, tls_key_path=cert)
    found = {finding.check: finding for finding in look(settings(free, tls=broken), 1)}
    assert found["--tls-key-path"].status == "FAIL" and cert in found["--tls-key-path"].seen


def tenancy(tmp_path: Path, text: str, **auth: Any) -> list[Finding]:
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    limits = Limits(tenant_rate_limit_enabled=True, tenant_rate_limit_config=str(file))
    return doctor._tenancy(Settings(limits=limits, auth=Auth(**auth)))


def test_a_limits_file_is_read_and_tenants_that_nobody_can_be_are_told(tmp_path: Path) -> None:
    text = "tenants: [{tenant_key: 'auth:red'}, {tenant_key: 'auth:shared'}, {tenant_key: 'header:x'}, {tenant_key: 'ip:::1'}]\n"
    found = tenancy(tmp_path, text)
    assert [finding.status for finding in found] == ["OK", "WARN", "WARN", "WARN"]
    assert "4 tenants" in found[0].seen and "no limit" in found[0].seen
    assert [
        name in found[place].seen for place, name in enumerate(("auth:red", "auth:shared", "header:x"), 1)
    ]
    meant = tenancy(tmp_path, text, tenant_api_key=("red:k",), api_key="s", trust_tenant_header=True)
    assert [finding.status for finding in meant] == ["OK"]
    (wrong,) = tenancy(tmp_path, "tenants: [{tenant: a}]\n")
    assert wrong.status == "FAIL" and "line 1" in wrong.seen
    assert "default policy" in tenancy(tmp_path, "default_policy: {requests_per_minute: 5}\n")[0].seen


def test_a_file_of_priorities_is_read(tmp_path: Path) -> None:
    file = tmp_path / "priorities.yaml"
    limits = Limits(priority_scheduler_enabled=True, priority_scheduler_config=str(file))
    for text, status in (("{}\n", "OK"), ("clases: {}\n", "FAIL")):
        file.write_text(text)
        (found,) = doctor._tenancy(Settings(limits=limits))
        assert found.status == status
    assert doctor._tenancy(Settings()) == []
