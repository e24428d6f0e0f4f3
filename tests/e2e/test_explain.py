"""EXP-1 to EXP-4 and receipts over real sockets: what explain says is what happens next, and asking changes nothing."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
import trio

from smg.fleet.worker import Status
from smg.policies import POLICIES
from tests.e2e.fake_worker import answers, fake_worker, fake_workers, resets, streams
from tests.e2e.gateway import CHAT, HELLO, Answer, Gateway, running_gateway
from tests.e2e.test_pd import pairs

EXPLAIN = "/route/explain"
RECEIPT = "x-smg-explain: 1"
WORDS = ["river", "stone", "meadow", "cloud", "amber", "quiet", "harvest", "window", "lantern", "copper"]


def text_of(seed: int, blocks: int) -> str:
    rng = Random(seed)
    text = ""
    while len(text) < 512 * blocks:
        text += rng.choice(WORDS) + " "
    return text[: 512 * blocks]


def chat(text: str, **members: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **members}


def usage(prompt: int, cached: int) -> dict[str, Any]:
    told = {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return {"object": "chat.completion", "choices": [], "usage": told}


async def explained(gateway: Gateway, document: Any, *headers: str, query: str = "") -> dict[str, Any]:
    answer = await gateway.ask(EXPLAIN + query, document, *headers)
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.document
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers are equal, but for what drains with time by itself: seconds."""
    for row, twin in zip(one["workers"], other["workers"], strict=True):
        assert (row["cost"] is None) is (twin["cost"] is None)
        assert row["cost"] is None or row["cost"] == pytest.approx(twin["cost"], rel=0.02, abs=1e-3)
    return timeless(one) == timeless(other)


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    rows = [{**row, "cost": None, "terms": None} for row in found["workers"]]
    return {**found, "workers": rows}


def receipt_of(answer: Answer) -> dict[str, Any]:
    value = answer["x-smg-explain"]
    assert value.isascii() and len(value) <= 2048 and "http" not in value and "127.0.0.1" not in value
    found: dict[str, Any] = json.loads(value)
    return found


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", [1, 2])
async def test_exp_4_the_next_request_goes_where_explain_said(policy, seed):
    rng = Random(seed)
    async with (
        fake_workers(4, "m") as workers,
        running_gateway("--policy", policy, workers=workers, seed=seed) as gateway,
    ):
        for worker in workers:
            worker.play = answers(200, usage(400, 0))
        client = await gateway.connect()
        for _ in range(40):
            document = chat(text_of(rng.randrange(4), rng.randrange(1, 8)) + text_of(rng.randrange(99), 1))
            headers = [f"x-smg-routing-key: k{rng.randrange(5)}"] if rng.random() < 0.3 else []
            found = await explained(gateway, document, *headers)
            assert same(found, await explained(gateway, document, *headers))  # EXP-1
            answer = await client.ask(CHAT, document, *headers)
            assert answer.status == 200
            if found["chosen"] is None:
                assert gateway.node._policies.policy_for("m").is_random
                assert found["candidates"] == [worker.id for worker in workers]
            else:
                assert answer.worker == found["chosen"]
            assert sum(row["rank"] == 1 for row in found["workers"]) == 1


async def test_exp_1_asking_moves_no_counter_and_no_random_state():
    async with fake_workers(3, "m") as workers, running_gateway(workers=workers) as gateway:
        before = gateway.node._choice_rng.getstate()
        for number in range(5):
            await explained(gateway, chat(text_of(number, 3)))
        assert gateway.node._choice_rng.getstate() == before
        assert gateway.node._caches.index.entries == 0
        for family in ("cache_prompt_chars", "cache_matched_chars", "worker_selection", "router_requests"):
            assert gateway.metric(f"smg_{family}_total") == 0
        assert all(worker.turns == [] for worker in workers)


