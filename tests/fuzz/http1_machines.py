"""The HTTP/1.1 machines as something that swallows bytes: what fuzzers and the garbage test feed.

Each function takes arbitrary bytes and may raise nothing: what the machines refuse, they refuse with their own errors, and
what they accept keeps their promises, asserted here. Owns no randomness; whoever calls brings the bytes.
"""

from __future__ import annotations

from random import Random

from smg.errors import GatewayError, UpstreamError
from smg.net.upstream import Upstream
from smg.wire.headers import request_id, returned, split_target
from smg.wire.http1 import HEAD_BYTES_MAX, LENGTH_CHUNKED, ChunkedDecoder, RequestReader

REQUESTS = [
    b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\ncontent-type: application/json\r\nContent-Length: 7\r\n\r\n"
    b'{"a":1}GET /x HTTP/1.1\r\nhost: h\r\n\r\n',
    b"POST /b HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nt: 1\r\n\r\n",
    b"POST /b HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok" * 2,
    b"PUT http://h/a%2Fb?c HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\nconnection: close, x\r\ncontent-length: 0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 1\r\n\r\nx",
]
ANSWERS = [
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n",
    b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 204 N\r\nconnection: close\r\n\r\n",
    b"HTTP/1.0 503 S\r\nretry-after: 3\r\n\r\nuntil close",
    b"HTTP/1.1 200 OK\r\nset-cookie: a\r\nset-cookie: b\r\ncontent-length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 304 N\r\ncontent-length: 5\r\n\r\n",
]
CHUNKS = [
    b"3\r\nabc\r\n0\r\n\r\n",
    b"A;n=v\r\n0123456789\r\n1 \r\nx\r\n00\r\na: b\r\nc: d\r\n\r\nrest",
    b"ffffffffffffffff\r\nabc",
]

TOKENS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b"\x7f", b"\xff", b" ", b"\t", b":", b": ", b",", b";", b"0", b"-1", b"18446744073709551616",
    b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n", b"Transfer-Encoding:\x0bchunked\r\n", b"host: x\r\n", b"HTTP/1.1", b"HTTP/0.9",
    b"HTTP/2.0", b"chunked, chunked", b"expect: 100-continue\r\n", b"connection: close\r\n", b"upgrade: x\r\n", b"GET ", b"\r\n ", b"x" * 300,
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 S\r\n", b"0\r\n\r\n", b"\xc3\xa4", b"%00", b"999",
]  # fmt: skip


