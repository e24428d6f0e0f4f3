"""Leaving: tell everyone within a second, then be silent for good.

Owns whom the farewell was sent to and who acknowledged. Must never close anything; `LeaveDone` tells the shell.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.judge import Judge
from mesh.member import Accusation, Member
from mesh.messages import LeaveDone, Ping
from mesh.outbox import Outbox
from mesh.own import Own
from mesh.roster import Roster
from mesh.settings import SwimSettings
from mesh.timers import Timers

TOLD_MAX = 64
"""Members told directly; in a larger mesh the rest hears it as a rumor from them."""


class Farewell:
    """One farewell. `stop` ends the machine when it is over."""

    __slots__ = (
        "_deadline_s",
        "_judge",
        "_next_seq",
        "_outbox",
        "_own",
        "_settings",
        "_stop",
        "_timers",
        "_told",
        "_waiting",
        "news",
    )

    def __init__(
        self,
        settings: SwimSettings,
        own: Own,
        roster: Roster,
        judge: Judge,
        outbox: Outbox,
        timers: Timers,
        next_seq: Callable[[], int],
        stop: Callable[[], None],
        now: float,
    ) -> None:
        self._settings = settings
        self._own = own
        self._judge = judge
        self._outbox = outbox
        self._timers = timers
        self._next_seq = next_seq
        self._stop = stop
        self.news: Accusation = own.leave()
        self._waiting: dict[int, Member] = {}
        self._deadline_s = now + settings.leave_s
        members = roster.sample(TOLD_MAX)
        self._told = len(members)
        for member in members:
            self._tell(self._next_seq(), member)
        if self._waiting:
            self._timers.at(now + settings.leave_resend_s, self._resend)
        else:
            self._finish()

    def on_ack(self, seq: int) -> None:
        """A member has heard; a repeated farewell keeps its number."""
        if self._waiting.pop(seq, None) is not None and not self._waiting:
            self._finish()

    def _tell(self, seq: int, member: Member) -> None:
        self._waiting[seq] = member
        record = member.record
        ping = Ping(seq, record.name, record.boot, record.incarnation)
        self._outbox.to(member, ping, (self.news,))

    def _resend(self, now: float) -> None:
        if now >= self._deadline_s:
            self._finish()
            return
        for seq, member in self._waiting.items():
            record = member.record
            ping = Ping(seq, record.name, record.boot, record.incarnation)
            self._outbox.datagram(member.address, ping, (self.news,))
            self._outbox.stream(member.name, member.address, ping, (self.news,))
        self._timers.at(min(self._deadline_s, now + self._settings.leave_resend_s), self._resend)

    def _finish(self) -> None:
        self._judge.emit(LeaveDone(self._told, self._told - len(self._waiting)))
        self._stop()
