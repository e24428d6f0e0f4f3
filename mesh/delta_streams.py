"""Ordered delta streams, one per origin: every node delivers each origin's payloads in order.

Owns the positions in all streams, the repair of gaps (from the ring of whoever has it, else by a snapshot) and the
checking of the producer's fingerprints, which finds what went wrong silently. It must never look into a payload.

Where all pairs are connected only the producer sends, and only its ring is filled; with relaying every node keeps
rings of all origins and passes on what is new to it.
"""

from __future__ import annotations

import math
from functools import partial

from mesh.digest import Row, Source, sealed_fingerprint
from mesh.errors import BoundError, DecodeError
from mesh.frames import FRAME_BYTES_MAX, Frame
from mesh.home import Home, forget_source
from mesh.link import PUSH_VECTOR, Link
from mesh.lives import Lives
from mesh.namespace import VALUE_BYTES_MAX, Appended, Ended, Lost, Restarted, Restored, Stream
from mesh.owner_maps import WANTS_PER_FRAME_MAX
from mesh.owner_records import DELTA_BYTES_MAX
from mesh.records import (
    FIRST,
    LAST,
    LOST,
    PUSH,
    Delta,
    Kind,
    Snap,
    SnapWant,
    Vector,
    Want,
    WantRow,
    checked_entry,
    encode_body,
    keep_tail,
    with_tail,
)
from mesh.snapshots import Outbound, Snapshots
from mesh.stream_log import Item, StreamLog

KEYS_REPAIRED_MAX = 64
"""Diverged keys of one origin that are fetched one by one; with more the whole is fetched."""

KEY_ROWS_BYTES_MAX = 256 * 1024
"""Fingerprints that take more than this are not announced: with the rows of all owners they must fit one frame."""

KEY_ROW_BYTES = 24
"""A fingerprint beside its key."""


