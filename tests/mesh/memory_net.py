"""A network in memory for whole agents in virtual time: datagrams and byte streams with delay, loss, cuts and crashes.

Owns the fate of every byte between agents of one trio run under a MockClock. Streams behave as TCP does: a dial is
refused where the host is up and nobody listens, silent where the host is cut off; bytes wait out a cut and are lost with
the stream when it lasts. It knows nothing of members or frames.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

import trio

from mesh.errors import DialError, SettingsError, WeatherError
from mesh.member import Address

DELAY_S = 0.0005
RETRY_S = 0.2
GIVE_UP_S = 10.0
WINDOW_BYTES = 256 * 1024
HEADERS_UDP, HEADERS_TCP, MSS = 28, 52, 1448


class MemoryNet:
    """All hosts. `run` must be running."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = Random(seed)
        self.loss = 0.0
        self.is_udp_blocked = False
        self.cuts: list[frozenset[str]] = []
        self.ports: dict[Address, MemoryTransport] = {}
        self.names: dict[str, list[str]] = {}
        self.sent_bytes: dict[str, int] = {}
        self.tap: Callable[[str, str, bytes], None] | None = None
        """Called with (from, to, datagram)."""
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._wake = trio.Event()

    async def run(self) -> None:
        while True:
            now = trio.current_time()
            while self._heap and self._heap[0][0] <= now:
                heappop(self._heap)[2]()
            self._wake = trio.Event()
            with trio.CancelScope(deadline=self._heap[0][0] if self._heap else math.inf):
                await self._wake.wait()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heappush(self._heap, (trio.current_time() + delay_s, self._count, action))
        self._wake.set()

    def is_cut(self, one: str, other: str) -> bool:
        return any((one in side) != (other in side) for side in self.cuts)

    def cut(self, *hosts: str) -> None:
        self.cuts.append(frozenset(hosts))

    def mend(self) -> None:
        self.cuts.clear()

    def count(self, host: str, payload: int, is_udp: bool) -> None:
        size = payload + HEADERS_UDP if is_udp else payload + HEADERS_TCP * max(1, math.ceil(payload / MSS))
        self.sent_bytes[host] = self.sent_bytes.get(host, 0) + size


class MemoryTransport:
    """One host's port; see `mesh.transport.Transport`."""

    def __init__(self, net: MemoryNet, host: str, port: int = 7946, is_protected: bool = False) -> None:
        self.net = net
        self.host = host
        self.address = (host, port)
        self.is_protected = is_protected
        self.inbox: deque[tuple[bytes, Address]] = deque()
        self.streams: set[MemoryStream] = set()
        self.backlog, self._accepts = trio.open_memory_channel[MemoryStream](128)
        self._ready = trio.Event()

    async def open(self) -> Address:
        await trio.lowlevel.checkpoint()
        if self.address in self.net.ports:
            raise SettingsError("address in use")
        self.net.ports[self.address] = self
        return self.address

    def close(self) -> None:
        if self.net.ports.get(self.address) is self:
            del self.net.ports[self.address]
        for stream in list(self.streams):
            stream.shut()

    def send(self, data: bytes, address: Address) -> bool:
        net = self.net
        net.count(self.host, len(data), True)
        if net.tap is not None:
            net.tap(self.host, address[0], data)
        if net.is_udp_blocked or net.rng.random() < net.loss or net.is_cut(self.host, address[0]):
            return True
        net.later(DELAY_S, lambda: self._arrive(data, address))
        return True

    def _arrive(self, data: bytes, address: Address) -> None:
        target = self.net.ports.get(address)
        if target is not None:
            target.inbox.append((data, self.address))
            target._ready.set()

    async def wait_datagrams(self) -> None:
        if not self.inbox:
            self._ready = trio.Event()
            await self._ready.wait()
        else:
            await trio.lowlevel.checkpoint()

    def receive_nowait(self, most: int) -> list[tuple[bytes, Address]]:
        return [self.inbox.popleft() for _ in range(min(most, len(self.inbox)))]

    async def dial(self, address: Address) -> MemoryStream:
        await trio.sleep(2 * DELAY_S)
        net = self.net
        if net.is_cut(self.host, address[0]):
            await trio.sleep_forever()
        target = net.ports.get(address)
        if target is None:
            raise DialError("Connection refused", is_refused=True)
        own_end = MemoryStream(self, (self.host, 40000 + net.rng.randrange(20000)), address)
        other_end = MemoryStream(target, address, own_end.local_address)
        own_end.other, other_end.other = other_end, own_end
        net.count(self.host, 0, False)
        target.backlog.send_nowait(other_end)
        return own_end

    async def accept(self) -> MemoryStream:
        return await self._accepts.receive()

    async def resolve(self, host: str, port: int) -> list[Address]:
        await trio.lowlevel.checkpoint()
        if host[0].isdigit():
            return [(host, port)]
        if host not in self.net.names:
            raise WeatherError(f"{host}: Name or service not known")
        return [(each, port) for each in self.net.names[host]]

    def source_towards(self, address: Address | None) -> str | None:
        return self.host


