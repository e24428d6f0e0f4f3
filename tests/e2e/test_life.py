"""Start, signals, drain, exit codes (contract sections 1 and 3)."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess

import pytest
import trio

from tests.e2e.fake_worker import DONE, END, SSE_HEAD, Gate, answers, chunk, fake_worker, hangs, says
from tests.e2e.gateway import CHAT, HELLO, STREAM, drained, eventually, request, running_gateway
from tests.e2e.process import command, free_ports, running_process


async def test_life_5_while_draining_new_connections_are_served_and_told_to_close():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        kept = await gateway.connect()
        assert await kept.is_open()
        gate = Gate()
        worker.plays.append(gate.before(answers(200)))
        running = await gateway.connect()
        await running.send(request(CHAT, HELLO))
        await gate.reached.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drained, gateway, 2.0)
            await eventually(lambda: gateway.node._is_draining)
            ready = await gateway.ask("/readiness")
            assert (ready.status, ready.document["reason"]) == (503, "draining")
            assert ready["connection"] == "close"
            answer = await gateway.ask(CHAT, HELLO)
            assert answer.status == 200 and answer["connection"] == "close"
            assert (await kept.ask(CHAT, HELLO))["connection"] == "close"
            assert await kept.until_closed() == b""
            gate.open.set()
            late = await running.read()
            assert late.status == 200
            assert late["connection"] == "close"  # it began before the drain and is answered in it (LIFE-6)
            await gateway.drained.wait()
        with pytest.raises(OSError):
            await gateway.connect()


async def test_life_5_with_nothing_in_flight_the_drain_ends_with_the_listener():
    async with running_gateway() as gateway:
        idle = await gateway.connect()
        assert await idle.is_open()
        silent = await gateway.connect()
        started_s = trio.current_time()
        await drained(gateway, 1.0)
        assert 0.4 < trio.current_time() - started_s < 0.9
        assert await idle.until_closed() == b""
        assert await silent.until_closed() == b""


async def test_life_6_a_stream_in_flight_is_delivered_to_its_end():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        gate = Gate()

        async def slowly(turn):
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await gate.before(says(chunk(DONE) + END))(turn)

        worker.plays.append(slowly)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drained, gateway, 3.0)
            await eventually(lambda: gateway.server._accepting.cancel_called)
            gate.open.set()
            assert await client.read_chunk() == b"data: 1\n\n"
            assert await client.read_chunk() == DONE
            assert await client.read_chunk() is None
            assert await client.until_closed() == b""
            await gateway.drained.wait()


async def test_life_6_a_stream_that_began_before_the_drain_does_not_end_its_connection_under_the_next_request():
    """Its head did not say `close`, so a load balancer sends the next request there at once: and a POST only once."""
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        gate = Gate()

        async def slowly(turn):
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await gate.before(says(chunk(DONE) + END))(turn)

        worker.plays.append(slowly)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        assert (await client.read_head()).get("connection") is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drained, gateway, 1.0)
            await eventually(lambda: gateway.server.is_draining)
            gate.open.set()
            while await client.read_chunk() is not None:
                pass
            answer = await client.ask(CHAT, HELLO)
            assert answer.status == 200 and answer["connection"] == "close"
            assert await client.until_closed() == b""


async def test_life_6_a_reader_that_takes_nothing_does_not_hold_the_end_up():
    async with fake_worker("m") as worker, running_gateway(workers=[worker], is_quiet=False) as gateway:

        async def flood(turn):
            await turn.send(SSE_HEAD)
            while True:
                await turn.send(chunk(b"data: " + b"x" * 60_000 + b"\n\n"))

        worker.plays.append(flood)
        client = await gateway.connect(receive_bytes=4096)
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        await eventually(lambda: any(exchange.parking._waiting for exchange in gateway.server._exchanges))
        started_s = trio.current_time()
        await drained(gateway, 0.5)
        assert trio.current_time() - started_s < 3


async def test_cli_12_the_listening_line_is_logged_and_a_request_is_served():
    async with fake_worker("m") as worker, running_process("--worker-urls", worker.url) as smg:
        assert re.search(rb"INFO +smg smg listening on http://127\.0\.0\.1:%d" % smg.port, smg.stderr)
        with trio.fail_after(2):
            while (await smg.ask(CHAT, HELLO)).status != 200:
                await trio.lowlevel.checkpoint()
        assert b"smg_http_requests_total" in (await smg.ask("/metrics", port=smg.metrics_port)).body


async def test_a_request_that_comes_before_the_first_probe_is_back_waits_for_it():
    """Behind a load balancer that only counts refused connections, a restart would else fail requests with 503."""
    gate = Gate()
    async with fake_worker("m") as worker:
        worker.on_path["/health"] = gate.before(answers(200, {}))
        async with running_process("--worker-urls", worker.url, ready=False) as smg:
            await gate.reached.wait()
            client = await smg.connect()
            await client.send(request(CHAT, HELLO))
            await trio.sleep(0.1)
            assert b"smg listening" not in smg.stderr
            gate.open.set()
            assert (await client.read()).status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_cli_11_life_5_a_signal_drains_and_the_exit_code_is_0(number):
    async with (
        fake_worker("m") as worker,
        running_process("--worker-urls", worker.url, "--shutdown-grace-period-secs", "2") as smg,
    ):
        with trio.fail_after(2):
            while (await smg.ask(CHAT, HELLO)).status != 200:
                await trio.lowlevel.checkpoint()
        gate = Gate()
        worker.plays.append(gate.before(answers(200, {"late": 1})))
        client = await smg.connect()
        await client.send(request(CHAT, HELLO))
        await gate.reached.wait()
        smg.process.send_signal(number)
        await smg.says(b"draining")
        assert (await smg.ask("/readiness")).document["reason"] == "draining"
        assert (await smg.ask("/liveness")).status == 200
        gate.open.set()
        answer = await client.read()
        assert answer.document == {"late": 1} and answer["connection"] == "close"
        assert await smg.ends() == 0
        assert b"Traceback" not in smg.stderr


async def test_life_6_after_the_grace_period_a_stream_gets_its_error_frame_and_the_exit_code_is_still_0():
    async with (
        fake_worker("m") as worker,
        running_process("--worker-urls", worker.url, "--shutdown-grace-period-secs", "0.6") as smg,
    ):

        async def stuck(turn):
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await turn.wait_gone()

        worker.play = stuck
        client = await smg.connect()
        with trio.fail_after(5):
            while True:
                await client.send(request(CHAT, STREAM))
                answer = await client.read_head()
                if answer.status == 200:
                    break
                await client.read_body(answer)
        smg.process.terminate()
        await client.read_body(answer)
        assert answer.body.startswith(b"data: 1\n\ndata: {") and answer.body.endswith(DONE)
        assert b"upstream_stream_interrupted" in answer.body
        assert await smg.ends() == 0


async def test_life_6_a_plain_request_gets_a_503_after_the_grace_period():
    async with (
        fake_worker("m") as worker,
        running_process("--worker-urls", worker.url, "--shutdown-grace-period-secs", "0.6") as smg,
    ):
        worker.play = hangs
        with trio.fail_after(5):
            while (await smg.ask("/readiness")).status != 200:
                await trio.lowlevel.checkpoint()
        client = await smg.connect()
        await client.send(request(CHAT, {**HELLO}))
        await worker.next_turn()
        smg.process.terminate()
        answer = await client.read()
        assert answer.status == 503 and answer["connection"] == "close"
        assert await smg.ends() == 0


async def test_cli_11_a_second_signal_ends_the_process_at_once_with_130():
    async with fake_worker("m") as worker, running_process("--worker-urls", worker.url) as smg:
        worker.play = hangs
        with trio.fail_after(5):
            while (await smg.ask("/readiness")).status != 200:
                await trio.lowlevel.checkpoint()
        client = await smg.connect()
        await client.send(request(CHAT, HELLO))
        await worker.next_turn()
        smg.process.terminate()
        await smg.says(b"draining")
        smg.process.send_signal(signal.SIGINT)
        assert await smg.ends(3) == 130


@pytest.mark.parametrize("flag", ["--port", "--prometheus-port", "--health-check-port"])
async def test_cli_9_a_port_that_cannot_be_bound_ends_with_1_and_names_the_address(flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = free_ports(3)
        ports = dict(
            zip(("--port", "--prometheus-port", "--health-check-port"), map(str, free), strict=True)
        ) | {flag: str(port)}
        flags = [word for pair in ports.items() for word in pair]
        result = await trio.run_process(
            command("--host", "127.0.0.1", *flags), check=False, capture_stdout=True, capture_stderr=True
        )
    assert result.returncode == 1
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1 and f":{port}" in lines[0] and flag in lines[0]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--policy", "nonsense"], 2),
        (["--port", "0"], 2),
        (["--nonsense"], 2),
        (["--worker-urls", "127.0.0.1:8000"], 2),
        (["--model-alias", "a=a"], 2),
        (["--retry-initial-backoff-ms", "100", "--retry-max-backoff-ms", "10"], 1),
        (["--enable-wasm"], 2),
    ],
)
async def test_cli_6_a_wrong_configuration_ends_before_any_port_is_bound(flags, code):
    result = await trio.run_process(command(*flags), check=False, capture_stdout=True, capture_stderr=True)
    assert result.returncode == code
    assert len(result.stderr.decode().splitlines()) == 1
    assert flags[0] in result.stderr.decode()


async def test_cli_2_life_4_it_starts_without_workers_and_with_a_probe_port():
    (port,) = free_ports(1)
    async with running_process("--health-check-port", str(port)) as smg:
        assert (await smg.ask("/readiness")).status == 503
        assert (await smg.ask("/readiness", port=port)).status == 503
        assert (await smg.ask("/liveness", port=port)).body == b"OK"
        assert (await smg.ask("/workers", port=port)).status == 404
        async with fake_worker("m") as worker:
            assert (await smg.ask("/workers", {"url": worker.url})).status == 202
            with trio.fail_after(3):
                while (await smg.ask("/readiness", port=port)).status != 200:
                    await trio.lowlevel.checkpoint()
            assert (await smg.ask(CHAT, HELLO)).status == 200


async def test_log_1_json_lines_are_json_and_hold_no_prompt():
    async with (
        fake_worker("m") as worker,
        running_process(
            "--log-json",
            "--log-level",
            "debug",
            "--worker-urls",
            worker.url,
            "--shutdown-grace-period-secs",
            "0",
        ) as smg,
    ):
        with trio.fail_after(3):
            while (
                await smg.ask(CHAT, {**HELLO, "messages": [{"role": "user", "content": "sesame"}]})
            ).status != 200:
                await trio.lowlevel.checkpoint()
        smg.process.terminate()
        assert await smg.ends() == 0
        for line in smg.stderr.splitlines():
            assert {"timestamp", "level", "target", "message"} <= json.loads(line).keys()
        assert b"sesame" not in smg.stderr + smg.stdout


async def test_a_process_without_a_terminal_or_stderr_serves_all_the_same():
    port, metrics = free_ports(2)
    process = await trio.lowlevel.open_process(
        command("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with trio.fail_after(20):
            while True:
                try:
                    stream = await trio.open_tcp_stream("127.0.0.1", port)
                    break
                except OSError:
                    await trio.sleep(0.05)
        async with stream:
            await stream.send_all(request("/health"))
            with trio.fail_after(5):
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
    finally:
        process.kill()
        await process.wait()
