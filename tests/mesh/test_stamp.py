"""Hybrid logical stamps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.stamp import COUNTER_BITS, ZERO, Clock, Stamp, time_of


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=50))
def test_stamps_of_one_clock_rise_whatever_the_wall_clock_does(walls: list[float]) -> None:
    clock = Clock("n")
    stamps = [clock.stamp(wall) for wall in walls]
    assert stamps == sorted(set(stamps))
    assert stamps[0] > ZERO


@given(st.integers(1, 1 << 62), st.floats(0, 1e9))
def test_a_stamp_beats_every_stamp_observed(time: int, wall: float) -> None:
    clock = Clock("a")
    clock.observe(Stamp(time, "z"))
    assert clock.stamp(wall) > Stamp(time, "z")


def test_a_stamp_keeps_to_the_wall_clock_where_it_can() -> None:
    assert Clock("a").stamp(1234.5).wall_s == 1234.5


def test_the_counter_carries_into_the_milliseconds() -> None:
    clock = Clock("a")
    first = clock.stamp(1.0)
    for _ in range(1 << COUNTER_BITS):
        last = clock.stamp(1.0)
    assert last.time == first.time + (1 << COUNTER_BITS)
    assert last.wall_s == 1.001


def test_equal_times_are_ordered_by_name() -> None:
    assert Stamp(5, "a") < Stamp(5, "b") < Stamp(6, "a")


def test_time_before_the_epoch_counts_as_zero() -> None:
    assert time_of(-5.0) == 0
