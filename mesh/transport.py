"""What the mesh needs of a network, and the real one: UDP datagrams and TCP streams of one port number, on trio.

Owns the sockets and the mapping of foreign errors (OSError, trio's, ssl's) to `WeatherError` and `DialError`. It must
never look into what it carries. Datagrams are never waited for on the way out: what the kernel does not take is lost,
as on any network, and counted. Tests put another `Transport` in its place.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
from functools import lru_cache
from typing import Protocol

import trio

from mesh.address import bare_host
from mesh.errors import DialError, SettingsError, WeatherError
from mesh.member import Address
from mesh.settings import PACKET_BYTES_MAX
from mesh.tls import TlsContexts, check_peer_name

DATAGRAM_BUFFER_BYTES = 1024 * 1024
"""Kernel buffer asked for: a node that was frozen for a second, or flooded, still finds the acks behind the noise."""
PORT_TRIES_MAX = 16
"""With port 0 the kernel chooses a TCP port; the same UDP port may be taken, then it chooses again."""
BACKLOG = 128
USER_TIMEOUT_MS = 10_000
"""What we sent is not acknowledged for so long: the kernel gives the stream up. Longer than a death takes to be known
(4 s), so that short cuts do not cost streams."""
ACCEPT_PAUSE_S = 0.1
"""Out of file descriptors: wait for some to be closed."""
_RESET = (errno.ECONNRESET, errno.EPIPE)
_UNREACHED = "192.0.2.1"
"""A documentation address (RFC 5737): no packet is sent there, the kernel only says which interface it would take."""


class ByteStream(Protocol):
    """One connection. One task may send while another receives."""

    local_address: Address
    peer_address: Address
    is_protected: bool
    """Encrypted and mutually authenticated below us."""

    async def start(self) -> None:
        """What must happen before bytes can flow, such as a TLS handshake. Raises WeatherError."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send; returns when the kernel has it. Raises WeatherError."""
        ...

    def send_nowait(self, data: bytes) -> int:
        """Send what can go at once, from no task in particular, while no `send_all` is under way; how many bytes went.
        0 also where it cannot be done or the connection is lost: who sends the rest will find out. Never raises."""
        ...

    async def receive_some(self, bytes_max: int) -> bytes:
        """Some bytes; empty when the peer's kernel closed or reset. Raises WeatherError when the network gave up."""
        ...

    async def aclose(self) -> None:
        """Close at once, without a word. Never raises."""
        ...


class Transport(Protocol):
    """A port on a network."""

    async def open(self) -> Address:
        """Take the port; the bound address. Raises SettingsError when it cannot be had."""
        ...

    def close(self) -> None:
        """Give the port back; idempotent."""
        ...

    def send(self, data: bytes, address: Address) -> bool:
        """Send a datagram; False if the kernel did not take it."""
        ...

    async def wait_datagrams(self) -> None:
        """Wait until `receive_nowait` may have something."""
        ...

    def receive_nowait(self, most: int) -> list[tuple[bytes, Address]]:
        """At most so many datagrams that have come."""
        ...

    async def dial(self, address: Address) -> ByteStream:
        """Open a stream. Raises DialError. Put a deadline around it."""
        ...

    async def accept(self) -> ByteStream:
        """The next stream that someone opened to us."""
        ...

    async def resolve(self, host: str, port: int) -> list[Address]:
        """Addresses of a name, at least one. Raises WeatherError. Put a deadline around it."""
        ...

    def source_towards(self, address: Address | None) -> str | None:
        """The local host address from which we would reach this one (None: anything far away), if any."""
        ...


