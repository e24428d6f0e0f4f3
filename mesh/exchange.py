"""Full tables between two members: periodic push-pull, repair when fingerprints differ, re-dial of the dead and left.

Owns when a table travels and to whom. Must never merge (`swim` hands each row to the judge).

The re-dial is what heals partitions of any length: a tombstone is dialled every few seconds for a day, and where the
dial succeeds both sides see who holds whom dead.
"""

from __future__ import annotations

import math
from collections import deque
from random import Random

import msgspec

from mesh.codec import TABLE_RECORDS_MAX
from mesh.judge import Judge
from mesh.member import Address, Member, Record
from mesh.messages import SendByStream, TablePull, TablePush
from mesh.outbox import Outbox
from mesh.own import Own
from mesh.probe import Detector
from mesh.roster import Roster
from mesh.settings import SwimSettings
from mesh.timers import Timers

REDIAL_FASTEST_S = 0.1
"""However many tombstones: never more dials than this."""
REPAIR_SLOWEST_S = 60.0
"""Exchanges that bring nothing new become this rare (the difference is one neither side may take over)."""
FORGET_INTERVAL_S = 60.0
FULL_ALWAYS_MAX = 32
"""Up to this many members the periodic exchange is sent whatever the fingerprints say: it is 2 KB."""
NEWBORN_INTERVAL_S = 0.25
"""A node without any table asks this often at most."""
AGREED_S = 10.0
"""Above, it is skipped when some member's fingerprint was ours this recently."""


class Exchange:
    """All table traffic of one node."""

    __slots__ = (
        "_agreed_s",
        "_detector",
        "_is_newborn",
        "_judge",
        "_outbox",
        "_own",
        "_redial_queue",
        "_repair_due_s",
        "_repair_pause_s",
        "_repaired_fingerprint",
        "_rng",
        "_roster",
        "_settings",
        "_timers",
    )

    def __init__(
        self,
        settings: SwimSettings,
        own: Own,
        roster: Roster,
        judge: Judge,
        detector: Detector,
        outbox: Outbox,
        timers: Timers,
        rng: Random,
    ) -> None:
        self._settings = settings
        self._own = own
        self._roster = roster
        self._judge = judge
        self._detector = detector
        self._outbox = outbox
        self._timers = timers
        self._rng = rng
        self._redial_queue: deque[str] = deque()
        self._repair_due_s = float("-inf")
        self._repair_pause_s = settings.repair_interval_s
        self._repaired_fingerprint: int | None = None
        self._is_newborn = True
        """No table of anyone came yet in this life."""
        self._agreed_s = float("-inf")
        """Machine time of the last ack whose fingerprint was ours."""

    def start(self, now: float) -> None:
        """Begin; the first times are random, so that nodes that started together do not act together."""
        settings = self._settings
        self._timers.at(now + self._rng.random() * settings.push_pull_interval_s, self._push_pull)
        self._timers.at(now + FORGET_INTERVAL_S, self._forget)
        if settings.redial_interval_s:
            self._timers.at(now + self._rng.random() * settings.redial_interval_s, self._redial)

    def pushes(self, now: float) -> list[TablePush]:
        """Our table as questions; the last slice wants the other's."""
        source = self._own.source(self._roster.fingerprint)
        slices = self._slices(now)
        return [TablePush(source, records, records is slices[-1]) for records in slices]

    def pulls(self, now: float) -> list[TablePull]:
        """Our table as an answer."""
        source = self._own.source(self._roster.fingerprint)
        return [TablePull(source, records) for records in self._slices(now)]

    def push(self, member: Member, now: float) -> None:
        """Exchange tables with this member."""
        for table in self.pushes(now):
            self._outbox.effect(SendByStream(member.name, member.address, table))

    def reply(self, peer: str | None, address: Address, now: float) -> None:
        """Answer a push."""
        for table in self.pulls(now):
            self._outbox.effect(SendByStream(peer, address, table))

    def compare(self, member: Member, fingerprint: int, now: float) -> None:
        """A member said its fingerprint in an ack; if it differs and ours has been quiet, exchange tables."""
        settings = self._settings
        if fingerprint == self._roster.fingerprint:
            self._agreed_s = now
            return
        if not settings.repair_interval_s:
            return
        if self._is_newborn and now >= self._repair_due_s:
            # Others found us before a seed answered: do not meet them one by one.
            self._repair_due_s = now + NEWBORN_INTERVAL_S
            self.push(member, now)
            return
        if now - self._roster.changed_s < settings.repair_after_s or now < self._repair_due_s:
            return
        if self._repaired_fingerprint == self._roster.fingerprint:
            self._repair_pause_s = min(REPAIR_SLOWEST_S, 2 * self._repair_pause_s)
        else:
            self._repair_pause_s = settings.repair_interval_s
        self._repaired_fingerprint = self._roster.fingerprint
        self._repair_due_s = now + self._repair_pause_s
        self.push(member, now)

    def merged(self) -> None:
        """A table of a peer was merged."""
        self._is_newborn = False

    def _slices(self, now: float) -> list[tuple[Record, ...]]:
        records = [self._own.record]
        for member in self._roster.rows():
            record = member.record
            if not member.is_live:
                record = msgspec.structs.replace(record, down_s=max(0, int(now - member.since_s)))
            records.append(record)
        starts = range(0, len(records), TABLE_RECORDS_MAX)
        return [tuple(records[start : start + TABLE_RECORDS_MAX]) for start in starts]

    def _push_pull(self, now: float) -> None:
        members = self._roster.live_count + 1
        # A large table is not sent for nothing: where every ack compares fingerprints, agreement is known.
        agrees = self._settings.repair_interval_s > 0 and now - self._agreed_s < AGREED_S
        if members <= FULL_ALWAYS_MAX or not agrees:
            for member in self._roster.sample(1):
                self.push(member, now)
        scale = 1.0 if members <= FULL_ALWAYS_MAX else 1.0 + math.ceil(math.log2(members / FULL_ALWAYS_MAX))
        pause_s = self._settings.push_pull_interval_s * scale * (0.9 + 0.2 * self._rng.random())
        self._timers.at(now + pause_s, self._push_pull)

    def _redial(self, now: float) -> None:
        settings = self._settings
        down = self._roster.down()
        member = self._next_to_redial(down)
        if member is not None:
            self.push(member, now)
            self._detector.confront(member, now)
        pause_s = settings.redial_interval_s
        if down:
            pause_s = max(REDIAL_FASTEST_S, min(pause_s, settings.redial_all_s / len(down)))
        self._timers.at(now + pause_s, self._redial)

    def _next_to_redial(self, down: list[Member]) -> Member | None:
        """Each tombstone once per round, in random order; not where a live member lives now."""
        if not down:
            self._redial_queue.clear()
            return None
        taken = {member.address for member in self._roster.live()}
        taken.add(self._own.record.address)
        for _ in range(len(self._redial_queue) + len(down)):
            if not self._redial_queue:
                names = [member.name for member in down]
                self._rng.shuffle(names)
                self._redial_queue.extend(names)
            member = self._roster.get(self._redial_queue.popleft())
            if member is not None and not member.is_live and member.address not in taken:
                return member
        return None

    def _forget(self, now: float) -> None:
        self._judge.forget_old(now)
        self._timers.at(now + FORGET_INTERVAL_S, self._forget)
