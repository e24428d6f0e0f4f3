"""One HTTP/1.1 connection to a worker: sends a request, reads an answer piece by piece.

Owns the framing of answers (httptools) and whether the connection may be used again. Body pieces come out as the
worker cut them; nothing is joined, decoded or looked at. Never chooses a worker, never retries, never closes the
client's side.
"""

from __future__ import annotations

import httptools
import trio

from smg.errors import UpstreamError
from smg.net.connection import RECEIVE_BYTES, Connection, ConnectionLost, DeadlinePassed
from smg.net.readiness import Parking

_PARSER_ERRORS = (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError)

ANSWER_HEAD_BYTES_MAX = 256 << 10  # engines send a few hundred bytes; more is a fault, not an answer
# Head and body up to this are joined into one piece that waits for the end of the turn; above, they are gathered
# without a copy and sent at once.
JOINED_BYTES_MAX = 48 << 10


class _LastHead:
    """The head of the last answer on a connection, and the lines for the client that were made of it."""

    __slots__ = ("content_type", "headers", "lines", "status")

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], content_type: bytes) -> None:
        self.status = status
        self.headers = headers
        self.content_type = content_type
        self.lines: bytes | None = None


class Upstream:
    """A connection to a worker with the answer being read on it.

    After `send` and `read_head`: `status`, `headers` (lower-case name, value) and `length` (None: chunked or until
    close) and `content_type` (empty without one). Body pieces collect in `pieces`; the reader takes them with `take`. `is_complete` tells that the body has
    ended, `may_be_reused` then tells whether the connection may serve another request. `head_lines` are the lines for
    the client when an earlier answer with the same head left them here (`keep_lines`).
    """

    __slots__ = (
        "_after",
        "_before",
        "_collected",
        "_is_head_request",
        "_last",
        "_parser",
        "_raw",
        "_unsent",
        "connection",
        "content_type",
        "head_lines",
        "headers",
        "idle_since_s",
        "is_chunked",
        "is_complete",
        "is_fresh",
        "is_head_done",
        "length",
        "may_be_reused",
        "pieces",
        "received_bytes",
        "status",
        "was_closed",
        "was_sent",
    )

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.was_closed = False
        self._parser = httptools.HttpResponseParser(self)
        self.idle_since_s = 0.0
        self.is_fresh = True
        self._is_head_request = False
        self._unsent = b""
        self._raw = b""
        self._before = b""
        self._after = b""
        self._last = _LastHead(0, [], b"")
        self._collected: list[tuple[bytes, bytes]] = []
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.length: int | None = None
        self.content_type = b""
        self.is_chunked = False
        self.head_lines: bytes | None = None
        self.is_complete = False
        self.may_be_reused = False
        self.was_sent = False
        self.received_bytes = 0
        self.is_head_done = False

    def send_nowait(self, head: bytes, body: bytes) -> bool:
        """Begins a request as `send` does, when the kernel takes all of it at once: True.

        False: not all was sent, or the connection is lost; `send` is to be called and goes on, or finds out.
        """
        if len(body) > JOINED_BYTES_MAX:
            return False
        self._begin()
        self._is_head_request = False
        data = head + body if body else head
        try:
            sent = self.connection.send_nowait(data)
        except ConnectionLost:
            return False
        if sent != len(data):
            self._unsent = data[sent:] if sent else b""
            return False
        self.was_sent = True
        return True

    def receive_nowait(self) -> None:
        """Reads what is there into the answer. Raises `UpstreamError` reset before the head, broken_stream after."""
        try:
            data = self.connection.receive_nowait()
        except ConnectionLost:
            raise self._broken("connection lost") from None
        if data:
            before = self._before
            if (
                not self.received_bytes
                and before
                and data.startswith(before)
                and self._repeated(data, len(before))
            ):
                self.received_bytes = len(data)
                return
            self.received_bytes += len(data)
            self._raw = data
            try:
                self._parser.feed_data(data)
            except _PARSER_ERRORS:
                self._unparsed()
            if not self.is_head_done and self.received_bytes > ANSWER_HEAD_BYTES_MAX:
                raise UpstreamError(UpstreamError.RESET, "answer head is too large", was_sent=True)
        elif data is None:
            return
        elif self.is_head_done and self._reads_until_close() and not self.connection.is_truncated:
            self.is_complete = True
            self.may_be_reused = False
        else:
            self.was_closed = True
            raise self._broken("closed")

    def was_unread(self) -> bool:
        """After a loss: whether the worker had ended the connection before this request came, so that it has read none
        of it. A reset without a regular end before it may come from a worker that has read everything."""
        if self.received_bytes:
            return False
        return not self.was_sent or (self.was_closed and not self.connection.was_taken())

    async def send(
        self, parking: Parking, head: bytes, body: bytes, *, is_head_request: bool = False
    ) -> None:
        """Sends a request. Raises `UpstreamError` reset or timeout.

        A worker that answers before it has read the whole body (413, say) is heard: sending stops and `read_head`
        gives its answer.
        """
        connection = self.connection
        unsent = self._unsent
        if unsent:
            self._unsent = b""
        else:
            self._begin()
        self._is_head_request = is_head_request
        try:
            if unsent:
                self.was_sent = True
                await self._send_rest(parking, memoryview(unsent))
                return
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
        slot = self.connection.slot
        while not self.is_head_done:
            if not slot.is_readable and not await parking.wait_readable(slot):
                raise UpstreamError(UpstreamError.TIMEOUT, "no answer within the timeout", was_sent=True)
            self.receive_nowait()

    async def read_more(self, parking: Parking) -> None:
        """Waits for more of the body. Raises `UpstreamError` broken_stream, and `DeadlinePassed` as it is.

        Called only while `is_complete` is False; afterwards `pieces` may still be empty.
        """
        slot = self.connection.slot
        if slot.is_readable:
            # Read without waiting: let the others run, or one fast worker starves the loop.
            await trio.lowlevel.checkpoint()
        elif not await parking.wait_readable(slot):
            raise DeadlinePassed
        self.receive_nowait()

    def take(self) -> bytes:
        """The body bytes since the last call, joined."""
        pieces = self.pieces
        self.pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def keep_lines(self, lines: bytes) -> None:
        """Leaves what was made of this answer's headers for the next answer with the same head."""
        last = self._last
        if last.headers is self.headers:
            last.lines = lines

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
        """Raises when this is a second answer: the parser stops, and the connection is not used again."""
        if self.is_complete:
            raise ValueError("a second answer on one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line of a head; one of a trailer is collected and never looked at."""
        self._collected.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head has ended."""
        headers, self._collected = self._collected, []
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.status = status
        self.headers = headers
        self.is_head_done = True
        length = None
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"content-type":
                self.content_type = value
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked":
                    # Its bytes would be relayed as they are, without their name.
                    raise ValueError("a transfer coding that is not chunked alone")
                self.is_chunked = True
        self.length = None if self.is_chunked else length
        if self._is_head_request:
            self.is_complete = True

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        """The answer has ended; an interim one (1xx) is forgotten."""
        if self.status < 200:
            return
        if not self.is_complete:
            self.is_complete = True
            # A HEAD answer leaves the parser waiting for a body: only a regular end allows another request.
            self.may_be_reused = self._parser.should_keep_alive()
            if self.is_chunked:
                self._collected = []  # a trailer is no header of the next answer
            self._remember()
        self._raw = b""

    def _repeated(self, data: bytes, at: int) -> bool:
        """Whether `data` is the last answer's head again, with another length and the whole body: then it is read."""
        after = self._after
        end = data.find(b"\r", at, at + 19)
        digits = data[at:end]
        if end < 0 or not digits.isdigit() or not data.startswith(after, end):
            return False
        length = int(digits)
        start = end + len(after)
        if len(data) - start != length or self._is_head_request:
            return False
        last = self._last
        self.status = last.status
        self.headers = last.headers
        self.content_type = last.content_type
        self.head_lines = last.lines
        self.length = length
        if length:
            self.pieces.append(data[start:])
        self.is_head_done = self.is_complete = self.may_be_reused = True
        return True

    def _remember(self) -> None:
        """Keeps the head of a whole answer that came in one piece; the next one is likely the same but for its length."""
        self._before = b""
        raw = self._raw
        if self.length is None or len(raw) != self.received_bytes or not self.may_be_reused:
            return
        if self.status in (204, 304):
            return  # their length says nothing of a body
        digits = next(value for name, value in self.headers if name == b"content-length")
        end = raw.find(b"\r\n\r\n") + 4
        at = raw[:end].lower().find(b"\r\ncontent-length:")
        if at < 0 or end < 4 or raw.startswith(b"HTTP/1.1 1"):
            return
        at = raw.find(digits, at + 17, end)
        if at < 0:
            return
        self._before, self._after = raw[:at], raw[at + len(digits) : end]
        self._last = _LastHead(self.status, self.headers, self.content_type)

    def _unparsed(self) -> None:
        """The worker sent what is not HTTP: after the end of the answer only the connection is lost."""
        if not self.is_complete:
            raise self._broken("worker broke the HTTP protocol") from None
        self.may_be_reused = False

    def _broken(self, what: str) -> UpstreamError:
        if self.is_head_done:
            return UpstreamError(UpstreamError.BROKEN_STREAM, f"{what} inside the answer", was_sent=True)
        return UpstreamError(UpstreamError.RESET, f"{what} before the answer", was_sent=True)

    def _reads_until_close(self) -> bool:
        return self.length is None and not self.is_chunked

    async def _send_rest(self, parking: Parking, view: memoryview) -> None:
        connection = self.connection
        slot = connection.slot
        while view:
            if slot.is_writable:
                # TLS takes nothing without waiting; a plain socket that was writable takes what it can. Bytes of their
                # own, for a small piece may be kept until the end of the turn.
                sent = connection.send_nowait(bytes(view[:RECEIVE_BYTES]))
                if sent == 0 and slot.is_writable:
                    await connection.send(parking, view)
                    return
                view = view[sent:]
                continue
            if not await parking.wait_either(slot):
                raise DeadlinePassed
            if slot.is_readable and not slot.is_writable:
                before = self.received_bytes
                self.receive_nowait()
                if self.received_bytes != before:
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
