"""Load that nodes share: what each has in flight, and what the engines say of themselves.

Owns both tables. What a node has in flight is told in absolute numbers within 50 ms of a change, so that nothing drifts and a
node that dies takes its load with it (mesh.md 3.1); the sum over peers becomes `Worker.peers_in_flight`. Engines are asked by
every node while there are few; above `SELF_POLLING_MAX` each engine has one asker, who passes its answer on. It must never
send to a worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from mesh import BoundError, Change, Lost, Put, Removed, State
from smg.bridge import rendezvous, words
from smg.bridge.words import VERSION, Burden, EngineLoad
from smg.fleet import load
from smg.fleet import registry as fleet
from smg.fleet.registry import Registry
from smg.fleet.worker import LoadReport, Worker

LOAD = "load"
ENGINE = "engine"

LOOK_INTERVAL_S = 1 / 30
"""Changes are looked for this often; with a hop on top the word is there within 50 ms."""
ROWS_MAX = 2_000
"""Workers in one value: about 30 KB. More workers take several values."""
SELF_POLLING_MAX = 16
"""Nodes up to which each asks all engines itself: 16 nodes at 4 polls a second are 64 small answers."""
RELAY_SILENCE_S = 2.0
"""An engine whose asker has told nothing for so long is asked by this node too, until it does."""


class SharedLoads:
    """See the module. `live` names the live peers; `owed_ms` is our own prefill not done on a worker, milliseconds;
    `peers_done` is told of a worker on which no peer has a request any more."""

    def __init__(
        self,
        state: State,
        registry: Registry,
        *,
        name: str,
        live: Callable[[], Iterable[str]],
        rules: load.ReportRules,
        owed_ms: Callable[[Worker], float],
        peers_done: Callable[[Worker], None],
    ) -> None:
        self._state = state
        self._registry = registry
        self._name = name
        self._live = live
        self._rules = rules
        self._owed_ms = owed_ms
        self._peers_done = peers_done
        self._told: dict[int, list[tuple[bytes, int]]] = {}  # what each of our values says
        self._refs: dict[bytes, Worker] = {}
        self._by_node: dict[
            tuple[str, bytes], dict[bytes, tuple[int, int]]
        ] = {}  # (node, key) → worker → numbers
        self._sums: dict[bytes, list[int]] = {}  # worker → [requests, prefill ms] of all peers
        self._heard_s: dict[str, float] = {}  # base URL → when its asker last told
        self._polls = 0
        self.garbage = 0
        for worker in registry.workers():
            self._refs[words.worker_ref(worker.id)] = worker
        registry.subscribe(self._changed)

    # -- ours

    def look(self) -> None:
        """Tell what changed of our requests in flight since the last look; nothing changed, nothing said."""
        rows = [(ref, worker.in_flight) for ref, worker in self._refs.items() if worker.in_flight]
        if not rows and not self._told:
            return
        pages = {page: rows[at : at + ROWS_MAX] for page, at in enumerate(range(0, len(rows), ROWS_MAX))}
        for page in self._told.keys() - pages.keys():
            del self._told[page]
            self._state.remove(LOAD, page.to_bytes(2, "big"))
        for page, told in pages.items():
            # Prefill drains by itself, as every reader knows; only requests that come and go are news.
            if self._told.get(page) == told:
                continue
            burden = Burden(VERSION, tuple((ref, count, self._owed(ref)) for ref, count in told))
            try:
                self._state.put(LOAD, page.to_bytes(2, "big"), words.encode(burden))
            except BoundError:
                continue
            self._told[page] = told

    def _owed(self, ref: bytes) -> int:
        return min(max(0, int(self._owed_ms(self._refs[ref]))), 0xFFFFFFFF)

    # -- theirs

    def on_load(self, change: Change) -> None:
        """A peer's numbers came or went."""
        if isinstance(change, Put):
            burden = words.read_burden(change.value)
            if burden is None:
                self.garbage += 1
                return
            rows = {ref: (requests, prefill_ms) for ref, requests, prefill_ms in burden.rows}
            self._replace((change.owner, change.key), rows)
        elif isinstance(change, Removed):
            self._replace((change.owner, change.key), {})
        elif isinstance(change, Lost):
            for source in list(self._by_node):
                self._replace(source, {})
            for owner, key, value in list(self._state.items(LOAD)):
                if owner != self._name:
                    self.on_load(Put(LOAD, owner, key, value))

    def of_peers(self) -> tuple[int, float]:
        """(requests in flight, seconds of prefill not done) of all peers, at their last word."""
        requests = sum(sums[0] for sums in self._sums.values())
        return requests, sum(sums[1] for sums in self._sums.values()) / 1000

    def _replace(self, source: tuple[str, bytes], rows: dict[bytes, tuple[int, int]]) -> None:
        before = self._by_node.pop(source, {})
        if rows:
            self._by_node[source] = rows
        for ref in before.keys() | rows.keys():
            sums = self._sums.setdefault(ref, [0, 0])
            for place in (0, 1):
                sums[place] += rows.get(ref, (0, 0))[place] - before.get(ref, (0, 0))[place]
            worker = self._refs.get(ref)
            if worker is not None:
                had = worker.peers_in_flight
                load.note_peers(worker, sums[0])
                if had and not sums[0]:
                    self._peers_done(worker)
            if sums == [0, 0]:
                del self._sums[ref]

    # -- engines

    def is_poller(self, base_url: str, now: float) -> bool:
        """Is this node to ask the engine itself?"""
        nodes = [self._name, *self._live()]
        if len(nodes) <= SELF_POLLING_MAX or rendezvous.first(base_url.encode(), nodes) == self._name:
            return True
        silent_s = now - self._heard_s.get(base_url, -math.inf)
        return silent_s > RELAY_SILENCE_S + 4 * self._rules.interval_s

    def polled(self, worker: Worker, told: LoadReport, now: float) -> None:
        """An engine answered this node; in a large mesh the others hear it from us."""
        nodes = [self._name, *self._live()]
        if len(nodes) <= SELF_POLLING_MAX or rendezvous.first(worker.base_url.encode(), nodes) != self._name:
            return
        self._polls = (self._polls + 1) & 0xFFFFFFFF
        word = EngineLoad(
            VERSION,
            max(0, int((now - told.at_s) * 1000)),
            told.running,
            told.waiting,
            told.waiting_tokens,
            told.running_tokens,
            told.kv_usage,
            told.kv_capacity_tokens,
            told.throughput_tps,
            told.cache_hit_rate,
            self._polls,
        )
        try:
            self._state.put(ENGINE, words.worker_key(worker.id), words.encode(word))
        except BoundError:
            return

    def on_engine(self, change: Change, now: float) -> None:
        """An engine answered another node."""
        if not isinstance(change, Put):
            return
        word = words.read_engine_load(change.value)
        worker = self._registry.by_id(words.id_of_key(change.key))
        if word is None:
            self.garbage += 1
            return
        if worker is None:
            return
        at_s = now - word.age_ms / 1000
        self._heard_s[worker.base_url] = now
        if worker.report is not None and worker.report.at_s >= at_s:
            return
        told = LoadReport(
            at_s=at_s,
            running=word.running,
            waiting=word.waiting,
            waiting_tokens=word.waiting_tokens,
            running_tokens=word.running_tokens,
            kv_usage=word.kv_usage,
            kv_capacity_tokens=word.kv_capacity_tokens,
            throughput_tps=word.throughput_tps,
            cache_hit_rate=word.cache_hit_rate,
        )
        self._registry.reported(worker, told, self._rules)

    def _changed(self, change: fleet.Change) -> None:
        ref = words.worker_ref(change.worker.id)
        if isinstance(change, fleet.Added):
            self._refs[ref] = change.worker
            sums = self._sums.get(ref)
            if sums is not None:
                load.note_peers(change.worker, sums[0])
        elif isinstance(change, fleet.Removed):
            if self._refs.get(ref) is change.worker:
                del self._refs[ref]
            self._heard_s.pop(change.worker.base_url, None)
