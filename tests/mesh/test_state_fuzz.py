"""Random and mutated state frames: nothing but DecodeError comes out, a refusal changes nothing, and no frame costs
memory that it did not bring."""

from __future__ import annotations

import tracemalloc
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import DecodeError
from mesh.frames import STATE_TYPES, Frame, FrameType
from mesh.records import Delta, Vector, decode_body, encode_body
from tests.mesh.replica_world import CONF, REG
from tests.mesh.state_frames import NOW, corpus, drain, feed, mutate, target

TYPES = st.sampled_from(sorted(STATE_TYPES))
NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary(max_size=20)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=8),
    max_leaves=30,
)


def test_the_corpus_has_every_type_of_frame() -> None:
    assert {frame.type for frame in corpus()} >= {
        FrameType.VECTOR,
        FrameType.DELTA,
        FrameType.WANT,
        FrameType.SUMS,
        FrameType.WANT_KEYS,
        FrameType.SNAP_WANT,
        FrameType.SNAP,
    }


@given(TYPES, st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes(kind: int, body: bytes) -> None:
    feed(target(), Frame(kind, body))


@given(
    TYPES, st.sampled_from([CONF, REG, "load", "hits", "prefix", "nobody's"]), st.lists(NESTED, max_size=8)
)
@settings(max_examples=300, deadline=None)
def test_well_formed_arrays_of_the_wrong_things(kind: int, namespace: str, rest: list[object]) -> None:
    import msgspec

    replica = target()
    feed(replica, Frame(kind, msgspec.msgpack.encode([namespace, *rest])))
    drain(replica, NOW)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_frames_of_a_running_pair(seed: int) -> None:
    rng = Random(seed)
    replica = target()
    refused = 0
    for turn in range(1500):
        refused += feed(replica, mutate(rng, rng.choice(corpus())))
        if turn % 10 == 0:
            drain(replica, NOW + turn / 100)
    assert refused > 100
    stats = replica.stats()
    assert all(stats[f"{name}.bytes"] <= 2 << 20 for name in (CONF, REG, "load", "hits", "tokens", "prefix"))


def test_a_claimed_length_allocates_nothing() -> None:
    replica = target()
    bombs = (
        b"\xdd\xff\xff\xff\xff",
        b"\x97" + b"\xdd\x7f\xff\xff\xff" * 5,
        b"\xc6\xff\xff\xff\xff",
        b"\xdd\x00\x0f\xff\xff" * 900 + bytes(1000),
        b"\x91" * 100_000,
        b"\x97\xa3reg\xa1a\x01\x00\x01\x00\xdd\x00\x0f\xff\xff",
    )
    tracemalloc.start()
    for kind in sorted(STATE_TYPES):
        for bomb in bombs:
            feed(replica, Frame(kind, bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_frame_that_is_no_state_frame_is_refused() -> None:
    with pytest.raises(DecodeError):
        target().receive("n1", Frame(FrameType.HELLO, b""), NOW)


def test_unknown_types_namespaces_rules_and_peers_are_counted_and_change_nothing() -> None:
    replica = target()
    digest = replica.digest()
    replica.receive("n1", Frame(47, b"later"), NOW)
    replica.receive("n1", encode_body(Vector("later", 1, 0, ())), NOW)
    replica.receive("n1", encode_body(Vector(CONF, 2, 0, ())), NOW)
    replica.receive("nobody", encode_body(Vector(CONF, 1, 0, ())), NOW)
    stats = replica.stats()
    assert (stats["unknown_frames"], stats["mismatched_frames"], stats["frames_of_strangers"]) == (2, 1, 1)
    assert replica.digest() == digest


def test_headers_that_grew_at_their_tail_are_understood() -> None:
    import msgspec

    frame = encode_body(Delta(REG, "n1", 1, 0, 1, 0, [[b"k", 1, b"v"]]))
    longer = Frame(frame.type, msgspec.msgpack.encode([*msgspec.msgpack.decode(frame.body), "new", {"x": 1}]))
    assert decode_body(longer) == decode_body(frame)
    vector = msgspec.msgpack.encode([REG, 2, 0, [["n1", 1, 3, 0, [], "new"]], "new"])
    assert isinstance(decode_body(Frame(FrameType.VECTOR, vector)), Vector)
