"""Local health: bounds, what a late loop does, and the hold after a freeze."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.awareness import LAG_SHOWN_S, Awareness
from mesh.settings import SwimSettings


@given(st.lists(st.integers(-9, 9)))
def test_the_score_stays_within_its_bounds(points: list[int]) -> None:
    awareness = Awareness(SwimSettings())
    for point in points:
        awareness.add(point)
        assert 0 <= awareness.score <= 7
        assert awareness.stretch() == 1 + awareness.score


def test_a_loop_a_tenth_of_a_second_late_counts_once_per_interval() -> None:
    awareness = Awareness(SwimSettings())
    assert not awareness.note_lag(0.09, 10.0)
    assert awareness.score == 0
    assert awareness.note_lag(0.2, 10.0)
    assert awareness.note_lag(0.2, 10.1)
    assert awareness.score == 1
    assert awareness.hold_until() < 10.0


def test_a_freeze_holds_verdicts_for_a_second() -> None:
    awareness = Awareness(SwimSettings())
    awareness.note_lag(0.6, 10.0)
    assert awareness.hold_until() == 11.0


def test_lateness_is_shown_for_a_while_and_then_forgotten() -> None:
    awareness = Awareness(SwimSettings())
    awareness.note_lag(0.25, 10.0)
    awareness.note_lag(0.15, 11.0)
    assert awareness.lag_ms(11.5) == 250
    assert awareness.lag_ms(11.0 + LAG_SHOWN_S) == 0


def test_a_healed_partition_forgives() -> None:
    awareness = Awareness(SwimSettings())
    awareness.add(5)
    awareness.forgive()
    assert awareness.score == 0
