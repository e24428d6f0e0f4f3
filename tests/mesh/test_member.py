"""Identity: the total order of statements, incarnations from the clock, and what a record may not say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import SettingsError
from mesh.member import (
    Accusation,
    Member,
    Record,
    Status,
    boot_seconds,
    check_name,
    first_incarnation,
)
from tests.mesh.swim_play import WALL_S, record

RANKS = st.tuples(st.integers(0, 5), st.sampled_from([b"a" * 8, b"b" * 8]), st.sampled_from(list(Status)))


def _with(rank: tuple[int, bytes, Status]) -> Record:
    return msgspec.structs.replace(record("x"), incarnation=rank[0], boot=rank[1], status=rank[2])


@given(RANKS, RANKS)
def test_the_order_is_total_and_the_incarnation_comes_first(
    left: tuple[int, bytes, Status], right: tuple[int, bytes, Status]
) -> None:
    one, other = _with(left), _with(right)
    assert (one.rank() < other.rank()) == (left < right)
    if left[0] < right[0]:
        assert one.rank() < other.rank()


def test_alive_suspect_dead_left_rise_within_an_incarnation() -> None:
    ranks = [Accusation("x", b"a" * 8, 7, status, "y").rank() for status in Status]
    assert ranks == sorted(ranks)
    assert _with((8, b"a" * 8, Status.ALIVE)).rank() > ranks[-1]


def test_a_later_life_outranks_every_refutation_of_an_earlier_one() -> None:
    earlier = first_incarnation(WALL_S) + 500
    assert first_incarnation(WALL_S + 1) > earlier
    assert boot_seconds(first_incarnation(WALL_S)) == int(WALL_S)


@pytest.mark.parametrize("name", ["", "a:b", "x" * 129, "\ud800"])
def test_a_name_is_short_text_without_a_colon(name: str) -> None:
    with pytest.raises(SettingsError):
        check_name(name)


@pytest.mark.parametrize(
    "change",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": ""},
        {"port": 0},
        {"port": 70000},
        {"boot": b"short"},
        {"meta": b"m" * 257},
        {"incarnation": 1 << 48},
        {"name": "a:b"},
    ],
)
def test_nobody_advertises_what_nobody_can_dial_or_carry(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        msgspec.structs.replace(record("x"), **change).checked()


def test_a_suspect_is_still_live_and_a_dead_one_is_not() -> None:
    live = [Member(msgspec.structs.replace(record("x"), status=status), 0.0).is_live for status in Status]
    assert live == [True, True, False, False]
