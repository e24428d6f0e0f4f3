"""Datagrams: what is sealed comes out, what was touched, repeated or is of strangers does not, and nothing changes."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh import seal as seal_room
from mesh.errors import DecodeError, MeshError, SealError, SettingsError
from mesh.keyring import Key, Keyring
from mesh.seal import HEADER_BYTES, OVERHEAD_BYTES, REPLAY_WINDOW, STRANGERS_PER_S, Mode, Opened, Sealer

SECRET, OTHER = b"0123456789abcdef", b"fedcba9876543210"
A, B = b"boot---a", b"boot---b"


def pair(label: str = "blue", mode: Mode | None = None) -> tuple[Sealer, Sealer]:
    ring = Keyring.of(SECRET)
    return Sealer(A, label, ring, mode), Sealer(B, label, ring, mode)


def state(sealer: Sealer) -> list[tuple[object, ...]]:
    return [(at, one.highest, one.seen) for at, one in sealer._senders.items()]


@given(st.binary(max_size=1400))
def test_a_sealed_body_comes_out_and_costs_forty_bytes(body: bytes) -> None:
    a, b = pair()
    packet = a.seal(body)
    assert len(packet) == len(body) + OVERHEAD_BYTES == len(body) + 40
    assert b.open(packet, 0.0) == Opened(A, body, True)


def test_the_layout_of_a_packet_is_the_documented_one() -> None:
    packet = Sealer(A, "blue", Keyring.of(SECRET)).seal(b"x")
    assert packet[:4] == b"\xa7M\x01\x01"
    assert int.from_bytes(packet[4:8], "big") == Key(SECRET).id
    assert packet[8:16] == A
    assert int.from_bytes(packet[16:24], "big") == 1


def test_the_known_answer_of_version_one_never_changes() -> None:
    packet = Sealer(A, "blue", Keyring.of(SECRET)).seal(b"hello")
    assert packet.hex() == KNOWN_ANSWER


KNOWN_ANSWER = "a74d0101273220dd626f6f742d2d2d6100000000000000019d0d91640ab97637745012abfce0e49a33ae5ee2f5"


def test_every_flipped_bit_is_refused_and_changes_nothing() -> None:
    a, b = pair()
    b.open(a.seal(b"first"), 0.0)
    packet = a.seal(b"hello")
    before = state(b)
    for index in range(len(packet) * 8):
        touched = bytearray(packet)
        touched[index // 8] ^= 1 << index % 8
        with pytest.raises(MeshError):
            b.open(bytes(touched), index / 10)
    assert state(b) == before
    assert b.open(packet, 0.0).body == b"hello"


def test_a_packet_cut_anywhere_is_refused() -> None:
    a, b = pair()
    packet = a.seal(b"hello")
    for size in range(len(packet)):
        with pytest.raises(MeshError):
            b.open(packet[:size], float(size))


def test_a_replay_is_refused() -> None:
    a, b = pair()
    packet = a.seal(b"once")
    b.open(packet, 0.0)
    with pytest.raises(SealError):
        b.open(packet, 0.0)
    assert b.counts == {"sealed": 1, "replayed": 1}


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_packets_may_overtake_each_other_within_the_window(seed: int) -> None:
    a, b = pair()
    packets = [a.seal(bytes((i % 256,))) for i in range(200)]
    order = Random(seed).sample(packets, len(packets))
    for packet in order:
        b.open(packet, 0.0)
    for packet in order:
        with pytest.raises(SealError):
            b.open(packet, 0.0)


def test_packets_older_than_the_window_are_refused() -> None:
    a, b = pair()
    old = a.seal(b"old")
    for _ in range(REPLAY_WINDOW - 1):
        b.open(a.seal(b""), 0.0)
    assert b.open(old, 0.0).body == b"old"
    other = Sealer(A, "blue", Keyring.of(SECRET))
    late, fresh = other.seal(b"late"), Sealer(B, "blue", Keyring.of(SECRET))
    for _ in range(REPLAY_WINDOW):
        fresh.open(other.seal(b""), 0.0)
    with pytest.raises(SealError):
        fresh.open(late, 0.0)


def test_a_jump_of_the_counter_beyond_the_window_clears_it() -> None:
    a, b = pair()
    first = a.seal(b"1")
    b.open(first, 0.0)
    a._counter += 10 * REPLAY_WINDOW
    b.open(a.seal(b"2"), 0.0)
    with pytest.raises(SealError):
        b.open(first, 0.0)


def test_another_label_or_key_does_not_open() -> None:
    a, _ = pair("blue")
    packet = a.seal(b"x")
    green = Sealer(B, "green", Keyring.of(SECRET))
    with pytest.raises(SealError):
        green.open(packet, 0.0)
    assert green.counts == {"unauthentic": 1}
    stranger = Sealer(B, "blue", Keyring.of(OTHER))
    with pytest.raises(SealError):
        stranger.open(packet, 0.0)
    assert stranger.unknown_key_ids == {Key(SECRET).id: 1}


def test_our_own_packet_reflected_is_refused() -> None:
    a, _ = pair()
    with pytest.raises(SealError):
        a.open(a.seal(b"x"), 0.0)


def test_two_senders_with_one_counter_do_not_share_a_key() -> None:
    a, b = pair()
    assert a.seal(b"same body")[HEADER_BYTES:] != b.seal(b"same body")[HEADER_BYTES:]


def test_plain_packets_have_the_same_header_and_need_the_same_label() -> None:
    plain_a, plain_b = Sealer(A, "blue"), Sealer(B, "blue")
    packet = plain_a.seal(b"x")
    assert len(packet) == HEADER_BYTES + 1
    assert plain_b.open(packet, 0.0) == Opened(A, b"x", False)
    with pytest.raises(SealError):
        Sealer(B, "green").open(packet, 0.0)


def test_require_refuses_plain_and_plain_cannot_read_sealed() -> None:
    sealed, _ = pair()
    plain = Sealer(B, "blue")
    with pytest.raises(SealError):
        sealed.open(plain.seal(b"x"), 0.0)
    with pytest.raises(SealError):
        plain.open(sealed.seal(b"x"), 0.0)


def test_a_cluster_becomes_sealed_in_two_rolling_restarts_without_a_lost_packet() -> None:
    ring = Keyring.of(SECRET)
    steps = [Sealer(A, "c"), Sealer(A, "c", ring, Mode.ACCEPT), Sealer(A, "c", ring, Mode.REQUIRE)]
    peers = [Sealer(B, "c"), Sealer(B, "c", ring, Mode.ACCEPT), Sealer(B, "c", ring, Mode.REQUIRE)]
    for mine, theirs in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)):
        a, b = steps[mine], peers[theirs]
        assert b.open(a.seal(b"x", peer_holds_key=theirs > 0), 0.0).body == b"x"
        assert a.open(b.seal(b"y", peer_holds_key=mine > 0), 0.0).body == b"y"


def test_keys_rotate_without_a_lost_packet_in_any_order_of_nodes() -> None:
    ring = Keyring.of(SECRET)
    nodes = [Sealer(A, "c", ring), Sealer(B, "c", ring), Sealer(b"boot---c", "c", ring)]

    def all_talk() -> None:
        for one in nodes:
            for other in nodes:
                if one is not other:
                    assert other.open(one.seal(b"x"), 0.0).body == b"x"

    old, new = Key(SECRET).id, Key(OTHER).id
    for step in (
        lambda r: r.adding(OTHER),
        lambda r: r.using(new),
        lambda r: r.removing(old),
    ):
        for node in nodes:
            node.set_keyring(step(node.keyring))
            all_talk()
    assert [node.keyring.ids for node in nodes] == [(new,)] * 3
    with pytest.raises(SealError):
        nodes[0].open(Sealer(b"boot---d", "c", ring).seal(b"x"), 0.0)


def test_strangers_are_looked_at_only_so_often() -> None:
    _, b = pair()
    known = Sealer(A, "blue", Keyring.of(SECRET))
    b.open(known.seal(b""), 0.0)
    forged = Sealer(A, "other label", Keyring.of(SECRET))
    for number in range(3 * STRANGERS_PER_S):
        forged.boot = number.to_bytes(8, "big")
        forged.set_keyring(forged.keyring)
        with pytest.raises(SealError):
            b.open(forged.seal(b""), 0.0)
    assert b.counts["unauthentic"] <= STRANGERS_PER_S
    assert b.counts["strangers_dropped"] >= 2 * STRANGERS_PER_S
    assert b.senders == 1
    assert b.open(known.seal(b"still heard"), 0.0).body == b"still heard"
    newcomer = Sealer(b"newcomer", "blue", Keyring.of(SECRET))
    assert b.open(newcomer.seal(b"later"), 1.0).body == b"later"


def test_tracked_senders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal_room, "SENDERS_MAX", 10)
    _, b = pair()
    for number in range(25):
        sender = Sealer(number.to_bytes(8, "big"), "blue", Keyring.of(SECRET))
        b.open(sender.seal(b""), float(number))
        assert b.senders <= 10


def test_forgetting_a_life_frees_its_window() -> None:
    a, b = pair()
    b.open(a.seal(b""), 0.0)
    b.forget(A)
    assert b.senders == 0


def test_a_mode_without_its_key_is_a_settings_error() -> None:
    with pytest.raises(SettingsError):
        Sealer(A, "c", Keyring(), Mode.REQUIRE)
    with pytest.raises(SettingsError):
        Sealer(A, "c", Keyring.of(SECRET), Mode.PLAIN)
    with pytest.raises(SettingsError):
        Sealer(A, "x" * 256)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else_and_change_nothing(data: bytes) -> None:
    for sealer in (pair()[1], Sealer(B, "blue")):
        with pytest.raises((DecodeError, SealError)):
            sealer.open(data, 0.0)
        with pytest.raises((DecodeError, SealError)):
            sealer.open(b"\xa7M\x01\x01" + Key(SECRET).id.to_bytes(4, "big") + data, 0.0)
        assert sealer.senders == 0
