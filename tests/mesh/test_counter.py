"""Counters: exact sums of shards, windows that end, restarts that lose nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.counter import shard_bytes, shard_value
from mesh.errors import BoundError
from mesh.namespace import Counted, Counter
from mesh.records import Delta, encode_body
from tests.mesh.replica_talk import Talk

HITS = Counter(name="hits", coalesce_s=0.1)
WINDOWS = Counter(name="hits", coalesce_s=0.1, window_s=1.0, windows_kept=2)


def totals(talk: Talk, key: bytes = b"k") -> list[int]:
    return [replica.total("hits", key, talk.now) for replica in talk.replicas.values()]


@given(st.integers(-(2**126), 2**126))
def test_shards_are_bytes_and_back(value: int) -> None:
    assert shard_value(shard_bytes(value)) == value
    assert len(shard_bytes(value)) <= 16


def test_the_sum_is_that_of_all_nodes_and_amounts_may_be_taken_back() -> None:
    talk = Talk([HITS], "abc")
    for name, amount in (("a", 5), ("b", 7), ("c", 1), ("a", -2)):
        talk[name].add("hits", b"k", amount, talk.now)
    assert totals(talk) == [3, 7, 1], "own amounts count at once"
    talk.run(0.2)
    assert totals(talk) == [11, 11, 11]
    assert talk.is_equal()


def test_add_returns_the_sum_and_others_are_told() -> None:
    talk = Talk([HITS])
    assert talk["a"].add("hits", b"k", 5, talk.now) == 5
    talk.run(0.2)
    assert talk["b"].add("hits", b"k", 2, talk.now) == 7
    assert talk.changes("b") == [Counted("hits", b"k", 0, 5)]


def test_a_burst_is_one_frame() -> None:
    talk = Talk([HITS])
    for _ in range(1000):
        talk["a"].add("hits", b"k", 1, talk.now)
    assert len(talk.run(0.2)) == 1
    assert totals(talk) == [1000, 1000]


def test_what_a_node_counted_before_it_crashed_still_counts() -> None:
    talk = Talk([HITS], "abc")
    talk["a"].add("hits", b"k", 5, talk.now)
    talk.run(0.2)
    talk.restart("a")
    talk["a"].add("hits", b"k", 10, talk.now)
    talk.run(0.2)
    assert totals(talk) == [15, 15, 15], "the new life learns its own former shard"
    for other in "bc":
        talk[other].owner_left("a", 2, talk.now)
    assert totals(talk)[1:] == [15, 15]


def test_windows_are_counted_apart_and_end() -> None:
    talk = Talk([WINDOWS])
    first = talk["a"].window("hits", talk.now)
    assert first == 1000
    talk["a"].add("hits", b"k", 5, talk.now)
    talk.run(1.0)
    talk["b"].add("hits", b"k", 7, talk.now)
    talk.run(0.5)
    assert totals(talk) == [7, 7]
    assert talk["b"].total("hits", b"k", talk.now, first) == 5
    talk.run(5.0)
    assert talk["b"].total("hits", b"k", talk.now, first) == 0
    assert talk["a"].stats()["hits.bytes"] == talk["b"].stats()["hits.bytes"] == 0
    assert list(talk["a"].totals("hits")) == []


def test_a_late_peer_does_not_bring_ended_windows_back() -> None:
    talk = Talk([WINDOWS], "abc")
    talk["a"].add("hits", b"k", 5, talk.now)
    talk.run(0.2)
    talk.cut("b", "c")
    talk.cut("a", "c")
    talk["c"].set_wall_offset(-3.0)
    talk.run(3.5)
    talk.connect("b", "c")
    talk.settle()
    assert talk["b"].stats()["hits.bytes"] == 0


def test_shards_of_windows_far_ahead_are_not_kept() -> None:
    talk = Talk([WINDOWS])
    key = (10**9).to_bytes(8, "big") + b"k"
    frame = encode_body(Delta("hits", "b", 1, 0, 1, 0, [[key, 1, b"\5"]]))
    talk["a"].receive("b", frame, talk.now)
    assert talk["a"].stats()["hits.bytes"] == 0


def test_shards_that_are_no_numbers_are_not_kept() -> None:
    talk = Talk([HITS])
    for key, value in ((b"short", b"\5"), (bytes(8) + b"k", bytes(17)), (b"\1" + bytes(7) + b"k", b"\5")):
        talk["a"].receive("b", encode_body(Delta("hits", "b", 1, 0, 1, 0, [[key, 1, value]])), talk.now)
    assert talk["a"].stats()["hits.bytes"] == 0


def test_a_full_namespace_drops_the_oldest_windows_first() -> None:
    talk = Talk([Counter(name="hits", window_s=1.0, windows_kept=100, bytes_max=3000)])
    for _ in range(60):
        talk["a"].add("hits", b"k", 1, talk.now)
        talk.run(1.0)
    for replica in talk.replicas.values():
        assert replica.stats()["hits.bytes"] <= 3000
        assert replica.stats()["dropped_entries"] > 0
    assert talk["b"].total("hits", b"k", talk.now, 1059) == 1


def test_one_window_that_is_full_is_an_error() -> None:
    talk = Talk([Counter(name="hits", bytes_max=2000)])
    with pytest.raises(BoundError):
        for number in range(100):
            talk["a"].add("hits", b"%d" % number, 1, talk.now)
    with pytest.raises(BoundError):
        talk["b"].add("hits", bytes(505), 1, talk.now)
    with pytest.raises(BoundError):
        talk["b"].add("hits", b"k", 1 << 128, talk.now)


def test_a_changed_counter_costs_about_what_was_planned() -> None:
    talk = Talk([HITS])
    for number in range(10):
        talk["a"].add("hits", b"tenant%d" % number, 1000, talk.now)
    (frame,) = talk.run(0.2)
    assert len(frame.body) <= 10 * 24 + 40
