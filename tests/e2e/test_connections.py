"""Connections on both sides in unusual places: bounds, names, families, codings, removal under way."""

from __future__ import annotations

import gzip

import pytest
import trio

from tests.e2e.fake_worker import (
    CHUNKED,
    DONE,
    END,
    JSON,
    SSE,
    SSE_HEAD,
    FakeWorker,
    Gate,
    answers,
    breaks,
    chunk,
    fake_worker,
    hangs,
    head,
    says,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, request, running_gateway


async def test_http_1_a_request_behind_a_stream_is_served_after_it():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(streams(b"data: 1\n\n", DONE))
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM) + request("/health") + request(CHAT, HELLO))
        assert (await client.read()).body == b"data: 1\n\n" + DONE
        assert (await client.read()).body == b"OK"
        assert (await client.read()).document["worker"] == "a"


async def test_http_9_head_on_a_path_without_get_is_405_without_a_body():
    async with running_gateway() as gateway:
        client = await gateway.connect()
        answer = await client.ask(CHAT, method="HEAD")
        assert answer.status == 405 and answer["allow"] == "OPTIONS, POST"
        assert await client.is_open()


async def test_http_14_a_client_that_leaves_an_admin_call_cancels_it():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.on_path["/health_generate"] = hangs
        asked = len(worker.asked)
        client = await gateway.connect()
        await client.send(request("/health_generate"))
        await eventually(lambda: any(turn.path == "/health_generate" for turn in worker.asked[asked:]))
        client.reset()
        turn = next(turn for turn in worker.asked[asked:] if turn.path == "/health_generate")
        with trio.fail_after(2):
            await turn.gone.wait()
        await eventually(lambda: gateway.server.connection_count == 0)


async def test_a_reader_that_takes_nothing_is_given_up_after_the_stall_time():
    flags = "--stream-body-stall-timeout-secs", "0.3"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        ended = trio.Event()

        async def flood(turn):
            await turn.send(SSE_HEAD)
            try:
                while True:
                    await turn.send(chunk(b"data: " + b"x" * 60_000 + b"\n\n"))
            finally:
                ended.set()

        worker.plays.append(flood)
        client = await gateway.connect(receive_bytes=4096)
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        with trio.fail_after(3):
            await ended.wait()
        await eventually(lambda: gateway.server.connection_count == 0)
        assert gateway.worker(worker).breaker.consecutive_failures == 0


