"""The failure detector: ping one member per interval, ask others when it is silent, and judge the silence.

Owns probe rounds, the pings made on behalf of others, and the evidence of one round (acks, nacks, refused dials).
Must never change the member table: it tells the judge whom it found silent.

One round: ping by datagram; at the time-out, three helpers by PingReq and the same ping by stream; at the end of the
interval the verdict. A round that begins with evidence (the member's stream ended) does all of it at once. A round
during which our own loop was late proves nothing and is void.
"""

from __future__ import annotations

from functools import partial
from random import Random

from mesh.awareness import Awareness
from mesh.judge import Judge
from mesh.member import Accusation, Address, Member, News, Status
from mesh.messages import Ack, Nack, Ping, PingReq
from mesh.outbox import Outbox
from mesh.own import Own
from mesh.roster import Roster
from mesh.settings import SwimSettings
from mesh.timers import Timer, Timers

RELAYS_MAX = 512
"""Pings made for others at once; more are ignored, the asker has other helpers."""
STREAM_ONLY_AFTER = 3
"""So many probes in a row answered by stream only, and UDP counts as blocked."""
RTT_SHARE = 0.2
"""Weight of a new sample in the smoothed round trip."""
NACK_SHARE = 0.8
"""A helper says so when it heard nothing for this share of the time-out (Lifeguard)."""
SEQ_MASK = 0xFFFFFFFF


class _Round:
    """One probe under way. `seq` is what its answers carry."""

    __slots__ = (
        "asked",
        "boot",
        "has_eof",
        "is_helper_refused",
        "is_regular",
        "member",
        "nacks",
        "refused_s",
        "seq",
        "start_s",
        "timers",
    )

    def __init__(self, member: Member, seq: int, now: float, is_regular: bool, has_eof: bool) -> None:
        self.member = member
        self.boot = member.record.boot
        self.seq = seq
        self.start_s = now
        self.is_regular = is_regular
        self.has_eof = has_eof
        self.asked = 0
        self.nacks = 0
        self.refused_s: float | None = None
        self.is_helper_refused = False
        self.timers: list[Timer] = []


class _Relay:
    """A ping on behalf of another member."""

    __slots__ = ("address", "by_stream", "is_answered", "origin", "origin_address", "origin_seq")

    def __init__(
        self, origin: str | None, origin_address: Address, by_stream: bool, origin_seq: int, address: Address
    ):
        self.origin = origin
        self.origin_address = origin_address
        self.by_stream = by_stream
        self.origin_seq = origin_seq
        self.address = address
        self.is_answered = False


