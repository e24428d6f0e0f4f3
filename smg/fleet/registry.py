"""The set of workers: who they are, which models they serve, how they are (contract sections 9 to 11).

Owns every change to a worker that is not load: registration, specification, status, models, engine, overload, drain,
removal. It keeps the indices (id, URL, model, alias) and the pools consistent with the workers and tells subscribers
what changed, at once and in order. It never probes, asks or waits for a worker, and never chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from smg.errors import GatewayError
from smg.fleet import load
from smg.fleet.breaker import Breaker
from smg.fleet.health import TRANSITIONS, Health
from smg.fleet.pool import Pool
from smg.fleet.recognition import told_models
from smg.fleet.worker import Engine, Kind, LoadReport, ModelCard, Status, Worker, WorkerSpec, normalised_url

WORKERS_MAX = 16_384
"""Most workers of one gateway. Each costs some kilobytes, a probe and a poll; a client of the worker API (or a broken
discovery source) that adds more than this is not describing a fleet."""


class Added(msgspec.Struct, frozen=True):
    """A worker was registered."""

    worker: Worker


class Removed(msgspec.Struct, frozen=True):
    """A worker is gone."""

    worker: Worker


class Updated(msgspec.Struct, frozen=True):
    """Specification or engine of a worker changed."""

    worker: Worker


class StatusChanged(msgspec.Struct, frozen=True):
    """A worker has another status; `old` is the one before."""

    worker: Worker
    old: Status


class ModelsChanged(msgspec.Struct, frozen=True):
    """A worker serves other models; `old` are the names before."""

    worker: Worker
    old: tuple[str, ...]


class Flushed(msgspec.Struct, frozen=True):
    """A worker's KV cache is empty."""

    worker: Worker


Change = Added | Removed | Updated | StatusChanged | ModelsChanged | Flushed


