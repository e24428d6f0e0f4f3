"""Who holds which prompt prefix: one index over chained block hashes, for text and for token ids.

This room owns, for every worker, the blocks that it is believed to have in its KV cache, and the
order in which they were last used. It answers how deep a prompt matches on each worker, it is told
where prompts were placed (by this node, by peers, by the engines' own events), and it forgets what
does not fit. It sees hashes, never prompts, never reads a clock, and never claims a block that
nobody told it of.

How it is built, and why:

* Hashes are chained (`block_hashes`): one number stands for a whole prefix, so a flat table is a tree.
* One table maps a hash to the set of its owners as a bit mask (`_shards`; sharded, because a dict of
  a million entries takes 60 ms to grow, and one of 16 thousand less than one). No object per node:
  dicts of ints are invisible to the garbage collector.
* Per owner a plain dict, oldest first, maps a hash to its parent. It is the LRU and, by the parents,
  the way from a leaf to its root, so that a delta of (parent, new hashes) refreshes the whole chain.
* Invariant (*prefix-closed*): an owner of a block owns its parent. Every use re-inserts a chain leaf
  first, root last, so a parent is always younger than its children and eviction from the old end
  takes leaves first. Hence the owners of successive blocks only ever shrink, and `match` finds each
  depth by binary search.
* A worker may hold several slots (bits): what was placed on it and, if its engine publishes events,
  what the engine says it stored. A match is the deepest of them (the two are merged by max), because
  events lag by the queue and placements are guesses.
* Every call does bounded work: what is dropped at once (a worker that left) is only masked out, and
  its entries are swept a few per call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from smg.fleet.block_hashes import PROMPT_BLOCKS_MAX, ROOT
from smg.fleet.index_slots import Holdings, Slot

WORKER_BLOCKS_MAX = 65_536
"""Most blocks of one slot: 32 MiB of text or 8 M tokens, more than engines hold; growing a larger dict pauses > 5 ms."""
ENTRY_BYTES = 290
"""Bytes per (slot, block) under churn (tests/bench/choose_worker.py): 48 for the hash, up to 120 in each of two dicts."""
SWEEP_PER_CALL = 64
"""Entries of departed slots removed per placement: more than one placement usually adds, so graves shrink."""
EVICT_PER_CALL = 2_048
"""Most entries evicted in one call, about a millisecond."""
TRUNK_MAX = 4_096
"""Trunk blocks remembered (shared system prompts and few-shot heads: few and slow)."""
BRANCHES_MAX = 16_384
"""Blocks whose children are being counted and that are no trunk yet."""
MASKS_MAX = 8_192
"""Distinct owner sets kept once and shared by the table's entries."""

_SHARDS = 64
_SHARD_MASK = _SHARDS - 1


class IndexSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The measures of an index."""

    bytes_max: int = 268_435_456
    """Bound of the whole index; at the bound the fullest slot gives."""
    worker_blocks: int = 16_384
    """Blocks of a worker whose capacity nobody has learned yet."""
    trunk_children: int = 8
    """Distinct next blocks that make a block part of the trunk."""


class Match(msgspec.Struct, frozen=True, gc=False):
    """How deep a prompt matches: `steps` are (depth, owners at least that deep), deepest first, owners growing."""

    blocks: int
    steps: tuple[tuple[int, int], ...]

    @property
    def depth(self) -> int:
        """Blocks of the longest match on any worker."""
        return self.steps[0][0] if self.steps else 0

    def depth_of(self, bits: int) -> int:
        """Blocks matched on the worker with these bits (`PrefixIndex.bits_of`)."""
        for depth, owners in self.steps:
            if owners & bits:
                return depth
        return 0


NO_MATCH = Match(0, ())
"""Nobody holds any of it."""


class Placement(msgspec.Struct, frozen=True, gc=False):
    """What a placement adds, for peers: `hashes` follow `parent` on `worker_id`. Empty `hashes` refresh `parent`."""

    worker_id: str
    parent: int
    hashes: tuple[int, ...]


class PrefixIndex:
    """The index of one gateway node, for all its models and workers."""

    __slots__ = (
        "_alive",
        "_branches",
        "_entries",
        "_entries_max",
        "_free",
        "_graves",
        "_masks",
        "_settings",
        "_shards",
        "_slots",
        "_trunk",
        "_workers",
        "bits",
    )

    def __init__(self, settings: IndexSettings | None = None) -> None:
        self._settings = settings if settings is not None else IndexSettings()
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]
        self._workers: dict[str, Holdings] = {}
        self.bits: dict[str, int] = {}
        """Each worker's bits in the masks of `Match.steps`, for reading without a call (`bits_of`)."""
        self._slots: list[str | None] = []  # by bit position: the worker, None for free bits and graves
        self._free: list[int] = []
        self._graves: list[Slot] = []
        self._alive = 0  # bits of all slots that are not graves
        self._entries = 0  # over all slots and graves
        self._entries_max = max(1, self._settings.bytes_max // ENTRY_BYTES)
        self._masks: dict[int, int] = {}
        self._branches: dict[int, int] = {}  # block -> distinct children seen, below `trunk_children`
        self._trunk: dict[int, int] = {}  # block -> distinct children seen, from there on

    # -- reading -------------------------------------------------------------------------------

    def match(self, hashes: Sequence[int]) -> Match:
        """The longest prefix of `hashes` on every worker. Changes nothing.

        The owners of successive blocks only shrink (prefix-closed), so each place where they change
        is found by binary search; 64 blocks at one million entries take about a microsecond when one
        worker holds them.
        """
        shards, alive = self._shards, self._alive
        total = len(hashes)
        if not total:
            return NO_MATCH
        first = hashes[0]
        owners = shards[first & _SHARD_MASK].get(first, 0) & alive
        if not owners:
            return NO_MATCH
        last = hashes[-1]
        if shards[last & _SHARD_MASK].get(last, 0) & alive == owners:
            return Match(total, ((total, owners),))  # known to its last block, and shared by no other prompt
        low, high = 0, total  # invariant: block `low` (1-based) has owners, block `high + 1` has none
        owners = 0
        if high:  # most prompts are either known to their last block or new from an early one
            last = hashes[high - 1]
            owners = shards[last & _SHARD_MASK].get(last, 0) & alive
            if owners:
                low = high
            else:
                high -= 1
        while low < high:
            middle = (low + high + 1) >> 1
            block = hashes[middle - 1]
            found = shards[block & _SHARD_MASK].get(block, 0) & alive
            if found:
                low, owners = middle, found
            else:
                high = middle - 1
        steps: list[tuple[int, int]] = []
        while low:
            steps.append((low, owners))
            # Next: the deepest block above this one with other (that is, more) owners.
            bottom, top = 0, low - 1
            wider = 0
            while bottom < top:
                middle = (bottom + top + 1) >> 1
                block = hashes[middle - 1]
                found = shards[block & _SHARD_MASK].get(block, 0) & alive
                if found != owners:
                    bottom, wider = middle, found
                else:
                    top = middle - 1
            low, owners = bottom, wider
            if low and steps[-1][1] | owners == steps[-1][1]:
                break  # an engine evicted a block before its child; nothing above is certain, nor deeper
        return Match(total, tuple(steps))

    def bits_of(self, worker_id: str) -> int:
        """The worker's bits in the masks of `Match.steps`, 0 for a worker that owns nothing."""
        return self.bits.get(worker_id, 0)

    def owners(self, mask: int) -> list[str]:
        """The workers whose bits are in `mask`; a worker with two of its slots in it appears twice."""
        found = []
        slots = self._slots
        while mask:
            bit = mask & -mask
            mask ^= bit
            worker_id = slots[bit.bit_length() - 1]
            if worker_id is not None:
                found.append(worker_id)
        return found

    def trunk_depth(self, hashes: Sequence[int], depth: int) -> int:
        """Blocks up to and including the deepest trunk block among the first `depth`.

        Trunk = blocks that many different prompts continue: shared system prompts, few-shot heads.
        """
        trunk = self._trunk
        if trunk:
            for position in range(min(depth, len(hashes)), 0, -1):
                if hashes[position - 1] in trunk:
                    return position
        return 0

    def is_trunk(self, hashes: Sequence[int], depth: int) -> bool:
        """Whether the first `depth` blocks end with a trunk block, or are none: `trunk_depth` is `depth` then."""
        return depth == 0 or hashes[depth - 1] in self._trunk

    def trunk(self) -> dict[int, int]:
        """The trunk blocks and their counts of distinct children, for peers (merged by max)."""
        return dict(self._trunk)

    def blocks_of(self, worker_id: str) -> int:
        """Blocks believed on the worker, over all its slots."""
        holdings = self._workers.get(worker_id)
        return sum(len(slot.used) for slot in holdings.slots()) if holdings is not None else 0

    def capacity_of(self, worker_id: str) -> int:
        """The bound of the worker's blocks."""
        holdings = self._workers.get(worker_id)
        return holdings.capacity if holdings is not None else self._settings.worker_blocks

    @property
    def entries(self) -> int:
        """(slot, block) pairs in memory, departed workers' included."""
        return self._entries

    @property
    def bytes_used(self) -> int:
        """Bytes of the index, estimated by `ENTRY_BYTES`."""
        return self._entries * ENTRY_BYTES

    def chains(self, worker_id: str, limit: int) -> list[tuple[int, int]]:
        """(parent, block) pairs placed on a worker, most recently used first, parents before children.

        For a peer that joins: `stored`-like replay in this order keeps the index prefix-closed.
        """
        holdings = self._workers.get(worker_id)
        if holdings is None:
            return []
        pairs: list[tuple[int, int]] = []
        for block in reversed(holdings.placed.used):
            if len(pairs) >= limit:
                break
            pairs.append((holdings.placed.used[block], block))
        return pairs

    def chain_to(self, worker_id: str, block: int) -> list[int]:
        """The chain placed on a worker from its first block to `block`; empty if the worker does not hold it."""
        holdings = self._workers.get(worker_id)
        chain: list[int] = []
        while holdings is not None and block != ROOT and len(chain) < PROMPT_BLOCKS_MAX:
            parent = holdings.placed.used.get(block)
            if parent is None:
                return []
            chain.append(block)
            block = parent
        return chain[::-1]

    # -- placements ----------------------------------------------------------------------------

    def use(self, worker_id: str, hashes: Sequence[int]) -> None:
        """As `place`, where there are no peers to hear of it."""
        holdings = self._workers.get(worker_id) or self._enter(worker_id)
        self._use(holdings.placed, hashes)

    def place(self, worker_id: str, hashes: Sequence[int]) -> Placement:
        """A prompt goes to a worker: it owns all its blocks now. Returns what peers have to hear."""
        holdings = self._workers.get(worker_id) or self._enter(worker_id)
        first_new = self._use(holdings.placed, hashes)
        if first_new is None:
            return Placement(worker_id, hashes[-1] if hashes else ROOT, ())
        parent = hashes[first_new - 1] if first_new else ROOT
        return Placement(worker_id, parent, tuple(hashes[first_new:]))

    def apply(self, placement: Placement) -> bool:
        """A peer's placement. False (and nothing changed) if its parent is not known on that worker:
        an earlier delta was lost, and the peer's next full placement or a repair brings it back.
        """
        holdings = self._workers.get(placement.worker_id) or self._enter(placement.worker_id)
        return self._extend(holdings.placed, placement.parent, placement.hashes)

    def learn_trunk(self, block: int, children: int) -> None:
        """A peer has seen `children` distinct blocks behind `block` (merged by max)."""
        if children >= self._settings.trunk_children and children > self._trunk.get(block, 0):
            self._branches.pop(block, None)
            self._into_trunk(block, children)

    def set_capacity(self, worker_id: str, blocks: int) -> None:
        """The learned size of a worker's cache. Shrinking evicts over the next calls."""
        holdings = self._workers.get(worker_id) or self._enter(worker_id)
        holdings.capacity = min(max(1, blocks), WORKER_BLOCKS_MAX)
        for slot in holdings.slots():
            slot.capacity = holdings.capacity

    def forget(self, worker_id: str) -> None:
        """The worker left, failed or flushed its cache: from now on it owns nothing."""
        holdings = self._workers.pop(worker_id, None)
        if holdings is not None:
            del self.bits[worker_id]
            for slot in holdings.slots():
                self._bury(slot)

    # -- engines' events -----------------------------------------------------------------------

    def stored(self, worker_id: str, parent: int, hashes: Sequence[int]) -> bool:
        """The engine has computed `hashes` behind `parent`. False if it never told us of the parent."""
        holdings = self._workers.get(worker_id) or self._enter(worker_id)
        if holdings.stored is None:
            holdings.stored = self._open(worker_id, holdings.capacity)
            self.bits[worker_id] |= holdings.stored.bit
        return self._extend(holdings.stored, parent, hashes)

    def removed(self, worker_id: str, hashes: Iterable[int]) -> None:
        """The engine has evicted these blocks.

        Engines evict leaves first. Should one not, the children of a removed block stay claimed
        until their own removal is told, which the engine does in the same breath.
        """
        holdings = self._workers.get(worker_id)
        if holdings is None or holdings.stored is None:
            return
        slot = holdings.stored
        for block in hashes:
            if slot.used.pop(block, None) is not None:
                self._disown(slot.bit, block)
                self._entries -= 1

    def cleared(self, worker_id: str) -> None:
        """The engine has emptied its cache: nothing it stored and nothing placed before is there."""
        holdings = self._workers.get(worker_id)
        if holdings is None:
            return
        has_events = holdings.stored is not None
        capacity = holdings.capacity
        self.forget(worker_id)
        fresh = self._enter(worker_id)
        fresh.capacity = fresh.placed.capacity = capacity
        if has_events:
            fresh.stored = self._open(worker_id, capacity)
            self.bits[worker_id] |= fresh.stored.bit

    def unlearn(self, worker_id: str) -> None:
        """What the engine told may not be true any more; what was placed stays what it is, a guess."""
        holdings = self._workers.get(worker_id)
        if holdings is not None and holdings.stored is not None:
            self.bits[worker_id] &= ~holdings.stored.bit
            self._bury(holdings.stored)
            holdings.stored = None

    def age(self, worker_id: str) -> None:
        """`fade` a worker whose engine tells what it stored; once per horizon (longer than a queue can be). Others
        are left alone."""
        holdings = self._workers.get(worker_id)
        if holdings is not None and holdings.stored is not None:
            self.fade(worker_id)

    def fade(self, worker_id: str) -> None:
        """Forget what was placed on the worker before the last call but one and was not used since."""
        holdings = self._workers.get(worker_id)
        if holdings is None:
            return
        if holdings.older is not None:
            self.bits[worker_id] &= ~holdings.older.bit
            self._bury(holdings.older)
        holdings.older = holdings.placed
        holdings.placed = self._open(worker_id, holdings.capacity)
        self.bits[worker_id] |= holdings.placed.bit

    def has_events(self, worker_id: str) -> bool:
        """Whether the worker's engine has told what it stored."""
        holdings = self._workers.get(worker_id)
        return holdings is not None and holdings.stored is not None

    # -- housekeeping --------------------------------------------------------------------------

    def sweep(self, limit: int) -> int:
        """Remove up to `limit` entries of departed slots; how many are left. Placements do it too."""
        while self._graves and limit > 0:
            grave = self._graves[-1]
            used = grave.used
            count = min(limit, len(used))
            for _ in range(count):
                self._disown(grave.bit, used.popitem()[0])
            self._entries -= count
            limit -= count
            if not used:
                self._graves.pop()
                self._free.append(grave.position)
        return sum(len(grave.used) for grave in self._graves)

    def _enter(self, worker_id: str) -> Holdings:
        holdings = Holdings(self._open(worker_id, self._settings.worker_blocks))
        self._workers[worker_id] = holdings
        self.bits[worker_id] = holdings.placed.bit
        return holdings

    def _open(self, worker_id: str, capacity: int) -> Slot:
        if self._free:
            position = self._free.pop()
            self._slots[position] = worker_id
        else:
            position = len(self._slots)
            self._slots.append(worker_id)
        slot = Slot(position, min(capacity, WORKER_BLOCKS_MAX))
        self._alive |= slot.bit
        return slot

    def _bury(self, slot: Slot) -> None:
        self._alive &= ~slot.bit
        self._slots[slot.position] = None
        self._graves.append(slot)

    def _use(self, slot: Slot, hashes: Sequence[int]) -> int | None:
        """Make a whole chain the most recent of a slot; position of its first new block, None if none was new."""
        used, bit, shards = slot.used, slot.bit, self._shards
        position = len(hashes)
        if position and slot.is_young(hashes[-1], position):
            return None  # moving the whole chain again would change next to nothing
        take = used.pop
        first_new: int | None = None
        first_unheard: int | None = None
        before = len(used)
        for block in reversed(hashes):  # leaf first: parents must be younger than children
            position -= 1
            parent = take(block, None)
            if parent is None:
                parent = hashes[position - 1] if position else ROOT
                first_new = position
                shard = shards[block & _SHARD_MASK]
                mask = shard.get(block)
                if mask is None:
                    shard[block] = bit
                    first_unheard = position
                elif not mask & bit:
                    shard[block] = self._shared(mask | bit)
            used[block] = parent
        if first_new is not None or before > slot.capacity:
            self._grown(slot, before)
            if first_unheard:
                self._count_child(hashes[first_unheard - 1])
        return first_new

    def _extend(self, slot: Slot, parent: int, hashes: Sequence[int]) -> bool:
        """Add `hashes` behind `parent` and make the whole chain the most recent of the slot."""
        used, bit = slot.used, slot.bit
        if parent != ROOT and parent not in used:
            return False
        ancestors = []
        block = parent
        while block != ROOT:
            ancestors.append(block)
            above = used.get(block)
            if above is None or len(ancestors) > PROMPT_BLOCKS_MAX:
                break
            block = above
        before = len(used)
        slot.moves += len(hashes) + len(ancestors)
        first_unheard: int | None = None
        for position in range(len(hashes) - 1, -1, -1):
            block = hashes[position]
            if used.pop(block, None) is None:
                shard = self._shards[block & _SHARD_MASK]
                mask = shard.get(block)
                if mask is None:
                    shard[block] = bit
                    first_unheard = position
                elif not mask & bit:
                    shard[block] = self._shared(mask | bit)
            used[block] = hashes[position - 1] if position else parent
        for block in ancestors:
            above = used.pop(block, None)
            if above is not None:
                used[block] = above
        if first_unheard is not None:
            above = hashes[first_unheard - 1] if first_unheard else parent
            if above != ROOT:
                self._count_child(above)
        if len(used) != before or before > slot.capacity:
            self._grown(slot, before)
        return True

    def _grown(self, slot: Slot, before: int) -> None:
        """Keep the bounds after a slot grew from `before` blocks."""
        used = slot.used
        self._entries += len(used) - before
        # Some slack: the old end of a dict is reached over the holes of what was evicted there, so
        # evicting one by one would walk them again and again.
        over = len(used) - slot.capacity
        if over > slot.capacity >> 6:
            self._evict(slot, min(over, EVICT_PER_CALL))
        if self._graves:
            self.sweep(SWEEP_PER_CALL)
        if self._entries > self._entries_max:
            self._make_room()

    def _make_room(self) -> None:
        if self._graves:
            self.sweep(EVICT_PER_CALL)
        over = self._entries - self._entries_max
        if over > 0:
            fullest = max(
                (slot for holdings in self._workers.values() for slot in holdings.slots()),
                key=lambda slot: len(slot.used),
            )
            self._evict(fullest, min(over + (self._entries_max >> 10), EVICT_PER_CALL, len(fullest.used)))

    def _evict(self, slot: Slot, count: int) -> None:
        used, bit = slot.used, slot.bit
        oldest = iter(used)
        dead = [next(oldest) for _ in range(count)]
        for block in dead:
            del used[block]
            self._disown(bit, block)
        self._entries -= count

    def _disown(self, bit: int, block: int) -> None:
        shard = self._shards[block & _SHARD_MASK]
        mask = shard[block] & ~bit
        if mask:
            shard[block] = self._shared(mask)
        else:
            del shard[block]

    def _shared(self, mask: int) -> int:
        """The one object for an owner set: most blocks have one of few sets, and masks of 256 bits are big."""
        masks = self._masks
        known = masks.get(mask)
        if known is None:
            if len(masks) >= MASKS_MAX:
                masks.clear()
            known = masks[mask] = mask
        return known

    def _count_child(self, block: int) -> None:
        """A prompt went on behind `block` in a way not seen before."""
        trunk = self._trunk
        if block in trunk:
            trunk[block] = trunk.pop(block) + 1  # youngest again: the oldest one goes at the bound
            return
        branches = self._branches
        # Its first child usually came with the block itself and was not counted. (A leaf that grew is
        # counted one too many by this; nobody minds whether a trunk begins at 7 or 8.)
        children = branches.pop(block, 1) + 1
        if children >= self._settings.trunk_children:
            self._into_trunk(block, children)
            return
        branches[block] = children
        if len(branches) > BRANCHES_MAX:
            oldest = iter(branches)
            for gone in [next(oldest) for _ in range(BRANCHES_MAX >> 4)]:
                del branches[gone]

    def _into_trunk(self, block: int, children: int) -> None:
        trunk = self._trunk
        trunk[block] = children
        if len(trunk) > TRUNK_MAX:
            oldest = iter(trunk)
            for gone in [next(oldest) for _ in range(TRUNK_MAX >> 4)]:
                del trunk[gone]
