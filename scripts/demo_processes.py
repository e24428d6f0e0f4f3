"""The processes of the demo: engines, nodes and a load balancer, started as anybody would start them, ended together.

Owns every process it starts, by its id, and their logs. It must never leave one behind: whatever ends the `async with`
block ends them, first kindly, then surely. They are no members of the terminal's group, so that Ctrl-C reaches
the story alone, which then ends them in order.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import trio

START_S = 30.0
STOP_S = 3.0
START_TRIES = 3
"""A port that was free may be taken when the process gets to it; then there are others."""
LOOPBACK = "127.0.0.1"
SMG = (sys.executable, "-m", "smg")


class CannotStart(Exception):
    """A process that ended, or said nothing, where it should have listened."""


class Process:
    """A running process and its log."""

    def __init__(self, name: str, process: trio.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @property
    def id(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False when it has ended, by us or by itself."""
        return self._process.returncode is None

    async def kill(self) -> None:
        """Ends it at once, as a crash would."""
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """Asks it to end, and makes it when it takes too long. May run while everything else is cancelled."""
        with trio.CancelScope(shield=True):
            if self.is_running:
                self._process.terminate()
                with trio.move_on_after(STOP_S):
                    await self._process.wait()
            if self.is_running:
                await self.kill()

    async def wait_said(self, words: str, count: int = 1) -> list[str]:
        """The lines of its log with these words, as soon as there are `count`. Raises `CannotStart`."""
        with trio.move_on_after(START_S):
            while True:
                is_running = self.is_running
                lines = [line for line in self.log.read_text().splitlines() if words in line]
                if len(lines) >= count:
                    return lines
                if not is_running:
                    break
                await trio.sleep(0.02)
        tail = "\n".join(self.log.read_text().splitlines()[-5:])
        raise CannotStart(f"{self.name} did not start, see {self.log}:\n{tail}")


class Processes:
    """Everything that runs; leaving the `async with` block ends it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[Process] = []
        logs.mkdir(parents=True, exist_ok=True)

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end(list(self._running))

    async def end(self, processes: Sequence[Process]) -> None:
        """Ends these, all at the same time."""
        async with trio.open_nursery() as nursery:
            for process in processes:
                nursery.start_soon(process.end)
        self._running = [process for process in self._running if process.is_running]

    async def start(
        self, name: str, command: Callable[[], Sequence[str]], said: str, count: int = 1
    ) -> tuple[Process, list[str]]:
        """Starts `command()` and waits until it has `said` so; the lines that say it. Raises `CannotStart`."""
        for attempt in range(START_TRIES):
            process = await self._open(name, command())
            try:
                return process, await process.wait_said(said, count)
            except CannotStart:
                await process.end()
                if attempt == START_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    async def _open(self, name: str, command: Sequence[str]) -> Process:
        log = self._logs / f"{name.replace(' ', '-')}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SMG_")}
        with log.open("wb") as sink:
            opened = await trio.lowlevel.open_process(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
        process = Process(name, opened, log)
        self._running.append(process)
        return process


def free_ports(count: int) -> list[int]:
    """Ports of the loopback on which nobody listens right now, neither by TCP nor by UDP."""
    found: list[int] = []
    held: list[socket.socket] = []
    while len(found) < count:
        stream = socket.create_server((LOOPBACK, 0))
        held.append(stream)
        port = stream.getsockname()[1]
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.append(datagram)
        try:
            datagram.bind((LOOPBACK, port))
        except OSError:
            continue
        found.append(port)
    for each in held:
        each.close()
    return found
