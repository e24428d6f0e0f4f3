"""Passes a worker's answer to the client, byte for byte (contract sections 6 and 7).

Owns the two ways: a plain answer, held until it is known to be whole as far as that is cheap (DN-5), and a stream,
passed on as it comes with keep-alive comments and a failure frame. A tap keeps references to the last pieces, so that
usage is read once at the end and nothing is looked at per chunk. Never chooses, never retries.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

import msgspec
import trio

from smg.errors import ShuttingDown, UpstreamError
from smg.gateway.problem import KEEP_ALIVE, stream_failure
from smg.net.connection import DeadlinePassed
from smg.net.exchange import Exchange
from smg.net.upstream import Upstream
from smg.wire.headers import returned
from smg.wire.sse_tail import (
    BYTES_PER_TOKEN,
    TAIL_BYTES,
    ResponsesWatch,
    closing,
    has_end_marker,
    is_between_events,
    tokens_streamed,
)

HELD_BYTES_MAX = (
    64 << 10
)  # a plain answer up to this is sent when it is whole, so that a loss can be retried (DN-5)
PASSED_ON = -1  # in place of a number of bytes: nothing is held
LAST_CHUNK = b"0\r\n\r\n"
BODYLESS = frozenset((204, 304))
ARRAY = ord("[")
TAP_PIECES = 64  # last pieces of a stream that the tap refers to; with pieces of >= 64 bytes they hold 4 KiB

_COUNT = re.compile(
    rb'"(prompt_tokens|completion_tokens|input_tokens|output_tokens|cached_tokens|cache_read_input_tokens'
    rb'|cache_creation_input_tokens)":\s*(\d{1,12})'
)

_USAGE_FIELDS = {
    b"prompt_tokens": "prompt_tokens",
    b"input_tokens": "prompt_tokens",
    b"completion_tokens": "completion_tokens",
    b"output_tokens": "completion_tokens",
    b"cached_tokens": "cached_tokens",
    b"cache_read_input_tokens": "cached_tokens",
    b"cache_creation_input_tokens": "written_tokens",
}


class Usage(msgspec.Struct):
    """Token counts that a worker told; None when it told none.

    `written_tokens` are told by Anthropic's API only, which counts neither them nor the cached ones as prompt tokens.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    written_tokens: int | None = None


class Told(msgspec.Struct):
    """What a relay found out: time to the first body byte, usage, and whether the worker broke off.

    Of a stream that did not come to its end, `partial` is the usage told so far. `output_tokens` is an estimate of the tokens in
    an answer whose worker told no usage, or did not come to tell it.
    """

    first_byte_s: float | None = None
    usage: Usage | None = None
    failure: UpstreamError | None = None
    partial: Usage | None = None
    output_tokens: int = 0


def usage_of(tail: bytes) -> Usage | None:
    """Token counts out of the last bytes of an answer (OpenAI, Responses, Anthropic and SGLang names); None without any.

    Later numbers win, because a stream repeats usage and its last word is the right one. In an array the last word is one of
    many: nothing is taken from it.
    """
    start = tail.find(b'"usage"')
    if start < 0:
        start = tail.find(b'"meta_info"')
        if start < 0 or tail.startswith(b"["):
            return None
    counts = _COUNT.findall(tail, start)
    if not counts:
        return None
    usage = Usage()
    for name, digits in counts:
        setattr(usage, _USAGE_FIELDS[name], int(digits))
    return usage


def whole_answer(exchange: Exchange, upstream: Upstream, id_line: bytes, told: Told) -> bytes:
    """The bytes for the client of a plain answer that is complete; usage goes into `told`.

    A body without a length stays without one (DN-4).
    """
    body = upstream.take()
    length = upstream.length
    lines = upstream.head_lines
    if lines is None:
        lines = returned(upstream.headers)
        upstream.keep_lines(lines)
    # The id is not kept with the lines: workers behind one address share its connections.
    head = exchange.head_block(upstream.status, lines + id_line, length)
    if body:
        if body[0] != ARRAY:
            told.usage = usage_of(body[-TAIL_BYTES:])
        if told.usage is None:
            told.output_tokens = len(body) // BYTES_PER_TOKEN
        if length is not None:
            return head + body
    if length is not None or exchange.head.is_http10 or upstream.status in BODYLESS:
        return head + body
    return b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(body), body) if body else head + b"0\r\n\r\n"