class Registry:
    """All workers of this gateway.

    `aliases` are those of `--model-alias` (alias -> name). `make_health` and `make_breaker` give the machines of a new
    worker; on an update only the rules of what they give are used (CB-5).
    """

    def __init__(
        self,
        *,
        aliases: Mapping[str, str],
        make_health: Callable[[WorkerSpec], Health],
        make_breaker: Callable[[WorkerSpec], Breaker],
        drain_timeout_s: float = 600.0,
    ) -> None:
        self._given_aliases = dict(aliases)
        self._make_health = make_health
        self._make_breaker = make_breaker
        self._drain_timeout_s = drain_timeout_s
        self._by_id: dict[str, Worker] = {}  # in order of registration
        self._by_url: dict[str, Worker] = {}
        self._workers: tuple[Worker, ...] = ()
        self._next_order = 0
        self._pools: dict[Kind, dict[str, Pool]] = {kind: {} for kind in Kind}
        self._regular = self._pools[Kind.REGULAR]
        self._wild: Pool | None = None  # self._regular[""], for the hot path
        self._pools_of: dict[str, tuple[Pool, ...]] = {}  # worker id -> the pools it is in
        self._served: tuple[str, ...] = ()
        self._aliases: dict[str, str] = dict(aliases)
        self._are_names_old = False
        self._draining: dict[str, float] = {}  # worker id -> deadline
        self._subscribers: list[Callable[[Change], None]] = []

    # Reading

    def workers(self) -> Sequence[Worker]:
        """All workers in order of registration."""
        return self._workers

    def by_id(self, worker_id: str) -> Worker | None:
        """The worker with this id."""
        return self._by_id.get(worker_id)

    def by_url(self, url: str) -> Worker | None:
        """The worker with this normalised URL (with its `@rank`)."""
        return self._by_url.get(url)

    def resolve(self, model: str) -> str:
        """The canonical name of a model (MOD-4). A name that a worker serves is never an alias."""
        return self._aliases.get(model, model)

    def served_models(self) -> tuple[str, ...]:
        """Names of all models that workers told, sorted (MOD-1)."""
        return self._served

    def pool(self, model: str) -> Pool | None:
        """The regular workers for a canonical model name; None when nobody can serve it (ERR-9)."""
        return self._regular.get(model, self._wild)

    def pool_of(self, model: str, kind: Kind) -> Pool | None:
        """The workers of one kind for a canonical model name (the legs of section 18); None when there is none."""
        pools = self._pools[kind]
        return pools.get(model) or pools.get("")

    def pools(self) -> list[Pool]:
        """Every pool there is, of all kinds."""
        return [pool for pools in self._pools.values() for pool in pools.values()]

    def subscribe(self, callback: Callable[[Change], None]) -> None:
        """`callback` is called with every change, after it happened, in the order of subscription. It may not raise."""
        self._subscribers.append(callback)

    # Membership

    def add(self, spec: WorkerSpec, now: float) -> Worker:
        """Registers a worker; it is `pending`, or `ready` at once when it is never probed (HLT-3).

        Raises GatewayError, and nothing has changed: 400 `BAD_REQUEST` for what `normalised_url` refuses, a wrong kind
        or a full fleet; 409 `WORKER_CREATE_IN_PROGRESS` while the same URL has not been ready yet, else 409
        `WORKER_ALREADY_EXISTS` (WRK-7).
        """
        worker = self._new_worker(spec)
        known = self._by_url.get(worker.url)
        if known is not None:
            if known.status is Status.PENDING:
                raise GatewayError(409, "WORKER_CREATE_IN_PROGRESS", f"Worker {known.id} is being added")
            raise GatewayError(409, "WORKER_ALREADY_EXISTS", f"Worker {known.id} exists already")
        if len(self._by_id) >= WORKERS_MAX:
            raise GatewayError(400, "BAD_REQUEST", f"There are {WORKERS_MAX} workers already")
        self._next_order += 1
        worker.cards = told_models(spec)
        worker.models = tuple(card.id for card in worker.cards)
        self._by_id[worker.id] = worker
        self._by_url[worker.url] = worker
        self._workers = (*self._workers, worker)
        self._join(worker)
        worker.breaker.on_change = _Invalidation(self._pools_of, worker.id)
        worker.health.entered(Status.PENDING, now)
        self._tell(Added(worker))
        if worker.health.is_disabled:
            self.set_status(worker, Status.READY, now)
        return worker

    def update(self, worker: Worker, spec: WorkerSpec, now: float) -> None:
        """`worker` has this specification from now on; id, order, load and breaker state stay (WRK-11, WRK-12, CB-5).

        Models change when the new specification names some, or when it no longer names what the old one named. Raises
        GatewayError 400 `BAD_REQUEST`, and nothing has changed, when `spec.url` is another worker's.
        """
        url, rank = normalised_url(spec.url)
        rank = rank if spec.dp_rank is None else spec.dp_rank
        if (url if rank is None else f"{url}@{rank}") != worker.url:
            raise GatewayError(400, "BAD_REQUEST", f"URL mismatch: this worker is {worker.url}", param="url")
        kind = _kind_of(spec)
        old_spec, old_told = worker.spec, told_models(worker.spec)
        worker.spec = spec
        if spec.runtime_type is not None:
            worker.engine = Engine(spec.runtime_type)
        elif old_spec.runtime_type is not None:
            worker.engine = None  # it was told, and is not any more: to be recognised anew
        worker.health.set_rules(self._make_health(spec).rules)
        worker.breaker.set_rules(self._make_breaker(spec).rules)
        if kind is not worker.kind:
            self._part(worker)
            worker.kind = kind
            self._join(worker)
        told = told_models(spec)
        if told != old_told:
            self.set_models(worker, told)
        self._tell(Updated(worker))
        if worker.health.is_disabled and Status.READY in TRANSITIONS[worker.status]:
            self.set_status(worker, Status.READY, now)

    def drain(self, worker: Worker, now: float) -> None:
        """No new request for `worker`; `drained` names it when it may go. Draining twice changes nothing."""
        if worker.status is not Status.DRAINING:
            self._draining[worker.id] = now + self._drain_timeout_s
            self.set_status(worker, Status.DRAINING, now)

    def drained(self, now: float) -> list[Worker]:
        """Draining workers with nothing in flight, or past the drain timeout (WRK-13): `remove` them."""
        return [
            self._by_id[worker_id]
            for worker_id, deadline_s in self._draining.items()
            if deadline_s <= now or self._by_id[worker_id].in_flight == 0
        ]

    def next_drain_deadline(self) -> float | None:
        """The earliest time at which a draining worker goes whatever it has in flight; None when none drains."""
        return min(self._draining.values(), default=None)

    def remove(self, worker: Worker) -> None:
        """`worker` is gone. Requests that are in flight on it keep their record; nobody finds it any more."""
        if self._by_id.get(worker.id) is not worker:
            return
        del self._by_id[worker.id]
        del self._by_url[worker.url]
        self._workers = tuple(self._by_id.values())
        self._draining.pop(worker.id, None)
        self._part(worker)
        self._renew_names(worker)
        self._tell(Removed(worker))

    # State of a worker

    def set_status(self, worker: Worker, status: Status, now: float, message: str = "") -> None:
        """The only place where a status changes. Same status: only the message does. Asserts the table of `health.py`."""
        worker.message = message
        old = worker.status
        if status is old:
            return
        assert status in TRANSITIONS[old], f"{old} -> {status}"
        worker.status = status
        worker.health.entered(status, now)
        self._invalidate(worker)
        self._tell(StatusChanged(worker, old))

    def set_models(self, worker: Worker, cards: tuple[ModelCard, ...]) -> None:
        """`worker` serves these models, with their aliases; none = every name that nobody claims (MOD-3)."""
        old = worker.models
        models = tuple(dict.fromkeys(card.id for card in cards))
        if cards == worker.cards and models == old:
            return
        self._part(worker)
        worker.cards = cards
        worker.models = models
        self._join(worker)
        if models != old:
            self._tell(ModelsChanged(worker, old))

    def set_engine(self, worker: Worker, engine: Engine) -> None:
        """The software in `worker` is known."""
        if worker.engine is not engine:
            worker.engine = engine
            self._tell(Updated(worker))

    def set_overloaded(self, worker: Worker, is_overloaded: bool) -> None:
        """`worker` is over the overload limits, or no longer (RT-1)."""
        if worker.is_overloaded != is_overloaded:
            worker.is_overloaded = is_overloaded
            self._invalidate(worker)

    def reported(self, worker: Worker, told: LoadReport, rules: load.ReportRules) -> None:
        """`worker` told its load: the one way a report enters (`fleet/load.py`)."""
        is_overloaded = load.report(worker, told, rules)
        if worker.is_overloaded and is_overloaded:
            self._invalidate(worker)  # the overload lasts longer, also when it had lapsed meanwhile
        self.set_overloaded(worker, is_overloaded)

    def flushed(self, worker: Worker) -> None:
        """`worker`'s KV cache is empty (OPS-1)."""
        self._tell(Flushed(worker))

    # Indices

    def _new_worker(self, spec: WorkerSpec) -> Worker:
        return Worker(
            spec, self._next_order, self._make_health(spec), self._make_breaker(spec), _kind_of(spec)
        )

    def _join(self, worker: Worker) -> None:
        """Puts `worker` into the pools of its models."""
        pools = self._pools[worker.kind]
        joined = []
        for model in worker.models or ("",):
            pool = pools.get(model)
            if pool is None:
                pool = pools[model] = Pool(model)
                self._are_names_old = True
            members = (*pool.workers, worker)
            if len(members) > 1 and members[-2].order > worker.order:
                members = tuple(sorted(members, key=_order_of))
            pool.set_workers(members)
            joined.append(pool)
        self._pools_of[worker.id] = tuple(joined)
        self._renew_names(worker)

    def _part(self, worker: Worker) -> None:
        """Takes `worker` out of its pools; an empty pool goes. Names are renewed by who joins or goes next."""
        pools = self._pools[worker.kind]
        for pool in self._pools_of.pop(worker.id):
            pool.set_workers(tuple(other for other in pool.workers if other is not worker))
            if not pool.workers:
                del pools[pool.model]
                self._are_names_old = True
        if any(card.aliases for card in worker.cards):
            self._are_names_old = True

    def _renew_names(self, worker: Worker) -> None:
        """Works out served names, aliases and the wildcard pool anew, if `worker`'s coming or going touched them.

        Most changes do not: a fleet of thousands that serves one model is registered without a look at the others.

        Aliases of the command line go before those of cards, among cards the first registered worker's; one hop from
        an alias of the command line to an alias of a card is followed.
        """
        if not self._are_names_old and not any(card.aliases for card in worker.cards):
            return
        self._are_names_old = False
        self._wild = self._regular.get("")
        names = {model for pools in self._pools.values() for model in pools if model}
        if len(names) != len(self._served) or any(name not in names for name in self._served):
            self._served = tuple(sorted(names))
        cards: dict[str, str] = {}
        for other in self._workers:
            for card in other.cards:
                for alias in card.aliases:
                    cards.setdefault(alias, card.id)
        aliases = {alias: cards.get(name, name) for alias, name in self._given_aliases.items()}
        for alias, name in cards.items():
            aliases.setdefault(alias, name)
        self._aliases = {alias: name for alias, name in aliases.items() if alias not in names}

    def _invalidate(self, worker: Worker) -> None:
        for pool in self._pools_of.get(worker.id, ()):
            pool.invalidate()

    def _tell(self, change: Change) -> None:
        for callback in self._subscribers:
            callback(change)


class _Invalidation:
    """What a breaker calls: its worker's pools have to be judged anew. Knows the worker by id, so it keeps nothing alive."""

    __slots__ = ("_pools_of", "_worker_id")

    def __init__(self, pools_of: dict[str, tuple[Pool, ...]], worker_id: str) -> None:
        self._pools_of = pools_of
        self._worker_id = worker_id

    def __call__(self) -> None:
        for pool in self._pools_of.get(self._worker_id, ()):
            pool.invalidate()


def _order_of(worker: Worker) -> int:
    return worker.order


def _kind_of(spec: WorkerSpec) -> Kind:
    try:
        return Kind(spec.worker_type)
    except ValueError:
        raise GatewayError(
            400, "BAD_REQUEST", f"worker_type {spec.worker_type!r} is not known", param="worker_type"
        ) from None
