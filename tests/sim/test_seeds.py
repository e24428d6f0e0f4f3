"""Random fault schedules that fit in a minute; `scripts/sim-night` runs ten thousand and the long measurements.

SMG_SIM_SEEDS sets how many, SMG_SIM_FIRST where to begin.
"""

from __future__ import annotations

import os

import pytest

from mesh.settings import SwimSettings
from tests.sim.checkers import HEAL_S
from tests.sim.network import Cut
from tests.sim.run import play, play_world, report
from tests.sim.workload import FAULTS_END_S, Fault, Plan, draw, shrink
from tests.sim.world import World, grow

FIRST = int(os.environ.get("SMG_SIM_FIRST", "0"))
SEEDS = int(os.environ.get("SMG_SIM_SEEDS", "160"))
BATCH = 16


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, BATCH))
def test_membership_survives_random_faults(first: int) -> None:
    for seed in range(first, first + BATCH):
        problems = play(draw(seed))
        assert not problems, report(seed, problems)


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS // 8, 4))
def test_replicated_state_survives_random_faults(first: int) -> None:
    for seed in range(first, first + 4):
        problems = play(draw(seed), with_state=True)
        assert not problems, report(seed, problems, with_state=True)


def test_the_stream_of_the_rightful_owner_of_a_name_outlives_an_impostor() -> None:
    """Seed 321: a newcomer that knew nobody took the streams of both claimants, and kept the impostor's only."""
    problems = play(draw(321), with_state=True)
    assert not problems, report(321, problems, with_state=True)


@pytest.mark.parametrize("seed", [501, 988])
def test_a_life_with_a_faster_clock_that_lists_nothing_is_known_to_all_and_harms_nobody(seed: int) -> None:
    """988: a successor wrote nothing into one namespace, so nobody heard there that its former life was over.
    501: an impostor made its empty life known and went, and the owner of the name never heard of it."""
    problems = play(draw(seed), with_state=True)
    assert not problems, report(seed, problems, with_state=True)


def test_the_same_seed_is_the_same_history() -> None:
    def trace() -> list[str]:
        world, _ = play_world(draw(7))
        return [f"{when_s} {node.name} {event}" for when_s, node, event in world.log]

    first = trace()
    assert first == trace()
    assert len(first) > 20


# The checkers must be able to fail: each of these breaks one promise on purpose.


def _plan(*faults: Fault, members: int = 4) -> Plan:
    return Plan(3, members, faults, (0.0,) * members, (0.0,) * members)


def test_without_a_re_dial_the_checkers_find_a_partition_that_never_heals() -> None:
    halves = Fault(10.0, "cut", 60.0, ("n0003",))
    assert play(_plan(halves)) == []
    broken = SwimSettings(redial_interval_s=0.0, seed_retry_max_s=1e9)
    assert any("it lives" in problem for problem in play(_plan(halves), settings=broken))


def test_the_checkers_find_a_death_that_is_never_noticed() -> None:
    lost = Fault(60.0, "lose_host", 1.0, ("n0003",), 0.9)
    assert play(_plan(lost)) == []
    broken = SwimSettings(suspicion_mult=1e4, suspicion_mult_eof=1e4)
    assert any("it is gone" in problem for problem in play(_plan(lost), settings=broken))


def test_the_checkers_find_a_chatty_idle_mesh() -> None:
    broken = SwimSettings(probe_interval_s=0.05, probe_timeout_min_s=0.01, probe_timeout_max_s=0.02)
    assert any("at idle" in problem for problem in play(_plan(), settings=broken))


def test_a_failing_plan_is_shortened_to_the_fault_that_matters() -> None:
    faults = tuple(Fault(10.0 + place, "loss", 1.0, (), 0.1) for place in range(5))
    lost = Fault(60.0, "lose_host", 1.0, ("n0003",), 0.9)
    short = shrink(_plan(*faults, lost), lambda plan: lost in plan.faults)
    assert short.faults == (lost,)


def test_the_faults_end_early_enough_for_the_checks() -> None:
    assert all(fault.at_s + fault.for_s <= FAULTS_END_S for seed in range(300) for fault in draw(seed).faults)
    assert HEAL_S > 15.0


# Promises with a number (mesh.md 4.10), a few runs each; the percentiles are in docs/mesh/measurements.md.


def test_a_killed_process_is_dead_everywhere_within_a_second() -> None:
    world = World(5)
    names = grow(world, 10)
    world.crash(names[3])
    took_s = world.run_until(world.all_see_all, 10.0)
    assert took_s is not None and took_s <= 1.0


def test_a_lost_host_is_dead_everywhere_within_five_seconds_and_a_half_of_sixty_four() -> None:
    for members, limit_s in ((3, 4.0), (10, 4.5), (64, 6.0)):
        world = World(6)
        names = grow(world, members)
        world.crash(names[1], host_lost=True)
        took_s = world.run_until(world.all_see_all, 20.0)
        assert took_s is not None and took_s <= limit_s


@pytest.mark.parametrize("side", [{0}, {0, 1, 2, 3, 4}])
def test_a_partition_heals_within_fifteen_seconds(side: set[int]) -> None:
    world = World(7)
    grow(world, 10)
    cut = world.cut(Cut(side))
    world.run(60.0)
    assert not world.all_see_all()
    world.mend(cut)
    took_s = world.run_until(world.all_see_all, 15.0)
    assert took_s is not None


def test_udp_blocked_altogether_suspects_nobody() -> None:
    world = World(8)
    grow(world, 5)
    world.cut(Cut(set(range(5)), is_udp_only=True, inner=True))
    world.log.clear()
    world.run(300.0)
    assert world.log == []


def test_a_pause_of_half_a_second_kills_nobody() -> None:
    world = World(9)
    names = grow(world, 8)
    world.log.clear()
    for number in range(40):
        world.pause(names[number % 8], 0.5)
        world.run(3.0)
    assert not [event for _, _, event in world.log if type(event).__name__ == "MemberDown"]