async def relay_plain(
    exchange: Exchange, upstream: Upstream, id_line: bytes, told: Told, held_bytes_max: int = HELD_BYTES_MAX
) -> Told:
    """Relays an answer that is no event stream, or one with a length; up to `held_bytes_max` is held until it is whole.

    What it tells goes into `told`, which is given back.

    Raises `UpstreamError` broken_stream or timeout while no byte has been sent, for a retry or a 502; later the
    client's connection is cut and the failure is in the result. `ClientGone` passes through.
    """
    parking = exchange.parking
    size = sum(map(len, upstream.pieces))
    try:
        while not upstream.is_complete and size <= held_bytes_max:
            await upstream.read_more(parking)
            size = sum(map(len, upstream.pieces))
    except DeadlinePassed:
        raise UpstreamError(
            UpstreamError.TIMEOUT, "answer not complete within the timeout", was_sent=True
        ) from None
    if upstream.is_complete:
        await exchange.write(whole_answer(exchange, upstream, id_line, told))
        return told
    length = upstream.length
    head = exchange.head_block(upstream.status, returned(upstream.headers) + id_line, length)
    is_chunked = length is None and not exchange.head.is_http10
    return await _relay_large(exchange, upstream, head, upstream.take(), is_chunked, told)


async def _relay_large(
    exchange: Exchange, upstream: Upstream, head: bytes, body: bytes, is_chunked: bool, told: Told
) -> Told:
    """The rest of a plain answer that is too large to hold: passed on as it comes."""
    parking = exchange.parking
    await exchange.write(head)
    tail = b""
    is_array = body.startswith(b"[")
    try:
        while True:
            if body:
                tail = body[-TAIL_BYTES:] if len(body) >= TAIL_BYTES else (tail + body)[-TAIL_BYTES:]
                await exchange.write(b"%x\r\n%b\r\n" % (len(body), body) if is_chunked else body)
            if upstream.is_complete:
                break
            await upstream.read_more(parking)
            body = upstream.take()
    except DeadlinePassed:
        told.failure = UpstreamError(
            UpstreamError.TIMEOUT, "answer not complete within the timeout", was_sent=True
        )
    except UpstreamError as error:
        told.failure = error
    finally:
        told.output_tokens = exchange.sent_bytes // BYTES_PER_TOKEN
    if told.failure is not None:
        exchange.cut()
        return told
    if is_chunked:
        await exchange.write(b"0\r\n\r\n")
    told.usage = None if is_array else usage_of(tail)
    return told


class StreamBounds(msgspec.Struct, frozen=True):
    """Seconds: silence before a keep-alive comment (0: none, STR-4) and silence that ends a stream (STR-11)."""

    keepalive_s: float
    silence_max_s: float


async def relay_stream(
    exchange: Exchange,
    upstream: Upstream,
    id_line: bytes,
    dialect: str,
    bounds: StreamBounds,
    told: Told,
    first_byte: Callable[[float], None],
) -> None:
    """Relays an event stream: one send per read of the worker's connection, back-pressure by the send itself.

    `first_byte(now)` is called once, when the body begins. A worker that dies gets a failure frame written in its place
    (STR-6, STR-7) and the failure into `told`. Raises `ClientGone`; `ShuttingDown` after the failure frame was offered
    to the client (LIFE-6). However it ends, `told` has what was streamed.
    """
    exchange.start_streaming()
    stream = _Stream(exchange, upstream, dialect, bounds)
    is_whole = False
    try:
        await stream.pump(
            exchange.head_block(upstream.status, returned(upstream.headers) + id_line, None), told, first_byte
        )
        is_whole = True
    except UpstreamError as error:
        if await stream.ends_well_after_all():
            await exchange.write(LAST_CHUNK if stream.is_chunked else b"")
            is_whole = True
        else:
            told.failure = error
            await stream.write_failure()
    except ShuttingDown:
        exchange.keep_alive = False
        await stream.write_failure()
        raise
    finally:
        stream.tell(told, is_whole)


