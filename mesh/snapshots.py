"""Snapshots of delta streams: who is served, what is fetched, at which pace.

Owns the sessions: one inbound, two outbound, chunks of 64 KiB at most, all outbound together below a pace. It must
never look into a chunk. What a snapshot means for a stream's position is decided by `delta_streams`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mesh.digest import Source
from mesh.home import Home
from mesh.namespace import VALUE_BYTES_MAX
from mesh.records import FIRST, LAST, LOST, Snap, SnapWant

NEEDS_MAX = 256
"""Snapshots this node knows it needs; vectors bring back what is dropped beyond it."""

FRAME_BYTES = 80
"""Of a chunk's frame besides the chunk, for the pace."""

Need = tuple[Source, bytes | None]


class Outbound:
    """One snapshot on its way to a peer, one chunk read ahead so that the last is known as such."""

    __slots__ = ("_chunks", "_next", "at", "index", "source", "want")

    def __init__(self, want: SnapWant, at: int, chunks: Iterator[bytes]) -> None:
        self.want = want
        self.source: Source = (want.owner, want.life)
        self.at = at
        self.index = 0
        self._chunks = chunks
        self._next = next(chunks, b"")

    def next_snap(self) -> Snap:
        """The next chunk as a body."""
        chunk = self._next
        assert len(chunk) <= VALUE_BYTES_MAX, "a snapshot chunk has at most VALUE_BYTES_MAX bytes"
        following = next(self._chunks, None)
        flags = (FIRST if self.index == 0 else 0) | (LAST if following is None else 0)
        want = self.want
        snap = Snap(
            want.namespace, want.owner, want.life, want.key, want.ticket, self.at, flags, self.index, chunk
        )
        self.index += 1
        self._next = following or b""
        return snap


class Inbound:
    """The one snapshot being fetched."""

    __slots__ = ("key", "next_index", "peer", "source", "ticket", "until_s")

    def __init__(self, need: Need, peer: str, ticket: int, until_s: float) -> None:
        self.source, self.key = need
        self.ticket = ticket
        self.peer = peer
        self.next_index = 0
        self.until_s = until_s


class Snapshots:
    """Sessions of one stream namespace."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.needs: dict[Need, str] = {}
        """What to fetch from whom, in order."""
        self.inbound: Inbound | None = None
        self._ticket = 0
        self._tickets: dict[str, int] = {}
        """The last ticket of each connected peer."""
        self.requests: dict[str, SnapWant] = {}
        """Peers waiting to be served: one request each, the latest."""
        self.outbound: dict[str, Outbound] = {}
        self.pace_s = -math.inf
        """No chunk goes out before this time."""
        self.is_woken = False
        """The links of outbound sessions know that a chunk may go; nothing more is due until one went."""

    # ---- fetching ---------------------------------------------------------------------------------------

    def need(self, source: Source, key: bytes | None, peer: str) -> None:
        """A snapshot is needed. A whole one covers those of single keys."""
        if self.is_needed(source, key):
            return
        if key is None:
            for other in [n for n in self.needs if n[0] == source]:
                del self.needs[other]
        if len(self.needs) < NEEDS_MAX:
            self.needs[(source, key)] = peer

    def is_needed(self, source: Source, key: bytes | None = None) -> bool:
        """Is this (or a whole one of the source) wanted or on its way?"""
        current = self.inbound
        if current is not None and current.source == source and current.key in (None, key):
            return True
        return (source, None) in self.needs or (source, key) in self.needs

    def start(self, namespace: str, now: float) -> tuple[str, SnapWant] | None:
        """Begin the next fetch if none is running: whom to ask, and the question."""
        while self.inbound is None and self.needs:
            need = next(iter(self.needs))
            peer = self.needs.pop(need)
            if self._home.is_connected(peer):
                self._ticket += 1
                self.inbound = Inbound(need, peer, self._ticket, now + self._home.settings.snapshot_idle_s)
                (owner, life), key = need
                return peer, SnapWant(namespace, owner, life, key, self._ticket)
        return None

    def expire(self, now: float) -> None:
        """Give up a fetch that stands still; the next vector asks again."""
        if self.inbound is not None and self.inbound.until_s <= now:
            self.inbound = None
            self._home.count("abandoned_snapshots")

    def accept(self, peer: str, snap: Snap, now: float) -> bool:
        """Is this the chunk we wait for? When one is missing (no stream loses any) the fetch stands still and is given
        up in time; asking again at once could turn into a storm of questions."""
        current = self.inbound
        if current is None or (current.peer, current.source, current.key) != (
            peer,
            (snap.owner, snap.life),
            snap.key,
        ):
            return False
        if snap.flags & LOST:
            return True
        if snap.index != current.next_index:
            return False
        current.next_index += 1
        current.until_s = now + self._home.settings.snapshot_idle_s
        return True

    # ---- serving ----------------------------------------------------------------------------------------

    def request(self, peer: str, want: SnapWant) -> None:
        """A peer asks; what it asked before is void, it fetches one at a time and its tickets rise."""
        if want.ticket <= self._tickets.get(peer, 0):
            return
        self._tickets[peer] = want.ticket
        self.outbound.pop(peer, None)
        self.requests[peer] = want

    def may_begin(self) -> bool:
        """Is there room for one more outbound session?"""
        return len(self.outbound) < self._home.settings.snapshots_out_max

    def spend(self, chunk_bytes: int, now: float) -> None:
        """Book a chunk on the pace."""
        cost_s = (chunk_bytes + FRAME_BYTES) / self._home.settings.snapshot_bytes_per_s
        self.pace_s = max(self.pace_s, now) + cost_s
        self.is_woken = False

    # ---- the rest ---------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """When a chunk may go out, a fetch can begin, or one has stood still too long."""
        if self.needs and self.inbound is None:
            return -math.inf
        serve = self.pace_s if self.outbound and not self.is_woken else math.inf
        return min(serve, math.inf if self.inbound is None else self.inbound.until_s)

    def peer_down(self, peer: str) -> None:
        """Nothing more comes from or goes to this peer."""
        self._tickets.pop(peer, None)
        self.requests.pop(peer, None)
        self.outbound.pop(peer, None)
        self.needs = {need: other for need, other in self.needs.items() if other != peer}
        if self.inbound is not None and self.inbound.peer == peer:
            self.inbound = None

    def forget(self, source: Source) -> None:
        """The source is gone."""
        self.needs = {need: peer for need, peer in self.needs.items() if need[0] != source}
        self.requests = {
            peer: want for peer, want in self.requests.items() if (want.owner, want.life) != source
        }
        self.outbound = {peer: session for peer, session in self.outbound.items() if session.source != source}
        if self.inbound is not None and self.inbound.source == source:
            self.inbound = None
