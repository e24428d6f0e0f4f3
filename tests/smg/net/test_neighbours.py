"""A server takes what its neighbour on the same port leaves waiting, and only that."""

from __future__ import annotations

import socket

import trio

from smg.net.exchange import Exchange, ServerLimits
from smg.net.listen import listen_shared
from smg.net.readiness import Readiness
from smg.net.server import Server

ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def named(name: bytes, readiness: Readiness) -> Server:
    async def handle(exchange: Exchange) -> None:
        exchange.request_id = "req"
        await exchange.respond(200, b"", name)

    async def refuse(exchange: Exchange, error: Exception) -> None:
        raise AssertionError(error)

    def report(exchange: Exchange, error: BaseException) -> None:
        raise AssertionError(error)

    return Server(handle, refuse, report, readiness, ServerLimits())


async def answer(port: int) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(ASK)
        with trio.fail_after(5):
            return (await stream.receive_some()).rpartition(b"\r\n\r\n")[2]


async def test_a_dead_neighbours_connections_are_served_and_a_living_ones_are_left_to_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (one,), (other,) = listen_shared("127.0.0.1", port, "--port", 2)
    copy, back = one.dup(), other.dup()
    async with trio.open_nursery() as nursery:
        readiness = Readiness()
        await nursery.start(readiness.run)
        first = named(b"first", readiness)
        await nursery.start(first.serve, [one], [other])
        assert {await answer(port) for _ in range(20)} == {b"first"}
        second = named(b"second", readiness)
        await nursery.start(second.serve, [back], [copy])
        found = [await answer(port) for _ in range(60)]
        assert set(found) == {b"first", b"second"}
        nursery.cancel_scope.cancel()
