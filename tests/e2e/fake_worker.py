"""A worker that does exactly what a test tells it, over a real socket, and remembers exactly the bytes it received.

Owns no HTTP library: requests are cut by hand, answers are the bytes of the script, so that a test can send what no
server would. A script is a `Play`: an async function of a `Turn`, the one request it answers. Probes and metadata
questions are answered as a healthy engine does unless a test says otherwise.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from smg.fleet.worker import worker_id

PLACES = (
    "/health",
    "/v1/models",
    "/version",
    "/server_info",
    "/get_server_info",
    "/metrics",
    "/v1/loads",
    "/get_load",
)
"""What gateways ask on their own; not counted among the turns of a test."""


class Turn:
    """One request as the worker received it, and the means to answer it.

    `raw` are all its bytes, `lines` its header lines with names as they came. `gone` is set when the gateway has
    closed or reset this connection.
    """

    def __init__(self, worker: FakeWorker, stream: trio.SocketStream, head: bytes, rest: bytes) -> None:
        self.worker = worker
        self.stream = stream
        self.head = head
        self.body = b""
        self.rest = rest
        start, *lines = head.split(b"\r\n")[:-2]
        self.method, self.target, self.version = start.split(b" ")
        self.lines = [tuple(line.split(b": ", 1)) for line in lines]
        self.gone = trio.Event()

    @property
    def raw(self) -> bytes:
        return self.head + self.body

    @property
    def path(self) -> str:
        return self.target.decode().partition("?")[0]

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> bytes | None:
        """The only value of a header, None without one; two are an error of the gateway."""
        values = [value for found, value in self.lines if found.lower() == name.encode()]
        assert len(values) < 2, values
        return values[0] if values else None

    @property
    def names(self) -> set[str]:
        return {name.decode().lower() for name, _ in self.lines}

    async def read_body(self) -> None:
        """Takes the body; the gateway always sends a length."""
        assert self.header("transfer-encoding") is None
        length = int(self.header("content-length") or 0)
        while len(self.rest) < length:
            data = await self.stream.receive_some(1 << 20)
            if not data:
                raise trio.BrokenResourceError
            self.rest += data
        self.body, self.rest = self.rest[:length], self.rest[length:]

    async def send(self, *pieces: bytes) -> None:
        """Sends each piece by itself; TCP_NODELAY makes each a packet of its own."""
        for piece in pieces:
            await self.stream.send_all(piece)

    def reset(self) -> None:
        """Ends the connection with a TCP reset."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def close(self) -> None:
        await self.stream.aclose()

    async def wait_gone(self) -> None:
        """Waits until the gateway has ended this connection."""
        try:
            data = await self.stream.receive_some()
            assert not data, f"more from the gateway: {data!r}"
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.gone.set()


Play = Callable[[Turn], Awaitable[None]]

JSON = "application/json"


def head(status: int | str = 200, *lines: str, length: int | None = None) -> bytes:
    """An answer's head with these header lines."""
    first = f"HTTP/1.1 {status} X" if isinstance(status, int) else status
    all_lines = [first, *lines, *([] if length is None else [f"content-length: {length}"])]
    return ("\r\n".join(all_lines) + "\r\n\r\n").encode("latin-1")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"
SSE = "content-type: text/event-stream"
CHUNKED = "transfer-encoding: chunked"
SSE_HEAD = head(200, SSE, CHUNKED)


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def says(*pieces: bytes, close: bool = False) -> Play:
    """Sends these bytes."""

    async def play(turn: Turn) -> None:
        await turn.send(*pieces)
        if close:
            await turn.close()

    return play


def answers(
    status: int = 200, document: Any = None, *lines: str, body: bytes | None = None, type: str | None = JSON
) -> Play:
    """A whole answer with a length."""
    if body is None:
        body = json.dumps({"ok": True} if document is None else document).encode()
    typed = [f"content-type: {type}"] if type else []
    return says(head(status, *typed, *lines, length=len(body)) + body)


def streams(*pieces: bytes, end: bool = True) -> Play:
    """An event stream, each piece a chunk and a packet of its own."""
    return says(SSE_HEAD, *map(chunk, pieces), *([END] if end else []))


async def hangs(turn: Turn) -> None:
    """Never answers."""
    await turn.wait_gone()


async def resets(turn: Turn) -> None:
    """Reads the request and resets."""
    turn.reset()


async def closes(turn: Turn) -> None:
    """Reads the request and closes."""
    await turn.close()


