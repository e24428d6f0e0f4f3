"""Delta streams: order, rings, gaps, snapshots, fingerprints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import pytest

from mesh.delta_streams import DeltaStreams
from mesh.errors import BoundError, DecodeError
from mesh.frames import FrameType
from mesh.namespace import Appended, Change, Ended, Lost, Restarted, Restored, Stream
from mesh.records import Delta, Snap, SnapWant, decode_body, encode_body
from mesh.replica import ReplicaSettings
from tests.mesh.replica_talk import Talk
from tests.mesh.replica_world import Index

PREFIX = Stream(name="prefix", coalesce_s=0.1)


def payloads(talk: Talk, name: str, owner: str = "a") -> list[bytes]:
    return [c.payload for c in talk.changes(name) if isinstance(c, Appended) and c.owner == owner]


def store(talk: Talk, name: str) -> DeltaStreams:
    found = talk[name]._stores["prefix"]
    assert isinstance(found, DeltaStreams)
    return found


class Told(Talk):
    """Every node has an index of its own, fed by what it is told."""

    def __init__(self, names: str = "ab", ring_bytes: int = 600, **kwargs: bool) -> None:
        self.indexes: dict[str, Index] = {}
        self.ring_bytes = ring_bytes
        super().__init__([], names, settings=ReplicaSettings(anti_entropy_interval_s=2.0), **kwargs)

    def new(self, name: str):  # type: ignore[no-untyped-def]
        self.indexes[name] = Index()
        self.namespaces = [
            Stream(name="prefix", coalesce_s=0.1, ring_bytes_max=self.ring_bytes, source=self.indexes[name])
        ]
        return super().new(name)

    def take(self, name: str, change: Change) -> None:
        if isinstance(change, Appended):
            self.indexes[name].apply(change.owner, change.payload)
        elif isinstance(change, Restored):
            self.indexes[name].restore(change)
        elif isinstance(change, Restarted):
            self.indexes[name].known.pop(change.owner, None)

    def append(self, name: str, payload: bytes) -> None:
        self.indexes[name].apply(name, payload)
        self.replicas[name].append("prefix", payload, self.now)

    def kinds(self) -> set[int]:
        kinds = {frame.type for _, _, frame in self.log}
        self.log.clear()
        return kinds


def test_payloads_arrive_in_order_once_and_are_coalesced() -> None:
    talk = Talk([PREFIX], "abc")
    for number in range(100):
        assert talk["a"].append("prefix", b"%d" % number, talk.now) == number + 1
    frames = talk.run(0.2)
    assert [frame.type for frame in frames] == [FrameType.DELTA] * 2
    assert payloads(talk, "b") == payloads(talk, "c") == [b"%d" % n for n in range(100)]
    assert talk.is_equal()


def test_all_peers_get_the_same_bytes_encoded_once() -> None:
    talk = Talk([PREFIX], "abcd")
    talk["a"].append("prefix", b"x", talk.now)
    frames = talk.run(0.2)
    assert len(frames) == 3
    assert frames[0].body is frames[1].body is frames[2].body


def test_a_newcomer_gets_what_the_ring_holds() -> None:
    talk = Talk([PREFIX], is_connected=False)
    for number in range(10):
        talk["a"].append("prefix", b"%d" % number, talk.now)
    talk.connect("a", "b")
    talk.run(0.2)
    assert payloads(talk, "b") == [b"%d" % n for n in range(10)]


def test_a_gap_is_repaired_by_range() -> None:
    talk = Talk([PREFIX])
    talk["a"].append("prefix", b"1", talk.now)
    talk.run(0.2)
    talk["a"].append("prefix", b"2", talk.now)
    talk.now += 0.2
    talk["a"].tick(talk.now)
    assert talk["a"].frames_to_send("b", talk.now), "and it is lost"
    talk["a"].append("prefix", b"3", talk.now)
    frames = talk.run(0.2)
    assert [frame.type for frame in frames] == [FrameType.DELTA, FrameType.WANT, FrameType.DELTA]
    assert payloads(talk, "b") == [b"1", b"2", b"3"]


def test_the_last_delta_lost_is_found_by_the_vector() -> None:
    talk = Talk([PREFIX])
    talk["a"].append("prefix", b"1", talk.now)
    talk.now += 0.2
    talk["a"].tick(talk.now)
    talk["a"].frames_to_send("b", talk.now)
    talk.run(60.0)
    assert payloads(talk, "b") == [b"1"]


def test_a_slow_peer_skips_what_the_ring_has_dropped_and_takes_a_snapshot() -> None:
    talk = Told()
    for number in range(100):
        talk.append("a", b"k%04d" % number)
    assert talk["a"].stats()["prefix.bytes"] <= 600
    talk.run(0.5)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()
    assert {FrameType.SNAP_WANT, FrameType.SNAP} <= talk.kinds()
    talk.append("a", b"kzzzz")
    talk.run(0.5)
    assert talk.kinds() == {FrameType.DELTA}
    assert talk.indexes["b"].view() == talk.indexes["a"].view()


def test_deltas_that_come_during_a_snapshot_are_not_lost() -> None:
    talk = Told()
    for number in range(400):
        talk.append("a", b"k%04d" % number)
    for number in range(400, 420):
        talk.run(0.05)
        talk.append("a", b"k%04d" % number)
    talk.run(1.0)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()


def test_without_a_source_what_is_lost_is_told() -> None:
    talk = Talk([Stream(name="prefix", ring_bytes_max=300)])
    for number in range(100):
        talk["a"].append("prefix", b"%d" % number, talk.now)
    talk.run(0.5)
    changes = talk.changes("b")
    assert changes[0] == Lost("prefix", "a")
    found = [c.payload for c in changes if isinstance(c, Appended)]
    assert found == [b"%d" % n for n in range(100 - len(found), 100)] and found
    assert talk.is_equal()


def test_silent_divergence_of_one_key_is_repaired_by_a_snapshot_of_that_key() -> None:
    talk = Told()
    for key in (b"x", b"y", b"z"):
        for number in range(3):
            talk.append("a", key + b"%04d" % number)
    talk.run(1.0)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()
    talk.kinds()
    talk.indexes["b"].known["a"][b"y"].pop()
    talk.run(10.0)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()
    asked = [decode_body(frame) for _, _, frame in talk.log if frame.type == FrameType.SNAP_WANT]
    assert [want.key for want in asked if isinstance(want, SnapWant)] == [b"y"]
    assert talk["b"].stats()["diverged_keys"] == 1


def test_many_diverged_keys_are_repaired_by_one_whole_snapshot() -> None:
    talk = Told(ring_bytes=100_000)
    for number in range(200):
        talk.append("a", bytes((number,)) + b"0000")
    talk.run(1.0)
    talk.kinds()
    talk.indexes["b"].known["a"].clear()
    talk.run(10.0)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()
    asked = [decode_body(frame) for _, _, frame in talk.log if frame.type == FrameType.SNAP_WANT]
    assert [want.key for want in asked if isinstance(want, SnapWant)] == [None]


def test_a_newcomer_after_the_death_of_the_producer_is_served_by_another() -> None:
    talk = Told("abc")
    for number in range(100):
        talk.append("a", b"k%04d" % number)
    talk.run(1.0)
    for other in "bc":
        talk.cut("a", other)
        talk[other].owner_died("a", 1, talk.now)
    talk.restart("c")
    talk.run(5.0)
    assert talk.indexes["c"].view() == talk.indexes["b"].view() == talk.indexes["a"].view()
    assert talk["b"].digest() == talk["c"].digest()


def test_a_producer_that_is_only_out_of_sight_is_waited_for() -> None:
    talk = Told("abc")
    talk.append("a", b"k0001")
    talk.run(1.0)
    talk.cut("a", "c")
    talk.append("a", b"k0002")
    talk.run(1.0)
    talk.kinds()
    talk.run(20.0)
    assert FrameType.SNAP_WANT not in talk.kinds()
    talk.connect("a", "c")
    talk.run(1.0)
    assert talk.indexes["c"].view() == talk.indexes["a"].view()


def test_a_restarted_producer_begins_again_and_users_are_told() -> None:
    talk = Talk([PREFIX])
    talk["a"].append("prefix", b"old", talk.now)
    talk.run(0.2)
    talk.changes("b")
    talk.restart("a")
    talk["a"].append("prefix", b"new", talk.now)
    talk.run(0.2)
    assert talk.changes("b") == [Restarted("prefix", "a"), Appended("prefix", "a", 1, b"new")]


def test_a_producer_whose_clock_went_back_outranks_its_former_life() -> None:
    talk = Talk([PREFIX])
    talk.restart("a", life=77)
    talk["a"].append("prefix", b"old", talk.now)
    talk.run(0.2)
    talk.restart("a", life=5)
    talk["a"].append("prefix", b"new", talk.now)
    talk.run(5.0)
    assert payloads(talk, "b") == [b"old", b"new"]
    assert talk.is_equal()


def test_when_a_producer_leaves_its_stream_ends() -> None:
    talk = Talk([PREFIX])
    talk["a"].append("prefix", b"x", talk.now)
    talk.run(0.2)
    talk.cut("a", "b")
    talk.changes("b")
    talk["b"].owner_left("a", 1, talk.now)
    assert talk["b"].next_change() == Ended("prefix", "a")
    assert talk["b"].stats()["prefix.sources"] == 1


def test_snapshots_keep_their_pace_and_their_number() -> None:
    talk = Told("abcdef", ring_bytes=100)
    slow = ReplicaSettings(snapshot_bytes_per_s=2000.0, snapshots_out_max=2, snapshot_idle_s=60.0)
    talk["a"]._home.settings = slow
    for number in range(200):
        talk.append("a", b"k%04d" % number)
    most, started = 0, talk.now
    while any(talk.indexes[n].view() != talk.indexes["a"].view() for n in "bcdef"):
        talk.run(0.05)
        most = max(most, talk["a"].stats()["prefix.snapshots_out"])
        assert talk.now < started + 60.0
    sent = sum(len(f.body) for s, _, f in talk.log if s == "a" and f.type == FrameType.SNAP)
    assert most == 2
    assert sent / (talk.now - started) <= 2200.0


def test_a_snapshot_cut_short_is_asked_for_again() -> None:
    talk = Told("ab", ring_bytes=100)
    talk["a"]._home.settings = ReplicaSettings(snapshot_bytes_per_s=500.0)
    for number in range(100):
        talk.append("a", b"k%04d" % number)
    talk.run(1.0)
    assert talk.indexes["b"].view() != talk.indexes["a"].view()
    talk.cut("a", "b")
    talk["a"]._home.settings = ReplicaSettings()
    talk.connect("a", "b")
    talk.run(2.0)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()


def test_a_snapshot_that_stands_still_is_given_up_and_asked_for_again() -> None:
    talk = Told("ab", ring_bytes=100)
    for number in range(100):
        talk.append("a", b"k%04d" % number)
    real = store(talk, "a").source
    store(talk, "a").source = Silent()
    store(talk, "a").snapshots.request = lambda peer, want: None  # type: ignore[method-assign]
    talk.run(5.0)
    del store(talk, "a").snapshots.request
    store(talk, "a").source = real
    assert talk["b"].stats()["prefix.sources"] == 2
    talk.run(30.0)
    assert talk["b"].stats()["abandoned_snapshots"] >= 1
    assert talk.indexes["b"].view() == talk.indexes["a"].view()


class Silent:
    def fingerprints(self, origin: str) -> Iterable[tuple[bytes, int, int]]:
        return ()

    def snapshot(self, origin: str, key: bytes | None) -> Iterator[bytes] | None:
        return iter(())


def test_an_empty_snapshot_is_one_chunk() -> None:
    talk = Talk([Stream(name="prefix", ring_bytes_max=100, source=Silent())])
    for number in range(50):
        talk["a"].append("prefix", b"%d" % number, talk.now)
    talk.run(1.0)
    assert Restored("prefix", "a", None, b"", True, True) in talk.changes("b")
    assert talk.is_equal()


def test_relays_fill_their_rings_and_repair_from_neighbours() -> None:
    talk = Told("abcd", ring_bytes=100_000, is_connected=False, is_relay=True)
    for pair in ("ab", "bc", "cd"):
        talk.connect(*pair)
    for number in range(50):
        talk.append("a", b"k%04d" % number)
    talk.run(1.0)
    assert talk.indexes["d"].view() == talk.indexes["a"].view()
    assert FrameType.SNAP not in talk.kinds()
    talk.restart("d")
    talk.run(1.0)
    assert talk.indexes["d"].view() == talk.indexes["a"].view()
    assert FrameType.SNAP not in talk.kinds()


def test_rings_of_all_origins_together_are_bounded_and_the_own_goes_last() -> None:
    talk = Talk(
        [Stream(name="prefix", bytes_max=5000, ring_bytes_max=4000, coalesce_s=0.0)],
        "abcd",
        is_connected=False,
        is_relay=True,
    )
    for other in "bcd":
        talk.connect("a", other)
    talk.settle()
    for name in "abcd":
        for _ in range(40):
            talk[name].append("prefix", bytes(20), talk.now)
            talk.settle()
            assert talk["a"].stats()["prefix.bytes"] <= 5000
    assert store(talk, "a")._own.bytes == 40 * 68
    assert store(talk, "a").bytes == sum(log.bytes for log in store(talk, "a").logs.values())


def test_payloads_with_unknown_elements_are_delivered_and_forwarded() -> None:
    talk = Talk([PREFIX], "abc", is_connected=False, is_relay=True)
    talk.connect("a", "b")
    talk.connect("b", "c")
    talk.settle()
    frame = encode_body(Delta("prefix", "a", 1, 0, 1, 0, [[b"x", "new"]]))
    talk["b"].receive("a", frame, talk.now)
    talk.run(0.2)
    assert payloads(talk, "b") == payloads(talk, "c") == [b"x"]
    assert store(talk, "c").logs[("a", 1)].after(0, 100) == [(b"x", msgspec.msgpack.encode(["new"]))]


def test_payloads_above_the_bound_and_malformed_deltas_are_refused() -> None:
    talk = Talk([PREFIX])
    with pytest.raises(BoundError):
        talk["a"].append("prefix", bytes(65537), talk.now)
    for bad in (
        Delta("prefix", "b", 1, 0, 2, 0, [b"x"]),
        Delta("prefix", "b", 1, 2, 1, 0, []),
        Delta("prefix", "b", 1, 0, 1, 0, ["text"]),
        Delta("prefix", "b", 1, 0, 1, 0, [[]]),
        Delta("prefix", "b", 1, 0, 1, 0, [[5]]),
        Delta("prefix", "b", 1, 0, 1, 0, [bytes(65537)]),
    ):
        with pytest.raises(DecodeError):
            talk["a"].receive("b", encode_body(bad), talk.now)
    assert talk["a"].next_change() is None


def test_chunks_nobody_asked_for_are_ignored() -> None:
    talk = Talk([PREFIX])
    talk["a"].append("prefix", b"x", talk.now)
    talk.run(0.2)
    talk.changes("b")
    snap = Snap("prefix", "a", 1, None, 1, 50, 2 | 4, 0, b"forged")
    talk["b"].receive("a", encode_body(snap), talk.now)
    assert talk["b"].next_change() is None
    assert store(talk, "b").logs[("a", 1)].have == 1


def test_twenty_requests_of_eighteen_blocks_cost_what_was_planned() -> None:
    talk = Talk([PREFIX])
    for _ in range(20):
        talk["a"].append("prefix", bytes(14 + 8 * 18), talk.now)
    (frame,) = talk.run(0.2)
    assert len(frame.body) + 5 <= 20 * (22 + 8 * 18)


def begin_fetch(talk: Told, key: bytes | None) -> None:
    """b asks a for a snapshot (ticket 1); the question is not delivered."""
    store(talk, "b").snapshots.need(("a", 1), key, "a")
    store(talk, "b")._fetch(talk.now)
    assert [frame.type for frame in talk["b"].frames_to_send("a", talk.now)] == [FrameType.SNAP_WANT]


def test_a_snapshot_older_than_what_came_meanwhile_takes_the_position_back() -> None:
    talk = Told()
    for number in range(5):
        talk.append("a", b"k%04d" % number)
    talk.run(1.0)
    begin_fetch(talk, b"k")
    snap = Snap("prefix", "a", 1, b"k", 1, 3, 2 | 4, 0, b"k0000k0001k0002")
    talk["b"].receive("a", encode_body(snap), talk.now)
    assert store(talk, "b").logs[("a", 1)].have == 3
    talk.run(1.0)
    assert talk.indexes["b"].view() == talk.indexes["a"].view()


def test_no_snapshot_is_begun_while_its_server_has_changes_to_tell() -> None:
    talk = Told()
    want = SnapWant("prefix", "a", 1, None, 1)
    talk.append("a", b"k0001")
    talk.now += 0.2
    talk["a"].tick(talk.now)
    for frame in talk["a"].frames_to_send("b", talk.now):
        talk["b"].receive("a", frame, talk.now)
    talk["b"].receive("a", encode_body(want), talk.now)
    assert talk["b"].frames_to_send("a", talk.now) == []
    while talk["b"].next_change() is not None:
        pass
    assert talk["b"].peers_to_send() == ["a"]
    assert [frame.type for frame in talk["b"].frames_to_send("a", talk.now)] == [FrameType.SNAP]


def test_a_question_that_comes_twice_is_served_once() -> None:
    talk = Told()
    talk.append("a", b"k0001")
    talk.run(1.0)
    want = encode_body(SnapWant("prefix", "a", 1, None, 1))
    for _ in range(2):
        talk["a"].receive("b", want, talk.now)
        frames = talk["a"].frames_to_send("b", talk.now)
        talk.now += 1.0
    assert frames == []


def test_fingerprints_are_compared_only_when_all_deltas_before_them_are_told() -> None:
    talk = Told()
    talk.append("a", b"k0001")
    talk.now += 2.6
    talk["a"].tick(talk.now)
    frames = talk["a"].frames_to_send("b", talk.now)
    assert [frame.type for frame in frames] == [FrameType.DELTA, FrameType.VECTOR]
    for frame in frames:
        talk["b"].receive("a", frame, talk.now)
    talk.run(1.0)
    assert "diverged_keys" not in talk["b"].stats()
    assert FrameType.SNAP_WANT not in talk.kinds()
