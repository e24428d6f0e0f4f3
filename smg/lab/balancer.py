"""A load balancer as simple as they come: connections, in turn, to the nodes that are ready. `python -m smg.lab.balancer`.

Owns the listener, one health check per node, and two pumps per connection. It is what the demo puts before its nodes,
and a stand-in where no real one is at hand; what it deals out are connections, whose bytes it neither reads nor waits
for. It knows nothing of requests: one that is lost with its node must be asked again by the client.
"""

from __future__ import annotations

import argparse
import signal
import socket
import struct
import sys
from collections.abc import Sequence

import trio

CONNECTIONS_MAX = 4096
"""Connections at once, two sockets each; more wait in the listener's queue."""
WAIT_S = 1.0
"""A node that does not take a connection, or does not answer a check, in this time is passed over."""
CHUNK_BYTES = 65_536


class Target:
    """A node: where it is, whether it is fit, and how many connections it has had."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.is_up = True
        self.connections_total = 0


class Balancer:
    """Deals out connections. `check_path` None: a node that takes connections is fit; else it must answer 200 there."""

    def __init__(
        self, targets: Sequence[Target], check_path: str | None = "/readiness", check_s: float = 0.25
    ) -> None:
        self._turn = list(targets)  # whose turn it is stands first
        self._check_path = check_path
        self._check_s = check_s
        self._free = trio.Semaphore(CONNECTIONS_MAX)

    async def serve(
        self, listener: trio.SocketListener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves until cancelled; `started` when every node has been checked once. Closes the listener."""
        async with listener, trio.open_nursery() as nursery:
            for target in tuple(self._turn):
                await nursery.start(self._watch, target)
            task_status.started()
            while True:
                await self._free.acquire()
                nursery.start_soon(self._carry, await self._accept(listener))

    async def _accept(self, listener: trio.SocketListener) -> trio.SocketStream:
        while True:
            try:
                return await listener.accept()
            except OSError:  # no file is free; connections wait in the queue until one is
                await trio.sleep(self._check_s)

    async def _carry(self, client: trio.SocketStream) -> None:
        try:
            async with client:
                server = await self._connect()
                if server is None:
                    cut(client)
                    return
                async with server, trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, client, server, nursery.cancel_scope)
                    nursery.start_soon(self._pump, server, client, nursery.cancel_scope)
        finally:
            self._free.release()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
        """Carries bytes one way. An end arrives as an end and a break as a break, for a client must tell them apart."""
        try:
            while data := await source.receive_some(CHUNK_BYTES):
                await sink.send_all(data)
            await sink.send_eof()
        except trio.BrokenResourceError:
            cut(source)
            cut(sink)
            both.cancel()

    async def _connect(self) -> trio.SocketStream | None:
        """A connection to the node whose turn it is; those that are down are asked last. None when none answers."""
        for target in sorted(self._turn, key=lambda each: not each.is_up):
            self._turn.remove(target)  # before anything is awaited, else two connections take the same turn
            self._turn.append(target)
            with trio.move_on_after(WAIT_S):
                try:
                    stream = await trio.open_tcp_stream(target.host, target.port)
                except OSError:
                    target.is_up = False  # until a check finds otherwise
                    continue
                target.connections_total += 1
                return stream
        return None

    async def _watch(self, target: Target, *, task_status: trio.TaskStatus[None]) -> None:
        target.is_up = await self._is_fit(target)
        task_status.started()
        while True:
            await trio.sleep(self._check_s)
            target.is_up = await self._is_fit(target)

    async def _is_fit(self, target: Target) -> bool:
        head = f"GET {self._check_path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nConnection: close\r\n\r\n"
        with trio.move_on_after(WAIT_S):
            try:
                async with await trio.open_tcp_stream(target.host, target.port) as stream:
                    if self._check_path is None:
                        return True
                    await stream.send_all(head.encode())
                    answer = b""
                    while b"\r\n" not in answer and (data := await stream.receive_some(CHUNK_BYTES)):
                        answer += data
                    return answer.startswith(b"HTTP/1.1 200 ")
            except (OSError, trio.BrokenResourceError):
                return False
        return False


def cut(stream: trio.SocketStream) -> None:
    """Makes the coming close of the stream a reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def run(host: str, port: int, targets: Sequence[Target], check_path: str | None) -> None:
    """Balances until SIGTERM or SIGINT, and says where, on stdout. Raises OSError when the port cannot be bound."""
    (listener,) = await trio.open_tcp_listeners(port, host=host, backlog=1024)
    async with trio.open_nursery() as nursery:
        await nursery.start(Balancer(targets, check_path).serve, listener)
        bound = listener.socket.getsockname()
        sys.stdout.write(f"balancer listening on http://{bound[0]}:{bound[1]}\n")
        sys.stdout.flush()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m smg.lab.balancer", description="Deal out TCP connections."
    )
    parser.add_argument("nodes", nargs="+", metavar="HOST:PORT", help="where the nodes listen")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: the system chooses)")
    parser.add_argument(
        "--check-path", default="/readiness", help="answers 200 when a node is fit (default: %(default)s)"
    )
    parser.add_argument("--check-connect", action="store_true", help="a node that takes connections is fit")
    arguments = parser.parse_args(argv)
    targets = []
    for node in arguments.nodes:
        host, _, port = node.rpartition(":")
        if not host or not port.isdigit():
            parser.error(f"{node!r} is not HOST:PORT")
        targets.append(Target(host.strip("[]"), int(port)))
    check_path = None if arguments.check_connect else arguments.check_path
    try:
        trio.run(run, arguments.host, arguments.port, targets, check_path)
    except OSError as error:
        sys.stderr.write(f"balancer: {arguments.host}:{arguments.port}: {error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
