"""Owned maps: entries survive crashes, follow restarts, go with leavers; gaps and divergence are repaired."""

from __future__ import annotations

import msgspec
import pytest

from mesh.errors import BoundError, DecodeError
from mesh.frames import FrameType
from mesh.namespace import Owned, Put, Removed
from mesh.owned import Owned as OwnedStore
from mesh.records import Delta, decode_body, encode_body
from tests.mesh.replica_talk import Talk

REG = Owned(name="reg")
SHORT = Owned(name="reg", tombstone_s=16.0)


def store(talk: Talk, name: str) -> OwnedStore:
    found = talk[name]._stores["reg"]
    assert isinstance(found, OwnedStore)
    return found


def view(talk: Talk, name: str, owner: str | None = None) -> dict[tuple[str, bytes], bytes]:
    return {(o, k): v for o, k, v in talk[name].items("reg", owner)}


def test_two_owners_of_one_key_stand_side_by_side() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk["b"].put("reg", b"w", b"2", talk.now)
    talk.settle()
    assert view(talk, "a") == view(talk, "b") == {("a", b"w"): b"1", ("b", b"w"): b"2"}
    assert talk["a"].get("reg", b"w") == b"1"
    assert talk["a"].get("reg", b"w", "b") == b"2"


def test_puts_removes_and_overwrites_are_told_once() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    talk["a"].put("reg", b"w", b"2", talk.now)
    talk.settle()
    talk["a"].remove("reg", b"w", talk.now)
    talk["a"].remove("reg", b"never there", talk.now)
    talk.settle()
    assert talk.changes("b") == [
        Put("reg", "a", b"w", b"1"),
        Put("reg", "a", b"w", b"2"),
        Removed("reg", "a", b"w"),
    ]


def test_a_put_may_be_sent_at_once() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"w", b"1", talk.now)
    assert talk["a"].deadline() <= talk.now


def test_entries_survive_the_crash_of_their_owner_also_for_newcomers() -> None:
    talk = Talk([REG], "abc")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    for other in "bc":
        talk.cut("a", other)
        talk[other].owner_died("a", 1, talk.now)
    talk.restart("c")
    talk.settle()
    assert view(talk, "c") == {("a", b"w"): b"1"}


def test_entries_go_when_their_owner_leaves_and_an_ignorant_peer_cannot_bring_them_back() -> None:
    talk = Talk([REG], "abc")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    talk.cut("b", "c")
    talk.cut("a", "b")
    talk.cut("a", "c")
    talk["b"].owner_left("a", 1, talk.now)
    talk.settle()
    assert talk.changes("b")[-1] == Removed("reg", "a", b"w")
    talk.connect("b", "c")
    talk.run(60.0)
    assert view(talk, "b") == {}
    assert view(talk, "c") == {("a", b"w"): b"1"}, "c has not heard of it yet"
    talk["c"].owner_left("a", 1, talk.now)
    assert view(talk, "c") == {}


def test_leaving_deletes_what_the_node_has_said() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    talk["a"].leave(talk.now)
    talk.settle()
    assert view(talk, "b") == {}


def test_one_who_left_and_came_back_is_welcome() -> None:
    talk = Talk([REG])
    talk["b"].owner_left("a", 1, talk.now)
    talk.restart("a")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    assert view(talk, "b") == {("a", b"w"): b"1"}


def test_a_restart_that_lists_the_same_causes_no_change() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"same", b"1", talk.now)
    talk["a"].put("reg", b"other", b"1", talk.now)
    talk["a"].put("reg", b"gone", b"1", talk.now)
    talk.settle()
    talk.changes("b")
    talk.restart("a")
    talk.settle()
    talk.now += 1.0
    assert len(view(talk, "b")) == 3, "the former life stands for the grace"
    talk["a"].put("reg", b"same", b"1", talk.now)
    talk["a"].put("reg", b"other", b"2", talk.now)
    talk.settle()
    assert talk.changes("b") == [Put("reg", "a", b"other", b"2")]
    talk.run(3.0)
    assert talk.changes("b") == [Removed("reg", "a", b"gone")]
    assert talk.is_equal()


