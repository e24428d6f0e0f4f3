"""Jobs of the worker API in virtual time: adding, changing, leaving, metadata, ranks (WRK-4 to WRK-17)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from smg.errors import GatewayError
from smg.fleet import load
from smg.fleet.worker import Engine, ModelCard, Status, Worker, worker_id
from smg.services.drain import Drains
from smg.services.health_probes import HealthProbes
from smg.services.worker_jobs import WorkerJobs
from smg.settings import Workers
from tests.smg.services.fakes import URL, FakeLog, FakeNet, MiddleRandom, make_registry

SERVER_INFO = {"model_path": "p", "dp_size": 3}


class Stage:
    """Registry, net, probes, drains and jobs, as the composition root puts them together."""

    def __init__(self, *, is_dp_aware: bool = False, startup_timeout_s: float = 1800.0) -> None:
        self.net = FakeNet()
        self.log = FakeLog()
        self.registry = make_registry(workers=Workers(worker_startup_timeout_secs=startup_timeout_s))
        self.probes = HealthProbes(self.registry, self.net.fetch, rng=MiddleRandom(), log=self.log)
        self.drains = Drains(self.registry, log=self.log)
        self.jobs = WorkerJobs(
            self.registry,
            self.net.fetch,
            rng=MiddleRandom(),
            log=self.log,
            is_dp_aware=is_dp_aware,
            wall_clock=lambda: 1_700_000_000.9,
        )

    async def start(self, nursery: trio.Nursery) -> Stage:
        await nursery.start(self.probes.run)
        await nursery.start(self.jobs.run)
        await nursery.start(self.drains.run)
        return self

    def add(self, url: str = URL, **members: Any) -> Worker:
        return self.jobs.add({"url": url, **members})

    def paths(self) -> list[str]:
        return [path for _, _, path in self.net.asked if path != "/health"]


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    return await Stage().start(nursery)


def code_of(caught: pytest.ExceptionInfo[GatewayError]) -> tuple[int, str]:
    return caught.value.status, caught.value.code


# Adding


async def test_a_generic_server_without_any_metadata_is_ready_at_once_and_serves_any_name(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker()
    worker = stage.add()
    assert worker.id == worker_id(URL)
    await trio.sleep(0.01)
    assert (worker.status, worker.engine, worker.models) == (Status.READY, Engine.GENERIC, ())
    assert stage.registry.pool("anything") is not None


async def test_metadata_that_hangs_delays_nothing(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().hangs.update({"/v1/models", "/version", "/server_info", "/get_server_info"})
    worker = stage.add()
    await trio.sleep(0.01)
    assert worker.status is Status.READY


async def test_the_models_of_a_worker_are_known_as_soon_as_it_answers(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().models("b", "a", owned_by="vllm")
    worker = stage.add()
    await trio.sleep(0.01)
    assert worker.models == ("b", "a")
    assert worker.engine is Engine.VLLM
    assert stage.registry.served_models() == ("a", "b")
    assert stage.paths() == ["/v1/models"]


async def test_models_count_although_other_questions_hang(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().models("m").hangs.update({"/version", "/server_info"})
    worker = stage.add()
    await trio.sleep(0.01)
    assert worker.models == ("m",)


async def test_an_engine_is_recognised_by_what_it_answers(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().models("m").says("/version", {"version": "1"})
    stage.net.worker("http://w:2").models("m").says("/get_server_info", SERVER_INFO)
    first, second = stage.add(), stage.add("http://w:2")
    await trio.sleep(0.01)
    assert (first.engine, second.engine) == (Engine.VLLM, Engine.SGLANG)


async def test_what_the_specification_tells_wins_over_what_the_worker_says(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().models("b", owned_by="vllm")
    worker = stage.add(model_id="told", runtime_type="sglang")
    await trio.sleep(100)
    assert worker.models == ("told",)
    assert worker.engine is Engine.SGLANG


async def test_metadata_carries_the_workers_key(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker()
    stage.add(api_key="k")
    await trio.sleep(1)
    assert len(stage.net.headers) == 5
    assert all(headers == {"authorization": "Bearer k"} for headers in stage.net.headers)


async def test_a_worker_that_starts_later_is_asked_for_its_models_when_it_is_up(
    stage: Stage, autojump_clock: MockClock
) -> None:
    worker = stage.add()
    await trio.sleep(20)
    stage.net.worker().models("m", owned_by="vllm")
    await trio.sleep(2.1)
    assert (worker.status, worker.models, worker.engine) == (Status.READY, ("m",), Engine.VLLM)


async def test_a_ready_worker_that_cannot_tell_yet_is_asked_again_soon(
    stage: Stage, autojump_clock: MockClock
) -> None:
    server = stage.net.worker().says("/v1/models", b"loading", 503)
    worker = stage.add()
    await trio.sleep(1)
    assert worker.status is Status.READY
    server.models("m")
    await trio.sleep(2)
    assert worker.models == ("m",)


async def test_models_are_read_again_every_minute(stage: Stage, autojump_clock: MockClock) -> None:
    server = stage.net.worker().models("m")
    worker = stage.add()
    await trio.sleep(59)
    server.models("m", "adapter")
    await trio.sleep(2)
    assert worker.models == ("m", "adapter")


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_a_worker_that_cannot_tell_its_models_now_keeps_them(
    stage: Stage, autojump_clock: MockClock, status: int
) -> None:
    server = stage.net.worker().models("m")
    worker = stage.add()
    await trio.sleep(30)
    server.says("/v1/models", b"", status)
    await trio.sleep(300)
    assert worker.models == ("m",)


async def test_a_worker_that_comes_back_is_asked_at_once_since_it_may_be_another(
    stage: Stage, autojump_clock: MockClock
) -> None:
    server = stage.net.worker().models("m", owned_by="vllm")
    worker = stage.add()
    await trio.sleep(70)
    server.is_up = False
    stage.probes.note_refused(worker)
    await trio.sleep(5)
    assert worker.status is Status.NOT_READY
    server.models("n", owned_by="sglang")
    server.is_up = True
    await trio.sleep(2.5)
    assert (worker.status, worker.models, worker.engine) == (Status.READY, ("n",), Engine.SGLANG)


async def test_the_same_url_twice_is_refused(stage: Stage, autojump_clock: MockClock) -> None:
    stage.add()
    with pytest.raises(GatewayError) as caught:
        stage.add("HTTP://W:1/")
    assert code_of(caught) == (409, "WORKER_CREATE_IN_PROGRESS")
    stage.net.worker()
    await trio.sleep(1)
    with pytest.raises(GatewayError) as caught:
        stage.add()
    assert code_of(caught) == (409, "WORKER_ALREADY_EXISTS")


async def test_a_wrong_specification_adds_nobody(stage: Stage, autojump_clock: MockClock) -> None:
    for document in ({}, {"url": "w:1"}, {"url": URL, "cost": "x"}):
        with pytest.raises(GatewayError) as caught:
            stage.jobs.add(document)
        assert code_of(caught) == (400, "BAD_REQUEST")
    assert stage.registry.workers() == ()


# Jobs


async def test_the_job_of_an_unreachable_worker_tells_why(stage: Stage, autojump_clock: MockClock) -> None:
    worker = stage.add()
    job = stage.jobs.job_of(worker)
    assert job is not None
    assert (job.job_type, job.worker_url, job.status, job.timestamp) == (
        "AddWorker",
        URL,
        "pending",
        1_700_000_000,
    )
    await trio.sleep(5)
    job = stage.jobs.job_of(worker)
    assert job is not None
    assert (job.status, job.message) == (
        "processing",
        "health probe: connection refused or host not reachable",
    )
    stage.net.worker()
    await trio.sleep(3)
    assert stage.jobs.job_of(worker) is None


async def test_the_job_of_a_worker_that_never_came_up_has_failed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = await Stage(startup_timeout_s=30.0).start(nursery)
    worker = stage.add()
    await trio.sleep(40)
    job = stage.jobs.job_of(worker)
    assert job is not None
    assert (worker.status, job.status) == (Status.FAILED, "failed")


# Leaving


async def test_a_deleted_worker_drains_and_is_gone_when_its_last_request_is(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker()
    worker = stage.add()
    await trio.sleep(1)
    load.begin(worker)
    assert stage.jobs.delete(worker.id) is worker
    assert worker.status is Status.DRAINING
    job = stage.jobs.job_of(worker)
    assert job is not None
    assert (job.job_type, job.message) == ("RemoveWorker", "waits for 1 requests in flight")
    await trio.sleep(100)
    assert stage.jobs.find(worker.id) is worker
    load.end(worker)
    await trio.sleep(1)
    with pytest.raises(GatewayError) as caught:
        stage.jobs.find(worker.id)
    assert code_of(caught) == (404, "WORKER_NOT_FOUND")
    stage.add()
    await trio.sleep(1)
    assert stage.registry.workers()[0].status is Status.READY


@pytest.mark.parametrize("text", ["", "x", "../etc", "0" * 31, "g" * 32])
async def test_an_id_that_is_none_is_a_bad_request(
    stage: Stage, autojump_clock: MockClock, text: str
) -> None:
    for verb in (stage.jobs.find, stage.jobs.delete):
        with pytest.raises(GatewayError) as caught:
            verb(text)
        assert code_of(caught) == (400, "BAD_REQUEST")


# Changing


async def test_a_patch_keeps_what_it_does_not_name(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().models("m")
    worker = stage.add(labels={"a": "1"}, cost=2)
    await trio.sleep(1)
    stage.jobs.patch(worker.id, {"priority": 90, "labels": {"b": "2"}})
    await trio.sleep(1)
    assert (worker.spec.priority, worker.spec.cost, worker.spec.labels) == (90, 2.0, {"a": "1", "b": "2"})
    assert (worker.status, worker.models) == (Status.READY, ("m",))


async def test_a_put_returns_everything_else_to_its_default(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().models("m")
    worker = stage.add(labels={"a": "1"}, cost=2, model_id="told", priority=3)
    await trio.sleep(1)
    assert worker.models == ("told",)
    stage.jobs.replace(worker.id, {"url": URL + "/", "priority": 90})
    await trio.sleep(1)
    assert (worker.spec.priority, worker.spec.cost, worker.spec.labels) == (90, 1.0, {})
    assert worker.models == ("m",)
    with pytest.raises(GatewayError) as caught:
        stage.jobs.replace(worker.id, {"url": "http://other:1"})
    assert code_of(caught) == (400, "BAD_REQUEST")
    assert caught.value.message.startswith("URL mismatch")


async def test_a_new_key_is_used_for_metadata_at_once(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker()
    worker = stage.add()
    await trio.sleep(1)
    stage.net.headers.clear()
    stage.jobs.patch(worker.id, {"api_key": "new"})
    await trio.sleep(1)
    assert {"authorization": "Bearer new"} in stage.net.headers


# Ranks


@pytest.fixture
async def dp_stage(nursery: trio.Nursery) -> Stage:
    stage = await Stage(is_dp_aware=True).start(nursery)
    stage.net.worker().models("m", owned_by="sglang").says("/server_info", SERVER_INFO)
    return stage


async def test_a_worker_with_ranks_becomes_one_worker_per_rank(
    dp_stage: Stage, autojump_clock: MockClock
) -> None:
    dp_stage.add(api_key="k", cost=2)
    await trio.sleep(0.5)
    workers = dp_stage.registry.workers()
    assert [worker.url for worker in workers] == [f"{URL}@{rank}" for rank in range(3)]
    for rank, worker in enumerate(workers):
        assert (worker.spec.dp_rank, worker.spec.dp_size) == (rank, 3)
        assert (worker.spec.api_key, worker.spec.cost, worker.base_url) == ("k", 2.0, URL)
        assert (worker.status, worker.models, worker.engine) == (Status.READY, ("m",), Engine.SGLANG)


async def test_there_is_a_candidate_at_every_moment_of_the_expansion(
    dp_stage: Stage, autojump_clock: MockClock
) -> None:
    gaps = []

    def look(change: object) -> None:
        pool = dp_stage.registry.pool("m")
        if pool is None or not pool.candidates(trio.current_time()):
            gaps.append(change)

    dp_stage.net.worker().delay_s = 0.05
    worker = dp_stage.add()
    while worker.status is not Status.READY:
        await trio.sleep(0.001)
    await trio.sleep(0.06)
    dp_stage.registry.subscribe(look)
    await trio.sleep(1)
    assert len(dp_stage.registry.workers()) == 3
    assert gaps == []


async def test_a_base_url_that_is_there_as_its_ranks_cannot_be_added_again(
    dp_stage: Stage, autojump_clock: MockClock
) -> None:
    dp_stage.add()
    await trio.sleep(0.5)
    with pytest.raises(GatewayError) as caught:
        dp_stage.add()
    assert code_of(caught) == (409, "WORKER_ALREADY_EXISTS")


async def test_deleting_a_rank_removes_this_rank_for_good(dp_stage: Stage, autojump_clock: MockClock) -> None:
    dp_stage.add()
    await trio.sleep(0.5)
    dp_stage.jobs.delete(worker_id(f"{URL}@1"))
    await trio.sleep(300)
    assert [worker.url for worker in dp_stage.registry.workers()] == [f"{URL}@0", f"{URL}@2"]


async def test_a_rank_may_be_replaced_under_its_base_url(dp_stage: Stage, autojump_clock: MockClock) -> None:
    dp_stage.add()
    await trio.sleep(0.5)
    worker = dp_stage.jobs.replace(worker_id(f"{URL}@1"), {"url": URL, "cost": 3})
    assert (worker.url, worker.spec.dp_rank, worker.spec.dp_size, worker.spec.cost) == (f"{URL}@1", 1, 3, 3.0)


async def test_a_worker_with_requests_in_flight_drains_when_it_is_expanded(
    dp_stage: Stage, autojump_clock: MockClock
) -> None:
    dp_stage.net.worker().hangs.add("/server_info")
    worker = dp_stage.add()
    await trio.sleep(1)
    load.begin(worker)
    dp_stage.net.worker().hangs.clear()
    await trio.sleep(70)
    assert len(dp_stage.registry.workers()) == 4
    load.end(worker)
    await trio.sleep(1)
    assert len(dp_stage.registry.workers()) == 3


async def test_without_the_flag_ranks_are_left_to_the_engine(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().models("m").says("/server_info", SERVER_INFO)
    stage.add()
    await trio.sleep(100)
    assert [worker.url for worker in stage.registry.workers()] == [URL]


async def test_aliases_in_a_workers_own_card_are_kept(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().says("/v1/models", {"data": [{"id": "m", "aliases": ["n"]}]})
    worker = stage.add()
    await trio.sleep(0.1)
    assert worker.cards == (ModelCard("m", ("n",)),)
    assert stage.registry.resolve("n") == "m"


async def test_nothing_is_kept_of_workers_that_left(stage: Stage, autojump_clock: MockClock) -> None:
    for number in range(20):
        stage.net.worker(f"http://w:{number + 1}")
        stage.add(f"http://w:{number + 1}")
    await trio.sleep(1)
    for worker in stage.registry.workers():
        stage.jobs.delete(worker.id)
    await trio.sleep(100)
    jobs = stage.jobs
    assert (jobs._started, jobs._specs, jobs._unfinished, len(jobs._table)) == ({}, {}, {}, 0)
