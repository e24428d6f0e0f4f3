"""Workers that die, clients that misbehave, in numbers: nothing fails that need not, nothing is left behind.

After each test the gauges are 0 (`running_gateway` looks) and memory is where it was, as far as Python gives it back.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from tests.e2e.fake_worker import (
    CHUNKED,
    DONE,
    END,
    JSON,
    SSE_HEAD,
    answers,
    breaks,
    chunk,
    closes,
    fake_worker,
    fake_workers,
    hangs,
    head,
    resets,
    says,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, PATIENCE_S, STREAM, eventually, request, running_gateway
from tests.e2e.process import free_ports

MIB = 1 << 20


def resident() -> int:
    """Bytes of memory this process holds, after what is garbage is gone."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True)
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def engine_processes(count: int) -> AsyncIterator[dict[str, trio.Process]]:
    """Simulated engines as processes of their own, by URL: such as can be killed."""
    running = {}
    try:
        for port in free_ports(count):
            words = [
                sys.executable,
                "-m",
                "smg",
                "engine",
                "--port",
                str(port),
                "--model",
                "sim",
                "--speed",
                "20",
            ]
            process = await trio.lowlevel.open_process(words, stdout=subprocess.PIPE)
            running[f"http://127.0.0.1:{port}"] = process
        for process in running.values():
            with trio.fail_after(20):
                assert b"listening" in await process.stdout.receive_some()
        yield running
    finally:
        for process in running.values():
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_kill_9_of_one_engine_of_three_under_load_fails_no_request_without_a_head():
    document = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    seen = []
    cut_streams = 0
    stop = False

    async with engine_processes(3) as engines:
        async with running_gateway(
            "--policy", "round_robin", "--worker-urls", *engines, ready=False
        ) as gateway:
            await eventually(lambda: gateway.ready_count == 3)
            await eventually(lambda: all(worker.models for worker in gateway.node.registry.workers()))

            async def user(number: int) -> None:
                nonlocal cut_streams
                is_stream = number % 4 == 0
                data = request(CHAT, {**document, "stream": is_stream})
                client = await gateway.connect()
                while not stop:
                    await client.send(data)
                    answer = await client.read()
                    seen.append((is_stream, answer.status, answer.worker))
                    assert answer.status == 200, answer
                    if is_stream:
                        cut_streams += b"upstream_stream_interrupted" in answer.body
                    else:
                        assert answer.document["usage"]["completion_tokens"] == 8

            async with trio.open_nursery() as users:
                for number in range(24):
                    users.start_soon(user, number)
                await eventually(lambda: len(seen) > 300)
                victim = next(iter(engines))
                os.kill(engines[victim].pid, signal.SIGKILL)
                before = len(seen)
                await eventually(lambda: gateway.ready_count == 2)
                await eventually(lambda: len(seen) > before + 300)
                stop = True
            assert cut_streams <= 6  # those that ran on it at that moment
            assert len({worker for _, _, worker in seen[-100:]}) == 2


def mixed_plays(rng: Random) -> list:
    return [
        answers(200),
        answers(200, body=b"z" * 300_000),
        answers(500),
        answers(429, None, "retry-after: 1"),
        answers(400),
        resets,
        closes,
        streams(b"data: 1\n\n", b"data: 2\n\n", DONE),
        breaks(SSE_HEAD, chunk(b"data: 1\n\n")),
        breaks(SSE_HEAD, chunk(b"data: half"), reset=True),
        breaks(head(200, f"content-type: {JSON}", "content-length: 100"), b"x"),
        breaks(head(200, f"content-type: {JSON}", "content-length: 900000"), b"x" * 200_000, reset=True),
        breaks(head(200, f"content-type: {JSON}", CHUNKED), chunk(b"x")),
        says(b"nonsense\r\n\r\n", close=True),
        says(head(200, f"content-type: {JSON}", length=2) + b"{}", close=True),
        says(head(204)),
        hangs,
    ]