class TcpStream:
    """A TCP connection, with TLS inside if the transport was given certificates."""

    def __init__(self, stream: trio.SocketStream, tls: TlsContexts | None, is_dialer: bool) -> None:
        self.local_address = _address(stream.socket.getsockname())
        self.peer_address = _address(stream.socket.getpeername())
        self.is_protected = tls is not None
        self._socket_stream = stream
        self._stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] = stream
        self._tls = tls
        _tune(stream.socket)
        if tls is not None:
            # Peers are known by the CA's word and the cluster's name, never by their changing IP addresses.
            self._stream = trio.SSLStream(
                stream,
                tls.client if is_dialer else tls.server,
                server_side=not is_dialer,
                https_compatible=True,
            )

    async def start(self) -> None:
        """See `ByteStream.start`."""
        stream = self._stream
        if isinstance(stream, trio.SSLStream) and self._tls is not None:
            try:
                await stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise WeatherError(f"TLS: {_reason(error)}") from error
            check_peer_name(stream.getpeercert(), self._tls.files.name)

    async def send_all(self, data: bytes) -> None:
        """See `ByteStream.send_all`."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise WeatherError(_reason(error)) from error

    def send_nowait(self, data: bytes) -> int:
        """See `ByteStream.send_nowait`. TLS has a state of its own that only `send_all` may touch."""
        if self._tls is not None:
            return 0
        try:
            # The descriptor is asked for each time: of a closed socket it is -1, and never another's.
            return os.write(self._socket_stream.socket.fileno(), data)
        except OSError:
            return 0

    async def receive_some(self, bytes_max: int) -> bytes:
        """See `ByteStream.receive_some`."""
        if self._tls is None:
            return await self._receive_plain(bytes_max)
        try:
            return bytes(await self._stream.receive_some(bytes_max))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            if getattr(error.__cause__, "errno", None) in _RESET:
                return b""
            raise WeatherError(_reason(error)) from error

    async def _receive_plain(self, bytes_max: int) -> bytes:
        """What trio's stream does, in two calls instead of twelve. It always waits first: after a read little is left to
        read, so that trying would mostly be in vain, and the other tasks get their turn."""
        connection = self._socket_stream.socket
        while True:
            if connection.fileno() < 0:
                raise WeatherError("closed")
            try:
                await trio.lowlevel.wait_readable(connection)
                return os.read(connection.fileno(), bytes_max)
            except BlockingIOError:
                continue
            except (trio.ClosedResourceError, OSError) as error:
                if getattr(error, "errno", None) in _RESET:
                    return b""
                raise WeatherError(_reason(error)) from error

    async def aclose(self) -> None:
        """See `ByteStream.aclose`."""
        await trio.aclose_forcefully(self._socket_stream)


class NetTransport:
    """The real network. `host` is what to bind: an address, `0.0.0.0`, or `::` for both families."""

    def __init__(self, host: str, port: int, tls: TlsContexts | None = None) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._family = socket.AF_INET
        self._datagrams: socket.socket | None = None
        self._listener: trio.socket.SocketType | None = None
        self.dropped = 0
        """Datagrams the kernel did not take."""

    async def open(self) -> Address:
        """See `Transport.open`."""
        try:
            found = await trio.socket.getaddrinfo(
                self._host or "0.0.0.0", self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise SettingsError(f"cannot listen on {self._host!r}: {error}") from error
        self._family = socket.AddressFamily(found[0][0])
        host = str(found[0][4][0])
        for tries_left in reversed(range(PORT_TRIES_MAX if self._port == 0 else 1)):
            try:
                return self._bind(host)
            except OSError as error:
                self.close()
                if not tries_left or error.errno != errno.EADDRINUSE:
                    raise SettingsError(f"cannot listen on {host}:{self._port}: {error.strerror}") from error
        raise AssertionError("unreachable")

    def _bind(self, host: str) -> Address:
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        self._listener = trio.socket.from_stdlib_socket(listener)
        listener.setblocking(False)
        # A restart takes the port although connections of the former life linger in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        datagrams = self._datagrams = socket.socket(self._family, socket.SOCK_DGRAM)
        datagrams.setblocking(False)
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DATAGRAM_BUFFER_BYTES)
        if self._family == socket.AF_INET6:
            for each in (listener, datagrams):
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, self._port))
        bound = _address(listener.getsockname())
        datagrams.bind((host, bound[1]))
        listener.listen(BACKLOG)
        return bound

    def close(self) -> None:
        """See `Transport.close`."""
        if self._listener is not None:
            self._listener.close()
        if self._datagrams is not None:
            trio.lowlevel.notify_closing(self._datagrams)
            self._datagrams.close()
        self._listener = self._datagrams = None

    # -- datagrams

    def send(self, data: bytes, address: Address) -> bool:
        """See `Transport.send`."""
        # A name in a peer's record must not make us wait for a resolver: only what is numeric is sent to.
        family = _family(address[0])
        if self._datagrams is None or family is None or len(data) > PACKET_BYTES_MAX:
            return False
        try:
            self._datagrams.sendto(data, self._sockaddr(address, family))
        except OSError:
            # Full buffer, no route, a firewall's EPERM, an address of the other family: all the same as lost.
            self.dropped += 1
            return False
        return True

    async def wait_datagrams(self) -> None:
        """See `Transport.wait_datagrams`."""
        assert self._datagrams is not None
        await trio.lowlevel.wait_readable(self._datagrams)

    def receive_nowait(self, most: int) -> list[tuple[bytes, Address]]:
        """See `Transport.receive_nowait`."""
        found: list[tuple[bytes, Address]] = []
        for _ in range(2 * most):
            if self._datagrams is None or len(found) >= most:
                break
            try:
                # One byte more than allowed, so that longer ones are seen to be too long.
                data, sockaddr = self._datagrams.recvfrom(PACKET_BYTES_MAX + 1)
            except BlockingIOError:
                break
            except OSError:
                continue  # an ICMP error of an earlier send; reading it clears it
            if len(data) <= PACKET_BYTES_MAX:
                found.append((data, _address(sockaddr)))
        return found

    def _sockaddr(self, address: Address, family: int) -> Address:
        if self._family == socket.AF_INET6 and family == socket.AF_INET:
            return (f"::ffff:{address[0]}", address[1])
        return address

    # -- streams

    async def dial(self, address: Address) -> ByteStream:
        """See `Transport.dial`."""
        family = _family(address[0])
        if family is None:
            raise DialError(f"{address[0]!r} is not an IP address")
        connection: trio.socket.SocketType | None = None
        stream: TcpStream | None = None
        try:
            connection = trio.socket.socket(family, socket.SOCK_STREAM)
            await connection.connect(address)
            stream = TcpStream(trio.SocketStream(connection), self._tls, is_dialer=True)
        except OSError as error:
            is_refused = error.errno == errno.ECONNREFUSED
            text = os.strerror(error.errno) if error.errno else str(error)
            raise DialError(text, is_refused) from error
        finally:
            if stream is None and connection is not None:
                connection.close()
        return stream

    async def accept(self) -> ByteStream:
        """See `Transport.accept`."""
        while True:
            assert self._listener is not None
            connection: trio.socket.SocketType | None = None
            try:
                connection, _ = await self._listener.accept()
                return TcpStream(trio.SocketStream(connection), self._tls, is_dialer=False)
            except OSError as error:
                if connection is not None:
                    connection.close()
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await trio.sleep(ACCEPT_PAUSE_S)
                elif error.errno == errno.EBADF:
                    raise
                # Else the peer was gone before we took it: the next one, please.

    async def resolve(self, host: str, port: int) -> list[Address]:
        """See `Transport.resolve`."""
        family = 0 if self._family == socket.AF_INET6 else self._family
        try:
            found = await trio.socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise WeatherError(f"{host}: {error}") from error
        return list(dict.fromkeys((str(each[4][0]), port) for each in found))

    def source_towards(self, address: Address | None) -> str | None:
        """See `Transport.source_towards`."""
        host, port = address if address is not None else (_UNREACHED, 9)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, port or 9))
            except OSError:
                return None
            return bare_host(str(probe.getsockname()[0]))


@lru_cache(maxsize=8192)
def _family(host: str) -> int | None:
    """AF_INET or AF_INET6; None for what is no IP address. Cached: two table's worth of hosts."""
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None


def _tune(connection: trio.socket.SocketType) -> None:
    # Frames are small and each is worth a packet of its own; and a peer that vanished must not hold us.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def _address(sockaddr: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return (bare_host(str(sockaddr[0])), int(sockaddr[1]))


def _reason(error: BaseException) -> str:
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"certificate refused: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return (cause.reason or "protocol error").lower().replace("_", " ")
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    return str(error) or "closed"
