"""The membership machine: who is in the cluster and who is alive. SWIM with Lifeguard, as a pure datagram machine.

Owns the wiring of its rooms (judge, detector, contests, exchange, seeds, farewell) and the rounds of gossip. Takes
messages, evidence and `now` (any steady clock, seconds) and gives back packets, effects and events; must never await,
read a clock, touch a socket or log.

The shell's loop, whole:

    wait until swim.deadline() or until something arrives
    swim.receive(message, address, now) / swim.stream_closed(...) / swim.dial_failed(...) / swim.tick(now)
    for address, packet in swim.packets_to_send(now): datagram out (codec.encode, seal)
    for effect in swim.effects(): perform it (messages.Effect)
    while event := swim.next_event(): tell the subscribers
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from mesh.awareness import Awareness
from mesh.codec import news_bytes
from mesh.contest import Contests
from mesh.exchange import Exchange
from mesh.farewell import Farewell
from mesh.joining import Seeds
from mesh.judge import Judge, Outcome
from mesh.member import Accusation, Address, Member, News, Record, Status
from mesh.messages import (
    Ack,
    Conflict,
    Effect,
    Event,
    Gossip,
    Message,
    Nack,
    Packet,
    Ping,
    PingReq,
    Source,
    TablePull,
    TablePush,
)
from mesh.outbox import Outbox
from mesh.own import Own
from mesh.probe import Detector
from mesh.roster import Roster
from mesh.rumors import Rumors
from mesh.settings import SwimSettings
from mesh.timers import Timers

DOUBTS_PER_ROUND = 64
"""After a merge so many members are probed out of turn per gossip interval: 500 in under a second, 10 KB each."""
STRANGERS_MAX = 256
"""Unknown senders we remember having asked for their record, so as to ask each at most once a second."""


class Swim:
    """One node's membership. Five verbs of a datagram machine, and what the shell must tell it besides.

    `own` is this node's record (name, boot, address, ...); build its incarnation with `first_incarnation(wall_s)`.
    `wall_s` is the wall clock at `now`; it is used only to refuse lives from the future. Raises SettingsError.
    """

    __slots__ = (
        "_awareness",
        "_contests",
        "_detector",
        "_doubts",
        "_exchange",
        "_farewell",
        "_gossip_armed",
        "_gossiped_s",
        "_is_running",
        "_judge",
        "_outbox",
        "_own",
        "_rng",
        "_roster",
        "_rumors",
        "_seeds",
        "_settings",
        "_strangers",
        "_timers",
    )

    def __init__(self, settings: SwimSettings, own: Record, rng: Random, now: float, wall_s: float) -> None:
        self._settings = settings.checked()
        self._is_running = True
        self._rng = rng
        self._own = Own(own)
        self._timers = Timers()
        self._awareness = Awareness(settings)
        self._roster = Roster(settings.members_max, own, rng)
        self._rumors = Rumors(own.name, news_bytes)
        self._outbox = Outbox(settings, self._own, self._roster, self._rumors)
        self._judge = Judge(
            settings, self._own, self._roster, self._rumors, self._awareness, self._timers, wall_s - now
        )
        self._detector = Detector(
            settings,
            self._own,
            self._roster,
            self._judge,
            self._outbox,
            self._awareness,
            self._timers,
            rng,
        )
        self._contests = Contests(
            settings,
            self._own,
            self._judge,
            self._outbox,
            self._timers,
            self._detector.next_seq,
            self._stop,
        )
        self._exchange = Exchange(
            settings, self._own, self._roster, self._judge, self._detector, self._outbox, self._timers, rng
        )
        self._seeds = Seeds(settings, self._own, self._roster, self._outbox, self._timers, rng)
        self._farewell: Farewell | None = None
        self._doubts: dict[str, Accusation] = {}
        self._strangers: dict[str, float] = {}
        self._gossip_armed = False
        self._gossiped_s = float("-inf")
        self._rumors.put(self._own.record)
        self._detector.start(now + rng.random() * settings.probe_interval_s)
        self._exchange.start(now)

    # -- the five verbs

    def receive(self, message: Message, address: Address, now: float, by_stream: bool = False) -> None:
        """Take one decoded and authenticated message; `address` is where it came from. Never raises."""
        if not self._is_running:
            return
        self._note_time(now)
        source = message.source
        if source.name == self._own.name and source.boot == self._own.record.boot:
            return  # our own echo: a reflecting network, or we dialled ourselves
        if isinstance(message, Packet):
            self._receive_packet(message, address, now, by_stream)
            self._after(now)
        else:
            self.merge_table(message, address, now)

    def tick(self, now: float) -> None:
        """Run every timer that is due. Cheap when none is; also how the machine learns that its loop is late."""
        if not self._is_running:
            return
        self._note_time(now)
        self._timers.run(now)
        self._after(now)

    def deadline(self) -> float:
        """When `tick` is due next; infinity when the machine has stopped."""
        return self._timers.next_s()

    def packets_to_send(self, now: float) -> list[tuple[Address, Packet]]:
        """Take the datagrams due now, each filled with news up to PACKET_BODY_BYTES_MAX. Drain after every call."""
        return self._outbox.take_packets()

    def effects(self) -> list[Effect]:
        """Take what the shell must do with streams. Drain after every call."""
        return self._outbox.take_effects()

    def next_event(self) -> Event | None:
        """Take the oldest event, or None."""
        events = self._judge.events
        return events.popleft() if events else None

    # -- what the shell must tell

    def stream_closed(self, name: str, boot: bytes, now: float) -> None:
        """The pair's stream ended or was reset by the peer (not by us): a hint, the member is probed at once."""
        member = self._roster.get(name)
        if self._is_running and member is not None and member.is_live and member.record.boot == boot:
            self._note_time(now)
            self._detector.probe_now(member, now, has_eof=True)
            self._after(now)

    def dial_failed(self, address: Address, is_refused: bool, now: float) -> None:
        """A dial asked for by SendByStream failed; `is_refused` = the host answered that the port is closed."""
        if self._is_running:
            self._note_time(now)
            self._detector.on_dial_failed(address, is_refused, now)
            self._contests.on_dial_failed(address, is_refused, now)
            self._after(now)

    def loop_lag(self, lag_s: float, now: float) -> None:
        """The shell's own loop was this late (beyond what `tick` sees): counts against our health, holds verdicts."""
        if self._awareness.note_lag(lag_s, now):
            self._detector.void(now)

    def clock(self, wall_s: float, now: float) -> None:
        """The wall clock, again: call it once a minute, so that a corrected clock stops refusing its peers."""
        self._judge.set_wall_offset(wall_s - now)

    def join(self, seeds: Iterable[str], now: float) -> None:
        """Add seeds (`host:port`, names or addresses). Each is dialled at once, in parallel, then for ever."""
        if self._is_running:
            self._seeds.add(seeds, now)
            self._after(now)

    def seed_answered(self, seed: str, name: str, boot: bytes, now: float) -> None:
        """A DialSeed reached this peer (it may be ourselves)."""
        self._seeds.answered(seed, name, boot, now)

    def seed_failed(self, seed: str, now: float) -> None:
        """A DialSeed reached nobody; it comes again after a backoff."""
        self._seeds.failed(seed, now)

    def tables(self, now: float) -> list[TablePush]:
        """The member table as messages of at most TABLE_RECORDS_MAX records each; the last one wants a reply."""
        return self._exchange.pushes(now)

    def merge_table(self, table: TablePush | TablePull, address: Address, now: float) -> None:
        """What `receive` does with a table. The reply to a push appears among the effects."""
        if not self._is_running:
            return
        source = table.source
        before = self._roster.get(source.name)
        is_healing = before is not None and before.status == Status.DEAD
        must_answer = False
        for entry in table.records:
            outcome = self._judge.hear_entry(entry, source.name, now)
            if outcome is Outcome.DOUBTED:
                self._doubt(entry, source.name, now)
            elif outcome is Outcome.OWN_REFUTED:
                must_answer = True
                is_healing = is_healing or entry.status == Status.DEAD
            else:
                self._follow(outcome, entry, now)
        if is_healing:
            self._awareness.forgive()
        self._exchange.merged()
        member = self._roster.get(source.name)
        if member is not None and member.record.boot == source.boot:
            member.heard_s = now
        if isinstance(table, TablePush):
            if table.wants_reply:
                self._exchange.reply(self._stream_of(source), address, now)
        elif must_answer:
            # the stream that told us we are dead carries our answer, so that it cannot be lost
            self._outbox.stream(self._stream_of(source), address, Gossip(), (self._own.record,))
        self._after(now)

    def update_own(
        self,
        now: float,
        address: Address | None = None,
        meta: bytes | None = None,
        features: int | None = None,
        key_ids: tuple[int, ...] | None = None,
    ) -> None:
        """Change what we say about ourselves: raises our incarnation and spreads the record. Raises SettingsError."""
        own = self._own.record
        changes: dict[str, object] = {"meta": meta, "features": features, "key_ids": key_ids}
        if address is not None:
            changes["host"], changes["port"] = address
        changes = {
            field: value
            for field, value in changes.items()
            if value is not None and value != getattr(own, field)
        }
        if changes and own.status == Status.ALIVE:
            self._own.change(changes)
            self._judge.own_raised(own, now)
            self._after(now)

    def leave(self, now: float) -> None:
        """Say farewell; LeaveDone follows within settings.leave_s, then the machine is silent for good. Idempotent."""
        if self._farewell is not None or not self._is_running:
            return
        self._detector.stop()
        self._farewell = Farewell(
            self._settings,
            self._own,
            self._roster,
            self._judge,
            self._outbox,
            self._timers,
            self._detector.next_seq,
            self._stop,
            now,
        )
        self._rumors.put(self._farewell.news)
        self._after(now)

    # -- views

    @property
    def own(self) -> Record:
        """What we say about ourselves now."""
        return self._own.record

    @property
    def health(self) -> int:
        """Local health: 0 well ... settings.health_max."""
        return self._awareness.score

    @property
    def fingerprint(self) -> int:
        """32 bits over the live members; equal on all nodes when the mesh has converged."""
        return self._roster.fingerprint

    @property
    def is_running(self) -> bool:
        """False after a farewell or a name conflict."""
        return self._is_running

    @property
    def live_count(self) -> int:
        """Alive and suspect members, without ourselves."""
        return self._roster.live_count

    def member(self, name: str) -> Member | None:
        """The row of another member, or None. Read only."""
        return self._roster.get(name)

    def members(self) -> list[Member]:
        """All rows, other members only, live and tombstones, by name. Read only."""
        return sorted(self._roster.rows(), key=lambda member: member.name)

    def live(self) -> list[Member]:
        """Rows of alive and suspect members, without ourselves."""
        return self._roster.live()

    def lag_ms(self, now: float) -> int:
        """How late our own loop was lately."""
        return self._awareness.lag_ms(now)

    def counts(self) -> dict[str, int]:
        """Counters since the start, and the lengths of the queues, for metrics and for checkers of bounds."""
        return {
            **self._judge.counts,
            "outbox_dropped": self._outbox.dropped,
            "members": len(self._roster),
            "suspicions": self._judge.suspicion_count(),
            "rumors": len(self._rumors),
            "timers": len(self._timers),
            "doubts": len(self._doubts),
        }

    # -- messages

    def _receive_packet(self, packet: Packet, address: Address, now: float, by_stream: bool) -> None:
        for news in packet.news:
            outcome = self._judge.hear(news, now)
            if isinstance(news, Record):
                self._follow(outcome, news, now)
            elif outcome is Outcome.NEWS and news.status == Status.SUSPECT:
                self._corroborate(news, now)
        source, body = packet.source, packet.body
        if isinstance(body, Ping):
            self._on_ping(body, source, address, now, by_stream)
        elif isinstance(body, Ack):
            self._on_ack(body, source, address, now, by_stream)
        elif isinstance(body, PingReq):
            self._detector.on_ping_req(body, self._stream_of(source), address, by_stream, now)
        elif isinstance(body, Nack):
            self._detector.on_nack(body, now)
        elif isinstance(body, Conflict):
            self._contests.on_conflict(body)
        self._note_source(source, address, now, by_stream, is_ping=isinstance(body, Ping))

    def _on_ping(self, ping: Ping, source: Source, address: Address, now: float, by_stream: bool) -> None:
        own = self._own.record
        if ping.target_name != own.name:
            return
        first: list[News] = []
        if self._farewell is not None:
            first.append(self._farewell.news)
        elif ping.target_boot != own.boot or ping.target_incarnation != own.incarnation:
            first.append(own)
        accusation = self._judge.accusation_for(source.name, source.boot, source.incarnation)
        if accusation is not None:
            first.append(accusation)
        member = self._roster.get(source.name)
        is_known = member is not None and member.record.boot == source.boot
        known = member.record.incarnation if member is not None and is_known else 0
        ack = Ack(ping.seq, own.boot, self._awareness.lag_ms(now), known)
        self._outbox.reply(self._stream_of(source), address, by_stream, ack, tuple(first))

    def _on_ack(self, ack: Ack, source: Source, address: Address, now: float, by_stream: bool) -> None:
        if self._contests.on_ack(ack, now):
            return
        if self._farewell is not None:
            self._farewell.on_ack(ack.seq)
            return
        self._detector.on_ack(ack, source.name, now, by_stream)
        if ack.boot != source.boot:
            return  # a helper's answer about someone else
        member = self._roster.get(source.name)
        if member is not None and member.record.boot == source.boot:
            if not by_stream:
                self._detector.on_datagram_from(member)
            self._exchange.compare(member, source.fingerprint, now)
        if ack.known_incarnation != self._own.record.incarnation:
            self._outbox.reply(self._stream_of(source), address, by_stream, Gossip(), (self._own.record,))

    def _note_source(
        self, source: Source, address: Address, now: float, by_stream: bool, is_ping: bool
    ) -> None:
        """Someone is there. If it and we do not know the same about it, a ping makes both say it (an ack did)."""
        member = self._roster.get(source.name)
        is_known_life = member is not None and member.record.boot == source.boot
        if member is not None and is_known_life:
            member.heard_s = now
        if is_ping or self._farewell is not None or source.name == self._own.name:
            return
        if member is not None and is_known_life:
            if member.status != Status.ALIVE or source.incarnation > member.record.incarnation:
                self._detector.confront(member, now)
        elif now - self._strangers.get(source.name, float("-inf")) >= 1.0:
            if len(self._strangers) >= STRANGERS_MAX:
                self._strangers.pop(next(iter(self._strangers)))
            self._strangers.pop(source.name, None)
            self._strangers[source.name] = now
            ping = Ping(self._detector.next_seq(), source.name, b"", 0)
            self._outbox.reply(self._stream_of(source), address, by_stream, ping)

    def _stream_of(self, source: Source) -> str | None:
        """The name whose stream answers this speaker; None, and so its address, if that name is another life's."""
        member = self._roster.get(source.name)
        return source.name if member is not None and member.record.boot == source.boot else None

    def _follow(self, outcome: Outcome, record: Record, now: float) -> None:
        """What a statement calls for besides the change of the table."""
        if outcome is Outcome.CONTESTED:
            holder = self._roster.get(record.name)
            assert holder is not None
            self._contests.begin(holder.record, record, now)
        elif outcome is Outcome.OWN_CONTESTED:
            self._contests.begin(record, self._own.record, now, is_own=True)

    def _corroborate(self, accusation: Accusation, now: float) -> None:
        """A suspicion we hear of: some of us probe the suspect at once, so that it is confirmed or refuted soon."""
        share = self._settings.corroborators / max(1, self._roster.live_count)
        if self._farewell is None and share and self._rng.random() < share:
            member = self._roster.get(accusation.name)
            if member is not None and member.status == Status.SUSPECT:
                self._detector.probe_now(member, now)

    # -- rounds

    def _doubt(self, entry: Record, sender: str, now: float) -> None:
        """A peer holds dead whom we hold alive: probe it soon, with the accusation, so that it refutes."""
        if not self._doubts:
            self._timers.at(now, self._doubt_round)
        accusation = Accusation(entry.name, entry.boot, entry.incarnation, Status.DEAD, sender)
        self._doubts[entry.name] = accusation

    def _doubt_round(self, now: float) -> None:
        for _ in range(min(DOUBTS_PER_ROUND, len(self._doubts))):
            name = next(iter(self._doubts))
            accusation = self._doubts.pop(name)
            member = self._roster.get(name)
            if member is not None and member.is_live:
                self._detector.probe_now(member, now, (accusation,))
        if self._doubts:
            self._timers.at(now + self._settings.gossip_interval_s, self._doubt_round)

    def _gossip(self, now: float) -> None:
        self._gossip_armed = False
        self._gossiped_s = now
        for member in self._roster.next_to_tell(self._settings.gossip_fanout):
            self._outbox.to(member, Gossip())

    def _after(self, now: float) -> None:
        """After every verb: news that waits must find its round. The first round of many comes almost at once."""
        if self._gossip_armed or not len(self._rumors) or not self._roster.live_count or not self._is_running:
            return
        self._gossip_armed = True
        settings = self._settings
        when_s = max(now + settings.gossip_delay_s, self._gossiped_s + settings.gossip_interval_s)
        self._timers.at(when_s, self._gossip)

    def _note_time(self, now: float) -> None:
        """A timer that should have run long ago: our loop was late, and what it measured is void."""
        lag_s = now - self._timers.next_s()
        if lag_s > self._settings.lag_unhealthy_s and self._awareness.note_lag(lag_s, now):
            self._detector.void(now)

    def _stop(self) -> None:
        """Silent from now on; what already waits in the outbox is still sent."""
        self._is_running = False
        self._detector.stop()
        self._timers.clear()
        self._rumors.clear()