class _Stream:
    """One stream on its way: what was passed on last, and how pieces are framed for this client."""

    __slots__ = (
        "bounds",
        "dialect",
        "exchange",
        "first",
        "head_bytes",
        "is_chunked",
        "tap",
        "upstream",
        "watch",
    )

    def __init__(self, exchange: Exchange, upstream: Upstream, dialect: str, bounds: StreamBounds) -> None:
        self.exchange = exchange
        self.upstream = upstream
        self.dialect = dialect
        self.bounds = bounds
        self.is_chunked = not exchange.head.is_http10
        self.tap: deque[bytes] = deque(maxlen=TAP_PIECES)
        self.first = b""
        self.head_bytes = 0
        self.watch = ResponsesWatch() if dialect == "responses" else None

    async def pump(self, head: bytes, told: Told, first_byte: Callable[[float], None]) -> None:
        """Passes pieces on until the answer's end; `head` goes with the first. Raises `UpstreamError`."""
        exchange, upstream, tap, watch = self.exchange, self.upstream, self.tap, self.watch
        self.head_bytes = len(head)
        parking, readiness = exchange.parking, exchange.readiness
        slot = upstream.connection.slot
        is_chunked = self.is_chunked
        keepalive_s = min(self.bounds.keepalive_s or self.bounds.silence_max_s, self.bounds.silence_max_s)
        while True:
            is_complete = upstream.is_complete
            data = head
            if upstream.pieces:
                piece = upstream.take()
                if told.first_byte_s is None:
                    told.first_byte_s = now = readiness.now_s
                    self.first = piece[:TAIL_BYTES]
                    first_byte(now)
                tap.append(piece if len(piece) <= TAIL_BYTES else piece[-TAIL_BYTES:])
                if watch is not None:
                    watch.feed(piece)
                data = b"%b%x\r\n%b\r\n" % (head, len(piece), piece) if is_chunked else head + piece
            if is_complete and is_chunked:
                data += LAST_CHUNK
            if data:
                head = b""
                if not exchange.write_nowait(data):
                    await exchange.flush()
            if is_complete:
                return
            parking.deadline_s = readiness.now_s + keepalive_s
            if slot.is_readable:
                # Read without waiting: let the others run, or one fast worker starves the loop.
                await trio.lowlevel.checkpoint()
            elif not await parking.wait_readable(slot):
                await self._outlast_silence(keepalive_s)
                continue
            upstream.receive_nowait()

    async def ends_well_after_all(self) -> bool:
        """Passes on what came in one read with the end; whether the worker had sent its end marker (STR-8)."""
        piece = self.upstream.take()
        if piece:
            self.tap.append(piece)
            if self.watch is not None:
                self.watch.feed(piece)
            await self.exchange.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.is_chunked else piece)
        if self.watch is not None:
            return self.watch.has_ended
        return has_end_marker(self.dialect, self._tail())

    async def write_failure(self) -> None:
        """Closes an incomplete event and writes the failure frame and a regular end (STR-6, STR-7)."""
        number = self.watch.next_number if self.watch is not None else 0
        frame = closing(self._tail()) + stream_failure(self.dialect, self.exchange.request_id, number)
        framed = b"%x\r\n%b\r\n%b" % (len(frame), frame, LAST_CHUNK) if self.is_chunked else frame
        await self.exchange.write(framed)

    def tell(self, told: Told, is_whole: bool) -> None:
        """What the stream brought, into `told`: looked at once, when it is over."""
        tail = self._tail()
        # Anthropic tells the prompt's tokens in the first event and the answer's in the last.
        usage = usage_of(self.first + tail if self.dialect == "anthropic" else tail)
        if is_whole and usage is not None:
            told.usage = usage
            return
        told.partial = usage
        is_all = len(tail) < TAIL_BYTES and len(self.tap) < TAP_PIECES
        body_bytes = len(tail) if is_all else self.exchange.sent_bytes - self.head_bytes
        told.output_tokens = tokens_streamed(tail, body_bytes)

    def _tail(self) -> bytes:
        return b"".join(self.tap)[-TAIL_BYTES:]

    async def _outlast_silence(self, keepalive_s: float) -> None:
        """Sends keep-alive comments until the worker speaks again.

        Called when the parking's deadline, set `keepalive_s` after the last piece, has passed. Raises `UpstreamError`
        when the worker was silent for too long (STR-11).
        """
        exchange, readiness, parking = self.exchange, self.exchange.readiness, self.exchange.parking
        bounds = self.bounds
        ends_s = parking.deadline_s + (bounds.silence_max_s - keepalive_s)
        comment = KEEP_ALIVE[self.dialect]
        framed = b"%x\r\n%b\r\n" % (len(comment), comment) if self.is_chunked else comment
        may_ping = bounds.keepalive_s and is_between_events(self._tail()[-4:])
        while True:
            if readiness.now_s >= ends_s:
                raise UpstreamError(UpstreamError.TIMEOUT, "stream was silent for too long", was_sent=True)
            if may_ping:
                await exchange.write(framed)
            parking.deadline_s = min(readiness.now_s + keepalive_s, ends_s)
            if await parking.wait_readable(self.upstream.connection.slot):
                return
