"""Seeds: all at once, again and again, until they are live members; our own address among them is fine."""

from __future__ import annotations

from itertools import pairwise

from mesh.joining import SEEDS_MAX
from mesh.messages import DialSeed
from mesh.settings import SwimSettings
from mesh.swim import Swim
from tests.mesh.swim_play import Table, machine, mesh_of


def _dials(swim: Swim, seconds: float, start_s: float = 0.0, fails: bool = True) -> list[tuple[float, str]]:
    """Every dial of a seed while nobody answers."""
    now, end_s = start_s, start_s + seconds
    found = []
    while now <= end_s:
        for effect in swim.effects():
            assert isinstance(effect, DialSeed)
            found.append((now, effect.seed))
            if fails:
                swim.seed_failed(effect.seed, now)
        now = max(now, swim.deadline())
        swim.tick(now)
    return found


def test_all_seeds_are_dialled_at_once() -> None:
    swim = machine("me")
    swim.join(["a:1", "b:2", "a:1"], 0.0)
    assert [effect.seed for effect in swim.effects()] == ["a:1", "b:2"]  # type: ignore[union-attr]


def test_a_dead_seed_is_dialled_for_ever_and_never_less_than_every_four_seconds() -> None:
    swim = machine("me")
    swim.join(["a:1"], 0.0)
    times = [when_s for when_s, _ in _dials(swim, 600.0)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[0] <= SwimSettings().seed_retry_min_s
    assert max(gaps) <= 4.0 and min(gaps[6:]) >= 3.0
    assert times[-1] > 590.0


def test_a_dial_under_way_is_not_repeated_until_the_shell_lost_it() -> None:
    swim = machine("me")
    swim.join(["a:1"], 0.0)
    times = [when_s for when_s, _ in _dials(swim, 30.0, fails=False)]
    assert 3 <= len(times) <= 4


def test_a_seed_that_became_a_member_is_left_alone_and_dialled_again_when_it_dies() -> None:
    table, swims = mesh_of(2)
    joiner = swims[1]
    dialled: list[str] = []
    joiner.seed_failed("first", table.now)

    def count() -> int:
        dialled.extend(effect.seed for effect in joiner.effects() if isinstance(effect, DialSeed))
        return len(dialled)

    table.run(20.0)
    assert count() == 0
    table.kill(swims[0])
    joiner.stream_closed("n0", swims[0].own.boot, table.now)
    end_s = table.now + 8.0
    while table.now < end_s:
        for effect in joiner.effects():
            if isinstance(effect, DialSeed):
                dialled.append(effect.seed)
                joiner.seed_failed(effect.seed, table.now)
            else:
                joiner.dial_failed(effect.address, True, table.now)
        table.now = max(table.now, joiner.deadline())
        joiner.tick(table.now)
    assert len(dialled) >= 2


def test_a_late_seed_is_found() -> None:
    swim, late = machine("me", 1), machine("late", 2)
    table = Table(swim)
    table.seeds["late"] = late.own.address
    swim.join(["late"], 0.0)
    table.run(30.0)
    assert not swim.live()
    table.swims[late.own.address] = late
    late.tick(table.now)
    table.run(5.0)
    assert [member.name for member in swim.live()] == ["late"]
    assert [member.name for member in late.live()] == ["me"]


def test_our_own_address_among_the_seeds_is_fine() -> None:
    swim = machine("me", 1)
    table = Table(swim)
    table.seeds["me"] = swim.own.address
    swim.join(["me"], 0.0)
    table.run(100.0)
    assert not swim.members()
    assert swim.is_running


def test_the_number_of_seeds_is_bounded() -> None:
    swim = machine("me")
    swim.join([f"seed{number}:1" for number in range(SEEDS_MAX + 50)], 0.0)
    assert len(swim.effects()) == SEEDS_MAX


def test_answers_about_seeds_never_named_are_ignored() -> None:
    swim = machine("me")
    swim.seed_answered("x", "y", b"12345678", 0.0)
    swim.seed_failed("x", 0.0)
    assert swim.effects() == []
