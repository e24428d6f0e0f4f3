"""The face of replicated state: several namespaces at once, openings, anti-entropy, back-pressure, silence."""

from __future__ import annotations

from random import Random

import pytest

from mesh.frames import FrameType
from mesh.namespace import Appended, Counter, Ephemeral, Lost, Lww, Owned, Put, Stream
from mesh.replica import Replica, ReplicaSettings, life_number
from tests.mesh.replica_talk import Talk

ALL = [
    Lww(name="conf"),
    Owned(name="reg"),
    Ephemeral(name="load"),
    Counter(name="hits"),
    Stream(name="prefix"),
]


def test_a_new_pair_says_one_vector_each_per_namespace_and_falls_silent() -> None:
    talk = Talk(ALL)
    assert [frame.type for _, _, frame in talk.log] == [FrameType.VECTOR] * 10
    assert talk.settle() == []


def test_an_opening_of_small_state_is_small() -> None:
    talk = Talk(ALL, "abc", is_connected=False)
    for name in "abc":
        for number in range(8):
            talk[name].put("reg", b"http://10.0.0.%d:8000" % number, bytes(60), talk.now)
    talk.connect("a", "b")
    talk.settle()
    vectors = [f for s, _, f in talk.log if s == "a" and f.type == FrameType.VECTOR]
    assert sum(len(frame.body) + 5 for frame in vectors) < 295


def test_two_lives_of_one_second_are_ordered_by_their_boot_bytes() -> None:
    assert life_number(5, b"\0\0\0\2rest") > life_number(5, b"\0\0\0\1rest")
    assert life_number(6, bytes(8)) > life_number(5, b"\xff" * 8)
    assert life_number(2**33 + 1, bytes(8)) < 1 << 64


def test_idle_nodes_compare_vectors_and_nothing_else() -> None:
    talk = Talk(ALL, "abc")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk["b"].put("conf", b"c", b"1", talk.now)
    talk["c"].append("prefix", b"p", talk.now)
    talk.run(10.0)
    frames = talk.run(600.0)
    assert {frame.type for frame in frames} == {FrameType.VECTOR}
    assert len(frames) <= 3 * len(ALL) * 81
    per_node_per_s = sum(len(frame.body) + 5 for frame in frames) / 600.0 / 3
    assert per_node_per_s < 40.0


def test_no_frame_is_answered_by_its_own_type() -> None:
    """Each frame alone is given to a quiet replica; what it says at once is never of that type, but for deltas, which
    may answer nothing at all."""
    talk = Talk(ALL, "ab", is_relay=True)
    for name in "ab":
        talk[name].put("reg", b"w", name.encode(), talk.now)
        talk[name].put("conf", b"w", name.encode(), talk.now)
        talk[name].append("prefix", b"p", talk.now)
    talk.run(60.0)
    for name, peer, frame in list(talk.log):
        replica = talk[peer]
        assert not replica.peers_to_send()
        replica.receive(name, frame, talk.now)
        if talk.now >= replica.deadline():
            replica.tick(talk.now)
        answers = [f.type for p in replica.peers_to_send() for f in replica.frames_to_send(p, talk.now)]
        assert frame.type not in answers


def test_a_peer_that_was_not_heard_is_greeted_again_with_growing_pauses() -> None:
    talk = Talk(ALL, is_connected=False)
    talk["a"].peer_up("b", 1, talk.now)
    rounds = 0
    end = talk.now + 100.0
    while talk.now < end:
        talk["a"].tick(talk.now)
        for peer in talk["a"].peers_to_send():
            rounds += len(talk["a"].frames_to_send(peer, talk.now)) // len(ALL)
        talk.now = max(talk.now + 0.001, talk["a"].deadline())
    assert 6 <= rounds <= 20


def test_a_peer_without_one_of_our_namespaces_still_shares_the_others() -> None:
    talk = Talk(ALL, is_connected=False)
    talk.namespaces = ALL[:2]
    talk.replicas["b"] = talk.new("b")
    talk.connect("a", "b")
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.run(5.0)
    assert talk["b"].get("reg", b"w", "a") == b"1"
    assert talk["b"].stats()["unknown_frames"] > 0


def test_a_new_stream_to_a_known_peer_starts_over() -> None:
    talk = Talk(ALL)
    talk["a"].put("reg", b"1", b"v", talk.now)
    talk["a"].tick(talk.now)
    assert talk["a"].frames_to_send("b", talk.now), "lost with the old stream"
    talk.connect("a", "b")
    talk.settle()
    assert talk["b"].get("reg", b"1", "a") == b"v"


