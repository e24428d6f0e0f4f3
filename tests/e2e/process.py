"""The gateway as a process of its own: for signals, exit codes, and what is written where."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from tests.e2e.gateway import Answer, Client

STARTS_WITHIN_S = 20.0
"""Imports on a machine that runs other tests beside."""


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; all are held while they are chosen, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Process:
    """A running `python -m smg`: its ports and what it has written to stderr so far."""

    def __init__(self, process: trio.Process, port: int, metrics_port: int) -> None:
        self.process = process
        self.port = port
        self.metrics_port = metrics_port
        self.stderr = b""
        self.stdout = b""
        self._said = trio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self, port: int = 0) -> Client:
        return Client(await trio.open_tcp_stream("127.0.0.1", port or self.port))

    async def ask(self, *arguments: Any, port: int = 0, **options: Any) -> Answer:
        client = await self.connect(port)
        answer = await client.ask(*arguments, **options)
        await client.leave()
        return answer

    async def says(self, text: bytes) -> None:
        """Waits until the process has written `text` to stderr."""
        with trio.fail_after(STARTS_WITHIN_S):
            while text not in self.stderr:
                assert self.process.returncode is None, self.stderr
                await self._said.wait()

    async def ends(self, within_s: float = 10.0) -> int:
        """The exit code."""
        with trio.fail_after(within_s):
            return await self.process.wait()

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.stderr += data
            self._said.set()
            self._said = trio.Event()
        self._said.set()

    async def read_stdout(self) -> None:
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self.stdout += data


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "smg", *flags]


@asynccontextmanager
async def running_process(*flags: str, ready: bool = True) -> AsyncIterator[Process]:
    """A gateway process on free ports of the loopback; killed with the block when it still runs."""
    port, metrics_port = free_ports(2)
    flags = ("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port), *flags)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SMG_")}
    process = await trio.lowlevel.open_process(
        command(*flags), stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    running = Process(process, port, metrics_port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.read)
        nursery.start_soon(running.read_stdout)
        try:
            if ready:
                await running.says(b"smg listening on http://127.0.0.1:%d" % port)
            yield running
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await process.wait()
        nursery.cancel_scope.cancel()
