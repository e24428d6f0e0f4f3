"""What a node says about itself: the incarnation only rises, a bad change changes nothing."""

from __future__ import annotations

import pytest

from mesh.errors import SettingsError
from mesh.member import Status
from mesh.own import Own
from tests.mesh.swim_play import WALL_S, record


def test_the_incarnation_only_rises() -> None:
    own = Own(record("me"))
    with pytest.raises(AssertionError):
        own.raise_to(own.record.incarnation)
    own.raise_to(own.record.incarnation + 9)
    assert own.source(7).incarnation == own.record.incarnation
    assert own.source(7).fingerprint == 7


def test_a_change_raises_the_incarnation_and_a_bad_one_changes_nothing() -> None:
    own = Own(record("me"))
    first = own.record
    own.change({"meta": b"v2"})
    assert own.record.meta == b"v2" and own.record.incarnation == first.incarnation + 1
    second = own.record
    with pytest.raises(SettingsError):
        own.change({"host": "0.0.0.0"})
    assert own.record is second


def test_the_first_born_is_the_elder_and_the_boot_id_settles_a_tie() -> None:
    own = Own(record("me", boot=b"bbbbbbbb"))
    assert own.is_elder_than(record("me", 2, WALL_S + 1, b"aaaaaaaa"))
    assert not own.is_elder_than(record("me", 2, WALL_S - 1, b"cccccccc"))
    assert own.is_elder_than(record("me", 2, WALL_S, b"cccccccc"))
    assert not own.is_elder_than(record("me", 2, WALL_S, b"aaaaaaaa"))


def test_a_farewell_speaks_of_the_present_incarnation() -> None:
    own = Own(record("me"))
    news = own.leave()
    assert (news.status, news.incarnation, news.accuser) == (Status.LEFT, own.record.incarnation, "me")
    assert own.record.status == Status.LEFT


def test_an_impossible_record_is_refused() -> None:
    with pytest.raises(SettingsError):
        Own(record("bad:name"))
