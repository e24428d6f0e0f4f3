"""`smg mesh` against a gateway that answers as contract section 20 says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from smg.cli import mesh_command
from smg.cli.main import main
from tests.smg.cli.fake_gateway import Answer, serving

STATUS: dict[str, Any] = {
    "enabled": True,
    "node": "a",
    "address": "10.0.0.1:30001",
    "incarnation": 7,
    "state": "alive",
    "members": 3,
    "alive": 2,
    "version": "1.0",
    "uptime_secs": 812.4,
    "converged": True,
    "partitioned": True,
    "state_digest": "9f",
    "lag_secs": {"p50": 0.05, "max": 0.9},
    "stores": {"workers": {"entries": 12, "digest": "1"}, "prefix": {"entries": 88231, "digest": "2"}},
    "mismatched": {"c": "cuts prompts otherwise"},
    "owner": {"followed": 5, "late": 1},
    "peers": [
        {
            "name": "b", "host": "10.0.0.2", "port": 30001, "state": "alive", "rtt_s": 0.0012, "last_seen_s": 0.4,
            "transport": "udp", "stream": "dialled", "is_protected": True, "last_error": "", "is_digest_equal": True,
            "digest_lag_s": 0.0,
        },
        {
            "name": "c", "host": "10.0.0.3", "port": 30001, "state": "dead", "rtt_s": None, "last_seen_s": 90.0,
            "transport": "tcp", "stream": "none", "is_protected": False, "last_error": "Connection refused",
            "is_digest_equal": None, "digest_lag_s": None,
        },
    ],
}  # fmt: skip
MEMBERS = {
    "members": [
        {
            "name": "a", "address": "10.0.0.1:30001", "state": "alive", "incarnation": 7, "self": True, "rtt_ms": None,
            "last_seen_secs": 0.0, "version": "1.0", "digest": "9f",
        },
        {
            "name": "b", "address": "10.0.0.2:30001", "state": "left", "incarnation": 3, "self": False, "rtt_ms": 1.24,
            "last_seen_secs": 4.0, "version": "0.9", "digest": "",
        },
    ],
    "total": 2,
}  # fmt: skip


class Meshed:
    def __init__(self) -> None:
        self.status: dict[str, Any] = STATUS
        self.limits: dict[str, Any] = {"limits": [], "total": 0}
        self.has_left = False
        self.asked: list[str] = []

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        self.asked.append(f"{method} {target}")
        if target == "/mesh/status":
            return 200, json.dumps(self.status).encode()
        if target == "/mesh/limits":
            return 200, json.dumps(self.limits).encode()
        if target == "/mesh/members":
            return 200, json.dumps(MEMBERS).encode()
        if self.has_left:
            return 409, json.dumps({"error": {"code": "already_left", "message": "It has left"}}).encode()
        self.has_left = True
        return 202, b'{"status":"leaving"}'


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meshed]:
    gateway = Meshed()
    monkeypatch.delenv("SMG_API_KEY", raising=False)
    with serving(gateway.answer) as url:
        monkeypatch.setenv("SMG_GATEWAY", url)
        yield gateway


@pytest.mark.parametrize("arguments", [["mesh"], ["mesh", "status"]])
def test_the_status_tells_what_matters(
    gateway: Meshed, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr().out
    for words in (
        "a at 10.0.0.1:30001: alive, 2 of 3 members alive, in step",
        "news is 50 ms old, at most 900 ms",
        "cut off",
        "c is not merged: cuts prompts otherwise",
        "prefix 88231",
        "followed 5, late 1",
    ):
        assert words in told
    rows = [line.split() for line in told.splitlines()]
    assert [
        "b",
        "10.0.0.2:30001",
        "alive",
        "1.2",
        "ms",
        "0.4",
        "s",
        "udp",
        "dialled",
        "sealed",
        "yes",
    ] in rows
    assert any(
        row[:3] == ["c", "10.0.0.3:30001", "dead"] and row[-2:] == ["Connection", "refused"] for row in rows
    )


def test_members_are_listed_one_on_a_line(gateway: Meshed, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "members"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["a", "(self)", "10.0.0.1:30001", "alive", "1.0", "0.0", "s"]
    assert rows[2] == ["b", "10.0.0.2:30001", "left", "0.9", "1.2", "ms", "4.0", "s"]


@pytest.mark.parametrize("arguments", [["mesh", "--json", "status"], ["mesh", "members", "--json"]])
def test_json_is_the_gateways_own(
    gateway: Meshed, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == (STATUS if "status" in arguments else MEMBERS)


def test_limits_tell_who_holds_which_part(gateway: Meshed, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "limits"]) == 0
    assert "all are divided evenly" in capsys.readouterr().out
    nodes = {"b": {"held": 0.25, "demand": 0.1}, "c": {"held": 0.0, "demand": 0.0}}
    gateway.limits["limits"] = [
        {"limit": "requests per second", "share": 0.754, "held": 0.75, "demand": 3.0, "nodes": nodes}
    ]
    assert main(["mesh", "limits"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row == ["requests", "per", "second", "75%", "300%", "b", "25%,", "c", "0%"]


def test_leaving_is_said_once(gateway: Meshed, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", "leave"]) == 0
    assert "goes on serving" in capsys.readouterr().out
    assert main(["mesh", "leave"]) == 1
    assert "already_left" in capsys.readouterr().err
    assert gateway.asked == ["POST /mesh/leave"] * 2


def test_a_gateway_without_a_mesh_says_so(gateway: Meshed, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.status = {"enabled": False}
    assert main(["mesh"]) == 0
    assert "in no mesh" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["mesh", "status", "--watch"], ["mesh", "status", "--watch", "--json"]]
)
def test_a_watch_into_a_pipe_prints_one_status_after_the_other(
    gateway: Meshed,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(mesh_command.time, "sleep", pause)
    assert main([*arguments, "--interval-secs", "2"]) == 130
    told = capsys.readouterr().out
    assert pauses == [2.0, 2.0, 2.0]
    if "--json" in arguments:
        assert [json.loads(line) for line in told.splitlines()] == [STATUS] * 3
    else:
        assert told.count("a at 10.0.0.1:30001") == 3


def test_nobody_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMG_GATEWAY", "http://127.0.0.1:9")
    assert main(["mesh", "members"]) == 1
    assert capsys.readouterr().err.startswith("smg mesh: no gateway at http://127.0.0.1:9")