def breaks(*pieces: bytes, reset: bool = False) -> Play:
    """Sends these bytes, then dies."""

    async def play(turn: Turn) -> None:
        await turn.send(*pieces)
        if reset:
            # A reset overtakes what the other side has not read; let it read first.
            await trio.testing.wait_all_tasks_blocked(0.02)
            turn.reset()
        else:
            await turn.close()

    return play


class Gate:
    """Holds plays at a point until the test opens it."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.open = trio.Event()

    def before(self, play: Play) -> Play:
        async def gated(turn: Turn) -> None:
            self.reached.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, turn)
                await self.open.wait()
                nursery.cancel_scope.cancel()
            if not turn.gone.is_set():
                await play(turn)

        return gated

    async def _watch(self, turn: Turn) -> None:
        await turn.wait_gone()


class FakeWorker:
    """See the module. `plays` are taken one per turn, then `play` is used; `on_head` answers before the body is read."""

    def __init__(self, listener: trio.SocketListener, models: tuple[str, ...], name: str) -> None:
        _, self.port = listener.socket.getsockname()[:2]
        self.name = name
        self.url = f"http://127.0.0.1:{self.port}"
        self.id = worker_id(self.url)
        self.models = models
        self.turns: list[Turn] = []
        self.asked: list[Turn] = []
        self.play: Play = answers(
            200, {"worker": name, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        )
        self.plays: deque[Play] = deque()
        self.on_head: Play | None = None
        self.on_path: dict[str, Play] = {"/health": answers(200, {})}
        self.connections_total = 0
        self.connections = 0
        self._new, self._turns = trio.open_memory_channel[Turn](10_000)
        self._cancel = trio.CancelScope()

    async def next_turn(self) -> Turn:
        """The next request of a client."""
        with trio.fail_after(5):
            return await self._turns.receive()

    def kill(self) -> None:
        """Ends every connection with a reset and refuses new ones, as kill -9 does."""
        self._cancel.cancel()

    async def serve(self, listener: trio.SocketListener) -> None:
        with self._cancel:
            async with trio.open_nursery() as nursery:
                try:
                    while True:
                        nursery.start_soon(self._converse, await listener.accept())
                finally:
                    listener.socket.close()

    async def _converse(self, stream: trio.SocketStream) -> None:
        self.connections_total += 1
        self.connections += 1
        try:
            rest = b""
            while stream.socket.fileno() >= 0:
                while b"\r\n\r\n" not in rest:
                    data = await stream.receive_some(1 << 20)
                    if not data:
                        assert not rest, f"half a request: {rest!r}"
                        return
                    rest += data
                head, rest = rest[: rest.index(b"\r\n\r\n") + 4], rest[rest.index(b"\r\n\r\n") + 4 :]
                turn = Turn(self, stream, head, rest)
                await self._answer(turn)
                rest = turn.rest
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except trio.Cancelled:
            if stream.socket.fileno() >= 0:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise
        finally:
            self.connections -= 1
            stream.socket.close()

    async def _answer(self, turn: Turn) -> None:
        if turn.method == b"GET" or turn.path in self.on_path:
            await turn.read_body()
            self.asked.append(turn)
            play = self.on_path.get(turn.path)
            if play is None and turn.path == "/v1/models" and self.models:
                play = answers(200, {"object": "list", "data": [{"id": model} for model in self.models]})
            await (play or answers(404, {"detail": "Not Found"}))(turn)
            return
        if self.on_head is not None:
            self.turns.append(turn)
            self._new.send_nowait(turn)
            await self.on_head(turn)
            return
        await turn.read_body()
        self.turns.append(turn)
        self._new.send_nowait(turn)
        play = self.plays.popleft() if self.plays else self.play
        await play(turn)


@asynccontextmanager
async def fake_worker(
    *models: str, name: str = "a", port: int = 0, nursery: trio.Nursery | None = None
) -> AsyncIterator[FakeWorker]:
    """A worker on a free port, gone with the block."""
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1", backlog=1024)
    worker = FakeWorker(listener, models, name)
    async with trio.open_nursery() as own:
        own.start_soon(worker.serve, listener)
        yield worker
        own.cancel_scope.cancel()


@asynccontextmanager
async def fake_workers(count: int, *models: str) -> AsyncIterator[list[FakeWorker]]:
    """Several workers of the same models, named a, b, c."""
    async with trio.open_nursery() as own:
        workers = []
        for number in range(count):
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
            worker = FakeWorker(listener, models, "abcdefghij"[number])
            own.start_soon(worker.serve, listener)
            workers.append(worker)
        yield workers
        own.cancel_scope.cancel()
