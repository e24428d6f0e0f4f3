"""`--processes N`: one port, one metrics page, one signal, whatever becomes of a single process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from functools import partial

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from smg.cli.supervisor import free_mesh_ports
from tests.e2e.fake_worker import answers, fake_worker, hangs
from tests.e2e.gateway import CHAT, HELLO, eventually, request
from tests.e2e.process import Process, command, free_ports, running_process

TWO = ("--processes", "2", "--shutdown-grace-period-secs", "2")
QUICK = ("--shutdown-grace-period-secs", "0.4")


async def until(smg: Process, is_true, within_s: float = 15.0) -> None:
    """Waits for a fact that is asked for over the port."""
    with trio.fail_after(within_s):
        while not await is_true():
            await trio.sleep(0.02)


async def until_ready(smg: Process) -> None:
    """Every process has said that it serves, and the port finds a worker whoever answers."""
    streak = 0
    with trio.fail_after(10):
        while streak < 12:
            streak = streak + 1 if (await smg.ask("/readiness")).status == 200 else 0


async def page(smg: Process) -> dict[tuple[str, ...], float]:
    text = (await smg.ask("/metrics", port=smg.metrics_port)).body.decode()
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def pids(smg: Process) -> dict[int, int]:
    """Place of each process to the pid of its latest life, from the log."""
    found = re.findall(rb"\[\S+-(\d+)\] smg this process serves version=\S+ pid=(\d+)", smg.stderr)
    return {int(place): int(pid) for place, pid in found}


def those_who_said(smg: Process, message: str) -> set[str]:
    """Names of the processes with this message in their JSON lines so far."""
    lines = [json.loads(line) for line in smg.stderr.rpartition(b"\n")[0].splitlines()]
    return {line["process"] for line in lines if line["message"] == message}


def neighbouring_ports() -> tuple[int, int]:
    """Two free ports in a row, as a mesh of two processes needs them."""
    for port in free_mesh_ports(50):
        with socket.socket() as sock, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            try:
                sock.bind(("127.0.0.1", port + 1))
                datagrams.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        return port, port + 1
    raise AssertionError("no two free ports in a row")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_two_processes_share_the_port_the_workers_and_the_metrics_page():
    (health,) = free_ports(1)
    async with (
        fake_worker("m") as worker,
        running_process(*TWO, "--health-check-port", str(health)) as smg,
    ):
        await eventually(lambda: len(pids(smg)) == 2)
        assert b"[supervisor] smg.supervisor smg listening on http://127.0.0.1:%d" % smg.port in smg.stderr
        assert (await smg.ask("/readiness", port=health)).status == 503
        # A worker that is told to one process is known to both: they are a mesh of their own.
        assert (await smg.ask("/workers", {"url": worker.url})).status == 202
        await until_ready(smg)
        ready = await smg.ask("/readiness", port=health)
        assert (ready.status, ready.document["status"]) == (200, "ready")
        assert (await smg.ask("/liveness", port=health)).body == b"OK"
        assert (await smg.ask("/workers", port=health)).status == 404
        members = (await smg.ask("/mesh/members")).document["members"]
        assert [member["state"] for member in members] == ["alive", "alive"]
        assert {member["name"][-2:] for member in members} == {"-0", "-1"}
        before = await page(smg)
        clients = [await smg.connect() for _ in range(16)]
        for client in clients:
            assert (await client.ask(CHAT, HELLO)).status == 200
        seen = await page(smg)
        done = ("smg_http_requests_total", "method=POST", f"path={CHAT}")
        assert seen[done] - before.get(done, 0) == 16
        assert seen["smg_http_connections_active",] == 16
        for place in "01":
            assert seen["smg_process_up", f"process={place}"] == 1
            assert seen["smg_mesh_members", f"process={place}", "state=alive"] == 2
            assert seen["smg_worker_health", f"process={place}", f"worker={worker.url}"] == 1
        for client in clients:
            await client.leave()
        assert (await smg.ask("/metrics/more", port=smg.metrics_port)).status == 404
        ui = await smg.ask("/ui", port=smg.metrics_port)
        assert ui.status == 200 and b"<html" in ui.body
        events = await smg.connect(smg.metrics_port)
        await events.send(request("/ui/events"))
        assert (await events.read_head())["content-type"] == "text/event-stream"
        assert b"data: {" in (await events.read_chunk() or b"")
        await events.leave()
        places = set()
        with trio.fail_after(5):
            while len(places) < 2:
                places.add((await smg.ask("/mesh/status")).document["node"][-2:])


async def test_a_killed_process_is_back_and_neither_it_nor_a_stopped_one_fails_a_new_connection():
    async with fake_worker("m") as worker, running_process("--worker-urls", worker.url, *TWO) as smg:
        await until_ready(smg)
        await page(smg)
        done = ("smg_http_requests_total", "method=POST", f"path={CHAT}")
        victim = pids(smg)[0]
        answers, longest_s = 0, 0.0
        os.kill(victim, signal.SIGKILL)
        with trio.fail_after(20):
            while pids(smg)[0] == victim:
                started_s = time.perf_counter()
                assert (await smg.ask(CHAT, HELLO)).status == 200
                longest_s = max(longest_s, time.perf_counter() - started_s)
                answers += 1
        assert answers > 5
        assert longest_s < 3
        await until(smg, lambda: is_up(smg, "0"))
        for _ in range(10):
            assert (await smg.ask(CHAT, HELLO)).status == 200
        seen = await page(smg)
        # Whatever the dead process had counted at the last look is in the sum, and nothing is counted twice.
        assert answers + 10 - 1 <= seen[done] <= answers + 10
        assert seen["smg_process_restarts_total", "process=0"] == 1
        assert seen["smg_process_restarts_total", "process=1"] == 0
        await a_stopped_process_delays_nobody(smg)


async def a_stopped_process_delays_nobody(smg: Process) -> None:
    before = await page(smg)
    os.kill(pids(smg)[1], signal.SIGSTOP)
    for _ in range(12):
        assert (await smg.ask(CHAT, HELLO)).status == 200
    with trio.fail_after(4):
        seen = await page(smg)
    assert seen["smg_process_up", "process=1"] == 0
    assert seen["smg_process_up", "process=0"] == 1
    assert ("smg_mesh_members", "process=1", "state=alive") not in seen
    probes = ("smg_worker_health_checks_total", "result=success", "worker_type=regular")
    assert seen[probes] >= before[probes]  # what it had counted is not forgotten


async def is_value(smg: Process, series: tuple[str, ...], value: float) -> bool:
    return (await page(smg))[series] == value


async def is_up(smg: Process, place: str) -> bool:
    return (await page(smg))["smg_process_up", f"process={place}"] == 1


async def test_limits_are_of_all_together_and_one_signal_drains_all():
    limit = ("--max-concurrent-requests", "6", "--queue-size", "0")
    async with fake_worker("m") as worker, running_process("--worker-urls", worker.url, *TWO, *limit) as smg:
        await until_ready(smg)
        children = pids(smg)
        gate = trio.Event()

        async def slowly(turn):
            await gate.wait()
            await answers(200)(turn)

        worker.play = slowly
        clients = [await smg.connect() for _ in range(40)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
        held = ("smg_admission_inflight",)
        await until(smg, partial(is_value, smg, held, 6))
        smg.process.send_signal(signal.SIGTERM)
        await smg.says(b"draining all processes")
        await eventually(lambda: smg.stderr.count(b" draining grace_secs=") == 2)
        gate.set()
        found = [await client.read() for client in clients]
        assert sorted(answer.status for answer in found) == [200] * 6 + [429] * 34
        assert {answer.get("connection") for answer in found if answer.status == 200} == {"close"}
        assert await smg.ends() == 0
        assert not any(map(is_alive, children.values()))
        with pytest.raises(OSError):
            await smg.connect()


async def test_in_a_mesh_they_are_two_members_and_a_second_signal_ends_all_with_130():
    first, last = neighbouring_ports()
    mesh = ("--ha-mesh", "--mesh-host", "127.0.0.1", "--mesh-port", str(first), "--node-name", "gw")
    async with fake_worker("m") as worker, running_process("--worker-urls", worker.url, *TWO, *mesh) as smg:
        await until_ready(smg)
        members = (await smg.ask("/mesh/members")).document["members"]
        assert {(member["name"], member["address"]) for member in members} == {
            ("gw-0", f"127.0.0.1:{first}"),
            ("gw-1", f"127.0.0.1:{last}"),
        }
        children = pids(smg)
        worker.play = hangs
        client = await smg.connect()
        await client.send(request(CHAT, HELLO))
        await worker.next_turn()
        smg.process.send_signal(signal.SIGTERM)
        await smg.says(b"draining all processes")
        smg.process.send_signal(signal.SIGINT)
        assert await smg.ends(3) == 130
        await eventually(lambda: not any(map(is_alive, children.values())))


async def test_the_processes_end_when_their_supervisor_is_killed():
    async with running_process(*TWO, *QUICK) as smg:
        children = pids(smg)
        smg.process.kill()
        await smg.process.wait()
        await eventually(lambda: not any(map(is_alive, children.values())), 8)


async def test_a_hangup_reloads_every_process_json_lines_name_them_and_the_port_is_theirs(tmp_path):
    key = tmp_path / "key"
    key.write_text("before\n")
    async with running_process(*TWO, *QUICK, "--log-json", "--api-key", f"@{key}", ready=False) as smg:
        await smg.says(b"smg listening on")
        key.write_text("after\n")
        smg.process.send_signal(signal.SIGHUP)
        with trio.fail_after(5):
            while len(those_who_said(smg, "reloaded")) < 2:
                await smg._said.wait()
        for _ in range(12):
            assert (await smg.ask("/workers", None, "authorization: Bearer after")).status == 200
            assert (await smg.ask("/workers", None, "authorization: Bearer before")).status == 401
        names = {json.loads(line)["process"] for line in smg.stderr.splitlines()}
        assert "supervisor" in names
        assert {name[-2:] for name in names - {"supervisor"}} == {"-0", "-1"}
        told = await trio.run_process(
            command("--host", "127.0.0.1", "--port", str(smg.port), "--processes", "2"),
            check=False, capture_stdout=True, capture_stderr=True,
        )  # fmt: skip
        assert told.returncode == 1
        assert f"cannot listen on 127.0.0.1:{smg.port}" in told.stderr.decode()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--policy", "nonsense"), 2, "--policy"),
        (("--tls-cert-path", "/nowhere/cert", "--tls-key-path", "/nowhere/key"), 1, "/nowhere/"),
    ],
)
async def test_cli_6_a_wrong_configuration_is_told_once(flags, code, words):
    port, metrics = free_ports(2)
    result = await trio.run_process(
        command("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics), "--processes", "2", *flags),
        check=False, capture_stdout=True, capture_stderr=True,
    )  # fmt: skip
    assert result.returncode == code
    told = [line for line in result.stderr.decode().splitlines() if line.startswith("smg: error:")]
    assert len(told) == 1 and words in told[0]