def test_a_silent_restart_ends_the_former_life_after_the_grace() -> None:
    talk = Talk([REG], "abc")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    talk["b"].owner_restarted("a", 2, talk.now)
    talk.run(1.9)
    assert view(talk, "b", "a")
    talk.run(0.2)
    assert not view(talk, "b", "a")


def test_a_restart_in_the_grace_of_a_restart_keeps_what_was_listed_before_both() -> None:
    talk = Talk([REG])
    for key in (b"x", b"y"):
        talk["a"].put("reg", key, b"1", talk.now)
    talk.settle()
    talk.restart("a")
    talk["a"].put("reg", b"x", b"2", talk.now)
    talk.settle()
    talk.restart("a")
    talk.settle()
    assert view(talk, "b", "a") == {("a", b"x"): b"2", ("a", b"y"): b"1"}
    assert store(talk, "b").bytes == sum(s.bytes for _, s in store(talk, "b")._shadows.values())
    talk.run(3.0)
    assert store(talk, "b").bytes == 0


def test_a_restart_with_a_clock_far_behind_outranks_its_former_life() -> None:
    talk = Talk([REG])
    talk.restart("a", life=77)
    talk["a"].put("reg", b"old", b"1", talk.now)
    talk.settle()
    talk.cut("a", "b")
    talk.lives["a"] = 5
    talk.replicas["a"] = talk.new("a")
    talk["a"].put("reg", b"new", b"1", talk.now)
    talk.connect("a", "b")
    talk.run(5.0)
    assert view(talk, "b") == view(talk, "a") == {("a", b"new"): b"1"}
    assert talk.is_equal()
    assert talk["a"].stats()["outranked_lives"] >= 1


def test_a_restart_with_a_clock_far_behind_that_lists_nothing_ends_its_former_life_all_the_same() -> None:
    talk = Talk([REG])
    talk.restart("a", life=77)
    talk["a"].put("reg", b"old", b"1", talk.now)
    talk.settle()
    talk.cut("a", "b")
    talk.lives["a"] = 5
    talk.replicas["a"] = talk.new("a")
    talk["a"].own_outranked(77, talk.now)
    talk.connect("a", "b")
    talk.run(5.0)
    assert view(talk, "b") == view(talk, "a") == {}
    assert talk.is_equal()


def test_a_life_born_in_the_far_future_is_refused() -> None:
    talk = Talk([REG])
    life = int(talk.now + 601) << 32
    frame = encode_body(Delta("reg", "z", life, 0, 1, 0, [[b"k", 1, b"v"]]))
    talk["a"].receive("b", frame, talk.now)
    assert view(talk, "a") == {}
    assert talk["a"].stats()["refused_lives"] == 1


def test_a_peer_older_than_forgotten_deletions_takes_the_whole_map() -> None:
    talk = Talk([SHORT])
    for key in (b"x", b"y"):
        talk["a"].put("reg", key, b"1", talk.now)
    talk.settle()
    talk.cut("a", "b")
    talk["a"].remove("reg", b"x", talk.now)
    talk.run(20.0)
    assert b"x" not in store(talk, "a").own.entries
    talk.changes("b")
    talk.connect("a", "b")
    talk.settle()
    assert view(talk, "b") == {("a", b"y"): b"1"}
    assert talk.changes("b") == [Removed("reg", "a", b"x")], "y was never away"


def test_a_third_node_with_old_entries_resurrects_nothing() -> None:
    talk = Talk([SHORT], "abc")
    talk["a"].put("reg", b"x", b"1", talk.now)
    talk.settle()
    talk.cut("a", "c")
    talk.cut("b", "c")
    talk["a"].remove("reg", b"x", talk.now)
    talk.run(20.0)
    talk.cut("a", "b")
    talk.connect("b", "c")
    talk.run(30.0)
    assert view(talk, "b") == view(talk, "c") == {}


