"""How the fleet follows what sources list (WRK-18, HLT-4), in virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from smg.fleet import load
from smg.fleet.worker import Status, WorkerSpec, worker_id
from smg.services.drain import Drains
from smg.services.health_probes import HealthProbes
from smg.services.rosters import Rosters
from smg.services.worker_jobs import WorkerJobs
from smg.settings import Workers
from tests.smg.services.fakes import FakeLog, FakeNet, MiddleRandom, make_registry


def url(number: int) -> str:
    return f"http://w:{number}"


def specs(*numbers: int, **members: object) -> tuple[WorkerSpec, ...]:
    return tuple(WorkerSpec(url(number), **members) for number in numbers)  # type: ignore[arg-type]


class Stage:
    """Everything that lets a fleet follow its sources."""

    def __init__(self, *, is_dp_aware: bool = False) -> None:
        self.net = FakeNet()
        self.log = FakeLog()
        self.registry = make_registry(workers=Workers(worker_startup_timeout_secs=30.0))
        self.probes = HealthProbes(
            self.registry, self.net.fetch, rng=MiddleRandom(), log=self.log, removes_failed=True
        )
        self.drains = Drains(self.registry, log=self.log)
        self.jobs = WorkerJobs(
            self.registry, self.net.fetch, rng=MiddleRandom(), log=self.log, is_dp_aware=is_dp_aware
        )
        self.rosters = Rosters(self.registry, self.jobs, self.net.fetch, log=self.log)
        for number in range(1, 5):
            self.net.worker(url(number))

    async def start(self, nursery: trio.Nursery) -> Stage:
        for service in (self.probes, self.drains, self.jobs, self.rosters):
            await nursery.start(service.run)
        return self

    def urls(self) -> list[str]:
        return [worker.url for worker in self.registry.workers()]


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    return await Stage().start(nursery)


async def test_listed_workers_come_and_go_with_the_list(stage: Stage, autojump_clock: MockClock) -> None:
    stage.rosters.report("file", specs(1, 2))
    await trio.sleep(1)
    assert [worker.status for worker in stage.registry.workers()] == [Status.READY, Status.READY]
    stage.rosters.report("file", specs(2, 3))
    assert stage.registry.workers()[0].status is Status.DRAINING
    await trio.sleep(1)
    assert stage.urls() == [url(2), url(3)]
    stage.rosters.report("file", ())
    await trio.sleep(1)
    assert stage.urls() == []
    assert (stage.rosters._owned, stage.rosters._brought) == ({}, {})


async def test_a_worker_that_is_dropped_finishes_its_requests(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.rosters.report("file", specs(1))
    await trio.sleep(1)
    worker = stage.registry.workers()[0]
    load.begin(worker)
    stage.rosters.report("file", ())
    await trio.sleep(100)
    assert worker.status is Status.DRAINING
    load.end(worker)
    await trio.sleep(1)
    assert stage.urls() == []


async def test_a_changed_line_changes_its_worker_and_the_same_line_changes_nothing(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.rosters.report("file", specs(1))
    await trio.sleep(1)
    worker = stage.registry.workers()[0]
    stage.jobs.patch(worker.id, {"priority": 7})
    stage.rosters.report("file", specs(1))
    assert worker.spec.priority == 7
    stage.rosters.report("file", specs(1, cost=2.0))
    assert (worker.spec.cost, worker.status) == (2.0, Status.READY)


async def test_workers_added_by_hand_are_never_touched(stage: Stage, autojump_clock: MockClock) -> None:
    by_hand = stage.jobs.add({"url": url(1), "cost": 5})
    await trio.sleep(1)
    stage.rosters.report("file", specs(1, 2))
    assert by_hand.spec.cost == 5.0
    stage.rosters.report("file", specs(1, 2, cost=3.0))
    assert by_hand.spec.cost == 5.0
    stage.rosters.report("file", ())
    await trio.sleep(1)
    assert stage.urls() == [url(1)]


async def test_a_worker_of_one_source_is_not_touched_by_another(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.rosters.report("flags", specs(1))
    await trio.sleep(1)
    stage.rosters.report("file", specs(1, 2))
    stage.rosters.report("file", ())
    await trio.sleep(1)
    assert stage.urls() == [url(1)]


async def test_a_listed_worker_that_somebody_deleted_stays_away_until_the_source_dropped_it(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.rosters.report("file", specs(1, 2))
    await trio.sleep(1)
    stage.jobs.delete(worker_id(url(1)))
    await trio.sleep(1)
    stage.rosters.report("file", specs(1, 2, 3))
    await trio.sleep(100)
    assert stage.urls() == [url(2), url(3)]
    stage.rosters.report("file", specs(2))
    stage.rosters.report("file", specs(1, 2))
    await trio.sleep(1)
    assert url(1) in stage.urls()


async def test_a_deleted_worker_that_is_added_by_hand_again_belongs_to_the_hand(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.rosters.report("file", specs(1))
    await trio.sleep(1)
    stage.jobs.delete(worker_id(url(1)))
    await trio.sleep(1)
    stage.jobs.add({"url": url(1)})
    stage.rosters.report("file", ())
    await trio.sleep(1)
    assert stage.urls() == [url(1)]


async def test_a_worker_that_is_listed_again_while_it_drains_comes_back(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.rosters.report("file", specs(1))
    await trio.sleep(1)
    worker = stage.registry.workers()[0]
    load.begin(worker)
    stage.rosters.report("file", ())
    await trio.sleep(10)
    stage.rosters.report("file", specs(1))
    await trio.sleep(10)
    load.end(worker)
    await trio.sleep(1)
    assert stage.urls() == [url(1)]
    assert stage.registry.workers()[0] is not worker
    assert stage.registry.workers()[0].status is Status.READY


async def test_a_worker_that_failed_leaves_the_list_and_comes_back_when_it_answers(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker(url(1)).is_up = False
    stage.rosters.report("file", specs(1, 2))
    await trio.sleep(60)
    assert stage.urls() == [url(2)]
    stage.rosters.report("file", specs(1, 2, 3))
    await trio.sleep(60)
    assert stage.urls() == [url(2), url(3)]
    stage.net.worker(url(1)).is_up = True
    await trio.sleep(11)
    assert stage.urls() == [url(2), url(3), url(1)]


async def test_a_worker_that_failed_and_is_not_listed_any_more_stays_away(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker(url(1)).is_up = False
    stage.rosters.report("file", specs(1))
    await trio.sleep(60)
    stage.rosters.report("file", ())
    stage.net.worker(url(1)).is_up = True
    await trio.sleep(60)
    assert stage.urls() == []
    assert stage.rosters._lost == {}


async def test_ranks_belong_to_the_line_of_their_base_url(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = await Stage(is_dp_aware=True).start(nursery)
    stage.net.worker(url(1)).models("m").says("/server_info", {"dp_size": 2})
    stage.rosters.report("file", specs(1, 2))
    await trio.sleep(1)
    assert stage.urls() == [url(2), f"{url(1)}@0", f"{url(1)}@1"]
    stage.rosters.report("file", specs(1, 2, cost=4.0))
    assert [worker.spec.cost for worker in stage.registry.workers()] == [4.0] * 3
    assert [worker.spec.dp_rank for worker in stage.registry.workers()] == [None, 0, 1]
    stage.rosters.report("file", specs(2))
    await trio.sleep(1)
    assert stage.urls() == [url(2)]


async def test_a_reporter_speaks_for_its_source(stage: Stage, autojump_clock: MockClock) -> None:
    stage.rosters.reporter("file")(specs(1))
    stage.rosters.reporter("flags")(specs(2))
    stage.rosters.reporter("file")(())
    await trio.sleep(1)
    assert stage.urls() == [url(2)]