async def test_what_is_cached_is_explained_in_blocks_of_the_index():
    async with fake_workers(3, "m") as workers, running_gateway(workers=workers) as gateway:
        history = text_of(1, 9)
        holder = (await gateway.ask(CHAT, chat(history))).worker
        found = await explained(gateway, chat(history + text_of(2, 1) + "and a beginning"))
        assert found["policy"] == "cache_aware" and found["decided_by"] == "policy"
        assert found["prompt"] == {"chars": 5135, "blocks": 10, "block_chars": 512}
        assert found["chosen"] == holder
        rows = {row["worker_id"]: row for row in found["workers"]}
        assert rows[holder]["matched_blocks"] == 9
        assert rows[holder]["matched_ratio"] == pytest.approx(0.9)
        for row in found["workers"]:
            terms = row["terms"]
            assert row["cost"] == pytest.approx(terms["wait"] + terms["prefill"] + terms["penalty"])
            assert (row["rank"] == 1) is (row["worker_id"] == holder)
        assert min(row["cost"] for row in found["workers"]) == rows[holder]["cost"]


async def test_threshold_mode_says_how_much_of_the_prompt_decided():
    flags = "--cache-aware-mode", "threshold"
    async with fake_workers(3, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        holder = (await gateway.ask(CHAT, chat(text_of(1, 9)))).worker
        found = await explained(gateway, chat(text_of(1, 9) + text_of(2, 1)))
        assert found["chosen"] == holder
        row = next(row for row in found["workers"] if row["worker_id"] == holder)
        assert row["reason"] == "longest prefix 90% > 30%"
        assert row["cost"] is None


async def test_exp_3_who_decided_and_who_was_left_out():
    async with fake_workers(3, "m") as workers, running_gateway(workers=workers) as gateway:
        target = await explained(gateway, chat("hi"), f"x-smg-target-worker: {workers[1].id}")
        assert (target["chosen"], target["decided_by"]) == (workers[1].id, "target")
        assert {row["excluded_by"] for row in target["workers"]} == {None, "target"}
        for worker in workers[:2]:
            gateway.worker(worker).in_flight += 1  # else it would leave
            gateway.node.registry.drain(gateway.worker(worker), trio.current_time())
        lone = await explained(gateway, chat("hi"))
        assert (lone["chosen"], lone["decided_by"]) == (workers[2].id, "only_candidate")
        assert [row["excluded_by"] for row in lone["workers"]] == ["draining", "draining", None]
        gateway.node.registry.set_status(gateway.worker(workers[2]), Status.NOT_READY, 0.0)
        none = await explained(gateway, chat("hi"))
        assert none["chosen"] is None and none["candidates"] == []
        assert [row["excluded_by"] for row in none["workers"]] == ["draining", "draining", "status"]
        for worker in workers[:2]:
            gateway.worker(worker).in_flight -= 1


async def test_an_unknown_model_or_endpoint_is_an_error():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask(EXPLAIN, {**HELLO, "model": "other"})).status == 404
        assert (await gateway.ask(EXPLAIN + "?endpoint=/nowhere", HELLO)).is_error(400, "invalid_value")
        answer = await gateway.ask(EXPLAIN, {"model": "m"})
        assert answer.is_error(400, "missing_required_parameter")


# -- receipts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_receipt_says_what_explain_said_before(is_stream):
    async with fake_workers(3, "m") as workers, running_gateway(workers=workers) as gateway:
        for worker in workers:
            worker.play = (
                streams(b"data: {}\n\n", b"data: [DONE]\n\n") if is_stream else answers(200, usage(300, 0))
            )
        rng = Random(4)
        for _ in range(20):
            document = chat(text_of(rng.randrange(3), rng.randrange(1, 9)), stream=is_stream)
            found = await explained(gateway, document)
            answer = await gateway.ask(CHAT, document, RECEIPT)
            receipt = receipt_of(answer)
            row = next(row for row in found["workers"] if row["rank"] == 1)
            assert receipt["chosen"] == found["chosen"] == answer.worker
            assert receipt["policy"] == "cache_aware" and receipt["decided_by"] == "policy"
            assert receipt["matched_blocks"] == row["matched_blocks"]
            assert receipt["blocks"] == found["prompt"]["blocks"]
            assert receipt["cost"] == pytest.approx(row["cost"], rel=0.05)
            assert set(receipt["terms"]) == {"wait", "prefill", "penalty"}


