"""Probes in virtual time (HLT-1 to HLT-4, WRK-1 to WRK-3, UP-6)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from smg.errors import UpstreamError
from smg.fleet.registry import Registry
from smg.fleet.worker import HealthOverrides, Status, Worker, WorkerSpec
from smg.services.drain import Drains
from smg.services.health_probes import HealthProbes
from smg.settings import Health as HealthSettings
from smg.settings import Workers
from tests.smg.services.fakes import URL, FakeLog, FakeNet, MiddleRandom, make_registry


class Stage:
    """A registry, a net and running probes."""

    def __init__(self, registry: Registry | None = None, *, removes_failed: bool = False) -> None:
        self.net = FakeNet()
        self.log = FakeLog()
        self.registry = registry if registry is not None else make_registry()
        self.counted: list[tuple[str, bool]] = []
        self.probes = HealthProbes(
            self.registry,
            self.net.fetch,
            rng=MiddleRandom(),
            log=self.log,
            removes_failed=removes_failed,
            counted=lambda worker, is_hit: self.counted.append((worker.url, is_hit)),
        )

    def add(self, url: str = URL, **members: object) -> Worker:
        return self.registry.add(WorkerSpec(url, **members), trio.current_time())  # type: ignore[arg-type]


@pytest.fixture
async def stage(nursery: trio.Nursery, autojump_clock: MockClock) -> Stage:
    stage = Stage()
    await nursery.start(stage.probes.run)
    return stage


@pytest.mark.parametrize("status", [200, 204, 299, 401, 403, 404, 405, 501])
async def test_a_worker_that_lives_is_ready_at_once(
    stage: Stage, autojump_clock: MockClock, status: int
) -> None:
    stage.net.worker().says("/health", b"", status)
    worker = stage.add()
    await trio.sleep(0.01)
    assert worker.status is Status.READY
    assert stage.net.times("/health") == [0]


@pytest.mark.parametrize("status", [301, 400, 408, 429, 500, 502, 503])
async def test_a_worker_that_says_it_is_not_well_stays_pending_and_tells_why(
    stage: Stage, autojump_clock: MockClock, status: int
) -> None:
    stage.net.worker().says("/health", b"", status)
    worker = stage.add()
    await trio.sleep(0.01)
    assert worker.status is Status.PENDING
    assert worker.message == f"health probe: answered {status}"


async def test_a_worker_that_starts_later_is_asked_after_doubling_pauses_and_then_every_two_seconds(
    stage: Stage,
    autojump_clock: MockClock,
) -> None:
    worker = stage.add()
    await trio.sleep(9)
    assert worker.status is Status.PENDING
    assert worker.message == "health probe: connection refused or host not reachable"
    assert stage.net.times("/health") == pytest.approx([0, 0.1, 0.3, 0.7, 1.5, 3.1, 5.1, 7.1])
    stage.net.worker()
    await trio.sleep(0.2)
    assert worker.status is Status.READY
    assert worker.message == ""


async def test_a_ready_worker_is_asked_every_interval_and_leaves_after_three_misses(
    stage: Stage, autojump_clock: MockClock
) -> None:
    server = stage.net.worker()
    worker = stage.add()
    await trio.sleep(61)
    assert stage.net.times("/health") == [0, 60]
    server.says("/health", b"", 500)
    await trio.sleep(120)
    assert worker.status is Status.READY
    await trio.sleep(60)
    assert worker.status is Status.NOT_READY
    server.says("/health", b"")
    await trio.sleep(61)
    assert worker.status is Status.READY


async def test_a_probe_that_hangs_is_a_miss_after_its_timeout(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().hangs.add("/health")
    worker = stage.add(health=HealthOverrides(timeout_secs=3.0))
    await trio.sleep(2.9)
    assert worker.message == ""
    await trio.sleep(0.2)
    assert worker.message == "health probe: no answer within 3 s"


@pytest.mark.parametrize("fault", ["", UpstreamError.RESET])
async def test_a_worker_that_refuses_is_out_within_a_second_of_the_first_refused_request(
    stage: Stage, autojump_clock: MockClock, fault: str
) -> None:
    server = stage.net.worker()
    worker = stage.add()
    await trio.sleep(20)
    if fault:
        server.fault = fault
    else:
        server.is_up = False
    await trio.sleep(5)
    assert worker.status is Status.READY
    stage.probes.note_refused(worker)
    await trio.sleep(0.99)
    assert worker.status is Status.NOT_READY
    before = len(stage.net.asked)
    await trio.sleep(10)
    assert 9 <= len(stage.net.asked) - before <= 11
    server.fault = ""
    server.is_up = True
    await trio.sleep(2.1)
    assert worker.status is Status.READY


async def test_one_refusal_that_was_an_accident_costs_nothing(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker()
    worker = stage.add()
    await trio.sleep(20)
    stage.probes.note_refused(worker)
    stage.probes.note_refused(worker)
    await trio.sleep(1)
    assert worker.status is Status.READY
    assert stage.net.times("/health") == [0, 20]


async def test_refusals_of_a_worker_that_is_out_anyway_start_no_storm_of_probes(
    stage: Stage, autojump_clock: MockClock
) -> None:
    worker = stage.add()
    await trio.sleep(10)
    asked = len(stage.net.asked)
    for _ in range(100):
        stage.probes.note_refused(worker)
    await trio.sleep(0.5)
    assert len(stage.net.asked) - asked <= 1


async def test_a_worker_without_health_checks_is_never_asked(stage: Stage, autojump_clock: MockClock) -> None:
    worker = stage.add(health=HealthOverrides(disable_health_check=True))
    assert worker.status is Status.READY
    stage.probes.note_refused(worker)
    await trio.sleep(600)
    assert stage.net.asked == []


async def test_the_probe_carries_the_workers_own_key_and_no_other(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker()
    stage.add(api_key="k1")
    await trio.sleep(1)
    assert stage.net.headers == [{"authorization": "Bearer k1"}]
    stage.net.worker("http://w:2")
    stage.add("http://w:2")
    await trio.sleep(1)
    assert stage.net.headers[1] == {}


async def test_a_rank_is_probed_at_the_base_url(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker()
    worker = stage.add(f"{URL}@3")
    await trio.sleep(1)
    assert worker.status is Status.READY


async def test_an_own_endpoint_and_interval_are_used(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker().says("/up", b"")
    stage.add(health=HealthOverrides(health_check_endpoint="/up", check_interval_secs=5.0))
    await trio.sleep(11)
    assert stage.net.times("/up") == [0, 5, 10]


async def test_new_rules_take_effect_before_the_old_next_probe(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker()
    worker = stage.add()
    await trio.sleep(1)
    spec = WorkerSpec(URL, health=HealthOverrides(check_interval_secs=10.0))
    stage.registry.update(worker, spec, trio.current_time())
    await trio.sleep(10)
    assert stage.net.times("/health") == [0, 10]


async def test_a_removed_or_draining_worker_is_not_asked_any_more(
    stage: Stage, autojump_clock: MockClock
) -> None:
    for url in (URL, "http://w:2"):
        stage.net.worker(url)
    one, two = stage.add(), stage.add("http://w:2")
    await trio.sleep(1)
    stage.registry.remove(one)
    stage.registry.drain(two, trio.current_time())
    await trio.sleep(600)
    assert len(stage.net.asked) == 2


async def test_an_answer_for_a_worker_that_left_meanwhile_changes_nobody(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.net.worker().delay_s = 2.0
    first = stage.add()
    await trio.sleep(1)
    stage.registry.remove(first)
    stage.net.worker().says("/health", b"", 500)
    second = stage.add()
    await trio.sleep(20)
    assert first.status is Status.PENDING
    assert second.message == "health probe: answered 500"


async def test_a_worker_that_never_comes_up_fails_and_still_comes_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(make_registry(workers=Workers(worker_startup_timeout_secs=30.0)))
    await nursery.start(stage.probes.run)
    worker = stage.add()
    await trio.sleep(33)
    assert worker.status is Status.FAILED
    stage.net.worker()
    await trio.sleep(125)
    assert worker.status is Status.READY


async def test_a_failed_worker_leaves_the_list_when_that_is_wanted(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(make_registry(workers=Workers(worker_startup_timeout_secs=30.0)), removes_failed=True)
    drains = Drains(stage.registry, log=stage.log)
    await nursery.start(stage.probes.run)
    await nursery.start(drains.run)
    stage.add()
    await trio.sleep(33)
    assert stage.registry.workers() == ()


async def test_every_probe_is_counted(stage: Stage, autojump_clock: MockClock) -> None:
    stage.net.worker()
    stage.add()
    stage.add("http://w:2")
    await trio.sleep(0.15)
    assert sorted(stage.counted) == [(URL, True), ("http://w:2", False), ("http://w:2", False)]


async def test_many_workers_that_hang_do_not_hold_up_the_living(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(make_registry(HealthSettings(health_check_timeout_secs=5.0)))
    await nursery.start(stage.probes.run)
    for number in range(200):
        url = f"http://h:{number + 1}"
        stage.net.worker(url).hangs.add("/health")
        stage.add(url)
    stage.net.worker()
    worker = stage.add()
    await trio.sleep(5.2)
    assert worker.status is Status.READY
    assert stage.net.open_most == 128
