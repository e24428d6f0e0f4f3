"""Maps of many owners under one namespace: how they are exchanged between nodes.

Owns the logs of all sources, the answering of vectors, wants and deltas, and the byte account. It must never
decide what a rule decides: what is told, what goes when an owner goes or time passes, and what is dropped when
there is no room are left to `owned.Owned`, `ephemeral.Ephemeral` and `counter.Counters`, which extend it.

The exchange is scuttlebutt's (van Renesse and others, "Efficient Reconciliation and Flow Control for
Anti-Entropy Protocols", 2008): a delta holds everything current between two versions of one source, and is
applied only when it leaves no hole, so a vector of versions says all that a node knows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from mesh.digest import Position, Row, Source, compare, sealed_fingerprint
from mesh.errors import BoundError
from mesh.frames import Frame
from mesh.home import Home, forget_source
from mesh.link import PUSH_VECTOR, Link
from mesh.lives import Lives
from mesh.namespace import KEY_BYTES_MAX, VALUE_BYTES_MAX
from mesh.owner_log import Entry, OwnerLog, ResetState
from mesh.owner_records import decode_delta, encode_delta
from mesh.records import FIRST, LAST, PUSH, RESET, Delta, Kind, Vector, Want, WantRow, encode_body

WANTS_PER_FRAME_MAX = 1024
"""Rows of one want frame; the rest go in the next."""


def check_sizes(key: bytes, value: bytes | None) -> None:
    """Raises BoundError if a key or value is not allowed."""
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise BoundError(f"a key has 1 to {KEY_BYTES_MAX} bytes")
    if value is not None and len(value) > VALUE_BYTES_MAX:
        raise BoundError(f"a value has at most {VALUE_BYTES_MAX} bytes")


class OwnerMaps(ABC):
    """Base of the three rules over owner logs. See the module."""

    kind: Kind
    is_checked = False
    """Are fingerprints compared? Only where content does not depend on when a node looks at its clock."""
    has_age = False
    """Do entries carry their age?"""
    keeps_lives = False
    """Do logs of several lives of one owner stand side by side?"""

    def __init__(self, name: str, home: Home, bytes_max: int, coalesce_s: float) -> None:
        self.name = name
        self.home = home
        self.bytes_max = bytes_max
        self.coalesce_s = coalesce_s
        self.life = home.life
        self.logs: dict[Source, OwnerLog] = {}
        self.lives = Lives(home)
        self.bytes = 0
        self.fresh: dict[Source, None] = {}
        self.due = math.inf
        self._asked: dict[Source, float] = {}
        self._encoded: tuple[tuple[object, ...], Frame, int] | None = None

    # ---- what the rules decide --------------------------------------------------------------------------

    @abstractmethod
    def changed(self, log: OwnerLog, key: bytes, old: bytes | None, new: bytes | None) -> None:
        """A key of another node's log has another value now (None: not there)."""

    def make_room(self, log: OwnerLog, growth: int, now: float) -> bool:
        """Drop something so that `growth` more bytes fit; False: refuse the entry."""
        return False

    def admits(self, key: bytes, value: bytes | None, now: float) -> bool:
        """May this entry of a peer be stored at all?"""
        return True

    @abstractmethod
    def life_begins(self, old: OwnerLog, now: float) -> None:
        """A newer life of this log's owner was seen."""

    def log_ends(self, log: OwnerLog) -> None:
        """The log is dropped: its owner left, or was forgotten."""
        for key, value in list(log.living()):
            self.changed(log, key, value, None)

    def housekeeping(self, now: float) -> None:
        """Expire, refresh, collect."""

    def next_housekeeping(self) -> float:
        """When `housekeeping` is due."""
        return math.inf

    # ---- own entries ------------------------------------------------------------------------------------

    @property
    def own(self) -> OwnerLog:
        """This node's own log, made on first use."""
        self.lives.set_own(self.life)
        return self._log((self.home.name, self.life), 0.0)

    def _log(self, source: Source, now: float) -> OwnerLog:
        log = self.logs.get(source)
        if log is None:
            log = self.logs[source] = OwnerLog(source[0], source[1], now)
        return log

    def write(self, key: bytes, value: bytes | None, now: float) -> None:
        """Set or delete an own entry. Raises BoundError (nothing changed) when it is too big or there is no room."""
        check_sizes(key, value)
        log = self.own
        old = log.entries.get(key)
        if value is None and (old is None or old.value is None):
            return
        entry = Entry(log.have + 1, value, now)
        if not self._fits(log, key, entry, now):
            raise BoundError(f"namespace {self.name} is full")
        log.have += 1
        self.bytes += log.set(key, entry)
        log.touched_s = now
        self.touch((log.owner, log.life), now)

    def _fits(self, log: OwnerLog, key: bytes, entry: Entry, now: float) -> bool:
        """Is there room for this entry, or was some made?"""
        growth = log.growth(key, entry)
        if growth <= 0 or self.bytes + growth <= self.bytes_max:
            return True
        # Asked again, because what had to go may be the entry that this one replaces.
        return self.make_room(log, growth, now) and self.bytes + log.growth(key, entry) <= self.bytes_max

    def clear_own(self, now: float) -> None:
        """Delete all own entries."""
        for key, _ in list(self.own.living()):
            self.write(key, None, now)

    def touch(self, source: Source, now: float) -> None:
        """This source has news for the peers."""
        self.fresh[source] = None
        self.due = min(self.due, now + self.coalesce_s)

    def outrank(self, life: int, now: float) -> None:
        """A former life of this node had a clock ahead of ours: continue as the next life after it."""
        log = self.logs.pop((self.home.name, self.life), None)
        forget_source(self.home, self.name, (self.home.name, self.life))
        self.life = life + 1
        self.home.count("outranked_lives")
        if log is not None:
            log.life = self.life
            self.logs[(self.home.name, self.life)] = log
        self.lives.set_own(self.life)
        if self.is_checked:
            # Peers learn of this life by its first version alone (membership cannot tell them its number), so it has
            # one even if its owner says nothing: or what the former life left behind would stand for ever.
            self.own.have = max(self.own.have, 1)
        self._encoded = None
        self.touch((self.home.name, self.life), now)

    # ---- vectors ----------------------------------------------------------------------------------------

    def vector(self, flags: int) -> Frame:
        """Our vector. Where entries expire, sources without a single entry are left out: there is nothing to fetch.
        Where they stand, an empty life of an impostor must come to the ears of the name's owner, who outranks it."""
        rows = tuple(
            Row(owner, life, log.have, self._mark(log))
            for (owner, life), log in self.logs.items()
            if log.entries or (log.have and (self.is_checked or owner == self.home.name))
        )
        return encode_body(Vector(self.name, self.kind, flags, rows))

    def _mark(self, log: OwnerLog) -> int:
        return (log.mark or 1) if self.is_checked and not log.is_truncated else 0

    def receive_vector(self, link: Link, vector: Vector, now: float) -> None:
        """Compare with a peer's vector: ask for what we lack, send what it lacks and may have of us."""
        may_push = self.home.is_relay or bool(vector.flags & PUSH)
        if not self.keeps_lives:
            self._own_rows(vector, now)
        mine = {
            source: Position(log.have, self._mark(log))
            for source, log in self.logs.items()
            if log.entries or log.have
        }
        comparison = compare(mine, vector.rows)
        for row in comparison.lacking:
            self._lacking(link, row, now)
        for source, have in comparison.behind:
            if source[0] == link.peer and have and not self.keeps_lives:
                # Its own log is shorter than what we have of it: ours is wrong, not the peer.
                self._ask(link, source, 0, RESET, now)
            elif (may_push or source[0] == self.home.name) and (have or self.logs[source].entries):
                if not have:
                    link.cursors.pop(source, None)
                link.add_pending(source)
        for row in comparison.differing:
            self._differing(link, row, now)
        for source, log in self.logs.items():
            if log.is_truncated and self.bytes < self.bytes_max * 0.9:
                self._ask(link, source, 0, RESET, now)
        for row in vector.rows:
            source = (row.owner, row.life)
            if source in self.logs and source not in link.resets:
                link.cursors[source] = row.have

    def _own_rows(self, vector: Vector, now: float) -> None:
        """What others have of us that we never said can only be of a former life."""
        for row in vector.rows:
            if row.owner == self.home.name and row.life >= self.life:
                has_more = row.life > self.life or row.have > self.own.have
                if has_more and self.home.is_credible(row.owner, row.life, now):
                    self.outrank(row.life, now)

    def _lacking(self, link: Link, row: Row, now: float) -> None:
        source = (row.owner, row.life)
        if row.owner == self.home.name and not self.keeps_lives:
            return
        if not self._is_welcome(source, now):
            return
        log = self.logs.get(source)
        self._ask(link, source, 0 if log is None else log.have, 0, now)

    def _differing(self, link: Link, row: Row, now: float) -> None:
        """Same version, other content. The owner is right; where it is not connected the higher mark is, on both
        sides, so that the two agree again."""
        source = (row.owner, row.life)
        log = self.logs[source]
        if row.owner == self.home.name or log.reset is not None:
            return
        if link.peer == row.owner or (not self.home.is_connected(row.owner) and row.mark > self._mark(log)):
            self.home.count("diverged_sources")
            self._ask(link, source, 0, RESET, now)

    def _is_welcome(self, source: Source, now: float) -> bool:
        """May this source of a peer be taken in?"""
        if source in self.logs:
            return True
        if self.lives.has_left(source) if self.keeps_lives else self.lives.is_old(source):
            return False
        if len(self.logs) >= self.home.settings.owners_max:
            self.home.count("refused_owners")
            return False
        return self.home.is_credible(*source, now)

    # ---- wants ------------------------------------------------------------------------------------------

    def _ask(self, link: Link, source: Source, since: int, flags: int, now: float) -> None:
        if self._asked.get(source, -math.inf) > now:
            return
        if len(self._asked) >= self.home.settings.owners_max:
            self._asked = {s: t for s, t in self._asked.items() if t > now}
            if len(self._asked) >= self.home.settings.owners_max:
                return
        self._asked[source] = now + self.home.settings.want_timeout_s
        link.add_want(source, since, flags)

    def receive_want(self, link: Link, want: Want, now: float) -> None:
        """The peer lacks what follows; send it."""
        for row in want.rows:
            source = (row.owner, row.life)
            if source in self.logs:
                link.cursors[source] = 0 if row.flags & RESET else row.since
                if row.flags & RESET:
                    link.resets.add(source)
                else:
                    link.resets.discard(source)
                link.add_pending(source)

    # ---- deltas out -------------------------------------------------------------------------------------

    def next_frame(self, link: Link, now: float) -> Frame | None:
        """The next frame for this peer, None if there is nothing (more) to say."""
        if link.wants:
            asked = list(link.wants)[:WANTS_PER_FRAME_MAX]
            rows = tuple(WantRow(s[0], s[1], *link.wants.pop(s)) for s in asked)
            return encode_body(Want(self.name, rows))
        while link.is_heard and link.pending:
            source = next(iter(link.pending))
            log = self.logs.get(source)
            frame = None if log is None else self._delta_frame(link, log, now)
            if frame is not None:
                return frame
            link.pending.pop(source, None)
        if link.vector:
            flags = PUSH if link.vector == PUSH_VECTOR else 0
            link.vector = 0
            return self.vector(flags)
        return None

    def _delta_frame(self, link: Link, log: OwnerLog, now: float) -> Frame | None:
        source = (log.owner, log.life)
        if log.is_truncated and log.owner != self.home.name:
            return None  # it would look whole at the peer
        since = link.cursors.get(source, 0)
        if since < log.floor and source not in link.resets:
            link.resets.add(source)
            since = 0
        is_reset = source in link.resets
        if since >= log.have and not is_reset:
            return None
        wanted = (source, since, log.have, is_reset, now if self.has_age else 0.0)
        if self._encoded is not None and self._encoded[0] == wanted:
            _, frame, upto = self._encoded
        else:
            frame, upto = encode_delta(
                self.name, log, since, is_reset=is_reset, has_age=self.has_age, now=now
            )
            self._encoded = (wanted, frame, upto)
        link.cursors[source] = upto
        if upto >= log.have:
            link.resets.discard(source)
            link.pending.pop(source, None)
        return frame

    # ---- deltas in --------------------------------------------------------------------------------------

    def receive_delta(self, link: Link, delta: Delta, now: float) -> None:
        """Apply what leaves no hole; ask for what is missing. Raises DecodeError with nothing changed."""
        entries = decode_delta(delta, has_age=self.has_age, now=now)
        source = (delta.owner, delta.life)
        if delta.owner == self.home.name and (not self.keeps_lives or delta.life == self.life):
            return
        if not self._is_welcome(source, now):
            return
        log = self.logs.get(source)
        if log is None:
            if delta.since and not delta.flags & RESET:
                self._ask(link, source, 0, 0, now)
                return
            log = self._begin(source, now)
        if delta.flags & RESET:
            self._reset_step(link, log, delta, entries, now)
            return
        if delta.since > log.have:
            self._ask(link, source, log.have, 0, now)
            return
        had = log.have
        for key, entry in entries:
            if entry.version > had:
                self._apply(log, key, entry, now)
        log.have = max(had, delta.upto)
        self._asked.pop(source, None)
        self._came(link, log, delta.upto, log.have > had, now)

    def _came(self, link: Link, log: OwnerLog, upto: int, is_news: bool, now: float) -> None:
        """Book what the peer has shown to have, and pass it on where we relay."""
        source = (log.owner, log.life)
        log.touched_s = now
        link.set_cursor_at_least(source, upto)
        if is_news and self.home.is_relay:
            self.touch(source, now)

    def _begin(self, source: Source, now: float) -> OwnerLog:
        self._heard_of(source, now)
        return self._log(source, now)

    def _heard_of(self, source: Source, now: float) -> None:
        """Raise the owner's latest life; the former one is over."""
        if self.keeps_lives:
            return
        former = self.lives.hear(source, self.logs)
        log = None if former is None else self.logs.get((source[0], former))
        if log is not None:
            self.retire(log, now)

    def retire(self, former: OwnerLog, now: float) -> None:
        """A newer life of its owner is here."""
        source = (former.owner, former.life)
        self.logs.pop(source, None)
        forget_source(self.home, self.name, source)
        self.life_begins(former, now)

    def _apply(self, log: OwnerLog, key: bytes, entry: Entry, now: float) -> bool:
        """Store one entry of a peer's log and tell; False if there was no room for it."""
        old = log.get(key)
        if not self.admits(key, entry.value, now):
            return True
        if not self._fits(log, key, entry, now):
            self.bytes -= log.drop(key)
            log.is_truncated = True
            self.home.count("refused_entries")
            if old is not None:
                self.changed(log, key, old, None)
            return False
        self.bytes += log.set(key, entry)
        if old != entry.value:
            self.changed(log, key, old, entry.value)
        return True

    def _reset_step(
        self, link: Link, log: OwnerLog, delta: Delta, entries: list[tuple[bytes, Entry]], now: float
    ) -> None:
        """One part of a whole map. Old entries stay visible until the last part shows which are gone."""
        if delta.flags & FIRST:
            log.reset = ResetState(link.peer)
        state = log.reset
        if state is None or state.peer != link.peer or state.next_since != delta.since:
            log.reset = None
            self._asked.pop((log.owner, log.life), None)
            self._ask(link, (log.owner, log.life), 0, RESET, now)
            return
        for key, entry in entries:
            state.seen.add(key)
            known = log.entries.get(key)
            if known is None or known.version < entry.version or link.peer == log.owner:
                state.has_refused |= not self._apply(log, key, entry, now)
        log.sort()
        state.next_since = delta.upto
        self._asked[(log.owner, log.life)] = now + self.home.settings.want_timeout_s
        if delta.flags & LAST:
            self._reset_ends(link, log, state, delta.upto, now)

    def _reset_ends(self, link: Link, log: OwnerLog, state: ResetState, upto: int, now: float) -> None:
        is_from_owner = link.peer == log.owner
        extra = [
            (key, entry.value)
            for key, entry in log.entries.items()
            if key not in state.seen and (is_from_owner or entry.version <= upto)
        ]
        for key, value in extra:
            self.bytes -= log.drop(key)
            if value is not None:
                self.changed(log, key, value, None)
        had = log.have
        log.have = upto if is_from_owner else max(had, upto)
        # What the sender has forgotten we cannot know either: whoever is older must take the whole map from us.
        log.floor = max(log.floor, upto)
        log.reset = None
        log.is_truncated = state.has_refused
        self._asked.pop((log.owner, log.life), None)
        self._came(link, log, upto, True, now)

    def peer_down(self, peer: str) -> None:
        """Resets from this peer will not be finished."""
        for log in self.logs.values():
            if log.reset is not None and log.reset.peer == peer:
                log.reset = None

    # ---- owners -----------------------------------------------------------------------------------------

    def owner_died(self, owner: str, life: int, now: float) -> None:
        """Nothing goes unless the rule says so; but a life that died has lived, and ended the ones before."""
        self.owner_restarted(owner, life, now)

    def owner_restarted(self, owner: str, life: int, now: float) -> None:
        """Begin the newer life, so that the former one's entries go in time even if it says nothing."""
        if owner != self.home.name and self.home.is_credible(owner, life, now):
            self._heard_of((owner, life), now)

    def owner_left(self, owner: str, life: int, now: float) -> None:
        """Drop this and earlier lives and refuse them from now on."""
        if owner == self.home.name:
            return
        self.lives.leave(owner, life)
        for source in [s for s in self.logs if s[0] == owner and s[1] <= life]:
            self.drop_log(source)

    def owner_forgotten(self, owner: str, now: float) -> None:
        """Drop all that is known of this name, and refuse its lives so far: a peer that forgets it a moment later
        would bring it back, and then nobody would ever forget it."""
        life = max((s[1] for s in self.logs if s[0] == owner), default=None)
        if life is not None:
            self.owner_left(owner, life, now)

    def drop_log(self, source: Source) -> None:
        """Forget a source; what was alive in it is told as removed."""
        log = self.logs.pop(source)
        self.bytes -= log.bytes
        self.fresh.pop(source, None)
        forget_source(self.home, self.name, source)
        self.log_ends(log)

    # ---- the rest ---------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Hand what is fresh to the links."""
        fresh, self.fresh = self.fresh, {}
        self.due = math.inf
        for link in self.home.links_of(self.name):
            for source in fresh:
                link.add_pending(source)

    def deadline(self) -> float:
        """When `tick` is due."""
        return min(self.due, self.next_housekeeping())

    def tick(self, now: float) -> None:
        """Flush and keep house when due."""
        if now >= self.next_housekeeping():
            self.housekeeping(now)
        if now >= self.due:
            self.flush()

    def digest(self) -> int:
        """64 bits over what is alive."""
        total = 0
        for log in self.logs.values():
            if log.alive:
                total ^= sealed_fingerprint(log.owner, log.life, log.mark)
        return total

    def stats(self) -> dict[str, int]:
        """Sizes."""
        return {
            "entries": sum(log.alive for log in self.logs.values()),
            "bytes": self.bytes,
            "sources": len(self.logs),
        }
