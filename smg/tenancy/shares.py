"""The limits of a cluster at one of its nodes: which part of each this node gives out, by what is asked of whom.

Owns the measurement of demand, the life of a limit's book (made when somebody asks, gone when nobody has asked for a while and
all hold the same again, so that idle limits cost nothing), and what follows from the coming and going of nodes:

    shares.meet(live, silent, now)                      who is there
    for ref, told in shares.step(now): ...              ten times a second: tell it to the others; None: take it back
    shares.hear(peer, ref, told, now)                   what a peer told

How parts change hands without ever adding up to more than the limit is `share_book`'s business. It never waits, sends, or
decides about a request; the buckets do, which it sets.

What a node gives out is a floor (1 %, so that the first requests of an idle node are let in and its demand is seen) and its
part of the rest. The sum over all nodes is at most the limit, except:

* a node that does not know of another one yet reckons with a floor too much: 1 % for each node that is not known;
* nodes that never met each hold the whole limit until one word has crossed, then the excess is given up;
* a node that the mesh takes for dead because its port refuses, and that lives, keeps what it has (as the mesh does: a refused
  port is a dead process).

Tokens move with the parts, and are lost rather than doubled. A full bucket lets in one request that is larger than it, and
owes the rest. So in any time t the cluster lets in at most rate x t + burst + one request for each node.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple, Protocol
from zlib import crc32

from smg.tenancy.bucket import TokenBucket
from smg.tenancy.share_book import WHOLE, Group, Peer, ShareBook, Told, even_part

DIVIDE = "divide"
LOCAL = "local"
ALLOW = "allow"
"""What a node that lost others without a word does. `divide`: they may be serving beyond a cut, so what they held stays theirs.
`local`: the limit is one for each side, so what they held is made anew here. `allow`: each node gives out the whole limit until
they are back."""

FLOOR = 0.01
FLOORS_MAX = 0.1
"""What every node gives out whatever it holds, and all of these together in a large cluster."""

SMOOTHING_S = 0.7
SILENCE_S = 0.5
SILENT_SMOOTHING_S = 0.15
"""Demand is a mean over the first; when nothing was asked for as long as the second, it falls away as quickly as the third."""
DEMAND_MIN = WHOLE // 1000
DEMAND_MAX = 1000 * WHOLE
"""Less than a thousandth of the limit is none, and a flood is a flood: its number must fit into a word."""
DEMAND_STEP = 0.15
"""A change of demand by less than this share is not told."""

IDLE_AFTER_S = 2.0
"""A book is closed when nobody has asked for so long."""
LOOK_S = 0.25
"""A book in which nothing happens is looked at so often."""
ALONE_AFTER_S = 1.5
ACQUAINTED_AFTER_S = 1.0
"""A node that has just started takes a part of limits that nobody has divided when it has met nobody for the first, or somebody
for the second: by then it has heard who holds what."""

BOOKS_MAX = 1024
"""Limits that are divided at one time; the others stay evenly divided. A book is about 1 KiB for each node in it."""
BOOKS_PER_STEP_MAX = 32
"""Books that are looked at in one step, and words told; the rest waits its turn. So a thousand busy limits cost no more than
thirty, and follow demand in three seconds instead of one. With 120 bytes a word, at most 40 KB/s to each peer."""


REF_BYTES_MAX = 64
"""A longer key is told as a digest: names of tenants may be made by clients."""


class SharedLimit(Protocol):
    """A bucket that can be a part of the cluster's limit."""

    @property
    def key(self) -> bytes:
        """The same on every node."""
        ...

    @property
    def capacity(self) -> float:
        """Tokens in a full bucket of the whole limit."""
        ...

    @property
    def refill_s(self) -> float:
        """How long it takes until an empty one is full."""
        ...

    def read_demand(self) -> float:
        """Tokens asked for since this was last read, admitted or not."""
        ...

    def balance(self, now: float) -> float:
        """Tokens there are now, negative for a debt."""
        ...

    def set_share(self, now: float, fraction: float) -> None:
        """From now on give out this part of the limit; what does not fit into the bucket any more is lost."""
        ...

    def give_back(self, amount: float, now: float) -> None:
        """Add tokens, as far as they fit."""
        ...


class LimitSource(Protocol):
    """A room with limits in it."""

    def buckets(self) -> Iterable[SharedLimit]:
        """All that there are now."""
        ...

    def asked(self) -> Iterable[SharedLimit]:
        """Those that were asked since this was last called."""
        ...

    def find(self, key: bytes) -> SharedLimit | None:
        """The one with this key, if it is here."""
        ...


