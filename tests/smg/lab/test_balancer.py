"""The load balancer over real sockets: who gets a connection, and how bytes, ends and breaks pass through it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from socket import SO_LINGER, SOL_SOCKET

import pytest
import trio
import trio.testing

from smg.lab.balancer import Balancer, Target, main

LOOPBACK = "127.0.0.1"
CHECK_S = 0.01
PATIENCE_S = 5.0

Serve = Callable[[trio.SocketStream], Awaitable[None]]


class Node:
    """A server on a port of its own: `serve` has the connections of clients, checks get the status `readiness`."""

    def __init__(self, name: bytes, serve: Serve | None = None) -> None:
        self.name = name
        self.readiness = b"200 OK"
        self.checks = 0
        self.target = Target(LOOPBACK, 0)
        self._serve = serve or self._tell_name
        self._scope = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        (listener,) = await trio.open_tcp_listeners(self.target.port, host=LOOPBACK)
        self.target.port = listener.socket.getsockname()[1]
        with trio.CancelScope() as self._scope:
            await trio.serve_listeners(self._take, [listener], task_status=task_status)

    def stop(self) -> None:
        self._scope.cancel()

    async def _take(self, stream: trio.SocketStream) -> None:
        # What a client of these tests sends first is never a request for readiness.
        async with stream:
            first = await stream.receive_some(4)
            if first == b"GET ":
                self.checks += 1
                assert (await stream.receive_some()).startswith(b"/readiness HTTP/1.1\r\n")
                await stream.send_all(b"HTTP/1.1 " + self.readiness + b"\r\nContent-Length: 0\r\n\r\n")
            elif first:
                await self._serve(stream)

    async def _tell_name(self, stream: trio.SocketStream) -> None:
        await stream.send_all(self.name)


@asynccontextmanager
async def balanced(
    *nodes: Node, down: Sequence[Node] = (), check_path: str | None = "/readiness"
) -> AsyncIterator[int]:
    """A balancer before running nodes; its port. Those that are `down` have a port on which nobody listens."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        for node in down:
            node.stop()
        if down:
            await trio.testing.wait_all_tasks_blocked()
        balancer = Balancer([node.target for node in nodes], check_path, CHECK_S)
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        await nursery.start(balancer.serve, listener)
        with trio.fail_after(PATIENCE_S):
            yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def received(stream: trio.SocketStream) -> bytes:
    """All until the end."""
    return b"".join([data async for data in stream])


async def ask(port: int) -> bytes:
    """What the node says to which a new connection leads."""
    async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
        await stream.send_all(b"name")
        return await received(stream)


async def names(port: int, count: int) -> Counter[bytes]:
    return Counter([await ask(port) for _ in range(count)])


async def eventually(is_so: Callable[[], Awaitable[bool]]) -> None:
    while not await is_so():
        await trio.sleep(CHECK_S)


async def test_connections_are_dealt_out_in_turn() -> None:
    nodes = [Node(b"a"), Node(b"b"), Node(b"c")]
    async with balanced(*nodes) as port:
        assert [await ask(port) for _ in range(6)] == [b"a", b"b", b"c"] * 2
    assert [node.target.connections_total for node in nodes] == [2, 2, 2]


async def test_connections_that_come_together_are_dealt_out_as_evenly() -> None:
    told: list[bytes] = []

    async def note(port: int) -> None:
        told.append(await ask(port))

    async with balanced(Node(b"a"), Node(b"b"), Node(b"c")) as port:
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(note, port)
    assert Counter(told) == {b"a": 10, b"b": 10, b"c": 10}


async def test_a_dead_node_is_passed_over_and_the_others_share_its_part() -> None:
    dead = Node(b"b")
    async with balanced(Node(b"a"), dead, Node(b"c"), down=[dead]) as port:
        assert await names(port, 20) == {b"a": 10, b"c": 10}
    assert dead.target.connections_total == 0


async def test_a_node_that_dies_between_two_checks_costs_no_connection() -> None:
    nodes = [Node(b"a"), Node(b"b")]
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        balancer = Balancer([node.target for node in nodes], check_s=60.0)
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        await nursery.start(balancer.serve, listener)
        nodes[1].stop()
        await trio.testing.wait_all_tasks_blocked()
        assert nodes[1].target.is_up  # no check has told yet
        assert await names(listener.socket.getsockname()[1], 4) == {b"a": 4}
        assert not nodes[1].target.is_up
        nursery.cancel_scope.cancel()


