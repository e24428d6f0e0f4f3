"""Placements of prompts, told to the peers as hashes, and theirs taken in (docs/routing.md 4.2).

Owns the stream of this node's placements (sent at once while they are few, else ten times a second), the counters of trunk blocks,
and the repair of what was lost: snapshots that the mesh brings are taken in here, and a placement whose beginning is not
known makes us ask for that one chain. It must never tell a text, and never wait for a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mesh import Appended, BoundError, Change, Ended, Lost, Restarted, Restored, State
from smg.bridge import words
from smg.bridge.chains import CHAINS_MAX, Chains
from smg.bridge.peers import Peers
from smg.bridge.words import VERSION, AskedChains, Basis, Flushed, Gone, Item, Placed, Run, Trunk
from smg.fleet import registry as fleet
from smg.fleet.prefix_index import Placement, PrefixIndex
from smg.fleet.registry import Registry
from smg.fleet.worker import Kind, Worker
from smg.policies.cache_aware import CacheAware
from smg.policies.neighbours import News
from smg.policies.policy import Policy
from smg.policies.sticky_key import StickyKey, inner_of

PREFIX = "prefix"
FLUSHES_PER_S = 10.0
"""Rhythm of placements: what waits is told so often at least, and above this rate together."""
FLUSHES_MAX = 5.0
"""Deltas that may go at once, each with its one placement, before the rhythm begins: at ten requests a second and node
nearly all do, and peers know 50 ms earlier, which is worth 5 to 10 % of the mean time to first token there."""
BATCH_BLOCKS_MAX = 4_000
"""Blocks in one delta, about 32 KB."""
WAITING_MAX = 4_096
"""Placements that wait for the next delta; more are told at once."""
DONE_S = 0.05
"""By then the node that sent a request has told that it is in flight; if it is not, it is over."""
TRUNK_S = 2.0
"""Rhythm of trunk counters: trunks are few and slow."""
TRUNK_GROWTH = 1.5
"""A trunk block is told again when it has so many times the children that were told."""
MISSING_MAX = 1_024
"""Lost beginnings remembered per peer."""
TAILS_MAX = 200_000
"""Ends of chains of a snapshot that wait to be put into the order of use."""
TAILS_PER_STEP = 64

PolicyOf = Callable[[str, Kind], Policy | None]
"""The policy of a model and leg, if this node has made it yet."""


class SharedPrefixes:
    """See the module. `settle` brings the fleet up to date with lists already heard: placements name workers of the
    same breath. `telling` is called with each delta: what else should be on its way with it; `soon` asks for a call of
    `tell_waiting` as soon as an answer that is being made is on its way; `peers_done` is told of a worker on which peers placed something and have nothing in flight."""

    def __init__(
        self,
        state: State,
        peers: Peers,
        registry: Registry,
        index: PrefixIndex,
        chains: Chains,
        *,
        policy_of: PolicyOf,
        settle: Callable[[], None],
        telling: Callable[[], None],
        soon: Callable[[], None],
        peers_done: Callable[[Worker], None],
    ) -> None:
        self._state = state
        self._peers = peers
        self._registry = registry
        self._index = index
        self._chains = chains
        self._name = peers.name
        self._name_ref = words.model_ref(peers.name)
        self._policy_of = policy_of
        self._settle = settle
        self._telling = telling
        self._soon = soon
        self._peers_done = peers_done
        self._models: dict[int, str] = {}
        self._waiting: list[tuple[str, News, float, int]] = []
        self._waiting_blocks = 0
        self._flushed_s = float("-inf")
        self._flushes = FLUSHES_MAX  # how many may go at once, at `_flushed_s`
        self._trunk_told: dict[int, int] = {}
        self._trunk_due_s = 0.0
        self._heard_on: dict[bytes, float] = {}  # worker reference → when a placement there was heard last
        self._missing: dict[str, dict[bytes, int]] = {}  # peer → worker reference + block → block
        self._tails: list[tuple[str, int]] = []
        self._read: dict[tuple[str, str], int] = {}  # (teller, worker) → blocks of its snapshot so far
        self._touches: list[tuple[str, int]] = []
        self._is_hearing = False
        self._asker = 0
        self.told = self.heard = self.unknown = self.orphans = self.garbage = 0
        """Placements told, heard, of workers unknown here, without their beginning; words not understood."""
        registry.subscribe(self._changed)

    # -- telling

    def decide_for(self, peer: str | None) -> None:
        """What is told from now on was decided for this peer, which has booked it itself; None: for ourselves."""
        self._asker = words.model_ref(peer) if peer is not None else 0

    def tell(self, model: str, news: News, now: float) -> None:
        """A placement of this node's policies; told at once if nothing was told lately and nobody waits meanwhile."""
        self._waiting.append((model, news, now, self._asker))
        self._waiting_blocks += len(news.placement.hashes)
        if self._waiting_blocks >= BATCH_BLOCKS_MAX or len(self._waiting) >= WAITING_MAX:
            self.flush(now)
        elif self._asker:
            self._soon()  # the peer waits for this decision, and it is its answer that comes first
        else:
            self.tell_waiting(now)

    def tell_waiting(self, now: float) -> None:
        """Tell what waits, if so many deltas may go."""
        if self._waiting and self._flushes + (now - self._flushed_s) * FLUSHES_PER_S >= 1.0:
            self.flush(now)

    def flush(self, now: float) -> None:
        """Tell what waits."""
        self._flushes = max(
            0.0, min(FLUSHES_MAX, self._flushes + (now - self._flushed_s) * FLUSHES_PER_S) - 1.0
        )
        self._flushed_s = now
        waiting, self._waiting, self._waiting_blocks = self._waiting, [], 0
        items: list[Placed] = []
        blocks = 0
        for model, news, placed_s, asker in waiting:
            for item in _items_of(model, news, max(0, int((now - placed_s) * 1000)), asker):
                size = len(item.hashes) // words.HASH_BYTES
                if items and blocks + size > BATCH_BLOCKS_MAX:
                    self._append(items)
                    items, blocks = [], 0
                items.append(item)
                blocks += size
        if items:
            self._append(items)
        self.told += len(waiting)
        self._telling()

    def step(self, now: float) -> None:
        """Ten times a second."""
        if self._waiting and (now - self._flushed_s) * FLUSHES_PER_S >= 1.0:
            self.flush(now)
        for ref, heard_s in list(self._heard_on.items()):
            if now - heard_s >= DONE_S:
                del self._heard_on[ref]
                worker = self._chains.workers.get(ref)
                if worker is not None and not worker.peers_in_flight:
                    self._peers_done(worker)
        if now >= self._trunk_due_s:
            self._trunk_due_s = now + TRUNK_S
            self._tell_trunk()

    def _tell_trunk(self) -> None:
        told = self._trunk_told
        trunk = self._index.trunk()
        rows = [
            (block, children)
            for block, children in trunk.items()
            if children >= told.get(block, 0) * TRUNK_GROWTH
        ]
        if len(told) > 2 * len(trunk) + 1024:
            self._trunk_told = told = {block: told[block] for block in told.keys() & trunk.keys()}
        if rows:
            told.update(rows)
            self._append([Trunk(words.pack_trunk(rows))])

    def _append(self, items: Sequence[Item]) -> None:
        try:
            sequence = self._state.append(PREFIX, words.batch(items))
        except BoundError:
            return  # cannot be: a delta is smaller than the cap; but nothing here may fail a request
        self._chains.count(self._name, sequence, items)

    # -- hearing

    def on_change(self, change: Change, now: float) -> None:
        """What the mesh says of the peers' streams."""
        if isinstance(change, Appended):
            items, unknown = words.read_batch(change.payload)
            self.garbage += unknown
            self._chains.count(change.owner, change.sequence, items)
            if self._peers.hashes_meet(change.owner):
                self._take(change.owner, items, now)
        elif isinstance(change, Restored):
            self._restored(change, now)
        elif isinstance(change, Restarted | Ended):
            self._chains.forget(change.owner)
            self._missing.pop(change.owner, None)
        elif isinstance(change, Lost):
            self._missing.pop(change.owner, None)

    def _take(self, owner: str, items: Sequence[Item], now: float) -> None:
        oldest_ms = -1
        for item in items:
            if type(item) is Placed:
                oldest_ms = max(oldest_ms, item.age_ms)
                self._placed(owner, item, now)
            elif type(item) is Trunk:
                for block, children in words.unpack_trunk(item.rows):
                    self._index.learn_trunk(block, children)
                    self._trunk_told[block] = max(children, self._trunk_told.get(block, 0))
            elif type(item) is Flushed:
                self._flushed(item)
        if oldest_ms >= 0:
            self._peers.timed(owner, oldest_ms / 1000)

    def _worker_of(self, ref: bytes) -> Worker | None:
        worker = self._chains.workers.get(ref)
        if worker is None:
            self._settle()
            worker = self._chains.workers.get(ref)
        return worker

    def _placed(self, owner: str, item: Placed, now: float) -> None:
        worker = self._worker_of(item.ref)
        if worker is None:
            self.unknown += 1
            return
        self.heard += 1
        placement = Placement(worker.id, item.parent, words.unpack_hashes(item.hashes))
        policy = None if item.asker == self._name_ref else self._policy(item.model, worker)
        if policy is None:
            is_known = self._index.apply(placement)
        else:
            news = News(placement, item.prefill_ms / 1000)
            is_known = policy.heard(news, now - item.age_ms / 1000, now)
            if item.asker or worker.peers_in_flight:
                self._heard_on[item.ref] = now
            else:  # whoever sent it has told its load in the same breath: it is over already
                self._peers_done(worker)
        if not is_known:
            self.orphans += 1
            missing = self._missing.setdefault(owner, {})
            if len(missing) < MISSING_MAX:
                block = placement.hashes[-1] if placement.hashes else placement.parent
                missing[item.ref + block.to_bytes(8, "big")] = block

    def _policy(self, model_ref: int, worker: Worker) -> CacheAware | None:
        """The policy whose accounts a placement belongs to, if this node has made it yet."""
        model = self._models.get(model_ref)
        if model is None:
            self._models = {words.model_ref(each): each for each in ("", *self._registry.served_models())}
            model = self._models.get(model_ref)
        return None if model is None else cache_aware_of(self._policy_of(model, worker.kind))

    def _flushed(self, item: Flushed) -> None:
        worker = self._worker_of(item.ref)
        if worker is not None:
            self._is_hearing = True
            try:
                self._registry.flushed(worker)
            finally:
                self._is_hearing = False

    def _changed(self, change: fleet.Change) -> None:
        ref = words.worker_ref(change.worker.id)
        if isinstance(change, fleet.Removed):
            self._append([Gone(ref)])
        elif isinstance(change, fleet.Flushed) and not self._is_hearing:
            self.flush(self._flushed_s)  # what was placed before goes before
            self._append([Flushed(ref)])
        elif isinstance(change, fleet.ModelsChanged):
            self._models = {}

    # -- repair

    def _restored(self, change: Restored, now: float) -> None:
        items, unknown = words.read_batch(change.chunk)
        self.garbage += unknown
        if change.is_first:
            self._tails.clear()
            self._end_reading(change.owner)
            for item in items:
                if type(item) is Basis:
                    self._chains.begin(change.owner, item, change.key)
        if self._peers.hashes_meet(change.owner):
            for item in items:
                if type(item) is Run:
                    self._run(item, change.owner)
                elif type(item) is Trunk:
                    self._take(change.owner, [item], now)
        if change.is_last:
            self._end_reading(change.owner)
            self._order_tails()

    def warmed(self, page: bytes) -> bool:
        """Take in a page of a peer's chains; False when it was empty, and the worker's chains are complete."""
        items, unknown = words.read_batch(page)
        self.garbage += unknown
        for item in items:
            if type(item) is Run:
                self._run(item, "")
        if not items:
            self._end_reading("")
            self._order_tails()
        return bool(items)

    def _order_tails(self) -> None:
        # The newest chains came first; used once more in turn, the newest last, they are in order of use again.
        room = TAILS_MAX - len(self._touches)
        self._touches += reversed(self._tails[: max(0, room)])
        self._tails = []

    def _end_reading(self, teller: str) -> None:
        self._read = {key: blocks for key, blocks in self._read.items() if key[0] != teller}

    def _run(self, item: Run, teller: str) -> None:
        worker = self._worker_of(item.ref)
        if worker is None:
            self.unknown += 1
            return
        index = self._index
        for parent, packed in item.runs:
            hashes = words.unpack_hashes(packed)
            if not hashes:
                continue
            capacity = index.capacity_of(worker.id)
            read = self._read.get((teller, worker.id), 0) + len(hashes)
            if index.blocks_of(worker.id) + len(hashes) > capacity and read > capacity // 2:
                # Full. After a cut both sides hold what the other lacks, and neither knows when the other's was used: the newest
                # half of each is kept. On a node that began empty all that comes now is older than what is there.
                continue
            self._read[(teller, worker.id)] = read
            if index.apply(Placement(worker.id, parent, hashes)) and len(self._tails) < TAILS_MAX:
                self._tails.append((worker.id, hashes[-1]))

    @property
    def has_touches(self) -> bool:
        """Is there work for `touch`?"""
        return bool(self._touches)

    def touch(self) -> None:
        """A step of putting a snapshot's chains into the order of their use; a fraction of a millisecond each."""
        step = self._touches[:TAILS_PER_STEP]
        del self._touches[:TAILS_PER_STEP]
        for worker_id, tail in step:
            self._index.apply(Placement(worker_id, tail, ()))

    def questions(self) -> list[tuple[str, bytes]]:
        """(peer, question) for chains whose beginning is not known here."""
        asked = []
        for peer, missing in list(self._missing.items()):
            keys = list(missing)[:CHAINS_MAX]
            rows = tuple((key[: words.REF_BYTES], missing.pop(key)) for key in keys)
            if not missing:
                del self._missing[peer]
            asked.append((peer, words.encode(AskedChains(VERSION, words.CHAINS, rows))))
        return asked

    def answered(self, answer: bytes) -> None:
        """A peer sent chains that were lost here."""
        items, unknown = words.read_batch(answer)
        self.garbage += unknown
        for item in items:
            worker = self._worker_of(item.ref) if type(item) is Run else None
            if worker is not None and type(item) is Run:
                for parent, packed in item.runs:
                    self._index.apply(Placement(worker.id, parent, words.unpack_hashes(packed)))