class MemoryStream:
    """One end of a connection; see `mesh.transport.ByteStream`."""

    def __init__(self, owner: MemoryTransport, local: Address, peer: Address) -> None:
        self.owner = owner
        self.local_address = local
        self.peer_address = peer
        self.is_protected = owner.is_protected
        self.other: MemoryStream
        self.inbox = bytearray()
        self.in_flight = 0
        self.is_stalled = False
        """The reader does not read: what a slow process looks like."""
        self.error = ""
        self._has_end = False
        self._is_closed = False
        self._waiting: deque[bytes | None] = deque()
        self._retry_since_s: float | None = None
        self._changed = trio.Event()
        owner.streams.add(self)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def start(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        while self.in_flight > WINDOW_BYTES and not self.error and not self._is_closed:
            await self._changed.wait()
        if self.error or self._is_closed:
            raise WeatherError(self.error or "closed")
        self.in_flight += len(data)
        self.owner.net.count(self.owner.host, len(data), False)
        self._waiting.append(bytes(data))
        self.owner.net.later(DELAY_S, self._flush)

    def send_nowait(self, data: bytes) -> int:
        taken = min(len(data), max(0, WINDOW_BYTES - self.in_flight))
        if self.error or self._is_closed or not taken:
            return 0
        self.in_flight += taken
        self.owner.net.count(self.owner.host, taken, False)
        self._waiting.append(bytes(data[:taken]))
        self.owner.net.later(DELAY_S, self._flush)
        return taken

    def _flush(self) -> None:
        """One piece arrives, or waits out a cut."""
        net = self.owner.net
        if not self._waiting:
            return
        if net.is_cut(self.owner.host, self.peer_address[0]):
            now = trio.current_time()
            if self._retry_since_s is None:
                self._retry_since_s = now
            if now - self._retry_since_s > GIVE_UP_S:
                self._waiting.clear()
                self.error = "Connection timed out"
                self._notify()
            else:
                net.later(RETRY_S, self._flush)
            return
        self._retry_since_s = None
        piece = self._waiting.popleft()
        if piece is None:
            self.other._has_end = True
        elif not self.other._is_closed:
            self.other.inbox += piece
            net.count(self.other.owner.host, 0, False)  # the bare acknowledgement
        self.other._notify()

    async def receive_some(self, bytes_max: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while self.is_stalled or not (self.inbox or self._has_end or self.error or self._is_closed):
            await self._changed.wait()
        if self.inbox:
            data = bytes(self.inbox[:bytes_max])
            del self.inbox[:bytes_max]
            self.other.in_flight -= len(data)
            self.other._notify()
            return data
        if self.error or self._is_closed:
            raise WeatherError(self.error or "closed")
        return b""

    def stall(self, is_stalled: bool) -> None:
        self.is_stalled = is_stalled
        self._notify()

    async def aclose(self) -> None:
        self.shut()

    def shut(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.owner.streams.discard(self)
            self._waiting.append(None)
            self.owner.net.later(DELAY_S, self._flush)
            self._notify()
