"""A seeded network: datagrams that are lost, late, doubled and reordered, and streams that behave as TCP does.

Owns the fate of every packet. Knows hosts (ids), never members. Streams are pairs of ordered byte-frame queues:
a dial takes a round trip and a half, is refused where the host is up and the port closed, is silent where the host is
lost or cut off; a frame lost on the way is sent again after .2 s, .4 s and so on, and everything behind it waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

SYN_RETRY_S = 1.0
DIAL_TIMEOUT_S = 2.0
RTO_MIN_S = 0.2
STREAM_TIMEOUT_S = 5.0
"""TCP_USER_TIMEOUT: a stream whose oldest frame is unacknowledged this long is given up by its sender."""
IP_UDP_BYTES = 28
SEAL_BYTES = 40
IP_TCP_BYTES = 52
FRAME_BYTES = 21
HELLO_BYTES = 300
"""Both greetings of a new stream, roughly."""


class Weather:
    """What the network does to everyone now. Mutable: the fault plan turns these knobs."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.delay_min_s = 0.0002
        self.delay_mean_s = 0.0005
        self.duplication = 0.0
        self.reorder = 0.0
        """Share of datagrams held back by up to reorder_s."""
        self.reorder_s = 0.05


class Cut:
    """Blocks everything (or only UDP) from hosts of one side to hosts of the other; both ways unless `is_one_way`."""

    def __init__(
        self, side: set[int], is_one_way: bool = False, is_udp_only: bool = False, inner: bool = False
    ):
        self.side = frozenset(side)
        self.is_one_way = is_one_way
        self.is_udp_only = is_udp_only
        self.inner = inner
        """Also between hosts of the side (UDP blocked altogether)."""

    def blocks(self, source: int, target: int, is_udp: bool) -> bool:
        if self.is_udp_only and not is_udp:
            return False
        leaves, enters = source in self.side, target in self.side
        if leaves and enters:
            return self.inner
        return leaves != enters and (leaves or not self.is_one_way)


