"""`smg engine` on real sockets: its paths, its cache, its faults, and clients that leave."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import socket
import sys
from typing import Any

import pytest
import trio

from smg.lab.engine import CannotListen, add_arguments, listeners
from tests.smg.lab.conftest import FAST, Answer, Start, arguments, ask, connect, request

LONG = "the same long system prompt of many words " * 20


def chat(content: str = "hello", **members: Any) -> bytes:
    return json.dumps(
        {"model": "sim", "messages": [{"role": "user", "content": content}], **members}
    ).encode()


def events(answer: Answer) -> list[str]:
    return [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]


async def post(url: str, path: str, document: Any) -> Any:
    answer = await ask(
        url, "POST", path, document if isinstance(document, bytes) else json.dumps(document).encode()
    )
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


async def get(url: str, path: str) -> Any:
    answer = await ask(url, "GET", path)
    assert answer.status == 200, (path, answer.body)
    return json.loads(answer.body)


async def settled(url: str) -> dict[str, Any]:
    """The engine's state once nothing runs or waits."""
    with trio.fail_after(5):
        while True:
            state: dict[str, Any] = await get(url, "/lab/state")
            if not state["running"] and not state["waiting"]:
                return state
            await trio.sleep(0.02)


# Answers


async def test_a_prompt_seen_before_is_cached(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        first = await post(url, "/v1/chat/completions", chat(LONG))
        again = await post(url, "/v1/chat/completions", chat(LONG))
    tokens = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert tokens - 16 <= again["usage"]["prompt_tokens_details"]["cached_tokens"] < tokens
    assert first["choices"][0]["message"] == again["choices"][0]["message"]


async def test_a_stream_tells_the_same_text_as_a_plain_answer(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        plain = await post(url, "/v1/chat/completions", chat(LONG))
        answer = await ask(
            url,
            "POST",
            "/v1/chat/completions",
            chat(LONG, stream=True, stream_options={"include_usage": True}),
        )
    assert answer.headers["content-type"] == "text/event-stream"
    *chunks, last = events(answer)
    assert last == "[DONE]"
    documents = [json.loads(chunk) for chunk in chunks]
    text = "".join(
        choice["delta"].get("content") or "" for document in documents for choice in document["choices"]
    )
    assert text == plain["choices"][0]["message"]["content"]
    assert documents[-1]["choices"] == []
    assert documents[-1]["usage"]["completion_tokens"] == 32
    assert documents[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("members", "tokens", "reason"),
    [
        ({}, 32, "stop"),
        ({"max_tokens": 5}, 5, "length"),
        ({"max_completion_tokens": 1, "max_tokens": 9}, 1, "length"),
        ({"max_tokens": 40}, 32, "stop"),
        ({"max_tokens": 40, "ignore_eos": True}, 40, "length"),
    ],
)
async def test_the_length_of_an_answer_is_the_engines_cut_at_the_clients_limit(
    start_engines: Start, members: dict[str, Any], tokens: int, reason: str
) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        answer = await post(url, "/v1/chat/completions", chat(**members))
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == reason


async def test_the_other_inference_endpoints_answer_in_their_shapes(start_engines: Start) -> None:
    async with start_engines(*FAST, "--engine", "sglang") as [(_, url)]:
        completion = await post(url, "/v1/completions", {"model": "sim", "prompt": [1, 2, 3], "n": 2})
        assert [choice["index"] for choice in completion["choices"]] == [0, 1]
        assert completion["usage"]["prompt_tokens"] == 3
        generated = await post(url, "/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 4}})
        assert generated["meta_info"]["completion_tokens"] == 4
        assert generated["meta_info"]["finish_reason"]["type"] == "length"
        streamed = await ask(url, "POST", "/generate", json.dumps({"text": "hello", "stream": True}).encode())
        texts = [json.loads(event)["text"] for event in events(streamed)[:-1]]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert len(texts) == 32
        ranked = await post(url, "/v1/rerank", {"query": "red fox", "documents": ["dog", "a red fox", "red"]})
        assert [row["index"] for row in ranked] == [0, 1, 2]
        assert ranked[1]["score"] > ranked[2]["score"] > ranked[0]["score"]
        classes = await post(url, "/v1/classify", {"model": "sim", "input": ["a", "b"]})
        assert [sum(row["probs"]) for row in classes["data"]] == [pytest.approx(1.0)] * 2
        counted = await post(
            url, "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * 35}]}
        )
        assert 9 <= counted["input_tokens"] <= 13
    async with start_engines(*FAST) as [(_, url)]:
        ranked = await post(
            url, "/v1/rerank", {"query": "red fox", "documents": ["dog", "red fox"], "top_n": 1}
        )
        assert [row["index"] for row in ranked["results"]] == [1]


async def test_an_upload_is_transcribed(start_engines: Start) -> None:
    body = b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n' + b"\x00" * 32_000 + b"\r\n--b--\r\n"
    headers = ["content-type: multipart/form-data; boundary=b"]
    async with start_engines(*FAST) as [(_, url)]:
        answer = await ask(url, "POST", "/v1/audio/transcriptions", body, headers)
        assert json.loads(answer.body)["text"].count(" ") == 7
        assert (await ask(url, "POST", "/v1/audio/transcriptions", b"{}")).status == 415


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b'{"model":"sim"}', 400),
        ("POST", "/v1/chat/completions", b'{"\x80":1}', 400),
        ("POST", "/v1/chat/completions", b'{"model":"other","messages":[{}]}', 404),
        ("POST", "/v1/chat/completions", b'{"model":[],"messages":[{}],"max_tokens":0}', 400),
        ("POST", "/v1/messages", b'{"model":"sim","messages":[{"role":"user","content":"x"}]}', 400),
        ("POST", "/v1/embeddings", b'{"model":"sim"}', 400),
        ("POST", "/v1/responses", b'{"model":"sim","input":"x","previous_response_id":"r"}', 404),
        ("POST", "/generate", b"{}", 400),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/nothing", b"", 404),
    ],
)
async def test_what_an_engine_cannot_serve_it_refuses(
    start_engines: Start, method: str, path: str, body: bytes, status: int
) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        answer = await ask(url, method, path, body)
    assert answer.status == status
    assert json.loads(answer.body)["error"]["message"]


