"""One look at the whole node: everything the page shows, once a second, as one document.

Owns the page's words. What is in them is a list of what may be shown, not of what must be left out: names of workers are hosts and
ports, models are those that are served, and there is no place for a key, a path, a label, a tenant, the id of a request or
a text. A machine: it reads rooms that it was given and changes none of them. Lists have bounds, so that neither a fleet of a
thousand workers nor a name as long as a book makes the document large.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from smg.api.endpoints import ENDPOINTS
from smg.fleet import load
from smg.fleet.registry import Registry
from smg.fleet.worker import Status, Worker
from smg.gateway.decisions import Decision, Decisions
from smg.gateway.mesh_api import MeshView
from smg.telemetry.metrics import Histogram, Metrics
from smg.ui.pace import CURVE_S, HEADLINE_S, POINTS_MAX, Pace, Reading, quantile, total

WORKERS_SHOWN_MAX = 200
"""Rows; of larger fleets those that are out or busy. Numbers over all workers count all of them."""
MEMBERS_SHOWN_MAX = 64
MODELS_SHOWN_MAX = 4
NAME_CHARS_MAX = 120
"""Names come from engines and from other nodes."""

Sample = tuple[str, tuple[str, ...], float]


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Requests and tokens of this node; rates are per second."""

    requests_per_s: float
    failures_per_s: float
    requests: int
    in_flight: int
    waiting: int
    tokens_in_per_s: float
    tokens_out_per_s: float


class Hits(msgspec.Struct, frozen=True, kw_only=True):
    """Caches: `ratio` is matched over prompt characters of the last minute, `ratio_ever` since the start; `cached_ratio` the cached
    tokens that engines told over all prompt tokens they told. None: nothing to divide by."""

    ratio: float | None
    ratio_ever: float | None
    cached_ratio: float | None
    cached_tokens: int


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles in seconds of `count` observations; `is_ever`: none in the last minute, so these are since the start."""

    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    count: int
    is_ever: bool


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. `running`, `waiting`, `kv_usage` are the engine's words while they are fresh."""

    id: str
    name: str
    kind: str
    engine: str
    models: tuple[str, ...]
    models_more: int
    status: str
    breaker: str
    is_overloaded: bool
    in_flight: int
    peers_in_flight: int
    running: int | None
    waiting: int | None
    kv_usage: float | None
    share: float | None
    finished: int


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """All workers in numbers, and the rows of some."""

    total: int
    ready: int
    hidden: int
    rows: tuple[WorkerRow, ...]


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """One member of the mesh."""

    name: str
    state: str
    is_self: bool
    version: str
    rtt_ms: float | None
    lag_ms: float | None
    last_seen_s: float


