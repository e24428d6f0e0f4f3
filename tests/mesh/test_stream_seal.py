"""Sealed streams: both ends agree on keys, and nothing can be changed, dropped, repeated or moved."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import DecodeError, MeshError, SealError
from mesh.frames import FRAME_BYTES_MAX, Frame
from mesh.keyring import Keyring
from mesh.seal import Mode, Sealer
from mesh.stream_seal import OPENING_BYTES, StreamSeal

SECRET, OTHER = b"0123456789abcdef", b"fedcba9876543210"
FRAMES = [Frame(1, b"hello"), Frame(33, b""), Frame(200, bytes(3000))]


def ends(
    dialer: Sealer, acceptor: Sealer, *, holds: bool = False, tls: bool = False
) -> tuple[StreamSeal, StreamSeal]:
    a = StreamSeal(dialer, b"a" * 16, is_dialer=True, peer_holds_key=holds, is_protected=tls)
    b = StreamSeal(acceptor, b"b" * 16, is_dialer=False, is_protected=tls)
    assert b.feed(a.opening()) == []
    assert a.feed(b.opening()) == []
    assert a.is_open and b.is_open and a.is_sealed == b.is_sealed
    return a, b


def sealers(label: str = "c") -> tuple[Sealer, Sealer]:
    ring = Keyring.of(SECRET)
    return Sealer(b"boot---a", label, ring), Sealer(b"boot---b", label, ring)


def test_frames_pass_both_ways_and_are_not_readable() -> None:
    a, b = ends(*sealers())
    wire = b"".join(a.seal(frame) for frame in FRAMES)
    assert b"hello" not in wire
    assert b.feed(wire) == FRAMES
    assert a.feed(b"".join(b.seal(frame) for frame in FRAMES)) == FRAMES
    assert (a.peer_boot, b.peer_boot) == (b"boot---b", b"boot---a")


@given(st.integers(0, 2**32))
@settings(max_examples=50)
def test_the_bytes_may_come_cut_anywhere(seed: int) -> None:
    rng = Random(seed)
    dialer, acceptor = sealers() if rng.random() < 0.5 else (Sealer(b"boot---a"), Sealer(b"boot---b"))
    a = StreamSeal(dialer, b"a" * 16, is_dialer=True)
    b = StreamSeal(acceptor, b"b" * 16, is_dialer=False)
    b.feed(a.opening())
    a.feed(b.opening())
    wire = a.opening() + b"".join(a.seal(frame) for frame in FRAMES)
    fresh = StreamSeal(acceptor, b"b" * 16, is_dialer=False)
    found: list[Frame] = []
    while wire:
        size = rng.randrange(1, 60)
        found += fresh.feed(wire[:size])
        wire = wire[size:]
    assert found == FRAMES
    fresh.finish()


def test_every_flipped_bit_ends_the_stream() -> None:
    dialer, acceptor = sealers()
    a, _ = ends(dialer, acceptor)
    wire = a.opening() + a.seal(Frame(7, b"body"))
    for index in range(len(wire) * 8):
        touched = bytearray(wire)
        touched[index // 8] ^= 1 << index % 8
        b = StreamSeal(acceptor, b"b" * 16, is_dialer=False)
        try:
            assert b.feed(bytes(touched)) == []  # a length that grew waits for more
            with pytest.raises(DecodeError):
                b.finish()
        except MeshError:
            pass


def test_frames_cannot_be_dropped_repeated_or_swapped() -> None:
    for order in ([1], [0, 0], [1, 0], [0, 2]):
        a, b = ends(*sealers())
        wire = [a.seal(frame) for frame in FRAMES]
        with pytest.raises(SealError):
            for index in order:
                b.feed(wire[index])


def test_a_recorded_stream_cannot_be_played_again() -> None:
    dialer, acceptor = sealers()
    a, _ = ends(dialer, acceptor)
    record = a.opening() + a.seal(FRAMES[0])
    again = StreamSeal(acceptor, b"x" * 16, is_dialer=False)
    with pytest.raises(SealError):
        again.feed(record)


def test_what_we_sent_cannot_be_played_back_to_us() -> None:
    a, b = ends(*sealers())
    sent = a.seal(FRAMES[0])
    with pytest.raises(SealError):
        a.feed(sent)
    assert b.is_open
    alone = StreamSeal(sealers()[0], b"a" * 16, is_dialer=True)
    with pytest.raises(SealError):
        alone.feed(alone.opening())


def test_another_label_does_not_pass() -> None:
    a = StreamSeal(sealers("one")[0], b"a" * 16, is_dialer=True)
    b = StreamSeal(sealers("two")[1], b"b" * 16, is_dialer=False)
    b.feed(a.opening())
    a.feed(b.opening())
    with pytest.raises(SealError):
        b.feed(a.seal(FRAMES[0]))
    with pytest.raises(SealError):
        StreamSeal(Sealer(b"boot---b", "two"), b"b" * 16, is_dialer=False).feed(
            StreamSeal(Sealer(b"boot---a", "one"), b"a" * 16, is_dialer=True).opening()
        )


def test_ends_in_the_middle_of_a_rotation_understand_each_other() -> None:
    old_first = Sealer(b"boot---a", "c", Keyring.of(SECRET, OTHER))
    new_first = Sealer(b"boot---b", "c", Keyring.of(OTHER, SECRET))
    a, b = ends(old_first, new_first)
    assert b.feed(a.seal(FRAMES[0])) == [FRAMES[0]]
    assert a.feed(b.seal(FRAMES[0])) == [FRAMES[0]]
    old_first.set_keyring(Keyring.of(OTHER))
    assert a.feed(b.seal(FRAMES[1])) == [FRAMES[1]], "an open stream keeps its keys"


def test_an_unknown_key_is_refused_at_the_opening() -> None:
    a = StreamSeal(Sealer(b"boot---a", "c", Keyring.of(OTHER)), b"a" * 16, is_dialer=True)
    b = StreamSeal(sealers()[1], b"b" * 16, is_dialer=False)
    with pytest.raises(SealError):
        b.feed(a.opening())


def test_modes_mix_as_for_datagrams() -> None:
    ring = Keyring.of(SECRET)
    plain = Sealer(b"boot---p", "c")
    accept = Sealer(b"boot---q", "c", ring, Mode.ACCEPT)
    require = Sealer(b"boot---r", "c", ring)
    assert not ends(plain, accept)[1].is_sealed
    assert not ends(accept, plain)[1].is_sealed
    assert ends(accept, require, holds=True)[1].is_sealed
    assert ends(require, accept)[1].is_sealed
    with pytest.raises(SealError):
        StreamSeal(require, b"b" * 16, is_dialer=False).feed(
            StreamSeal(plain, b"a" * 16, is_dialer=True).opening()
        )


def test_over_tls_frames_are_not_sealed_again() -> None:
    a, b = ends(*sealers(), tls=True)
    assert not a.is_sealed
    assert b.feed(a.seal(FRAMES[0])) == [FRAMES[0]]


def test_a_stranger_is_turned_away_at_its_first_wrong_byte() -> None:
    for data in (b"G", b"\xa7X", b"\x16\x03\x01"):
        with pytest.raises(DecodeError):
            StreamSeal(sealers()[0], b"a" * 16, is_dialer=False).feed(data)


def test_a_length_above_the_cap_ends_the_stream_before_anything_is_kept() -> None:
    a, b = ends(*sealers())
    with pytest.raises(DecodeError):
        b.feed((FRAME_BYTES_MAX + 17).to_bytes(4, "big"))
    assert a.is_open


def test_a_stream_that_ends_early_says_so() -> None:
    a, b = ends(*sealers())
    half = StreamSeal(sealers()[1], b"b" * 16, is_dialer=False)
    half.feed(a.opening()[: OPENING_BYTES - 1])
    with pytest.raises(DecodeError):
        half.finish()
    b.feed(a.seal(FRAMES[0])[:-1])
    with pytest.raises(DecodeError):
        b.finish()


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_raise_nothing_else(data: bytes, is_opened: bool) -> None:
    b = ends(*sealers())[1]
    try:
        assert (b if is_opened else StreamSeal(sealers()[1], b"b" * 16, is_dialer=False)).feed(data) == []
    except (DecodeError, SealError):
        pass
