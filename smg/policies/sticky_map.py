"""Which worker a routing key sticks to (contract RT-5, RT-6).

Owns the map key -> at most two workers: the one that has the key, and the one that had it before. A key moves only when
its worker is no candidate; then it prefers the worker before, whose cache may still know it, and stays wherever it went.
The map is bounded twice, by idle time and by number. It never picks a worker for a new key: the policy does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from smg.fleet.hash_ring import position_of
from smg.fleet.worker import Worker
from smg.policies.candidates import could_serve
from smg.policies.shared_keys import OWN_KEYS, SharedKeys

KEYS_MAX = 131_072
"""Keys per model that are remembered, about 30 MB. Clients choose keys, so only a number bounds the memory; the key
unused for longest goes first."""

HIT = "occupied_hit"
MISS = "occupied_miss"
VACANT = "vacant"


class _Holder:
    """A worker as holder of keys. Gone for good once the worker is removed, also for a new worker of the same id."""

    __slots__ = ("is_gone", "keys", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.keys = 0  # keys whose present worker this is
        self.is_gone = False


class _Entry:
    """Where a key is, where it was before, when it was used last."""

    __slots__ = ("before", "holder", "used_s")

    def __init__(self, holder: _Holder, used_s: float) -> None:
        self.holder = holder
        self.before: _Holder | None = None
        self.used_s = used_s


class StickyMap:
    """Keys and their workers. A key is kept as its 64-bit hash: clients send keys of any length."""

    __slots__ = ("_entries", "_holders", "_idle_max_s", "_shared")

    def __init__(self, idle_max_s: float, shared: SharedKeys = OWN_KEYS) -> None:
        self._idle_max_s = idle_max_s
        self._shared = shared
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # longest unused first
        self._holders: dict[str, _Holder] = {}  # worker id -> holder; none of them is gone

    def __len__(self) -> int:
        return len(self._entries)

    def worker_of(self, key: str, members: Mapping[str, Worker], now: float) -> Worker | None:
        """The worker of `members` that the key sticks to; None when it is new, idle for too long, or homeless."""
        position = position_of(key)
        entry = self._entries.get(position)
        if entry is None or entry.used_s + self._idle_max_s < now:
            return members.get(self._shared.worker_of(position) or "")  # perhaps another node knows it
        for holder in (entry.holder, entry.before):
            if holder is not None and not holder.is_gone and members.get(holder.worker.id) is holder.worker:
                return holder.worker
        return None

    def keys_of(self, worker: Worker) -> int:
        """Keys that stick to `worker` (`--assignment-mode min_group`); idle ones count until they are swept."""
        holder = self._holders.get(worker.id)
        return 0 if holder is None else holder.keys

    def place(self, key: str, worker: Worker, now: float) -> str:
        """A call with this key goes to `worker`: `HIT` its place, `MISS` it had to move, `VACANT` it is new.

        A key whose worker could serve does not move: the call was only kept away from it as a retry.
        """
        entries = self._entries
        self._sweep(now)
        position = position_of(key)
        entry = entries.get(position)
        if entry is not None and entry.used_s + self._idle_max_s < now:  # idle for too long, not swept yet
            self._drop(entries.pop(position))
            entry = None
        if entry is None:
            holder = self._holder(worker)
            holder.keys += 1
            entries[position] = _Entry(holder, now)
            if len(entries) > KEYS_MAX:
                self._drop(entries.popitem(last=False)[1])
            known = self._shared.worker_of(position)
            self._shared.placed(position, worker.id, now)
            return VACANT if known is None else HIT if known == worker.id else MISS
        entry.used_s = now
        entries.move_to_end(position)
        old = entry.holder
        if old.worker is worker and not old.is_gone:
            self._shared.placed(position, worker.id, now)
            return HIT
        if not old.is_gone and could_serve(old.worker, now):
            return MISS
        old.keys -= 1
        entry.before = None if old.is_gone else old
        entry.holder = self._holder(worker)
        entry.holder.keys += 1
        self._shared.placed(position, worker.id, now)
        return MISS

    def heard(self, position: int, worker: Worker, now: float) -> None:
        """Another node has put a key onto `worker`: a key known here moves along; others are asked for when needed."""
        entry = self._entries.get(position)
        if entry is None:
            return
        old = entry.holder
        if old.worker is not worker or old.is_gone:
            old.keys -= 1
            entry.before = None if old.is_gone else old
            entry.holder = self._holder(worker)
            entry.holder.keys += 1
        if entry.used_s < now:
            entry.used_s = now
            self._entries.move_to_end(position)

    def forget(self, worker: Worker) -> None:
        """`worker` left: no key sticks to it any more."""
        holder = self._holders.pop(worker.id, None)
        if holder is not None:
            holder.is_gone = True

    def _holder(self, worker: Worker) -> _Holder:
        holder = self._holders.get(worker.id)
        if holder is None or holder.worker is not worker:
            if holder is not None:
                holder.is_gone = True
            holder = self._holders[worker.id] = _Holder(worker)
        return holder

    def _sweep(self, now: float) -> None:
        """Drops keys that were idle for too long: at most two per call, so each call pays for itself and no more."""
        entries = self._entries
        for _ in range(2):
            if not entries:
                return
            position = next(iter(entries))
            if entries[position].used_s + self._idle_max_s >= now:
                return
            self._drop(entries.pop(position))

    def _drop(self, entry: _Entry) -> None:
        entry.holder.keys -= 1
        assert entry.holder.keys >= 0