class Mesh(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh as this node sees it."""

    state: str
    members: int
    alive: int
    is_converged: bool
    is_partitioned: bool
    lag_p50_ms: float
    lag_max_ms: float
    bytes_in_per_s: float
    bytes_out_per_s: float
    hidden: int
    rows: tuple[MemberRow, ...]


class DecisionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One decision; times in seconds. `matched` is the share of the prompt believed to be cached on the worker."""

    number: int
    age_s: float
    model: str
    endpoint: str
    leg: str
    worker_id: str
    worker: str
    policy: str
    decided_by: str
    owner: str | None
    matched: float | None
    cost: float | None
    wait: float | None
    prefill: float | None
    penalty: float | None


class Point(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One second of the curves: `at` in seconds since 1970, then as in the snapshot."""

    at: float
    requests_per_s: float
    failures_per_s: float
    in_flight: int
    hit_ratio: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    mesh_bytes_per_s: float


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What the page shows. `at` is in seconds since 1970."""

    node: str | None
    version: str
    at: float
    uptime_s: float
    delay_p99_s: float | None
    traffic: Traffic
    hits: Hits
    ttft: Waits
    workers: Workers
    mesh: Mesh | None
    decisions: tuple[DecisionRow, ...]
    points: tuple[Point, ...]


class Rooms(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked at."""

    registry: Registry
    metrics: Metrics
    decisions: Decisions
    mesh: MeshView | None
    cache_samples: Callable[[], Iterable[Sample]]
    waiting: Callable[[], tuple[int, int]]
    """(requests in flight, requests in the queue) of admission."""
    version: str


class Snapshots:
    """See the module. `started_s` is the clock's word when the node was built."""

    def __init__(self, rooms: Rooms, started_s: float) -> None:
        self._rooms = rooms
        self._started_s = started_s
        self._pace = Pace()
        self._points: deque[Point] = deque(maxlen=POINTS_MAX)

    def take(self, now: float, wall: float) -> Snapshot:
        """Look. `now` is the clock of dispatch, `wall` seconds since 1970; to be called once a second."""
        rooms, pace = self._rooms, self._pace
        workers = rooms.registry.workers()
        ttft_s, ttft = self._histogram("smg_router_ttft_seconds")
        delay_s, delay = self._histogram("smg_event_loop_delay_seconds")
        pace.read(self._reading(now, ttft, delay), {worker.id: _finished(worker) for worker in workers})
        in_flight, waiting = rooms.waiting()
        mesh_status = None if rooms.mesh is None else rooms.mesh.status()
        self._add_point(wall, in_flight, ttft_s)
        return Snapshot(
            node=None if mesh_status is None else _cut(str(mesh_status["node"])),
            version=rooms.version,
            at=round(wall, 2),
            uptime_s=round(now - self._started_s, 1),
            delay_p99_s=_rounded(quantile(delay_s, pace.counts("delay", HEADLINE_S), 0.99)),
            traffic=Traffic(
                requests_per_s=_brief(pace.per_s("requests")),
                failures_per_s=_brief(pace.per_s("failures")),
                requests=int(pace.last.requests),
                in_flight=in_flight,
                waiting=waiting,
                tokens_in_per_s=_brief(pace.per_s("tokens_in")),
                tokens_out_per_s=_brief(pace.per_s("tokens_out")),
            ),
            hits=self._hits(),
            ttft=self._waits(ttft_s),
            workers=_workers(workers, pace, now),
            mesh=None if mesh_status is None else self._mesh(mesh_status, rooms.mesh),
            decisions=tuple(self._decisions(now)),
            points=tuple(self._points),
        )

    # -- reading

    def _reading(self, now: float, ttft: tuple[int, ...], delay: tuple[int, ...]) -> Reading:
        sums: dict[str, float] = {}
        for name, _, value in self._rooms.cache_samples():
            sums[name] = sums.get(name, 0.0) + value
        return Reading(
            at_s=now,
            requests=self._sum("smg_router_requests_total"),
            failures=self._failures(),
            tokens_in=self._sum("smg_router_tokens_total", "input"),
            tokens_out=self._sum("smg_router_tokens_total", "output"),
            prompt_chars=sums.get("smg_cache_prompt_chars_total", 0.0),
            matched_chars=sums.get("smg_cache_matched_chars_total", 0.0),
            cached_tokens=sums.get("smg_cache_actual_tokens_total", 0.0),
            mesh_in=self._sum("smg_mesh_bytes_total", "in"),
            mesh_out=self._sum("smg_mesh_bytes_total", "out"),
            ttft=ttft,
            delay=delay,
        )

    def _sum(self, name: str, last_label: str | None = None) -> float:
        return sum(
            child.value
            for labels, child in self._rooms.metrics.children(name)
            if not isinstance(child, Histogram) and (last_label is None or labels[-1] == last_label)
        )

    def _failures(self) -> float:
        """Inference requests that were answered with 5xx."""
        return sum(
            child.value
            for (path, status, _), child in self._rooms.metrics.children("smg_http_responses_total")
            if not isinstance(child, Histogram) and status.startswith("5") and path in ENDPOINTS
        )

    def _histogram(self, name: str) -> tuple[Sequence[float], tuple[int, ...]]:
        found = [child for _, child in self._rooms.metrics.children(name) if isinstance(child, Histogram)]
        return (found[0].bounds_s, total(child.counts for child in found)) if found else ((0.0,), ())

    # -- telling

    def _hits(self) -> Hits:
        pace, last = self._pace, self._pace.last
        return Hits(
            ratio=_rounded(pace.ratio("matched_chars", "prompt_chars", HEADLINE_S)),
            ratio_ever=_rounded(last.matched_chars / last.prompt_chars) if last.prompt_chars else None,
            cached_ratio=_rounded(min(1.0, last.cached_tokens / last.tokens_in)) if last.tokens_in else None,
            cached_tokens=int(last.cached_tokens),
        )

    def _waits(self, bounds_s: Sequence[float]) -> Waits:
        counts: Sequence[int] = self._pace.counts("ttft", HEADLINE_S)
        is_ever = not any(counts)
        if is_ever:
            counts = self._pace.last.ttft
        return Waits(
            p50_s=_rounded(quantile(bounds_s, counts, 0.5)),
            p90_s=_rounded(quantile(bounds_s, counts, 0.9)),
            p99_s=_rounded(quantile(bounds_s, counts, 0.99)),
            count=sum(counts),
            is_ever=is_ever,
        )

    def _add_point(self, wall: float, in_flight: int, bounds_s: Sequence[float]) -> None:
        pace = self._pace
        ttft = pace.counts("ttft", CURVE_S)
        self._points.append(
            Point(
                at=round(wall, 1),
                requests_per_s=_brief(pace.per_s("requests")),
                failures_per_s=_brief(pace.per_s("failures")),
                in_flight=in_flight,
                hit_ratio=_rounded(pace.ratio("matched_chars", "prompt_chars", CURVE_S)),
                ttft_p50_s=_rounded(quantile(bounds_s, ttft, 0.5)),
                ttft_p90_s=_rounded(quantile(bounds_s, ttft, 0.9)),
                mesh_bytes_per_s=_brief(pace.per_s("mesh_in", "mesh_out")),
            )
        )
        while wall - self._points[0].at > POINTS_MAX:
            self._points.popleft()  # nobody watched for a while

    def _mesh(self, status: dict[str, Any], view: MeshView | None) -> Mesh:
        members = () if view is None else view.members()
        rows = sorted((_member(row) for row in members), key=_member_order)
        lag = status["lag_secs"]
        return Mesh(
            state=str(status["state"]),
            members=int(status["members"]),
            alive=int(status["alive"]),
            is_converged=bool(status["converged"]),
            is_partitioned=bool(status.get("partitioned", False)),
            lag_p50_ms=round(lag["p50"] * 1000, 1),
            lag_max_ms=round(lag["max"] * 1000, 1),
            bytes_in_per_s=_brief(self._pace.per_s("mesh_in")),
            bytes_out_per_s=_brief(self._pace.per_s("mesh_out")),
            hidden=max(0, len(rows) - MEMBERS_SHOWN_MAX),
            rows=tuple(rows[:MEMBERS_SHOWN_MAX]),
        )

    def _decisions(self, now: float) -> Iterator[DecisionRow]:
        for decision in self._rooms.decisions.last():
            worker = self._rooms.registry.by_id(decision.receipt["chosen"])
            yield _decision(decision, "" if worker is None else name_of(worker), now)


def name_of(worker: Worker) -> str:
    """Host, port and rank of a worker: what tells workers apart without the path, which may be somebody's secret."""
    return _cut(worker.host_header.decode("latin-1") + worker.url[len(worker.base_url) :])


def _workers(workers: Sequence[Worker], pace: Pace, now: float) -> Workers:
    shown = workers
    if len(workers) > WORKERS_SHOWN_MAX:
        shown = sorted(workers, key=lambda worker: (worker.status is Status.READY, -worker.in_flight))
        shown = sorted(shown[:WORKERS_SHOWN_MAX], key=lambda worker: worker.order)
    shares = pace.shares()
    return Workers(
        total=len(workers),
        ready=sum(worker.status is Status.READY for worker in workers),
        hidden=len(workers) - len(shown),
        rows=tuple(_worker(worker, shares.get(worker.id), now) for worker in shown),
    )


def _worker(worker: Worker, share: float | None, now: float) -> WorkerRow:
    told = load.fresh_report(worker, now)
    return WorkerRow(
        id=worker.id,
        name=name_of(worker),
        kind=worker.kind.value,
        engine="" if worker.engine is None else worker.engine.value,
        models=tuple(_cut(model) for model in worker.models[:MODELS_SHOWN_MAX]),
        models_more=max(0, len(worker.models) - MODELS_SHOWN_MAX),
        status=worker.status.value,
        breaker=worker.breaker.state_at(now),
        is_overloaded=told is not None and worker.is_overloaded,
        in_flight=worker.in_flight,
        peers_in_flight=worker.peers_in_flight,
        running=None if told is None else told.running,
        waiting=None if told is None else told.waiting,
        kv_usage=None if told is None else _rounded(told.kv_usage),
        share=_rounded(share),
        finished=_finished(worker),
    )


def _finished(worker: Worker) -> int:
    return worker.breaker.successes_total + worker.breaker.failures_total


def _member(row: dict[str, Any]) -> MemberRow:
    lag_s = row.get("lag_secs")
    return MemberRow(
        name=_cut(str(row["name"])),
        state=str(row["state"]),
        is_self=bool(row["self"]),
        version=_cut(str(row["version"])),
        rtt_ms=_rounded(row["rtt_ms"]),
        lag_ms=None if lag_s is None else round(lag_s * 1000, 1),
        last_seen_s=round(row["last_seen_secs"], 1),
    )


def _member_order(row: MemberRow) -> tuple[bool, str]:
    """Those that are gone come last."""
    return row.state in ("dead", "left") and not row.is_self, row.name


def _decision(decision: Decision, worker: str, now: float) -> DecisionRow:
    receipt = decision.receipt
    blocks = receipt.get("blocks")
    terms = receipt.get("terms") or {}
    owner = receipt.get("owner")
    return DecisionRow(
        number=decision.number,
        age_s=round(max(0.0, now - decision.at_s), 2),
        model=_cut(decision.model),
        endpoint=decision.endpoint,
        leg=decision.leg,
        worker_id=receipt["chosen"],
        worker=worker,
        policy=receipt["policy"],
        decided_by=receipt["decided_by"],
        owner=None if owner is None else _cut(owner),
        matched=_rounded(min(1.0, receipt["matched_blocks"] / blocks)) if blocks else None,
        cost=receipt.get("cost"),
        wait=terms.get("wait"),
        prefill=terms.get("prefill"),
        penalty=terms.get("penalty"),
    )


def _cut(text: str) -> str:
    return text if len(text) <= NAME_CHARS_MAX else text[: NAME_CHARS_MAX - 1] + "…"


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if value is not None and math.isfinite(value) else None


def _brief(value: float) -> float:
    return round(value, 2)
