"""Last writer wins: convergence, deletions that stay deleted, bounds."""

from __future__ import annotations

import msgspec
import pytest

from mesh.digest import Row
from mesh.errors import BoundError, DecodeError
from mesh.frames import FrameType
from mesh.lww import BUCKETS, LwwMap
from mesh.namespace import Lww, Put, Removed
from mesh.records import Delta, Sums, Vector, encode_body
from mesh.stamp import Stamp, time_of
from tests.mesh.replica_talk import Talk

CONF = Lww(name="conf")
SHORT = Lww(name="conf", tombstone_s=60.0)


def store(talk: Talk, name: str) -> LwwMap:
    found = talk[name]._stores["conf"]
    assert isinstance(found, LwwMap)
    return found


def entry(key: bytes, value: bytes | None, stamp: Stamp, *tail: object) -> Delta:
    return Delta("conf", "", 0, 0, 0, 0, [[key, value, stamp.time, stamp.node, *tail]])


def test_a_write_is_told_to_the_others_at_once_and_not_to_the_writer() -> None:
    talk = Talk([CONF], "abc")
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk.settle()
    assert talk.changes("b") == talk.changes("c") == [Put("conf", "a", b"k", b"v")]
    assert talk.changes("a") == []
    assert talk.is_equal()


def test_the_later_write_wins_on_both_sides_of_a_cut() -> None:
    talk = Talk([CONF])
    talk.cut("a", "b")
    talk["a"].put("conf", b"k", b"early", talk.now)
    talk.now += 1.0
    talk["b"].put("conf", b"k", b"late", talk.now)
    talk.connect("a", "b")
    talk.settle()
    assert talk["a"].get("conf", b"k") == talk["b"].get("conf", b"k") == b"late"


def test_a_write_after_a_seen_one_wins_even_if_the_clock_is_behind() -> None:
    talk = Talk([CONF])
    talk["a"].set_wall_offset(300.0)
    talk["a"].put("conf", b"k", b"a", talk.now)
    talk.settle()
    talk["b"].put("conf", b"k", b"b", talk.now)
    talk.settle()
    assert talk["a"].get("conf", b"k") == b"b"


def test_a_deletion_wins_over_the_write_it_saw_and_is_told() -> None:
    talk = Talk([CONF])
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk.settle()
    talk["b"].remove("conf", b"k", talk.now)
    talk.settle()
    assert talk["a"].get("conf", b"k") is None
    assert talk.changes("a") == [Removed("conf", "b", b"k")]


def test_deleting_an_unknown_key_beats_a_write_not_heard_of_yet() -> None:
    talk = Talk([CONF])
    talk.cut("a", "b")
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk.now += 1.0
    talk["b"].remove("conf", b"k", talk.now)
    talk.connect("a", "b")
    talk.settle()
    assert talk["a"].get("conf", b"k") is None
    assert talk.changes("b") == []


def test_a_stamp_far_ahead_is_refused_and_counted() -> None:
    talk = Talk([CONF])
    future = Stamp(time_of(talk.now + 601.0), "b")
    talk["a"].receive("b", encode_body(entry(b"k", b"v", future)), talk.now)
    assert talk["a"].get("conf", b"k") is None
    assert talk["a"].stats()["refused_stamps"] == 1


def test_deletions_are_forgotten_together_and_nothing_is_said_about_it() -> None:
    talk = Talk([SHORT], "abc")
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk["a"].remove("conf", b"k", talk.now)
    talk.settle()
    assert all(talk[name].stats()["conf.deletions"] == 1 for name in "abc")
    talk.run(62.0)
    assert all(talk[name].stats()["conf.deletions"] == 0 for name in "abc")
    assert all(store(talk, name).watermark.wall_s >= 1000.0 for name in "abc")
    frames = talk.run(60.0)
    assert {frame.type for frame in frames} == {FrameType.VECTOR}


