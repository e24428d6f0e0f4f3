"""Load polls: asks every engine how loaded it is and hands its word to the registry.

Owns which question an engine understands (learned per base URL), when it is asked again, and what happens when it
does not answer. An engine is asked by one poll at a time, at its base URL, for all of its ranks together; polls are
spread over the interval. Parsing is `fleet/engine_metrics.py`'s, what a load means `fleet/load.py`'s. Polls are never
a health check: a refusal only asks for one.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Protocol

import trio

from smg.errors import UpstreamError
from smg.fleet import engine_metrics
from smg.fleet.engine_metrics import RankLoad
from smg.fleet.load import ReportRules
from smg.fleet.registry import Added, Change, Registry, Removed, StatusChanged, Updated
from smg.fleet.worker import Engine, LoadReport, Status, Worker
from smg.services.asking import Fetch, ask
from smg.services.timetable import Timetable

CONCURRENT_MAX = 64
"""Most polls at once; an answer takes milliseconds, so this serves thousands of workers a second."""
TIMEOUT_S = 5.0
"""A poll may take this long: engines render their metrics on the loop that also schedules, and may stall."""
UNTOLD_RETRY_S = 60.0
"""An engine that understood no question is asked again after this; it may have been replaced by one that does."""
BACKOFF_MAX_S = 10.0
"""Longest pause after failed polls, unless the interval itself is longer."""

SGLANG_LOADS = "/v1/loads"
SGLANG_GET_LOAD = "/get_load"
METRICS = "/metrics"

_QUESTIONS = {
    Engine.SGLANG: (SGLANG_LOADS, SGLANG_GET_LOAD, METRICS),
    Engine.VLLM: (METRICS,),
}
_OTHER_QUESTIONS = (SGLANG_LOADS, METRICS)

Counted = Callable[[Worker, bool], None]
"""Told of every poll of a worker, and whether it brought a report."""


class Share(Protocol):
    """Other nodes that ask the same engines."""

    def is_poller(self, base_url: str) -> bool:
        """Is this node to ask this engine itself? If not, its answers come from another node."""
        ...

    def polled(self, worker: Worker, told: LoadReport) -> None:
        """The engine of this worker has told its load to this node."""
        ...


class _Engine:
    """What is known of one base URL: who is behind it, what it understands, how it did lately."""

    __slots__ = ("failures", "question", "workers")

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}  # by worker id; several when ranks share the URL
        self.question: str | None = None  # the path it understands, None while not learned
        self.failures = 0  # polls in a row that brought nothing


class LoadReports:
    """The polling service. Make it before workers are added: it follows the registry's changes.

    `refused` is told of a worker that nobody listens at (`HealthProbes.note_refused`): with short intervals a dead
    engine is noticed here before a request meets it. `share`: other nodes of a mesh ask some of the engines.
    """

    def __init__(
        self,
        registry: Registry,
        fetch: Fetch,
        rules: ReportRules,
        *,
        rng: Random,
        refused: Callable[[Worker], None] | None = None,
        counted: Counted | None = None,
        share: Share | None = None,
    ) -> None:
        self._registry = registry
        self._fetch = fetch
        self._rules = rules
        self._rng = rng
        self._refused = refused
        self._counted = counted
        self._share = share
        self._engines: dict[str, _Engine] = {}
        self._table = Timetable(self._poll, CONCURRENT_MAX)
        registry.subscribe(self._changed)
        for worker in registry.workers():
            self._join(worker)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Polls until cancelled."""
        await self._table.run(task_status=task_status)

    async def ask_now(self, worker: Worker) -> list[RankLoad]:
        """What the worker says of its load at this moment (OPS-2), none when it says nothing usable."""
        engine = self._engines.get(worker.base_url)
        known = engine.question if engine is not None else None
        for question in (known,) if known is not None else _questions(worker):
            heard = await ask(self._fetch, worker, question, TIMEOUT_S)
            if heard.is_ok and (ranks := _parse(question, heard.body)):
                return _of_rank(ranks, worker)
            if heard.failure:
                break
        return []

    def _changed(self, change: Change) -> None:
        worker = change.worker
        if isinstance(change, Added):
            self._join(worker)
        elif isinstance(change, Removed):
            self._part(worker)
        elif isinstance(change, Updated):
            engine = self._engines.get(worker.base_url)
            if engine is not None and engine.question is None:
                self._wake(worker)  # the engine was recognised meanwhile: other questions may help
        elif isinstance(change, StatusChanged) and worker.status is Status.READY:
            self._wake(worker)

    def _join(self, worker: Worker) -> None:
        engine = self._engines.setdefault(worker.base_url, _Engine())
        engine.workers[worker.id] = worker
        if worker.status is Status.READY:
            self._wake(worker)

    def _part(self, worker: Worker) -> None:
        engine = self._engines.get(worker.base_url)
        if engine is not None and engine.workers.get(worker.id) is worker:
            del engine.workers[worker.id]
            if not engine.workers:
                del self._engines[worker.base_url]
                self._table.drop(worker.base_url)

    def _wake(self, worker: Worker) -> None:
        """The worker has just come up: its load is wanted at once, its rhythm starts anywhere in the interval."""
        if worker.status is Status.READY:
            self._table.bring_forward(worker.base_url, trio.current_time())

    async def _poll(self, base_url: str) -> float | None:
        """One poll of an engine; when the next one is due. None while nobody there is ready."""
        engine = self._engines.get(base_url)
        worker = _first_ready(engine)
        if engine is None or worker is None:
            return None
        if self._share is not None and not self._share.is_poller(base_url):
            return trio.current_time() + self._rules.interval_s
        is_first = engine.question is None
        ranks, failure = await self._ask(engine, worker)
        if self._engines.get(base_url) is not engine:
            return None
        now = trio.current_time()
        interval_s = self._rules.interval_s
        if ranks:
            engine.failures = 0
            self._report(engine, ranks, now)
            # The first pause is a part of the interval, so that workers that came up together are not asked together.
            return now + (interval_s * self._rng.random() if is_first else interval_s)
        engine.failures += 1
        if self._counted is not None:
            self._counted(worker, False)
        if failure:
            if failure in (UpstreamError.REFUSED, UpstreamError.RESET) and self._refused is not None:
                self._refused(worker)
            pause_s = interval_s * 2.0 ** min(engine.failures, 10)
            return now + max(interval_s, min(pause_s, BACKOFF_MAX_S))
        return now + max(interval_s, UNTOLD_RETRY_S)

    async def _ask(self, engine: _Engine, worker: Worker) -> tuple[list[RankLoad], str]:
        """(what the engine tells, how it failed): with neither, it understands none of the questions.

        A learned question that is not understood any more is forgotten, and all are tried again.
        """
        questions = _questions(worker)
        if engine.question is not None:
            questions = (engine.question, *(path for path in questions if path != engine.question))
        for question in questions:
            heard = await ask(self._fetch, worker, question, TIMEOUT_S)
            if heard.is_ok and (ranks := _parse(question, heard.body)):
                engine.question = question
                return ranks, ""
            if heard.failure:
                return [], heard.failure
            if question == engine.question and (heard.status >= 500 or heard.status == 429):
                return [], UpstreamError.BROKEN_STREAM  # it understands, and cannot answer now
            engine.question = None
        return [], ""

    def _report(self, engine: _Engine, ranks: list[RankLoad], now: float) -> None:
        for worker in list(engine.workers.values()):
            told = engine_metrics.combined(ranks, now, worker.spec.dp_rank)
            if told is not None:
                self._registry.reported(worker, told, self._rules)
                if self._share is not None:
                    self._share.polled(worker, told)
            if self._counted is not None:
                self._counted(worker, told is not None)


def _first_ready(engine: _Engine | None) -> Worker | None:
    """A worker of this engine that is ready; one is enough, since they share the URL."""
    if engine is None:
        return None
    return next((worker for worker in engine.workers.values() if worker.status is Status.READY), None)


def _questions(worker: Worker) -> tuple[str, ...]:
    return _QUESTIONS.get(worker.engine, _OTHER_QUESTIONS) if worker.engine is not None else _OTHER_QUESTIONS


def _parse(question: str, body: bytes) -> list[RankLoad]:
    return engine_metrics.metrics_ranks(body) if question == METRICS else engine_metrics.loads_ranks(body)


def _of_rank(ranks: list[RankLoad], worker: Worker) -> list[RankLoad]:
    """The rows of a worker: those of its rank when it is one and the engine tells them apart."""
    rank = worker.spec.dp_rank
    if rank is None or len(ranks) == 1:
        return ranks
    return [row for row in ranks if row.dp_rank == rank]
