"""Drains in virtual time (WRK-13)."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from smg.fleet import load
from smg.fleet.worker import Status, WorkerSpec
from smg.services.drain import Drains
from tests.smg.services.fakes import URL, FakeLog, make_registry


async def test_an_idle_worker_goes_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    registry = make_registry()
    await nursery.start(Drains(registry, log=FakeLog()).run)
    worker = registry.add(WorkerSpec(URL), trio.current_time())
    await trio.sleep(100)
    registry.drain(worker, trio.current_time())
    await trio.sleep(0.2)
    assert registry.workers() == ()


async def test_a_busy_worker_goes_within_a_second_of_its_last_request(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    registry = make_registry()
    await nursery.start(Drains(registry, log=FakeLog()).run)
    worker = registry.add(WorkerSpec(URL), trio.current_time())
    load.begin(worker)
    registry.drain(worker, trio.current_time())
    await trio.sleep(300)
    assert worker.status is Status.DRAINING
    assert registry.workers() == (worker,)
    load.end(worker)
    await trio.sleep(0.99)
    assert registry.workers() == ()


async def test_a_worker_that_never_ends_goes_after_the_timeout_and_others_do_not_wait_for_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    registry, log = make_registry(drain_timeout_s=50.0), FakeLog()
    await nursery.start(Drains(registry, log=log).run)
    busy = registry.add(WorkerSpec(URL), trio.current_time())
    idle = registry.add(WorkerSpec("http://w:2"), trio.current_time())
    load.begin(busy)
    registry.drain(busy, trio.current_time())
    registry.drain(idle, trio.current_time())
    await trio.sleep(1)
    assert registry.workers() == (busy,)
    await trio.sleep(48)
    assert registry.workers() == (busy,)
    await trio.sleep(2)
    assert registry.workers() == ()
    assert [(level, fields.get("in_flight")) for level, _, fields in log.lines] == [
        ("info", None),
        ("warn", 1),
    ]
