"""A small HTTP client over the data plane's own connections: probes, load polls, fan-outs.

Owns one whole request and answer at a time. The relay does not come through here: it uses `pool` and `upstream`
itself. Deadlines are the caller's (`trio.fail_after`); cancellation closes the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import msgspec
import trio

from smg.errors import UpstreamError
from smg.net.pool import ConnectionPool, Origin
from smg.net.readiness import Parking, Readiness
from smg.net.upstream import Upstream

ANSWER_BYTES_MAX = 16 << 20  # metrics pages of large engines have a few MiB

Header = tuple[str, str]


class Fetched(msgspec.Struct, frozen=True):
    """A whole answer. `headers` have lower-case names; `elapsed_s` is the time from sending to the last byte."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    elapsed_s: float

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, or None."""
        return next((value for found, value in self.headers if found == name), None)


class Client:
    """Fetches whole answers through a `ConnectionPool`."""

    def __init__(self, readiness: Readiness, pool: ConnectionPool) -> None:
        self._readiness = readiness
        self._pool = pool

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Sequence[Header] = (),
        body: bytes = b"",
        bytes_max: int = ANSWER_BYTES_MAX,
        permits: Callable[[str], bool] | None = None,
    ) -> Fetched:
        """One request, one answer; redirects are not followed.

        `permits` tells which addresses of this place may be connected to (None: all). Raises `UpstreamError` refused,
        reset, broken_stream; an answer above `bytes_max` is broken_stream. A kept connection that turns out to be closed is replaced once by a new one.
        """
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        origin = self._pool.origin(parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls=is_tls)
        origin.permits = permits
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = _request_head(method, target, parts.netloc.rpartition("@")[2], headers, body)
        parking = self._readiness.open_parking()
        started_s = trio.current_time()
        try:
            upstream = self._pool.take(origin)
            if upstream is not None:
                try:
                    return await self._talk(
                        origin, upstream, parking, method, head, body, bytes_max, started_s
                    )
                except UpstreamError as error:
                    if error.kind != UpstreamError.RESET:
                        raise
            # Beside the bound of connections: a probe that waits behind long requests would fail its worker.
            upstream = await self._pool.open_new(origin, parking)
            return await self._talk(origin, upstream, parking, method, head, body, bytes_max, started_s)
        finally:
            self._readiness.close_parking(parking)

    async def _talk(
        self,
        origin: Origin,
        upstream: Upstream,
        parking: Parking,
        method: str,
        head: bytes,
        body: bytes,
        bytes_max: int,
        started_s: float,
    ) -> Fetched:
        is_done = False
        pieces: list[bytes] = []
        received = 0
        try:
            await upstream.send(parking, head, body, is_head_request=method == "HEAD")
            await upstream.read_head(parking)
            while True:
                data = upstream.take()
                received += len(data)
                if received > bytes_max:
                    raise UpstreamError(
                        UpstreamError.BROKEN_STREAM, f"answer is larger than {bytes_max} bytes"
                    )
                pieces.append(data)
                if upstream.is_complete:
                    break
                await upstream.read_more(parking)
            is_done = True
        finally:
            if is_done and origin.connections_max is None:
                self._pool.give_back(origin, upstream)
            else:
                self._pool.discard(origin, upstream)
        return Fetched(
            upstream.status, tuple(upstream.headers), b"".join(pieces), trio.current_time() - started_s
        )


def _request_head(method: str, target: str, host: str, headers: Sequence[Header], body: bytes) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"host: {host}"]
    for name, value in headers:
        if any(char in value for char in "\r\n\0"):
            raise ValueError(f"header {name} holds a line end or NUL")
        lines.append(f"{name}: {value}")
    if body or method in ("POST", "PUT", "PATCH"):
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
