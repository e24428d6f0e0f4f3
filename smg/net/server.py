"""The HTTP/1.1 server: accepts connections, reads heads, hands requests to one handler, drains.

One task per connection, written from top to bottom; client departure comes from the readiness service, not from a
second task. Owns connections and the order of their requests (HTTP-1). Never looks at a path.
"""

from __future__ import annotations

import errno
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from email.utils import formatdate

import trio

from smg.errors import ClientGone, GatewayError, ShuttingDown
from smg.net.connection import Connection, ConnectionLost, DeadlinePassed, PlainConnection, TlsConnection
from smg.net.exchange import NO_HEAD, Exchange, ServerLimits
from smg.net.listen import ignore_newcomers
from smg.net.readiness import Readiness
from smg.wire.http1 import LENGTH_CHUNKED, RequestHead, RequestReader

ACCEPTS_PER_WAKE = (
    4  # few: those accepted are served before more come in, so that a burst does not wait for its last
)
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
OUT_OF_FILES_PAUSE_S = 0.1
LAST_WORD_MAX_S = 1.0
"""How long a server that has closed its port keeps a connection on which a request may be on its way: a new one, and one
whose last answer did not say that it would be closed (a stream that began before the drain)."""
NEIGHBOUR_PATIENCE_S = 0.02
"""A process whose loop turns has accepted long before; and each look at a neighbour's port costs a wake-up, so they are rare."""

Handler = Callable[[Exchange], Awaitable[None]]
Refuse = Callable[[Exchange, GatewayError], Awaitable[None]]
Report = Callable[[Exchange, BaseException], None]


