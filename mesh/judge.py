"""The judge: what is true about every member, decided from news, tables and our own observations.

Owns the transitions of the member table (alive, suspect, dead, left), running suspicions, refutation of what is said
about ourselves, and the news and events that follow. Must never probe or dial; the detector and the contests bring
their findings here.
"""

from __future__ import annotations

import enum
from collections import deque

import msgspec

from mesh.awareness import Awareness
from mesh.member import (
    UNSPECIFIED_HOSTS,
    Accusation,
    Member,
    News,
    Record,
    Status,
    boot_seconds,
)
from mesh.messages import (
    Cleared,
    ClockAhead,
    Event,
    Forgotten,
    Left,
    MemberChanged,
    MemberDown,
    MemberUp,
    OwnOutranked,
    Suspected,
)
from mesh.own import Own
from mesh.roster import Roster
from mesh.rumors import Rumors
from mesh.settings import SwimSettings
from mesh.suspicion import Suspicion
from mesh.timers import Timer, Timers

CLOCK_COMPLAINT_S = 60.0
"""A node with a clock ahead is reported once per this long."""
CLOCK_COMPLAINTS_MAX = 64


class Outcome(enum.Enum):
    """What came of one statement."""

    STALE = "stale"
    """We knew better or as much."""
    NEWS = "news"
    """The table changed."""
    REFUSED = "refused"
    """Not sane, from the future, or no room."""
    CONTESTED = "contested"
    """A second life claims the name at another address while the first seems alive: it must be checked."""
    OWN_CONTESTED = "own contested"
    """... and the name is ours."""
    OWN_REFUTED = "own refuted"
    """It was about us, and we raised our incarnation."""
    DOUBTED = "doubted"
    """A peer holds dead whom we hold alive: probe it, and tell it."""