def test_a_whole_map_of_many_frames_cut_short_is_started_again() -> None:
    talk = Talk([SHORT], is_connected=False)
    for number in range(400):
        talk["a"].put("reg", b"%d" % number, bytes(1000), talk.now)
    talk["a"].remove("reg", b"0", talk.now)
    talk.run(20.0)
    talk.connect("a", "b")
    talk["b"].tick(talk.now)
    for frame in talk["b"].frames_to_send("a", talk.now):
        talk["a"].receive("b", frame, talk.now)
    first = next(f for f in talk["a"].frames_to_send("b", talk.now, bytes_max=1) if f.type == FrameType.DELTA)
    talk["b"].receive("a", first, talk.now)
    assert 0 < len(view(talk, "b")) < 399
    talk.cut("a", "b")
    talk.connect("a", "b")
    talk.settle()
    assert view(talk, "b") == view(talk, "a")
    assert talk.is_equal()


def test_a_delta_that_leaves_a_hole_is_not_applied_but_asked_for() -> None:
    talk = Talk([REG])
    for key in (b"1", b"2"):
        talk["a"].put("reg", key, b"v", talk.now)
        talk["a"].tick(talk.now)
        lost = talk["a"].frames_to_send("b", talk.now)
    (delta,) = (decode_body(frame) for frame in lost)
    assert isinstance(delta, Delta) and delta.since == 1
    talk["b"].receive("a", lost[0], talk.now)
    assert view(talk, "b") == {}
    talk.now += 3.0
    talk.settle()
    assert view(talk, "b") == {("a", b"1"): b"v", ("a", b"2"): b"v"}
    talk["a"].put("reg", b"3", b"v", talk.now)
    talk["a"].tick(talk.now)
    talk["a"].frames_to_send("b", talk.now)  # lost
    talk["a"].put("reg", b"4", b"v", talk.now)
    frames = talk.settle()
    assert [frame.type for frame in frames] == [FrameType.DELTA, FrameType.WANT, FrameType.DELTA]
    assert view(talk, "b") == view(talk, "a")


def test_silent_divergence_is_repaired_from_the_owner() -> None:
    talk = Talk([REG])
    for key in (b"1", b"2", b"3"):
        talk["a"].put("reg", key, b"v", talk.now)
    talk.settle()
    log = store(talk, "b").logs[("a", 1)]
    store(talk, "b").bytes -= log.drop(b"2")
    assert not talk.is_equal()
    talk.changes("b")
    talk.run(60.0)
    assert talk.is_equal()
    assert talk.changes("b") == [Put("reg", "a", b"2", b"v")]
    assert talk["b"].stats()["diverged_sources"] >= 1


def test_a_poisoned_version_is_repaired_from_the_owner() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"1", b"v", talk.now)
    talk.settle()
    forged = encode_body(Delta("reg", "a", 1, 1, 2**63, 0, [[b"2", 2**63, b"forged"]]))
    talk["b"].receive("a", forged, talk.now)
    assert ("a", b"2") in view(talk, "b")
    talk.run(60.0)
    assert view(talk, "b") == {("a", b"1"): b"v"}
    talk["a"].put("reg", b"3", b"v", talk.now)
    talk.settle()
    assert ("a", b"3") in view(talk, "b")


def test_entries_beyond_the_cap_are_refused_and_fetched_when_there_is_room() -> None:
    talk = Talk([Owned(name="reg", bytes_max=6000)], "abc", is_connected=False)
    talk.connect("a", "c")
    talk.connect("b", "c")
    for name in "ab":
        for number in range(10):
            talk[name].put("reg", b"%d" % number, bytes(200), talk.now)
        talk.settle()
    assert talk["c"].stats()["reg.bytes"] <= 6000
    assert talk["c"].stats()["refused_entries"] > 0
    with pytest.raises(BoundError):
        talk["c"].put("reg", b"x", bytes(200), talk.now)
    for number in range(10):
        talk["a"].remove("reg", b"%d" % number, talk.now)
    talk.run(60.0)
    assert talk["c"].stats()["reg.bytes"] <= 6000
    assert view(talk, "c", "b") == view(talk, "b", "b")


def test_more_owners_than_the_bound_are_refused() -> None:
    from mesh.replica import ReplicaSettings

    talk = Talk([REG], settings=ReplicaSettings(owners_max=5))
    for number in range(20):
        frame = encode_body(Delta("reg", f"o{number}", 1, 0, 1, 0, [[b"k", 1, b"v"]]))
        talk["a"].receive("b", frame, talk.now)
    assert len(view(talk, "a")) == 5
    assert talk["a"].stats()["refused_owners"] == 15


