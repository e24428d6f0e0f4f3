"""One simulated process: what an agent will be, without trio.

Owns a node's clock, its streams, and the draining of its machines after every call. Decides nothing about the cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from mesh import codec
from mesh.member import Address, Record, Status, first_incarnation
from mesh.messages import (
    DialSeed,
    Event,
    Left,
    MemberDown,
    MemberUp,
    NameConflict,
    SendByStream,
    TablePush,
)
from mesh.settings import PACKET_BODY_BYTES_MAX
from mesh.swim import Swim
from tests.sim.network import Endpoint

if TYPE_CHECKING:
    from tests.sim.world import World

EPOCH_S = 1_700_000_000.0
PORT = 7946
FULL_MESH_MAX = 32
NEIGHBOURS = 4
MAINTAIN_S = 1.0
IDLE_CLOSE_S = 10.0
FRESH_S = 2.0
"""Two streams of a pair opened within this time were dialled at once; a later one replaces a dead one."""
INBOX_MAX = 400
"""Datagrams a paused process's socket holds (about 212 KB of kernel memory)."""
MEMBERSHIP, STATE, KEEPALIVE = b"M", b"S", b"K"
KEEPALIVE_S = 5.0
"""A stream on which we said nothing for this long is told that we are there, which finds out that nobody is."""


class ReplicaHook(Protocol):
    """What the world needs of a replica: told of streams, lives and time; asked for frames (bytes)."""

    def peer_up(self, peer: str, record: Record, now: float) -> None: ...
    def peer_down(self, peer: str, now: float) -> None: ...
    def member_event(self, event: Event, now: float) -> None: ...
    def receive(self, peer: str, data: bytes, now: float) -> None: ...
    def tick(self, now: float) -> None: ...
    def deadline(self) -> float: ...
    def frames(self, now: float) -> list[tuple[str, bytes]]: ...


