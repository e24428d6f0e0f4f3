"""Keeps the scheduler's slots and gates in step with the fleet: how many requests it takes, and who shares workers with whom.

Owns the way from workers to numbers: slots out of the `max_running_requests` labels (or `--max-concurrent-requests`), one gate
per set of workers. Models that the same workers serve (adapters of one base) share a gate, since they share the engines; models
with workers of their own do not get into each other's way. It runs nothing: a change marks the numbers as old, whoever needs
them next has them worked out. It must never decide who goes.
"""

from __future__ import annotations

from collections.abc import Iterator

from smg.fleet.pool import Pool
from smg.fleet.registry import Change, Flushed, Registry
from smg.fleet.worker import Kind, Status, Worker
from smg.services.asking import Log
from smg.tenancy.scheduler import Scheduler, Ticket
from smg.tenancy.slots import NO_BOUND, Gate, Slots

LABEL = "max_running_requests"
SLOTS_PER_WORKER = 64
"""Slots of a worker without the label: what a usual engine runs at once on one accelerator. As in the existing system."""
SLOTS_PER_WORKER_MAX = 1_000_000


class FleetSlots:
    """Slots and gates of one node.

    `limit` is one number of slots for all requests; None: the workers tell, each fleet has its own. `is_pair`: prefill is
    bounded by the prefill workers, slots by the decode workers (section 18).
    """

    def __init__(
        self, registry: Registry, scheduler: Scheduler, *, limit: int | None, is_pair: bool, log: Log
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._is_pair = is_pair
        self._log = log
        self.gates: dict[str, Gate] = {}
        """The gates by model, as of the last `refit`."""
        self._starting: dict[Gate, list[Worker]] = {}  # the ready workers that prefill behind each gate
        self._observed_s = 0.0
        self._orphans: list[Gate] = []  # of fleets that are gone, until nobody is there any more
        self._has_warned = False
        self._common: Slots | None = None
        self.is_stale = True
        if limit is not None:
            self._common = Slots()
            scheduler.add(self._common)
            scheduler.resize(self._common, limit or NO_BOUND, 0.0)
        registry.subscribe(self._changed)

    def gate_of(self, pool: Pool) -> Gate:
        """The gate before the workers of a pool; not to be asked while `is_stale`.

        A pool whose last worker has left since it was looked up gets an open one: dispatch knows what to tell its request.
        """
        gate = self.gates.get(pool.model)
        if gate is None:
            gate = Gate(self._common or self._new_slots())
            self._orphans.append(gate)
        return gate

    def refit(self, now: float) -> list[Ticket]:
        """Works everything out anew. Returns whom the scheduler's shell has to act on."""
        self.is_stale = False
        old, self.gates = self.gates, {}
        self._starting.clear()
        free = dict.fromkeys(old.values())
        changed: list[Ticket] = []
        for models, starting, running in self._fleets():
            gate = next((old[model] for model in models if old.get(model) in free), None)
            if gate is None:
                gate = Gate(self._common or self._new_slots())
            free.pop(gate, None)
            gate.widen(len(starting), self._scheduler.rules.prefill_ahead_s is not None)
            self.gates |= dict.fromkeys(models, gate)
            self._starting[gate] = starting
            if self._common is None:
                capacity = sum(map(slots_of, running)) if starting else NO_BOUND
                changed += self._scheduler.resize(gate.slots, capacity, now)
        for gate in free:
            gate.widen(0, False)
            self._orphans.append(gate)
            if self._common is None:
                changed += self._scheduler.resize(gate.slots, NO_BOUND, now)
        if self._common is not None:
            changed += self._scheduler.resize(self._common, self._common.capacity, now)
        self.warn_if_shrunk()
        return changed

    def observe(self, now: float) -> None:
        """Tells the gates what the engines' load reports say of work that waits in them; several times a second."""
        seconds, self._observed_s = now - self._observed_s, now
        for gate, workers in self._starting.items():
            if gate.has_estimates:
                told = (worker.report for worker in workers if worker.report_until_s > now)
                gate.observe(min(seconds, 1.0), [report.waiting for report in told if report is not None])

    def tidy(self) -> None:
        """Drops the gates of fleets that are gone and that nobody stands before any more."""
        if self._orphans:
            left = [gate for gate in self._orphans if gate.waiting or not gate.is_idle or self._is_used(gate)]
            for gate in self._orphans:
                if gate not in left:
                    self._scheduler.drop(gate)
            self._orphans = left

    def warn_if_shrunk(self, *, is_new: bool = False) -> None:
        """Says once, and once after each reload (`is_new`), that the reservations do not fit (ADM-6)."""
        if is_new:
            self._has_warned = False
        for slots in self._scheduler.slots:
            if slots.is_shrunk and not self._has_warned:
                self._has_warned = True
                self._log.warn(
                    "the reservations of the priority classes do not fit the fleet and were shrunk in proportion",
                    slots=slots.capacity,
                    reserved=sum(slots.reserved),
                )

    def _is_used(self, gate: Gate) -> bool:
        return self._common is None and gate.slots.total > 0

    def _new_slots(self) -> Slots:
        slots = Slots()
        self._scheduler.add(slots)
        return slots

    def _fleets(self) -> Iterator[tuple[list[str], list[Worker], list[Worker]]]:
        """Models that share their workers, with the ready workers that prefill for them and those that run them."""
        together: dict[frozenset[str], tuple[list[str], list[Worker], list[Worker]]] = {}
        for model, starting, running in self._models():
            names = frozenset(worker.id for worker in (*starting, *running))
            if names in together:
                together[names][0].append(model)
            else:
                together[names] = ([model], _ready(starting), _ready(running))
        yield from together.values()

    def _models(self) -> Iterator[tuple[str, tuple[Worker, ...], tuple[Worker, ...]]]:
        registry = self._registry
        if not self._is_pair:
            for pool in registry.pools():
                if pool.workers and pool.workers[0].kind is Kind.REGULAR:
                    yield pool.model, pool.workers, pool.workers
            return
        models = {pool.model for pool in registry.pools()}
        for model in sorted(models):
            prefills = registry.pool_of(model, Kind.PREFILL)
            decodes = registry.pool_of(model, Kind.DECODE)
            if prefills is not None and decodes is not None:
                yield model, prefills.workers, decodes.workers

    def _changed(self, change: Change) -> None:
        if not isinstance(change, Flushed):
            self.is_stale = True


def slots_of(worker: Worker) -> int:
    """Requests that a worker runs at once: its label, or what is usual."""
    text = worker.spec.labels.get(LABEL, "").strip()
    if text.isascii() and text.isdigit() and 0 < len(text) <= 7:
        return min(max(int(text), 1), SLOTS_PER_WORKER_MAX)
    return SLOTS_PER_WORKER


def _ready(workers: tuple[Worker, ...]) -> list[Worker]:
    return [worker for worker in workers if worker.status is Status.READY]
