"""Which headers travel: towards the worker, back to the client, and the request id of both.

Owns the allow-list of UP-4, the hop-by-hop list of DN-2, the rules of request ids (RID-1 to RID-3) and the reading of
request targets (HTTP-11, HTTP-12). Header lists are `(lower-case name, value)` pairs as `wire/http1` makes them; it
never reads a socket and never checks framing, which `wire/http1` did before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from urllib.parse import unquote_to_bytes

Header = tuple[bytes, bytes]

# Name -> start of the line sent to the worker. b"" = known and not sent: listed only so that the usual headers of
# clients cost one look-up and never the two prefix tests.
_TO_WORKER: dict[bytes, bytes] = {
    name: name + b": "
    for name in (
        b"content-type",
        b"accept",
        b"accept-encoding",
        b"authorization",
        b"x-api-key",
        b"x-correlation-id",
        b"traceparent",
        b"tracestate",
        b"x-smg-routing-key",
        b"anthropic-version",
        b"anthropic-beta",
    )
} | dict.fromkeys(
    (
        b"host",
        b"connection",
        b"content-length",
        b"transfer-encoding",
        b"user-agent",
        b"x-request-id",  # the gateway's own word for it is sent (UP-7)
        b"accept-language",
        b"cookie",
        b"origin",
        b"referer",
        b"expect",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-real-ip",
        b"forwarded",
        b"via",
        b"x-smg-target-worker",
        b"x-smg-priority",
        b"x-smg-tenant-id",
        b"x-stainless-lang",
        b"x-stainless-package-version",
        b"x-stainless-os",
        b"x-stainless-arch",
        b"x-stainless-runtime",
        b"x-stainless-runtime-version",
        b"x-stainless-async",
        b"x-stainless-retry-count",
        b"x-stainless-read-timeout",
        b"x-stainless-timeout",
    ),
    b"",
)

_CREDENTIALS = frozenset((b"authorization", b"x-api-key"))
_TRACE = frozenset((b"traceparent", b"tracestate"))

# Never relayed to the client (DN-2); length and coding are decided by the relay (DN-4). `x-smg-worker-id` of a worker
# that is a gateway itself gives way to ours, so that there is exactly one (DN-3).
_NOT_RETURNED = frozenset(
    (
        b"connection",
        b"date",  # comes first, see `returned`
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"x-request-id",
        b"x-smg-worker-id",
    )
)

# Naming these in `connection` would only break the answer: they describe the bytes that are relayed.
_ALWAYS_END_TO_END = frozenset((b"content-type", b"content-encoding"))

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


def forwarded(
    headers: Sequence[Header],
    request_id: str,
    worker_key: bytes | None = None,
    is_secret: Callable[[bytes], bool] | None = None,
    trace: bytes | None = None,
) -> bytes:
    """The header lines for the worker, each ended by CRLF, without `host` and framing lines (UP-4 to UP-7).

    `worker_key` is the worker's own key: it goes as the only authorization (UP-6). `is_secret` tells whether a value
    is a gateway key, in which case its header is left out (SEC-3); None when the gateway has no keys. `trace` are
    lines that replace the client's `traceparent` and `tracestate`, or None to pass those through (TRC-1).
    """
    return b"x-request-id: %b\r\n%b" % (
        request_id.encode("latin-1"),
        forwarded_lines(headers, worker_key, is_secret, trace),
    )


def forwarded_lines(
    headers: Sequence[Header],
    worker_key: bytes | None = None,
    is_secret: Callable[[bytes], bool] | None = None,
    trace: bytes | None = None,
) -> bytes:
    """As `forwarded`, without the request id: the same for every request with the same head."""
    pieces: list[bytes] = []
    start_of = _TO_WORKER.get
    for name, value in headers:
        start = start_of(name)
        if start is None:
            if not name.startswith((b"openai-", b"x-request-id-")):
                continue
            start = name + b": "
        elif (
            not start
            or (worker_key is not None and name in _CREDENTIALS)
            or (trace is not None and name in _TRACE)
        ):
            continue
        if is_secret is not None and is_secret(value):
            continue
        pieces += (start, value, b"\r\n")
    if worker_key is not None:
        pieces += (b"authorization: Bearer ", worker_key, b"\r\n")
    if trace is not None:
        pieces.append(trace)
    return b"".join(pieces)


def returned(headers: Sequence[Header]) -> bytes:
    """The header lines of a worker's answer for the client, each ended by CRLF (DN-2).

    A `date` comes first, so that whoever adds what is missing sees it (HTTP-17). Left out: hop-by-hop headers with those that `connection` names, `content-length` (the relay writes it),
    `x-request-id` and `x-smg-worker-id`.
    """
    pieces: list[bytes] = []
    named: set[bytes] | None = None
    for name, value in headers:
        if name in _NOT_RETURNED:
            if name == b"connection" and value not in (b"keep-alive", b"close", b"Keep-Alive"):
                named = (named or set()) | {word.strip().lower() for word in value.split(b",")}
            elif name == b"date" and pieces[:1] != [b"date"]:
                pieces[0:0] = (name, b": ", value, b"\r\n")
        elif not name.startswith(b"proxy-"):
            pieces += (name, b": ", value, b"\r\n")
    if named:
        # Rare: a second pass keeps the first one short, and `connection` may come after what it names.
        kept = [header for header in headers if header[0] not in named or header[0] in _ALWAYS_END_TO_END]
        return returned([header for header in kept if header[0] != b"connection"])
    return b"".join(pieces)


def value_of(headers: Sequence[Header], name: bytes) -> bytes | None:
    """The first value of `name`, or None."""
    for found, value in headers:
        if found == name:
            return value
    return None


def request_id(headers: Sequence[Header], names: Sequence[bytes], prefix: str, rng: Random) -> str:
    """The id of a request (RID-1 to RID-3): the first valid value in the order of `names`, else a new one."""
    found: bytes | None = None
    rank = len(names)
    for name, value in headers:
        if name in names:
            at = names.index(name)
            if at < rank and _REQUEST_ID.fullmatch(value):
                found, rank = value, at
                if at == 0:
                    break
    return new_request_id(prefix, rng) if found is None else found.decode("ascii")


def new_request_id(prefix: str, rng: Random) -> str:
    """`prefix` and 24 characters of `[0-9a-f]` (RID-2)."""
    return f"{prefix}{rng.getrandbits(96):024x}"


def split_target(target: bytes) -> tuple[str, str]:
    """Path and query (without `?`, empty when none) of a request target.

    The absolute form is served by its path (HTTP-11). In the path only escapes of unreserved characters are decoded,
    so that `%2F` never becomes a separator (HTTP-12). Bytes beyond ASCII become Latin-1 characters, which match no
    route.
    """
    if not target.startswith(b"/"):
        scheme, separator, rest = target.partition(b"://")
        if separator and scheme.isalpha():
            slash = rest.find(b"/")
            mark = rest.find(b"?")
            if slash < 0 or 0 <= mark < slash:
                target = b"/" + (rest[mark:] if mark >= 0 else b"")
            else:
                target = rest[slash:]
    path, _, query = target.partition(b"?")
    if b"%" in path:
        path = _ESCAPE.sub(_decode_unreserved, path)
    return path.decode("latin-1"), query.decode("latin-1")


def path_value(segment: str) -> str:
    """The text of a path parameter: all escapes decoded (`%2F` in model ids, MOD-1); broken UTF-8 becomes U+FFFD."""
    return unquote_to_bytes(segment.encode("latin-1")).decode("utf-8", "replace")


def _decode_unreserved(match: re.Match[bytes]) -> bytes:
    code = int(match[1], 16)
    return bytes((code,)) if code in _UNRESERVED else match.group()