async def test_a_node_that_says_it_is_not_ready_gets_nothing_until_it_is() -> None:
    starting = Node(b"b")
    starting.readiness = b"503 Service Unavailable"
    async with balanced(Node(b"a"), starting) as port:
        assert await names(port, 10) == {b"a": 10}
        starting.readiness = b"200 OK"
        await eventually(lambda: says(port, b"b"))
        assert await names(port, 10) == {b"a": 5, b"b": 5}


async def says(port: int, name: bytes) -> bool:
    return await ask(port) == name


async def test_a_node_that_came_back_gets_its_part_again() -> None:
    node = Node(b"b")
    async with balanced(Node(b"a"), node, down=[node]) as port:
        assert await names(port, 4) == {b"a": 4}
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            await eventually(lambda: says(port, b"b"))
            assert await names(port, 10) == {b"a": 5, b"b": 5}
            node.stop()


async def test_with_no_node_ready_one_that_answers_is_better_than_none() -> None:
    starting = Node(b"a")
    starting.readiness = b"503 Service Unavailable"
    async with balanced(starting) as port:
        assert await ask(port) == b"a"


async def test_with_every_node_dead_the_client_is_refused_at_once() -> None:
    dead = Node(b"a")
    async with balanced(dead, down=[dead]) as port:
        stream = await trio.open_tcp_stream(LOOPBACK, port)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"name")
                await received(stream)


async def test_without_a_path_a_node_that_takes_connections_is_fit() -> None:
    node, dead = Node(b"a"), Node(b"b")
    async with balanced(node, dead, down=[dead], check_path=None) as port:
        assert await names(port, 4) == {b"a": 4}
        assert (node.target.is_up, dead.target.is_up) == (True, False)
    assert node.checks == 0


async def test_bytes_pass_both_ways_as_they_come_and_as_they_are() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with balanced(Node(b"", echo)) as port:
        async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
            await stream.send_all(b"head")  # goes to the node's look at the first four bytes
            for piece in (b"1", b"\x00\xff" * 3, b"\r\n\r\n"):
                await stream.send_all(piece)
                assert await stream.receive_some() == piece  # nothing is held back until more comes
            large = bytes(range(256)) * 8_192
            got = bytearray()

            async def send() -> None:
                await stream.send_all(large)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while len(got) < len(large):
                    got += await stream.receive_some()
            assert bytes(got) == large


async def test_a_client_that_has_said_all_still_gets_its_answer() -> None:
    async def answer_at_the_end(stream: trio.SocketStream) -> None:
        await stream.send_all(b"got " + await received(stream))

    async with balanced(Node(b"", answer_at_the_end)) as port:
        async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
            await stream.send_all(b"ask:all of it")
            await stream.send_eof()
            assert await received(stream) == b"got all of it"


async def test_a_node_that_has_said_all_still_hears_the_client() -> None:
    heard: list[bytes] = []
    over = trio.Event()

    async def answer_first(stream: trio.SocketStream) -> None:
        await stream.send_all(b"bye")
        await stream.send_eof()
        heard.append(await received(stream))
        over.set()

    async with balanced(Node(b"", answer_first)) as port:
        async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
            await stream.send_all(b"ask:")
            assert await received(stream) == b"bye"
            await stream.send_all(b"and more")
            await stream.send_eof()
            await over.wait()
    assert heard == [b"and more"]


async def test_a_break_arrives_as_a_break_and_not_as_an_end() -> None:
    async def crash(stream: trio.SocketStream) -> None:
        await stream.send_all(b"half of an ")
        await stream.receive_some()  # until the client has it
        stream.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))

    async with balanced(Node(b"", crash)) as port:
        async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
            await stream.send_all(b"ask:")
            assert await stream.receive_some() == b"half of an "
            await stream.send_all(b"?")
            with pytest.raises(trio.BrokenResourceError):
                await received(stream)


async def test_a_client_that_leaves_is_gone_from_its_node_too() -> None:
    gone = trio.Event()

    async def talk(stream: trio.SocketStream) -> None:
        try:
            while True:
                await stream.send_all(b"word ")
                await trio.sleep(0.001)
        except trio.BrokenResourceError:
            gone.set()

    async with balanced(Node(b"", talk)) as port:
        async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
            await stream.send_all(b"ask:")
            await stream.receive_some()
        await gone.wait()


def test_a_node_without_a_port_is_refused_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["localhost"])
    assert refused.value.code == 2
    assert "'localhost' is not HOST:PORT" in capsys.readouterr().err


async def test_a_port_that_is_taken_ends_the_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
    async with listener:
        port = listener.socket.getsockname()[1]
        code = await trio.to_thread.run_sync(main, ["--port", str(port), "127.0.0.1:1"])
    assert code == 1
    assert capsys.readouterr().err == f"balancer: 127.0.0.1:{port}: Address already in use\n"
