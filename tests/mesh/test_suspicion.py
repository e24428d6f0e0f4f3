"""Suspicions: long without witnesses, short with two, never shorter than the minimum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.settings import SwimSettings
from mesh.suspicion import Suspicion, suspicion_min_s

SETTINGS = SwimSettings(suspicion_mult=4.0)


def test_the_minimum_grows_with_the_logarithm_of_the_members() -> None:
    assert suspicion_min_s(SETTINGS, 3, False) == suspicion_min_s(SETTINGS, 10, False) == 2.0
    assert suspicion_min_s(SETTINGS, 1000, False) == pytest.approx(6.0)


def test_the_end_of_a_stream_is_waited_upon_as_long_among_many_as_among_few() -> None:
    assert [suspicion_min_s(SETTINGS, members, True) for members in (1, 3, 64, 1000)] == [1.45] * 4


def test_three_members_have_nobody_to_confirm_so_the_minimum_holds() -> None:
    assert Suspicion(SETTINGS, 3, "a", 10.0).deadline_s() == 12.0


def test_ten_members_wait_long_for_one_accuser_and_short_for_three() -> None:
    suspicion = Suspicion(SETTINGS, 10, "a", 10.0)
    assert suspicion.deadline_s() == 22.0
    assert suspicion.confirm("b")
    assert 12.0 < suspicion.deadline_s() < 17.0
    assert suspicion.confirm("c")
    assert suspicion.deadline_s() == pytest.approx(12.0)


def test_an_accuser_counts_once_and_a_fourth_one_not_at_all() -> None:
    suspicion = Suspicion(SETTINGS, 10, "a", 0.0)
    assert not suspicion.confirm("a")
    assert suspicion.confirm("b") and not suspicion.confirm("b")
    assert suspicion.confirm("c")
    assert not suspicion.confirm("d")


def test_the_end_of_its_stream_shortens_what_was_begun_without_it() -> None:
    suspicion = Suspicion(SETTINGS, 3, "a", 0.0)
    suspicion.saw_eof(SETTINGS, 3)
    assert suspicion.deadline_s() == 1.45
    suspicion.saw_eof(SETTINGS, 3)
    assert suspicion.deadline_s() == 1.45


def test_a_refusing_port_sets_the_hour_and_a_hold_delays_it() -> None:
    suspicion = Suspicion(SETTINGS, 10, "a", 0.0)
    suspicion.condemn(0.3)
    assert suspicion.deadline_s() == 0.3
    suspicion.hold(1.0)
    assert suspicion.deadline_s() == 1.0


@given(st.integers(2, 2000), st.lists(st.sampled_from("abcdefg")))
def test_confirmations_only_shorten_and_never_below_the_minimum(members: int, accusers: list[str]) -> None:
    suspicion = Suspicion(SETTINGS, members, "z", 5.0)
    last_s = suspicion.deadline_s()
    for accuser in accusers:
        suspicion.confirm(accuser)
        assert suspicion.deadline_s() <= last_s
        last_s = suspicion.deadline_s()
    assert last_s >= 5.0 + suspicion_min_s(SETTINGS, members, False) - 1e-9