class Judge:
    """Transitions of the member table."""

    __slots__ = (
        "_awareness",
        "_complaints",
        "_own",
        "_roster",
        "_rumors",
        "_settings",
        "_suspicions",
        "_timers",
        "_wall_offset_s",
        "counts",
        "events",
    )

    def __init__(
        self,
        settings: SwimSettings,
        own: Own,
        roster: Roster,
        rumors: Rumors,
        awareness: Awareness,
        timers: Timers,
        wall_offset_s: float,
    ) -> None:
        self._settings = settings
        self._own = own
        self._roster = roster
        self._rumors = rumors
        self._awareness = awareness
        self._timers = timers
        self._wall_offset_s = wall_offset_s
        self._suspicions: dict[str, tuple[Suspicion, Timer]] = {}
        self._complaints: dict[str, float] = {}
        self.events: deque[Event] = deque()
        self.counts = {"refused_clock": 0, "refused_host": 0, "refused_full": 0, "events_dropped": 0}

    # -- statements of others

    def hear(self, news: News, now: float) -> Outcome:
        """One rumor."""
        if isinstance(news, Record):
            return self.hear_record(news, now)
        return self._hear_accusation(news, now)

    def hear_entry(self, entry: Record, sender: str, now: float) -> Outcome:
        """One row of a peer's table. Its dead are not dead here: they are doubted, so that they can refute."""
        if entry.status == Status.ALIVE:
            return self.hear_record(entry, now)
        if not self._is_sane(entry, now):
            return Outcome.REFUSED
        accusation = Accusation(entry.name, entry.boot, entry.incarnation, entry.status, sender)
        if entry.name == self._own.name:
            return self._hear_accusation(accusation, now)
        member = self._roster.get(entry.name)
        if member is None:
            return self._learn_unknown(entry, accusation, now)
        known = member.record
        theirs, ours = (entry.incarnation, entry.boot), (known.incarnation, known.boot)
        if entry.status == Status.SUSPECT and known.status == Status.SUSPECT and theirs == ours:
            return Outcome.STALE  # hearsay: repeating a doubt does not confirm it
        if entry.status == Status.DEAD and member.is_live:
            if theirs == ours and known.status == Status.SUSPECT:
                self._confirm(member, accusation, now)
            return Outcome.DOUBTED if theirs >= ours else Outcome.STALE
        return self._hear_accusation(accusation, now)

    def hear_record(self, record: Record, now: float, is_uncontested: bool = False) -> Outcome:
        """A member (or someone who knows it) says it is alive. `is_uncontested`: a contest found the old life gone."""
        if not self._is_sane(record, now):
            return Outcome.REFUSED
        if record.name == self._own.name:
            return self._hear_own(record, now)
        member = self._roster.get(record.name)
        if member is None:
            return self._learn(record, now)
        known = member.record
        if (record.incarnation, record.boot) <= (known.incarnation, known.boot):
            return Outcome.STALE
        is_other_life = record.boot != known.boot
        if is_other_life and member.is_live and record.address != known.address and not is_uncontested:
            return Outcome.CONTESTED
        self._adopt(member, record, now)
        return Outcome.NEWS

    # -- our own observations

    def accuse(self, member: Member, now: float, has_eof: bool = False) -> None:
        """Our probe of a live member failed."""
        assert member.is_live
        known = member.record
        accusation = Accusation(known.name, known.boot, known.incarnation, Status.SUSPECT, self._own.name)
        if known.status == Status.SUSPECT:
            self._confirm(member, accusation, now)
            if has_eof:
                self._change_suspicion(member.name, now, has_eof=True)
        else:
            self._begin_suspicion(member, accusation, now, has_eof)

    def condemn(self, member: Member, at_s: float, now: float) -> None:
        """Its port refuses: it is dead at `at_s` unless it refutes."""
        self._change_suspicion(member.name, now, condemned_s=at_s)

    def accusation_for(self, name: str, boot: bytes, incarnation: int) -> News | None:
        """What someone who claims this life must hear: a worse or later statement we hold about its name, or None."""
        member = self._roster.get(name)
        if member is None:
            return None
        known = member.record
        if (known.incarnation, known.boot) < (incarnation, boot):
            return None
        if known.status != Status.ALIVE:
            return Accusation(known.name, known.boot, known.incarnation, known.status, self._own.name)
        return known if known.boot != boot else None

    # -- upkeep

    def forget_old(self, now: float) -> None:
        """Drop tombstones that reached their age."""
        for member in self._roster.down():
            if now - member.since_s >= self._settings.tombstone_s:
                self._forget(member, now)

    def set_wall_offset(self, wall_offset_s: float) -> None:
        """Wall clock minus machine clock."""
        self._wall_offset_s = wall_offset_s

    def own_raised(self, old: Record, now: float) -> None:
        """Our own record changed: spread it."""
        self._roster.own_changed(old, self._own.record, now)
        self._rumors.put(self._own.record)

    def suspicion_count(self) -> int:
        """Running suspicions."""
        return len(self._suspicions)

    def emit(self, event: Event) -> None:
        """Queue an event for the shell."""
        if len(self.events) >= self._settings.events_max:
            self.events.popleft()
            self.counts["events_dropped"] += 1
        self.events.append(event)

    # -- leaves

    def _learn(self, record: Record, now: float) -> Outcome:
        if not self._make_room(now):
            return Outcome.REFUSED
        self._roster.add(record, now)
        self._rumors.put(record)
        self.emit(MemberUp(record))
        return Outcome.NEWS

    def _learn_unknown(self, entry: Record, accusation: Accusation, now: float) -> Outcome:
        """A table names someone we never met who is not well."""
        if entry.status == Status.SUSPECT:
            outcome = self._learn(msgspec.structs.replace(entry, status=Status.ALIVE, down_s=0), now)
            return self._hear_accusation(accusation, now) if outcome is Outcome.NEWS else outcome
        # A tombstone: worth dialling, but not a place that someone living may need. A farewell is told, because what
        # its owner kept elsewhere must go too; of a death we were no witness.
        if entry.down_s >= self._settings.tombstone_s or self._roster.is_full():
            return Outcome.STALE
        member = self._roster.add(msgspec.structs.replace(entry, down_s=0), now)
        member.since_s = now - entry.down_s
        if entry.status == Status.LEFT:
            self.emit(Left(member.record))
        return Outcome.NEWS

    def _adopt(self, member: Member, record: Record, now: float) -> None:
        old = member.record
        was_live = member.is_live
        self._end_suspicion(member.name)
        self._roster.put(member, record, now)
        if old.address != record.address or old.boot != record.boot:
            member.rtt_s = None
            member.udp_misses = 0
            member.stream_only = False
        self._rumors.put(record)
        if not was_live or old.boot != record.boot:
            self.emit(MemberUp(record, old.boot != record.boot))
            return
        if old.status == Status.SUSPECT:
            self.emit(Cleared(record))
        if msgspec.structs.replace(old, incarnation=record.incarnation, status=record.status) != record:
            self.emit(MemberChanged(record))

    def _hear_accusation(self, accusation: Accusation, now: float) -> Outcome:
        if accusation.name == self._own.name:
            return self._hear_own_accused(accusation, now)
        member = self._roster.get(accusation.name)
        if member is None:
            return Outcome.STALE
        known = member.record
        theirs, ours = (accusation.incarnation, accusation.boot), (known.incarnation, known.boot)
        if theirs < ours or (theirs == ours and accusation.status < known.status):
            return Outcome.STALE
        if self._is_from_future(accusation.name, accusation.incarnation, known, now):
            return Outcome.REFUSED
        if accusation.status == Status.SUSPECT:
            if theirs == ours and known.status == Status.SUSPECT:
                return self._confirm(member, accusation, now)
            if accusation.boot != known.boot:
                return Outcome.STALE  # a doubt about a life whose record we never saw says nothing yet
            self._begin_suspicion(member, accusation, now, has_eof=False)
            return Outcome.NEWS
        if theirs == ours and accusation.status == known.status:
            return Outcome.STALE
        self._bury(member, accusation, now)
        return Outcome.NEWS

    def _hear_own_accused(self, accusation: Accusation, now: float) -> Outcome:
        own = self._own.record
        if accusation.incarnation < own.incarnation or own.status == Status.LEFT:
            return Outcome.STALE
        if accusation.status == Status.SUSPECT and accusation.boot == own.boot:
            self._awareness.add(1)  # Lifeguard: we were slow enough to be doubted
        return self._outrank(accusation.incarnation, accusation.boot, now)

    def _hear_own(self, record: Record, now: float) -> Outcome:
        own = self._own.record
        if (record.incarnation, record.boot) <= (own.incarnation, own.boot) or own.status == Status.LEFT:
            return Outcome.STALE
        if record.boot == own.boot or record.address == own.address:
            # our own future (never said by us), or a former life on this very port with a faster clock
            return self._outrank(record.incarnation, record.boot, now)
        return Outcome.OWN_CONTESTED

    def outrank(self, record: Record, now: float) -> Outcome:
        """A contest found the other claimant of our name gone (or younger): speak louder than its record."""
        if record.incarnation < self._own.record.incarnation:
            return Outcome.STALE
        return self._outrank(record.incarnation, record.boot, now)

    def _outrank(self, incarnation: int, boot: bytes, now: float) -> Outcome:
        old = self._own.record
        if self._is_from_future(old.name, incarnation + 1, old, now):
            return Outcome.REFUSED
        if boot != old.boot:
            self.emit(OwnOutranked(boot, incarnation + 1))
        self._own.raise_to(incarnation + 1)
        self.own_raised(old, now)
        return Outcome.OWN_REFUTED

    def _begin_suspicion(self, member: Member, accusation: Accusation, now: float, has_eof: bool) -> None:
        self._end_suspicion(member.name)
        if not member.is_live:
            self.emit(MemberUp(member.record))  # someone saw it alive again before doubting it
        members = self._roster.live_count + 1
        suspicion = Suspicion(self._settings, members, accusation.accuser, now, has_eof)
        record = msgspec.structs.replace(
            member.record, incarnation=accusation.incarnation, status=Status.SUSPECT
        )
        self._roster.put(member, record, now)
        self._arm(member.name, suspicion)
        self._rumors.put(accusation)
        self.emit(Suspected(record, accusation.accuser))

    def _confirm(self, member: Member, accusation: Accusation, now: float) -> Outcome:
        entry = self._suspicions.get(member.name)
        if entry is None or not entry[0].confirm(accusation.accuser):
            return Outcome.STALE
        if accusation.status == Status.SUSPECT:
            self._rumors.put(accusation)
        self._rearm(member.name, entry)
        return Outcome.NEWS

    def _change_suspicion(
        self, name: str, now: float, has_eof: bool = False, condemned_s: float = float("inf")
    ) -> None:
        entry = self._suspicions.get(name)
        if entry is None:
            return
        if has_eof:
            entry[0].saw_eof(self._settings, self._roster.live_count + 1)
        entry[0].condemn(condemned_s)
        self._rearm(name, entry)

    def _arm(self, name: str, suspicion: Suspicion) -> None:
        timer = self._timers.at(suspicion.deadline_s(), lambda now: self._expire(name, suspicion, now))
        self._suspicions[name] = (suspicion, timer)

    def _rearm(self, name: str, entry: tuple[Suspicion, Timer]) -> None:
        entry[1].cancel()
        self._arm(name, entry[0])

    def _end_suspicion(self, name: str) -> None:
        entry = self._suspicions.pop(name, None)
        if entry is not None:
            entry[1].cancel()

    def _expire(self, name: str, suspicion: Suspicion, now: float) -> None:
        suspicion.hold(self._awareness.hold_until())
        if suspicion.deadline_s() > now:
            self._arm(name, suspicion)
            return
        member = self._roster.get(name)
        assert member is not None and member.status == Status.SUSPECT
        known = member.record
        self._bury(member, Accusation(name, known.boot, known.incarnation, Status.DEAD, self._own.name), now)

    def _bury(self, member: Member, accusation: Accusation, now: float) -> None:
        known = member.record
        was_live = member.is_live
        self._end_suspicion(member.name)
        record = msgspec.structs.replace(
            known, boot=accusation.boot, incarnation=accusation.incarnation, status=accusation.status
        )
        if accusation.boot != known.boot:
            # The end of a life we never met. Its first incarnation was its birth; users hear that it had been.
            record = msgspec.structs.replace(record, born_s=boot_seconds(accusation.incarnation))
            self.emit(MemberUp(msgspec.structs.replace(record, status=Status.ALIVE), True))
            was_live = True
        self._roster.put(member, record, now)
        self._rumors.put(accusation)
        if accusation.status == Status.LEFT:
            self.emit(Left(record))
        elif was_live:
            self.emit(MemberDown(record, accusation.accuser))

    def _make_room(self, now: float) -> bool:
        if not self._roster.is_full():
            return True
        oldest = self._roster.oldest_down
        if oldest is None:
            self.counts["refused_full"] += 1
            return False
        self._forget(oldest, now)
        return True

    def _forget(self, member: Member, now: float) -> None:
        self._roster.remove(member.name, now)
        self._rumors.drop(member.name)
        self.emit(Forgotten(member.record))

    def _is_sane(self, record: Record, now: float) -> bool:
        if record.host in UNSPECIFIED_HOSTS:
            self.counts["refused_host"] += 1
            return False
        return not self._is_from_future(record.name, record.incarnation, record, now)

    def _is_from_future(self, name: str, incarnation: int, record: Record, now: float) -> bool:
        wall_s = now + self._wall_offset_s
        if boot_seconds(incarnation) <= wall_s + self._settings.clock_ahead_max_s:
            return False
        self.counts["refused_clock"] += 1
        if now - self._complaints.get(name, float("-inf")) >= CLOCK_COMPLAINT_S:
            if len(self._complaints) >= CLOCK_COMPLAINTS_MAX:
                self._complaints.pop(next(iter(self._complaints)))
            self._complaints[name] = now
            self.emit(ClockAhead(name, record.address, boot_seconds(incarnation), wall_s))
        return True
