"""The pauses before a process is started again."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from smg.cli.restarts import CALM_S, FIRST_PAUSE_S, JITTER_RATIO, PAUSE_MAX_S, Restarts


class Longest(Random):
    """Never takes anything off."""

    def random(self) -> float:
        return 0.0


def test_the_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts()
    pauses = [restarts.pause_s(0.1, Longest()) for _ in range(10)]
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    assert pauses[-1] == PAUSE_MAX_S
    assert restarts.count == 10


def test_whoever_has_lived_is_started_soon_again() -> None:
    restarts = Restarts()
    for _ in range(10):
        restarts.pause_s(0.1, Longest())
    assert restarts.pause_s(CALM_S, Longest()) == FIRST_PAUSE_S
    assert restarts.pause_s(0.1, Longest()) == 2 * FIRST_PAUSE_S


@given(st.lists(st.floats(0, 1e6), max_size=80), st.integers())
def test_a_pause_is_bounded_from_both_sides(lives_s: list[float], seed: int) -> None:
    restarts, rng = Restarts(), Random(seed)
    for lived_s in lives_s:
        assert FIRST_PAUSE_S * (1 - JITTER_RATIO) <= restarts.pause_s(lived_s, rng) <= PAUSE_MAX_S
