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
            near.flush()
            if order != "close":
                assert far.recv(100) == b"last question"
                far.close()
            parking = readiness.open_parking()
            assert await near.receive(parking) == b""
            assert near.was_taken() is taken
            readiness.close_parking(parking)
            near.close()
        nursery.cancel_scope.cancel()


async def test_pieces_of_one_turn_go_out_together_when_its_tasks_have_run():
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        near, far = await pair(readiness)
        assert near.send_nowait(b"one ") == 4
        assert near.send_nowait(b"two") == 3
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(100)
        assert await until_readable(far) == b"one two"
        near.close()
        far.close()
        nursery.cancel_scope.cancel()


async def test_what_was_taken_is_sent_before_a_close_and_before_what_comes_later():
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        near, far = await pair(readiness)
        parking = readiness.open_parking()
        near.send_nowait(b"first ")
        await near.send(parking, b"second ")
        near.send_nowait(b"third ")
        near.send_gathered_nowait(b"fourth ", b"fifth ")
        near.send_nowait(b"last")
        near.close()
        received = b""
        while data := await until_readable(far):
            received += data
        assert received == b"first second third fourth fifth last"
        readiness.close_parking(parking)
        far.close()
        nursery.cancel_scope.cancel()


async def test_a_full_socket_takes_no_more_until_it_has_room_and_loses_nothing():
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        near, far = await pair(readiness)
        parking = readiness.open_parking()
        piece = bytes(range(250)) * 40
        taken = 0
        while sent := near.send_nowait(piece):
            assert sent == len(piece)
            taken += sent
            await trio.lowlevel.checkpoint()
        assert near.send_nowait(piece) == 0
        received = bytearray()
        far.setblocking(False)

        async def read() -> None:
            while len(received) < taken + 4:
                await trio.lowlevel.wait_readable(far)
                received.extend(far.recv(1 << 20))

        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            await near.send(parking, b"end.")
        assert bytes(received) == piece * (taken // len(piece)) + b"end."
        readiness.close_parking(parking)
        near.close()
        far.close()
        nursery.cancel_scope.cancel()
