"""The flags about caches on a whole node: KV events, a recorded trace, block sizes, a TTL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from smg.lab import trace
from tests.e2e.fake_worker import answers, fake_worker, fake_workers
from tests.e2e.gateway import CHAT, Gateway, eventually, running_gateway

COMPLETIONS = "/v1/completions"
USAGE = {
    "usage": {"prompt_tokens": 900, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 512}}
}


def prompt(seed: int, count: int = 1024) -> list[int]:
    return [(seed * 7919 + number * 31) % 50_000 for number in range(count)]


def ids(tokens: list[int]) -> dict[str, Any]:
    return {"model": "m", "prompt": tokens}


async def matched(gateway: Gateway, document: dict[str, Any], path: str = COMPLETIONS) -> dict[str, int]:
    answer = await gateway.ask(f"/route/explain?endpoint={path}", document)
    return {row["worker_id"]: row["matched_blocks"] for row in answer.document["workers"]}


async def test_kv_events_make_token_prompts_exact():
    zmq = pytest.importorskip("zmq")
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
    publisher.bind("tcp://127.0.0.1:*")
    port = int(publisher.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])

    def say(number: int, *events: Any) -> None:
        payload = msgspec.msgpack.encode([1.0, list(events), 0])
        publisher.send_multipart([b"", number.to_bytes(8, "big"), payload])

    try:
        async with (
            fake_workers(2, "m") as workers,
            running_gateway("--kv-events", f"tcp://{{host}}:{port}", workers=workers) as gateway,
        ):
            for _ in workers:
                await eventually(lambda: publisher.poll(0))
                assert publisher.recv() == b"\x01"
            tokens = prompt(1)
            say(0, ["BlockStored", list(range(1, 65)), None, tokens, 16, None])
            await eventually(lambda: gateway.metric("smg_kv_events_total", what="batch") >= len(workers))
            assert await matched(gateway, ids(tokens)) == {worker.id: 8 for worker in workers}
            say(1, ["BlockRemoved", list(range(33, 65))])
            await eventually(lambda: gateway.metric("smg_kv_events_total", what="batch") >= 2 * len(workers))
            assert await matched(gateway, ids(tokens)) == {worker.id: 4 for worker in workers}
            say(2, ["AllBlocksCleared"])
            await eventually(lambda: gateway.metric("smg_kv_events_total", what="batch") >= 3 * len(workers))
            assert await matched(gateway, ids(tokens)) == {worker.id: 0 for worker in workers}
    finally:
        context.destroy(linger=0)


async def test_a_trace_is_recorded_and_can_be_simulated(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--record-trace", str(path), "--policy", "round_robin", workers=workers) as gateway,
    ):
        for worker in workers:
            worker.play = answers(200, USAGE)
        for number in range(6):
            await gateway.ask(
                CHAT, {"model": "m", "messages": [{"role": "user", "content": f"{number % 2} " * 1800}]}
            )
        workers[0].play = workers[1].play = answers(400, {"error": "no"})
        await gateway.ask(CHAT, {"model": "m", "messages": [{"role": "user", "content": "bad"}]})
        await eventually(lambda: gateway.metric("smg_trace_lines_total", result="written") == 6)
    found = trace.load(path)
    assert [(request.prompt_tokens, request.output_tokens) for request in found.requests] == [(900, 7)] * 6
    assert len({request.blocks for request in found.requests}) == 2
    assert all(len(request.blocks) == 7 for request in found.requests)


async def test_blocks_follow_the_engines_block_size():
    async with (
        fake_worker("m") as worker,
        running_gateway("--block-size", "200", workers=[worker]) as gateway,
    ):
        answer = await gateway.ask(f"/route/explain?endpoint={COMPLETIONS}", ids(prompt(1, 1000)))
        assert answer.document["prompt"]["blocks"] == 5
        text = {"model": "m", "messages": [{"role": "user", "content": "x" * 8000}]}
        assert (await gateway.ask("/route/explain", text)).document["prompt"] == {
            "chars": 8000,
            "blocks": 10,
            "block_chars": 800,
        }


async def test_what_was_not_used_for_the_ttl_is_not_believed():
    flags = "--cache-ttl-secs", "0.2", "--eviction-interval-secs", "0.05"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.play = answers(200, USAGE)
        await gateway.ask(COMPLETIONS, ids(prompt(1)))
        assert await matched(gateway, ids(prompt(1))) == {worker.id: 8}
        await trio.sleep(0.5)
        await eventually(lambda: gateway.metric("smg_cache_index_entries") == 0)
        assert await matched(gateway, ids(prompt(1))) == {worker.id: 0}
