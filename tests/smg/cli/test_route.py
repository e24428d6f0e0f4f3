"""`smg route explain` against a gateway that answers as contract section 13 says."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smg.cli.main import main
from tests.smg.cli.fake_gateway import Answer, serving


def row(number: int, **members: Any) -> dict[str, Any]:
    return {
        "worker_id": f"id-{number}", "url": f"http://w{number}:8000", "status": "ready", "circuit": "closed",
        "eligible": True, "excluded_by": None, "matched_blocks": 0, "matched_ratio": 0.0, "in_flight": number,
        "queued": 0, "kv_usage": None, "cost": 0.5 + number, "terms": {"wait": 0.25, "prefill": 0.25, "penalty": 0.0},
        "rank": number, "reason": "", **members,
    }  # fmt: skip


class Explaining:
    def __init__(self) -> None:
        self.models = ["m"]
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.found: dict[str, Any] = {
            "model": "m",
            "endpoint": "/v1/chat/completions",
            "policy": "cache_aware",
            "chosen": "id-1",
            "decided_by": "only_candidate",
            "routing_key": None,
            "prompt": {"chars": 5120, "blocks": 10, "block_chars": 512},
            "workers": [
                row(2, rank=None, eligible=False, excluded_by="circuit", cost=None, terms=None),
                row(1, matched_blocks=9, kv_usage=0.41, reason="9 of 10 blocks cached"),
            ],
        }

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if target == "/v1/models":
            return 200, json.dumps({"data": [{"id": name} for name in self.models]}).encode()
        self.asked.append((f"{method} {target}", headers, json.loads(body)))
        return 200, json.dumps(self.found).encode()


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Explaining]:
    gateway = Explaining()
    monkeypatch.delenv("SMG_API_KEY", raising=False)
    with serving(gateway.answer) as url:
        monkeypatch.setenv("SMG_GATEWAY", url)
        yield gateway


def test_a_choice_is_a_sentence_and_a_table(gateway: Explaining, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "explain", "--prompt", "hello"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "m /v1/chat/completions, 5120 characters in 10 blocks: cache_aware sends it to http://w1:8000 (only candidate)"
    )
    assert lines[1].split()[:3] == ["RANK", "WORKER", "CACHED"]
    assert lines[2].split() == [
        *[
            "1",
            "http://w1:8000",
            "9/10",
            "1",
            "0",
            "41%",
            "0.250",
            "s",
            "0.250",
            "s",
            "0.000",
            "s",
            "1.500",
            "s",
            "9",
            "of",
            "10",
            "blocks",
            "cached",
        ]
    ]
    assert lines[3].split() == ["http://w2:8000", "2", "0", "left", "out:", "circuit"]
    assert gateway.asked[0][0] == "POST /route/explain"
    assert gateway.asked[0][2] == {"messages": [{"role": "user", "content": "hello"}], "model": "m"}


def test_json_is_what_the_gateway_said(gateway: Explaining, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "--json", "explain", "--model", "m"]) == 0
    assert json.loads(capsys.readouterr().out) == gateway.found


@pytest.mark.parametrize(
    ("endpoint", "body", "target"),
    [
        ("completions", {"prompt": "x"}, "%2Fv1%2Fcompletions"),
        ("/v1/completions", {"prompt": "x"}, "%2Fv1%2Fcompletions"),
        ("generate", {"text": "x"}, "%2Fgenerate"),
        ("responses", {"input": "x"}, "%2Fv1%2Fresponses"),
        ("embeddings", {"input": "x"}, "%2Fv1%2Fembeddings"),
        ("rerank", {"query": "x", "documents": [""]}, "%2Fv1%2Frerank"),
        ("messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}, "%2Fv1%2Fmessages"),
    ],
)
def test_a_prompt_is_put_where_the_endpoint_wants_it(
    gateway: Explaining, endpoint: str, body: dict[str, Any], target: str
) -> None:
    assert main(["route", "explain", "--prompt", "x", "--endpoint", endpoint, "--model", "m"]) == 0
    assert gateway.asked[0][0] == f"POST /route/explain?endpoint={target}"
    assert gateway.asked[0][2] == {**body, "model": "m"}


def test_keys_and_targets_are_sent_as_headers(gateway: Explaining) -> None:
    assert main(["route", "explain", "--routing-key", "u 1", "--target", "0", "--api-key", "k"]) == 0
    headers = gateway.asked[0][1]
    assert headers["x-smg-routing-key"] == "u 1" and headers["x-smg-target-worker"] == "0"
    assert headers["authorization"] == "Bearer k"


def test_a_prompt_may_be_a_file_or_standard_input(
    gateway: Explaining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").write_text("from a file")
    assert main(["route", "explain", "--prompt", f"@{tmp_path}/p"]) == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("aus einem Rohr: ü".encode())))
    assert main(["route", "explain", "--prompt", "-"]) == 0
    assert [body["messages"][0]["content"] for _, _, body in gateway.asked] == [
        "from a file",
        "aus einem Rohr: ü",
    ]


def test_a_whole_body_is_sent_as_it_is(gateway: Explaining, tmp_path: Path) -> None:
    (tmp_path / "b").write_text('{"model": "z", "input": [1, 2, 3]}')
    assert main(["route", "explain", "--body", f"@{tmp_path}/b"]) == 0
    assert gateway.asked[0][2] == {"model": "z", "input": [1, 2, 3]}


def test_which_model_is_asked_for_when_there_are_several(
    gateway: Explaining, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.models = ["a", "b"]
    assert main(["route", "explain", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == "smg route: which model? it serves a, b; give --model NAME\n"


def test_chance_and_nobody_are_told(gateway: Explaining, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.found.update(chosen=None, candidates=["id-1"], policy="random")
    assert main(["route", "explain"]) == 0
    assert "random takes one of 1 by chance" in capsys.readouterr().out
    gateway.found["candidates"] = []
    assert main(["route", "explain"]) == 0
    assert "nobody can take it now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt", "@/nowhere/at/all"], 1, "--prompt: '@/nowhere/at/all': No such file"),
        (["--body", "{", "--prompt", "x"], 1, "--body: stands in place of --prompt"),
        (["--body", "{"], 2, "--body: '{': is no JSON"),
        (["--endpoint", "chta"], 2, "--endpoint: 'chta': must be a path or one of chat"),
        (["--routing-key", "a\nb"], 2, "--routing-key: "),
    ],
)
def test_mistakes_are_one_line(
    gateway: Explaining, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["route", "explain", *arguments]) == code
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not gateway.asked


def test_a_verb_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
