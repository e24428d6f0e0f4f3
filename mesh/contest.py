"""Name conflicts: two lives claim one name at two addresses, and one of them must go.

Owns the checks under way. The known life is pinged at its address, by datagram and by stream: if it answers, the
younger of the two is told to stop; if it does not, or its port refuses, the claimant wins. Must never decide which
life is newer (that is the total order's work) nor stop the process.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mesh.judge import Judge, Outcome
from mesh.member import Address, Record
from mesh.messages import Ack, Conflict, NameConflict, Ping
from mesh.outbox import Outbox
from mesh.own import Own
from mesh.settings import SwimSettings
from mesh.timers import Timer, Timers

CONTESTS_MAX = 16
"""Checks at once; a claim beyond that is heard again with the claimant's next rumor or table."""


class _Contest:
    __slots__ = ("claimant", "holder", "is_own", "timer")

    def __init__(self, holder: Record, claimant: Record, is_own: bool) -> None:
        self.holder = holder
        self.claimant = claimant
        self.is_own = is_own
        self.timer: Timer | None = None


def _bare(record: Record) -> Record:
    """Without what could make two records exceed one packet."""
    return msgspec.structs.replace(record, meta=b"", tail=(), key_ids=())


class Contests:
    """All checks of one node. `stop` ends the machine: our own name is taken."""

    __slots__ = ("_by_seq", "_judge", "_next_seq", "_outbox", "_own", "_settings", "_stop", "_timers")

    def __init__(
        self,
        settings: SwimSettings,
        own: Own,
        judge: Judge,
        outbox: Outbox,
        timers: Timers,
        next_seq: Callable[[], int],
        stop: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._own = own
        self._judge = judge
        self._outbox = outbox
        self._timers = timers
        self._next_seq = next_seq
        self._stop = stop
        self._by_seq: dict[int, _Contest] = {}

    def begin(self, holder: Record, claimant: Record, now: float, is_own: bool = False) -> None:
        """Check whether `holder` still answers. With `is_own` the name is ours, and `holder` the other life."""
        if len(self._by_seq) >= CONTESTS_MAX:
            return
        if any(contest.holder.name == holder.name for contest in self._by_seq.values()):
            return
        seq = self._next_seq()
        contest = _Contest(holder, claimant, is_own)
        self._by_seq[seq] = contest
        ping = Ping(seq, holder.name, holder.boot, holder.incarnation)
        self._outbox.datagram(holder.address, ping)
        self._outbox.stream(None, holder.address, ping)
        contest.timer = self._timers.at(
            now + self._settings.probe_interval_s, lambda later: self._lost(seq, later)
        )

    def on_ack(self, ack: Ack, now: float) -> bool:
        """True if the ack belongs to a contest."""
        contest = self._by_seq.get(ack.seq)
        if contest is None:
            return False
        if ack.boot != contest.holder.boot:
            self._lost(ack.seq, now)
            return True
        self._finish(ack.seq)
        if contest.is_own:
            self._own_holder_lives(contest, now)
        else:
            self._tell_younger(contest.holder, contest.claimant)
        return True

    def on_dial_failed(self, address: Address, is_refused: bool, now: float) -> None:
        """The holder's port refuses: it is gone."""
        if is_refused:
            for seq, contest in list(self._by_seq.items()):
                if contest.holder.address == address:
                    self._lost(seq, now)

    def on_conflict(self, conflict: Conflict) -> None:
        """Someone checked: an elder life of our name answers. Stop, if that is true of us."""
        own = self._own.record
        elder, younger = conflict.elder, conflict.younger
        is_about_us = elder.name == own.name and younger.boot == own.boot and elder.boot != own.boot
        if is_about_us and not self._own.is_elder_than(elder):
            self._judge.emit(NameConflict(elder, own))
            self._stop()

    def _lost(self, seq: int, now: float) -> None:
        contest = self._by_seq.get(seq)
        if contest is None:
            return
        self._finish(seq)
        if contest.is_own:
            self._judge.outrank(contest.holder, now)
            return
        outcome = self._judge.hear_record(contest.claimant, now, is_uncontested=True)
        assert outcome is not Outcome.CONTESTED

    def _own_holder_lives(self, contest: _Contest, now: float) -> None:
        if self._own.is_elder_than(contest.holder):
            self._judge.outrank(contest.holder, now)
            self._tell_younger(self._own.record, contest.holder)
        else:
            self._judge.emit(NameConflict(contest.holder, self._own.record))
            self._stop()

    def _tell_younger(self, first: Record, second: Record) -> None:
        elder, younger = sorted((first, second), key=lambda record: (record.born_s, record.boot))
        conflict = Conflict(_bare(elder), _bare(younger))
        self._outbox.datagram(younger.address, conflict)
        self._outbox.stream(None, younger.address, conflict)

    def _finish(self, seq: int) -> None:
        contest = self._by_seq.pop(seq)
        if contest.timer is not None:
            contest.timer.cancel()
