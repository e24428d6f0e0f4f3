"""HTTP/1.1 request framing and limits: bytes in, heads and bodies out.

Owns what a request is on the wire (contract section 4): where a head ends, which heads are refused, how a chunked
body is cut. httptools (llhttp) parses; every check against request smuggling and every limit is made here as well,
because llhttp has no size limits and is lenient where versions differ. Never touches a socket, never waits.

A head is cut out of the input first and given to the parser alone, so that pipelined bytes stay ours, and a body of
known length is taken from the input without a copy through the parser.
"""

from __future__ import annotations

import re

import httptools

from smg.errors import GatewayError

HEAD_BYTES_MAX = 1 << 20  # HTTP-6: above 1 MiB: 431
HEAD_LINES_MAX = 256  # HTTP-6: above 256 lines: 431
TARGET_BYTES_MAX = 64 << 10  # HTTP-6: above 64 KiB: 414
CHUNK_LINE_BYTES_MAX = 16 << 10  # a chunk size line with its extensions; llhttp allows as much
TRAILER_BYTES_MAX = (
    64 << 10
)  # trailers are dropped, so they need no more room than a head that must be accepted

LENGTH_CHUNKED = -1

# bytes.translate deletes these; what is left are control characters. Ten times cheaper than a regular expression.
_NOT_CONTROL = bytes(byte for byte in range(256) if byte in b"\t\r\n" or 32 <= byte != 127)
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*")


def bad_request(message: str, *, status: int = 400, code: str = "bad_request") -> GatewayError:
    """The error of a request that cannot be read; the connection closes after it (HTTP-5)."""
    return GatewayError(status, code, message, is_closing=True)


class RequestHead:
    """One parsed request head.

    `headers` are (lower-case name, value) in the client's order; `fields` maps a name to its last value.
    `length` is the body's length in bytes, 0 without a body, `LENGTH_CHUNKED` for a chunked one.

    A head that repeats on its connection is the same object again, with the new `length`. What callers worked out from
    the rest of it they may keep with it: `endpoint` (whatever the router found), `principal` (whose key it brings),
    `tenant` (who pays) and `worker_lines` (header lines for the worker, by the worker's own key). None of these may
    outlive a change of keys: `RequestReader.forget_head`.
    """

    __slots__ = (
        "endpoint",
        "expects_continue",
        "fields",
        "headers",
        "is_http10",
        "keep_alive",
        "length",
        "method",
        "principal",
        "target",
        "tenant",
        "worker_lines",
    )

    def __init__(
        self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], is_http10: bool
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.fields: dict[bytes, bytes] = dict(headers)
        self.is_http10 = is_http10
        self.length = 0
        self.keep_alive = not is_http10
        self.expects_continue = False
        self.endpoint: object = None
        self.principal: object = None
        self.tenant: str | None = None
        self.worker_lines: dict[bytes | None, bytes] = {}


