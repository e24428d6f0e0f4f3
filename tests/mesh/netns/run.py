"""Plays scenarios side by side, each in a lab of its own, and keeps what became of each.

Owns the number that run at once. A scenario that fails does not disturb the others.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from tests.mesh.netns.lab import lab, remove_leftovers
from tests.mesh.netns.scenarios import NIGHT, SCENARIOS, Measured

ALL = SCENARIOS | NIGHT
AT_ONCE = 7
LIMIT_S = 150.0
"""For one scenario of one round."""


async def _one(
    name: str, rounds: int, results: dict[str, Measured | BaseException], slots: trio.Semaphore
) -> None:
    async with slots:
        try:
            with trio.fail_after(LIMIT_S * rounds):
                async with lab() as made:
                    results[name] = await ALL[name](made, rounds)
        except Exception as error:
            results[name] = error


async def _all(names: list[str], rounds: int, at_once: int) -> dict[str, Measured | BaseException]:
    remove_leftovers()
    results: dict[str, Measured | BaseException] = {}
    slots = trio.Semaphore(at_once)
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(_one, name, rounds, results, slots)
            await trio.sleep(0)
    return results


def play(
    names: Iterable[str], rounds: int = 1, at_once: int = AT_ONCE
) -> dict[str, Measured | BaseException]:
    """What each scenario measured, or why it failed. The longest come first, whatever the order of names."""
    wanted = set(names)
    return trio.run(_all, [name for name in ALL if name in wanted], rounds, at_once)