def test_a_long_repair_does_not_hold_up_the_other_namespaces() -> None:
    talk = Talk(ALL)
    for number in range(60):
        talk["a"].put("reg", b"%d" % number, bytes(60_000), talk.now)
    talk["a"].put("load", b"w", b"1", talk.now)
    talk.now += 0.1
    talk["a"].tick(talk.now)
    first = talk["a"].frames_to_send("b", talk.now)
    assert sum(len(frame.body) for frame in first) < 1 << 20
    for frame in first:
        talk["b"].receive("a", frame, talk.now)
    assert talk["b"].get("load", b"w", "a") == b"1"
    assert talk["a"].peers_to_send() == ["b"], "the rest waits for the next call"
    talk.settle()
    assert len(list(talk["b"].items("reg"))) == 60


def test_a_slow_peer_costs_no_memory_per_change() -> None:
    import tracemalloc

    talk = Talk(ALL)
    talk["a"].put("reg", b"w", b"0", talk.now)
    talk["a"].tick(talk.now)
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    for number in range(20_000):
        talk["a"].put("reg", b"w%d" % (number % 10), b"%d" % number, talk.now)
        talk["a"].put("load", b"w%d" % (number % 10), b"%d" % number, talk.now)
        talk["a"].add("hits", b"k", 1, talk.now)
        talk["a"].tick(talk.now)
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert grown < 100_000


def test_changes_nobody_takes_are_bounded_and_the_loss_is_told() -> None:
    talk = Talk(ALL, settings=ReplicaSettings(changes_max=10))
    for number in range(20):
        talk["a"].put("reg", b"%d" % number, b"v", talk.now)
        talk["a"].append("prefix", b"%d" % number, talk.now)
    talk.now += 0.2
    talk["a"].tick(talk.now)
    for frame in talk["a"].frames_to_send("b", talk.now):
        talk["b"].receive("a", frame, talk.now)
    assert talk["b"].stats()["changes_waiting"] == 10
    changes = []
    while (change := talk["b"].next_change()) is not None:
        changes.append(change)
    assert changes[:2] == [Lost("reg", "a"), Lost("prefix", "a")]
    assert [c.sequence for c in changes if isinstance(c, Appended)] == list(range(11, 21))
    assert len(list(talk["b"].items("reg"))) == 20


def test_frames_for_a_peer_that_is_not_connected_are_none() -> None:
    talk = Talk(ALL, is_connected=False)
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk["a"].tick(talk.now)
    assert talk["a"].peers_to_send() == []
    assert talk["a"].frames_to_send("b", talk.now) == []
    talk["a"].peer_down("b", talk.now)


def test_digests_tell_namespaces_apart_and_show_every_difference() -> None:
    talk = Talk(ALL)
    seen = {talk["a"].digest()}
    talk["a"].put("conf", b"k", b"v", talk.now)
    seen.add(talk["a"].digest())
    talk["a"].put("reg", b"k", b"v", talk.now)
    seen.add(talk["a"].digest())
    talk["a"].put("load", b"k", b"v", talk.now)
    seen.add(talk["a"].digest())
    talk["a"].add("hits", b"k", 1, talk.now)
    seen.add(talk["a"].digest())
    talk["a"].append("prefix", b"k", talk.now)
    seen.add(talk["a"].digest())
    assert len(seen) == 6
    talk.run(1.0)
    assert talk.is_equal()
    assert talk["a"].digest("reg") == talk["b"].digest("reg") != 0


def test_asking_a_rule_for_what_it_does_not_do_is_a_bug() -> None:
    replica = Replica("a", 1, ALL, 0.0, Random(1))
    with pytest.raises(KeyError):
        replica.put("nobody's", b"k", b"v", 0.0)
    with pytest.raises(AssertionError):
        replica.put("prefix", b"k", b"v", 0.0)
    with pytest.raises(AssertionError):
        replica.append("reg", b"k", 0.0)
    with pytest.raises(AssertionError):
        Replica("a", 1, [*ALL, Lww(name="reg")], 0.0, Random(1))


def test_the_same_seed_gives_the_same_frames() -> None:
    def history() -> list[tuple[str, str, object]]:
        talk = Talk(ALL, "abc")
        talk["a"].put("reg", b"w", b"1", talk.now)
        talk.run(60.0)
        return list(talk.log)

    assert history() == history()


def test_relays_reach_everyone_in_a_ring() -> None:
    talk = Talk(ALL, "abcdefgh", is_connected=False, is_relay=True)
    names = "abcdefgh"
    for i, name in enumerate(names):
        talk.connect(name, names[i - 1])
    talk.settle()
    talk["a"].put("reg", b"w", b"1", talk.now)
    talk["a"].put("conf", b"w", b"1", talk.now)
    talk.settle()
    assert all(Put("reg", "a", b"w", b"1") in talk.changes(name) for name in names[1:])
    talk["a"].put("load", b"w", b"1", talk.now)
    talk["a"].add("hits", b"w", 1, talk.now)
    talk["a"].append("prefix", b"w", talk.now)
    talk.run(1.0)
    assert talk.is_equal()
