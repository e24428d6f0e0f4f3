"""What a connection tells after the other side has closed: was the last request read (RTY-1, RTY-2)?"""

from __future__ import annotations

import socket

import pytest
import trio

from smg.net.connection import PlainConnection
from smg.net.readiness import Readiness


async def pair(readiness: Readiness) -> tuple[PlainConnection, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    # As on a connection that has served before: the kernel delays what it can.
    for _ in range(10):
        near.send(b"question")
        far.recv(100)
        far.send(b"answer")
        near.recv(100) if near.getblocking() else await until_readable(near)
    return PlainConnection(near, readiness), far


async def until_readable(sock: socket.socket) -> bytes:
    await trio.lowlevel.wait_readable(sock)
    return sock.recv(100)


@pytest.mark.parametrize(("order", "taken"), [("read, close", True), ("close", False)])
async def test_a_close_after_reading_is_told_from_a_close_before(order, taken):
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        for _ in range(50):
            near, far = await pair(readiness)
            if order == "close":
                far.close()
            assert near.send_nowait(b"last question") == 13
            if order != "close":
                assert far.recv(100) == b"last question"
                far.close()
            parking = readiness.open_parking()
            assert await near.receive(parking) == b""
            assert near.was_taken() is taken
            readiness.close_parking(parking)
            near.close()
        nursery.cancel_scope.cancel()
