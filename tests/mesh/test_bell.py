"""The one sleep: deadlines, rings, input, and how late it woke."""

from __future__ import annotations

import math

import trio

from mesh.bell import SLEEP_MIN_S, Bell
from tests.mesh.agent_world import in_virtual_time


async def nothing() -> None:
    await trio.sleep_forever()


@in_virtual_time
async def test_it_sleeps_until_the_deadline_and_was_not_late() -> None:
    bell, start_s = Bell(), trio.current_time()
    assert await bell.wait(start_s + 3, nothing) == 0.0
    assert trio.current_time() - start_s == 3.0


@in_virtual_time
async def test_input_ends_the_sleep() -> None:
    bell, start_s = Bell(), trio.current_time()

    async def a_datagram() -> None:
        await trio.sleep(1)

    assert await bell.wait(start_s + 3, a_datagram) == 0.0
    assert trio.current_time() - start_s == 1.0


@in_virtual_time
async def test_a_ring_ends_the_sleep_or_the_next_one() -> None:
    bell, start_s = Bell(), trio.current_time()

    async def ring_later() -> None:
        await trio.sleep(1)
        bell.ring()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring_later)
        assert await bell.wait(math.inf, nothing) == 0.0
    assert trio.current_time() - start_s == 1.0
    bell.ring()
    assert await bell.wait(math.inf, nothing) == 0.0
    assert trio.current_time() - start_s == 1.0
    assert await bell.wait(trio.current_time() + 2, nothing) == 0.0
    assert trio.current_time() - start_s == 3.0, "one ring wakes once"


@in_virtual_time
async def test_a_deadline_can_come_sooner_but_not_later() -> None:
    bell, start_s = Bell(), trio.current_time()

    async def change() -> None:
        bell.sooner(start_s + 5)
        bell.sooner(start_s + 2)
        bell.sooner(start_s + 4)
        await trio.sleep_forever()

    await bell.wait(start_s + 10, change)
    assert trio.current_time() - start_s == 2.0


@in_virtual_time
async def test_a_deadline_that_stands_still_does_not_eat_the_processor() -> None:
    bell, start_s = Bell(), trio.current_time()
    for _ in range(10):
        await bell.wait(start_s - 5, nothing)
    assert trio.current_time() - start_s >= 9.9 * SLEEP_MIN_S


@in_virtual_time
async def test_a_late_waking_is_measured() -> None:
    """A wait that cannot be cut short at its deadline stands for a loop that somebody holds up."""
    bell, start_s = Bell(), trio.current_time()

    async def hold_up() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(2.5)
        await trio.sleep_forever()

    assert abs(await bell.wait(start_s + 1, hold_up) - 1.5) < 1e-6