class DeltaStreams:
    """See the module."""

    kind = Kind.STREAM

    def __init__(self, namespace: Stream, home: Home, now: float) -> None:
        self.name = namespace.name
        self.home = home
        self.bytes_max = namespace.bytes_max
        self.ring_bytes_max = namespace.ring_bytes_max
        self.coalesce_s = namespace.coalesce_s
        self.source = namespace.source
        self.life = home.life
        self.logs: dict[Source, StreamLog] = {}
        self.lives = Lives(home)
        self.bytes = 0
        self.fresh: dict[Source, None] = {}
        self.due = math.inf
        self.snapshots = Snapshots(home)
        self._dead: set[str] = set()
        """Owners whose latest life is dead; a subset of `lives`."""
        self._asked: dict[Source, float] = {}
        self._encoded: tuple[tuple[object, ...], Frame, int] | None = None
        self._own = self._log((home.name, self.life))
        self.lives.set_own(self.life)

    # ---- what users do ----------------------------------------------------------------------------------

    def append(self, payload: bytes, now: float) -> int:
        """Append to the own stream; the sequence number. Raises BoundError (nothing changed) when too long."""
        if len(payload) > VALUE_BYTES_MAX:
            raise BoundError(f"a payload has at most {VALUE_BYTES_MAX} bytes")
        log = self._own
        self._keep(log, payload)
        self.touch((log.owner, log.life), now)
        return log.have

    def touch(self, source: Source, now: float) -> None:
        """This source has news for the peers."""
        self.fresh[source] = None
        if now + self.coalesce_s < self.due:
            self.due = now + self.coalesce_s

    def _keep(self, log: StreamLog, item: Item) -> None:
        """Append to a ring; the rings of others give way first, then its own oldest."""
        before = log.bytes
        log.append(item, is_kept=True)
        if log.bytes > self.ring_bytes_max:
            log.trim(self.ring_bytes_max)
        self.bytes += log.bytes - before
        # Over the cap, make room for a while: the search below looks at every log.
        target = self.bytes_max * 15 // 16 if self.bytes > self.bytes_max else self.bytes
        while self.bytes > target:
            fullest = max(self.logs.values(), key=lambda one: (one is not self._own, one.bytes))
            if not fullest.bytes:
                fullest = self._own
            before = fullest.bytes
            fullest.drop_oldest()
            self.bytes += fullest.bytes - before

    def _log(self, source: Source) -> StreamLog:
        log = self.logs[source] = StreamLog(*source)
        return log

    def outrank(self, life: int, now: float) -> None:
        """A former life of this node had a clock ahead of ours: continue as the next life after it."""
        del self.logs[(self.home.name, self.life)]
        self._forget_everywhere((self.home.name, self.life))
        self.life = self._own.life = life + 1
        self.lives.set_own(self.life)
        self.logs[(self.home.name, self.life)] = self._own
        self._encoded = None
        self.home.count("outranked_lives")
        self.touch((self.home.name, self.life), now)

    def _forget_everywhere(self, source: Source) -> None:
        forget_source(self.home, self.name, source)
        self.snapshots.forget(source)

    # ---- vectors ----------------------------------------------------------------------------------------

    def vector(self, flags: int) -> Frame:
        """Our vector; with the fingerprints of our own stream, because only a producer's word counts."""
        rows: list[Row] = []
        for (owner, life), log in self.logs.items():
            keys: tuple[tuple[bytes, int, int], ...] = ()
            if log is self._own and self.source is not None:
                keys = tuple(self.source.fingerprints(owner))
                if sum(len(key) + KEY_ROW_BYTES for key, _, _ in keys) > KEY_ROWS_BYTES_MAX:
                    keys = ()
            if log.have or log is self._own:
                rows.append(Row(owner, life, log.have, log.first, keys))
        frame = encode_body(Vector(self.name, self.kind, flags, tuple(rows)))
        assert len(frame.body) < FRAME_BYTES_MAX
        return frame

    def receive_vector(self, link: Link, vector: Vector, now: float) -> None:
        """Compare with a peer's vector: ask for what we lack, send what it lacks and may have of us."""
        listed: set[Source] = set()
        for row in vector.rows:
            source = (row.owner, row.life)
            listed.add(source)
            if row.owner == self.home.name:
                if row.life > self.life or (row.life == self.life and row.have > self._own.have):
                    if self.home.is_credible(row.owner, row.life, now):
                        self.outrank(row.life, now)
                    continue
            elif not self._is_welcome(source, now):
                continue
            log = self.logs.get(source)
            have = 0 if log is None else log.have
            if row.have > have:
                self._lacking(link, row, have, now)
            elif log is not None:
                link.cursors[source] = row.have
                if row.have < have and (log is self._own or self.home.is_relay):
                    link.add_pending(source)
                elif row.have == have and row.owner == link.peer and row.keys and self.source is not None:
                    self.home.when_told(partial(self._check, row))
        for source, log in self.logs.items():
            if source not in listed and log.have and (log is self._own or self.home.is_relay):
                link.cursors.pop(source, None)
                link.add_pending(source)

    def _lacking(self, link: Link, row: Row, have: int, now: float) -> None:
        """They have more: take it from the producer if we hear it, else from whoever tells."""
        source = (row.owner, row.life)
        if row.owner != link.peer and not self.home.is_relay and not self._may_ask_others(row.owner, have):
            return
        if have + 1 >= row.mark:
            self._ask(link, source, have, now)
        else:
            self._need(source, None, link.peer, now)

    def _may_ask_others(self, owner: str, have: int) -> bool:
        """The producer repairs better, by range. Others have only a whole snapshot where nothing is relayed, so they
        are asked when it is dead, or once by a newcomer."""
        return not self.home.is_connected(owner) and (not have or owner in self._dead)

    def _check(self, row: Row) -> None:
        """All deltas up to the vector have been handed out: compare what the user knows with the producer's word."""
        source = (row.owner, row.life)
        log = self.logs.get(source)
        if log is None or log.have != row.have or self.source is None or self.snapshots.is_needed(source):
            return
        mine = {key: (count, xor) for key, count, xor in self.source.fingerprints(row.owner)}
        theirs = {key: (count, xor) for key, count, xor in row.keys}
        wrong = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
        if not wrong:
            return
        self.home.count("diverged_keys", len(wrong))
        if len(wrong) > KEYS_REPAIRED_MAX:
            self.snapshots.need(source, None, row.owner)
        else:
            for key in sorted(wrong):
                self.snapshots.need(source, key, row.owner)

    def _is_welcome(self, source: Source, now: float) -> bool:
        if source in self.logs:
            return True
        if self.lives.is_old(source):
            return False
        if len(self.logs) >= self.home.settings.owners_max:
            self.home.count("refused_owners")
            return False
        return self.home.is_credible(*source, now)

    # ---- wants ------------------------------------------------------------------------------------------

    def _ask(self, link: Link, source: Source, since: int, now: float) -> None:
        if self._asked.get(source, -math.inf) > now or self.snapshots.is_needed(source):
            return
        if len(self._asked) >= self.home.settings.owners_max:
            self._asked = {s: t for s, t in self._asked.items() if t > now}
            if len(self._asked) >= self.home.settings.owners_max:
                return
        self._asked[source] = now + self.home.settings.want_timeout_s
        link.add_want(source, since, 0)

    def receive_want(self, link: Link, want: Want, now: float) -> None:
        """The peer lacks what follows; send it."""
        for row in want.rows:
            source = (row.owner, row.life)
            if source in self.logs:
                link.cursors[source] = row.since
                link.add_pending(source)

    # ---- frames out -------------------------------------------------------------------------------------

    def next_frame(self, link: Link, now: float) -> Frame | None:
        """The next frame for this peer. Deltas go before the vector, so that it finds their reader up to date."""
        if link.wants:
            asked = list(link.wants)[:WANTS_PER_FRAME_MAX]
            rows = tuple(WantRow(s[0], s[1], *link.wants.pop(s)) for s in asked)
            return encode_body(Want(self.name, rows))
        while link.is_heard and link.pending:
            source = next(iter(link.pending))
            log = self.logs.get(source)
            frame = None if log is None else self._delta_frame(link, log)
            if frame is not None:
                return frame
            link.pending.pop(source, None)
        if link.vector:
            flags = PUSH if link.vector == PUSH_VECTOR else 0
            link.vector = 0
            return self.vector(flags)
        if link.snap_want is not None:
            want, link.snap_want = link.snap_want, None
            return encode_body(want)
        return self._snap_frame(link, now)

    def _delta_frame(self, link: Link, log: StreamLog) -> Frame | None:
        source = (log.owner, log.life)
        since = link.cursors.get(source, 0)
        flags = 0
        if since + 1 < log.first:
            flags, since = LOST, log.first - 1
        if since >= log.have and not flags:
            return None
        wanted = (source, since, log.have, flags)
        if self._encoded is not None and self._encoded[0] == wanted:
            _, frame, upto = self._encoded
        else:
            items = [
                item if isinstance(item, bytes) else with_tail([item[0]], item[1])
                for item in log.after(since, DELTA_BYTES_MAX)
            ]
            upto = since + len(items)
            frame = encode_body(Delta(self.name, log.owner, log.life, since, upto, flags, items))
            self._encoded = (wanted, frame, upto)
        link.cursors[source] = upto
        if upto >= log.have:
            link.pending.pop(source, None)
        return frame

    def _snap_frame(self, link: Link, now: float) -> Frame | None:
        peer = link.peer
        if peer in self.snapshots.requests and self.snapshots.may_begin():
            if self.home.has_untold:
                # The user's state is behind our position; a snapshot would promise more than it holds.
                self.home.when_told(link.wake)
                return None
            want = self.snapshots.requests.pop(peer)
            log = self.logs.get((want.owner, want.life))
            if log is None:
                return None
            chunks = None if self.source is None else self.source.snapshot(want.owner, want.key)
            if chunks is None:
                at = log.first - 1
                return encode_body(
                    Snap(self.name, want.owner, want.life, want.key, want.ticket, at, LOST, 0, b"")
                )
            self.snapshots.outbound[peer] = Outbound(want, log.have, chunks)
        session = self.snapshots.outbound.get(peer)
        if session is None or now < self.snapshots.pace_s:
            return None
        snap = session.next_snap()
        self.snapshots.spend(len(snap.chunk), now)
        if snap.flags & LAST:
            del self.snapshots.outbound[peer]
            self._wake_requests()
        return encode_body(snap)

    def _wake_requests(self) -> None:
        for peer in self.snapshots.requests:
            if peer in self.home.links:
                self.home.links[peer][self.name].wake()

    # ---- frames in --------------------------------------------------------------------------------------

    @staticmethod
    def _decode(delta: Delta) -> list[Item]:
        """Payloads, with what a newer version put behind them. Raises DecodeError with nothing changed."""
        items: list[Item] = []
        for item in delta.entries:
            tail = b""
            if type(item) is not bytes:
                item, tail = checked_entry(item, 1)[0], keep_tail(item, 1)
            if type(item) is not bytes or len(item) > VALUE_BYTES_MAX:
                raise DecodeError("stream payload")
            items.append((item, tail) if tail else item)
        if delta.upto - delta.since != len(delta.entries):
            raise DecodeError("a stream delta has one payload per sequence number")
        return items

    def receive_delta(self, link: Link, delta: Delta, now: float) -> None:
        """Deliver what comes next; repair a gap. Raises DecodeError."""
        items = self._decode(delta)
        source = (delta.owner, delta.life)
        if delta.owner == self.home.name or not self._is_welcome(source, now):
            return
        log = self.logs.get(source) or self._begin(source)
        if delta.since > log.have:
            if delta.flags & LOST:
                self._need(source, None, link.peer, now)
            else:
                self._ask(link, source, log.have, now)
            return
        self._asked.pop(source, None)
        had = log.have
        for item in items[had - delta.since :]:
            if self.home.is_relay:
                self._keep(log, item)
            else:
                before = log.bytes
                log.append(item, is_kept=False)
                self.bytes += log.bytes - before
            payload = item if isinstance(item, bytes) else item[0]
            self.home.tell(Appended(self.name, log.owner, log.have, payload))
        link.set_cursor_at_least(source, delta.upto)
        if log.have > had and self.home.is_relay:
            self.touch(source, now)

    def _begin(self, source: Source) -> StreamLog:
        """The first word of a life; the former one is over."""
        self._heard_of(source)
        return self.logs.get(source) or self._log(source)

    def _heard_of(self, source: Source) -> None:
        """Raise the owner's latest life; the former one is over, its positions are of no more use to anyone."""
        owner = source[0]
        former = self.lives.hear(source, self.logs)
        if former is None:
            return
        self._dead.discard(owner)
        if (owner, former) in self.logs:
            self._drop((owner, former))
            self.home.tell(Restarted(self.name, owner))

    def _drop(self, source: Source) -> None:
        self.bytes -= self.logs.pop(source).bytes
        self.fresh.pop(source, None)
        self._forget_everywhere(source)

    def receive_snap_want(self, link: Link, want: SnapWant, now: float) -> None:
        """Serve a snapshot when it is its turn."""
        if (want.owner, want.life) in self.logs:
            self.snapshots.request(link.peer, want)
            link.wake()

    def _need(self, source: Source, key: bytes | None, peer: str, now: float) -> None:
        if source not in self.logs:
            self._begin(source)
        self.snapshots.need(source, key, peer)
        self._fetch(now)

    def _fetch(self, now: float) -> None:
        begun = self.snapshots.start(self.name, now)
        if begun is not None:
            peer, want = begun
            link = self.home.links[peer][self.name]
            link.snap_want = want
            link.wake()

    def receive_snap(self, link: Link, snap: Snap, now: float) -> None:
        """Hand a chunk to the user; after the last go on with the deltas that follow."""
        source = (snap.owner, snap.life)
        log = self.logs.get(source)
        if log is None or not self.snapshots.accept(link.peer, snap, now):
            self._fetch(now)
            return
        if snap.flags & LOST:
            self.home.count("declined_snapshots")
            self.home.tell(Lost(self.name, snap.owner))
        else:
            is_first, is_last = bool(snap.flags & FIRST), bool(snap.flags & LAST)
            self.home.tell(Restored(self.name, snap.owner, snap.key, snap.chunk, is_first, is_last))
            if not is_last:
                return
        self.snapshots.inbound = None
        self._jump(log, snap)
        if self.home.is_relay:
            self.touch(source, now)
        self._asked.pop(source, None)
        self._ask(link, source, log.have, now)
        self._fetch(now)

    def _jump(self, log: StreamLog, snap: Snap) -> None:
        """Go on after the snapshot: forward over what it holds, and back to what it may lack, because deltas from a
        faster path were delivered before it and its first chunk has undone them."""
        is_forward = snap.key is None and snap.at > log.have
        is_back = snap.at < log.have and not snap.flags & LOST
        if is_forward or is_back:
            self.bytes -= log.bytes
            log.jump(snap.at)

    # ---- owners -----------------------------------------------------------------------------------------

    def peer_down(self, peer: str) -> None:
        """Snapshots from and to this peer are over."""
        self.snapshots.peer_down(peer)
        self._wake_requests()

    def owner_died(self, owner: str, life: int, now: float) -> None:
        """What it has announced stays true; from now on others may be asked for it."""
        self.owner_restarted(owner, life, now)
        if owner != self.home.name and 0 <= self.lives.latest(owner) <= life:
            self._dead.add(owner)

    def peer_up(self, peer: str) -> None:
        """It lives."""
        self._dead.discard(peer)

    def owner_restarted(self, owner: str, life: int, now: float) -> None:
        """The former life is over."""
        if owner != self.home.name and self.home.is_credible(owner, life, now):
            self._heard_of((owner, life))

    def owner_left(self, owner: str, life: int, now: float) -> None:
        """Nothing more will come from this life and earlier ones."""
        if owner == self.home.name:
            return
        self.lives.leave(owner, life)
        self._dead.discard(owner)
        current = self.lives.latest(owner)
        if current <= life and (owner, current) in self.logs:
            self._drop((owner, current))
            self.home.tell(Ended(self.name, owner))

    def owner_forgotten(self, owner: str, now: float) -> None:
        """As if it had left."""
        current = self.lives.latest(owner)
        if current >= 0:
            self.owner_left(owner, current, now)

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
        return min(self.due, self.snapshots.deadline())

    def tick(self, now: float) -> None:
        """Flush, pace and fetch when due."""
        if now >= self.due:
            self.flush()
        if now >= self.snapshots.deadline():
            self.snapshots.expire(now)
            self._fetch(now)
            if now >= self.snapshots.pace_s:
                self.snapshots.is_woken = True
                for peer in self.snapshots.outbound:
                    self.home.links[peer][self.name].wake()

    def digest(self) -> int:
        """64 bits over the positions in all streams."""
        total = 0
        for (owner, life), log in self.logs.items():
            if log.have:
                total ^= sealed_fingerprint(owner, life, log.have)
        return total

    def stats(self) -> dict[str, int]:
        """Sizes."""
        return {
            "entries": sum(log.have + 1 - log.first for log in self.logs.values()),
            "bytes": self.bytes,
            "sources": len(self.logs),
            "snapshots_out": len(self.snapshots.outbound),
        }