class Detector:
    """All probing of one node."""

    __slots__ = (
        "_again",
        "_awareness",
        "_by_name",
        "_is_running",
        "_judge",
        "_outbox",
        "_own",
        "_relays",
        "_roster",
        "_rounds",
        "_seq",
        "_settings",
        "_timers",
    )

    def __init__(
        self,
        settings: SwimSettings,
        own: Own,
        roster: Roster,
        judge: Judge,
        outbox: Outbox,
        awareness: Awareness,
        timers: Timers,
        rng: Random,
    ) -> None:
        self._settings = settings
        self._own = own
        self._roster = roster
        self._judge = judge
        self._outbox = outbox
        self._awareness = awareness
        self._timers = timers
        self._rounds: dict[int, _Round] = {}
        self._by_name: dict[str, _Round] = {}
        self._relays: dict[int, _Relay] = {}
        self._again: set[str] = set()
        """Members to be asked again after a freeze; at most the members of one round each."""
        # A random start: answers to a former life of ours must not fit a round of this one.
        self._seq = rng.getrandbits(32)
        self._is_running = True

    def start(self, at_s: float) -> None:
        """Begin probing at this time."""
        self._timers.at(at_s, self._turn)

    def stop(self) -> None:
        """No more probes of our own; others are still answered while we leave."""
        self._is_running = False
        for probe in list(self._rounds.values()):
            self._end(probe)

    def void(self, now: float) -> None:
        """Our own loop was late: silence so far proves nothing. Where a stream's end was the reason to ask, ask again,
        once all that queued up meanwhile has been read."""
        for probe in list(self._rounds.values()):
            self._end(probe)
            if probe.has_eof and probe.member.name not in self._again:
                self._again.add(probe.member.name)
                self._timers.at(now, partial(self._ask_again, probe))

    def _ask_again(self, probe: _Round, now: float) -> None:
        member = probe.member
        self._again.discard(member.name)
        if self._roster.get(member.name) is member and member.is_live and member.record.boot == probe.boot:
            self.probe_now(member, now, has_eof=True)

    def next_seq(self) -> int:
        """A number no answer under way carries."""
        self._seq = (self._seq + 1) & SEQ_MASK
        return self._seq

    def probe_now(
        self, member: Member, now: float, first: tuple[News, ...] = (), has_eof: bool = False
    ) -> None:
        """Probe out of turn: its stream ended (`has_eof`), or a peer holds it dead (`first` tells it so)."""
        if not self._is_running:
            return
        probe = self._by_name.get(member.name)
        if probe is None or probe.boot != member.record.boot:
            if probe is not None:
                self._end(probe)
            self._begin(member, now, first, is_regular=False, has_eof=has_eof)
        elif has_eof and not probe.has_eof:
            probe.has_eof = True
            self._widen(probe, now)
        elif first:
            self.confront(member, now, first)

    def confront(self, member: Member, now: float, first: tuple[News, ...] = ()) -> None:
        """Ping without judging the silence, to make both sides tell what they know. At most once a second each."""
        if now - member.confronted_s >= 1.0:
            member.confronted_s = now
            self._outbox.to(member, self._ping(member, self.next_seq()), first + self._buddy(member))

    # -- answers

    def on_ack(self, ack: Ack, sender: str, now: float, by_stream: bool) -> Member | None:
        """An ack arrived. Returns the member if it ended a round of ours with a sign of life."""
        relay = self._relays.pop(ack.seq, None)
        if relay is not None:
            relay.is_answered = True
            answer = Ack(relay.origin_seq, ack.boot, ack.lag_ms, 0)
            self._outbox.reply(relay.origin, relay.origin_address, relay.by_stream, answer)
            return None
        probe = self._rounds.get(ack.seq)
        if probe is None:
            return None
        member = probe.member
        self._end(probe)
        if ack.boot != probe.boot:
            return None  # another life answers there; its record came with the ack
        if sender == member.name:
            self._measure(probe, ack, now, by_stream)
        if probe.is_regular:
            self._awareness.add(-1)
        return member

    def on_datagram_from(self, member: Member) -> None:
        """An ack of the member itself came by UDP: it is not blocked (any more)."""
        member.udp_misses = 0
        member.stream_only = False

    def on_nack(self, nack: Nack, now: float) -> None:
        """A helper heard nothing either."""
        probe = self._rounds.get(nack.seq)
        if probe is None:
            return
        probe.nacks += 1
        if nack.is_refused:
            probe.is_helper_refused = True
            self._condemn_if_refused(probe, now)

    def on_dial_failed(self, address: Address, is_refused: bool, now: float) -> None:
        """A dial failed. Only a refusal says something: the host is up, the process is not."""
        if not is_refused:
            return
        for relay in list(self._relays.values()):
            if relay.address == address and not relay.is_answered:
                relay.is_answered = True
                answer = Nack(relay.origin_seq, True)
                self._outbox.reply(relay.origin, relay.origin_address, relay.by_stream, answer)
        for probe in list(self._rounds.values()):
            if probe.member.address == address and probe.refused_s is None:
                probe.refused_s = now
                if self._settings.refused_rule:
                    self._ask(probe, dials=True)
                    self._condemn_if_refused(probe, now)

    def on_ping_req(
        self, request: PingReq, origin: str | None, address: Address, by_stream: bool, now: float
    ) -> None:
        """Someone asks us to ping a member for it."""
        if len(self._relays) >= RELAYS_MAX or request.target_name == self._own.name:
            return
        seq = self.next_seq()
        target: Address = (request.host, request.port)
        relay = _Relay(origin, address, by_stream, request.seq, target)
        self._relays[seq] = relay
        ping = Ping(seq, request.target_name, request.target_boot, request.target_incarnation)
        self._outbox.datagram(target, ping)
        if request.dials:
            self._outbox.stream(request.target_name, target, ping)

        def give_up(later: float) -> None:
            if not relay.is_answered:
                relay.is_answered = True
                answer = Nack(relay.origin_seq, False)
                self._outbox.reply(relay.origin, relay.origin_address, relay.by_stream, answer)

        def forget(later: float) -> None:
            self._relays.pop(seq, None)

        self._timers.at(now + NACK_SHARE * self._settings.probe_timeout_max_s, give_up)
        self._timers.at(now + 2 * self._settings.probe_interval_s, forget)

    # -- one round

    def _turn(self, now: float) -> None:
        if not self._is_running:
            return
        member = self._roster.next_to_probe()
        if member is not None and member.name not in self._by_name:
            self._begin(member, now, (), is_regular=True, has_eof=False)
        self._timers.at(now + self._settings.probe_interval_s * self._awareness.stretch(), self._turn)

    def _begin(
        self, member: Member, now: float, first: tuple[News, ...], is_regular: bool, has_eof: bool
    ) -> None:
        settings = self._settings
        probe = _Round(member, self.next_seq(), now, is_regular, has_eof)
        self._rounds[probe.seq] = probe
        self._by_name[member.name] = probe
        # The datagram goes out even when UDP seems blocked: that is how we notice that it is not any more.
        ping = self._ping(member, probe.seq)
        self._outbox.datagram(member.address, ping, first + self._buddy(member))
        if has_eof:
            self._widen(probe, now)
            verdict_s = 2 * settings.probe_timeout_max_s
        else:
            if member.stream_only:
                self._outbox.stream(member.name, member.address, ping, self._buddy(member))
            wait_s = settings.probe_rtt_mult * (member.rtt_s or 0.0)
            wait_s = max(settings.probe_timeout_min_s, min(settings.probe_timeout_max_s, wait_s))
            probe.timers.append(self._timers.at(now + wait_s, lambda later: self._widen(probe, later)))
            verdict_s = settings.probe_interval_s * self._awareness.stretch()
        probe.timers.append(self._timers.at(now + verdict_s, lambda later: self._verdict(probe, later)))

    def _widen(self, probe: _Round, now: float) -> None:
        """Ask helpers, and ping by stream."""
        member = probe.member
        if not member.stream_only or probe.has_eof:
            self._ask(probe, dials=probe.has_eof)
        if self._settings.stream_probe:
            # Also when it was asked by stream already: that stream may have been closed for want of use just as the
            # question travelled, and then this one opens another.
            ping = self._ping(member, probe.seq)
            self._outbox.stream(member.name, member.address, ping, self._buddy(member))

    def _ask(self, probe: _Round, dials: bool) -> None:
        record = probe.member.record
        request = PingReq(
            probe.seq, record.name, record.boot, record.incarnation, record.host, record.port, dials
        )
        helpers = self._roster.sample(self._settings.indirect_probes, record.name)
        probe.asked = max(probe.asked, len(helpers))
        for helper in helpers:
            self._outbox.to(helper, request)

    def _verdict(self, probe: _Round, now: float) -> None:
        self._end(probe)
        if probe.is_regular and probe.refused_s is None:
            # Lifeguard: each nack that should have come and did not says that the fault may be ours.
            self._awareness.add(max(0, probe.asked - probe.nacks) if probe.asked else 1)
        member = self._roster.get(probe.member.name)
        if member is not probe.member or not member.is_live or member.record.boot != probe.boot:
            return
        was_alive = member.status == Status.ALIVE
        self._judge.accuse(member, now, probe.has_eof)
        if was_alive and member.status == Status.SUSPECT and self._settings.stream_probe:
            # Rumors may be lost; a stream repeats itself until the accused has heard.
            ping = self._ping(member, self.next_seq())
            self._outbox.stream(member.name, member.address, ping, self._buddy(member))

    def _condemn_if_refused(self, probe: _Round, now: float) -> None:
        """Dead after `refused_s` when our dial was refused and, where there are others, a helper's too."""
        if probe.refused_s is None or not self._settings.refused_rule:
            return
        if not probe.is_helper_refused and self._roster.live_count > 1:
            return
        self._end(probe)
        member = probe.member
        if self._roster.get(member.name) is member and member.is_live and member.record.boot == probe.boot:
            self._judge.accuse(member, now, has_eof=True)
            self._judge.condemn(member, probe.refused_s + self._settings.refused_s, now)

    def _measure(self, probe: _Round, ack: Ack, now: float, by_stream: bool) -> None:
        member = probe.member
        member.lag_ms = ack.lag_ms
        if by_stream:
            member.udp_misses += 1
            member.stream_only = member.udp_misses >= STREAM_ONLY_AFTER
            return
        sample_s = now - probe.start_s
        member.rtt_s = (
            sample_s if member.rtt_s is None else member.rtt_s + RTT_SHARE * (sample_s - member.rtt_s)
        )

    def _ping(self, member: Member, seq: int) -> Ping:
        record = member.record
        return Ping(seq, record.name, record.boot, record.incarnation)

    def _buddy(self, member: Member) -> tuple[News, ...]:
        """Lifeguard's buddy system: whoever pings the accused tells it."""
        record = member.record
        if record.status == Status.ALIVE:
            return ()
        return (Accusation(record.name, record.boot, record.incarnation, record.status, self._own.name),)

    def _end(self, probe: _Round) -> None:
        self._rounds.pop(probe.seq, None)
        if self._by_name.get(probe.member.name) is probe:
            del self._by_name[probe.member.name]
        for timer in probe.timers:
            timer.cancel()
        probe.timers.clear()