def zombie() -> Talk:
    """c was cut off while k was deleted, and the deletion has been forgotten since."""
    talk = Talk([SHORT], "abc")
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk["a"].put("conf", b"stays", b"v", talk.now)
    talk.settle()
    talk.cut("a", "c")
    talk.cut("b", "c")
    talk["a"].remove("conf", b"k", talk.now)
    talk.run(100.0)
    assert talk["a"].stats()["conf.deletions"] == 0
    return talk


def test_a_node_older_than_the_forgotten_deletion_resurrects_nothing() -> None:
    talk = zombie()
    talk.connect("c", "a")
    talk.connect("c", "b")
    talk.run(30.0)
    for name in "abc":
        assert talk[name].get("conf", b"k") is None
        assert talk[name].get("conf", b"stays") == b"v"
    assert talk.is_equal()


def test_a_newcomer_that_meets_the_old_node_first_does_not_keep_what_it_brings() -> None:
    talk = zombie()
    talk.restart("b")
    talk.settle()
    talk.cut("a", "b")
    talk.connect("b", "c")
    talk.run(30.0)
    assert talk["b"].get("conf", b"k") is None, "b took over a's watermark with its content"
    talk.connect("a", "b")
    talk.connect("a", "c")
    talk.run(30.0)
    assert talk["a"].get("conf", b"k") is None
    assert talk.is_equal()


def test_a_new_write_to_a_forgotten_key_lives() -> None:
    talk = zombie()
    talk["a"].put("conf", b"k", b"again", talk.now)
    talk.connect("c", "a")
    talk.run(30.0)
    assert talk["c"].get("conf", b"k") == talk["b"].get("conf", b"k") == b"again"


def test_a_full_namespace_refuses_writes_but_not_deletions() -> None:
    talk = Talk([Lww(name="conf", bytes_max=4000)])
    written = 0
    with pytest.raises(BoundError):
        while True:
            talk["a"].put("conf", b"%d" % written, bytes(100), talk.now)
            written += 1
    before = talk["a"].digest()
    with pytest.raises(BoundError):
        talk["a"].put("conf", b"more", bytes(100), talk.now)
    assert talk["a"].digest() == before
    talk["a"].remove("conf", b"0", talk.now)
    talk["a"].put("conf", b"0", b"", talk.now)
    assert talk["a"].stats()["conf.bytes"] <= 4000


def test_old_deletions_make_room_before_anything_is_refused() -> None:
    talk = Talk([Lww(name="conf", bytes_max=4000)])
    for number in range(1000):
        talk["a"].remove("conf", b"%d" % number, talk.now)
        talk.now += 0.001
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk.settle()
    assert talk["a"].stats()["conf.bytes"] <= 4000
    assert talk["b"].stats()["conf.bytes"] <= 8000
    assert talk["b"].get("conf", b"k") == b"v"


def test_what_peers_write_is_taken_up_to_twice_the_cap() -> None:
    talk = Talk([Lww(name="conf", bytes_max=4000)])
    for number in range(200):
        stamp = Stamp(time_of(talk.now) + number, "b")
        talk["a"].receive("b", encode_body(entry(b"%d" % number, bytes(100), stamp)), talk.now)
    assert 4000 < talk["a"].stats()["conf.bytes"] <= 8000
    assert talk["a"].stats()["refused_entries"] > 0


def test_deletions_of_unknown_keys_are_bounded_too() -> None:
    talk = Talk([Lww(name="conf", bytes_max=4000)])
    for number in range(12):
        talk["a"].put("conf", b"live %d" % number, bytes(60), talk.now)
    for number in range(100):
        try:
            talk["a"].remove("conf", b"%d" % number, talk.now)
        except BoundError:
            pass
        assert talk["a"].stats()["conf.bytes"] <= 4000
    assert talk["a"].stats()["conf.entries"] == 12


