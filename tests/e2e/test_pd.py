"""Prefill and decode on different workers (contract section 18), over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from smg.fleet.worker import Status
from tests.e2e.fake_worker import (
    DONE,
    SSE_HEAD,
    FakeWorker,
    Gate,
    answers,
    breaks,
    chunk,
    closes,
    event,
    fake_workers,
    hangs,
    head,
    resets,
    says,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, Gateway, eventually, request, running_gateway

BODY = b'{"model":"m", "messages":[{"role":"user","content":"hi"}],  "z":1.0e0}'
FIELDS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


@asynccontextmanager
async def pairs(
    *flags: str, prefills: int = 1, decodes: int = 1, ports: str = "8998"
) -> AsyncIterator[tuple[Gateway, list[FakeWorker], list[FakeWorker]]]:
    """A gateway in PD mode with so many workers per leg."""
    async with fake_workers(prefills, "m") as fills, fake_workers(decodes, "m") as codes:
        for worker in fills:
            worker.play = answers(200, {"prefill": "x" * 5000, "usage": {"prompt_tokens": 3}})
        for worker in codes:
            worker.play = answers(
                200, {"decode": True, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
            )
        named = [word for worker in fills for word in ("--prefill", worker.url, ports)]
        named += [word for worker in codes for word in ("--decode", worker.url)]
        async with running_gateway("--pd-disaggregation", *named, *flags, ready=False) as gateway:
            every = [*fills, *codes]
            await eventually(lambda: gateway.ready_count == len(every))
            for worker in every:
                await eventually(lambda w=worker: gateway.worker(w).models == ("m",))
            yield gateway, fills, codes


def failures(gateway: Gateway, worker: FakeWorker) -> int:
    return int(gateway.worker(worker).breaker.failures_total)


async def test_pd_1_both_get_the_body_with_the_same_three_fields_and_the_decode_answer_is_the_answer():
    async with pairs() as (gateway, [prefill], [decode]):
        answer = await gateway.ask(CHAT, body=BODY)
        assert answer.status == 200 and answer.worker == decode.id
        assert answer.document["decode"] is True
        first, second = await prefill.next_turn(), await decode.next_turn()
    assert first.body == second.body
    document = first.document
    room = document["bootstrap_room"]
    assert [document[name] for name in FIELDS[:2]] == ["127.0.0.1", 8998]
    assert type(room) is int and 0 <= room < 1 << 63
    inserted = b'"bootstrap_host":"127.0.0.1","bootstrap_port":8998,"bootstrap_room":%d,' % room
    assert first.body == b"{" + inserted + BODY[1:]  # UP-2: every other byte stays
    assert first.path == second.path == CHAT
    assert first.header("x-request-id") == second.header("x-request-id") == answer["x-request-id"].encode()


async def test_pd_1_a_prefill_worker_without_a_bootstrap_port_gives_null_and_rooms_differ_between_requests():
    async with pairs(ports="none") as (gateway, [prefill], [decode]):
        rooms = set()
        for _ in range(3):
            assert (await gateway.ask(CHAT, HELLO)).status == 200
            document = (await decode.next_turn()).document
            assert document["bootstrap_port"] is None
            rooms.add(document["bootstrap_room"])
            assert (await prefill.next_turn()).document["bootstrap_room"] in rooms
    assert len(rooms) == 3


@pytest.mark.parametrize(
    ("path", "document", "size"),
    [
        (CHAT, {**HELLO, "n": 3}, 3),
        (CHAT, {**HELLO, "n": 1}, None),
        ("/v1/completions", {"model": "m", "prompt": ["a", "b"]}, 2),
        ("/v1/completions", {"model": "m", "prompt": [[1, 2], [3], [4]], "n": 2}, 6),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3]}, None),
        ("/generate", {"text": ["a", "b", "c", "d"]}, 4),
        ("/generate", {"input_ids": [[1], [2]]}, 2),
        ("/generate", {"input_ids": [1, 2]}, None),
    ],
)
async def test_pd_1_batches_get_arrays_with_a_room_for_each(path, document, size):
    async with pairs() as (gateway, [prefill], [decode]):
        assert (await gateway.ask(path, document)).status == 200
        sent = (await decode.next_turn()).document
        assert (await prefill.next_turn()).document == sent
    if size is None:
        assert not any(isinstance(sent[name], list) for name in FIELDS)
    else:
        assert sent["bootstrap_host"] == ["127.0.0.1"] * size
        assert sent["bootstrap_port"] == [8998] * size
        assert len(set(sent["bootstrap_room"])) == size


async def test_pd_1_a_stream_begins_when_the_prefill_is_done_and_is_relayed_as_it_comes():
    gate = Gate()
    async with pairs() as (gateway, [prefill], [decode]):
        prefill.play = gate.before(streams(event({"dropped": 1}), DONE))
        decode.play = streams(event({"a": 1}), event({"a": 2}), DONE)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await gate.reached.wait()
        await decode.next_turn()
        worker = gateway.worker(decode)
        assert worker.in_flight == gateway.worker(prefill).in_flight == 1
        with trio.move_on_after(0.1):
            await client.more()
            pytest.fail("a byte before the prefill was done")
        gate.open.set()
        answer = await client.read()
    assert answer.worker == decode.id
    assert answer.body == event({"a": 1}) + event({"a": 2}) + DONE


async def test_rt_3_the_prefill_is_counted_out_when_it_is_done_and_the_decode_when_its_answer_is():
    async with pairs() as (gateway, [prefill], [decode]):
        gate = Gate()

        async def play(turn):
            await turn.send(SSE_HEAD, chunk(event({"a": 1})))
            await gate.before(says(chunk(DONE), b"0\r\n\r\n"))(turn)

        decode.play = play
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        await client.read_chunk()
        assert gateway.worker(prefill).in_flight == 0
        assert gateway.worker(decode).in_flight == 1
        gate.open.set()
        assert await client.read_chunk() == DONE
        assert await client.read_chunk() is None
        await eventually(lambda: gateway.worker(decode).in_flight == 0)
        for leg in ("prefill", "decode"):
            assert gateway.metric("smg_worker_selection_total", worker_type=leg, model="m") == 1
        assert gateway.metric("smg_router_requests_total", backend_type="pd", model="m") == 1
        assert gateway.metric("smg_router_ttft_seconds_count", backend_type="pd") == 1
        assert gateway.metric("smg_http_requests_total", path=CHAT) == 1


async def test_met_3_tokens_of_a_pair_are_counted_once():
    async with pairs() as (gateway, [_prefill], [_decode]):
        await gateway.ask(CHAT, HELLO)
        assert gateway.metric("smg_router_tokens_total", token_type="input") == 3
        assert gateway.metric("smg_router_tokens_total", token_type="output") == 2


@pytest.mark.parametrize("play", [resets, closes, breaks(head(200, length=9) + b"half")])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_pd_2_a_transport_error_ends_the_other_leg_and_blames_only_the_leg_that_failed(leg, play):
    async with pairs("--disable-retries") as (gateway, [prefill], [decode]):
        failing, other = (prefill, decode) if leg == "prefill" else (decode, prefill)
        waits = trio.Event()

        async def hang(turn):
            waits.set()
            await turn.wait_gone()

        async def fail(turn):
            await waits.wait()
            await play(turn)

        failing.play, other.play = fail, hang
        if leg == "decode" and play not in (resets, closes):
            other.play = answers(200, {})  # its own answer breaks off: the prefill is long done
            failing.play = play
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(502, "pd_request_failed")
        if waits.is_set():
            turn = await other.next_turn()
            with trio.fail_after(2):
                await turn.gone.wait()
        assert failures(gateway, failing) == 1
        assert failures(gateway, other) == 0


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_rty_6_a_killed_worker_of_either_leg_costs_no_request_while_another_is_there(leg):
    async with pairs("--policy", "round_robin", prefills=2, decodes=2) as (gateway, prefills, decodes):
        killed = (prefills if leg == "prefill" else decodes)[0]
        killed.kill()
        for number in range(6):
            answer = await gateway.ask(CHAT, STREAM if number % 2 else HELLO)
            assert answer.status == 200, answer
        others = [worker for worker in (*prefills, *decodes) if worker is not killed]
        assert sum(failures(gateway, worker) for worker in others) == 0


@pytest.mark.parametrize("play", [resets, closes, breaks(head(200, length=9) + b"half")])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_rty_1_a_broken_connection_of_a_leg_is_tried_on_another_worker_of_that_leg(leg, play):
    async with pairs("--policy", "passthrough", prefills=2, decodes=2) as (gateway, prefills, decodes):
        broken = (prefills if leg == "prefill" else decodes)[0]
        broken.play = play
        assert (await gateway.ask(CHAT, HELLO)).status == 200
        others = [worker for worker in (*prefills, *decodes) if worker is not broken]
        assert [failures(gateway, worker) for worker in others] == [0, 0, 0]
        assert failures(gateway, broken) == 1


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_rty_1_an_error_status_of_a_leg_is_tried_on_another_worker_of_that_leg(leg):
    async with pairs("--policy", "passthrough", prefills=2, decodes=2) as (gateway, prefills, decodes):
        failing = (prefills if leg == "prefill" else decodes)[0]
        failing.play = answers(503, {"error": {"message": "full"}})
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == 200
        assert answer.worker == decodes[1 if leg == "decode" else 0].id
        assert len(failing.turns) == 1
        assert gateway.metric("smg_worker_retries_total", worker_type=leg) == 1


async def test_pd_2_a_prefill_that_never_ends_is_a_timeout_of_the_prefill_worker():
    async with pairs("--request-timeout-secs", "0.3") as (gateway, [prefill], [decode]):
        prefill.play = hangs
        decode.play = hangs
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(504, "call_upstream_timeout")
        assert (failures(gateway, prefill), failures(gateway, decode)) == (1, 0)


async def test_pd_2_a_decode_worker_that_never_answers_after_the_prefill_is_its_own_timeout():
    async with pairs("--request-timeout-secs", "0.3") as (gateway, [prefill], [decode]):
        decode.play = hangs
        assert (await gateway.ask(CHAT, HELLO)).is_error(504, "call_upstream_timeout")
        assert (failures(gateway, prefill), failures(gateway, decode)) == (0, 1)


async def test_pd_2_a_missing_leg_is_503_and_the_node_is_not_ready():
    async with fake_workers(1, "m") as [worker]:
        flags = ("--pd-disaggregation", "--prefill", worker.url, "none")
        async with running_gateway(*flags, ready=False) as gateway:
            await eventually(lambda: gateway.ready_count == 1)
            assert (await gateway.ask("/readiness")).status == 503  # LIFE-2
            answer = await gateway.ask(CHAT, HELLO)
            assert answer.is_error(503, "no_available_workers") and answer["retry-after"] == "1"
            assert (await gateway.ask(CHAT, {**HELLO, "model": "unknown"})).is_error(404, "model_not_found")
            assert not worker.turns
            async with fake_workers(1, "m") as [decode]:
                added = await gateway.ask("/workers", {"url": decode.url, "worker_type": "decode"})
                assert added.status == 202
                await eventually(lambda: gateway.ready_count == 2)
                assert (await gateway.ask("/readiness")).status == 200
                assert (await gateway.ask(CHAT, HELLO)).status == 200


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_pd_2_a_leg_whose_workers_all_fail_their_probes_is_503(leg):
    async with pairs() as (gateway, [prefill], [decode]):
        worker = gateway.worker(prefill if leg == "prefill" else decode)
        gateway.node.registry.set_status(worker, Status.NOT_READY, trio.current_time())
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(503, "no_available_workers")
        assert leg in answer.document["error"]["message"]
        assert not prefill.turns and not decode.turns


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "bad_request"),
        (404, "not_found"),
        (422, "error"),
        (429, "error"),
        (500, "internal_error"),
        (502, "bad_gateway"),
        (503, "unavailable"),
        (504, "error"),
    ],
)
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_pd_3_the_status_of_a_leg_is_kept_under_a_code_of_its_own(leg, status, name):
    async with pairs("--disable-retries") as (gateway, [prefill], [decode]):
        failing, other = (prefill, decode) if leg == "prefill" else (decode, prefill)
        failing.play = answers(status, {"error": {"message": f"no, said {failing.url}"}}, "retry-after: 7")
        other.play = hangs
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(status, f"{leg}_{name}")
        assert answer.document["error"]["message"] == "no, said worker"  # DN-3
        assert answer["retry-after"] == "7"  # RTY-7
        assert answer.worker == failing.id
        assert failures(gateway, failing) == (status in (429, 500, 502, 503, 504))
        assert failures(gateway, other) == 0


async def test_pd_3_a_stream_that_the_prefill_refuses_is_json_in_the_dialect_of_its_endpoint():
    async with pairs() as (gateway, [prefill], [decode]):
        prefill.play = answers(400, body=b"too long", type="text/plain")
        decode.play = says(SSE_HEAD)
        answer = await gateway.ask("/v1/messages", {**STREAM, "max_tokens": 5})
    assert (answer.status, answer.code) == (400, "prefill_bad_request")
    assert answer.document["error"]["message"] == "The prefill worker answered with status 400"
    assert answer.document["type"] == "error"


async def test_pd_3_an_error_of_megabytes_is_not_read_to_its_end():
    async with pairs("--disable-retries") as (gateway, [prefill], [decode]):
        for worker in (prefill, decode):
            worker.play = answers(500, body=b"x" * 5_000_000)
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == 500 and answer.code in ("prefill_internal_error", "decode_internal_error")
        assert len(answer.body) < 1000


async def test_pd_4_each_leg_gets_the_key_of_its_own_worker():
    async with fake_workers(2, "m") as [prefill, decode]:
        flags = ("--pd-disaggregation", "--api-key", "front")
        async with running_gateway(*flags, ready=False) as gateway:
            for worker, kind in ((prefill, "prefill"), (decode, "decode")):
                spec = {"url": worker.url, "worker_type": kind, "api_key": f"key-of-{kind}"}
                key = "authorization: Bearer front"
                assert (await gateway.ask("/workers", spec, key)).status == 202
            await eventually(lambda: gateway.ready_count == 2)
            answer = await gateway.ask(CHAT, HELLO, "authorization: Bearer front")
            assert answer.status == 200
            for worker, kind in ((prefill, "prefill"), (decode, "decode")):
                turn = await worker.next_turn()
                assert turn.header("authorization") == f"Bearer key-of-{kind}".encode()


@pytest.mark.parametrize("stage", ["prefill", "stream"])
async def test_http_14_a_client_that_leaves_ends_both_legs(stage):
    async with pairs() as (gateway, [prefill], [decode]):
        if stage == "prefill":
            prefill.play = decode.play = hangs
        else:

            async def play(turn):
                await turn.send(SSE_HEAD, chunk(event({"a": 1})))
                await turn.wait_gone()

            decode.play = play
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        first, second = await prefill.next_turn(), await decode.next_turn()
        if stage == "stream":
            await client.read_head()
            await client.read_chunk()
        client.reset()
        with trio.fail_after(2):
            await second.gone.wait()
            if stage == "prefill":
                await first.gone.wait()
        await eventually(
            lambda: not gateway.worker(decode).in_flight and not gateway.worker(prefill).in_flight
        )
        assert failures(gateway, prefill) == failures(gateway, decode) == 0
        assert gateway.metric("smg_http_responses_total", error_code="client_gone") == 1


async def test_str_6_a_decode_worker_that_dies_in_a_stream_gets_its_failure_frame():
    async with pairs() as (gateway, [_prefill], [decode]):
        decode.play = breaks(SSE_HEAD, chunk(event({"a": 1})))
        answer = await gateway.ask(CHAT, STREAM)
        assert b"upstream_stream_interrupted" in answer.body and answer.body.endswith(DONE)
        assert failures(gateway, decode) == 1


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify"])
async def test_err_22_an_endpoint_without_a_cache_to_hand_over_is_501(path):
    async with pairs() as (gateway, _prefills, _decodes):
        answer = await gateway.ask(path, {"model": "m", "input": "x"})
        assert answer.is_error(501, "not_implemented")


async def test_rt_4_a_target_names_a_worker_of_either_leg_and_an_index_one_of_decode():
    async with pairs("--policy", "passthrough", prefills=2, decodes=2) as (gateway, prefills, decodes):
        for target, prefill, decode in (
            (prefills[1].id, 1, 0),
            (decodes[1].id, 0, 1),
            ("1", 0, 1),
        ):
            answer = await gateway.ask(CHAT, HELLO, f"x-smg-target-worker: {target}")
            assert answer.worker == decodes[decode].id
            await prefills[prefill].next_turn()
        assert [len(worker.turns) for worker in prefills] == [2, 1]
        answer = await gateway.ask(CHAT, HELLO, "x-smg-target-worker: nobody")
        assert answer.is_error(503, "no_available_workers")


async def test_rt_2_each_leg_has_a_policy_of_its_own():
    flags = ("--prefill-policy", "round_robin", "--decode-policy", "passthrough")
    async with pairs(*flags, prefills=2, decodes=2) as (gateway, prefills, decodes):
        for _ in range(4):
            await gateway.ask(CHAT, HELLO)
        assert [len(worker.turns) for worker in prefills] == [2, 2]
        assert [len(worker.turns) for worker in decodes] == [4, 0]
        for leg, policy in (("prefill", "round_robin"), ("decode", "passthrough")):
            assert gateway.metric("smg_worker_selection_total", worker_type=leg, policy=policy) == 4


async def test_pd_1_connections_to_both_legs_are_kept():
    async with pairs() as (gateway, [prefill], [decode]):
        client = await gateway.connect()
        prefill.connections_total = decode.connections_total = 0
        for _ in range(5):
            assert (await client.ask(CHAT, HELLO)).status == 200
        assert prefill.connections_total <= 2 and decode.connections_total <= 2
        assert json.loads(prefill.turns[0].body)["model"] == "m"