class OneLimit:
    """A source of one limit that can tell whether it was asked."""

    __slots__ = ("_limit",)

    def __init__(self, limit: TokenBucket) -> None:
        self._limit = limit

    def buckets(self) -> Iterable[SharedLimit]:
        """See `LimitSource`."""
        return (self._limit,)

    def asked(self) -> Iterable[SharedLimit]:
        """See `LimitSource`."""
        return (self._limit,) if self._limit.was_asked else ()

    def find(self, key: bytes) -> SharedLimit | None:
        """See `LimitSource`."""
        return self._limit if key == self._limit.key else None


class Row(NamedTuple):
    """One divided limit for those who look at it. Demand is in tokens a second, the rest in parts of the limit."""

    ref: bytes
    demand_per_s: float | None
    demand: float
    held: float
    fraction: float
    peers: dict[Peer, tuple[float, float]]
    """Peer → (demand, held)."""


def ref_of(key: bytes) -> bytes:
    """A limit's name on the wire: its key, or a digest of a long one."""
    return key if len(key) <= REF_BYTES_MAX else blake2b(key, digest_size=REF_BYTES_MAX // 2).digest()


class AbsentLimit:
    """Stands for a limit that others ask and this node has no bucket of; its balance is known when there is one."""

    __slots__ = ("_at_s", "_balance", "_fraction", "capacity", "key", "refill_s")

    def __init__(self, fraction: float, refill_s: float, now: float) -> None:
        self.key = b""
        self.capacity = 1.0
        self.refill_s = refill_s
        self._at_s = now
        self._balance = self._fraction = fraction

    def read_demand(self) -> float:
        """Nobody asks here."""
        return 0.0

    def balance(self, now: float) -> float:
        """See `SharedLimit`."""
        refilled = max(now - self._at_s, 0.0) * self._fraction / self.refill_s
        self._balance = min(self._balance + refilled, self._fraction)
        self._at_s = max(now, self._at_s)
        return self._balance

    def set_share(self, now: float, fraction: float) -> None:
        """See `SharedLimit`."""
        self.balance(now)
        self._fraction = fraction
        self._balance = min(self._balance, fraction)

    def give_back(self, amount: float, now: float) -> None:
        """See `SharedLimit`."""
        self._balance = min(self.balance(now) + amount, self._fraction)


def _group(me: Peer, live: Collection[Peer], silent: Collection[Peer]) -> Group:
    """The group of these; its view is equal at two nodes when they reckon with the same ones."""
    view = crc32(b"\0".join(sorted((me, *live, *silent))))
    return Group(tuple(sorted(live)), tuple(sorted(silent)), not live or me < min(live), view)


class _Entry:
    """One limit and its book."""

    __slots__ = (
        "asked_s",
        "book",
        "fraction",
        "is_begun",
        "is_stirred",
        "limit",
        "look_s",
        "rate",
        "removed",
        "said",
        "used_s",
    )

    def __init__(self, book: ShareBook, limit: SharedLimit, fraction: float, now: float) -> None:
        self.book = book
        self.limit = limit
        self.fraction = fraction
        self.is_begun = False
        self.is_stirred = True
        self.look_s = now
        self.rate = 0.0
        """Smoothed demand in parts of the limit."""
        self.asked_s = -math.inf
        self.used_s = now
        """When anybody was last known to ask."""
        self.said: Told | None = None
        self.removed: set[Peer] = set()


class Shares:
    """See the module. `me` is this node's life, `epoch` a number that no former life of it began with."""

    def __init__(self, me: Peer, sources: list[LimitSource], mode: str, epoch: int, now: float) -> None:
        self._me = me
        self._sources = sources
        self._mode = mode
        self._epoch = epoch
        self._entries: dict[bytes, _Entry] = {}
        self._gone_words: list[bytes] = []
        self._group = _group(me, (), ())
        self._started_s = now
        self._met_s: float | None = None
        self._is_settled = False
        self._step_s = now
        self._even = -1.0
        self.refused = 0
        """Limits that were not divided because there are too many books."""
        self._spread_even(now)

    # -- who is there

    def meet(self, live: Collection[Peer], silent: Collection[Peer], now: float) -> None:
        """The nodes of this moment, without this one: those that are alive, and those that fell silent and may be serving
        beyond a cut. Whoever is in neither has gone, and what it held with it."""
        if self._mode == LOCAL:
            silent = ()
        if live and self._met_s is None:
            self._met_s = now
        if not self._is_settled:
            self._is_settled = (
                now - self._started_s >= ALONE_AFTER_S
                if self._met_s is None
                else now - self._met_s >= ACQUAINTED_AFTER_S
            )
        group = _group(self._me, live, silent)
        if group != self._group:
            before = frozenset((*self._group.live, *self._group.silent))
            self._group = group
            for entry in self._entries.values():
                self._regroup(entry, before, now)
        self._spread_even(now)

    def hear(self, peer: Peer, ref: bytes, told: Told, now: float) -> None:
        """What a peer told of a limit."""
        entry = self._entries.get(ref)
        if entry is None:
            if len(self._entries) >= BOOKS_MAX:
                self.refused += 1
                return
            found = (source.find(ref) for source in self._sources)
            limit = next((limit for limit in found if limit is not None), None)
            entry = self._open(ref, limit or AbsentLimit(self._even, told.refill_s, now), told.refill_s, now)
        entry.removed.discard(peer)
        self._hear(entry, peer, told, now)

    def hear_end(self, peer: Peer, ref: bytes) -> None:
        """A peer's word is gone: it has closed its book, or it is lost. Which of the two is told by `meet`."""
        entry = self._entries.get(ref)
        if entry is not None:
            entry.removed.add(peer)
            entry.is_stirred = True

    # -- the beat

    def step(self, now: float) -> list[tuple[bytes, Told | None]]:
        """Look at what was asked, set the buckets, and say what the others must hear, None for what they may forget."""
        elapsed_s = max(now - self._step_s, 1e-3)
        self._step_s = now
        for source in self._sources:
            for limit in source.asked():
                self._attach(limit, now)
        room = BOOKS_PER_STEP_MAX
        for ref, entry in list(self._entries.items()):
            self._measure(entry, now, elapsed_s)
            if (entry.is_stirred or now >= entry.look_s) and room:
                room -= 1
                # The others come first in the next step.
                self._entries[ref] = self._entries.pop(ref)
                self._settle(entry, now)
                if self._may_close(entry, now):
                    self._close(ref, entry, now)
        return list(self._words())

    def first(self, key: bytes, now: float) -> tuple[float, float]:
        """What a bucket begins with that is made now: its part of the limit, and its balance in parts of a full bucket."""
        entry = self._entries.get(ref_of(key))
        if entry is None:
            return self._even, self._even
        return entry.fraction, entry.limit.balance(now) / entry.limit.capacity

    def end(self, now: float) -> None:
        """This node is in no mesh any more and goes on serving: no limit of it is less than an even part."""
        even = 1.0 / self._group.size
        for source in self._sources:
            for limit in source.buckets():
                entry = self._entries.get(ref_of(limit.key))
                limit.set_share(now, max(even, entry.fraction if entry is not None else 0.0))
        self._entries.clear()
        self._even = even

    def was_not_told(self, ref: bytes) -> None:
        """The last word on this limit found no room; it is to be told again."""
        entry = self._entries.get(ref)
        if entry is not None:
            entry.said = None

    # -- for those who look

    @property
    def me(self) -> Peer:
        """This node's life."""
        return self._me

    @property
    def even(self) -> float:
        """The part of a limit that nobody has divided."""
        return self._even

    @property
    def books(self) -> int:
        """Limits that are divided now."""
        return len(self._entries)

    def row(self, key: bytes) -> Row | None:
        """One divided limit."""
        ref = ref_of(key)
        entry = self._entries.get(ref)
        return None if entry is None else self._row(ref, entry)

    def rows(self) -> Iterator[Row]:
        """All divided limits."""
        for ref, entry in self._entries.items():
            yield self._row(ref, entry)

    def _row(self, ref: bytes, entry: _Entry) -> Row:
        book, limit = entry.book, entry.limit
        per_s = limit.capacity / limit.refill_s
        return Row(
            ref=ref,
            demand_per_s=None if isinstance(limit, AbsentLimit) else entry.rate * per_s,
            demand=book.demand / WHOLE,
            held=book.held / WHOLE,
            fraction=entry.fraction,
            peers={peer: (told.demand / WHOLE, told.held / WHOLE) for peer, told in book.told.items()},
        )

    # -- rooms inside

    def _hear(self, entry: _Entry, peer: Peer, told: Told, now: float) -> None:
        entry.is_stirred = True
        tokens = entry.book.hear(peer, told, self._group)
        if not entry.is_begun:
            return  # nothing was given to a book that nobody has heard of, and its bucket is even still
        self._spread(entry, now)
        if tokens:
            entry.limit.give_back(tokens / WHOLE * entry.limit.capacity, now)

    def _regroup(self, entry: _Entry, before: frozenset[Peer], now: float) -> None:
        """Other nodes are there than before."""
        known = frozenset((*self._group.live, *self._group.silent))
        for peer in before - known:
            entry.book.forget(peer)
        if entry.book.has_dealt_with(before - known):
            entry.book.renew(self._next_epoch())
        for peer, told in list(entry.book.told.items()):
            self._hear(entry, peer, told, now)
        entry.is_stirred = True
        if entry.is_begun:
            self._spread(entry, now)

    def _open(self, ref: bytes, limit: SharedLimit, refill_s: float, now: float) -> _Entry:
        book = ShareBook(self._me, self._next_epoch(), refill_s)
        entry = self._entries[ref] = _Entry(book, limit, self._even, now)
        return entry

    def _attach(self, limit: SharedLimit, now: float) -> None:
        """A limit of ours was asked."""
        ref = ref_of(limit.key)
        entry = self._entries.get(ref)
        if entry is None:
            if len(self._entries) >= BOOKS_MAX:
                self.refused += 1
                limit.read_demand()
                return
            entry = self._open(ref, limit, limit.refill_s, now)
        entry.book.refill_s = limit.refill_s
        entry.asked_s = now
        if limit is not entry.limit:
            # It was made, or asked for the first time, since the others began to ask theirs.
            limit.set_share(now, entry.fraction)
            balance = entry.limit.balance(now) / entry.limit.capacity * limit.capacity
            limit.give_back(min(balance - limit.balance(now), 0.0), now)
            entry.limit = limit

    def _measure(self, entry: _Entry, now: float, elapsed_s: float) -> None:
        limit, book = entry.limit, entry.book
        asked = limit.read_demand() * limit.refill_s / limit.capacity * WHOLE / elapsed_s
        if not asked and not entry.rate:
            return
        smoothing_s = SILENT_SMOOTHING_S if now - entry.asked_s > SILENCE_S else SMOOTHING_S
        entry.rate += (asked - entry.rate) * -math.expm1(-elapsed_s / smoothing_s)
        if entry.rate < DEMAND_MIN and not asked:
            entry.rate = 0.0
        demand = min(round(entry.rate), DEMAND_MAX)
        step = max(DEMAND_STEP * max(demand, book.demand), DEMAND_MIN)
        if abs(demand - book.demand) >= step or (not demand and book.demand):
            book.demand = demand
            entry.is_stirred = True

    def _settle(self, entry: _Entry, now: float) -> None:
        """Everything that may follow for one limit."""
        book, group = entry.book, self._group
        entry.is_stirred = False
        entry.look_s = now + LOOK_S
        for peer in entry.removed - set(group.silent):
            book.forget(peer)
        entry.removed.clear()
        if book.demand or any(told.demand for told in book.told.values()):
            entry.used_s = now
        gifts: dict[Peer, int] = {}
        if entry.is_begun:
            gifts = book.settle(group, self._is_settled)
        else:
            entry.is_begun = True
            if self._is_settled:
                book.begin(group)
        tokens = self._spread(entry, now, book.held - sum(gifts.values()))
        if gifts:
            book.hand_over(gifts, tokens)

    def _may_close(self, entry: _Entry, now: float) -> bool:
        is_idle = now - entry.used_s >= IDLE_AFTER_S and entry.book.is_even(self._group)
        if is_idle and isinstance(entry.limit, AbsentLimit):
            # A bucket that is made later begins full, so this one has to be.
            return entry.limit.balance(now) >= entry.fraction
        return is_idle

    def _close(self, ref: bytes, entry: _Entry, now: float) -> None:
        del self._entries[ref]
        entry.limit.set_share(now, self._even)
        if entry.said is not None:
            self._gone_words.append(ref)

    def _words(self) -> Iterator[tuple[bytes, Told | None]]:
        for ref in self._gone_words:
            if ref not in self._entries:
                yield ref, None
        self._gone_words.clear()
        room = BOOKS_PER_STEP_MAX
        for ref, entry in list(self._entries.items()):
            words = entry.book.words(self._group)
            if words == entry.said:
                continue
            if not room:
                break
            room -= 1
            entry.said = words
            yield ref, words

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _floor(self) -> float:
        return min(FLOOR, FLOORS_MAX / self._group.size)

    def _fraction(self, held: float) -> float:
        """What a node gives out that holds this part."""
        if self._mode == ALLOW and self._group.silent:
            return 1.0
        floor = self._floor()
        return min(floor + (1.0 - self._group.size * floor) * held, 1.0)

    def _spread(self, entry: _Entry, now: float, held: int | None = None) -> int:
        """Set a bucket; the tokens that do not fit into it any more, in parts of a full one."""
        limit = entry.limit
        fraction = self._fraction((entry.book.held if held is None else held) / WHOLE)
        over = limit.balance(now) / limit.capacity - fraction
        limit.set_share(now, fraction)
        entry.fraction = fraction
        return max(int(over * WHOLE), 0)

    def _spread_even(self, now: float) -> None:
        """Set the buckets of limits that nobody has divided, when an even part is another one now."""
        even = self._fraction(even_part(self._group) / WHOLE if self._is_settled else 0.0)
        if even == self._even:
            return
        self._even = even
        for source in self._sources:
            for limit in source.buckets():
                if ref_of(limit.key) not in self._entries:
                    limit.set_share(now, even)
