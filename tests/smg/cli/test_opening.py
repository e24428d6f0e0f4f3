"""When a starting node begins to take requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import trio

from smg.cli.opening import FIRST_LOOK_S, wait_decided
from smg.fleet.health import Health, HealthRules
from smg.fleet.registry import Registry
from smg.fleet.worker import Status


class Engine:
    """A worker of which only health, status and models are asked."""

    def __init__(self) -> None:
        self.health = Health(HealthRules())
        self.status = Status.PENDING
        self.has_told_models = False

    def answer(self) -> None:
        self.health.observed_ok(0.0)
        self.status = Status.READY
        self.health.entered(Status.READY, 0.0)

    def refuse(self) -> None:
        self.health.observed_miss(0.0, True)

    def tell_models(self) -> None:
        self.has_told_models = True


class Fleet:
    def __init__(self, *engines: Engine) -> None:
        self.engines = list(engines)

    def workers(self) -> list[Engine]:
        return self.engines


async def waited_s(
    fleet: Fleet, *, may_find_some: bool = False, story: dict[float, Callable[[], object]] | None = None
) -> float:
    """How long the node waits while at each of these seconds something happens."""
    started_s = trio.current_time()

    async def tell() -> None:
        for at_s, event in (story or {}).items():
            await trio.sleep_until(started_s + at_s)
            event()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        await wait_decided(
            cast(Registry, fleet),
            lambda worker: not cast(Engine, worker).has_told_models,
            may_find_some=may_find_some,
        )
        nursery.cancel_scope.cancel()
    return trio.current_time() - started_s


async def test_a_node_without_workers_opens_at_once(autojump_clock):
    assert await waited_s(Fleet()) == 0


async def test_a_node_that_may_be_told_of_workers_waits_for_them_a_moment(autojump_clock):
    assert FIRST_LOOK_S - 0.01 < await waited_s(Fleet(), may_find_some=True) < FIRST_LOOK_S + 0.05


async def test_it_opens_when_every_worker_has_answered_and_told_its_models(autojump_clock):
    one, other = Engine(), Engine()
    story = {0.1: one.answer, 0.15: one.tell_models, 0.2: other.answer, 0.3: other.tell_models}
    assert 0.3 <= await waited_s(Fleet(one, other), story=story) < 0.35


async def test_a_worker_that_refuses_is_not_waited_for(autojump_clock):
    one, other = Engine(), Engine()
    story = {0.1: one.refuse, 0.2: other.answer, 0.25: other.tell_models}
    assert 0.25 <= await waited_s(Fleet(one, other), story=story) < 0.3
    assert await waited_s(Fleet(one)) == 0


async def test_workers_that_come_from_elsewhere_are_met_too(autojump_clock):
    fleet, late = Fleet(), Engine()
    story = {0.2: lambda: fleet.engines.append(late), 0.3: late.answer, 0.4: late.tell_models}
    assert 0.4 <= await waited_s(fleet, may_find_some=True, story=story) < 0.45


async def test_a_worker_that_says_nothing_holds_it_up_for_a_second_at_most(autojump_clock):
    assert FIRST_LOOK_S - 0.01 < await waited_s(Fleet(Engine())) < FIRST_LOOK_S + 0.05
