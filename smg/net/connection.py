"""A byte connection of the data path: a non-blocking socket and its readiness.

Owns reading, writing and closing of one socket, plain or TLS. `receive` waits first and reads once (a failed read
costs an exception, and after a request the answer is never there yet); `send` writes at once and waits only for
what the kernel did not take. Never parses, never decides how long to wait: deadlines are on the parking.
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import Protocol

import trio

from smg.net.readiness import Parking, Readiness, Slot

# Pieces up to this wait for the end of the turn; larger ones are worth their own send.
DEFERRED_BYTES_MAX = 64 << 10
RECEIVE_BYTES = 64 << 10  # one read; larger reads stop paying off on loopback and in memory per connection


class ConnectionLost(Exception):
    """The other side has reset or closed the connection, or the network failed."""


class DeadlinePassed(Exception):
    """The parking's deadline passed before the operation ended."""


class Connection(Protocol):
    """What server and client need of a connection; `PlainConnection` and `TlsConnection` are it."""

    slot: Slot

    @property
    def is_truncated(self) -> bool:
        """Whether the input ended without the other side's word that it does (TLS): what ends with it may not be whole."""
        ...

    async def receive(self, parking: Parking) -> bytes:
        """Waits for bytes; b"" at the end of input. Raises `ConnectionLost`, `DeadlinePassed`."""
        ...

    def receive_nowait(self) -> bytes | None:
        """Bytes that are there now, b"" at the end of input, None when there are none. Raises `ConnectionLost`."""
        ...

    def send_nowait(self, data: bytes) -> int:
        """Hands bytes to the kernel; how many of `data` it took. Raises `ConnectionLost`.

        Whoever goes on sending on this connection begins with the rest, by `send_nowait` or `send`.
        """
        ...

    async def drain(self, parking: Parking) -> None:
        """Waits until the kernel has all that `send_nowait` took. Raises `DeadlinePassed`."""
        ...

    async def send(self, parking: Parking, data: bytes | memoryview) -> None:
        """Sends all of `data`. Raises `ConnectionLost`, `DeadlinePassed`."""
        ...

    def send_gathered_nowait(self, head: bytes, body: bytes) -> int:
        """As `send_nowait` for two pieces in one call, without joining them."""
        ...

    def was_taken(self) -> bool:
        """After the other side has closed: whether its kernel had taken all that was sent."""
        ...

    def shutdown_send(self) -> None:
        """Tells the other side that nothing more comes; it may still be reading."""
        ...

    def close(self) -> None:
        """Closes at once; safe to call twice."""
        ...

    def abort(self) -> None:
        """Closes with a reset, so that the other side cannot take the end for a regular one (DN-5)."""
        ...