@pytest.mark.parametrize("seed", [1, 2])
async def test_any_mixture_of_faults_leaves_well_formed_answers_and_nothing_behind(seed):
    rng = Random(seed)
    plays = mixed_plays(rng)
    flags = (
        "--request-timeout-secs",
        "0.6",
        "--retry-initial-backoff-ms",
        "1",
        "--cb-failure-threshold",
        "30",
        "--cb-timeout-duration-secs",
        "0.1",
        "--max-concurrent-requests",
        "12",
    )
    counts: dict[object, int] = {}
    async with fake_workers(3, "m") as workers, running_gateway(*flags, workers=workers) as gateway:

        async def play(turn):
            await rng.choice(plays)(turn)

        for worker in workers:
            worker.play = play

        async def user(number: int) -> None:
            mine = Random(seed * 100 + number)
            client = None
            for _ in range(25):
                if client is None:
                    client = await gateway.connect()
                await client.send(request(CHAT, STREAM if mine.random() < 0.4 else HELLO))
                if mine.random() < 0.15:  # leaves at once, or a moment later
                    if mine.random() < 0.5:
                        await trio.sleep(mine.random() * 0.02)
                    client.reset() if mine.random() < 0.5 else await client.leave()
                    client = None
                    counts["left"] = counts.get("left", 0) + 1
                    continue
                answer = await client.read(may_cut=True)
                counts[answer.status] = counts.get(answer.status, 0) + 1
                if answer.is_cut or answer.get("connection") == "close":
                    client = None

        async with trio.open_nursery() as users:
            for number in range(20):
                users.start_soon(user, number)
        assert sum(counts.values()) == 500
        assert {200, 400, "left"} <= counts.keys()
        await eventually(lambda: not gateway.busy or gateway.busy.keys() == {"connections"}, 3)
        # Whoever left with a reset may have done so before the gateway read the request.
        answered = 500 - counts["left"]
        assert answered <= gateway.metric("smg_http_requests_total", path=CHAT) <= 500


async def test_ten_thousand_connections_opened_and_abandoned_cost_bounded_time_and_memory():
    total, batch = 10_000, 2_000
    starts = [
        b"",
        b"G",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-le",
        request("/health"),
        request(CHAT, HELLO)[:-3],
        request(CHAT, HELLO),
    ]
    address = None
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        address = ("127.0.0.1", gateway.port)
        assert (await gateway.ask(CHAT, HELLO)).status == 200
        after_first = 0
        started_s = trio.current_time()
        for number in range(total // batch):
            sockets = []
            for index in range(batch):
                sock = socket.socket()
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(address)
                sockets.append(sock)
                if index % 200 == 199:
                    await trio.sleep(0)
            await eventually(lambda: gateway.server.connection_count >= batch * 0.9)
            for index, sock in enumerate(sockets):
                with contextlib.suppress(OSError):
                    sock.send(starts[index % len(starts)])
                if index % 500 == 499:
                    await trio.sleep(0)
            answer = await gateway.ask("/health")  # served in between
            assert answer.status == 200
            for index, sock in enumerate(sockets):
                if index % 3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            await eventually(lambda: gateway.server.connection_count == 0, 20)
            if number == 0:
                after_first = resident()
        assert trio.current_time() - started_s < 40
        assert resident() - after_first < 12 * MIB
        await eventually(
            lambda: len(gateway.readiness._slots) < 50, 8
        )  # kept connections to the worker idle out


async def test_slowloris_heads_and_bodies_are_ended_while_others_are_served():
    flags = "--header-read-timeout-secs", "0.5", "--stream-body-stall-timeout-secs", "0.5"
    count = 300
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        ended = 0
        waits = []

        async def slow_head() -> None:
            nonlocal ended
            client = await gateway.connect()
            with contextlib.suppress(trio.BrokenResourceError):
                for byte in b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nx-slow: " + b"a" * 1000:
                    await client.send(bytes((byte,)))
                    await trio.sleep(0.05)
                    if client.stream.socket.fileno() < 0:
                        break
            ended += 1

        async def slow_body() -> None:
            nonlocal ended
            client = await gateway.connect()
            await client.send(request(CHAT, HELLO)[:-10])
            answer = await client.read_head()
            assert answer.status == 408
            ended += 1

        async def patient() -> None:
            client = await gateway.connect()
            while ended < 2 * count:
                started_s = trio.current_time()
                assert (await client.ask(CHAT, HELLO)).status == 200
                waits.append(trio.current_time() - started_s)
                await trio.sleep(0.01)

        started_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(patient)
            for _ in range(count):
                nursery.start_soon(slow_head)
                nursery.start_soon(slow_body)
        assert trio.current_time() - started_s < 15
        assert sorted(waits)[len(waits) // 2] < 0.2
        # Each is counted, heads that never came in as unreadable requests.
        await eventually(
            lambda: gateway.metric("smg_http_responses_total", status_code="408", path=CHAT) == count
        )


async def test_five_megabyte_heads_cost_a_megabyte_each_at_most():
    head_bytes = b"GET / HTTP/1.1\r\nhost: g\r\nx: " + b"y" * (5 * MIB)
    count = 30
    async with running_gateway() as gateway:
        assert (await gateway.ask("/health")).status == 200
        before = resident()
        statuses = []

        async def send(client) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.send(head_bytes)

        async def one() -> None:
            client = await gateway.connect()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, client)
                statuses.append((await client.read()).status)
                await client.until_closed()

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)
        assert statuses == [431] * count
        assert resident() - before < 80 * MIB  # both ends live here