class Server:
    """One HTTP server over one or more listening sockets.

    `handle(exchange)` serves a request and writes its answer; `refuse(exchange, error)` answers a request that could
    not be read, or whose handler raised `GatewayError` before the answer began; `report` is told of faults of the
    handler (bugs), once, after which the client gets `refuse` with 500.
    """

    def __init__(
        self,
        handle: Handler,
        refuse: Refuse,
        report: Report,
        readiness: Readiness,
        limits: ServerLimits,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._handle = handle
        self._refuse = refuse
        self._report = report
        self._readiness = readiness
        self._limits = limits
        self._tls = tls
        self._exchanges: dict[Exchange, None] = {}
        self._is_draining = False
        self._has_closed_port = False
        self._last_word_s = LAST_WORD_MAX_S
        self._listeners: Sequence[socket.socket] = ()
        self._newcomers = 0  # accepted, and their task has not run yet
        self._has_stopped = trio.Event()
        self._has_stopped.set()
        self._accepting = trio.CancelScope()
        self._date_line = b""
        self._all_gone = trio.Event()
        self._tick(0.0)
        readiness.add_sweeper(self._tick)

    @property
    def connection_count(self) -> int:
        """Open client connections (`smg_http_connections_active`)."""
        return len(self._exchanges)

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called."""
        return self._is_draining

    async def serve(
        self,
        listeners: Sequence[socket.socket],
        neighbours: Sequence[socket.socket] = (),
        *,
        is_port_kept: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves until `stop_listening` and the last connection is gone, or until cancelled. Closes the listeners.

        `neighbours` are listeners of other processes on the same port: what they leave waiting for
        `NEIGHBOUR_PATIENCE_S`, since they are dead or hang, is served here. `is_port_kept`: somebody keeps the listeners
        open for whoever serves next, so newcomers are never turned away.
        """
        self._listeners = () if is_port_kept else listeners
        self._has_stopped = trio.Event()
        async with trio.open_nursery() as connections:
            try:
                with self._accepting:
                    async with trio.open_nursery() as accepts:
                        for listener in listeners:
                            accepts.start_soon(self._accept, listener, connections)
                        for listener in neighbours:
                            accepts.start_soon(self._accept, listener, connections, NEIGHBOUR_PATIENCE_S)
                        task_status.started()
            finally:
                if self._has_closed_port:
                    self._accept_last(connections)
                for listener in (*listeners, *neighbours):
                    listener.close()
                self._has_stopped.set()

    def use_tls(self, context: ssl.SSLContext) -> None:
        """From now on connections are accepted with `context`; those that are open go on (SEC-10)."""
        assert self._tls is not None, "a plain port does not turn into a TLS one"
        self._tls = context

    def forget_heads(self) -> None:
        """Keys have changed: no connection goes on with what its last head was allowed."""
        for exchange in self._exchanges:
            exchange.reader.forget_head()

    def start_draining(self) -> None:
        """From now on answers carry `Connection: close` (LIFE-6); listeners stay open."""
        self._is_draining = True
        for exchange in self._exchanges:
            exchange.is_draining = True

    def turn_newcomers_away(self) -> None:
        """Lets no handshake begin any more; for a moment before `stop_listening`, so that none is half done then."""
        for listener in self._listeners:
            ignore_newcomers(listener)

    def stop_listening(self, last_word_s: float = LAST_WORD_MAX_S) -> None:
        """Closes the listeners and the connections that serve nothing; running requests go on (LIFE-5).

        A connection that was made or fell silent less than `last_word_s` ago is kept so long: a request may be on its way.
        """
        self.start_draining()
        self._last_word_s = min(last_word_s, LAST_WORD_MAX_S)
        self._has_closed_port = True
        self._accepting.cancel()
        limits, now = self._limits, self._readiness.now_s
        for exchange in list(self._exchanges):
            if not exchange.is_busy and not exchange.reader.has_input:
                is_first = exchange.head is NO_HEAD
                parking = exchange.parking
                # `_read_head` set the deadline when the wait began, which so can be told from it.
                began_s = parking.deadline_s - (
                    limits.header_read_timeout_s if is_first else limits.idle_timeout_s
                )
                parking.deadline_s = min(parking.deadline_s, began_s + self._last_word_s)
                parking.sweep(now)

    async def wait_closed(self) -> None:
        """Waits until every connection is gone; for use after `stop_listening`."""
        await self._has_stopped.wait()
        while self._exchanges or self._newcomers:
            self._all_gone = trio.Event()
            await self._all_gone.wait()

    def cut_off(self) -> None:
        """The grace period is over: what still runs is told so (LIFE-6)."""
        for exchange in list(self._exchanges):
            exchange.parking.interrupt(ShuttingDown())

    async def _accept(
        self, listener: socket.socket, connections: trio.Nursery, patience_s: float = 0.0
    ) -> None:
        is_waiting = patience_s > 0
        while True:
            await trio.lowlevel.wait_readable(listener)
            if is_waiting:
                await trio.sleep(patience_s)
                is_waiting = False
            try:
                if not self._accept_some(listener, connections):
                    is_waiting = patience_s > 0
            except OSError as error:
                if error.errno not in OUT_OF_FILES:
                    raise
                await trio.sleep(OUT_OF_FILES_PAUSE_S)

    def _accept_some(self, listener: socket.socket, connections: trio.Nursery) -> bool:
        """Takes some of those who wait; False when nobody waits any more. Raises `OSError` of `accept`."""
        for _ in range(ACCEPTS_PER_WAKE):
            try:
                sock, address = listener.accept()
            except ConnectionAbortedError:
                continue
            except BlockingIOError:
                return False
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = address[0] if isinstance(address, tuple) else ""
            self._newcomers += 1
            connections.start_soon(self._converse, sock, peer)
        return True

    def _accept_last(self, connections: trio.Nursery) -> None:
        """Takes those whom the kernel has connected since the last look: they may have sent a request already."""
        for listener in self._listeners:
            try:
                while self._accept_some(listener, connections):
                    pass
            except OSError:
                pass  # out of files: closing the listener resets the rest, which nothing can change

    async def _converse(self, sock: socket.socket, peer: str) -> None:
        plain = PlainConnection(sock, self._readiness)
        plain.slot.is_readable = True  # clients send at once: the head is likely here before epoll says so
        connection: Connection = plain
        if self._tls is not None:
            connection = TlsConnection(plain, self._tls, server_side=True)
        exchange = Exchange(connection, self._readiness, peer, self._limits, RequestReader())
        self._exchanges[exchange] = None
        self._newcomers -= 1
        try:
            if isinstance(connection, TlsConnection):
                exchange.parking.deadline_s = self._readiness.now_s + self._limits.header_read_timeout_s
                await connection.handshake(exchange.parking)
            await self._serve(exchange)
            await exchange.drain()
        except (ClientGone, ConnectionLost, DeadlinePassed, ShuttingDown):
            pass  # the client is gone, or was told as far as that was possible
        finally:
            del self._exchanges[exchange]
            exchange.close()
            if not self._exchanges:
                self._all_gone.set()

    async def _serve(self, exchange: Exchange) -> None:
        """Reads and serves requests until the connection ends."""
        handle = self._handle
        reader = exchange.reader
        readiness = self._readiness
        may_go_on = True
        while may_go_on:
            try:
                head = reader.next_head() or await self._read_head(exchange)
            except GatewayError as error:
                exchange.begin(_unreadable(), readiness.now_s, self._date_line, self._is_draining)
                await self._refuse(exchange, error)
                break
            if head is None:
                return
            exchange.begin(head, readiness.now_s, self._date_line, self._is_draining)
            try:
                await handle(exchange)
            except ClientGone:
                raise
            except ShuttingDown:
                if exchange.has_begun_answer:
                    raise
                await self._answer_error(exchange, _shutting_down())
            except GatewayError as error:
                await self._answer_error(exchange, error)
            except Exception as error:
                self._report(exchange, error)
                await self._answer_error(
                    exchange, GatewayError(500, "internal_error", "internal error of the gateway")
                )
            may_go_on = exchange.end()
        await exchange.shed()

    async def _answer_error(self, exchange: Exchange, error: GatewayError) -> None:
        if exchange.has_begun_answer:
            exchange.cut()
            raise ClientGone
        if error.is_closing:
            exchange.keep_alive = False
        await self._refuse(exchange, error)

    async def _read_head(self, exchange: Exchange) -> RequestHead | None:
        """The next head; None when the client is done. Raises `GatewayError` for heads that cannot be served."""
        reader = exchange.reader
        limits = self._limits
        readiness = self._readiness
        parking = exchange.parking
        connection = exchange.connection
        slot = connection.slot
        is_first = exchange.head is NO_HEAD
        until_s = readiness.now_s + (limits.header_read_timeout_s if is_first else limits.idle_timeout_s)
        while True:
            if reader.has_input:
                # The head has begun: its own time runs from the first byte, however slowly it drips (HTTP-7).
                until_s = min(until_s, readiness.now_s + limits.header_read_timeout_s)
            elif self._has_closed_port:
                until_s = min(until_s, readiness.now_s + self._last_word_s)
            parking.deadline_s = until_s
            is_in_time = slot.is_readable or await parking.wait_readable(slot)
            data = connection.receive_nowait()  # also when it is late: what has come is not thrown away
            if data is None:
                if is_in_time:
                    continue
                if reader.has_input:
                    raise GatewayError(
                        408, "request_timeout", "the request head did not come in time", is_closing=True
                    )
                return None
            if not data:
                return None
            reader.feed(data)
            head = reader.next_head()
            if head is not None:
                parking.deadline_s = math.inf
                return head

    def _tick(self, now: float) -> None:
        self._date_line = b"date: " + formatdate(usegmt=True).encode() + b"\r\n"


def _shutting_down() -> GatewayError:
    return GatewayError(
        503, "no_available_workers", "the gateway is shutting down", retry_after_s=1, is_closing=True
    )


def _unreadable() -> RequestHead:
    """Stands for a head that could not be parsed, so that the refusal has a request to belong to."""
    head = RequestHead(b"GET", b"*", [], False)
    head.keep_alive = False
    head.length = LENGTH_CHUNKED  # how much more belongs to it is not known: it is read and dropped (`shed`)
    return head