class PlainConnection:
    """A TCP connection without TLS."""

    __slots__ = ("_is_blocked", "_readiness", "_recv", "_send", "_sock", "_unsent", "slot")

    is_truncated = False  # plain TCP has no such word

    def __init__(self, sock: socket.socket, readiness: Readiness) -> None:
        self._sock = sock
        self._readiness = readiness
        self._recv = sock.recv
        self._send = sock.send
        self._unsent = b""  # taken by `send_nowait`, not yet with the kernel
        self._is_blocked = False  # the kernel has not taken all of it: more must wait its turn
        self.slot = readiness.register(sock)

    async def receive(self, parking: Parking) -> bytes:
        """See `Connection.receive`."""
        slot = self.slot
        while True:
            if not slot.is_readable and not await parking.wait_readable(slot):
                raise DeadlinePassed
            data = self.receive_nowait()
            if data is not None:
                if len(data) == RECEIVE_BYTES:
                    # More may wait: let others run, or one fast sender starves the loop.
                    await trio.lowlevel.checkpoint()
                return data

    def receive_nowait(self) -> bytes | None:
        """See `Connection.receive_nowait`."""
        slot = self.slot
        try:
            data = self._recv(RECEIVE_BYTES)
        except BlockingIOError:
            slot.is_readable = False
            return None
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        if len(data) < RECEIVE_BYTES and not slot.is_hung_up:
            # Drained. After a hang-up the flag stays: the end of input was already reported and is not again.
            slot.is_readable = False
        return data

    def send_nowait(self, data: bytes) -> int:
        """See `Connection.send_nowait`.

        Small pieces are kept until the end of the loop's turn and sent then, with those of all other connections
        (docs/decisions/0006-sends-at-the-end-of-the-turn.md): a send that wakes a sleeping process costs three times
        one to a process that is awake.
        """
        if self._is_blocked:
            return 0
        unsent = self._unsent
        if len(unsent) + len(data) <= DEFERRED_BYTES_MAX and self._readiness.defer(self):
            self._unsent = unsent + data if unsent else data
            return len(data)
        if unsent:
            self.flush()
            if self._unsent:
                return 0
        return self._sent(data)

    def flush(self) -> None:
        """Hands the kernel what `send_nowait` took; what it does not take goes when the socket is writable again."""
        data = self._unsent
        if not data:
            return
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            # The other side is gone. epoll reports that as an event of its own, which tells whoever has to know; marking
            # the slot here would make that event look like old news.
            self._unsent = b""
            return
        if sent == len(data):
            self._unsent = b""
            return
        self._unsent = data[sent:]
        self._is_blocked = True
        self.slot.is_writable = False
        self.slot.on_writable = self._unblocked

    def _unblocked(self) -> None:
        self._is_blocked = False
        self.slot.on_writable = None
        self.flush()

    def _sent(self, data: bytes | memoryview) -> int:
        try:
            return self._send(data)
        except BlockingIOError:
            self.slot.is_writable = False
            return 0
        except OSError as error:
            raise ConnectionLost(str(error)) from None

    async def send(self, parking: Parking, data: bytes | memoryview) -> None:
        """See `Connection.send`."""
        slot = self.slot
        await self.drain(parking)
        view = memoryview(data)
        while view:
            sent = self._sent(view)
            if sent == len(view):
                return
            view = view[sent:]
            slot.is_writable = False
            if not await parking.wait_writable(slot):
                raise DeadlinePassed

    async def drain(self, parking: Parking) -> None:
        """See `Connection.drain`."""
        self.flush()
        while self._unsent:
            if not await parking.wait_writable(self.slot):
                raise DeadlinePassed

    def send_gathered_nowait(self, head: bytes, body: bytes) -> int:
        """Hands two pieces to the kernel in one call, without joining them; how many bytes it took."""
        self.flush()
        if self._unsent:
            return 0
        try:
            return self._sock.sendmsg((head, body))
        except BlockingIOError:
            self.slot.is_writable = False
            return 0
        except OSError as error:
            raise ConnectionLost(str(error)) from None

    def was_taken(self) -> bool:
        """See `Connection.was_taken`.

        What a process reads before it closes is acknowledged with its end at the latest. What comes after a close is
        answered by a reset, or is not answered yet.
        """
        self.flush()
        state, unacknowledged = _TCP_INFO.unpack(
            self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        )
        return state != _TCP_CLOSE and not unacknowledged

    def shutdown_send(self) -> None:
        """Tells the other side that nothing more comes; it may still be reading (HTTP-8)."""
        self.flush()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # already closed by the other side: the same end

    def close(self) -> None:
        """See `Connection.close`."""
        self.flush()
        self._unsent = b""
        self._readiness.forget(self.slot)
        self._sock.close()

    def abort(self) -> None:
        """See `Connection.abort`."""
        self.flush()
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        except OSError:
            pass  # already closed: there is nothing left to reset
        self.close()


_TCP_INFO = struct.Struct("=B23xI")  # struct tcp_info: tcpi_state, tcpi_unacked
_TCP_CLOSE = 7  # after a reset (include/net/tcp_states.h)
_LINGER_ZERO = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # struct linger {on=1, seconds=0}: close sends RST


