"""One client connection and the request being served on it.

Owns the client's side of an exchange: reading the body within its limits, writing the answer once, and knowing
whether the client is still there (HTTP-13). Whoever serves the request holds an `Exchange` and nothing else of the
connection. Never routes, never talks to a worker, never builds an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from smg.errors import ClientGone, GatewayError
from smg.net.connection import Connection, ConnectionLost, DeadlinePassed
from smg.net.readiness import Parking, Readiness
from smg.wire.http1 import LENGTH_CHUNKED, STATUS_LINES, ChunkedDecoder, RequestHead, RequestReader

if TYPE_CHECKING:
    from smg.telemetry.trace import Span

HALF_CLOSE_GRACE_S = (
    1.0  # HTTP-13: a plain answer that begins within this after the end of input is delivered
)
SHED_BYTES_MAX = 1 << 20  # HTTP-8: what is read and dropped after a refusal, so that the client can read it
SHED_FOR_S = 2.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ServerLimits(msgspec.Struct, frozen=True):
    """The bounds of one server; seconds and bytes (contract sections 2 and 4)."""

    header_read_timeout_s: float = 30.0
    idle_timeout_s: float = 90.0
    body_stall_timeout_s: float = 300.0
    payload_bytes_max: int = 512 << 20


class Exchange:
    """The serving side's view of one request; reused for every request of a connection.

    `has_begun_answer` is true once a byte of the answer may be with the client. `is_streaming` tells that an end of
    the client's input counts as a departure at once. `extra_lines` are header lines that every answer of this request
    gets, each ended by CRLF; `trace_lines` those that the worker gets instead of the client's trace headers (TRC-1).
    `span` is the request's span while one is measured, `status` that of the last answer head that was made.
    `keep_alive` may be switched off by whoever answers. `is_draining` makes heads from now on say that the connection
    ends with their answer; one that is out already has promised to go on, and so the connection goes on.
    """

    __slots__ = (
        "_has_body_left",
        "_unsent",
        "connection",
        "date_line",
        "extra_lines",
        "has_begun_answer",
        "head",
        "is_busy",
        "is_draining",
        "is_streaming",
        "keep_alive",
        "limits",
        "parking",
        "peer",
        "reader",
        "readiness",
        "request_id",
        "sent_bytes",
        "span",
        "started_s",
        "status",
        "trace_lines",
    )

    def __init__(
        self,
        connection: Connection,
        readiness: Readiness,
        peer: str,
        limits: ServerLimits,
        reader: RequestReader,
    ) -> None:
        self.connection = connection
        self.readiness = readiness
        self.peer = peer
        self.limits = limits
        self.reader = reader
        self.parking: Parking = readiness.open_parking()
        self.parking.on_gone = self._grace_passed
        connection.slot.on_end = self._input_ended
        self.head = NO_HEAD
        self.request_id = ""
        self.date_line = b""
        self.extra_lines = b""
        self.is_draining = False
        self.is_busy = False
        self.is_streaming = False
        self.has_begun_answer = False
        self.keep_alive = True
        self.sent_bytes = 0
        self.started_s = 0.0
        self.trace_lines: bytes | None = None
        self.span: Span | None = None
        self.status = 0
        self._has_body_left = False
        self._unsent: memoryview | None = None

    def begin(self, head: RequestHead, now: float, date_line: bytes, is_draining: bool) -> None:
        """A new request starts."""
        self.head = head
        self.date_line = date_line
        self.is_draining = is_draining
        self.keep_alive = head.keep_alive and not is_draining
        self.request_id = ""
        self.extra_lines = b""
        self.trace_lines = None
        self.is_busy = True
        self.is_streaming = False
        self.has_begun_answer = False
        self.sent_bytes = 0
        self.started_s = now
        self._has_body_left = head.length != 0
        if self.connection.slot.is_hung_up:
            self._input_ended()

    async def read_body(self, bytes_max: int | None = None) -> bytes:
        """The whole body of the request, at most `bytes_max` bytes (default: the server's limit).

        Raises `GatewayError` 413 (HTTP-8; before reading when the length says so), 400 for malformed chunks, 408
        when the body stalls, `ClientGone`.
        """
        limit = self.limits.payload_bytes_max if bytes_max is None else bytes_max
        length = self.head.length
        if length > 0:
            if length > limit:
                raise _too_large(limit)
            body = self.reader.take_input(length)
            if len(body) < length:
                body = await self._read_rest(body, length)
            self.reader.body_done(body)
        elif length == LENGTH_CHUNKED:
            body = await self._read_chunked(limit)
        else:
            return b""
        self._has_body_left = False
        return body

    def body_nowait(self) -> bytes | None:
        """The whole body when it has already come with its head, else None: then `read_body` waits for it."""
        length = self.head.length
        if length == 0:
            return b""
        if length > self.limits.payload_bytes_max:
            return None  # for `read_body` to refuse
        body = self.reader.take_whole(length)
        if body is not None:
            self._has_body_left = False
        return body

    def write_nowait(self, data: bytes) -> bool:
        """As `write`; False when the kernel did not take all: then `flush` sends the rest. Raises `ClientGone`."""
        self.has_begun_answer = True
        try:
            sent = self.connection.send_nowait(data)
        except ConnectionLost:
            raise ClientGone from None
        self.sent_bytes += len(data)
        if sent == len(data):
            return True
        self._unsent = memoryview(data)[sent:]
        return False

    async def flush(self) -> None:
        """Sends what `write_nowait` left. Raises `ClientGone`."""
        unsent = self._unsent
        if unsent is None:
            return
        self._unsent = None
        parking = self.parking
        kept_s = parking.deadline_s
        parking.deadline_s = self.readiness.now_s + self.limits.body_stall_timeout_s
        try:
            await self.connection.send(parking, unsent)
        except (ConnectionLost, DeadlinePassed):
            raise ClientGone from None
        parking.deadline_s = kept_s

    async def write(self, data: bytes) -> None:
        """Sends bytes of the answer. Raises `ClientGone`, also when the client takes nothing for the stall time."""
        if not self.write_nowait(data):
            await self.flush()

    async def respond(self, status: int, header_block: bytes, body: bytes) -> None:
        """Sends a whole answer of the gateway's own.

        `header_block` are header lines, each ended by CRLF; length, date, connection and request id are added here
        (HTTP-17). A HEAD request gets the head alone (HTTP-9).
        """
        if self._has_body_left and self.body_nowait() is None:
            self.keep_alive = False
        head = self.head_block(status, header_block, len(body))
        await self.write(head if self.head.method == b"HEAD" else head + body)

    def head_block(self, status: int, header_block: bytes, length: int | None) -> bytes:
        """A complete answer head; `length` None: chunked under HTTP/1.1, until close under 1.0.

        Date is added unless `header_block` begins with one.
        """
        self.status = status
        if length is not None:
            framing = b"content-length: %d\r\n" % length
            if status == 204 or status < 200:
                framing = b""
        elif status == 304 or status == 204:
            framing = b""
        elif self.head.is_http10:
            framing = b""
            self.keep_alive = False
        else:
            framing = b"transfer-encoding: chunked\r\n"
        return b"".join(
            (
                STATUS_LINES[status],
                header_block,
                self.extra_lines,
                framing,
                b"" if header_block.startswith(b"date: ") else self.date_line,
                b"x-request-id: ",
                self.request_id.encode(),
                self.connection_line(),
            )
        )

    def connection_line(self) -> bytes:
        """The end of a head: CRLF, the `connection` line where one is needed, the empty line."""
        if self.is_draining:
            self.keep_alive = False
        if not self.keep_alive:
            return b"\r\nconnection: close\r\n\r\n"
        if self.head.is_http10:
            return b"\r\nconnection: keep-alive\r\n\r\n"
        return b"\r\n\r\n"

    def cut(self) -> None:
        """Resets the client's connection: the answer cannot be completed and that must show (DN-5)."""
        self.keep_alive = False
        self.connection.abort()

    def start_streaming(self) -> None:
        """From here the end of the client's input ends the exchange at once (HTTP-13).

        Raises `ClientGone` when the input has already ended.
        """
        self.is_streaming = True
        if self.connection.slot.is_hung_up:
            raise ClientGone

    def end(self) -> bool:
        """Ends the request; whether another may follow on this connection. Else `shed` comes before `close`."""
        self.is_busy = False
        self.parking.reset()
        return self.keep_alive and not self._has_body_left

    def close(self) -> None:
        """Closes the connection."""
        self.connection.slot.on_end = None
        self.readiness.close_parking(self.parking)
        self.connection.close()

    async def receive(self, stall_s: float) -> bytes:
        """More input, b"" at its end, bounded by `stall_s`. Raises `DeadlinePassed`, `ClientGone`."""
        self.parking.deadline_s = self.readiness.now_s + stall_s
        try:
            return await self.connection.receive(self.parking)
        except ConnectionLost:
            raise ClientGone from None
        finally:
            self.parking.deadline_s = math.inf

    async def _read_rest(self, first: bytes, length: int) -> bytes:
        if not first:
            await self._send_continue()
        pieces = [first]
        missing = length - len(first)
        while missing > 0:
            data = await self._receive_body()
            if len(data) > missing:
                self.reader.feed(data[missing:])
                data = data[:missing]
            pieces.append(data)
            missing -= len(data)
        return b"".join(pieces)

    async def _read_chunked(self, limit: int) -> bytes:
        decoder = ChunkedDecoder()
        waiting = self.reader.take_input(1 << 62)
        if waiting:
            decoder.feed(waiting)
        else:
            await self._send_continue()
        while not decoder.is_complete:
            if decoder.decoded_bytes > limit:
                raise _too_large(limit)
            decoder.feed(await self._receive_body())
        if decoder.decoded_bytes > limit:
            raise _too_large(limit)
        self.reader.give_back(decoder.rest)
        self.reader.body_done(None)
        return decoder.take()

    async def _receive_body(self) -> bytes:
        try:
            data = await self.receive(self.limits.body_stall_timeout_s)
        except DeadlinePassed:
            raise GatewayError(408, "request_timeout", "the request body stalled", is_closing=True) from None
        if not data:
            raise ClientGone
        return data

    async def _send_continue(self) -> None:
        if self.head.expects_continue:
            self.head.expects_continue = False
            began = self.has_begun_answer
            await self.write(CONTINUE)
            self.has_begun_answer = began

    async def drain(self) -> None:
        """Waits until the kernel has the whole answer: before a close, which would drop the rest. Raises `ClientGone`."""
        self.parking.deadline_s = self.readiness.now_s + self.limits.body_stall_timeout_s
        try:
            await self.connection.drain(self.parking)
        except (ConnectionLost, DeadlinePassed):
            raise ClientGone from None
        finally:
            self.parking.deadline_s = math.inf

    async def shed(self) -> None:
        """Reads and drops what a refused client still sends, so that it can read the answer (HTTP-8)."""
        if not self._has_body_left:
            return
        await self.drain()
        self.connection.shutdown_send()
        left = SHED_BYTES_MAX - len(self.reader.take_input(1 << 62))
        until_s = self.readiness.now_s + SHED_FOR_S
        while left > 0 and self.readiness.now_s < until_s:
            try:
                data = await self.receive(until_s - self.readiness.now_s)
            except (DeadlinePassed, ClientGone):
                return
            if not data:
                return
            left -= len(data)

    def _input_ended(self) -> None:
        if not self.is_busy:
            return
        if self.connection.slot.is_lost or self.is_streaming:
            self.parking.interrupt(ClientGone())
        elif not self.has_begun_answer:
            self.parking.gone_deadline_s = self.readiness.now_s + HALF_CLOSE_GRACE_S

    def _grace_passed(self) -> None:
        if self.is_busy and (self.is_streaming or not self.has_begun_answer):
            self.parking.interrupt(ClientGone())


def _too_large(limit: int) -> GatewayError:
    return GatewayError(
        413,
        "request_body_too_large",
        f"request body is larger than --max-payload-size ({limit} bytes)",
        is_closing=True,
    )


NO_HEAD = RequestHead(b"GET", b"/", [], False)