# Words about itself


@pytest.mark.parametrize(
    ("flavour", "there", "missing"),
    [
        (
            "vllm",
            ["/health", "/v1/models", "/version", "/metrics", "/v1/loads"],
            ["/server_info", "/get_load"],
        ),
        (
            "sglang",
            [
                "/health",
                "/health_generate",
                "/server_info",
                "/get_server_info",
                "/get_load",
                "/v1/loads",
                "/metrics",
            ],
            ["/version"],
        ),
        ("generic", ["/health", "/v1/models"], ["/version", "/server_info", "/metrics", "/v1/loads"]),
    ],
)
async def test_each_flavour_has_the_paths_of_its_engine(
    start_engines: Start, flavour: str, there: list[str], missing: list[str]
) -> None:
    async with start_engines(*FAST, "--engine", flavour) as [(_, url)]:
        assert [(await ask(url, "GET", path)).status for path in there] == [200] * len(there)
        assert [(await ask(url, "GET", path)).status for path in missing] == [404] * len(missing)


@pytest.mark.parametrize("flavour", ["vllm", "sglang"])
async def test_load_is_told_truly_and_the_gateways_own_readers_understand_it(
    start_engines: Start, flavour: str
) -> None:
    from smg.fleet.engine_metrics import combined, loads_ranks, metrics_ranks

    words = (
        "--engine",
        flavour,
        "--slots",
        "2",
        "--decode-ms",
        "1000",
        "--ttft-ms",
        "1",
        "--kv-blocks",
        "100",
    )
    async with start_engines(*words) as [(engine, url)]:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, url, "POST", "/v1/chat/completions", chat(str(number) * 100), (), 60)
            with trio.fail_after(5):
                while engine.engine.model.running < 2 or engine.engine.model.waiting < 3:
                    await trio.sleep(0.01)
            texts = (await ask(url, "GET", "/metrics")).body, (await ask(url, "GET", "/v1/loads")).body
            for ranks in (metrics_ranks(texts[0]), loads_ranks(texts[1])):
                report = combined(ranks, 0.0)
                assert report is not None
                assert (report.running, report.waiting) == (2, 3)
                assert report.kv_usage is not None
                assert 0.0 < report.kv_usage < 1.0
                assert report.kv_capacity_tokens == 1600
            told = combined(loads_ranks(texts[1]), 0.0)
            assert told is not None
            assert told.waiting_tokens is not None
            assert told.waiting_tokens > 60
            nursery.cancel_scope.cancel()


