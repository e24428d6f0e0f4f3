"""Upstream connections: which are open to whom, which may be used again, how many there may be.

Owns every connection to a worker between two requests, name resolution and connecting. `take` and `give_back` decide
at once and wait for nothing; only `open` waits. Never speaks HTTP on a connection.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable

import trio

from smg.errors import UpstreamError
from smg.net.connection import Connection, ConnectionLost, DeadlinePassed, PlainConnection, TlsConnection
from smg.net.readiness import Parking, Readiness
from smg.net.tls import worker_context
from smg.net.upstream import Upstream

RESOLVED_FOR_S = 30.0  # a name is asked again after this; pods and VMs move
IDLE_PER_ORIGIN_MAX = 1024  # idle connections kept to one worker; more are closed when given back


class Origin:
    """A place to connect to: host, port, TLS or not. One per worker base URL.

    `connections_max` bounds open connections (None: no bound); requests above it wait in order. `permits` tells which
    addresses may be connected to (None: all); it is asked about what is connected to, so no resolver can get around it.
    `idle_max` bounds the idle connections, 0 when the place is not used any more.
    """

    __slots__ = (
        "_addresses",
        "_resolved_until_s",
        "connections_max",
        "host",
        "idle",
        "idle_max",
        "is_tls",
        "open_count",
        "permits",
        "port",
        "waiters",
    )

    def __init__(
        self, host: str, port: int, *, is_tls: bool = False, connections_max: int | None = None
    ) -> None:
        self.host = host
        self.port = port
        self.is_tls = is_tls
        self.connections_max = connections_max
        self.permits: Callable[[str], bool] | None = None
        self.idle: deque[Upstream] = deque()
        self.idle_max = IDLE_PER_ORIGIN_MAX
        self.open_count = 0
        self.waiters: deque[Parking] = deque()
        self._addresses: list[tuple[socket.AddressFamily, str]] = _numeric(host)
        self._resolved_until_s = math.inf if self._addresses else -math.inf

    async def resolve(self) -> list[tuple[socket.AddressFamily, str]]:
        """The addresses of the host. Raises `UpstreamError` refused when the name is not known."""
        if trio.current_time() < self._resolved_until_s:
            return self._addresses
        try:
            found = await trio.socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if self._addresses:
                return self._addresses  # the resolver is ill; the last answer is the best there is
            reason = error.strerror if isinstance(error, OSError) else "is no host name"
            raise UpstreamError(UpstreamError.REFUSED, f"name not resolved: {reason}") from None
        self._addresses = [(entry[0], str(entry[4][0])) for entry in found]
        self._resolved_until_s = trio.current_time() + RESOLVED_FOR_S
        return self._addresses


class ConnectionPool:
    """All upstream connections of the process.

    `idle_timeout_s`: an idle connection is closed after this, before a usual engine closes it (uvicorn: 5 s).
    `connect_timeout_s` bounds connecting. `context` verifies workers that speak TLS.
    """

    def __init__(
        self,
        readiness: Readiness,
        *,
        idle_timeout_s: float,
        connect_timeout_s: float,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._readiness = readiness
        self._idle_timeout_s = idle_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._context = context
        self._origins: dict[tuple[str, int, bool], Origin] = {}
        readiness.add_sweeper(self._sweep)

    def origin(
        self, host: str, port: int, *, is_tls: bool = False, connections_max: int | None = None
    ) -> Origin:
        """The origin of a place; the same object for the same place."""
        key = (host, port, is_tls)
        origin = self._origins.get(key)
        if origin is None:
            origin = self._origins[key] = Origin(host, port, is_tls=is_tls)
        if connections_max is not None:
            origin.connections_max = connections_max
            while (
                origin.idle and origin.open_count > connections_max
            ):  # probes came before the bound was known
                self._close(origin, origin.idle.popleft())
        return origin

    def use_context(self, context: ssl.SSLContext) -> None:
        """From now on TLS connections are opened with `context`; idle ones of the old one are closed (SEC-10)."""
        self._context = context
        for origin in self._origins.values():
            while origin.is_tls and origin.idle:
                self._close(origin, origin.idle.pop())

    def forget(self, origin: Origin) -> None:
        """Closes the idle connections of a place that is not used any more; those in use are closed when given back."""
        origin.idle_max = 0
        self._origins.pop((origin.host, origin.port, origin.is_tls), None)
        while origin.idle:
            self._close(origin, origin.idle.pop())

    def take(self, origin: Origin) -> Upstream | None:
        """An idle connection that still lives, or None: the one used last, so that the others may idle out."""
        idle = origin.idle
        while idle:
            upstream = idle.pop()
            slot = upstream.connection.slot
            if not slot.is_hung_up and not slot.is_readable:
                upstream.is_fresh = False
                return upstream
            self._close(origin, upstream)
        return None

    def give_back(self, origin: Origin, upstream: Upstream) -> None:
        """Ends the use of a connection: kept when it may serve again, else closed."""
        slot = upstream.connection.slot
        may_stay = upstream.may_be_reused and not slot.is_hung_up and not slot.is_readable
        if not may_stay or len(origin.idle) >= origin.idle_max:
            self._close(origin, upstream)
            return
        upstream.idle_since_s = self._readiness.now_s
        origin.idle.append(upstream)
        if origin.waiters:
            origin.waiters.popleft().wake()

    def discard(self, origin: Origin, upstream: Upstream) -> None:
        """Closes a connection in the middle of an answer; the worker sees it and aborts."""
        self._close(origin, upstream)

    async def open(self, origin: Origin, parking: Parking) -> Upstream:
        """A connection to `origin`: an idle one, else a new one.

        Waits while `connections_max` are in use. Raises `UpstreamError` refused (also for a connect timeout, since
        nothing was sent) or timeout (the parking's own deadline passed).
        """
        while origin.connections_max is not None and origin.open_count >= origin.connections_max:
            upstream = self.take(origin)
            if upstream is not None:
                return upstream
            if origin.open_count < origin.connections_max:
                break
            await self._wait_turn(origin, parking)
        return await self.open_new(origin, parking)

    async def open_new(self, origin: Origin, parking: Parking) -> Upstream:
        """As `open`, without looking for an idle one and without the bound: for the replacement of a dead one."""
        origin.open_count += 1
        try:
            return await self._connect(origin, parking)
        except BaseException:
            self._left(origin)
            raise

    async def _wait_turn(self, origin: Origin, parking: Parking) -> None:
        origin.waiters.append(parking)
        is_woken = False
        try:
            is_woken = await parking.wait_woken()
        finally:
            if not is_woken:
                try:
                    origin.waiters.remove(parking)
                except ValueError:
                    # Woken and cancelled at once: the turn goes on to the next in line.
                    if origin.waiters:
                        origin.waiters.popleft().wake()
        if not is_woken:
            raise UpstreamError(UpstreamError.TIMEOUT, "no free connection to the worker within the timeout")

    async def _connect(self, origin: Origin, parking: Parking) -> Upstream:
        limit_s = parking.deadline_s
        now = trio.current_time()
        parking.deadline_s = min(limit_s, now + self._connect_timeout_s)
        try:
            addresses = await parking.run(origin.resolve)
            last = "connect timed out"
            for family, address in addresses or ():
                if origin.permits is not None and not origin.permits(address):
                    last = "the address is not permitted"
                    continue
                try:
                    connection = await self._connect_to(family, address, origin, parking)
                except ConnectionLost as error:
                    last = str(error)
                    continue
                return Upstream(connection)
        except DeadlinePassed:
            last = "connect timed out"
        finally:
            parking.deadline_s = limit_s
        if trio.current_time() >= limit_s:
            raise UpstreamError(UpstreamError.TIMEOUT, "no connection within the request's timeout")
        raise UpstreamError(UpstreamError.REFUSED, last)

    async def _connect_to(
        self, family: socket.AddressFamily, address: str, origin: Origin, parking: Parking
    ) -> Connection:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex((address, origin.port))
            if code not in (0, errno.EINPROGRESS):
                raise ConnectionLost(os.strerror(code))
        except OSError as error:
            sock.close()
            raise ConnectionLost(str(error)) from None
        except BaseException:
            sock.close()
            raise
        plain = PlainConnection(sock, self._readiness)
        try:
            if code and (code := sock.connect_ex((address, origin.port))) != errno.EISCONN:
                # Not there yet. (On one host the handshake is over when `connect` returns, and a wait is saved.)
                if code not in (0, errno.EALREADY, errno.EINPROGRESS):
                    # Refused already. Asking takes the error from the socket, so no later look would find it.
                    raise ConnectionLost(os.strerror(code))
                plain.slot.is_writable = False
                if not await parking.wait_writable(plain.slot):
                    raise DeadlinePassed
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise ConnectionLost(os.strerror(code))
            if sock.getsockname()[:2] == (address, origin.port):
                # A free port of the ephemeral range can connect to itself; nobody listens there.
                raise ConnectionLost(os.strerror(errno.ECONNREFUSED))
            plain.slot.is_hung_up = plain.slot.is_lost = plain.slot.is_readable = False
            if not origin.is_tls:
                return plain
            return await self._encrypt(plain, origin, parking)
        except OSError as error:
            plain.close()
            raise ConnectionLost(str(error)) from None
        except BaseException:
            plain.close()
            raise

    async def _encrypt(self, plain: PlainConnection, origin: Origin, parking: Parking) -> TlsConnection:
        if self._context is None:
            self._context = worker_context()
        try:
            connection = TlsConnection(plain, self._context, server_side=False, server_name=origin.host)
        except ValueError as error:
            raise ConnectionLost(f"no name to verify: {error}") from None
        await connection.handshake(parking)
        return connection

    def _close(self, origin: Origin, upstream: Upstream) -> None:
        upstream.close()
        self._left(origin)

    def _left(self, origin: Origin) -> None:
        origin.open_count -= 1
        assert origin.open_count >= 0
        if origin.waiters:
            origin.waiters.popleft().wake()

    def _sweep(self, now: float) -> None:
        oldest_s = now - self._idle_timeout_s
        for origin in self._origins.values():
            idle = origin.idle
            while idle and (idle[0].idle_since_s < oldest_s or idle[0].is_stale):
                self._close(origin, idle.popleft())


def _numeric(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """The address itself when `host` is one, else nothing: names are resolved later."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, host)]
    return []
