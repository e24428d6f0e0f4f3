"""Ephemeral maps: each owner's absolute numbers of the moment, newest sequence wins.

Owns expiry (`ttl_s` after the owner's last word, the age travels with the entry so that relays do not prolong it),
the repetition of own entries every `refresh_s`, and what goes when an owner dies. Numbers that are said again
and again heal by themselves, where counted increments would drift (mesh.md 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mesh.home import Home
from mesh.namespace import Ephemeral as EphemeralNamespace
from mesh.namespace import Put, Removed
from mesh.owner_log import Entry, OwnerLog
from mesh.owner_maps import OwnerMaps
from mesh.records import Kind

SWEEPS_PER_TTL = 8
"""Entries are gone at most an eighth of their time late; one sweep looks only at the first entry of each log."""

IDLE_TTLS = 4
"""A log without entries is forgotten after this many times to live: nobody can hold older entries by then."""


class Ephemeral(OwnerMaps):
    """See the module."""

    kind = Kind.EPHEMERAL
    has_age = True

    def __init__(self, namespace: EphemeralNamespace, home: Home, now: float) -> None:
        super().__init__(namespace.name, home, namespace.bytes_max, namespace.coalesce_s)
        self.ttl_s = namespace.ttl_s
        self.refresh_s = namespace.refresh_s
        self._sweep_due = math.inf
        self._refresh_due = math.inf
        self._last_sweep = now

    def get(self, owner: str, key: bytes) -> bytes | None:
        """The value an owner gives to a key."""
        log = self.logs.get((owner, self.lives.latest(owner)))
        return None if log is None else log.get(key)

    def items(self, owner: str | None) -> Iterator[tuple[str, bytes, bytes]]:
        """(owner, key, value) of one owner or all."""
        for log in list(self.logs.values()):
            if owner is None or log.owner == owner:
                for key, value in log.living():
                    yield log.owner, key, value

    def write(self, key: bytes, value: bytes | None, now: float) -> None:
        """As `OwnerMaps.write`; keeps the repetition going."""
        super().write(key, value, now)
        self._refresh_due = min(self._refresh_due, now + self.refresh_s)
        self._plan_sweep(now)

    def changed(self, log: OwnerLog, key: bytes, old: bytes | None, new: bytes | None) -> None:
        """Tell what is new; a repetition changes nothing and is not told."""
        if new is None:
            self.home.tell(Removed(self.name, log.owner, key))
        else:
            self.home.tell(Put(self.name, log.owner, key, new))

    def make_room(self, log: OwnerLog, growth: int, now: float) -> bool:
        """Drop peers' entries that would expire first."""
        others = [
            (entry.said_s, key, source)
            for source, other in self.logs.items()
            if source[0] != self.home.name
            for key, entry in other.entries.items()
        ]
        for _, key, source in sorted(others):
            # Room for a while, because the search above looks at everything.
            if self.bytes + growth <= self.bytes_max * 15 // 16:
                break
            self._expire(self.logs[source], key)
            self.home.count("dropped_entries")
        return self.bytes + growth <= self.bytes_max

    def admits(self, key: bytes, value: bytes | None, now: float) -> bool:
        """Everything; but from now on there is something to expire."""
        self._plan_sweep(now)
        return True

    def _plan_sweep(self, now: float) -> None:
        if self._sweep_due == math.inf:
            self._sweep_due = now + self.ttl_s / SWEEPS_PER_TTL

    def life_begins(self, old: OwnerLog, now: float) -> None:
        """Numbers of a former life say nothing about this one."""
        self.bytes -= old.bytes
        self.log_ends(old)

    def owner_died(self, owner: str, life: int, now: float) -> None:
        """Its entries go at once. The log stays, so that late relays are not taken for news."""
        super().owner_died(owner, life, now)
        for (name, of_life), log in self.logs.items():
            if name == owner != self.home.name and of_life <= life:
                for key in list(log.entries):
                    self._expire(log, key)

    def _expire(self, log: OwnerLog, key: bytes) -> None:
        old = log.get(key)
        self.bytes -= log.drop(key)
        if old is not None:
            self.changed(log, key, old, None)

    def housekeeping(self, now: float) -> None:
        """Say own entries again; expire what nobody said again."""
        if now >= self._refresh_due:
            self._refresh(now)
        if now >= self._sweep_due:
            self._sweep(now)

    def _refresh(self, now: float) -> None:
        log = self.own
        self._refresh_due = now + self.refresh_s if log.alive else math.inf
        for key, entry in [item for item in log.entries.items() if item[1].value is not None]:
            log.have += 1
            self.bytes += log.set(key, Entry(log.have, entry.value, now))
        if log.alive:
            log.touched_s = now
            self.touch((log.owner, log.life), now)

    def _sweep(self, now: float) -> None:
        own = (self.home.name, self.life)
        for source, log in list(self.logs.items()):
            # Own living entries do not expire; their refresh keeps them at the end, deletions come first.
            for key, entry in list(log.entries.items()):
                if entry.said_s > now - self.ttl_s or (source == own and entry.value is not None):
                    break
                self._expire(log, key) if source != own else self._forget_own(log, key)
            if not log.entries and source != own and log.touched_s < now - IDLE_TTLS * self.ttl_s:
                self.drop_log(source)
        has_work = any(source != own or log.deleted for source, log in self.logs.items())
        self._sweep_due = now + self.ttl_s / SWEEPS_PER_TTL if has_work else math.inf

    def _forget_own(self, log: OwnerLog, key: bytes) -> None:
        self.bytes -= log.drop(key)

    def next_housekeeping(self) -> float:
        """The next repetition or sweep."""
        return min(self._refresh_due, self._sweep_due)
