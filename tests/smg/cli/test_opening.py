"""When a starting node begins to take requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio

from smg.cli.opening import FIRST_LOOK_S, wait_decided
from smg.fleet.health import Health, HealthRules
from smg.fleet.registry import Registry


class Fleet:
    """Workers of which only the health is asked."""

    def __init__(self, *healths: Health) -> None:
        self.healths = list(healths)

    def workers(self) -> list[Any]:
        return [SimpleNamespace(health=health) for health in self.healths]


async def waited_s(fleet: Fleet, *, may_find_some: bool = False, ready_after_s: float = 1e9) -> float:
    started_s = trio.current_time()
    await wait_decided(
        cast(Registry, fleet),
        lambda: trio.current_time() >= started_s + ready_after_s,
        may_find_some=may_find_some,
    )
    return trio.current_time() - started_s


async def test_a_node_without_workers_opens_at_once(autojump_clock):
    assert await waited_s(Fleet()) == 0


async def test_a_node_that_may_be_told_of_workers_waits_for_them_a_moment(autojump_clock):
    assert 0.2 <= await waited_s(Fleet(), may_find_some=True, ready_after_s=0.2) < 0.25
    assert FIRST_LOOK_S - 0.01 < await waited_s(Fleet(), may_find_some=True) < FIRST_LOOK_S + 0.05


async def test_it_opens_with_the_first_ready_worker(autojump_clock):
    fleet = Fleet(Health(HealthRules()), Health(HealthRules()))
    assert 0.1 <= await waited_s(fleet, ready_after_s=0.1) < 0.15


async def test_it_opens_when_every_worker_has_missed_its_first_probe(autojump_clock):
    fleet = Fleet(Health(HealthRules()), Health(HealthRules()))
    fleet.healths[0].observed_miss(0.0, True)
    async with trio.open_nursery() as nursery:

        async def miss() -> None:
            await trio.sleep(0.3)
            fleet.healths[1].observed_miss(0.3, False)

        nursery.start_soon(miss)
        assert 0.3 <= await waited_s(fleet) < 0.35


async def test_a_worker_that_says_nothing_holds_it_up_for_a_second_at_most(autojump_clock):
    assert FIRST_LOOK_S - 0.01 < await waited_s(Fleet(Health(HealthRules()))) < FIRST_LOOK_S + 0.05