class Node:
    """One process: a life of a name on a host."""

    def __init__(self, world: World, name: str, host: int, clock_offset_s: float, drift: float) -> None:
        self.world = world
        self.name = name
        self.host = host
        self.rng = Random(world.rng.getrandbits(64))
        self.clock_offset_s = clock_offset_s
        self.drift = drift
        self.is_up = True
        self.is_paused = False
        self.conflict: NameConflict | None = None
        self.inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.streams: dict[str, Endpoint] = {}
        self.extra: list[Endpoint] = []
        self.dialling: dict[Address, list[bytes]] = {}
        self.tick_due_s = float("inf")
        self.answering: tuple[int, Address] | None = None
        now = self.clock()
        wall_s = EPOCH_S + now
        self.swim = Swim(
            world.settings,
            Record(
                name=name,
                boot=self.rng.randbytes(8),
                incarnation=first_incarnation(wall_s),
                status=Status.ALIVE,
                host=world.address(host)[0],
                port=PORT,
                born_s=int(wall_s),
                meta=world.meta,
            ),
            Random(self.rng.getrandbits(64)),
            now,
            wall_s,
        )
        self.replica = world.make_replica(self) if world.make_replica is not None else None
        world.loop.at(world.loop.now + MAINTAIN_S * self.rng.random(), self.maintain)

    # -- time

    def clock(self) -> float:
        """This node's steady clock; its wall clock is EPOCH_S later."""
        return self.world.loop.now * (1 + self.drift) + self.clock_offset_s

    def _world_time(self, clock_s: float) -> float:
        return (clock_s - self.clock_offset_s) / (1 + self.drift)

    def _schedule(self) -> None:
        due_s = self.swim.deadline()
        if self.replica is not None:
            due_s = min(due_s, self.replica.deadline())
        if due_s == float("inf"):
            return
        due_s = max(self.world.loop.now, self._world_time(due_s))
        if due_s < self.tick_due_s:
            self.tick_due_s = due_s
            self.world.loop.at(due_s, self._tick, due_s)

    def _tick(self, due_s: float) -> None:
        if due_s != self.tick_due_s or not self.is_up or self.is_paused:
            return
        self.tick_due_s = float("inf")
        now = self.clock() + 1e-9  # a deadline converted to world time and back must not fall short
        self.swim.tick(now)
        if self.replica is not None:
            self.replica.tick(now)
        self.drain()

    # -- the shell's work

    def drain(self) -> None:
        """After every call of a machine."""
        world, now = self.world, self.clock()
        events = False
        while (event := self.swim.next_event()) is not None:
            events = True
            self._on_event(event, now)
        for address, packet in self.swim.packets_to_send(now):
            data = codec.encode(packet)
            assert len(data) <= PACKET_BODY_BYTES_MAX, (len(data), packet)
            if self.answering is not None and self.answering == (data[2], address):
                world.complain(f"{self.name} answered kind {data[2]} by its own kind")
            target = world.hosts.get(address, -1)
            world.network.datagram(self.host, target, world.arrive, data, target, world.address(self.host))
        for effect in self.swim.effects():
            if isinstance(effect, SendByStream):
                self._send_by_stream(effect)
            else:
                self._dial_seed(effect)
        if self.replica is not None:
            for peer, frame in self.replica.frames(now):
                end = self.streams.get(peer)
                if end is not None:
                    world.network.send(end, STATE + frame, world.loop.now)
        if events:
            world.note_events(self)
        self._schedule()

    def _on_event(self, event: Event, now: float) -> None:
        self.world.log.append((self.world.loop.now, self, event))
        if self.replica is not None:
            self.replica.member_event(event, now)
        if isinstance(event, MemberUp):
            is_small = self.swim.live_count < FULL_MESH_MAX and self.world.keeps_streams
            self._rebind(event.record.name, event.record.boot)
            if is_small and self.name < event.record.name and event.record.name not in self.streams:
                self.dial(event.record.address, [])
        elif isinstance(event, MemberDown | Left):
            name = event.record.name
            life = (name, event.record.boot)
            if name in self.streams and self.streams[name].peer == life:
                self._stream_gone(self.streams[name], name)
                self.world.network.close(self.streams.pop(name), bye=True)
            for end in self.extra:
                if end.peer == life:
                    self.world.network.close(end, bye=True)
        elif isinstance(event, NameConflict):
            self.conflict = event
            self.world.loop.at(self.world.loop.now, self.world.exit, self)

    def _send_by_stream(self, effect: SendByStream) -> None:
        data = MEMBERSHIP + codec.encode(effect.message)
        kind = data[3]
        if self.answering is not None and self.answering == (kind, effect.address):
            self.world.complain(f"{self.name} answered stream kind {kind} by its own kind")
        end = self.streams.get(effect.peer) if effect.peer is not None else self._at(effect.address)
        if end is not None and end.is_open:
            end.used_s = self.world.loop.now
            self.world.network.send(end, data, self.world.loop.now)
        else:
            self.dial(effect.address, [data])

    def _at(self, address: Address) -> Endpoint | None:
        """An open stream to whoever advertises this address."""
        for end in [*self.streams.values(), *self.extra]:
            if end.is_open and end.peer is not None and self.world.address(end.other.host) == address:
                return end
        return None

    def _dial_seed(self, effect: DialSeed) -> None:
        addresses = self.world.resolve(effect.seed)
        left = [len(addresses)]
        if not addresses:
            self.swim.seed_failed(effect.seed, self.clock())
        for address in addresses:
            end = Endpoint(self.host, self, is_dialler=True)

            def done(is_ok: bool, is_refused: bool, end: Endpoint = end) -> None:
                if not self.is_up:
                    self.world.network.close(end)
                    return
                now = self.clock()
                left[0] -= 1
                if not is_ok:
                    if left[0] == 0:
                        self.swim.seed_failed(effect.seed, now)
                    return
                peer: Node = end.other.owner  # type: ignore[assignment]
                self.swim.seed_answered(effect.seed, peer.name, peer.swim.own.boot, now)
                if peer is self:
                    self.world.network.close(end)
                    return
                self.adopt(end)
                for table in self.swim.tables(now):
                    self.world.network.send(end, MEMBERSHIP + codec.encode(table), self.world.loop.now)

            self.world.dial(end, address, done)

    def dial(self, address: Address, frames: list[bytes]) -> None:
        """Open a stream to the address and send these frames; the frames join a dial already under way."""
        waiting = self.dialling.get(address)
        if waiting is not None:
            if len(waiting) < 64:
                waiting.extend(frames)
            return
        self.dialling[address] = frames
        end = Endpoint(self.host, self, is_dialler=True)

        def done(is_ok: bool, is_refused: bool) -> None:
            waiting = self.dialling.pop(address, [])
            if not self.is_up:
                self.world.network.close(end)
                return
            if not is_ok:
                self._run(self.swim.dial_failed, address, is_refused)
                return
            if end.other.owner is self:
                self.world.network.close(end)
                return
            self.adopt(end)
            end.used_s = self.world.loop.now
            for data in waiting:
                self.world.network.send(end, data, self.world.loop.now)

        self.world.dial(end, address, done)

    def adopt(self, end: Endpoint) -> None:
        """A stream is open (dialled or accepted), and the greeting told who is there."""
        peer: Node = end.other.owner  # type: ignore[assignment]
        end.peer = (peer.name, peer.swim.own.boot)
        end.opened_s = end.used_s = self.world.loop.now
        old = self.streams.get(peer.name)
        member = self.swim.member(peer.name)
        is_other_life = member is not None and member.is_live and member.record.boot != peer.swim.own.boot
        if is_other_life or peer.name == self.name:
            self.extra.append(end)  # not the life membership knows: it may carry membership only
        elif old is None or not old.is_open:
            self._bind(end)
        elif old.peer != end.peer:
            # the name is claimed twice; which claim holds, membership will say, and the other's stream must still be here
            self.extra.append(old)
            self._bind(end)
        elif end.opened_s - old.opened_s >= FRESH_S:
            self.world.network.close(old, bye=True)
            self._bind(end)
        elif (self.name < peer.name) == end.is_dialler:
            # two dialled at once: both sides keep the one that the smaller name dialled
            self.extra.append(old)
            self._bind(end)
        else:
            self.extra.append(end)

    def _bind(self, end: Endpoint) -> None:
        """State of the peer goes by this stream from now on."""
        peer: Node = end.other.owner  # type: ignore[assignment]
        old = self.streams.pop(peer.name, None)
        if old is not None:
            self._stream_gone(old, peer.name)
        self.streams[peer.name] = end
        if self.replica is not None:
            self._run(self.replica.peer_up, peer.name, peer.swim.own)

    def _rebind(self, name: str, boot: bytes) -> None:
        """Membership knows this life now, or its stream is gone: use the best stream of it that is open."""
        bound = self.streams.get(name)
        open_ends = [end for end in self.extra if end.is_open and end.peer == (name, boot)]
        if bound is not None and bound.is_open and bound.peer == (name, boot):
            open_ends.append(bound)
        if not open_ends:
            return
        best = max(open_ends, key=lambda end: ((self.name < name) == end.is_dialler, end.opened_s))
        if best is not bound:
            self.extra.remove(best)
            if bound is not None and bound.is_open:
                self.extra.append(bound)
            self._bind(best)

    def _stream_gone(self, end: Endpoint, name: str) -> None:
        if self.replica is not None:
            self._run(self.replica.peer_down, name)

    def maintain(self) -> None:
        """Keep streams as an agent does; a large cluster closes what it does not need."""
        if not self.is_up:
            return
        world = self.world
        world.loop.at(world.loop.now + MAINTAIN_S, self.maintain)
        if self.is_paused or not self.swim.is_running:
            return
        self.extra = [end for end in self.extra if end.is_open]
        for end in self.streams.values():
            if world.loop.now - end.told_s >= KEEPALIVE_S:
                world.network.send(end, KEEPALIVE, world.loop.now)
        if not world.keeps_streams:
            self._close_idle(0.5)
            return
        if self.swim.live_count < FULL_MESH_MAX:
            for member in self.swim.live():
                if self.name < member.name and member.name not in self.streams:
                    self.dial(member.address, [])
            return
        dialled = sum(1 for name in self.streams if self.name < name)
        if dialled < NEIGHBOURS and self.name != "":
            live = self.swim.live()
            member = live[int(self.rng.random() * len(live))]
            if self.name < member.name and member.name not in self.streams:
                self.dial(member.address, [])
        if len(self.streams) > 4 * NEIGHBOURS:
            self._close_idle(IDLE_CLOSE_S)

    def _close_idle(self, idle_s: float) -> None:
        world = self.world
        for name, end in list(self.streams.items()):
            if world.loop.now - end.used_s > idle_s:
                del self.streams[name]
                self._stream_gone(end, name)
                world.network.close(end, bye=True)

    # -- what arrives

    def _run(self, action: Callable[..., None], *args: Any) -> None:
        """Call a machine now, or when the process runs again."""
        if self.is_paused:
            self.inbox.append((action, args))
        elif self.is_up:
            action(*args, self.clock())
            self.drain()

    def datagram(self, data: bytes, address: Address) -> None:
        if self.is_paused:
            if len(self.inbox) < INBOX_MAX:
                self.inbox.append((self._datagram, (data, address)))
        else:
            self._datagram(data, address)

    def _datagram(self, data: bytes, address: Address, _now: float = 0.0) -> None:
        message = codec.decode(data)
        self.answering = (data[2], address)
        self.swim.receive(message, address, self.clock())
        self.drain()
        self.answering = None

    def stream_frame(self, end: Endpoint, data: bytes) -> None:
        if self.is_paused:
            self.inbox.append((self._stream_frame, (end, data)))
        elif self.is_up:
            self._stream_frame(end, data)

    def _stream_frame(self, end: Endpoint, data: bytes, _now: float = 0.0) -> None:
        if data == KEEPALIVE:
            return
        end.used_s = self.world.loop.now
        now = self.clock()
        if data[:1] == STATE:
            assert end.peer is not None
            # each side sends on the stream it opened or saw first: with two between a pair, they may differ
            kept = self.streams.get(end.peer[0])
            if self.replica is not None and kept is not None and kept.peer == end.peer:
                self.replica.receive(end.peer[0], data[1:], now)
                self.drain()
            return
        message = codec.decode(data[1:])
        peer: Node = end.other.owner  # type: ignore[assignment]
        address = self.world.address(peer.host)
        self.answering = (data[3], address)
        # a large table arrives in slices: only the last wants a reply
        if isinstance(message, TablePush):
            self.world.tables_pushed += 1
        self.swim.receive(message, address, now, by_stream=True)
        self.drain()
        self.answering = None

    def stream_eof(self, end: Endpoint) -> None:
        """The peer's kernel closed: its process ended."""
        self.stream_bye(end)
        if self.world.keeps_streams and end.peer is not None:
            self._run(self.swim.stream_closed, *end.peer)

    def stream_bye(self, end: Endpoint) -> None:
        """The peer closed a stream and said so."""
        end.is_open = False
        if end.peer is not None and self.streams.get(end.peer[0]) is end:
            del self.streams[end.peer[0]]
            self._stream_gone(end, end.peer[0])
            self._rebind(*end.peer)

    def stream_timed_out(self, end: Endpoint) -> None:
        """Our kernel gave the stream up."""
        self.stream_bye(end)

    def resume(self) -> None:
        """SIGCONT: what queued up is read; whether before or after the timers is chance."""
        self.is_paused = False
        if not self.is_up:
            return
        inbox, self.inbox = self.inbox, []
        if self.rng.random() < 0.5:
            self.tick_due_s = 0.0
            self._tick(0.0)
        for action, args in inbox:
            if self.is_up:
                action(*args, self.clock())
                self.drain()
        self.tick_due_s = float("inf")
        self._schedule()