async def test_a_worker_with_a_bound_of_connections_gets_no_more_requests_at_once():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        await gateway.ask("/workers", {"url": worker.url, "max_connections": 2, "model_id": "m"})
        await eventually(lambda: gateway.ready_count == 1)
        running = most = 0

        async def play(turn):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await trio.sleep(0.01)
            running -= 1
            await answers(200)(turn)

        worker.play = play
        statuses = []

        async def one() -> None:
            statuses.append((await gateway.ask(CHAT, HELLO)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(one)
        assert statuses == [200] * 30 and most == 2


async def test_clients_that_leave_while_they_wait_for_a_connection_free_their_turn():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        await gateway.ask("/workers", {"url": worker.url, "max_connections": 1, "model_id": "m"})
        await eventually(lambda: gateway.ready_count == 1)
        gate = Gate()
        worker.plays.append(gate.before(answers(200)))
        clients = [await gateway.connect() for _ in range(6)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
            await gate.reached.wait()  # the first has the connection, the others wait for it
        await eventually(lambda: gateway.worker(worker).in_flight == 6)
        for client in clients[1:5]:
            client.reset()
        await eventually(lambda: gateway.worker(worker).in_flight == 2)
        gate.open.set()
        assert (await clients[0].read()).status == (await clients[5].read()).status == 200
        assert len(worker.turns) == 2


async def test_hlt_1_probes_do_not_wait_behind_the_requests_of_a_bounded_worker():
    flags = (
        "--health-check-interval-secs",
        "0.1",
        "--health-check-timeout-secs",
        "0.2",
        "--health-failure-threshold",
        "1",
    )
    async with fake_worker("m") as worker, running_gateway(*flags) as gateway:
        await gateway.ask("/workers", {"url": worker.url, "max_connections": 1, "model_id": "m"})
        await eventually(lambda: gateway.ready_count == 1)
        worker.play = hangs
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO))
        await worker.next_turn()
        asked = len(worker.asked)
        await eventually(lambda: sum(turn.path == "/health" for turn in worker.asked[asked:]) >= 5)
        assert gateway.ready_count == 1
        assert gateway.metric("smg_worker_health_checks_total", result="failure") == 0


async def test_err_18_no_free_connection_within_the_timeout_is_504():
    async with (
        fake_worker("m") as worker,
        running_gateway("--request-timeout-secs", "0.4", "--disable-load-monitoring") as gateway,
    ):
        await gateway.ask("/workers", {"url": worker.url, "max_connections": 1, "model_id": "m"})
        await eventually(lambda: gateway.ready_count == 1)
        await eventually(lambda: gateway.worker(worker).engine is not None)
        worker.play = hangs
        first, second = await gateway.connect(), await gateway.connect()
        for client in (first, second):
            await client.send(request(CHAT, HELLO))
        assert (await first.read()).status == 504
        assert (await second.read()).status == 504


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST"])
async def test_a_worker_may_be_given_by_name(name):
    async with (
        fake_worker("m") as worker,
        running_gateway("--worker-urls", f"http://{name}:{worker.port}", ready=False) as gateway,
    ):
        await eventually(lambda: gateway.ready_count == 1)
        await eventually(lambda: gateway.node.registry.workers()[0].models == ("m",))
        assert (await gateway.ask(CHAT, HELLO)).status == 200
        assert worker.turns[0].header("host") == f"localhost:{worker.port}".encode()


async def test_a_worker_whose_name_is_not_known_is_a_refused_connection():
    flags = "--worker-urls", "http://no-such-host.invalid:8000", "--disable-health-check", "--disable-retries"
    async with running_gateway(*flags, ready=False) as gateway:
        await eventually(lambda: gateway.ready_count == 1)
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(
            502, "call_upstream_connection_failed"
        ) and b"invalid" not in answer.body.replace(b"invalid_request", b"")


async def test_a_worker_may_speak_ipv6():
    try:
        (listener,) = await trio.open_tcp_listeners(0, host="::1")
    except OSError as error:
        pytest.fail(f"this machine has no IPv6 loopback: {error}")
    worker = FakeWorker(listener, ("m",), "a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.serve, listener)
        async with running_gateway("--worker-urls", f"http://[::1]:{worker.port}", ready=False) as gateway:
            await eventually(lambda: gateway.ready_count == 1)
            await eventually(lambda: gateway.node.registry.workers()[0].models == ("m",))
            assert (await gateway.ask(CHAT, HELLO)).status == 200
            assert worker.turns[0].header("host") == f"[::1]:{worker.port}".encode()
        nursery.cancel_scope.cancel()


async def test_str_4_str_6_an_encoded_stream_is_neither_pinged_nor_written_into():
    coded = gzip.compress(b"data: 1\n\n" + DONE)
    async with (
        fake_worker("m") as worker,
        running_gateway("--sse-keepalive-secs", "0.1", workers=[worker]) as gateway,
    ):
        gate = Gate()

        async def slowly(turn):
            await turn.send(head(200, SSE, "content-encoding: gzip", CHUNKED))
            await gate.before(says(chunk(coded[:9]), chunk(coded[9:]), END))(turn)

        worker.plays.append(slowly)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM, "accept-encoding: gzip"))
        answer = await client.read_head()
        with trio.move_on_after(0.4):
            await client.read_chunk()
        gate.open.set()
        await client.read_body(answer)
        assert gzip.decompress(answer.body) == b"data: 1\n\n" + DONE
        worker.plays.append(breaks(head(200, SSE, "content-encoding: gzip", CHUNKED), chunk(coded[:9])))
        await client.send(request(CHAT, STREAM))
        answer = await client.read(may_cut=True)
        assert answer.is_cut and coded.startswith(answer.body)


async def test_err_17_a_transfer_coding_that_is_not_chunked_alone_is_no_answer():
    coded = gzip.compress(b"{}")
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.plays.append(
            says(head(200, f"content-type: {JSON}", "transfer-encoding: gzip, chunked") + chunk(coded) + END)
        )
        assert (await gateway.ask(CHAT, HELLO)).is_error(502, "call_upstream_response_failed")
        worker.plays.append(
            says(head(200, f"content-type: {JSON}", "transfer-encoding: Chunked") + chunk(b"{}") + END)
        )
        assert (await gateway.ask(CHAT, HELLO)).body == b"{}"


@pytest.mark.parametrize("change", ["PATCH", "PUT", "DELETE"])
async def test_a_connection_in_use_when_its_worker_changes_is_not_kept_for_ever(change):
    flags = (
        "--upstream-pool-idle-timeout-secs",
        "0.3",
        "--disable-load-monitoring",
        "--drain-timeout-secs",
        "0.2",
    )
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await gateway.connect() for _ in range(5)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
        await eventually(lambda: len(worker.turns) == 5)
        where = f"/workers/{worker.id}"
        document = {"url": worker.url, "cost": 2.0}
        changed = await gateway.ask(where, None if change == "DELETE" else document, method=change)
        assert changed.status == 202
        if change == "DELETE":
            await eventually(lambda: not gateway.node.registry.workers())
        gate.open.set()
        for client in clients:
            assert (await client.read()).status == 200
            await client.leave()
        await eventually(lambda: worker.connections == 0, 3)
        await eventually(lambda: gateway.server.connection_count == 0)
        assert len(gateway.readiness._slots) <= 1
