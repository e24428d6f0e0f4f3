"""Load polls in virtual time."""

from __future__ import annotations

from random import Random

import pytest
import trio
from trio.testing import MockClock

from smg.errors import UpstreamError
from smg.fleet.load import ReportRules
from smg.fleet.worker import Engine, Status, Worker, WorkerSpec
from smg.services.load_reports import LoadReports
from tests.smg.services.fakes import URL, FakeNet, MiddleRandom, make_registry

LOADS = {"loads": [{"dp_rank": 0, "num_running_reqs": 3, "num_waiting_reqs": 1, "token_usage": 0.5}]}
TWO_RANKS = {
    "loads": [
        {"dp_rank": 0, "num_running_reqs": 3, "num_waiting_reqs": 9},
        {"dp_rank": 1, "num_running_reqs": 1, "num_waiting_reqs": 0},
    ]
}
METRICS = b"vllm:num_requests_running 2\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.25\n"
OLD_LOAD = [{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 80}]


class Stage:
    """A registry, a net and polls every second."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self.net = FakeNet()
        self.registry = make_registry()
        self.refused: list[str] = []
        self.counted: list[bool] = []
        self.reports = LoadReports(
            self.registry,
            self.net.fetch,
            ReportRules(interval_s=interval_s),
            rng=MiddleRandom(),
            refused=lambda worker: self.refused.append(worker.url),
            counted=lambda worker, is_told: self.counted.append(is_told),
        )

    def ready(self, url: str = URL, engine: Engine | None = None, **members: object) -> Worker:
        worker = self.registry.add(WorkerSpec(url, **members), trio.current_time())  # type: ignore[arg-type]
        if engine is not None:
            self.registry.set_engine(worker, engine)
        self.registry.set_status(worker, Status.READY, trio.current_time())
        return worker


@pytest.fixture
async def stage(nursery: trio.Nursery) -> Stage:
    stage = Stage()
    await nursery.start(stage.reports.run)
    return stage


async def test_a_ready_worker_is_asked_at_once_and_then_every_interval(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().says("/metrics", METRICS)
    worker = stage.ready(engine=Engine.VLLM)
    await trio.sleep(0.01)
    assert worker.report is not None
    assert (worker.report.running, worker.report.kv_usage) == (2, 0.25)
    await trio.sleep(3)
    assert stage.net.times("/metrics") == [0, 0.5, 1.5, 2.5]
    assert stage.net.times("/v1/loads") == []
    assert stage.counted == [True] * 4


async def test_a_report_starts_the_count_of_requests_anew(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().says("/metrics", METRICS)
    worker = stage.ready(engine=Engine.VLLM)
    worker.sent_since_report = 7
    await trio.sleep(0.01)
    assert worker.sent_since_report == 0


@pytest.mark.parametrize(
    ("engine", "path", "answer", "asked"),
    [
        (Engine.SGLANG, "/v1/loads", LOADS, ["/v1/loads"]),
        (Engine.SGLANG, "/get_load", OLD_LOAD, ["/v1/loads", "/get_load"]),
        (Engine.SGLANG, "/metrics", b"sglang:num_running_reqs 3\n", ["/v1/loads", "/get_load", "/metrics"]),
        (Engine.GENERIC, "/v1/loads", LOADS, ["/v1/loads"]),
        (Engine.GENERIC, "/metrics", b"llamacpp:requests_processing 3\n", ["/v1/loads", "/metrics"]),
        (None, "/metrics", b"vllm:num_requests_running 3\n", ["/v1/loads", "/metrics"]),
    ],
)
async def test_the_question_that_an_engine_understands_is_learned(
    stage: Stage,
    autojump_clock: MockClock,
    engine: Engine | None,
    path: str,
    answer: object,
    asked: list[str],
) -> None:
    stage.net.worker().says(path, answer)
    worker = stage.ready(engine=engine)
    await trio.sleep(0.01)
    assert [path for _, _, path in stage.net.asked] == asked
    assert worker.report is not None
    assert worker.report.running == 3
    await trio.sleep(2)
    assert [path for _, _, path in stage.net.asked] == asked + [path] * 2


async def test_a_server_without_load_is_left_alone_for_a_minute(
    stage: Stage, autojump_clock: MockClock
) -> None:
    worker = stage.ready(engine=Engine.GENERIC)
    stage.net.worker().says("/v1/loads", b"<html>", 500)
    await trio.sleep(59)
    assert [path for _, _, path in stage.net.asked] == ["/v1/loads", "/metrics"]
    assert worker.report is None
    assert stage.refused == []
    stage.net.worker().says("/metrics", METRICS)
    await trio.sleep(2)
    assert worker.report is not None


async def test_a_server_without_load_is_asked_again_when_its_engine_is_recognised(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().says("/get_load", OLD_LOAD)
    worker = stage.ready()
    await trio.sleep(5)
    assert worker.report is None
    stage.registry.set_engine(worker, Engine.SGLANG)
    await trio.sleep(0.01)
    assert worker.report is not None


async def test_a_question_that_is_not_understood_any_more_is_forgotten(
    stage: Stage, autojump_clock: MockClock
) -> None:
    server = stage.net.worker().says("/v1/loads", LOADS)
    worker = stage.ready(engine=Engine.SGLANG)
    await trio.sleep(1)
    del server.answers["/v1/loads"]
    server.says("/get_load", OLD_LOAD)
    await trio.sleep(2)
    assert worker.report is not None
    assert worker.report.waiting == 2


async def test_an_engine_that_fails_is_asked_less_and_less_and_keeps_its_question(
    stage: Stage, autojump_clock: MockClock
) -> None:
    server = stage.net.worker().says("/metrics", METRICS)
    stage.ready(engine=Engine.VLLM)
    await trio.sleep(1.6)
    server.says("/metrics", b"", 500)
    await trio.sleep(40)
    assert stage.net.times("/metrics") == [0, 0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 26.5, 36.5]
    server.says("/metrics", METRICS)
    await trio.sleep(10)
    assert stage.net.times("/metrics")[-6:] == [46.5, 47.5, 48.5, 49.5, 50.5, 51.5]
    assert stage.net.times("/v1/loads") == []


async def test_a_refused_poll_asks_for_a_probe(stage: Stage, autojump_clock: MockClock) -> None:
    server = stage.net.worker().says("/metrics", METRICS)
    stage.ready(engine=Engine.VLLM)
    await trio.sleep(1)
    server.is_up = False
    await trio.sleep(1)
    assert stage.refused == [URL]
    server.is_up, server.fault = True, UpstreamError.BROKEN_STREAM
    await trio.sleep(60)
    assert set(stage.refused) == {URL}


async def test_only_ready_workers_are_asked(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().says("/metrics", METRICS)
    worker = stage.ready(engine=Engine.VLLM)
    await trio.sleep(0.6)
    stage.registry.set_status(worker, Status.NOT_READY, trio.current_time())
    await trio.sleep(100)
    assert stage.net.times("/metrics") == [0, 0.5]
    stage.registry.set_status(worker, Status.READY, trio.current_time())
    await trio.sleep(0.01)
    assert len(stage.net.times("/metrics")) == 3
    stage.registry.remove(worker)
    await trio.sleep(100)
    assert len(stage.net.times("/metrics")) == 3
    assert stage.reports._engines == {}


async def test_an_engine_that_is_slow_is_never_asked_twice_at_once(
    stage: Stage, autojump_clock: MockClock
) -> None:
    server = stage.net.worker().says("/metrics", METRICS)
    server.delay_s = 3.0
    worker = stage.ready(engine=Engine.VLLM)
    for _ in range(20):
        await trio.sleep(1)
        stage.registry.set_status(worker, Status.NOT_READY, trio.current_time())
        stage.registry.set_status(worker, Status.READY, trio.current_time())
    assert stage.net.open_most == 1
    assert worker.report is not None


async def test_ranks_of_one_engine_share_a_poll_and_get_their_own_numbers(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().says("/v1/loads", TWO_RANKS)
    workers = [
        stage.ready(f"{URL}@{rank}", engine=Engine.SGLANG, dp_rank=rank, dp_size=2) for rank in range(2)
    ]
    await trio.sleep(5)
    assert [worker.report.running for worker in workers if worker.report] == [3, 1]
    assert [worker.is_overloaded for worker in workers] == [True, False]
    assert len(stage.net.asked) == 6
    assert [row.num_waiting_reqs for row in await stage.reports.ask_now(workers[1])] == [0]


async def test_workers_that_come_together_are_not_asked_together_for_ever(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(interval_s=10.0)
    stage.reports._rng = Random(3)
    await nursery.start(stage.reports.run)
    for number in range(40):
        stage.net.worker(f"http://w:{number + 1}").says("/metrics", METRICS)
        stage.ready(f"http://w:{number + 1}", engine=Engine.VLLM)
    await trio.sleep(25)
    last_round = [at for at, _, _ in stage.net.asked if 12 <= at < 22]
    assert len({round(at) for at in last_round}) >= 8


async def test_polls_carry_the_workers_key_and_are_bounded(stage: Stage, autojump_clock: MockClock) -> None:
    for number in range(100):
        stage.net.worker(f"http://w:{number + 1}").hangs.add("/metrics")
        stage.ready(f"http://w:{number + 1}", engine=Engine.VLLM, api_key=f"k{number}")
    await trio.sleep(1)
    assert stage.net.open_most == 64
    assert all(headers["authorization"].startswith("Bearer k") for headers in stage.net.headers)


async def test_asking_now_tells_what_an_engine_says_at_this_moment(
    stage: Stage, autojump_clock: MockClock
) -> None:
    worker = stage.ready(engine=Engine.SGLANG)
    assert await stage.reports.ask_now(worker) == []
    stage.net.worker().says("/get_load", OLD_LOAD)
    rows = await stage.reports.ask_now(worker)
    assert (rows[0].num_running_reqs, rows[0].num_waiting_reqs) == (3, 2)
