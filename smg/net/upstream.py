"""One HTTP/1.1 connection to a worker: sends a request, reads an answer piece by piece.

Owns the framing of answers (httptools) and whether the connection may be used again. Body pieces come out as the
worker cut them; nothing is joined, decoded or looked at. Never chooses a worker, never retries, never closes the
client's side.
"""

from __future__ import annotations

import httptools

from smg.errors import UpstreamError
from smg.net.connection import Connection, ConnectionLost, DeadlinePassed
from smg.net.readiness import Parking

ANSWER_HEAD_BYTES_MAX = 256 << 10  # engines send a few hundred bytes; more is a fault, not an answer
JOINED_BYTES_MAX = (
    16 << 10
)  # head and body below this are joined into one send; above, gathered without a copy


class Upstream:
    """A connection to a worker with the answer being read on it.

    After `send` and `read_head`: `status`, `headers` (lower-case name, value) and `length` (None: chunked or until
    close). Body pieces collect in `pieces`; the reader takes them with `take`. `is_complete` tells that the body has
    ended, `may_be_reused` then tells whether the connection may serve another request.
    """

    __slots__ = (
        "_head_bytes",
        "_is_head_done",
        "_is_head_request",
        "_parser",
        "connection",
        "headers",
        "idle_since_s",
        "is_complete",
        "is_fresh",
        "length",
        "may_be_reused",
        "on_closed",
        "pieces",
        "received_bytes",
        "status",
        "was_sent",
    )

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self.idle_since_s = 0.0
        self.is_fresh = True
        self._is_head_request = False
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.length: int | None = None
        self.is_complete = False
        self.may_be_reused = False
        self.was_sent = False
        self.received_bytes = 0
        self._is_head_done = False
        self._head_bytes = 0

    async def send(
        self, parking: Parking, head: bytes, body: bytes, *, is_head_request: bool = False
    ) -> None:
        """Sends a request. Raises `UpstreamError` reset or timeout.

        A worker that answers before it has read the whole body (413, say) is heard: sending stops and `read_head`
        gives its answer.
        """
        self._begin()
        self._is_head_request = is_head_request
        connection = self.connection
        try:
            if len(body) <= JOINED_BYTES_MAX:
                data = head + body if body else head
                sent = connection.send_nowait(data)
                self.was_sent = True
                if sent != len(data):
                    await self._send_rest(parking, memoryview(data)[sent:])
                return
            sent = connection.send_gathered_nowait(head, body)
            self.was_sent = True
            if sent == len(head) + len(body):
                return
            if sent < len(head):
                await self._send_rest(parking, memoryview(head)[sent:])
                sent = len(head)
            await self._send_rest(parking, memoryview(body)[sent - len(head) :])
        except ConnectionLost:
            if not await self._heard_before_loss(parking):
                raise UpstreamError(
                    UpstreamError.RESET, "connection lost while sending", was_sent=True
                ) from None
        except DeadlinePassed:
            raise UpstreamError(
                UpstreamError.TIMEOUT, "worker did not take the request", was_sent=True
            ) from None

    async def read_head(self, parking: Parking) -> None:
        """Waits for the answer's head (and whatever body came with it). Raises `UpstreamError` reset or timeout."""
        connection = self.connection
        while not self._is_head_done:
            try:
                data = await connection.receive(parking)
            except ConnectionLost:
                raise UpstreamError(
                    UpstreamError.RESET, "connection lost before the answer", was_sent=True
                ) from None
            except DeadlinePassed:
                raise UpstreamError(
                    UpstreamError.TIMEOUT, "no answer within the timeout", was_sent=True
                ) from None
            if not data:
                raise UpstreamError(UpstreamError.RESET, "closed before the answer", was_sent=True)
            self._head_bytes += len(data)
            self._feed(data, UpstreamError.RESET)
            if not self._is_head_done and self._head_bytes > ANSWER_HEAD_BYTES_MAX:
                raise UpstreamError(UpstreamError.RESET, "answer head is too large", was_sent=True)

    async def read_more(self, parking: Parking) -> None:
        """Waits for more of the body. Raises `UpstreamError` broken_stream, and `DeadlinePassed` as it is.

        Also called when `is_complete` is False only; afterwards `pieces` may still be empty.
        """
        try:
            data = await self.connection.receive(parking)
        except ConnectionLost:
            raise UpstreamError(
                UpstreamError.BROKEN_STREAM, "connection lost inside the answer", was_sent=True
            ) from None
        if data:
            self._feed(data, UpstreamError.BROKEN_STREAM)
        elif self._reads_until_close():
            self.is_complete = True
            self.may_be_reused = False
        else:
            raise UpstreamError(UpstreamError.BROKEN_STREAM, "closed inside the answer", was_sent=True)

    def take(self) -> bytes:
        """The body bytes since the last call, joined."""
        pieces = self.pieces
        if len(pieces) == 1:
            data = pieces[0]
            pieces.clear()
            return data
        self.pieces = []
        return b"".join(pieces)

    def close(self) -> None:
        """Closes the connection; the worker sees it and aborts what it still computes."""
        self.connection.close()

    @property
    def is_stale(self) -> bool:
        """Whether an idle connection was closed, or spoken on, by the worker meanwhile."""
        slot = self.connection.slot
        return slot.is_hung_up or slot.is_readable

    # What httptools calls.

    def on_message_begin(self) -> None:
        """A second answer on one request: whatever it is, this connection is not used again."""
        if self.is_complete:
            self.may_be_reused = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head has ended."""
        if self.is_complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.status = status
        self._is_head_done = True
        length: int | None = None
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                length = None
                break
        self.length = length
        if self._is_head_request:
            self.is_complete = True

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        """The answer has ended; an interim one (1xx) is forgotten."""
        if self.status < 200:
            self.headers = []
            return
        if not self.is_complete:
            self.is_complete = True
            # A HEAD answer leaves the parser waiting for a body: only a regular end allows another request.
            self.may_be_reused = self._parser.should_keep_alive()

    def _feed(self, data: bytes, kind: str) -> None:
        self.received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
            if self.is_complete:
                self.may_be_reused = False
                return
            raise UpstreamError(kind, "worker broke the HTTP protocol", was_sent=True) from None

    def _reads_until_close(self) -> bool:
        return self.length is None and not any(name == b"transfer-encoding" for name, _ in self.headers)

    async def _send_rest(self, parking: Parking, view: memoryview) -> None:
        connection = self.connection
        slot = connection.slot
        while view:
            if slot.is_writable:
                # TLS takes nothing without waiting; a plain socket that was writable takes what it can.
                sent = connection.send_nowait(view)  # type: ignore[arg-type]
                if sent == 0 and slot.is_writable:
                    await connection.send(parking, view)
                    return
                view = view[sent:]
                continue
            if not await parking.wait_either(slot):
                raise DeadlinePassed
            if slot.is_readable and not slot.is_writable:
                data = connection.receive_nowait()
                if data is not None:
                    if not data:
                        raise ConnectionLost
                    self._feed(data, UpstreamError.RESET)
                    self.may_be_reused = False
                    return

    async def _heard_before_loss(self, parking: Parking) -> bool:
        """Whether the worker had sent an answer before it stopped reading."""
        try:
            await self.read_head(parking)
        except UpstreamError:
            return False
        self.may_be_reused = False
        return True
