"""The services against simulated engines over real sockets and the real client: the whole way of a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from smg.discovery import sources_of
from smg.fleet.load import ReportRules
from smg.fleet.worker import Engine, Status, Worker
from smg.lab.engine import run_engines
from smg.lab.engine_server import EngineServer
from smg.net.client import Client
from smg.net.pool import ConnectionPool
from smg.net.readiness import Readiness
from smg.services.drain import Drains
from smg.services.health_probes import HealthProbes
from smg.services.load_reports import LoadReports
from smg.services.rosters import Rosters
from smg.services.worker_jobs import WorkerJobs
from smg.settings import Settings, Workers
from tests.smg.lab.conftest import arguments
from tests.smg.services.fakes import FakeLog, make_registry


class House:
    """All services over the real client."""

    def __init__(self, readiness: Readiness, settings: Settings) -> None:
        pool = ConnectionPool(readiness, idle_timeout_s=3.0, connect_timeout_s=5.0)
        fetch = Client(readiness, pool).fetch
        log, rng = FakeLog(), Random(1)
        self.settings = settings
        self.registry = make_registry()
        self.probes = HealthProbes(self.registry, fetch, rng=rng, log=log)
        self.reports = LoadReports(
            self.registry, fetch, ReportRules(interval_s=0.1), rng=rng, refused=self.probes.note_refused
        )
        self.jobs = WorkerJobs(self.registry, fetch, rng=rng, log=log)
        self.drains = Drains(self.registry, log=log)
        self.rosters = Rosters(self.registry, self.jobs, fetch, log=log)

    @property
    def workers(self) -> list[Worker]:
        return list(self.registry.workers())


@asynccontextmanager
async def house(*urls: str) -> AsyncIterator[House]:
    readiness = Readiness()
    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        built = House(readiness, Settings(workers=Workers(worker_urls=urls)))
        for service in (built.probes, built.reports, built.jobs, built.drains, built.rosters):
            await nursery.start(service.run)
        for source in sources_of(built.settings):
            await nursery.start(source.run, built.rosters.reporter(source.name))
        yield built
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], within_s: float) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.005)


async def engine_up(nursery: trio.Nursery, *words: str) -> tuple[str, trio.CancelScope]:
    """A running engine: its URL, and the scope that ends it as a killed process would."""
    scope = trio.CancelScope()

    async def run(*, task_status: trio.TaskStatus[list[tuple[EngineServer, str]]]) -> None:
        with scope:
            await run_engines(arguments(*words), str, task_status=task_status)

    [(_, url)] = await nursery.start(run)
    return url, scope


@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.SGLANG, Engine.GENERIC])
async def test_an_engine_that_is_up_is_known_whole_within_half_a_second(engine: Engine) -> None:
    async with trio.open_nursery() as nursery:
        url, _ = await engine_up(nursery, "--engine", engine.value)
        async with house(url) as built:
            [worker] = built.workers
            await until(lambda: worker.status is Status.READY and worker.models and worker.engine, 0.5)
            assert worker.models == ("sim",)
            assert worker.engine is engine
            if engine is not Engine.GENERIC:
                await until(lambda: worker.report is not None, 0.5)
                assert worker.report is not None
                assert worker.report.kv_capacity_tokens == 512_000
        nursery.cancel_scope.cancel()


async def test_an_engine_that_dies_is_out_within_a_second_without_any_request_and_comes_back() -> None:
    async with trio.open_nursery() as nursery:
        url, engine = await engine_up(nursery)
        async with house(url) as built:
            [worker] = built.workers
            await until(lambda: worker.report is not None, 1.0)
            engine.cancel()
            await until(lambda: worker.status is Status.NOT_READY, 1.0)
            await engine_up(nursery, "--port", url.rpartition(":")[2])
            await until(lambda: worker.status is Status.READY, 3.5)
        nursery.cancel_scope.cancel()


async def test_keys_reach_guarded_engines() -> None:
    async with trio.open_nursery() as nursery:
        url, _ = await engine_up(nursery, "--api-key", "secret")
        async with house() as built:
            worker = built.jobs.add({"url": url, "api_key": "secret"})
            await until(lambda: worker.report is not None and worker.models == ("sim",), 1.0)
        nursery.cancel_scope.cancel()


async def test_a_worker_may_come_and_go_again_and_again() -> None:
    async with trio.open_nursery() as nursery:
        url, _ = await engine_up(nursery)
        async with house() as built:
            for _ in range(5):
                worker = built.jobs.add({"url": url})
                await until(lambda: built.workers[0].status is Status.READY, 1.0)
                built.jobs.delete(worker.id)
                await until(lambda: not built.workers, 1.0)
        nursery.cancel_scope.cancel()
