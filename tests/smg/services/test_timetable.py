"""The timetable of the services, in virtual time."""

from __future__ import annotations

import math

import trio
import trio.testing

from smg.services.timetable import Timetable


async def test_a_job_runs_at_its_time_and_again_when_it_says(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[float] = []

    async def job(key: str) -> float | None:
        ran.append(trio.current_time())
        return trio.current_time() + 10 if len(ran) < 3 else None

    table = Timetable(job, 4)
    await nursery.start(table.run)
    table.bring_forward("a", trio.current_time() + 5)
    await trio.sleep(1000)
    assert ran == [5, 15, 25]
    assert "a" not in table
    assert len(table) == 0


async def test_a_key_brought_forward_runs_earlier_but_never_later(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[tuple[str, float]] = []

    async def job(key: str) -> float | None:
        ran.append((key, trio.current_time()))
        return None

    table = Timetable(job, 4)
    table.bring_forward("a", 50)
    table.bring_forward("b", 40)
    await nursery.start(table.run)
    await trio.sleep(10)
    table.bring_forward("a", trio.current_time())
    table.bring_forward("b", 45)
    await trio.sleep(90)
    assert ran == [("a", 10), ("b", 40)]


async def test_one_key_never_runs_twice_at_once_and_runs_again_when_it_was_asked_meanwhile(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[float] = []
    running = 0

    async def job(key: str) -> float | None:
        nonlocal running
        running += 1
        assert running == 1
        ran.append(trio.current_time())
        await trio.sleep(5)
        running -= 1
        return trio.current_time() + 1000

    table = Timetable(job, 4)
    await nursery.start(table.run)
    table.bring_forward("a", 0)
    await trio.sleep(2)
    table.bring_forward("a", trio.current_time())
    table.bring_forward("a", trio.current_time())
    await trio.sleep(50)
    assert ran == [0, 5]


async def test_a_dropped_key_is_gone_even_while_its_job_runs(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[float] = []

    async def job(key: str) -> float | None:
        ran.append(trio.current_time())
        await trio.sleep(5)
        return trio.current_time() + 1

    table = Timetable(job, 4)
    await nursery.start(table.run)
    table.bring_forward("a", 0)
    table.bring_forward("b", 100)
    table.drop("b")
    await trio.sleep(2)
    table.drop("a")
    assert "a" not in table
    await trio.sleep(500)
    assert ran == [0]
    assert len(table) == 0


async def test_a_key_that_comes_back_while_its_last_job_runs_is_kept(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[float] = []

    async def job(key: str) -> float | None:
        ran.append(trio.current_time())
        await trio.sleep(5)
        return None

    table = Timetable(job, 4)
    await nursery.start(table.run)
    table.bring_forward("a", 0)
    await trio.sleep(1)
    table.drop("a")
    table.bring_forward("a", 20)
    assert "a" in table
    await trio.sleep(100)
    assert ran == [0, 20]


async def test_no_more_jobs_run_together_than_allowed(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    running = most = 0

    async def job(key: str) -> float | None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(1)
        running -= 1
        return None

    table = Timetable(job, 3)
    await nursery.start(table.run)
    for number in range(20):
        table.bring_forward(str(number), 0)
    await trio.sleep(6.5)
    assert most == 3
    assert len(table) == 2
    await trio.sleep(1)
    assert len(table) == 0


async def test_bringing_forward_thousands_of_times_keeps_the_memory_flat(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async def job(key: str) -> float | None:
        return None

    table = Timetable(job, 3)
    for number in range(10_000):
        table.bring_forward("a", 1e6 - number)
    assert len(table._heap) <= 4 + 64
    assert table.due_at("a") == 1e6 - 9999
    assert math.isfinite(table._next_due())
