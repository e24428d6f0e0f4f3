"""What a request costs its tenant in the end, over real sockets: reserved, settled, refunded (ADM-4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.fake_worker import (
    CHUNKED,
    DONE,
    END,
    JSON,
    SSE_HEAD,
    Gate,
    Turn,
    answers,
    breaks,
    chunk,
    closes,
    event,
    hangs,
    head,
    says,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, request
from tests.e2e.tenants import (
    BLUE,
    ENDPOINTS,
    LIMITED,
    RED,
    left,
    limited,
    red,
    still,
    told,
    usage,
)


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        (CHAT, {**HELLO, "max_tokens": 500}, 501),
        (CHAT, {**HELLO, "max_completion_tokens": 500, "max_tokens": 3}, 501),
        (CHAT, {**HELLO, "max_tokens": 50, "n": 4}, 201),
        (
            "/v1/messages",
            {"model": "m", "max_tokens": 300, "messages": [{"role": "user", "content": "x" * 400}]},
            400,
        ),
        ("/v1/responses", {"model": "m", "input": "x" * 41, "max_output_tokens": 200}, 211),
        ("/v1/completions", {"model": "m", "prompt": ["x" * 40, "y" * 40], "max_tokens": 100}, 221),
        ("/v1/completions", {"model": "m", "prompt": [1] * 70, "max_tokens": 30}, 100),
        ("/generate", {"model": "m", "text": "x" * 80, "sampling_params": {"max_new_tokens": 60}}, 80),
        ("/v1/embeddings", {"model": "m", "input": "x" * 400, "max_tokens": 999}, 100),
        ("/v1/embeddings", {"model": "m", "input": [[1] * 30, [2] * 20]}, 50),
        ("/rerank", {"model": "m", "query": "q" * 40, "documents": ["d" * 80, {"text": "e" * 40}]}, 50),
        (
            "/v1/messages/count_tokens",
            {"model": "m", "messages": [{"role": "user", "content": "x" * 4000}]},
            0,
        ),
    ],
)
async def test_adm_4_characters_and_the_endpoints_own_bound_are_reserved(
    path: str, body: dict[str, Any], asked: int, tmp_path: Path
):
    async with limited(tmp_path, red(tokens=100_000)) as (gateway, worker):
        gate = Gate()
        worker.play = gate.before(worker.play)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.ask, path, body, RED)
            await gate.reached.wait()
            limits = gateway.node.accounting.limits
            assert limits is not None
            (bucket,) = limits.buckets()
            assert bucket._balance == pytest.approx(100_000 - asked)
            gate.open.set()


async def test_adm_4_an_answer_is_settled_with_its_usage(tmp_path: Path):
    async with still(tmp_path, red(tokens=10_000)) as (gateway, worker):
        worker.play = answers(200, told(100, 50, prompt_tokens_details={"cached_tokens": 40}))
        assert (await gateway.ask(CHAT, {**HELLO, "max_tokens": 9000}, RED)).status == 200
        assert left(gateway) == 9850
        assert await usage(gateway) == {
            "requests": 1, "prompt": 100, "cached": 40, "completion": 50, "estimated": 0,
        }  # fmt: skip
        for kind, count in (("prompt", 100), ("cached", 40), ("completion", 50)):
            assert gateway.metric("smg_tenant_tokens_total", tenant="auth:red", model="m", kind=kind) == count


async def test_adm_4_more_than_the_estimate_is_owed(tmp_path: Path):
    async with limited(tmp_path, red(tokens=1000)) as (gateway, worker):
        worker.play = answers(200, told(900, 600))
        assert (await gateway.ask(CHAT, HELLO, RED)).status == 200
        answer = await gateway.ask(CHAT, HELLO, RED)
        assert answer.is_error(429, LIMITED) and 15 <= int(answer["retry-after"]) <= 31
        assert gateway.metric("smg_tenant_rejected_total", tenant="auth:red", reason="tokens") == 1


PIECE = event({"id": "c", "choices": [{"index": 0, "delta": {"content": "word"}}]})
MESSAGE = [
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"x","usage":{"input_tokens":70,'
    b'"cache_read_input_tokens":20,"cache_creation_input_tokens":10,"output_tokens":1}}}\n\n',
    *[
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
        b'"text":"word"}}\n\n'
    ] * 30,
]  # fmt: skip
MESSAGE_END = [
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":33}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]


@pytest.mark.parametrize(
    ("path", "pieces", "used", "is_estimate"),
    [
        (CHAT, [PIECE] * 5 + [event(told(100, 20)), DONE], (100, 20), False),
        (CHAT, [PIECE] * 300 + [event(told(100, 300)), DONE], (100, 300), False),
        (CHAT, [PIECE] * 25 + [DONE], (1, 25), True),
        ("/v1/messages", [*MESSAGE, *MESSAGE_END], (100, 33), False),
        (
            "/generate",
            [
                event({"text": "a" * n, "meta_info": {"prompt_tokens": 7, "completion_tokens": n}})
                for n in (1, 2)
            ]
            + [DONE],
            (7, 2),
            False,
        ),
    ],
)
async def test_adm_4_a_stream_is_settled_from_its_last_events(
    path: str, pieces: list[bytes], used: tuple[int, int], is_estimate: bool, tmp_path: Path
):
    async with still(tmp_path, red(tokens=100_000)) as (gateway, worker):
        worker.play = streams(*pieces)
        body = {**ENDPOINTS[path], "stream": True}
        assert (await gateway.ask(path, body, RED)).status == 200
        found = await usage(gateway)
        assert (found["prompt"], found["completion"], found["estimated"]) == (*used, int(is_estimate))
        assert left(gateway) == 100_000 - sum(used)


async def test_a_long_stream_without_usage_is_estimated_from_its_tail(tmp_path: Path):
    async with limited(tmp_path, red(tokens=100_000)) as (gateway, worker):
        worker.play = streams(*[PIECE] * 2000, DONE)
        assert (await gateway.ask(CHAT, STREAM, RED)).status == 200
        found = await usage(gateway)
        assert 1900 <= found["completion"] <= 2300 and found["estimated"] == 1


@pytest.mark.parametrize(
    ("document", "used", "is_estimate"),
    [
        ({"text": "abc", "meta_info": {"prompt_tokens": 11, "completion_tokens": 12}}, (11, 12), False),
        ([{"text": "a" * 40, "meta_info": {"prompt_tokens": 1, "completion_tokens": 1}}] * 2, None, True),
        ({"text": "x" * 4000}, (1, 1003), True),
    ],
)
async def test_plain_answers_in_other_words_or_without_usage(
    document: Any, used: tuple[int, int] | None, is_estimate: bool, tmp_path: Path
):
    async with limited(tmp_path, red(tokens=100_000)) as (gateway, worker):
        worker.play = answers(200, document)
        await gateway.ask("/generate", ENDPOINTS["/generate"], RED)
        found = await usage(gateway)
        assert found["estimated"] == int(is_estimate)
        if used is not None:
            assert (found["prompt"], found["completion"]) == used
        worker.play = answers(200, {"data": [{"embedding": [0.5] * 500}]})
        await gateway.ask("/v1/embeddings", {"model": "m", "input": "x" * 40}, RED)
        after = await usage(gateway)
        assert (after["prompt"] - found["prompt"], after["completion"] - found["completion"]) == (10, 0)


async def test_a_large_plain_answer_is_settled_from_its_end(tmp_path: Path):
    async with limited(tmp_path, red(tokens=100_000)) as (gateway, worker):
        body = b'{"text": "' + b"x" * 200_000 + b'", "usage": {"prompt_tokens": 30, "completion_tokens": 40}}'
        worker.play = says(
            head(200, f"content-type: {JSON}", CHUNKED),
            *(chunk(body[i : i + 9000]) for i in range(0, len(body), 9000)),
            END,
        )
        assert (await gateway.ask(CHAT, HELLO, RED)).status == 200
        found = await usage(gateway)
        assert (found["prompt"], found["completion"], found["estimated"]) == (30, 40, 0)


@pytest.mark.parametrize("how", ["leaves", "resets"])
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "openai with usage in each event"])
async def test_adm_4_who_leaves_pays_for_what_was_streamed(dialect: str, how: str, tmp_path: Path):
    async with still(tmp_path, red(tokens=100_000)) as (gateway, worker):
        more = event({"choices": [], **told(55, 44)})
        pieces = {"openai": [PIECE] * 30, "anthropic": MESSAGE}.get(dialect, [PIECE] * 30 + [more])

        async def play(turn: Turn) -> None:
            await turn.send(SSE_HEAD, *map(chunk, pieces))
            await turn.wait_gone()

        worker.play = play
        path = "/v1/messages" if dialect == "anthropic" else CHAT
        body = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 90_000}
        client = await gateway.connect()
        await client.send(request(path, {**body, "stream": True}, RED))
        await client.read_head()
        missing = sum(map(len, pieces))
        while missing:
            missing -= len(await client.read_chunk() or b"")
        assert left(gateway) == 9900
        if how == "leaves":
            await client.leave()
        else:
            client.reset()
        gateway.clients.remove(client)
        await eventually(lambda: left(gateway) > 90_000)
        found = await usage(gateway)
        expected = {"openai": (100, 30), "anthropic": (100, 30)}.get(dialect, (55, 44))
        assert found["prompt"] == expected[0] and abs(found["completion"] - expected[1]) <= 2
        assert found["estimated"] == 1
        assert abs(left(gateway) - (100_000 - sum(expected))) <= 20


async def test_adm_4_who_leaves_before_the_first_byte_pays_for_the_prompt(tmp_path: Path):
    async with still(tmp_path, red(requests=100, tokens=100_000)) as (gateway, worker):
        worker.play = hangs
        client = await gateway.connect()
        body = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 5000}
        await client.send(request(CHAT, body, RED))
        await worker.next_turn()
        client.reset()
        gateway.clients.remove(client)
        await eventually(lambda: left(gateway) == 99_900)
        assert left(gateway, "requests") == 99


async def test_adm_4_who_leaves_the_queue_gets_everything_back(tmp_path: Path):
    more = "--max-concurrent-requests", "1"
    async with still(tmp_path, red(requests=10, tokens=100_000), *more) as (gateway, worker):
        gate = Gate()
        worker.play = gate.before(worker.play)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.ask, CHAT, HELLO, BLUE)
            await gate.reached.wait()
            client = await gateway.connect()
            await client.send(request(CHAT, {**HELLO, "max_tokens": 5000}, RED))
            await eventually(lambda: gateway.node._admission.waiting == 1)
            assert left(gateway) < 96_000
            client.reset()
            gateway.clients.remove(client)
            await eventually(lambda: left(gateway) == 100_000)
            assert left(gateway, "requests") == 10
            gate.open.set()


@pytest.mark.parametrize(
    ("play", "status", "requests_left", "tokens_left"),
    [
        (closes, 502, 50, 10_000),
        (answers(500, {"error": "ill"}), 500, 50, 10_000),
        (answers(503, {"error": "full"}), 503, 50, 10_000),
        (answers(429, {"error": "full"}), 429, 50, 10_000),
        (answers(400, {"error": "bad"}), 400, 49, 10_000),
        (answers(404, {"error": "bad"}), 404, 49, 10_000),
        (breaks(head(200, length=100), b"half"), 502, 50, 10_000),
        (answers(200, told(5, 5)), 200, 49, 9_990),
    ],
)
async def test_adm_4_nothing_answered_nothing_paid(
    play: Any, status: int, requests_left: int, tokens_left: int, tmp_path: Path
):
    text = red(requests=50, tokens=10_000)
    async with still(tmp_path, text, "--disable-retries", "--disable-circuit-breaker") as (gateway, worker):
        worker.play = play
        answer = await gateway.ask(CHAT, {**HELLO, "max_tokens": 5000}, RED)
        assert answer.status == status
        assert (left(gateway, "requests"), left(gateway)) == (requests_left, tokens_left)


async def test_adm_4_a_retry_is_paid_once_and_a_stream_that_dies_for_what_it_brought(tmp_path: Path):
    async with still(tmp_path, red(requests=50, tokens=10_000), "--retry-initial-backoff-ms", "1") as (
        gateway,
        worker,
    ):
        worker.plays += [answers(500, {}), answers(500, {})]
        worker.play = answers(200, told(7, 3))
        assert (await gateway.ask(CHAT, HELLO, RED)).status == 200
        assert (await usage(gateway))["requests"] == 1 and left(gateway) == 9_990
        worker.play = breaks(SSE_HEAD, *[chunk(PIECE)] * 40)
        assert (await gateway.ask(CHAT, STREAM, RED)).status == 200
        found = await usage(gateway)
        assert found["requests"] == 2 and 40 <= found["completion"] - 3 <= 42


async def test_adm_4_a_refusal_by_admission_takes_nothing(tmp_path: Path):
    more = "--max-concurrent-requests", "1", "--queue-size", "0"
    async with limited(tmp_path, red(requests=10), *more) as (gateway, worker):
        gate = Gate()
        worker.play = gate.before(worker.play)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.ask, CHAT, HELLO, BLUE)
            await gate.reached.wait()
            for _ in range(20):
                answer = await gateway.ask(CHAT, HELLO, RED)
                assert answer.is_error(429, "admission_queue_full")
                assert answer["x-ratelimit-remaining-requests"] == "10"
            gate.open.set()
