"""Frames of a stream: cut anywhere, capped, never allocated by a length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import DecodeError
from mesh.frames import FRAME_BYTES_MAX, STATE_TYPES, Frame, FrameReader, FrameType, encode_frame

FRAMES = [Frame(1, b""), Frame(255, b"x"), Frame(33, bytes(5000))]


def test_the_layout_is_length_type_body() -> None:
    assert encode_frame(Frame(7, b"ab")) == b"\0\0\0\3\7ab"


@given(st.lists(st.builds(Frame, st.integers(0, 255), st.binary(max_size=60)), max_size=8), st.data())
def test_frames_come_out_whole_however_the_bytes_are_cut(frames: list[Frame], data: st.DataObject) -> None:
    wire = b"".join(map(encode_frame, frames))
    reader = FrameReader()
    found: list[Frame] = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        found += reader.feed(wire[:size])
        wire = wire[size:]
    reader.finish()
    assert found == frames


def test_frames_come_out_byte_by_byte() -> None:
    reader = FrameReader()
    wire = b"".join(map(encode_frame, FRAMES))
    found = [frame for byte in wire for frame in reader.feed(bytes((byte,)))]
    assert found == FRAMES
    assert reader.buffered_bytes == 0


def test_a_frame_of_the_cap_passes_and_a_longer_one_does_not() -> None:
    largest = Frame(1, bytes(FRAME_BYTES_MAX - 1))
    assert FrameReader().feed(encode_frame(largest)) == [largest]
    with pytest.raises(DecodeError):
        FrameReader().feed((FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(AssertionError):
        encode_frame(Frame(1, bytes(FRAME_BYTES_MAX)))


def test_a_frame_without_a_type_is_refused() -> None:
    with pytest.raises(DecodeError):
        FrameReader().feed(b"\0\0\0\0")


def test_a_claimed_length_costs_nothing_until_the_bytes_come() -> None:
    reader = FrameReader()
    reader.feed(FRAME_BYTES_MAX.to_bytes(4, "big") + b"\1abc")
    assert reader.buffered_bytes == 8
    with pytest.raises(DecodeError):
        reader.finish()


def test_types_are_single_bytes_and_the_states_share_a_range() -> None:
    assert all(0 < kind < 256 for kind in FrameType)
    assert {FrameType.VECTOR, FrameType.SNAP} <= STATE_TYPES
    assert FrameType.HELLO not in STATE_TYPES