class TlsConnection:
    """TLS over a `PlainConnection`, through memory buffers.

    Handshake first: `await handshake(parking)`. A read may leave bytes that the kernel does not report again, so the
    slot's flag is set while any are here. A send that the kernel did not take whole has encrypted what it was given:
    it says that it took nothing, and whoever sends the same bytes again goes on where it stopped.
    """

    __slots__ = (
        "_incoming",
        "_is_ended",
        "_is_established",
        "_outgoing",
        "_owed",
        "_plain",
        "_tls",
        "_unsent",
        "is_truncated",
        "slot",
    )

    def __init__(
        self,
        plain: PlainConnection,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_name: str | None = None,
    ) -> None:
        self._plain = plain
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        self._unsent = b""  # ciphertext that the kernel has not taken; goes before all that comes
        self._owed = 0  # bytes of the caller's next send that are in `_unsent` already
        self._is_established = False
        self._is_ended = False  # close_notify is out: OpenSSL neither writes nor reads after it
        self.is_truncated = False
        self.slot = plain.slot

    async def handshake(self, parking: Parking) -> None:
        """Runs the handshake. Raises `ConnectionLost` (also for a failed verification), `DeadlinePassed`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush(parking)
                data = await self._plain.receive(parking)
                if not data:
                    raise ConnectionLost("closed during the TLS handshake") from None
                self._incoming.write(data)
                continue
            except ssl.SSLError as error:
                self._drop_outgoing()
                raise ConnectionLost(f"TLS handshake failed: {error.reason or error}") from None
            await self._flush(parking)
            self._is_established = True
            self._note_left()  # the first request may have come with the end of the handshake
            return

    async def receive(self, parking: Parking) -> bytes:
        """See `Connection.receive`. After `shutdown_send` what comes is not decrypted any more: it can only be dropped."""
        if self._is_ended:
            return await self._plain.receive(parking)
        while (data := self._read()) is None:
            if not self._take_in(await self._plain.receive(parking)):
                return b""
        return data

    def receive_nowait(self) -> bytes | None:
        """See `Connection.receive_nowait`, and `receive`."""
        if self._is_ended:
            return self._plain.receive_nowait()
        data = self._read()
        if data is not None:
            return data
        more = self._plain.receive_nowait()
        if more is None:
            return None
        return self._read() if self._take_in(more) else b""

    def send_nowait(self, data: bytes) -> int:
        """See `Connection.send_nowait`. After 0 the next send must begin with the same bytes."""
        owed = self._owed
        if owed:
            if not self._push():
                return 0
            self._owed = 0
            return owed
        if self._unsent and not self._push():
            return 0
        view = memoryview(data)[:RECEIVE_BYTES]
        taken = self._encrypt(view)
        while taken < len(view):
            taken += self._encrypt(view[taken:])
        if self._push():
            return taken
        self._owed = taken
        return 0

    async def send(self, parking: Parking, data: bytes | memoryview) -> None:
        """See `Connection.send`."""
        view = memoryview(data)[self._owed :]
        self._owed = 0
        await self._flush(parking)
        while view:
            view = view[self._encrypt(view[:RECEIVE_BYTES]) :]
            await self._flush(parking)

    async def drain(self, parking: Parking) -> None:
        """See `Connection.drain`."""
        await self._flush(parking)
        await self._plain.drain(parking)

    def send_gathered_nowait(self, head: bytes, body: bytes) -> int:
        """As `send_nowait`, of the head alone: records are copies anyway, so the body comes with the rest."""
        return self.send_nowait(head)

    def was_taken(self) -> bool:
        """See `Connection.was_taken`."""
        return not self._unsent and self._plain.was_taken()

    def shutdown_send(self) -> None:
        """Sends close_notify as far as the kernel takes it, then shuts down the sending half."""
        self._say_goodbye()
        self._plain.shutdown_send()

    def close(self) -> None:
        """See `Connection.close`. Says close_notify, so that a body that ends with the connection is seen to be whole."""
        self._say_goodbye()
        self._plain.close()

    def abort(self) -> None:
        """See `Connection.abort`."""
        self._is_established = False
        self._plain.abort()

    def _read(self) -> bytes | None:
        """Decrypted bytes, b"" after the other side's close_notify, None when more has to come in first."""
        try:
            data = self._tls.read(RECEIVE_BYTES)
        except ssl.SSLWantReadError:
            data = None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as error:
            self._drop_outgoing()
            raise ConnectionLost(f"TLS: {error.reason or error}") from None
        if self._outgoing.pending:
            self._push()  # the other side asked for something, such as a change of keys
        if data:
            self._note_left()
        return data

    def _take_in(self, data: bytes) -> bool:
        """Adds what was received; False at the end of input, which came without a close_notify then."""
        if not data:
            self.is_truncated = True
            return False
        self._incoming.write(data)
        return True

    def _note_left(self) -> None:
        if self._incoming.pending or self._tls.pending():
            self.slot.is_readable = True

    def _encrypt(self, view: memoryview) -> int:
        try:
            return self._tls.write(view) if view else 0
        except ssl.SSLError as error:
            raise ConnectionLost(f"TLS: {error.reason or error}") from None

    def _push(self) -> bool:
        """Hands ciphertext to the kernel; whether it took all of it."""
        if self._outgoing.pending:
            self._unsent += self._outgoing.read()
        unsent = self._unsent
        if unsent:
            self._unsent = unsent = unsent[self._plain.send_nowait(unsent) :]
            if unsent:
                self.slot.is_writable = False
        return not unsent

    async def _flush(self, parking: Parking) -> None:
        if self._unsent or self._outgoing.pending:
            unsent = self._unsent + self._outgoing.read()
            self._unsent = b""
            await self._plain.send(parking, unsent)

    def _say_goodbye(self) -> None:
        if not self._is_established:
            return
        self._is_established = False
        self._is_ended = True
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError):
            pass  # it always wants the other side's close_notify; ours is in the buffer now
        self._drop_outgoing()

    def _drop_outgoing(self) -> None:
        """Offers the last records (an alert, close_notify) to the kernel and forgets what it does not take."""
        try:
            self._push()
        except ConnectionLost:
            pass  # the other side is gone, and so is the need to tell it
        self._unsent = b""
