"""A server on a loopback socket for tests: real sockets, free port, everything ended with the test."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from smg.errors import GatewayError
from smg.net.exchange import Exchange, ServerLimits
from smg.net.plain import PlainHandler, plain
from smg.net.readiness import Readiness
from smg.net.server import Server


class Running:
    """A running server: its port, its readiness service, and what its handler reported."""

    def __init__(self, server: Server, readiness: Readiness, port: int, faults: list[BaseException]) -> None:
        self.server = server
        self.readiness = readiness
        self.port = port
        self.faults = faults


async def refuse(exchange: Exchange, error: GatewayError) -> None:
    exchange.request_id = exchange.request_id or "req-test"
    block = f"content-type: text/plain\r\nx-smg-error-code: {error.code}\r\n".encode()
    await exchange.respond(error.status, block, error.message.encode())


@asynccontextmanager
async def running(
    handle: Callable[[Exchange], Awaitable[None]], limits: ServerLimits | None = None
) -> AsyncIterator[Running]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)
    readiness = Readiness()
    faults: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        server = Server(
            handle, refuse, lambda exchange, error: faults.append(error), readiness, limits or ServerLimits()
        )
        await nursery.start(server.serve, [listener])
        yield Running(server, readiness, listener.getsockname()[1], faults)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running_plain(handler: PlainHandler, limits: ServerLimits | None = None) -> AsyncIterator[Running]:
    async with running(plain(handler), limits) as server:
        yield server


@pytest.fixture
def start() -> Callable[..., object]:
    return running


@pytest.fixture
def start_plain() -> Callable[..., object]:
    return running_plain
