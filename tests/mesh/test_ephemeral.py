"""Ephemeral maps: absolute numbers that die with their owner or with time."""

from __future__ import annotations

import pytest

from mesh.errors import BoundError
from mesh.frames import FrameType
from mesh.namespace import Ephemeral, Put, Removed
from tests.mesh.replica_talk import Talk

LOAD = Ephemeral(name="load", coalesce_s=0.05, ttl_s=3.0, refresh_s=1.0)


def view(talk: Talk, name: str) -> dict[tuple[str, bytes], bytes]:
    return {(o, k): v for o, k, v in talk[name].items("load")}


def test_changes_are_coalesced_and_the_newest_is_sent() -> None:
    talk = Talk([LOAD])
    for number in range(10):
        talk["a"].put("load", b"w", b"%d" % number, talk.now)
    assert talk["a"].deadline() == talk.now + 0.05
    assert talk.settle() == []
    talk.run(0.06)
    assert talk.changes("b") == [Put("load", "a", b"w", b"9")]


def test_entries_live_as_long_as_their_owner_repeats_them() -> None:
    talk = Talk([LOAD])
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(30.0)
    assert view(talk, "b") == {("a", b"w"): b"1"}
    assert talk.changes("b") == [Put("load", "a", b"w", b"1")], "a repetition is no news"
    talk.cut("a", "b")
    talk.run(2.0)
    assert view(talk, "b")
    talk.run(1.5)
    assert view(talk, "b") == {}
    assert talk.changes("b") == [Removed("load", "a", b"w")]
    assert view(talk, "a") == {("a", b"w"): b"1"}, "the owner's own stay"


def test_entries_go_at_once_when_their_owner_dies_and_return_if_it_did_not() -> None:
    talk = Talk([LOAD])
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(0.1)
    talk["b"].owner_died("a", 1, talk.now)
    assert view(talk, "b") == {}
    talk.run(1.2)
    assert view(talk, "b") == {("a", b"w"): b"1"}


def test_a_removed_entry_is_gone_at_once_and_leaves_nothing_behind() -> None:
    talk = Talk([LOAD])
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(0.1)
    talk["a"].remove("load", b"w", talk.now)
    talk.run(0.1)
    assert view(talk, "b") == {}
    talk.run(10.0)
    assert talk["a"].stats()["load.bytes"] == talk["b"].stats()["load.bytes"] == 0


def test_with_nothing_to_say_nothing_is_said() -> None:
    talk = Talk([LOAD])
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(0.1)
    talk["a"].remove("load", b"w", talk.now)
    talk.run(20.0)
    assert {frame.type for frame in talk.run(60.0)} == {FrameType.VECTOR}


def test_entries_of_a_former_life_go_with_it() -> None:
    talk = Talk([LOAD])
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(0.1)
    talk.restart("a")
    talk.settle()
    assert view(talk, "b") == {}


def test_relays_do_not_prolong_a_life() -> None:
    talk = Talk([LOAD], "abcd", is_connected=False, is_relay=True)
    talk.connect("a", "b")
    talk.settle()
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(0.1)
    talk.cut("a", "b")
    talk.run(2.0)
    talk.connect("b", "c")
    talk.run(0.5)
    talk.cut("b", "c")
    talk.connect("c", "d")
    talk.run(0.1)
    assert view(talk, "d") == {("a", b"w"): b"1"}
    talk.run(0.9)
    assert view(talk, "b") == view(talk, "c") == view(talk, "d") == {}


def test_over_the_cap_what_would_expire_first_is_dropped() -> None:
    talk = Talk([Ephemeral(name="load", bytes_max=4000, coalesce_s=0.0, ttl_s=3.0, refresh_s=100.0)], "abc")
    for name in "ab":
        for number in range(12):
            talk[name].put("load", b"%d" % number, bytes(20), talk.now)
        talk.settle()
        talk.run(0.5)
    assert talk["c"].stats()["load.bytes"] <= 4000
    held = [owner for owner, _ in view(talk, "c")]
    assert held.count("b") == 12 and 0 < held.count("a") < 12
    assert talk["c"].stats()["dropped_entries"] > 0


def test_own_entries_alone_over_the_cap_are_an_error() -> None:
    talk = Talk([Ephemeral(name="load", bytes_max=2000)])
    with pytest.raises(BoundError):
        for number in range(100):
            talk["a"].put("load", b"%d" % number, b"v", talk.now)
    assert talk["a"].stats()["load.bytes"] <= 2000


def test_sixteen_workers_cost_about_what_was_planned() -> None:
    talk = Talk([LOAD])
    for number in range(16):
        talk["a"].put("load", bytes((number,)), b"\x05\x10\x20", talk.now)
    frames = talk.run(0.06)
    assert len(frames) == 1
    assert len(frames[0].body) <= 240