def mutated(data: bytes, rng: Random) -> bytes:
    """`data` with one to three wounds."""
    random = rng.random
    for _ in range(1 + int(random() * 3)):
        at = int(random() * (len(data) + 1))
        kind = int(random() * 6)
        if kind == 0:
            data = data[:at] + TOKENS[int(random() * len(TOKENS))] + data[at:]
        elif kind == 1:
            data = data[:at] + bytes((int(random() * 256),)) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + data[at + 1 + int(random() * 8) :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + TOKENS[int(random() * len(TOKENS))] + data[at + int(random() * 12) :]
        else:
            data = data + data[at:]
    return data


def read_requests(data: bytes, cut: int) -> int:
    """Feeds one connection, in two pieces; the number of requests it was read as."""
    reader = RequestReader()
    count = 0
    pieces = [data[:cut], data[cut:]] if 0 < cut < len(data) else [data]
    try:
        for piece in pieces:
            reader.feed(piece)
            while True:
                head = reader.next_head()
                if head is None:
                    break
                count += 1
                assert b"host" in head.fields or head.is_http10
                assert not (b"content-length" in head.fields and b"transfer-encoding" in head.fields)
                for name, value in head.headers:
                    assert name == name.lower() and not {0, 10, 13} & set(value)
                split_target(head.target)
                made = request_id(head.headers, (b"x-request-id",), "req-", _RNG)
                assert made.isascii() and made.isprintable()
                if head.length == LENGTH_CHUNKED:
                    decoder = ChunkedDecoder()
                    decoder.feed(reader.take_input(1 << 30))
                    assert decoder.decoded_bytes == len(decoder.take()) <= len(data)
                    if not decoder.is_complete:
                        return count
                    reader.give_back(decoder.rest)
                    reader.body_done(None)
                elif head.length and reader.take_whole(head.length) is None:
                    return count
                if count > len(data):
                    raise AssertionError("requests out of nothing")
    except GatewayError as error:
        assert error.is_closing and error.status in (400, 414, 431)
    assert len(data) <= HEAD_BYTES_MAX or not reader.has_input or count
    return count


def read_chunks(data: bytes, cut: int) -> bool:
    """Feeds a chunked body, in two pieces; whether it ended."""
    decoder = ChunkedDecoder()
    try:
        decoder.feed(data[:cut])
        if not decoder.is_complete:
            decoder.feed(data[cut:])
    except GatewayError as error:
        assert error.is_closing and error.status == 400
        return False
    assert len(decoder.take()) == decoder.decoded_bytes
    return decoder.is_complete


class _Slot:
    is_readable = False
    is_hung_up = False
    is_writable = True


class _Pieces:
    """A connection on which these pieces arrive, then the end."""

    is_truncated = False

    def __init__(self, pieces: list[bytes]) -> None:
        self.slot = _Slot()
        self._pieces = [piece for piece in pieces if piece]

    def receive_nowait(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def read_answers(data: bytes, cut: int) -> int:
    """Feeds a worker's connection, in two pieces and an end; the status, 0 without an answer."""
    upstream = Upstream(_Pieces([data[:cut], data[cut:]]))  # type: ignore[arg-type]
    try:
        while not upstream.is_complete:
            upstream.receive_nowait()
    except UpstreamError as error:
        assert error.kind in (UpstreamError.RESET, UpstreamError.BROKEN_STREAM)
        assert (error.kind == UpstreamError.BROKEN_STREAM) == upstream.is_head_done
    if not upstream.is_head_done:
        return 0
    lines = returned(upstream.headers)
    assert b"\x00" not in lines and lines.count(b"\n") == lines.count(b"\r\n") == lines.count(b"\r")
    if upstream.is_complete and upstream.length is not None and upstream.status not in (204, 304):
        assert len(upstream.take()) == upstream.length
    return upstream.status


_RNG = Random(0)


def _first_request(reader: RequestReader, data: bytes) -> object:
    try:
        reader.feed(data)
        head = reader.next_head()
        if head is None:
            return None
        body = reader.take_whole(head.length)
        return (
            head.method,
            head.target,
            list(head.headers),
            head.length,
            head.keep_alive,
            body,
            head.is_http10,
        )
    except GatewayError as error:
        return error.status


def read_after(good: bytes, data: bytes) -> None:
    """A request is read as it would be on a new connection, whatever heads this connection remembers."""
    used = RequestReader()
    for _ in range(2):
        assert isinstance(_first_request(used, good), tuple)
        used.take_input(1 << 30)
    assert _first_request(used, data) == _first_request(RequestReader(), data)


def _first_answer(upstream: Upstream, pieces: _Pieces, data: bytes) -> object:
    pieces._pieces = [data]
    try:
        while not upstream.is_complete:
            upstream.receive_nowait()
    except UpstreamError as error:
        return error.kind
    lines = upstream.head_lines
    if lines is None:
        lines = returned(upstream.headers)
        upstream.keep_lines(lines)
    return (
        upstream.status,
        upstream.length,
        upstream.content_type,
        upstream.take(),
        lines,
        upstream.may_be_reused,
    )


def answer_after(good: bytes, data: bytes) -> None:
    """An answer is read as it would be on a new connection, whatever heads this connection remembers."""
    pieces = _Pieces([])
    used = Upstream(pieces)  # type: ignore[arg-type]
    for _ in range(2):
        used._begin()
        assert isinstance(_first_answer(used, pieces, good), tuple) and used.may_be_reused
    used._begin()
    fresh_pieces = _Pieces([])
    assert _first_answer(used, pieces, data) == _first_answer(Upstream(fresh_pieces), fresh_pieces, data)  # type: ignore[arg-type]