class Loop:
    """A heap of events: the simulator's time."""

    __slots__ = ("_count", "_heap", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0

    def at(self, when_s: float, action: Callable[..., None], *args: object) -> None:
        self._count += 1
        heappush(self._heap, (when_s, self._count, action, args))

    def run_until(self, end_s: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end_s:
            when_s, _, action, args = heappop(heap)
            if when_s > self.now:
                self.now = when_s
            action(*args)
        self.now = end_s


class Endpoint:
    """One end of a stream as its host sees it."""

    __slots__ = (
        "frames",
        "host",
        "is_busy",
        "is_dialler",
        "is_open",
        "opened_s",
        "other",
        "owner",
        "peer",
        "told_s",
        "used_s",
        "waiting_since_s",
    )

    def __init__(self, host: int, owner: object, is_dialler: bool = False) -> None:
        self.is_dialler = is_dialler
        self.host = host
        self.owner = owner
        self.other: Endpoint = self
        self.is_open = True
        self.frames: deque[tuple[bytes, float]] = deque()
        self.is_busy = False
        self.waiting_since_s = 0.0
        self.used_s = self.opened_s = self.told_s = 0.0
        self.peer: tuple[str, bytes] | None = None


class Network:
    """Hosts, cuts and weather. `Host` callbacks are given by the world (see `world.Node`)."""

    def __init__(self, loop: Loop, rng: Random) -> None:
        self.loop = loop
        self.rng = rng
        self.weather = Weather()
        self.cuts: list[Cut] = []
        self.bytes_sent: dict[int, int] = {}
        self.packets_sent: dict[int, int] = {}
        self.lost_hosts: set[int] = set()

    # -- datagrams

    def datagram(self, source: int, target: int, deliver: Callable[..., None], *args: object) -> None:
        size = len(args[0]) if isinstance(args[0], bytes) else 100
        self.count(source, size + IP_UDP_BYTES + SEAL_BYTES)
        if not self.can_pass(source, target, is_udp=True):
            return
        weather, random = self.weather, self.rng.random
        if weather.loss and random() < weather.loss:
            return
        at = self.loop.at
        at(self.loop.now + self.delay_s(), deliver, *args)
        if weather.duplication and random() < weather.duplication:
            at(self.loop.now + self.delay_s() + random() * weather.reorder_s, deliver, *args)

    def delay_s(self) -> float:
        weather, random = self.weather, self.rng.random
        delay_s = weather.delay_min_s + random() * 2 * (weather.delay_mean_s - weather.delay_min_s)
        if weather.reorder and random() < weather.reorder:
            delay_s += random() * weather.reorder_s
        return delay_s

    def count(self, host: int, size: int) -> None:
        self.bytes_sent[host] = self.bytes_sent.get(host, 0) + size
        self.packets_sent[host] = self.packets_sent.get(host, 0) + 1

    def can_pass(self, source: int, target: int, is_udp: bool) -> bool:
        if self.lost_hosts and (source in self.lost_hosts or target in self.lost_hosts):
            return False
        return not any(cut.blocks(source, target, is_udp) for cut in self.cuts)

    # -- streams

    def dial(
        self,
        source: Endpoint,
        target_host: int | None,
        accept: Callable[[Endpoint], Endpoint | None],
        done: Callable[[bool, bool], None],
    ) -> None:
        """Open a stream. `accept` gives the other end, or None if the port is closed; `done(ok, is_refused)`."""
        self._syn(source, target_host, accept, done, self.loop.now, SYN_RETRY_S)

    def _syn(
        self,
        source: Endpoint,
        target_host: int | None,
        accept: Callable[[Endpoint], Endpoint | None],
        done: Callable[[bool, bool], None],
        started_s: float,
        retry_s: float,
    ) -> None:
        now = self.loop.now
        if now >= started_s + DIAL_TIMEOUT_S:
            done(False, False)
            return
        self.count(source.host, IP_TCP_BYTES)
        passes = target_host is not None and (
            self.can_pass(source.host, target_host, False) and self.can_pass(target_host, source.host, False)
        )
        loss = self.weather.loss
        if not passes or (loss and self.rng.random() < 1 - (1 - loss) ** 2):
            again_s = min(now + retry_s, started_s + DIAL_TIMEOUT_S)
            self.loop.at(again_s, self._syn, source, target_host, accept, done, started_s, 2 * retry_s)
            return
        self.loop.at(now + self.delay_s(), self._arrive, source, target_host, accept, done)

    def _arrive(
        self,
        source: Endpoint,
        target_host: int,
        accept: Callable[[Endpoint], Endpoint | None],
        done: Callable[[bool, bool], None],
    ) -> None:
        other = accept(source)
        self.count(target_host, IP_TCP_BYTES)
        if other is None:
            self.loop.at(self.loop.now + self.delay_s(), done, False, True)
            return
        source.other, other.other = other, source
        self.count(source.host, IP_TCP_BYTES + HELLO_BYTES // 2)
        self.count(target_host, HELLO_BYTES // 2)
        self.loop.at(self.loop.now + self.delay_s(), done, True, False)

    def send(self, end: Endpoint, data: bytes, now: float) -> None:
        """Queue one frame. Dropped silently when the end is closed, as writing to a dead socket is."""
        if not end.is_open:
            return
        end.told_s = now
        end.frames.append((data, now))
        if not end.is_busy:
            end.is_busy = True
            end.waiting_since_s = now
            self._attempt(end, RTO_MIN_S)

    def _attempt(self, end: Endpoint, rto_s: float) -> None:
        """Transmit the oldest frame."""
        now = self.loop.now
        if not end.is_open or not end.frames:
            end.is_busy = False
            return
        if now - end.waiting_since_s > STREAM_TIMEOUT_S:
            self.close(end, says_so=False)
            end.owner.stream_timed_out(end)  # type: ignore[attr-defined]
            return
        source, target = end.host, end.other.host
        size = len(end.frames[0][0]) + FRAME_BYTES
        self.count(source, size + IP_TCP_BYTES * (1 + size // 1400))
        passes = self.can_pass(source, target, False) and self.can_pass(target, source, False)
        if not passes or (self.weather.loss and self.rng.random() < self.weather.loss):
            self.loop.at(now + rto_s, self._attempt, end, 2 * rto_s)
            return
        data, _ = end.frames.popleft()
        self.count(target, IP_TCP_BYTES)
        self.loop.at(now + self.delay_s(), self._deliver, end, data)

    def _deliver(self, end: Endpoint, data: bytes) -> None:
        if end.other.is_open and end.other.peer is None:
            # the dialler's greeting is not through yet; a stream keeps its order
            self.loop.at(self.loop.now + 0.0005, self._deliver, end, data)
            return
        if end.other.is_open and end.other.host not in self.lost_hosts:
            end.other.owner.stream_frame(end.other, data)  # type: ignore[attr-defined]
        elif end.other.host not in self.lost_hosts and self.can_pass(end.other.host, end.host, False):
            # RST: nobody has that stream there any more
            self.loop.at(self.loop.now + self.delay_s(), self._eof, end, False)
        end.waiting_since_s = self.loop.now
        self._attempt(end, RTO_MIN_S)

    def close(self, end: Endpoint, says_so: bool = True, bye: bool = False) -> None:
        """Close an end. `says_so`: a FIN (or RST) travels to the other, if the way is open just now; with `bye`
        the process said before that it closes on purpose."""
        if not end.is_open:
            return
        end.is_open = False
        other = end.other
        if says_so and other is not end and self.can_pass(end.host, other.host, False):
            self.loop.at(self.loop.now + self.delay_s(), self._eof, other, bye)

    def _eof(self, end: Endpoint, bye: bool) -> None:
        if end.is_open and end.host not in self.lost_hosts:
            end.is_open = False
            owner: Any = end.owner
            (owner.stream_bye if bye else owner.stream_eof)(end)
