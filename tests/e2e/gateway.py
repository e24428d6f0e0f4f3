"""A gateway node in this process, over real sockets, composed as `cli/serve.py` does, and a client that believes nothing.

The client cuts answers by hand and checks on each of them what HTTP-17 promises. When a test is done, the node must be
quiet: nothing in flight, nothing waiting, no fault reported (RT-3, MET-10, ERR-21).
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import trio

from mesh.transport import Transport
from smg.cli.flags import Given
from smg.cli.node import Node
from smg.cli.serve import drain
from smg.net.readiness import Readiness
from smg.net.server import Server
from smg.settings import Settings
from tests.e2e.fake_worker import FakeWorker

PATIENCE_S = 5.0
"""Longer than anything here takes on a busy machine; a test that waits so long has failed."""

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM: dict[str, Any] = {**HELLO, "stream": True}


async def eventually(is_true: Callable[[], Any], within_s: float = PATIENCE_S) -> None:
    """Waits until a fact that nobody signals is true."""
    with trio.move_on_after(within_s):
        while not is_true():
            await trio.sleep(0.002)
    assert is_true(), "not within the time"


def request(
    target: str,
    document: Any = None,
    *headers: str,
    method: str | None = None,
    body: bytes | None = None,
    version: str = "1.1",
    type: str | None = "application/json",
) -> bytes:
    """The bytes of a request."""
    if body is None and document is not None:
        body = json.dumps(document).encode()
    method = method or ("GET" if body is None else "POST")
    lines = [f"{method} {target} HTTP/{version}", "host: gateway"]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
        if type is not None:
            lines.append(f"content-type: {type}")
    return ("\r\n".join([*lines, *headers]) + "\r\n\r\n").encode("latin-1") + (body or b"")


class Answer:
    """A whole answer: `framing` is length, chunked, close or none; `chunks` the pieces of a chunked body."""

    def __init__(self, status: int, lines: list[tuple[str, str]]) -> None:
        self.status = status
        self.lines = lines
        self.framing = ""
        self.chunks: list[bytes] = []
        self.body = b""
        self.is_cut = False

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.lines} {self.body[:300]!r}>"

    def all(self, name: str) -> list[str]:
        return [value for found, value in self.lines if found == name]

    def __getitem__(self, name: str) -> str:
        values = self.all(name)
        assert len(values) == 1, (name, self.lines)
        return values[0]

    def get(self, name: str) -> str | None:
        return self[name] if self.all(name) else None

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        return self.get("x-smg-error-code")

    @property
    def worker(self) -> str | None:
        return self.get("x-smg-worker-id")

    def is_error(self, status: int, code: str) -> bool:
        """Whether this is a gateway error of section 8, in header and body."""
        document = self.document
        error = document["error"]
        if isinstance(error, dict):
            assert error.get("code", code) == code, self
            assert error["message"] and "127.0.0.1" not in error["message"], self
        else:
            assert document["code"] == code, self
        assert (self.status, self.code) == (status, code), self
        return True


class Client:
    """One client connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.rest = b""
        self.has_ended = False

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            await self.stream.send_all(piece)

    async def ask(self, *arguments: Any, **options: Any) -> Answer:
        """Sends a request (see `request`) and reads the answer."""
        await self.send(request(*arguments, **options))
        return await self.read(is_head=options.get("method") == "HEAD")

    async def more(self) -> bool:
        """Receives; False at the end of the gateway's output. A reset raises `BrokenResourceError`."""
        data = await self.stream.receive_some(1 << 18)
        self.rest += data
        self.has_ended = not data
        return bool(data)

    async def read_head(self) -> Answer:
        """The head of the next answer that is not interim."""
        with trio.fail_after(PATIENCE_S):
            while b"\r\n\r\n" not in self.rest:
                assert await self.more(), f"closed before a head: {self.rest!r}"
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        start, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = start.split(" ", 2)
        assert version == "HTTP/1.1"
        pairs = []
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon and name == name.lower().strip(), line
            pairs.append((name, value))
        return Answer(int(status), pairs)

    async def read(self, *, is_head: bool = False, may_cut: bool = False) -> Answer:
        """The next whole answer, checked (HTTP-17). `may_cut`: the body may break off, `is_cut` tells it."""
        answer = await self.read_head()
        check_head(answer, is_head)
        with trio.fail_after(PATIENCE_S):
            try:
                await self.read_body(answer, is_head)
            except (EOFError, trio.BrokenResourceError):
                assert may_cut, answer
                answer.is_cut = True
        if answer.body:
            assert answer.get("content-type"), answer
        return answer

    async def read_body(self, answer: Answer, is_head: bool = False) -> None:
        if is_head or answer.status in (204, 304):
            answer.framing = "none"
        elif answer.all("transfer-encoding"):
            answer.framing = "chunked"
            while (piece := await self.read_chunk()) is not None:
                answer.chunks.append(piece)
                answer.body += piece
        elif answer.all("content-length"):
            answer.framing = "length"
            length = int(answer["content-length"])
            while len(self.rest) < length:
                if not await self.more():
                    answer.body = self.rest
                    raise EOFError
            answer.body, self.rest = self.rest[:length], self.rest[length:]
        else:
            answer.framing = "close"
            assert answer["connection"] == "close"
            while await self.more():
                pass
            answer.body, self.rest = self.rest, b""

    async def read_chunk(self) -> bytes | None:
        """One chunk as it was framed, None for the last one."""
        with trio.fail_after(PATIENCE_S):
            while b"\r\n" not in self.rest:
                if not await self.more():
                    raise EOFError
            line, _, rest = self.rest.partition(b"\r\n")
            size = int(line, 16)
            while len(self.rest) < len(line) + 2 + size + 2:
                if not await self.more():
                    raise EOFError
        rest = self.rest[len(line) + 2 :]
        piece, end, self.rest = rest[:size], rest[size : size + 2], rest[size + 2 :]
        assert end == b"\r\n", end
        return piece if size else None

    async def until_closed(self) -> bytes:
        """Everything until the gateway closes; a reset counts as a close."""
        with trio.fail_after(PATIENCE_S):
            try:
                while await self.more():
                    pass
            except trio.BrokenResourceError:
                pass
        data, self.rest = self.rest, b""
        return data

    async def is_open(self) -> bool:
        """Whether the connection still serves."""
        answer = await self.ask("/health")
        return answer.status == 200

    async def leave(self) -> None:
        """Closes regularly."""
        await self.stream.aclose()

    def reset(self) -> None:
        """Closes with a TCP reset."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()


def check_head(answer: Answer, is_head: bool) -> None:
    """HTTP-17, and that a head says one thing once."""
    assert answer["date"].endswith(" GMT"), answer
    assert answer["x-request-id"], answer
    framings = answer.all("content-length") + answer.all("transfer-encoding")
    assert len(framings) <= 1, answer
    if not framings:
        assert answer.status in (204, 304) or is_head or answer.get("connection") == "close", answer
    assert not answer.all("keep-alive")
    for _, value in answer.lines:
        assert "127.0.0.1" not in value or value.startswith("http://127.0.0.1") is False, answer  # DN-3


class Gateway:
    """A running node: its ports, its rooms, its clients."""

    def __init__(self, node: Node, server: Server, readiness: Readiness, settings: Settings) -> None:
        self.node = node
        self.server = server
        self.readiness = readiness
        self.settings = settings
        self.port = 0
        self.metrics_port = 0
        self.probe_port = 0
        self.faults: list[BaseException] = []
        self.clients: list[Client] = []
        self.drained = trio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self, port: int = 0, receive_bytes: int | None = None) -> Client:
        """A client connection, closed with the gateway at the latest."""
        if receive_bytes is None:
            stream = await trio.open_tcp_stream("127.0.0.1", port or self.port)
        else:
            sock = trio.socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            await sock.connect(("127.0.0.1", port or self.port))
            stream = trio.SocketStream(sock)
        client = Client(stream)
        self.clients.append(client)
        return client

    async def ask(self, *arguments: Any, port: int = 0, **options: Any) -> Answer:
        """One request on a connection of its own."""
        client = await self.connect(port)
        answer = await client.ask(*arguments, **options)
        await client.leave()
        self.clients.remove(client)
        return answer

    async def raw(self, *pieces: bytes) -> bytes:
        """Sends bytes, then gives everything until the gateway closes."""
        client = await self.connect()
        await client.send(*pieces)
        return await client.until_closed()

    def metric(self, family: str, **labels: str) -> float:
        """The sum of the series of a family with these labels; 0 without any."""
        total = 0.0
        for line in self.node.metrics.render().decode().splitlines():
            series, _, value = line.rpartition(" ")
            name, _, told = series.partition("{")
            if name == family and all(f'{label}="{text}"' in told for label, text in labels.items()):
                total += float(value)
        return total

    def worker(self, fake: FakeWorker) -> Any:
        """The registry's object for a fake worker."""
        worker = self.node.registry.by_id(fake.id)
        assert worker is not None
        return worker

    @property
    def ready_count(self) -> int:
        return sum(1 for worker in self.node.registry.workers() if worker.status.value == "ready")

    @property
    def busy(self) -> dict[str, float]:
        """Every gauge that has to be 0 when nothing runs, if it is not."""
        found = {worker.url: worker.in_flight for worker in self.node.registry.workers()}
        found["admission"] = self.metric("smg_admission_inflight")
        found["waiting"] = self.node._admission.waiting
        found["connections"] = self.metric("smg_http_connections_active")
        found["active"] = self.metric("smg_worker_requests_active")
        return {name: value for name, value in found.items() if value}

    async def check_quiet(self) -> None:
        """RT-3 and MET-10: everything comes back to 0 when the clients are gone; no fault was reported."""
        for client in self.clients:
            client.stream.socket.close()
        with trio.move_on_after(3):
            while self.busy:
                await trio.sleep(0.002)
        assert not self.busy, self.busy
        assert not self.faults, self.faults


