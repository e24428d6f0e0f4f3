"""Plain request handlers: a whole request in, a whole answer (or a stream of bytes) out.

For everything that is not the relay: admin endpoints, probes, metrics, the simulated engine. Owns the words
`Request`, `Response`, `StreamResponse` and the adapter that runs such a handler over an `Exchange`. Never used on the
relay path, where every copy counts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from smg.net.exchange import Exchange


class Request:
    """A request as plain handlers see it.

    `path` is percent-decoded without the query; `params` the query's members, last one wins; `path_params` what a
    route template matched. `headers` are (lower-case name, value) pairs.
    """

    __slots__ = ("_exchange", "headers", "method", "params", "path", "path_params", "query")

    def __init__(
        self, exchange: Exchange, path: str, query: str, path_params: dict[str, str] | None = None
    ) -> None:
        self._exchange = exchange
        self.method = exchange.head.method.decode("ascii")
        self.path = path
        self.query = query
        self.params: dict[str, str] = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
        self.path_params = path_params or {}
        self.headers = exchange.head.headers

    @property
    def target(self) -> bytes:
        """The request target as sent."""
        return self._exchange.head.target

    @property
    def request_id(self) -> str:
        """The id of this request (RID-1)."""
        return self._exchange.request_id

    @property
    def peer(self) -> str:
        """The client's address, without a port."""
        return self._exchange.peer

    @property
    def is_head(self) -> bool:
        """Whether only the head of the answer is wanted."""
        return self._exchange.head.method == b"HEAD"

    def header(self, name: bytes) -> bytes | None:
        """The last value of a header (lower-case name), or None."""
        return self._exchange.head.fields.get(name)

    async def body(self, bytes_max: int | None = None) -> bytes:
        """The whole body; see `Exchange.read_body` for what it raises."""
        return await self._exchange.read_body(bytes_max)


class Response:
    """A whole answer. `headers` are further (name, value) pairs; values must hold no CR, LF or NUL."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: list[tuple[str, str]] | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers or []


Send = Callable[[bytes], Awaitable[None]]


class StreamResponse:
    """An answer whose body comes piece by piece from `source(send)`; `send` raises `ClientGone`.

    Sent chunked (HTTP/1.1) or until close (1.0). The client's departure also interrupts any wait in `source` that
    goes through `exchange.parking`; `source` gets it cancelled like any trio code.
    """

    __slots__ = ("content_type", "headers", "source", "status")

    def __init__(
        self,
        status: int,
        source: Callable[[Send], Awaitable[None]],
        content_type: str = "text/event-stream",
        headers: list[tuple[str, str]] | None = None,
    ) -> None:
        self.status = status
        self.source = source
        self.content_type = content_type
        self.headers = headers or []


PlainHandler = Callable[[Request], Awaitable["Response | StreamResponse"]]


def json_response(status: int, document: Any, headers: list[tuple[str, str]] | None = None) -> Response:
    """An answer with a JSON body."""
    return Response(status, msgspec.json.encode(document), "application/json", headers)


def text_response(status: int, text: str, headers: list[tuple[str, str]] | None = None) -> Response:
    """An answer with a plain text body."""
    return Response(status, text.encode(), "text/plain; charset=utf-8", headers)


def header_block(response: Response | StreamResponse) -> bytes:
    """The header lines of an answer, each ended by CRLF."""
    lines = []
    if response.content_type and (isinstance(response, StreamResponse) or response.body):
        lines.append(f"content-type: {response.content_type}\r\n")
    for name, value in response.headers:
        assert "\n" not in value and "\r" not in value and "\0" not in value, name
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines).encode("latin-1")


async def answer(exchange: Exchange, response: Response | StreamResponse) -> None:
    """Writes a plain handler's answer."""
    block = header_block(response)
    if isinstance(response, Response):
        await exchange.respond(response.status, block, response.body)
        return
    head = exchange.head_block(response.status, block, None)
    if exchange.head.method == b"HEAD":
        await exchange.write(head)
        return
    await exchange.write(head)
    is_chunked = not exchange.head.is_http10

    async def send(data: bytes) -> None:
        if data:
            await exchange.write(b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data)

    exchange.start_streaming()
    await exchange.parking.run(response.source, send)
    if is_chunked:
        await exchange.write(b"0\r\n\r\n")


def plain(handler: PlainHandler) -> Callable[[Exchange], Awaitable[None]]:
    """Runs a plain handler as the handler of a `Server`.

    The handler may await any trio function: a client that leaves cancels it (`ClientGone` is raised here).
    """

    async def handle(exchange: Exchange) -> None:
        target = exchange.head.target.decode("latin-1")
        path, _, query = target.partition("?")
        exchange.request_id = exchange.request_id or "req-plain"
        response = await exchange.parking.run(handler, Request(exchange, path, query))
        if response is not None:
            await answer(exchange, response)

    return handle