async def test_no_receipt_without_asking():
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        for headers in ([], ["x-smg-explain: 0"], ["x-smg-explain:"], ["x-smg-explain: yes"]):
            assert (await gateway.ask(CHAT, HELLO, *headers)).get("x-smg-explain") is None
        client = await gateway.connect()
        assert (await client.ask(CHAT, HELLO, RECEIPT)).get("x-smg-explain")
        assert (await client.ask(CHAT, HELLO)).get("x-smg-explain") is None
        assert all(turn.header("x-smg-explain") is None for worker in workers for turn in worker.turns)


@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_receipts_change_no_choice(policy):
    async def choices(*headers: str) -> list[str | None]:
        async with (
            fake_workers(3, "m") as workers,
            running_gateway("--policy", policy, workers=workers, seed=5) as gateway,
        ):
            order = {worker.id: number for number, worker in enumerate(workers)}
            rng = Random(6)
            found = []
            for _ in range(30):
                key = f"x-smg-routing-key: k{rng.randrange(4)}"
                answer = await gateway.ask(CHAT, chat(text_of(rng.randrange(5), 4)), key, *headers)
                if headers:
                    assert receipt_of(answer)["chosen"] == answer.worker
                found.append(order[answer.worker])
            return found

    plain, told = await choices(), await choices(RECEIPT)
    if policy in ("consistent_hashing", "prefix_hash", "manual"):
        assert len(plain) == len(told)  # rings hang on the workers' ports, which differ
    else:
        assert plain == told


async def test_the_receipt_is_that_of_the_worker_that_answered():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--retry-initial-backoff-ms", "1", workers=workers) as gateway,
    ):
        found = await explained(gateway, HELLO)
        broken = next(worker for worker in workers if worker.id == found["chosen"])
        broken.play = resets
        answer = await gateway.ask(CHAT, HELLO, RECEIPT)
        assert answer.status == 200 and answer.worker != broken.id
        assert receipt_of(answer)["chosen"] == answer.worker


async def test_a_target_a_key_and_a_lone_worker_are_named_in_receipts():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--sticky-sessions", workers=workers) as gateway,
    ):
        answer = await gateway.ask(CHAT, HELLO, RECEIPT, "x-smg-target-worker: 1")
        assert receipt_of(answer)["decided_by"] == "target"
        answer = await gateway.ask(CHAT, HELLO, RECEIPT, "x-smg-routing-key: k")
        assert receipt_of(answer)["decided_by"] == "routing_key"
        assert receipt_of(await gateway.ask(CHAT, HELLO, RECEIPT))["decided_by"] == "policy"
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert receipt_of(await gateway.ask(CHAT, HELLO, RECEIPT))["decided_by"] == "only_candidate"


async def test_predicted_and_actual_cached_tokens_are_counted():
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        for worker in workers:
            worker.play = answers(200, usage(1000, 0))
        text = text_of(1, 8)
        await gateway.ask(CHAT, chat(text))
        for worker in workers:
            worker.play = answers(200, usage(1000, 900))
        await gateway.ask(CHAT, chat(text))
        assert gateway.metric("smg_cache_prompt_chars_total", model="m") == 2 * 8 * 512
        assert gateway.metric("smg_cache_matched_chars_total", model="m") == 8 * 512
        assert gateway.metric("smg_cache_actual_tokens_total", model="m") == 900
        assert 900 <= gateway.metric("smg_cache_predicted_tokens_total", model="m") <= 1100
        assert gateway.metric("smg_cache_index_entries") == 8
        assert gateway.metric("smg_cache_index_bytes") > 0


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_pair_has_one_receipt_for_both_legs(is_stream):
    async with pairs(prefills=2, decodes=2) as (gateway, prefills, decodes):
        if is_stream:
            for worker in decodes:
                worker.play = streams(b"data: {}\n\n", b"data: [DONE]\n\n")
        plain = await gateway.ask(CHAT, chat(text_of(1, 3), stream=is_stream))
        assert plain.get("x-smg-explain") is None
        first = next(worker.id for worker in prefills if worker.turns)
        answer = await gateway.ask(CHAT, chat(text_of(1, 3), stream=is_stream), RECEIPT)
        receipt = receipt_of(answer)
        assert receipt["chosen"] == answer.worker and receipt["chosen"] in {worker.id for worker in decodes}
        assert receipt["prefill"]["chosen"] == first  # its prompt is cached there
        assert receipt["prefill"]["matched_blocks"] == receipt["prefill"]["blocks"] == 3
