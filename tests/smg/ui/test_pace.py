"""Rates, shares and quantiles against what a reader would work out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.ui.pace import HEADLINE_S, READINGS_MAX, Pace, Reading, quantile, total


def read(pace: Pace, at_s: float, finished: dict[str, int] | None = None, **counters: Any) -> None:
    pace.read(Reading(at_s=at_s, **counters), finished or {})


def test_a_single_reading_has_no_rate() -> None:
    pace = Pace()
    read(pace, 100.0, requests=50)
    assert pace.per_s("requests") == 0.0
    assert pace.ratio("matched_chars", "prompt_chars", 60.0) is None


def test_a_rate_looks_back_five_seconds_and_no_further() -> None:
    pace = Pace()
    for second in range(20):
        read(pace, 100.0 + second, requests=1000 if second < 10 else 1000 + 3 * (second - 9))
    assert pace.per_s("requests") == pytest.approx(3.0)
    assert pace.per_s("requests", over_s=100.0) == pytest.approx(30 / 19)


def test_rates_of_several_counters_add_up() -> None:
    pace = Pace()
    read(pace, 0.0, mesh_in=0, mesh_out=0)
    read(pace, 2.0, mesh_in=10, mesh_out=30)
    assert pace.per_s("mesh_in", "mesh_out") == 20.0


def test_a_counter_that_falls_stands_still() -> None:
    pace = Pace()
    read(pace, 0.0, requests=10, prompt_chars=100, matched_chars=50)
    read(pace, 1.0, requests=4, prompt_chars=90, matched_chars=40)
    assert pace.per_s("requests") == 0.0
    assert pace.ratio("matched_chars", "prompt_chars", 60.0) is None


def test_a_ratio_is_of_what_was_added() -> None:
    pace = Pace()
    read(pace, 0.0, prompt_chars=1000, matched_chars=0)
    read(pace, 1.0, prompt_chars=1400, matched_chars=300)
    assert pace.ratio("matched_chars", "prompt_chars", 60.0) == 0.75


def test_shares_follow_what_workers_finished_lately() -> None:
    pace = Pace()
    read(pace, 0.0, {"a": 1000, "b": 0})
    assert pace.shares() == {}, "what was finished before anybody looked says nothing"
    read(pace, 1.0, {"a": 1003, "b": 1})
    assert pace.shares() == {"a": 0.75, "b": 0.25}
    for second in range(2, 200):
        read(pace, float(second), {"a": 1003, "b": 1 + second})
    assert pace.shares()["b"] > 0.99


def test_a_worker_that_left_has_no_share_and_one_that_came_none_yet() -> None:
    pace = Pace()
    read(pace, 0.0, {"a": 0, "b": 0})
    read(pace, 1.0, {"a": 4, "b": 4})
    read(pace, 2.0, {"a": 8, "c": 500})
    assert pace.shares() == {"a": 1.0, "c": 0.0}


def test_after_a_long_pause_nothing_is_known() -> None:
    pace = Pace()
    read(pace, 0.0, {"a": 0}, requests=0)
    read(pace, 1.0, {"a": 5}, requests=5)
    read(pace, 2.0 + HEADLINE_S, {"a": 900}, requests=900)
    assert pace.per_s("requests") == 0.0
    assert pace.shares() == {}


def test_readings_are_bounded() -> None:
    pace = Pace()
    for second in range(3 * READINGS_MAX):
        read(pace, float(second), requests=second)
    assert pace.per_s("requests", over_s=1e9) == 1.0
    assert len(pace._readings) == READINGS_MAX


def test_counts_of_a_histogram_are_those_since() -> None:
    pace = Pace()
    read(pace, 0.0, ttft=(5, 5, 0))
    read(pace, 1.0, ttft=(5, 7, 1))
    assert pace.counts("ttft", 60.0) == [0, 2, 1]


def test_a_histogram_that_appears_counts_from_nothing() -> None:
    pace = Pace()
    read(pace, 0.0)
    read(pace, 1.0, ttft=(1, 2, 3))
    assert pace.counts("ttft", 60.0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ([10, 0, 0, 0], 0.5, 0.5),
        ([0, 10, 0, 0], 0.5, 1.5),
        ([5, 5, 0, 0], 0.9, 1.8),
        ([5, 0, 5, 0], 0.5, 1.0),
        ([0, 0, 0, 3], 0.5, 4.0),
        ([0, 0, 0, 0], 0.5, None),
    ],
)
def test_a_quantile_lies_where_prometheus_says(counts: list[int], share: float, value: float | None) -> None:
    assert quantile([1.0, 2.0, 4.0], counts, share) == value


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_quantiles_rise_and_stay_within_the_bounds(counts: list[int], one: float, other: float) -> None:
    low, high = (quantile([1.0, 2.0, 4.0], counts, share) for share in sorted((one, other)))
    assert (low is None) == (high is None) == (sum(counts) == 0)
    if low is not None and high is not None:
        assert 0.0 <= low <= high <= 4.0


def test_histograms_add_up() -> None:
    assert total([[1, 2], [10, 20]]) == (11, 22)
    assert total([]) == ()
