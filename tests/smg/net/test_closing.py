"""How a server closes its port: whoever has connected, or may have sent a request, is not sent away without an answer (LIFE-5)."""

from __future__ import annotations

import socket
import sys

import pytest
import trio
import trio.testing

from smg.net.listen import ignore_newcomers
from smg.net.plain import Request, Response, text_response
from tests.smg.net.test_server import echo

ASK = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"


def connected(port: int, data: bytes = b"") -> socket.socket:
    """A connection that the kernel has made, without a turn of the server's loop; with `data` sent."""
    sock = socket.create_connection(("127.0.0.1", port), 5)
    sock.sendall(data)
    sock.setblocking(False)
    return sock


async def everything(sock: socket.socket, within_s: float = 5) -> bytes:
    """What comes until the server closes."""
    received = b""
    with trio.fail_after(within_s):
        while True:
            await trio.lowlevel.wait_readable(sock)
            data = sock.recv(1 << 16)
            received += data
            if not data:
                sock.close()
                return received


async def test_who_has_connected_and_was_not_accepted_yet_is_served(start_plain):
    async with start_plain(echo) as server:
        waiting = [connected(server.port, ASK) for _ in range(20)]
        server.server.stop_listening()
        for sock in waiting:
            answer = await everything(sock)
            assert answer.startswith(b"HTTP/1.1 200 OK") and b"connection: close" in answer
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            connected(server.port)
        await server.server.wait_closed()


async def test_who_has_connected_may_still_send_a_request(start_plain):
    async with start_plain(echo) as server:
        sock = connected(server.port)
        server.server.stop_listening()
        await trio.sleep(0.1)
        sock.send(ASK)
        assert (await everything(sock)).startswith(b"HTTP/1.1 200 OK")


async def test_a_request_that_has_come_on_an_idle_connection_is_answered(start_plain):
    async with start_plain(echo) as server:
        sock = connected(server.port, ASK)
        await trio.lowlevel.wait_readable(sock)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        await trio.sleep(0.1)
        sock.send(ASK)
        server.server.stop_listening(last_word_s=0)
        assert (await everything(sock)).startswith(b"HTTP/1.1 200 OK")


async def test_an_idle_connection_goes_when_it_has_been_silent_long_enough(start_plain):
    async with start_plain(echo) as server:
        old = connected(server.port, ASK)
        await trio.lowlevel.wait_readable(old)
        old.recv(1 << 16)
        await trio.sleep(0.3)
        silent = connected(server.port)
        await trio.sleep(0.05)
        server.server.stop_listening(last_word_s=0.3)
        assert await everything(old, 0.1) == b""
        assert server.server.connection_count == 1
        assert await everything(silent, 1) == b""
        await server.server.wait_closed()


async def test_an_answer_that_has_promised_to_go_on_keeps_its_connection_for_one_more(start_plain):
    reached, gate = trio.Event(), trio.Event()

    async def slow(request: Request) -> Response:
        if request.path == "/slow":
            reached.set()
            await gate.wait()
        return text_response(200, request.path)

    async with start_plain(slow) as server:
        undecided = connected(server.port, ASK.replace(b"/a", b"/slow"))
        await reached.wait()
        server.server.start_draining()
        gate.set()
        assert b"connection: close" in await everything(undecided)  # its head was made during the drain


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is the Linux kernel's")
async def test_newcomers_hear_nothing_while_those_who_are_there_are_served(start_plain):
    async with start_plain(echo) as server:
        there = connected(server.port)
        server.server.turn_newcomers_away()
        late = socket.socket()
        late.settimeout(0.05)
        with pytest.raises(TimeoutError):
            late.connect(("127.0.0.1", server.port))
        late.close()
        there.send(ASK)
        await trio.lowlevel.wait_readable(there)
        assert there.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        server.server.stop_listening()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            connected(server.port)
        there.close()


def test_a_socket_that_cannot_be_filtered_says_so():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one.close()
    with other:
        assert ignore_newcomers(one) is False
