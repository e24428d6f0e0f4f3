"""The lives of processes under the supervisor, played by small programs that do exactly what a test says."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from smg.cli import restarts, supervisor
from smg.cli.place import Place
from smg.cli.supervisor import supervise
from smg.net.activation import Inherited
from smg.services.notify import Notifier
from smg.settings import Listening, Settings, Telemetry

PROGRAM = """
import json, os, signal, socket, sys, time
lives = os.environ["LIVES"]
link = socket.socket(fileno=os.dup(0))
def note(word):
    with open(lives, "a") as file:
        file.write(f"{place} {word} {os.getpid()}\\\\n")
place = "?"
start = link.recv(65536)
if not start:
    sys.exit(0)
place = json.loads(start)["member"]["place"]
note("starts")
def ready():
    note("serves")
    link.send(b"READY=1\\\\nSTATUS=x")
def count():
    return sum(line.startswith(f"{place} starts") for line in open(lives))
"""


class Stage:
    """A supervisor whose processes run a script; what they do is written to a file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "lives"
        self.path.touch()
        monkeypatch.setenv("LIVES", str(self.path))
        self._patch = monkeypatch
        self.code: int | None = None

    def plays(self, script: str) -> None:
        self._patch.setattr(
            supervisor,
            "interpreter",
            lambda: [sys.executable, "-S", "-c", PROGRAM.replace("\\\\", "\\") + script],
        )

    @property
    def lines(self) -> list[str]:
        """`<place> <word>` in the order they were written."""
        return [line.rpartition(" ")[0] for line in self.path.read_text().splitlines()]

    async def until(self, is_true: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not is_true():
                await trio.sleep(0.01)

    async def run(self, grace_s: float = 0.1, processes: int = 2) -> int:
        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as sock:
                ports.append(sock.getsockname()[1])
        settings = Settings(
            listening=Listening(
                host="127.0.0.1", port=ports[0], processes=processes, shutdown_grace_period_secs=grace_s
            ),
            telemetry=Telemetry(prometheus_host="127.0.0.1", prometheus_port=ports[1]),
        )
        with trio.fail_after(30):
            self.code = await supervise(settings, (), Place(Inherited(), Notifier()))
        return self.code


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)
    return Stage(tmp_path, monkeypatch)


def is_over(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_the_first_process_serves_before_the_others_begin_and_one_signal_ends_all(stage: Stage) -> None:
    stage.plays("time.sleep(0.2 if place == 0 else 0)\nready()\ntime.sleep(60)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run, 0.1, 3)
        await stage.until(lambda: len(stage.lines) == 6)
        assert stage.lines[:2] == ["0 starts", "0 serves"]
        os.kill(os.getpid(), signal.SIGTERM)
    assert stage.code == 0
    assert all(is_over(int(line.split()[-1])) for line in stage.path.read_text().splitlines())


@pytest.mark.parametrize(
    ("script", "code"),
    [("sys.exit(1)", 1), ("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 1)],
)
async def test_a_first_process_that_cannot_start_ends_all_with_its_code(
    stage: Stage, script: str, code: int
) -> None:
    stage.plays(script)
    assert await stage.run() == code
    assert stage.lines == ["0 starts"]


async def test_another_process_that_cannot_start_ends_all_as_well(stage: Stage) -> None:
    stage.plays("if place == 1: sys.exit(2)\nready()\ntime.sleep(60)")
    assert await stage.run() == 2
    assert sorted(stage.lines) == ["0 serves", "0 starts", "1 starts"]


async def test_a_process_that_ends_later_is_started_again(stage: Stage) -> None:
    stage.plays("ready()\nif place == 1 and count() < 4: sys.exit(0)\ntime.sleep(60)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        await stage.until(lambda: stage.lines.count("1 serves") == 4)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stage.code == 0
    assert stage.lines.count("0 starts") == 1


async def test_a_process_that_hangs_is_killed_and_started_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HANG_S", 0.3)
    stage.plays(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN) if place == 1 and count() == 1 else None\nready()\n"
        "while place == 0 or count() > 1:\n    link.send(b'WATCHDOG=1')\n    time.sleep(0.05)\ntime.sleep(60)"
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        await stage.until(lambda: stage.lines.count("1 serves") == 2)
        await trio.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stage.code == 0
    assert (stage.lines.count("0 starts"), stage.lines.count("1 starts")) == (1, 2)


async def test_a_process_that_never_begins_to_speak_is_killed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_PATIENCE_S", 0.4)
    stage.plays("time.sleep(60)")
    assert await stage.run() == 1
    assert stage.lines == ["0 starts"]


async def test_the_supervisor_ends_when_nobody_serves_for_too_long(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "NOBODY_S", 0.6)
    stage.plays("if count() > 1: sys.exit(1)\nready()\ntime.sleep(0.3)")
    assert await stage.run() == 1
    assert stage.lines.count("0 starts") > 2


async def test_a_process_that_ignores_the_signal_is_killed_after_the_grace_period(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_EXTRA_S", 0.2)
    stage.plays("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(60)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        await stage.until(lambda: len(stage.lines) == 4)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stage.code == 0
    assert all(is_over(int(line.split()[-1])) for line in stage.path.read_text().splitlines())


async def test_a_process_that_cannot_be_started_is_tried_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.plays("ready()\ntime.sleep(0.1 if place == 1 and count() == 1 else 60)")
    opened = trio.lowlevel.open_process
    tries = []

    async def open_process(*arguments: Any, **options: Any) -> trio.Process:
        tries.append(0)
        if 2 < len(tries) < 6:
            raise OSError(12, "Cannot allocate memory")
        return await opened(*arguments, **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        await stage.until(lambda: stage.lines.count("1 serves") == 2)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stage.code == 0
    assert len(tries) == 6


async def test_a_signal_during_the_start_ends_it(stage: Stage) -> None:
    stage.plays("time.sleep(60)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        await stage.until(lambda: stage.lines == ["0 starts"])
        os.kill(os.getpid(), signal.SIGTERM)
    assert stage.code == 0
