"""`smg workers` against a gateway with workers in memory (CLI-13)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from smg.cli.main import main
from tests.smg.cli.fake_gateway import FakeGateway, serving


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def url(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("SMG_API_KEY", raising=False)
    with serving(gateway.answer) as url:
        monkeypatch.setenv("SMG_GATEWAY", url)
        yield url


@pytest.mark.usefixtures("url")
def test_workers_are_listed_one_on_a_line_in_order(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    first = gateway.add("http://worker-with-a-rather-long-name.internal.example:8000")
    second = gateway.add(
        "http://b:1", status="pending", is_healthy=False, job_status={"message": "connection refused"}
    )
    assert main(["workers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "ID",
        "URL",
        "MODEL",
        "TYPE",
        "ENGINE",
        "STATUS",
        "LOAD",
        "PRIORITY",
        "COST",
        "NOTE",
    ]
    assert lines[1].split()[:5] == [
        first,
        "http://worker-with-a-rather-long-name.internal.example:8000",
        "m1",
        "m2",
        "regular",
    ]
    assert lines[2].split()[0] == second
    assert "pending" in lines[2] and lines[2].rstrip().endswith("connection refused")


@pytest.mark.usefixtures("url")
def test_no_workers_say_how_to_add_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workers", "list"]) == 0
    assert "smg workers add http://" in capsys.readouterr().out


@pytest.mark.usefixtures("url")
def test_json_is_the_gateways_own_before_or_after_the_verb(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = gateway.add("http://a:1")
    for arguments in (["--json"], ["--json", "list"], ["list", "--json"]):
        assert main(["workers", *arguments]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["total"] == 1 and document["workers"][0]["id"] == worker
    assert main(["workers", "show", worker, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == worker


@pytest.mark.usefixtures("url")
def test_a_model_selects_and_is_sent_escaped(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.add("http://a:1", models=[{"id": "org/m&x"}])
    gateway.add("http://b:1")
    assert main(["workers", "list", "--model", "org/m&x"]) == 0
    assert "http://b:1" not in capsys.readouterr().out
    assert gateway.requests[-1][1] == "/workers?model=org%2Fm%26x"


@pytest.mark.usefixtures("url")
def test_add_sends_only_what_was_said(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["workers", "add", "http://a:1"]) == 0
    assert gateway.requests[-1] == ("POST", "/workers", {"url": "http://a:1"})
    assert capsys.readouterr().out.startswith("accepted ")
    key = tmp_path / "key"
    key.write_text("worker-key\n")
    assert main(
        ["workers", "add", "http://b:1", "--model", "m", "--type", "prefill", "--bootstrap-port", "8998", "--engine", "sglang",
         "--worker-api-key", f"@{key}", "--priority", "60", "--cost", "2", "--label", "zone=a", "--label", "note=x=y"]
    ) == 0  # fmt: skip
    assert gateway.requests[-1][2] == {
        "url": "http://b:1", "model_id": "m", "worker_type": "prefill", "bootstrap_port": 8998, "runtime_type": "sglang",
        "api_key": "worker-key", "priority": 60, "cost": 2.0, "labels": {"zone": "a", "note": "x=y"},
    }  # fmt: skip
    assert "worker-key" not in "".join(capsys.readouterr())
    assert main(["workers", "add", "http://c:1", "--model", "m", "--model", "n"]) == 0
    assert gateway.requests[-1][2] == {"url": "http://c:1", "models": [{"id": "m"}, {"id": "n"}]}


@pytest.mark.usefixtures("url")
def test_add_can_wait_until_the_worker_is_ready(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.polls_until_ready = 2
    assert main(["workers", "add", "http://a:1", "--wait"]) == 0
    assert "ready" in capsys.readouterr().out
    gateway.polls_until_ready = 10**6
    assert main(["workers", "add", "http://b:1", "--wait", "--timeout-secs", "0.01"]) == 1
    assert "not ready after 0.01 s: connection refused" in capsys.readouterr().err


@pytest.mark.usefixtures("url")
def test_a_worker_is_removed_by_id_or_url(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = gateway.add("http://a:1"), gateway.add("http://b:1")
    assert main(["workers", "remove", first]) == 0
    assert main(["workers", "remove", "HTTP://B:1/", "--wait"]) == 0
    assert gateway.workers == {}
    assert ("DELETE", f"/workers/{second}", None) in gateway.requests
    capsys.readouterr()
    assert main(["workers", "remove", "http://c:1"]) == 1
    assert "no worker has the URL http://c:1" in capsys.readouterr().err


@pytest.mark.usefixtures("url")
def test_update_changes_what_is_named(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    worker = gateway.add("http://a:1")
    assert main(["workers", "update", worker, "--priority", "70"]) == 0
    assert gateway.requests[-1] == ("PATCH", f"/workers/{worker}", {"priority": 70})
    capsys.readouterr()
    assert main(["workers", "update", worker]) == 1
    assert "nothing to change" in capsys.readouterr().err


@pytest.mark.usefixtures("url")
def test_a_refusal_is_shown_in_the_gateways_words(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.add("http://a:1")
    assert main(["workers", "add", "http://a:1"]) == 1
    assert capsys.readouterr().err == "smg workers: 409 WORKER_ALREADY_EXISTS: Worker already exists\n"
    assert main(["workers", "show", "../etc"]) == 1
    assert gateway.requests[-1][1] == "/workers/..%2Fetc"


def test_a_key_is_needed_where_the_gateway_wants_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SMG_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("admin\n")
    with serving(FakeGateway("admin").answer) as url:
        assert main(["workers", "--gateway", url]) == 1
        shown = capsys.readouterr().err
        assert "401 invalid_api_key" in shown and "--api-key" in shown
        assert main(["workers", "--gateway", url, "--api-key", "admin"]) == 0
        assert main(["workers", "--gateway", url, "--api-key", f"@{file}"]) == 0
        monkeypatch.setenv("SMG_API_KEY", "admin")
        assert main(["workers", "--gateway", url]) == 0


def test_a_gateway_under_a_path_is_asked_there() -> None:
    seen = []

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        seen.append(target)
        return 200, b'{"workers":[],"total":0}'

    with serving(answer) as url:
        assert main(["workers", "--gateway", f"{url}/smg/"]) == 0
    assert seen == ["/smg/workers"]


def test_what_is_no_gateway_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda *_: (200, b"<html>")) as url:
        assert main(["workers", "--gateway", url]) == 1
        assert "does not answer like a gateway" in capsys.readouterr().err
    assert main(["workers", "--gateway", url]) == 1
    assert "connection refused; is it running?" in capsys.readouterr().err
    assert main(["workers", "--gateway", "http://no-such-host.invalid"]) == 1
    assert "host name is not known" in capsys.readouterr().err
    assert main(["workers", "--gateway", "localhost:30000"]) == 2
    assert "--gateway: 'localhost:30000'" in capsys.readouterr().err
    assert main(["workers", "--timeout-secs", "0"]) == 2
    assert "--timeout-secs" in capsys.readouterr().err
