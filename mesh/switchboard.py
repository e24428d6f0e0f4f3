"""Between the two machines and the network: what comes goes to the right machine, what they say is done.

Owns the order of what follows from every call (one `turn`): events to users and to the state, changes to users, packets,
effects, writers. Everything here is a plain call between two awaits; it must never wait, and never decide what a
machine should decide. `agent` has the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import trio

from mesh import codec
from mesh.advertise import Advertised
from mesh.bell import Bell
from mesh.errors import DecodeError, SealError
from mesh.frames import STATE_TYPES, Frame, FrameType
from mesh.greeting import Hello, Keepalive, decode_keepalive, decode_refused, encode
from mesh.hooks import Hooks
from mesh.member import PROTOCOL_MAX, PROTOCOL_MIN, Address, Member
from mesh.messages import (
    Ack,
    ClockAhead,
    DialSeed,
    Effect,
    Event,
    Forgotten,
    LeaveDone,
    Left,
    MemberChanged,
    MemberDown,
    MemberUp,
    Message,
    NameConflict,
    OwnOutranked,
    Packet,
    Ping,
    TablePull,
    TablePush,
)
from mesh.namespace import Change, Lost
from mesh.partition import PartitionWatch
from mesh.pipe import Pipe
from mesh.questions import Questions
from mesh.replica import Replica, life_above, life_number
from mesh.seal import Sealer
from mesh.settings import AgentSettings
from mesh.streams import Streams
from mesh.swim import Swim
from mesh.transport import Transport

CHANGES_PER_TURN = 1000
"""Changes told before others get their turn."""
EARLY_FRAMES_MAX = 64
EARLY_BYTES_MAX = 16 * 1024
"""State frames kept for a stream that is not bound yet: a vector for each of some dozens of namespaces. Without them the
peer would ask again only after a second or two."""
CLOCK_INTERVAL_S = 60.0
"""The machines are told the wall clock again this often."""
LARGE_MARGIN = 2
"""A mesh is small again only this much below the limit, so that one member coming and going moves no streams."""

_KINDS = {kind.value: kind.name.lower() for kind in FrameType}
_MEMBERSHIP = frozenset(
    {
        FrameType.MEMBERS,
        FrameType.MEMBERS_REPLY,
        FrameType.PING,
        FrameType.ACK,
        FrameType.NEWS,
        FrameType.DATAGRAM,
    }
)


class Switchboard:
    """See the module. `swim` is set once the advertised address is known, before anything comes."""

    def __init__(
        self,
        settings: AgentSettings,
        replica: Replica,
        sealer: Sealer,
        transport: Transport,
        hooks: Hooks,
        bell: Bell,
        *,
        wall: Callable[[], float],
        rng: Random,
        entropy: Callable[[int], bytes],
    ) -> None:
        self.settings = settings
        self.replica = replica
        self.sealer = sealer
        self.hooks = hooks
        self.machine: Swim | None = None
        self.is_by_stream = False
        """Datagrams could not be protected: what would be one travels on a stream."""
        self.state = "alive"
        """alive, leaving, left or conflict."""
        self.conflict: NameConflict | None = None
        self.advertised = Advertised(settings, transport)
        self.streams = Streams(settings, transport, sealer, self, rng, entropy)
        self.questions = Questions(settings.questions_max)
        self.watch = PartitionWatch()
        self.member_callbacks: list[Callable[[Event], None]] = []
        self.change_callbacks: dict[str, list[Callable[[Change], None]]] = {}
        self.counts: dict[str, int] = {}
        self._transport = transport
        self._bell = bell
        self._wall = wall
        self._holders: set[Address] = set()
        self._udp_blocked: set[str] = set()
        self._unread_keys: set[int] = set()
        self._is_large = False
        self._is_turning = False
        self._has_news = False
        """Something came for one of the machines since the last batch."""
        now = trio.current_time()
        self._maintain_due_s = now + settings.maintain_interval_s
        self._clock_due_s = now + CLOCK_INTERVAL_S
        self._settled_digest = b""

    @property
    def swim(self) -> Swim:
        """The membership machine."""
        assert self.machine is not None, "the agent has not started"
        return self.machine

    # -- time

    def due_s(self) -> float:
        """When the next turn is due."""
        return min(self.swim.deadline(), self.replica.deadline(), self._maintain_due_s)

    def note_lag(self, lag_s: float, now: float) -> None:
        """The loop woke this late: the machine must know, since it may be our fault that others seem silent."""
        self.hooks.lag(lag_s)
        if self.swim.is_running:
            self.swim.loop_lag(lag_s, now)

    def keys_changed(self, *, is_by_stream: bool) -> None:
        """The keyring is another: tell the members, so that a rotation can wait for all."""
        self.is_by_stream = is_by_stream
        self._unread_keys.clear()
        if self.machine is not None:
            keyring = self.sealer.keyring
            self.machine.update_own(trio.current_time(), key_ids=keyring.ids)
            first = keyring.first
            holders = [m for m in self.machine.live() if first is not None and first.id in m.record.key_ids]
            self._holders = {member.address for member in holders}

    def turn(self) -> None:
        """Let the machines do what is due, and do what they say."""
        if self._is_turning:
            self._bell.ring()  # a callback called us back: the loop turns again at once
            return
        self._is_turning = True
        swim, replica, now = self.swim, self.replica, trio.current_time()
        try:
            if now >= self._maintain_due_s:
                self._maintain(now)
            if now >= swim.deadline():
                swim.tick(now)
            self._tell_events(now)
            if now >= replica.deadline():
                replica.tick(now)
            self._tell_changes()
            for address, packet in swim.packets_to_send(now):
                self._send_packet(address, packet)
            for effect in swim.effects():
                self._perform(effect)
            for peer in replica.peers_to_send():
                pipe = self.streams.of(peer)
                if pipe is not None:
                    pipe.wake()
        finally:
            self._is_turning = False
        self._bell.sooner(self.due_s() if swim.is_running else now)

    def _maintain(self, now: float) -> None:
        self._maintain_due_s = now + self.settings.maintain_interval_s
        if now >= self._clock_due_s:
            self._clock_due_s = now + CLOCK_INTERVAL_S
            self.swim.clock(self._wall(), now)
            self.replica.set_wall_offset(self._wall() - now)
        live = self.swim.live()
        self.streams.maintain(live, now)
        self._note_blocked(live)
        for key_id in self.sealer.unknown_key_ids.keys() - self._unread_keys:
            self._unread_keys.add(key_id)
            self.log("unknown_key", key_id=f"{key_id:08x}")
        digest, fingerprint = self.digest(), self.swim.fingerprint
        is_settled = digest == self._settled_digest
        self._settled_digest = digest
        for pipe in self.streams.bound():
            if pipe.peer_digest == digest:
                pipe.equal_s = now
            is_due = now - pipe.sent_s >= self.settings.keepalive_s
            if is_due or (is_settled and digest != pipe.told_digest):
                pipe.told_digest = digest
                pipe.send(Frame(FrameType.KEEPALIVE, encode(Keepalive(digest, fingerprint))))

    def _note_blocked(self, live: list[Member]) -> None:
        blocked = {member.name for member in live if member.stream_only} if not self.is_by_stream else set()
        for name in blocked - self._udp_blocked:
            self.log("udp_blocked", peer=name, text=f"UDP to or from {name} is blocked, using TCP")
        for name in self._udp_blocked - blocked:
            self.log("udp_open", peer=name)
        self._udp_blocked = blocked

    def digest(self) -> bytes:
        """Over the replicated state."""
        return self.replica.digest().to_bytes(8, "big")

    # -- what the machines say

    def _tell_events(self, now: float) -> None:
        while (event := self.swim.next_event()) is not None:
            self.watch.note(event, now)
            self._on_event(event, now)
            for callback in self.member_callbacks:
                callback(event)
        size = self.swim.live_count + 1
        limit = self.settings.full_mesh_max
        is_large = size > (limit - LARGE_MARGIN if self._is_large else limit)
        if is_large != self._is_large:
            self._is_large = is_large
            self.replica.set_relay(is_large)
            self.streams.set_large(is_large)

    def _on_event(self, event: Event, now: float) -> None:
        """What a change of membership means for the state and the streams."""
        if isinstance(event, NameConflict):
            self.conflict = event
            self.state = "conflict"
        elif isinstance(event, LeaveDone):
            self.state = "left"
            self.log("left", told=event.told, acked=event.acked)
        elif isinstance(event, ClockAhead):
            self.log("clock_ahead", peer=event.name, their_s=event.their_s, our_s=int(event.our_s))
        elif isinstance(event, OwnOutranked):
            self.replica.own_outranked(life_above(event.incarnation), now)
            self.log("outranked", incarnation=event.incarnation)
        elif isinstance(event, MemberUp | MemberChanged | MemberDown | Left | Forgotten):
            record = event.record
            life = life_number(record.born_s, record.boot)
            first = self.sealer.keyring.first
            self._holders.discard(record.address)
            if (
                isinstance(event, MemberUp | MemberChanged)
                and first is not None
                and first.id in record.key_ids
            ):
                self._holders.add(record.address)
            if isinstance(event, MemberUp):
                self.replica.owner_restarted(record.name, life, now)
                self.streams.rebind(record.name)
                self.streams.welcome_member(record.name, record.address)
            elif isinstance(event, MemberDown):
                self.replica.owner_died(record.name, life, now)
                self.streams.drop(record.name)
            elif isinstance(event, Left):
                self.replica.owner_left(record.name, life, now)
                self.streams.drop(record.name)
            elif isinstance(event, Forgotten):
                self.replica.owner_forgotten(record.name, now)
                self.sealer.forget(record.boot)

    def _tell_changes(self) -> None:
        for _ in range(CHANGES_PER_TURN):
            change = self.replica.next_change()
            if change is None:
                return
            for callback in self.change_callbacks.get(change.namespace, ()):
                callback(change)
            if isinstance(change, Lost):
                self._count("changes_lost")
        self._bell.ring()

    def _send_packet(self, address: Address, packet: Packet) -> None:
        body = codec.encode(packet)
        if self.is_by_stream:
            self.streams.deliver(None, address, Frame(FrameType.DATAGRAM, body))
            return
        data = self.sealer.seal(body, peer_holds_key=address in self._holders)
        if self._transport.send(data, address):
            self.hooks.message("datagram", "out", len(data))
        else:
            self._count("datagrams_unsent")

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, DialSeed):
            self.streams.dial_seed(effect.seed)
        else:
            self.streams.deliver(effect.peer, effect.address, _frame(effect.message))

    # -- what comes

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """A datagram came; whatever it is, nothing is raised."""
        if self.is_by_stream:
            self._count("datagrams_refused")
            return
        try:
            opened = self.sealer.open(data, now)
            message = codec.decode(opened.body)
        except SealError:
            return  # counted by the sealer
        except DecodeError:
            self._count("datagrams_garbage")
            return
        if message.source.boot != opened.boot or not isinstance(message, Packet):
            self._count("datagrams_garbage")
            return
        self.hooks.message("datagram", "in", len(data))
        self.swim.receive(message, address, now)

    def on_frame(self, pipe: Pipe, frame: Frame) -> None:
        """See `pipe.Ears`."""
        peer, kind = pipe.peer, frame.type
        assert peer is not None
        if kind in STATE_TYPES:
            self._has_news = True
            if self.streams.is_bound(pipe):
                self.replica.receive(peer.name, frame, trio.current_time())
            elif len(pipe.early_state) < EARLY_FRAMES_MAX and len(frame.body) <= EARLY_BYTES_MAX:
                # A restarted peer speaks as soon as its stream is open; we bind it when membership has told its new life.
                pipe.early_state.append(frame)
        elif kind in _MEMBERSHIP:
            self._has_news = True
            message = codec.decode(frame.body)
            if message.source.boot != peer.boot or message.source.name != peer.name:
                raise DecodeError("a message in another's name")
            is_datagram = kind == FrameType.DATAGRAM
            self.swim.receive(message, peer.address, trio.current_time(), by_stream=not is_datagram)
        elif kind == FrameType.ASK:
            pipe.send_now(self.questions.on_ask(peer.name, frame.body))
        elif kind == FrameType.ANSWER:
            self.questions.on_answer(peer.name, frame.body)
        elif kind == FrameType.KEEPALIVE:
            keepalive = decode_keepalive(frame.body)
            pipe.peer_digest, pipe.peer_fingerprint = keepalive.digest[:8], keepalive.fingerprint
            if pipe.peer_digest == self.digest():
                pipe.equal_s = trio.current_time()
        elif kind == FrameType.NOTICE:
            told = decode_refused(frame.body)
            self.log("notice", peer=peer.name, code=told.code, text=told.text)
        else:
            self._count("frames_unknown")

    def on_batch(self, pipe: Pipe) -> None:
        """See `pipe.Ears`. Questions and answers are no news to the machines: who waits for them waits for no turn."""
        if self._has_news:
            self._has_news = False
            self.turn()

    def state_for(self, pipe: Pipe, bytes_max: int) -> list[Frame]:
        """See `pipe.Ears`."""
        if pipe.peer is None or not self.streams.is_bound(pipe):
            return []
        return self.replica.frames_to_send(pipe.peer.name, trio.current_time(), bytes_max)

    def note(self, kind: int, direction: str, size_bytes: int) -> None:
        """See `pipe.Ears`."""
        self.hooks.message(_KINDS.get(kind, "unknown"), direction, size_bytes)

    # -- what the streams need

    def hello(self, flags: int) -> Hello:
        """See `streams.Owner`."""
        own = self.swim.own
        return Hello(
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            name=own.name,
            boot=own.boot,
            born_s=own.born_s,
            host=own.host,
            port=own.port,
            label=self.settings.label,
            features=own.features,
            flags=flags,
        )

    def holds_our_key(self, address: Address) -> bool:
        """See `streams.Owner`."""
        return address in self._holders

    def life_of(self, name: str) -> bytes | None:
        """See `streams.Owner`."""
        member = self.swim.member(name)
        return None if member is None else member.record.boot

    def on_bound(self, pipe: Pipe) -> None:
        """See `streams.Owner`."""
        assert pipe.peer is not None
        life = life_number(pipe.peer.born_s, pipe.peer.boot)
        self.replica.peer_up(pipe.peer.name, life, trio.current_time())
        early, pipe.early_state = pipe.early_state, []
        for frame in early:
            try:
                self.replica.receive(pipe.peer.name, frame, trio.current_time())
            except DecodeError:
                self._count("frames_garbage")
        self._bell.ring()

    def on_unbound(self, name: str) -> None:
        """See `streams.Owner`."""
        self.replica.peer_down(name, trio.current_time())
        self.questions.peer_gone(name)

    def on_closed(self, name: str, boot: bytes) -> None:
        """See `streams.Owner`."""
        self.swim.stream_closed(name, boot, trio.current_time())
        self.turn()

    def on_dial_failed(self, address: Address, is_refused: bool) -> None:
        """See `streams.Owner`."""
        self.swim.dial_failed(address, is_refused, trio.current_time())
        self.turn()

    def on_seed(self, seed: str, name: str | None, boot: bytes, pipe: Pipe | None) -> None:
        """See `streams.Owner`."""
        now = trio.current_time()
        if name is None:
            self.swim.seed_failed(seed, now)
        else:
            self.swim.seed_answered(seed, name, boot, now)
            better = self.advertised.improve(
                self.swim.own.address, pipe.local_host if pipe is not None else None
            )
            if better is not None:
                self.swim.update_own(now, address=better)
            if pipe is not None:
                for table in self.swim.tables(now):
                    pipe.send(_frame(table))
        self.turn()

    def log(self, event: str, **fields: object) -> None:
        """See `streams.Owner`."""
        self.hooks.log(event, fields)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def _frame(message: Message) -> Frame:
    """The frame of a membership message."""
    if isinstance(message, TablePush):
        kind = FrameType.MEMBERS
    elif isinstance(message, TablePull):
        kind = FrameType.MEMBERS_REPLY
    elif isinstance(message.body, Ping):
        kind = FrameType.PING
    elif isinstance(message.body, Ack):
        kind = FrameType.ACK
    else:
        kind = FrameType.NEWS
    return Frame(kind, codec.encode(message))