async def test_slow_readers_of_large_plain_answers_hold_little():
    size = 20 * MIB
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        body = b"z" * size

        async def play(turn):
            await turn.send(head(200, f"content-type: {JSON}", length=size))
            for at in range(0, size, MIB):
                await turn.send(body[at : at + MIB])

        worker.play = play
        clients = [await gateway.connect(receive_bytes=8192) for _ in range(10)]
        before = resident()
        for client in clients:
            await client.send(request(CHAT, HELLO))
            await client.read_head()
        with trio.move_on_after(0.5):
            await trio.sleep_forever()
        assert resident() - before < 40 * MIB
        rest = size - len(clients[0].rest)
        with trio.fail_after(20):
            while rest > 0:
                rest -= len(await clients[0].stream.receive_some(MIB))
        assert rest == 0


async def test_workers_that_hang_use_their_time_and_no_more():
    flags = "--request-timeout-secs", "0.4"
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        for worker in workers:
            worker.play = hangs
        answers_seen = []

        async def one() -> None:
            answers_seen.append((await gateway.ask(CHAT, HELLO)).status)

        started_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one)
        assert trio.current_time() - started_s < 3
        assert set(answers_seen) <= {503, 504} and answers_seen.count(504) >= 20


async def test_thousands_of_requests_and_streams_leave_memory_flat():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.clear()
        text = chunk(b"data: {}\n\n") * 5

        async def play(turn):
            if turn.document.get("stream"):
                await turn.send(SSE_HEAD + text + chunk(DONE) + END)
            else:
                await answers(200)(turn)

        worker.play = play

        async def round_of(requests: int) -> None:
            async def user() -> None:
                client = await gateway.connect()
                for number in range(requests):
                    answer = await client.ask(
                        CHAT, STREAM if number % 2 else HELLO, f"x-request-id: {number}"
                    )
                    assert answer.status == 200
                await client.leave()
                gateway.clients.remove(client)

            async with trio.open_nursery() as users:
                for _ in range(20):
                    users.start_soon(user)
            worker.turns.clear()
            while True:
                try:
                    worker._turns.receive_nowait()
                except trio.WouldBlock:
                    break

        await round_of(30)
        before = resident()
        for _ in range(3):
            await round_of(60)
        assert resident() - before < 8 * MIB
        assert gateway.metric("smg_http_requests_total", path=CHAT) == 20 * 30 + 3 * 20 * 60


async def test_garbage_over_the_wire_from_both_sides_ends_nothing():
    rng = Random(5)
    async with (
        fake_worker("m") as worker,
        running_gateway("--disable-circuit-breaker", "--retry-max-retries", "1", workers=[worker]) as gateway,
    ):
        good = request(CHAT, HELLO)

        async def stranger() -> None:
            for _ in range(20):
                data = bytearray(good)
                for _ in range(rng.randrange(1, 20)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                client = await gateway.connect()
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await client.send(bytes(data))
                    await client.stream.send_eof()
                    await client.until_closed()
                client.stream.socket.close()
                gateway.clients.remove(client)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(stranger)

        whole = head(200, f"content-type: {JSON}", CHUNKED) + chunk(b"x" * 20) + END

        async def babble(turn):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            await turn.send(bytes(data))
            await turn.close()

        worker.play = babble
        statuses = set()
        for _ in range(200):
            client = await gateway.connect()
            await client.send(good)
            answer = await client.read_head()
            await client.read_body(answer)
            statuses.add(answer.status)
            await client.leave()
            gateway.clients.remove(client)
        assert 502 in statuses and 200 in statuses
        worker.play = answers(200)
        assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_a_large_upload_to_a_slow_worker_is_held_once():
    size = 30 * MIB
    body = json.dumps({**HELLO, "pad": "x" * size}).encode()
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        before = resident()
        client = await gateway.connect()
        await client.send(request(CHAT, body=body))
        with trio.fail_after(4 * PATIENCE_S):
            turn = await worker._turns.receive()
        assert len(turn.body) == len(body)
        assert (await client.read()).status == 200
        worker.turns.clear()
        del turn
        await eventually(lambda: gateway.worker(worker).in_flight == 0)
        assert resident() - before < 6 * size