async def test_flushing_empties_the_cache(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        await post(url, "/v1/chat/completions", chat(LONG))
        assert (await ask(url, "POST", "/flush_cache")).status == 200
        assert (await get(url, "/lab/state"))["cached_blocks"] == 0
        again = await post(url, "/v1/chat/completions", chat(LONG))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_several_models_and_a_key(start_engines: Start) -> None:
    async with start_engines(*FAST, "--model", "a", "b", "--api-key", "secret") as [(_, url)]:
        assert (await ask(url, "GET", "/v1/models")).status == 401
        assert (await ask(url, "GET", "/health")).status == 200
        headers = ["authorization: Bearer secret"]
        listed = json.loads((await ask(url, "GET", "/v1/models", b"", headers)).body)
        assert [model["id"] for model in listed["data"]] == ["a", "b"]
        body = json.dumps({"model": "b", "prompt": "x"}).encode()
        assert json.loads((await ask(url, "POST", "/v1/completions", body, headers)).body)["model"] == "b"
        assert (
            await ask(url, "POST", "/v1/completions", body, ["authorization: Bearer wrong"])
        ).status == 401


# Clients that leave


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_ends_its_generation(start_engines: Start, is_stream: bool) -> None:
    async with start_engines("--decode-ms", "50", "--output-tokens", "2000") as [(_, url)]:
        async with await connect(url) as stream:
            await stream.send_all(request("POST", "/v1/chat/completions", chat(stream=is_stream)))
            if is_stream:
                await stream.receive_some()
            with trio.fail_after(5):
                while not (await get(url, "/lab/state"))["running"]:
                    await trio.sleep(0.01)
        with trio.fail_after(1):
            state = await settled(url)
    assert (state["finished_total"], state["used_blocks"]) == (0, 0)


async def test_clients_that_leave_while_they_wait_leave_the_queue(start_engines: Start) -> None:
    async with start_engines("--slots", "1", "--decode-ms", "50", "--output-tokens", "2000") as [
        (engine, url)
    ]:
        streams = [await connect(url) for _ in range(10)]
        for stream in streams:
            await stream.send_all(request("POST", "/v1/chat/completions", chat()))
        with trio.fail_after(5):
            while engine.engine.model.waiting < 9:
                await trio.sleep(0.01)
        for stream in streams:
            await stream.aclose()
        await settled(url)
    assert engine.engine._generations == {}


# Faults


async def order(url: str, **faults: Any) -> None:
    await post(url, "/lab/faults", faults)


async def test_ordered_errors_come_as_often_as_ordered(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        await order(url, error_rate=1.0, status=429, retry_after=7, count=2)
        answers = [await ask(url, "POST", "/v1/completions", b'{"prompt":"x"}') for _ in range(3)]
        assert [answer.status for answer in answers] == [429, 429, 200]
        assert answers[0].headers["retry-after"] == "7"
        await order(url, error_rate=0.5)
        statuses = {(await ask(url, "POST", "/v1/completions", b'{"prompt":"x"}')).status for _ in range(30)}
        assert statuses == {200, 500}
        assert (await ask(url, "DELETE", "/lab/faults")).status == 200
        assert (await get(url, "/lab/faults"))["error_rate"] == 0.0


async def test_a_stream_is_reset_after_the_ordered_events(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        await order(url, reset_after_chunks=3)
        answer = await ask(url, "POST", "/v1/chat/completions", chat(stream=True))
        assert (answer.status, answer.is_whole) == (200, False)
        assert len(events(answer)) <= 3  # a reset may overtake what was sent
        plain = await ask(url, "POST", "/v1/chat/completions", chat())
        assert not plain.is_whole
        await settled(url)


async def test_a_connection_is_closed_before_the_head_when_ordered(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(engine, url)]:
        await order(url, close_before_head=True, count=1)
        assert (await ask(url, "POST", "/v1/chat/completions", chat())).status == 0
        assert (await ask(url, "POST", "/v1/chat/completions", chat())).status == 200
        assert engine.requests_total == 2


@pytest.mark.parametrize("faults", [{"hang": True}, {"delay_s": 60}, {"stall_after_chunks": 0}])
async def test_silence_on_order_ends_when_the_client_leaves(
    start_engines: Start, faults: dict[str, Any]
) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        await order(url, **faults)
        with pytest.raises(trio.TooSlowError):
            await ask(url, "POST", "/v1/chat/completions", chat(stream=True), within_s=0.3)
        await settled(url)


async def test_health_can_be_ordered(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        await order(url, health_status=503)
        assert (await ask(url, "GET", "/health")).status == 503
        await order(url, health_hang=True)
        with pytest.raises(trio.TooSlowError):
            await ask(url, "GET", "/health", within_s=0.2)
        assert (await ask(url, "POST", "/v1/chat/completions", chat())).status == 200


async def test_an_order_that_makes_no_sense_is_refused(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)]:
        for body in (b"{", b'{"hang":"yes"}', b'{"hangs":true}'):
            assert (await ask(url, "POST", "/lab/faults", body)).status == 400
        assert (await get(url, "/lab/faults"))["hang"] is False


# The command


async def test_it_says_where_it_listens_one_line_per_engine(start_engines: Start) -> None:
    from tests.smg.lab.conftest import engines

    lines: list[str] = []
    async with engines("--count", "3", lines=lines) as running:
        assert lines == [f"smg engine listening on {url}" for _, url in running]
        assert len({url for _, url in running}) == 3
        for _, url in running:
            assert (await ask(url, "GET", "/health")).status == 200


def test_ports_in_a_row_or_by_name() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        taken = probe.getsockname()[1]
        probe.listen()
        with pytest.raises(CannotListen, match=str(taken)):
            listeners("127.0.0.1", [0, taken], None)
    with pytest.raises(CannotListen):
        listeners("127.0.0.1", [0, 0], 3)
    with pytest.raises(CannotListen):
        listeners("no.such.host.invalid", [0], None)
    bound = listeners("127.0.0.1", [0], 2)
    assert len(bound) == 2
    for listener in bound:
        listener.close()


@pytest.mark.parametrize(
    "words", [["--count", "0"], ["--speed", "0"], ["--ttft-ms", "-1"], ["--port", "70000"], ["--engine", "x"]]
)
def test_values_that_make_no_sense_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*words)


def test_the_help_names_every_flag() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for flag in ("--port", "--kv-blocks", "--decode-ms", "--api-key", "--seed", "--ttft-ms", "--slots"):
        assert flag in text


async def test_a_signal_ends_the_process_with_zero() -> None:
    command = [sys.executable, "-m", "smg", "engine", "--port", "0"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            lambda task_status: trio.run_process(command, stdout=sys.stderr, task_status=task_status)
        )
        with trio.fail_after(20):
            while not _listens(process.pid):
                await trio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def _listens(pid: int) -> bool:
    """Whether the process has a listening socket of its own."""
    import os

    try:
        inodes = {
            os.readlink(f"/proc/{pid}/fd/{number}")[8:-1]
            for number in os.listdir(f"/proc/{pid}/fd")
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:")
        }
    except OSError:
        return False
    with open("/proc/net/tcp") as table:
        return any(row[3] == "0A" and row[9] in inodes for row in (line.split() for line in table))
