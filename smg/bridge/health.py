"""Bad news of workers: what each node sees for itself, told to the others (contract MSH-5).

Owns the observations, one per node and worker, only while something is bad: not ready, failed, breaker open. A peer's bad
news makes this node look at once, and that is all: it must never decide anything, so that a node with a broken route takes no
worker from the others. Numbers of the moment: they go with the node that told them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mesh import BoundError, Change, Lost, Put, Removed, State
from smg.bridge import words
from smg.bridge.words import BREAKS, FAILS, REFUSES, VERSION, Observation
from smg.fleet import registry as fleet
from smg.fleet.registry import Registry
from smg.fleet.worker import Status, Worker

HEALTH = "health"
LOOK_AGAIN_S = 1.0
"""A peer can make this node probe a worker once in this time, so that a peer's flapping is not ours."""

_KINDS = {Status.NOT_READY: REFUSES, Status.FAILED: FAILS}


class SharedHealth:
    """See the module. `probe` looks at a worker now (`HealthProbes.note_refused`); `live` names the live peers."""

    def __init__(
        self,
        state: State,
        registry: Registry,
        *,
        name: str,
        probe: Callable[[Worker], None],
        live: Callable[[], Iterable[str]],
    ) -> None:
        self._state = state
        self._registry = registry
        self._name = name
        self._probe = probe
        self._live = live
        self._told: dict[str, int] = {}  # worker id → what is bad about it here
        self._bad: dict[str, dict[str, int]] = {}  # worker id → node → what is bad about it there
        self._looked_s: dict[str, float] = {}
        self.asked = 0
        """Probes that peers' news caused."""
        self.garbage = 0
        registry.subscribe(self._changed)

    def refresh(self, now: float) -> None:
        """Several times a second: breakers change with time alone, so they are looked at."""
        for worker in self._registry.workers():
            self._tell(worker, now)

    def on_change(self, change: Change, now: float) -> None:
        """A peer's observation came or went."""
        if isinstance(change, Removed):
            nodes = self._bad.get(words.id_of_key(change.key))
            if nodes is not None:
                nodes.pop(change.owner, None)
                if not nodes:
                    del self._bad[words.id_of_key(change.key)]
        elif isinstance(change, Put):
            observation, worker_id = words.read_observation(change.value), words.id_of_key(change.key)
            if observation is None or not worker_id:
                self.garbage += 1
                return
            self._bad.setdefault(worker_id, {})[change.owner] = observation.kind
            self._look(worker_id, now)
        elif isinstance(change, Lost):
            self._bad.clear()
            for owner, key, value in list(self._state.items(HEALTH)):
                if owner != self._name:
                    self.on_change(Put(HEALTH, owner, key, value), now)

    def bad_everywhere(self, worker_id: str) -> bool:
        """Does every live peer say that it does not reach the worker? True without peers."""
        nodes = self._bad.get(worker_id, {})
        return all(nodes.get(name) in (REFUSES, FAILS) for name in self._live())

    def of(self, worker_id: str) -> dict[str, int]:
        """Which peers see what as bad about a worker."""
        return dict(self._bad.get(worker_id, {}))

    def _look(self, worker_id: str, now: float) -> None:
        worker = self._registry.by_id(worker_id)
        if worker is None or worker.status is not Status.READY:
            return
        if now - self._looked_s.get(worker_id, -LOOK_AGAIN_S) < LOOK_AGAIN_S:
            return
        self._looked_s[worker_id] = now
        self.asked += 1
        self._probe(worker)

    def _tell(self, worker: Worker, now: float) -> None:
        kind = _KINDS.get(worker.status, 0)
        if not kind and worker.status is Status.READY and worker.breaker.state_at(now) == "open":
            kind = BREAKS
        if kind == self._told.get(worker.id, 0):
            return
        key = words.worker_key(worker.id)
        if not kind:
            del self._told[worker.id]
            self._state.remove(HEALTH, key)
            return
        try:
            self._state.put(HEALTH, key, words.encode(Observation(VERSION, kind)))
        except BoundError:
            return  # more bad workers than a mesh has room for; the next look tries again
        self._told[worker.id] = kind

    def _changed(self, change: fleet.Change) -> None:
        if not isinstance(change, fleet.Removed):
            return
        worker = change.worker
        self._looked_s.pop(worker.id, None)
        if self._told.pop(worker.id, None) is not None:
            self._state.remove(HEALTH, words.worker_key(worker.id))
