"""Admission and limits (contract section 14)."""

from __future__ import annotations

import pytest
import trio

from tests.e2e.fake_worker import DONE, END, SSE_HEAD, Gate, answers, chunk, fake_worker, hangs, says
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, request, running_gateway

MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


async def test_adm_1_at_most_n_are_in_flight_and_open_paths_are_never_held_back():
    flags = "--max-concurrent-requests", "2", "--queue-size", "10"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await gateway.connect() for _ in range(5)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
        await eventually(lambda: gateway.node._admission.waiting == 3)
        assert len(worker.turns) == 2 and gateway.metric("smg_admission_inflight") == 2
        for path in ("/health", "/readiness", "/v1/models", "/workers", "/get_server_info"):
            assert (await gateway.ask(path)).status in (200, 404)
        assert (await gateway.ask("/metrics", port=gateway.metrics_port)).status == 200
        gate.open.set()
        assert [(await client.read()).status for client in clients] == [200] * 5


async def test_adm_1_the_slot_is_held_until_the_last_byte():
    flags = "--max-concurrent-requests", "1", "--queue-size", "0"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gate = Gate()

        async def slowly(turn):
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await gate.before(says(chunk(DONE) + END))(turn)

        worker.plays.append(slowly)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        assert (await gateway.ask(CHAT, HELLO)).is_error(429, "admission_queue_full")
        gate.open.set()
        while await client.read_chunk() is not None:
            pass
        await eventually(lambda: gateway.metric("smg_admission_inflight") == 0)
        assert (await gateway.ask(CHAT, HELLO)).status == 200


@pytest.mark.parametrize("size", [0, 2])
async def test_adm_2_err_12_beyond_the_queue_requests_are_refused_at_once(size):
    flags = "--max-concurrent-requests", "1", "--queue-size", str(size)
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await gateway.connect() for _ in range(1 + size)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
        await eventually(lambda: gateway.node._admission.waiting == size and worker.turns)
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(429, "admission_queue_full")
        assert int(answer["retry-after"]) >= 1
        assert answer.document["error"]["type"] == "rate_limit_error"
        answer = await gateway.ask("/v1/messages", MESSAGES)
        assert answer.status == 429 and answer.document["error"]["type"] == "rate_limit_error"
        gate.open.set()
        assert [(await client.read()).status for client in clients] == [200] * (1 + size)
        assert gateway.metric("smg_http_rate_limit_total", result="rejected") == 2


async def test_adm_2_requests_wait_in_order_of_arrival():
    flags = "--max-concurrent-requests", "1"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = []
        for number in range(6):
            client = await gateway.connect()
            clients.append(client)
            await client.send(request(CHAT, {**HELLO, "number": number}))
            await eventually(lambda n=number: len(worker.turns) + gateway.node._admission.waiting == n + 1)
        gate.open.set()
        for client in clients:
            await client.read()
        assert [turn.document["number"] for turn in worker.turns] == [0, 1, 2, 3, 4, 5]


async def test_adm_2_err_14_who_waits_too_long_is_told_so():
    flags = "--max-concurrent-requests", "1", "--queue-timeout-secs", "0.2"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.plays.append(hangs)
        first = await gateway.connect()
        await first.send(request(CHAT, HELLO))
        await worker.next_turn()
        second = await gateway.connect()
        answer = await second.ask(CHAT, HELLO)
        assert answer.is_error(503, "admission_queue_timeout")
        assert int(answer["retry-after"]) >= 1 and answer.document["error"]["type"] == "server_error"
        assert await second.is_open()
        assert (await gateway.ask("/v1/messages", MESSAGES)).document["error"]["type"] == "overloaded_error"
        assert len(worker.turns) == 1


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_adm_2_http_14_a_waiting_client_that_leaves_frees_its_place(how):
    flags = "--max-concurrent-requests", "1", "--queue-size", "1"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        first, second = await gateway.connect(), await gateway.connect()
        await first.send(request(CHAT, HELLO))
        await worker.next_turn()
        await second.send(request(CHAT, HELLO))
        await eventually(lambda: gateway.node._admission.waiting == 1)
        if how == "reset":
            second.reset()
        else:
            await second.leave()
        await eventually(lambda: gateway.node._admission.waiting == 0, 1.5)
        third = await gateway.connect()
        await third.send(request(CHAT, HELLO))
        await eventually(lambda: gateway.node._admission.waiting == 1)
        gate.open.set()
        assert (await first.read()).status == (await third.read()).status == 200
        assert len(worker.turns) == 2


async def test_adm_2_a_slot_of_a_client_that_leaves_goes_to_the_next_in_line():
    async with (
        fake_worker("m") as worker,
        running_gateway("--max-concurrent-requests", "1", workers=[worker]) as gateway,
    ):
        worker.plays.append(hangs)
        first, second = await gateway.connect(), await gateway.connect()
        await first.send(request(CHAT, HELLO))
        await worker.next_turn()
        await second.send(request(CHAT, HELLO))
        await eventually(lambda: gateway.node._admission.waiting == 1)
        first.reset()
        assert (await second.read()).status == 200


async def test_adm_3_err_13_the_rate_is_a_limit_of_its_own():
    async with (
        fake_worker("m") as worker,
        running_gateway("--rate-limit-tokens-per-second", "3", workers=[worker]) as gateway,
    ):
        answers_seen = [await gateway.ask(CHAT, HELLO) for _ in range(8)]
        statuses = [answer.status for answer in answers_seen]
        assert statuses[:3] == [200] * 3 and statuses.count(200) <= 5
        refused = next(answer for answer in answers_seen if answer.status == 429)
        assert refused.is_error(429, "rate_limit_exceeded") and refused["retry-after"] == "1"
        assert (await gateway.ask("/v1/models")).status == 200
        await eventually(lambda: True)
        with trio.fail_after(3):
            while (await gateway.ask(CHAT, HELLO)).status != 200:
                await trio.lowlevel.checkpoint()


async def test_adm_3_a_bad_request_takes_no_place():
    async with (
        fake_worker("m") as worker,
        running_gateway("--rate-limit-tokens-per-second", "1", workers=[worker]) as gateway,
    ):
        for _ in range(5):
            assert (await gateway.ask(CHAT, {"model": "m"})).status == 400
            assert (await gateway.ask(CHAT, {**HELLO, "model": "none"})).status == 404
        assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_adm_no_limit_when_it_is_zero():
    async with (
        fake_worker("m") as worker,
        running_gateway("--max-concurrent-requests", "0", workers=[worker]) as gateway,
    ):
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await gateway.connect() for _ in range(50)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
        await eventually(lambda: len(worker.turns) == 50)
        gate.open.set()
        for client in clients:
            assert (await client.read()).status == 200