@asynccontextmanager
async def running_gateway(
    *flags: str,
    workers: Sequence[FakeWorker] = (),
    ready: bool = True,
    is_quiet: bool = True,
    seed: int = 1,
    transport: Transport | None = None,
) -> AsyncIterator[Gateway]:
    """A node with these flags and workers; `ready`: waits until all workers are and their models are known.

    `transport` is the network of its mesh, with `--ha-mesh`.
    """
    urls = ["--worker-urls", *(worker.url for worker in workers)] if workers else []
    given = Given((*flags, *urls), {})
    settings = given.settings()
    readiness = Readiness()
    node = Node(settings, readiness, Random(seed), given, transport)
    await node.bind()
    sockets = [socket.create_server(("127.0.0.1", 0), backlog=4096) for _ in range(3)]
    for sock in sockets:
        sock.setblocking(False)
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        server = node.server()
        gateway = Gateway(node, server, readiness, settings)
        server._report = lambda exchange, error: gateway.faults.append(error)
        gateway.port, gateway.metrics_port, gateway.probe_port = (s.getsockname()[1] for s in sockets)
        await nursery.start(server.serve, sockets[:1])
        await nursery.start(node.metrics_server().serve, sockets[1:2])
        await nursery.start(node.probe_server().serve, sockets[2:])
        for run in node.services():
            await nursery.start(run)
        for source in node.sources:
            await nursery.start(source.run, node.reporter(source.name))
        if ready:
            await eventually(lambda: gateway.ready_count == len(workers))
            for worker in workers:
                await eventually(lambda w=worker: set(w.models) <= set(gateway.worker(w).models))
        yield gateway
        if is_quiet:
            await gateway.check_quiet()
        nursery.cancel_scope.cancel()


async def drained(gateway: Gateway, grace_s: float) -> None:
    """Ends the gateway as SIGTERM does."""
    await drain(gateway.node.start_draining, gateway.server, grace_s)
    gateway.drained.set()