class RequestReader:
    """Cuts one connection's input into request heads.

    Clients that keep a connection send the same head again and again but for the digits of its content-length. So the
    last good head is remembered as the bytes before and after these digits, and input that begins with both is not
    parsed again (docs/decisions/0005-heads-that-repeat.md).

    `feed` adds bytes; `next_head` gives the next head or None when more bytes are needed. After a head with a body
    the caller takes the body out of `take_input` before it asks for the next head. State after an error is
    undefined: the connection closes.
    """

    __slots__ = (
        "_after",
        "_before",
        "_headers",
        "_input",
        "_is_body_parsed",
        "_last",
        "_length_at",
        "_parser",
        "_scanned",
        "_target",
    )

    def __init__(self) -> None:
        self._before = b""
        self._after = b""
        self._last: RequestHead | None = None
        self._length_at = 0
        self._is_body_parsed = False
        self._input = b""
        self._scanned = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._target = b""
        self._parser: httptools.HttpRequestParser | None = None

    def on_url(self, url: bytes) -> None:
        """A piece of the target, from the parser."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line, from the parser."""
        self._headers.append((name.lower(), value))

    @property
    def has_input(self) -> bool:
        """Whether bytes wait that no head or body has taken."""
        return bool(self._input)

    def feed(self, data: bytes) -> None:
        """Adds received bytes."""
        self._input = self._input + data if self._input else data

    def forget_head(self) -> None:
        """The next head is parsed anew, so that nothing of what was worked out from the last one is used again."""
        self._before = b""

    def take_input(self, bytes_max: int) -> bytes:
        """Takes up to `bytes_max` waiting bytes: a body that came together with its head."""
        data = self._input
        if len(data) <= bytes_max:
            self._input = b""
            return data
        self._input = data[bytes_max:]
        return data[:bytes_max]

    def take_whole(self, length: int) -> bytes | None:
        """A body of known length, taken and shown to the parser, when all of it is here; else None, nothing taken."""
        data = self._input
        if len(data) < length or length < 0:
            return None
        if len(data) == length:
            self._input = b""
        else:
            self._input = data[length:]
            data = data[:length]
        if self._is_body_parsed:
            self.body_done(data)
        return data

    def give_back(self, data: bytes) -> None:
        """Puts bytes after a chunked body's end back in front of the input."""
        self._input = data + self._input

    def body_done(self, body: bytes | bytearray | None) -> None:
        """The body was taken: shows it to the parser (None: the parser cannot be used again)."""
        if not self._is_body_parsed:
            return
        if body is None or self._parser is None:
            self._parser = None
            return
        try:
            self._parser.feed_data(body)
        except httptools.HttpParserError:
            self._parser = None

    def next_head(self) -> RequestHead | None:
        """The next request head, or None when its end has not come yet.

        Raises `GatewayError` 400, 414 or 431 with `is_closing` for heads that HTTP-5 and HTTP-6 refuse.
        """
        data = self._input
        if not data:
            return None
        before = self._before
        if before and data.startswith(before):
            repeated = self._repeated(data, len(before))
            if repeated is not None:
                return repeated
        if data[0] in b"\r\n":
            data = self._input = _without_leading_line_ends(data)
            self._scanned = 0
        end = data.find(b"\r\n\r\n", self._scanned)
        if end < 0:
            self._check_unfinished(data)
            return None
        self._scanned = 0
        end += 4
        head = data[:end]
        self._input = data[end:]
        if end > HEAD_BYTES_MAX or head.count(b"\n") > HEAD_LINES_MAX + 2:
            raise bad_request(
                f"request head is larger than {HEAD_BYTES_MAX} bytes or {HEAD_LINES_MAX} lines", status=431
            )
        if not _is_clean(head):
            raise bad_request("request head contains a control character or a bare CR or LF")
        return self._parse(head)

    def _repeated(self, data: bytes, at: int) -> RequestHead | None:
        """The last head again, when only the digits of its length differ."""
        head = self._last
        assert head is not None
        after = self._after
        end = at
        if after:
            end = data.find(b"\r", at, at + 19)
            digits = data[at:end]
            if end < 0 or not digits.isdigit() or not data.startswith(after, end):
                return None
            head.length = int(digits)
            head.fields[b"content-length"] = digits
            head.headers[self._length_at] = (b"content-length", digits)
        self._input = data[end + len(after) :]
        self._scanned = 0
        self._is_body_parsed = False
        return head

    def _remember(self, head: bytes, request: RequestHead) -> None:
        """Keeps a head that may repeat; one with a coding or an expectation has state of its own."""
        self._before = b""
        if request.length == LENGTH_CHUNKED or b"expect" in request.fields or b"upgrade" in request.fields:
            return
        self._last = request
        digits = request.fields.get(b"content-length")
        if digits is None:
            self._before, self._after = head, b""
            return
        # The name is given once (checked) and cannot be inside a value, which holds no line end.
        at = head.find(digits, head.lower().find(b"\r\ncontent-length:") + 17)
        self._before, self._after = head[:at], head[at + len(digits) :]
        self._length_at = request.headers.index((b"content-length", digits))

    def _parse(self, head: bytes) -> RequestHead:
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpRequestParser(self)
        headers: list[tuple[bytes, bytes]] = []
        self._headers = headers
        self._target = b""
        try:
            parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._parser = None  # the parser has left HTTP; the request itself is an ordinary one
        except httptools.HttpParserError as error:
            raise bad_request(f"malformed request head: {error}") from None
        if len(self._target) > TARGET_BYTES_MAX:
            raise bad_request(f"request target is longer than {TARGET_BYTES_MAX} bytes", status=414)
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise bad_request(f"HTTP/{version} is not served; use HTTP/1.1")
        request = RequestHead(parser.get_method(), self._target, headers, version == "1.0")
        _check_fields(request)
        self._is_body_parsed = True
        self._remember(head, request)
        return request

    def _check_unfinished(self, data: bytes) -> None:
        """Refuses early what can never become a good head, and remembers how far it was searched."""
        if len(data) > HEAD_BYTES_MAX:
            raise bad_request(f"request head is larger than {HEAD_BYTES_MAX} bytes", status=431)
        if len(data) > TARGET_BYTES_MAX + 32 and b"\r\n" not in data[: TARGET_BYTES_MAX + 32]:
            raise bad_request(f"request target is longer than {TARGET_BYTES_MAX} bytes", status=414)
        start = self._scanned
        if data.count(b"\n") > HEAD_LINES_MAX + 2:
            raise bad_request(f"request head has more than {HEAD_LINES_MAX} lines", status=431)
        whole = data[start : len(data) - 1] if data.endswith(b"\r") else data[start:]
        if whole.startswith(b"\n"):
            whole = whole[1:]  # its CR was looked at in the last round
        if not _is_clean(whole):
            raise bad_request("request head contains a control character or a bare CR or LF")
        self._scanned = max(0, len(data) - 3)


def _is_clean(text: bytes) -> bool:
    """Whether a piece of a head has no control character and no CR or LF alone."""
    ends = text.count(b"\r\n")
    return text.count(b"\n") == ends == text.count(b"\r") and not text.translate(None, _NOT_CONTROL)


