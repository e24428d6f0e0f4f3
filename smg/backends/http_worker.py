"""Sends a call to an OpenAI-compatible HTTP worker and brings back its answer's head.

Owns what the worker receives (contract section 5): request line, headers, the client's own body bytes. The body of
the answer stays on the `Upstream`, for `gateway/relay` to pass on untouched. Never chooses a worker and never retries
on another one; a kept connection that the worker had closed meanwhile is replaced here, because nothing of the
request was read on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from smg.api.call import Call
from smg.errors import UpstreamError
from smg.fleet.worker import Worker
from smg.net.pool import ConnectionPool, Origin
from smg.net.readiness import Parking
from smg.net.upstream import Upstream
from smg.wire.headers import forwarded_lines
from smg.wire.http1 import RequestHead
from smg.wire.json_splice import insert_members


class Asker(Protocol):
    """What sending needs of an `Exchange`; the second leg of a pair asks from a task of its own."""

    @property
    def head(self) -> RequestHead:
        """The client's request."""
        ...

    @property
    def trace_lines(self) -> bytes | None:
        """Lines instead of the client's trace headers (TRC-1)."""
        ...

    @property
    def parking(self) -> Parking:
        """Where the sending task waits."""
        ...


class Lines:
    """What is the same in every request to one worker: its origin, request lines by path, header lines."""

    __slots__ = ("id_line", "key", "origin", "paths", "prefix", "rank", "url")

    def __init__(self, worker: Worker, origin: Origin) -> None:
        self.origin = origin
        self.url = worker.url
        base_path = worker.base_url.partition("://")[2].partition("/")[2]
        self.prefix = f"/{base_path}" if base_path else ""
        self.key = worker.spec.api_key.encode("latin-1") if worker.spec.api_key else None
        self.id_line = f"x-smg-worker-id: {worker.id}\r\n".encode()
        self.rank = None if worker.spec.dp_rank is None else str(worker.spec.dp_rank).encode()
        self.paths: dict[str, bytes] = {}


class HttpWorkers:
    """The backend of `http://` and `https://` workers.

    `is_secret` tells whether a header value is a gateway key and must stay here (SEC-3); None when there are none.
    """

    def __init__(self, pool: ConnectionPool, is_secret: Callable[[bytes], bool] | None) -> None:
        self._pool = pool
        self._is_secret = is_secret
        self._lines: dict[str, Lines] = {}

    def lines(self, worker: Worker) -> Lines:
        """The constant parts for a worker."""
        lines = self._lines.get(worker.id)
        if lines is None:
            origin = self._pool.origin(
                worker.host, worker.port, is_tls=worker.is_tls, connections_max=worker.spec.max_connections
            )
            lines = self._lines[worker.id] = Lines(worker, origin)
        return lines

    def forget(self, worker: Worker) -> None:
        """The worker left or changed: its key and connections are not used again."""
        lines = self._lines.pop(worker.id, None)
        if lines is not None and not any(other.origin is lines.origin for other in self._lines.values()):
            self._pool.forget(lines.origin)

    async def open(
        self,
        call: Call,
        worker: Worker,
        lines: Lines,
        query: bytes,
        exchange: Asker,
    ) -> Upstream:
        """Sends the call and waits for the answer's head; the caller gives the `Upstream` back with `close`.

        Raises `UpstreamError` refused, reset, timeout; `ClientGone` when the exchange's client leaves meanwhile.
        """
        parking = exchange.parking
        endpoint = call.endpoint
        start = lines.paths.get(endpoint.path)
        if start is None:
            start = lines.paths[endpoint.path] = (
                f"POST {lines.prefix}{endpoint.sent_path} HTTP/1.1\r\nhost: ".encode()
                + worker.host_header
                + b"\r\n"
            )
        body = call.body
        if lines.rank is not None and endpoint.is_json:
            body = insert_members(body, {"data_parallel_rank": lines.rank})
        if query:
            start = start.replace(b" HTTP/1.1", b"?" + query + b" HTTP/1.1", 1)
        client = exchange.head
        key = lines.key
        if exchange.trace_lines is None:
            forwarded = client.worker_lines.get(key)
            if forwarded is None:
                forwarded = client.worker_lines[key] = forwarded_lines(client.headers, key, self._is_secret)
        else:
            forwarded = forwarded_lines(client.headers, key, self._is_secret, exchange.trace_lines)
        head = b"%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n" % (
            start,
            call.request_id.encode(),
            forwarded,
            len(body),
        )
        pool = self._pool
        origin = lines.origin
        upstream = pool.take(origin)
        is_kept = upstream is not None
        if upstream is None:
            upstream = await pool.open(origin, parking)
        try:
            if not upstream.send_nowait(head, body):
                await upstream.send(parking, head, body)
            slot = upstream.connection.slot
            while not upstream.is_head_done:
                if not slot.is_readable and not await parking.wait_readable(slot):
                    raise UpstreamError(UpstreamError.TIMEOUT, "no answer within the timeout", was_sent=True)
                upstream.receive_nowait()
            return upstream
        except UpstreamError as error:
            # A worker may close an idle connection as we write on it.
            is_unread = is_kept and error.kind == UpstreamError.RESET and upstream.was_unread()
            pool.discard(origin, upstream)
            if not is_unread:
                raise
            return await self._open_anew(origin, head, body, parking)
        except BaseException:
            pool.discard(origin, upstream)
            raise

    async def _open_anew(self, origin: Origin, head: bytes, body: bytes, parking: Parking) -> Upstream:
        """As `open`, on a connection that was not used before."""
        upstream = await self._pool.open_new(origin, parking)
        try:
            await upstream.send(parking, head, body)
            await upstream.read_head(parking)
        except BaseException:
            self._pool.discard(origin, upstream)
            raise
        return upstream

    def close(self, lines: Lines, upstream: Upstream) -> None:
        """Ends the use of an answer: the connection is kept when the answer was read to its end."""
        self._pool.give_back(lines.origin, upstream)

    def discard(self, lines: Lines, upstream: Upstream) -> None:
        """Ends an answer in the middle: the worker sees the connection close and aborts."""
        self._pool.discard(lines.origin, upstream)
