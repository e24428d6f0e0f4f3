"""One run: a plan, a world, the checkers; and what to print when they find something."""

from __future__ import annotations

from mesh.settings import SwimSettings
from tests.sim.checkers import HEAL_S, QUIET_S, STEP_S, Checker
from tests.sim.state import Book
from tests.sim.workload import FAULTS_END_S, RUN_S, Plan, Player, draw, shrink
from tests.sim.world import World

DEADLY = frozenset({"crash", "lose_host", "restart", "restart_elsewhere", "restart_clock_behind", "leave"})
"""Kinds after which a producer's stream may be known to some and gone for ever."""


def play(plan: Plan, with_state: bool = False, settings: SwimSettings | None = None) -> list[str]:
    """Run a plan for RUN_S virtual seconds. Returns the problems found, empty if none."""
    return play_world(plan, with_state, settings)[1]


def play_world(
    plan: Plan, with_state: bool = False, settings: SwimSettings | None = None
) -> tuple[World, list[str]]:
    """As `play`, and the world as it was at the end."""
    book = Book() if with_state else None
    world = World(plan.seed, settings, make_replica=book.make if book is not None else None)
    checker = Checker(world, has_state=with_state)
    player = Player(plan, world)
    player.begin()
    assert RUN_S - QUIET_S >= FAULTS_END_S + HEAL_S
    is_over = is_quiet = False
    while world.loop.now < RUN_S:
        world.run(STEP_S)
        checker.step()
        if book is not None:
            book.step(world)
        if not is_over and world.loop.now >= FAULTS_END_S:
            is_over = True
            player.end_faults()
        if not is_quiet and world.loop.now >= RUN_S - QUIET_S:
            is_quiet = True
            checker.begin_quiet()
    checker.end()
    if book is not None:
        has_deaths = any(fault.kind in DEADLY for fault in plan.faults)
        checker.problems += book.problems(world, has_deaths)
    return world, checker.problems


def report(seed: int, problems: list[str], with_state: bool = False) -> str:
    """What a failed seed prints: how to replay it, and the shortest plan that still fails."""
    plan = shrink(draw(seed), lambda shorter: bool(play(shorter, with_state)))
    lines = [
        f"seed {seed} failed; replay: python -m tests.sim --seed {seed}{' --state' if with_state else ''}"
    ]
    lines += [f"  problem: {problem}" for problem in problems[:8]]
    lines.append(f"  shortest plan ({plan.members} members):")
    lines += [f"    {fault}" for fault in plan.faults]
    return "\n".join(lines)