def _without_leading_line_ends(data: bytes) -> bytes:
    """Drops empty lines before a request line (RFC 9112 section 2.2), CRLF only."""
    start = 0
    while data.startswith(b"\r\n", start):
        start += 2
    return data[start:] if start else data


def _check_fields(request: RequestHead) -> None:
    """The framing rules of HTTP-5 over parsed headers; sets length, keep-alive and 100-continue."""
    fields = request.fields
    if len(fields) != len(request.headers):
        for name in (b"host", b"content-length", b"transfer-encoding"):
            if name in fields and sum(1 for header in request.headers if header[0] == name) > 1:
                raise bad_request(f"header {name.decode()} is given twice")
        if b"connection" in fields:  # `fields` has the last line; every line counts
            fields[b"connection"] = b",".join(
                value for name, value in request.headers if name == b"connection"
            )
    if b"host" not in fields and not request.is_http10:
        raise bad_request("header host is missing (HTTP/1.1 needs it)")
    coding = fields.get(b"transfer-encoding")
    length = fields.get(b"content-length")
    if coding is not None:
        if length is not None:
            raise bad_request("content-length and transfer-encoding are both given")
        if request.is_http10:
            raise bad_request("transfer-encoding is not defined for HTTP/1.0")
        if coding.strip(b" \t").lower() != b"chunked":
            raise bad_request("transfer-encoding must be a single chunked")
        request.length = LENGTH_CHUNKED
    elif length is not None:
        digits = length.strip(b" \t")
        if not digits.isdigit() or len(digits) > 18:
            raise bad_request("content-length is not a number")
        request.length = int(digits)
    connection = fields.get(b"connection")
    if connection is not None:
        words = {word.strip().lower() for word in connection.split(b",")}
        if b"close" in words:
            request.keep_alive = False
        elif request.is_http10:
            request.keep_alive = b"keep-alive" in words
    expect = fields.get(b"expect")
    if expect is not None:
        request.expects_continue = expect.lower() == b"100-continue" and not request.is_http10


class ChunkedDecoder:
    """Decodes a chunked body strictly (HTTP-3, HTTP-5): `feed` bytes, read `pieces`, stop at `is_complete`.

    Chunk extensions are read over and trailers dropped; both are bounded. `rest` are the bytes after the end.
    `decoded_bytes` counts the body so far. Raises `GatewayError` 400 with `is_closing` when malformed; the state is
    undefined then.
    """

    __slots__ = (
        "_buffer",
        "_left",
        "_state",
        "_trailer_bytes",
        "decoded_bytes",
        "is_complete",
        "pieces",
        "rest",
    )

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        self._state = self._SIZE
        self._trailer_bytes = 0
        self.decoded_bytes = 0
        self.is_complete = False
        self.pieces: list[bytes] = []
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Adds received bytes."""
        buffer = self._buffer + data if self._buffer else data
        at = 0
        while at < len(buffer) and not self.is_complete:
            if self._state == self._DATA:
                piece = buffer[at : at + self._left]
                self.pieces.append(piece)
                self.decoded_bytes += len(piece)
                self._left -= len(piece)
                at += len(piece)
                if self._left == 0:
                    self._state = self._DATA_END
            elif self._state == self._DATA_END:
                if len(buffer) - at < 2 and buffer[at] == 13:
                    break
                if buffer[at : at + 2] != b"\r\n":
                    raise bad_request("malformed chunk end")
                at += 2
                self._state = self._SIZE
            else:
                end = self._line_end(buffer, at)
                if end < 0:
                    break
                self._read_line(buffer[at:end])
                at = end + 2
        if self.is_complete:
            self.rest = buffer[at:]
            self._buffer = b""
        else:
            self._buffer = buffer[at:]

    def take(self) -> bytes:
        """The decoded bytes since the last call."""
        pieces = self.pieces
        self.pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _line_end(self, buffer: bytes, at: int) -> int:
        end = buffer.find(b"\n", at)
        if end < 0:
            if len(buffer) - at > CHUNK_LINE_BYTES_MAX:
                raise bad_request("chunk size line is too long")
            return -1
        if end - at > CHUNK_LINE_BYTES_MAX or end == at or buffer[end - 1] != 13:
            raise bad_request("malformed chunk size line")
        return end - 1

    def _read_line(self, line: bytes) -> None:
        if self._state == self._SIZE:
            match = _SIZE_LINE.fullmatch(line)
            if match is None:
                raise bad_request("malformed chunk size")
            self._left = int(match[1], 16)
            self._state = self._DATA if self._left else self._TRAILER
            return
        if not line:
            self.is_complete = True
            return
        self._trailer_bytes += len(line)
        if self._trailer_bytes > TRAILER_BYTES_MAX or _TRAILER_LINE.fullmatch(line) is None:
            raise bad_request("malformed or oversize trailer")


_REASONS = {
    100: "Continue",
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

STATUS_LINES: dict[int, bytes] = {
    status: f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n".encode() for status in range(100, 1000)
}
"""The status line of every answer, codes that nobody defined too, for a worker may send them (DN-1). An HTTP/1.0 client
gets a 1.1 line, as RFC 9110 section 6.2 allows."""