def test_a_full_peer_still_deletes() -> None:
    talk = Talk([Lww(name="conf", bytes_max=4000)])
    for number in range(200):
        stamp = Stamp(time_of(talk.now) + number, "b")
        talk["a"].receive("b", encode_body(entry(b"%d" % number, bytes(100), stamp)), talk.now)
    assert talk["a"].stats()["conf.bytes"] > 4000
    talk["a"].remove("conf", b"0", talk.now)
    assert talk["a"].get("conf", b"0") is None


def test_keys_and_values_of_wrong_size_are_refused() -> None:
    talk = Talk([CONF])
    for key, value in ((b"", b"v"), (bytes(513), b"v"), (b"k", bytes(64 * 1024 + 1))):
        with pytest.raises(BoundError):
            talk["a"].put("conf", key, value, talk.now)


def test_elements_of_a_later_version_survive_forwarding() -> None:
    talk = Talk([CONF], "abc", is_connected=False, is_relay=True)
    talk.connect("b", "c")
    talk.connect("a", "b")
    talk.settle()
    stamp = Stamp(time_of(talk.now), "a")
    talk["b"].receive("a", encode_body(entry(b"k", b"v", stamp, "new", [1, 2])), talk.now)
    talk.settle()
    assert store(talk, "c").entries[b"k"].tail == msgspec.msgpack.encode(["new", [1, 2]])


def test_a_relay_does_not_echo_to_where_it_heard_from() -> None:
    talk = Talk([CONF], "abc", is_connected=False, is_relay=True)
    talk.connect("a", "b")
    talk.connect("b", "c")
    talk.settle()
    talk.log.clear()
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk.settle()
    assert [(source, target) for source, target, _ in talk.log] == [("a", "b"), ("b", "c")]


def test_silent_divergence_is_found_by_the_sums_and_only_that_bucket_travels() -> None:
    talk = Talk([CONF])
    for number in range(500):
        talk["a"].put("conf", b"key %d" % number, b"v", talk.now)
    talk.settle()
    broken = store(talk, "b")
    broken._drop(b"key 7")
    assert not talk.is_equal()
    talk.log.clear()
    talk.run(60.0)
    assert talk.is_equal()
    carried = [len(frame.body) for _, _, frame in talk.log if frame.type == FrameType.DELTA]
    assert sum(carried) < 2 * 2 * 500 / BUCKETS * 60


def test_a_key_written_twice_for_a_slow_peer_is_sent_once_and_newest() -> None:
    talk = Talk([CONF])
    for number in range(100):
        talk["a"].put("conf", b"k", b"%d" % number, talk.now)
        talk["a"].tick(talk.now)  # b's stream is full: nobody asks for its frames
    frames = talk.settle()
    assert len(frames) == 1
    assert talk.changes("b") == [Put("conf", "a", b"k", b"99")]


def test_malformed_entries_change_nothing() -> None:
    talk = Talk([CONF])
    good = [b"good", b"v", time_of(talk.now), "b"]
    for bad in (
        [],
        [b"k", b"v", 1],
        [b"", b"v", 1, "b"],
        [b"k", 5, 1, "b"],
        [b"k", b"v", -1, "b"],
        [b"k", b"v", 1, b"b"],
    ):
        with pytest.raises(DecodeError):
            talk["a"].receive("b", encode_body(Delta("conf", "", 0, 0, 0, 0, [good, bad])), talk.now)
    with pytest.raises(DecodeError):
        talk["a"].receive("b", encode_body(Sums("conf", (1, 2))), talk.now)
    assert talk["a"].get("conf", b"good") is None


def test_a_watermark_of_the_far_future_is_not_taken_over() -> None:
    talk = Talk([CONF])
    row = Row("b", (1 << 63) - 1, 0, 0)
    talk["a"].receive("b", encode_body(Vector("conf", 1, 0, (row,))), talk.now)
    talk["a"].put("conf", b"k", b"v", talk.now)
    talk.settle()
    talk["b"].put("conf", b"k2", b"v", talk.now)
    talk.settle()
    assert talk["a"].get("conf", b"k2") == b"v"