class ModelNeighbours:
    """`neighbours.Neighbours` of one model's policy."""

    __slots__ = ("_model", "_peers", "_prefixes")

    def __init__(self, model: str, prefixes: SharedPrefixes, peers: Peers) -> None:
        self._model = model
        self._prefixes = prefixes
        self._peers = peers

    def count(self) -> int:
        """Gateways that send to the same workers."""
        return self._peers.count

    def delay_s(self) -> float:
        """Age of their placements when they arrive here."""
        return self._peers.delay_s

    def tell(self, news: News, now: float) -> None:
        """To all of them."""
        self._prefixes.tell(self._model, news, now)


def cache_aware_of(policy: Policy | None) -> CacheAware | None:
    """The `cache_aware` policy in this one, if there is one."""
    found = None if policy is None else inner_of(policy)
    return found if isinstance(found, CacheAware) else None


def is_sticky(policy: object) -> bool:
    """Do routing keys stick under this policy, whatever it wraps?"""
    while policy is not None:
        if isinstance(policy, StickyKey):
            return True
        policy = getattr(policy, "inner", None)
    return False


def _items_of(model: str, news: News, age_ms: int, asker: int) -> Iterator[Placed]:
    """One placement as items, none too long."""
    placement = news.placement
    ref, model_ref = words.worker_ref(placement.worker_id), words.model_ref(model)
    parent, hashes = placement.parent, placement.hashes
    prefill_ms = news.seconds * 1000
    at = 0
    while True:
        part = hashes[at : at + BATCH_BLOCKS_MAX]
        yield Placed(ref, model_ref, parent, prefill_ms, age_ms, words.pack_hashes(part), asker)
        at += BATCH_BLOCKS_MAX
        if at >= len(hashes):
            return
        parent, prefill_ms = part[-1], 0.0
