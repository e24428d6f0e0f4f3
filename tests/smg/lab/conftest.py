"""Engines on real sockets, on ports that the system chooses."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from smg.lab.engine import add_arguments, run_engines
from smg.lab.engine_server import EngineServer

FAST = ("--speed", "20", "--ttft-ms", "20", "--decode-ms", "20")
"""An answer of 32 tokens takes 0.03 s."""

Start = Callable[..., AbstractAsyncContextManager[list[tuple[EngineServer, str]]]]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--port", "0", *words])


@asynccontextmanager
async def engines(
    *words: str, lines: list[str] | None = None
) -> AsyncIterator[list[tuple[EngineServer, str]]]:
    """Running engines with their URLs; gone at the end of the block."""
    said: list[str] = [] if lines is None else lines
    async with trio.open_nursery() as nursery:
        yield await nursery.start(run_engines, arguments(*words), said.append)
        nursery.cancel_scope.cancel()


class Answer:
    """A raw answer: status, headers, body with chunks joined, and whether the body came to its end."""

    def __init__(self, raw: bytes) -> None:
        head, _, body = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        self.status = int(lines[0].split()[1]) if lines[0] else 0
        self.headers = {
            name.lower().decode(): value.strip().decode()
            for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        self.is_whole = True
        if self.headers.get("transfer-encoding") == "chunked":
            pieces = []
            self.is_whole = False
            while body:
                size, _, rest = body.partition(b"\r\n")
                length = int(size, 16) if size else 0
                if length == 0:
                    self.is_whole = True
                    break
                pieces.append(rest[:length])
                body = rest[length + 2 :]
            body = b"".join(pieces)
        elif "content-length" in self.headers:
            self.is_whole = len(body) == int(self.headers["content-length"])
        self.body = body


async def connect(url: str) -> trio.SocketStream:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return await trio.open_tcp_stream(host, int(port))


def request(method: str, path: str, body: bytes = b"", headers: Sequence[str] = ()) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: engine", "connection: close", f"content-length: {len(body)}"]
    return ("\r\n".join([*lines, *headers]) + "\r\n\r\n").encode() + body


async def ask(
    url: str, method: str, path: str, body: bytes = b"", headers: Sequence[str] = (), within_s: float = 10.0
) -> Answer:
    """One request over a connection of its own."""
    raw = b""
    with trio.fail_after(within_s):
        async with await connect(url) as stream:
            await stream.send_all(request(method, path, body, headers))
            try:
                async for data in stream:
                    raw += data
            except trio.BrokenResourceError:
                pass
    return Answer(raw) if raw else Answer(b"HTTP/1.1 000 nothing\r\n\r\n")


@pytest.fixture
def start_engines() -> Start:
    return engines
