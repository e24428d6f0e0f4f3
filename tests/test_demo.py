"""The demo: its short form from begin to end, what becomes of it on Ctrl-C, and its parts that a good run does not show.

Owns nothing that the demo itself checks (no request failed, nothing counted in flight): its exit code tells.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import trio

HOUSE = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-u", "scripts/demo_story.py", "--short")
PATIENCE_S = 110.0
MARK = "DEMO_TEST_MARK"


def marked() -> tuple[str, dict[str, str]]:
    """An environment by which all processes of one demo are known."""
    mark = uuid.uuid4().hex
    return mark, {**os.environ, MARK: mark}


def left_over(mark: str) -> list[str]:
    """Command lines of processes that still run and have the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # no process, gone by now, or somebody else's
            continue
    return found


def test_a_mesh_behind_a_balancer_hits_like_one_node_and_loses_no_request(tmp_path: Path) -> None:
    picture = tmp_path / "demo.svg"
    mark, environment = marked()
    done = subprocess.run(
        [*COMMAND, "--picture", str(picture)],
        cwd=HOUSE, env=environment, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9 node 1" in done.stdout and "node 1 is back" in done.stdout
    assert "No request failed." in done.stdout
    assert not left_over(mark)
    drawn = ElementTree.parse(picture)
    words = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"one node", "3 nodes, no mesh", "3 nodes, one mesh", "kill -9 node 1"} <= words


def test_ctrl_c_ends_every_process_that_it_started() -> None:
    mark, environment = marked()
    with subprocess.Popen(
        COMMAND, cwd=HOUSE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "ready behind the load balancer" in line:
                break
        assert len(left_over(mark)) == 4, (
            demo.stderr and demo.stderr.read()
        )  # itself, engines, node, balancer
        demo.send_signal(signal.SIGINT)
        _, told = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 128 + signal.SIGINT
    assert told.strip() == "ending all processes ..."
    assert not left_over(mark)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HOUSE / "scripts")
    return import_module("demo_client")


@pytest.fixture
def figures(client: ModuleType) -> ModuleType:
    return import_module("demo_figures")


def event(document: Any) -> bytes:
    data = b"data: " + json.dumps(document).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WORD = event({"choices": [{"delta": {"content": "word "}}]})
USAGE = event(
    {"choices": [], "usage": {"prompt_tokens": 8, "prompt_tokens_details": {"cached_tokens": 6}}},
)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


async def asked(client: ModuleType, *answers: bytes) -> Any:
    """What the client makes of these answers, one per connection, the last one again and again."""
    count = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal count
        data = answers[min(count, len(answers) - 1)]
        count += 1
        await stream.receive_some()
        await stream.send_all(data)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, serve, [listener])
        answer = await client.ask(listener.socket.getsockname()[1], {"model": "sim"}, trio.current_time())
        nursery.cancel_scope.cancel()
    return answer


async def test_a_whole_answer_is_noted_as_the_engine_counted_it(client: ModuleType) -> None:
    answer = await asked(client, HEAD + WORD + WORD + USAGE + DONE)
    assert (answer.problem, answer.text, answer.reconnects) == ("", "word word ", 0)
    assert (answer.prompt_tokens, answer.cached_tokens) == (8, 6)
    assert answer.ttft_s > 0.0


async def test_an_answer_that_breaks_is_asked_for_again_and_its_half_is_forgotten(client: ModuleType) -> None:
    answer = await asked(client, HEAD + WORD, b"", HEAD + WORD + USAGE + DONE)
    assert (answer.problem, answer.text, answer.reconnects) == ("", "word ", 2)
    assert answer.ttft_s > 2 * client.PAUSE_S  # the time of the tries that broke counts


async def test_answers_that_break_for_ever_are_a_failure(client: ModuleType) -> None:
    answer = await asked(client, HEAD + WORD)
    assert "closed before the answer ended" in answer.problem
    assert answer.reconnects == client.TRIES - 1


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy", "status 503: busy"),
        (HEAD + WORD + b"0\r\n\r\n", "the stream ended early"),
        (HEAD + event({"error": "gone"}) + DONE, "failure frame: gone"),
    ],
)
async def test_an_answer_that_is_an_error_is_not_asked_for_again(
    client: ModuleType, data: bytes, problem: str
) -> None:
    answer = await asked(client, data)
    assert (answer.problem, answer.reconnects) == (problem, 0)


def test_figures_are_of_tokens_and_of_those_that_were_answered(
    figures: ModuleType, client: ModuleType
) -> None:
    answers = [
        client.Answer(0.1, ttft_s=0.1, prompt_tokens=100, cached_tokens=0),
        client.Answer(2.0, reconnects=1, ttft_s=0.3, prompt_tokens=300, cached_tokens=300),
        client.Answer(2.1, reconnects=4, problem="gone"),
    ]
    act = figures.Act("one node", answers, [], 0)
    assert act.hit_ratio == 0.75
    assert act.ttft_mean_s == 0.2
    assert (act.ttft_s(0.0), act.ttft_s(0.99)) == (0.1, 0.3)
    assert act.hits_over_time()[0] == (figures.WINDOW_S / 2, 0.0)
    assert act.hits_over_time()[-1][1] == 1.0
    row = figures.table([act])[2].split()
    assert row == ["one", "node", "75.0%", "1.00", "200", "ms", "300", "ms", "300", "ms", "3", "5", "1"]


def test_a_run_that_went_wrong_is_told_so(client: ModuleType, figures: ModuleType) -> None:
    story = import_module("demo_story")

    def act(title: str, cached_tokens: int, problem: str = "", in_flight: int = 0) -> Any:
        answer = client.Answer(0.0, prompt_tokens=100, cached_tokens=cached_tokens)
        failed = [client.Answer(0.0, problem=problem)] if problem else []
        return figures.Act(title, [answer, *failed], [], in_flight)

    good = [act("one", 80), act("strangers", 40), act("mesh", 78)]
    assert story.judge(good) == []
    assert story.judge([*good[:2], act("mesh", 78, problem="status 503")]) == ["mesh: failed: status 503"]
    assert "still counted" in story.judge([act("one", 80, in_flight=1), *good[1:]])[0]
    assert "as one node" in story.judge([*good[:2], act("mesh", 60)])[0]
    assert "without a mesh" in story.judge([good[0], act("strangers", 79), good[2]])[0]
