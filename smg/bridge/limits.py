"""Limits that hold for the mesh as a whole: carries the words of `tenancy.shares` between the nodes.

Owns the namespace (each node's last word on each limit that is being divided) and the reading of the mesh's membership into who
is there, who has gone, and who may be serving beyond a cut. A member that is dead has gone when its port refuses (its process
ended), when it left, or when it was silent for ten minutes; before that it may be on the other side of a partition, and what it
held stays its own. How limits are divided is not decided here, and no request ever waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from mesh import BoundError, Change, Member, Put, Removed, State, Status
from smg.bridge import words
from smg.bridge.words import REF_BYTES, VERSION, Share
from smg.tenancy.admission import RATE_KEY
from smg.tenancy.share_book import Gift, Peer, Told
from smg.tenancy.shares import FLOOR, LimitSource, Row, Shares

LIMITS = "limits"
SILENT_MAX_S = 600.0
"""A silent member has gone after this; as long as the mesh's own memory of a partition (`mesh.partition`)."""
NODES_REMEMBERED = 8192
"""Lives of nodes whose references are kept: twice the largest member table."""


def life_ref(name: str, boot: bytes) -> Peer:
    """One life of a node in 8 bytes."""
    return xxhash.xxh3_64_digest(boot + name.encode())[:REF_BYTES]


class SharedLimits:
    """See the module. Rooms with limits are added before the node runs; until it is in the mesh they give out the floor."""

    def __init__(self, state: State, mode: str) -> None:
        self._state = state
        self._mode = mode
        self._sources: list[LimitSource] = []
        self._shares: Shares | None = None
        self._outside = FLOOR  # the part of a limit that this node gives out while it is in no mesh
        self._refs: dict[tuple[str, bytes], Peer] = {}
        self._names: dict[Peer, str] = {}
        self._tellers: dict[tuple[str, bytes], Peer] = {}  # (owner, key) → the life that told last
        self.garbage = 0

    def add(self, source: LimitSource, now: float) -> None:
        """Share the limits of a room."""
        assert self._shares is None, "rooms are added before the node runs"
        self._sources.append(source)
        for limit in source.buckets():
            limit.set_share(now, FLOOR)

    def first(self, key: bytes, now: float) -> tuple[float, float]:
        """What a bucket begins with that is made now: its part of the limit, and its balance in parts of a full bucket."""
        return (self._outside, self._outside) if self._shares is None else self._shares.first(key, now)

    # -- the life of this node

    def begin(self, name: str, boot: bytes, now: float) -> None:
        """This node has an address and looks for the others."""
        self._shares = Shares(self._ref(name, boot), self._sources, self._mode, 0, now)
        for owner, key, value in list(self._state.items(LIMITS)):
            if owner != name:
                self.on_change(Put(LIMITS, owner, key, value), now)

    def step(self, members: Sequence[Member], is_refusing: Callable[[str], bool], now: float) -> None:
        """The beat, ten times a second. `members` are all others that the mesh knows, dead ones too."""
        shares = self._shares
        if shares is None:
            return
        live: list[Peer] = []
        silent: list[Peer] = []
        for member in members:
            if member.is_live:
                live.append(self._ref(member.name, member.record.boot))
            elif (
                member.status is Status.DEAD
                and now - member.since_s < SILENT_MAX_S
                and not is_refusing(member.name)
            ):
                silent.append(self._ref(member.name, member.record.boot))
        shares.meet(live, silent, now)
        for key, told in shares.step(now):
            self._tell(key, told)

    def end(self, now: float) -> None:
        """This node is in no mesh any more, or never was; it goes on serving."""
        if self._shares is None:
            self._shares = Shares(b"", self._sources, self._mode, 0, now)
        self._shares.end(now)
        self._outside = self._shares.even
        self._shares = None

    def _tell(self, key: bytes, told: Told | None) -> None:
        assert self._shares is not None, "who has not begun tells nothing"
        if told is None:
            self._state.remove(LIMITS, key)
            return
        share = Share(
            VERSION,
            self._shares.me,
            told.epoch,
            told.demand,
            told.held,
            told.refill_s,
            told.view,
            told.gifts,
        )
        try:
            self._state.put(LIMITS, key, words.encode(share))
        except BoundError:
            self._shares.was_not_told(key)

    # -- what others tell

    def on_change(self, change: Change, now: float) -> None:
        """A peer's word came or went."""
        shares = self._shares
        if shares is None:
            return
        if isinstance(change, Put):
            share = words.read_share(change.value)
            if share is None:
                self.garbage += 1
                return
            before = self._tellers.get((change.owner, change.key))
            if before is not None and before != share.teller:
                shares.hear_end(before, change.key)
            self._tellers[change.owner, change.key] = share.teller
            self._names[share.teller] = change.owner
            gifts = tuple(Gift(*gift) for gift in share.gifts)
            told = Told(share.epoch, share.demand, share.held, share.refill_s, share.view, gifts)
            shares.hear(share.teller, change.key, told, now)
        elif isinstance(change, Removed):
            teller = self._tellers.pop((change.owner, change.key), None)
            if teller is not None:
                shares.hear_end(teller, change.key)

    # -- for those who look

    @property
    def divided(self) -> int:
        """Limits that are being divided by demand now."""
        return 0 if self._shares is None else self._shares.books

    def rate(self) -> Row | None:
        """The gateway's request rate, while it is being divided."""
        return None if self._shares is None else self._shares.row(RATE_KEY)

    @property
    def even(self) -> float:
        """This node's part of a limit that is not being divided."""
        return self._outside if self._shares is None else self._shares.even

    def document(self) -> dict[str, Any]:
        """The document of `GET /mesh/limits`."""
        rows = [] if self._shares is None else list(self._shares.rows())
        return {
            "partition_limits": self._mode,
            "even_share": round(self.even, 6),
            "limits": [self._shown(row) for row in sorted(rows, key=lambda row: row.ref)],
            "total": len(rows),
        }

    def _shown(self, row: Row) -> dict[str, Any]:
        return {
            "limit": row.ref.decode("utf-8", "backslashreplace").replace("\0", "/"),
            "share": round(row.fraction, 6),
            "held": round(row.held, 6),
            "demand": round(row.demand, 4),
            "nodes": dict(self._nodes(row)),
        }

    def _nodes(self, row: Row) -> Iterator[tuple[str, dict[str, float]]]:
        for peer, (demand, held) in row.peers.items():
            yield self._names.get(peer, peer.hex()), {"held": round(held, 6), "demand": round(demand, 4)}

    def _ref(self, name: str, boot: bytes) -> Peer:
        ref = self._refs.get((name, boot))
        if ref is None:
            if len(self._refs) >= NODES_REMEMBERED:
                self._refs.clear()
                self._names.clear()
            ref = self._refs[name, boot] = life_ref(name, boot)
            self._names[ref] = name
        return ref
