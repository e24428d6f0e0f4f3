"""`smg usage` against a gateway that answers as `GET /v1/usage` does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smg.cli.main import main
from tests.smg.cli.fake_gateway import Answer, serving

ROW = {
    "tenant": "auth:red", "model": "m", "requests": 3, "prompt_tokens": 1234567, "cached_tokens": 12,
    "completion_tokens": 6, "estimated_requests": 1,
}  # fmt: skip
USAGE: dict[str, Any] = {
    "object": "usage",
    "nodes": [{"name": "a", "since": 1700000000.25}, {"name": "b", "since": 1700000100}],
    "missing": ["c"],
    "usage": [ROW],
    "total": {name: number for name, number in ROW.items() if name not in ("tenant", "model")},
}


class Counting:
    """A gateway with a book; `targets` are what it was asked."""

    def __init__(self, document: Any = USAGE, status: int = 200) -> None:
        self.targets: list[str] = []
        self._content = json.dumps(document).encode()
        self._status = status

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        assert method == "GET"
        self.targets.append(target)
        return self._status, self._content


def run(gateway: Counting, *arguments: str) -> int:
    with serving(gateway.answer) as url:
        return main(["usage", "--gateway", url, *arguments])


def test_a_row_a_sum_and_since_when(capsys: pytest.CaptureFixture[str]):
    gateway = Counting()
    assert run(gateway) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a: since 2023-11-14 22:13:20 UTC" and lines[1].startswith("b: since")
    assert lines.pop(2) == "c: did not answer, what it has counted is missing here"
    assert lines[2].split() == ["TENANT", "MODEL", "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "ESTIMATED"]
    assert lines[3].split() == ["auth:red", "m", "3", "1234567", "12", "6", "1"]
    assert lines[4].split() == ["total", "3", "1234567", "12", "6", "1"]
    assert gateway.targets == ["/v1/usage"]


def test_what_is_asked_for_is_asked_of_the_gateway(capsys: pytest.CaptureFixture[str]):
    gateway = Counting()
    assert run(gateway, "--tenant", "auth:red", "--model", "a/b c") == 0
    assert gateway.targets == ["/v1/usage?tenant=auth%3Ared&model=a%2Fb+c"]


def test_json_is_the_gateways_own(capsys: pytest.CaptureFixture[str]):
    assert run(Counting(), "--json") == 0
    assert json.loads(capsys.readouterr().out) == USAGE


def test_an_empty_book_says_so(capsys: pytest.CaptureFixture[str]):
    assert run(Counting({**USAGE, "usage": []})) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was used"


def test_a_refusal_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]):
    refusal = {"error": {"message": "Missing or invalid API key", "code": "invalid_api_key"}}
    assert run(Counting(refusal, 401)) == 1
    error = capsys.readouterr().err
    assert error.startswith("smg usage: 401 invalid_api_key") and error.count("\n") == 1