def test_a_relay_passes_on_and_loops_end() -> None:
    talk = Talk([REG], "abcd", is_connected=False, is_relay=True)
    for pair in ("ab", "bc", "cd", "da"):
        talk.connect(*pair)
    talk.settle()
    talk.log.clear()
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    assert talk.is_equal()
    deltas = [(s, t) for s, t, frame in talk.log if frame.type == FrameType.DELTA]
    assert len(deltas) <= 8, "each pair at most once in each direction"


def test_without_relaying_only_own_entries_go_out() -> None:
    talk = Talk([REG], "abc", is_connected=False)
    talk.connect("a", "b")
    talk.connect("b", "c")
    talk.settle()
    talk.log.clear()
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    assert [(s, t) for s, t, _ in talk.log] == [("a", "b")]
    talk.run(60.0)
    assert talk.is_equal(), "but vectors bring it in the end"


def test_a_forgotten_name_is_not_brought_back_by_who_forgets_later() -> None:
    talk = Talk([REG], "abc")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    talk.cut("a", "b")
    talk.cut("a", "c")
    talk["b"].owner_forgotten("a", talk.now)
    talk.run(30.0)
    talk["c"].owner_forgotten("a", talk.now)
    talk.run(30.0)
    assert view(talk, "b") == view(talk, "c") == {}


def test_elements_of_a_later_version_survive_forwarding_up_to_a_bound() -> None:
    talk = Talk([REG], "abc", is_connected=False, is_relay=True)
    talk.connect("a", "b")
    talk.connect("b", "c")
    talk.settle()
    entries = [[b"k", 1, b"v", "new"], [b"l", 2, b"v", bytes(2000)]]
    talk["b"].receive("a", encode_body(Delta("reg", "a", 1, 0, 2, 0, entries)), talk.now)
    talk.settle()
    log = store(talk, "c").logs[("a", 1)]
    assert log.entries[b"k"].tail == msgspec.msgpack.encode(["new"])
    assert log.entries[b"l"].tail == b""


def test_deletions_do_not_fill_a_map_for_long() -> None:
    talk = Talk([Owned(name="reg", bytes_max=6000)])
    for number in range(500):
        talk["a"].put("reg", b"%d" % number, bytes(50), talk.now)
        talk.settle()
        talk["a"].remove("reg", b"%d" % number, talk.now)
        talk.settle()
        assert talk["a"].stats()["reg.bytes"] <= 6000
        assert talk["b"].stats()["reg.bytes"] <= 6000
    assert view(talk, "a") == view(talk, "b") == {}
    talk["a"].put("reg", b"last", b"v", talk.now)
    talk.settle()
    assert view(talk, "b") == {("a", b"last"): b"v"}


def test_deletions_of_a_peer_are_bounded_too() -> None:
    talk = Talk([Owned(name="reg", bytes_max=6000)])
    entries = [[b"%d" % n, n + 1, None] for n in range(1000)]
    talk["a"].receive("b", encode_body(Delta("reg", "b", 1, 0, 1000, 0, entries)), talk.now)
    assert talk["a"].stats()["reg.bytes"] <= 6000


def test_tails_count_as_bytes_and_frames_of_them_stay_below_the_cap() -> None:
    talk = Talk([Owned(name="reg", bytes_max=2 << 20)], "abc", is_connected=False, is_relay=True)
    talk.connect("a", "b")
    talk.connect("b", "c")
    talk.settle()
    for first in range(0, 4000, 500):
        entries = [[b"%d" % n, n + 1, b"", [[]] * 1000] for n in range(first, first + 500)]
        frame = encode_body(Delta("reg", "a", 1, first, first + 500, 0, entries))
        talk["b"].receive("a", frame, talk.now)
        sizes = [len(frame.body) for frame in talk.settle()]
        assert talk["b"].stats()["reg.bytes"] <= 2 << 20
        assert not sizes or max(sizes) < 1 << 20
        assert first or len(sizes) > 3
    assert len(store(talk, "b").logs[("a", 1)].entries) < 2000


