"""Starting a mesh that cannot be: ports and names that are taken, seeds that are not there yet (CLI-9, FLG-1, FLG-3)."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from smg.cli.serve import _only_settings_error
from smg.errors import SettingsError
from tests.e2e.cluster import LOOPBACK, Cluster
from tests.e2e.gateway import eventually

PATIENCE_S = 15.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@contextmanager
def smg(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, killed with the block."""
    port, metrics = free_ports(2)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "smg", "--host", LOOPBACK, "--port", str(port), "--prometheus-port", str(metrics),
            "--ha-mesh", "--mesh-host", LOOPBACK, *flags,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_line(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    deadline_s = time.monotonic() + PATIENCE_S
    for line in process.stderr:
        if words in line:
            return
        assert time.monotonic() < deadline_s
    raise AssertionError(f"ended without a word of {words!r}")


def test_cli_9_a_mesh_port_that_is_taken_ends_the_process_with_1_and_the_address() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with smg("--mesh-port", str(port)) as process:
            _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert f"--mesh-port: '{LOOPBACK}:{port}'" in told.splitlines()[-1]


def test_a_name_that_is_taken_ends_the_newcomer_with_1_and_both_addresses() -> None:
    first_port, second_port = free_ports(2)
    with smg("--mesh-port", str(first_port), "--node-name", "n") as first:
        wait_line(first, "listening on")
        time.sleep(1.1)  # lives are ordered by the second of their birth
        seeds = f"{LOOPBACK}:{first_port}"
        with smg("--mesh-port", str(second_port), "--node-name", "n", "--seeds", seeds) as second:
            _, told = second.communicate(timeout=PATIENCE_S)
        assert first.poll() is None
    assert second.returncode == 1
    last = told.splitlines()[-1]
    assert "--node-name: 'n'" in last and f":{first_port}" in last and f":{second_port}" in last


def test_life_7_a_signal_says_farewell_at_once() -> None:
    first_port, second_port = free_ports(2)
    with smg("--mesh-port", str(first_port), "--node-name", "a") as first:
        wait_line(first, "listening on")
        seeds = f"{LOOPBACK}:{first_port}"
        with smg("--mesh-port", str(second_port), "--node-name", "b", "--seeds", seeds) as second:
            wait_line(first, "member up node=b")
            second.send_signal(signal.SIGTERM)
            wait_line(first, "left node=b")
            assert second.poll() is None  # its listener is still open
            second.wait(PATIENCE_S)
            assert second.returncode == 0


async def test_flg_1_a_seed_that_comes_up_later_is_joined() -> None:
    late, dead = free_ports(2)
    async with trio.open_nursery() as nursery:
        nodes = Cluster(nursery, ())
        await nodes.start("b", "--seeds", f"{LOOPBACK}:{dead},localhost:{late}")
        await trio.sleep(1.0)
        assert nodes.states("b") == {"b": "alive"}
        assert nodes.mesh("b").status()["state"] == "alive"  # it serves alone meanwhile
        nodes.ports["a"] = late
        await nodes.start("a")
        await eventually(nodes.all_alive, 5.0)
        nursery.cancel_scope.cancel()


def test_only_a_mistake_in_the_settings_is_told_in_one_line() -> None:
    wrong = SettingsError("--node-name", "'n'", "is taken", is_combination=True)
    nested = BaseExceptionGroup("", [BaseExceptionGroup("", [wrong])])
    assert _only_settings_error(nested) is wrong
    assert _only_settings_error(BaseExceptionGroup("", [wrong, RuntimeError()])) is None
    with pytest.raises(BaseExceptionGroup):
        raise nested