def test_an_owner_with_too_long_a_name_is_refused() -> None:
    talk = Talk([REG])
    talk["a"].receive(
        "b", encode_body(Delta("reg", "\U0001f600" * 33, 1, 0, 1, 0, [[b"k", 1, b"v"]])), talk.now
    )
    assert view(talk, "a") == {}
    assert talk["a"].stats()["refused_owners"] == 1


def test_questions_that_hostile_vectors_raise_are_bounded() -> None:
    from mesh.digest import Row
    from mesh.records import Vector

    talk = Talk([REG])
    for part in range(4):
        rows = tuple(Row(f"{part}/{n}", 1, 5, 0) for n in range(3000))
        talk["a"].receive("b", encode_body(Vector("reg", 2, 0, rows)), talk.now)
    assert len(talk["a"]._home.links["b"]["reg"].wants) <= 4096


def test_malformed_deltas_change_nothing() -> None:
    talk = Talk([REG])
    good = [b"good", 1, b"v"]
    for upto, bad in (
        (2, [b"k"]),
        (2, [b"k", 2]),
        (2, [b"", 2, b"v"]),
        (2, [b"k", 1, b"v"]),
        (2, [b"k", 3, b"v"]),
        (2, [b"k", 2, "text"]),
        (2, "no array"),
        (2, [b"k", True, b"v"]),
        (2, [b"k", 2, bytes(65537)]),
    ):
        with pytest.raises(DecodeError):
            talk["a"].receive("b", encode_body(Delta("reg", "b", 1, 0, upto, 0, [good, bad])), talk.now)
    with pytest.raises(DecodeError):
        talk["a"].receive("b", encode_body(Delta("reg", "b", 1, 5, 2, 0, [])), talk.now)
    assert view(talk, "a") == {}


def test_nobody_can_write_our_own_map() -> None:
    talk = Talk([REG])
    talk["a"].put("reg", b"w", b"mine", talk.now)
    talk.settle()
    talk["a"].receive("b", encode_body(Delta("reg", "a", 1, 1, 2, 0, [[b"w", 2, b"forged"]])), talk.now)
    assert view(talk, "a") == {("a", b"w"): b"mine"}


def test_a_hundred_changes_for_a_slow_peer_are_one_frame_of_the_newest() -> None:
    talk = Talk([REG])
    for number in range(100):
        talk["a"].put("reg", b"w", b"%d" % number, talk.now)
        talk["a"].tick(talk.now)
    assert len(talk.settle()) == 1
    assert talk.changes("b") == [Put("reg", "a", b"w", b"99")]


def test_who_took_a_whole_map_makes_older_peers_take_it_too() -> None:
    talk = Talk([SHORT], "abc")
    for key in (b"x", b"y"):
        talk["a"].put("reg", key, b"1", talk.now)
    talk.settle()
    for pair in ("ab", "ac", "bc"):
        talk.cut(*pair)
    talk["a"].remove("reg", b"x", talk.now)
    talk.run(20.0)
    talk.connect("a", "b")
    talk.settle()
    talk.cut("a", "b")
    talk.connect("b", "c")
    talk.settle()
    assert view(talk, "c") == {("a", b"y"): b"1"}


def test_a_map_that_did_not_fit_is_not_passed_on_as_whole() -> None:
    talk = Talk([Owned(name="reg", bytes_max=6000)], "abcd", is_connected=False, is_relay=True)
    talk.connect("a", "c")
    talk.connect("b", "c")
    for name in "ab":
        for number in range(10):
            talk[name].put("reg", b"%d" % number, bytes(200), talk.now)
    talk.settle()
    (refused,) = (log.owner for log in store(talk, "c").logs.values() if log.is_truncated)
    talk.connect("c", "d")
    talk.run(30.0)
    assert view(talk, "d", refused) == {}
    assert len(view(talk, "d")) == 10


def test_a_relay_does_not_say_to_a_peer_what_it_heard_from_it() -> None:
    talk = Talk([REG], "abc", is_connected=False, is_relay=True)
    talk.connect("a", "b")
    talk.connect("b", "c")
    talk.settle()
    talk.log.clear()
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk.settle()
    assert [(s, t) for s, t, _ in talk.log] == [("a", "b"), ("b", "c")]
