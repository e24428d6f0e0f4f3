"""Bodies of the state frames: the bytes of version one, and what decoding forgives and what not."""

from __future__ import annotations

import msgspec
import pytest

from mesh.digest import Row
from mesh.errors import DecodeError
from mesh.frames import Frame, FrameType
from mesh.records import (
    TAIL_BYTES_MAX,
    Body,
    Delta,
    Snap,
    SnapWant,
    Sums,
    Vector,
    Want,
    WantKeys,
    WantRow,
    checked_key,
    checked_number,
    checked_value,
    decode_body,
    encode_body,
    keep_tail,
    with_tail,
)

KNOWN: list[tuple[Body, str]] = [
    (Vector("reg", 2, 1, (Row("a", 7, 3, 5),)), "94 a3726567 02 01 91 95 a161 07 03 05 90"),
    (
        Delta("reg", "a", 7, 1, 3, 0, [[b"k", 2, b"v"], [b"old", 3, None]]),
        "97 a3726567 a161 07 01 03 00 92 93 c4016b 02 c40176 93 c4036f6c64 03 c0",
    ),
    (Delta("prefix", "a", 7, 8, 9, 0, [b"x"]), "97 a6707265666978 a161 07 08 09 00 91 c40178"),
    (Want("reg", (WantRow("a", 7, 1, 0),)), "92 a3726567 91 94 a161 07 01 00"),
    (Sums("conf", (1, 2)), "92 a4636f6e66 92 01 02"),
    (WantKeys("conf", 5), "92 a4636f6e66 05"),
    (SnapWant("prefix", "a", 7, None, 1), "95 a6707265666978 a161 07 c0 01"),
    (
        Snap("prefix", "a", 7, None, 1, 9, 6, 0, b"chunk"),
        "99 a6707265666978 a161 07 c0 01 09 06 00 c4056368756e6b",
    ),
]


@pytest.mark.parametrize(("body", "wire"), KNOWN)
def test_the_bytes_of_version_one(body: Body, wire: str) -> None:
    frame = encode_body(body)
    assert frame.body == bytes.fromhex(wire)
    assert decode_body(frame) == body


@pytest.mark.parametrize(("body", "wire"), KNOWN)
def test_a_body_cut_anywhere_is_refused(body: Body, wire: str) -> None:
    frame = encode_body(body)
    for size in range(len(frame.body)):
        with pytest.raises(DecodeError):
            decode_body(Frame(frame.type, frame.body[:size]))


@pytest.mark.parametrize(("body", "wire"), KNOWN)
def test_a_body_with_something_behind_it_is_refused(body: Body, wire: str) -> None:
    frame = encode_body(body)
    with pytest.raises(DecodeError):
        decode_body(Frame(frame.type, frame.body + b"\0"))


@pytest.mark.parametrize(("body", "wire"), KNOWN)
def test_an_array_that_grew_at_its_tail_is_read_as_before(body: Body, wire: str) -> None:
    frame = encode_body(body)
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(frame.body), None, {"later": [1]}])
    assert decode_body(Frame(frame.type, longer)) == body


def test_unknown_types_are_nothing() -> None:
    assert decode_body(Frame(47, b"\xc1")) is None


@pytest.mark.parametrize(
    "body",
    [
        ["reg", 2, 0, [["a", -1, 3, 0, []]]],
        ["reg", 2, 0, [["a" * 129, 1, 3, 0, []]]],
        ["r" * 65, 2, 0, []],
        ["reg", 2, 0, [["a", 1]]],
        ["reg", 2, 0, [["a", 1, 3, 0, [[b"k", 1]]]]],
        ["reg", 2, 0],
        {"namespace": "reg"},
    ],
)
def test_vectors_of_the_wrong_things_are_refused(body: object) -> None:
    with pytest.raises(DecodeError):
        decode_body(Frame(FrameType.VECTOR, msgspec.msgpack.encode(body)))


def test_chunks_and_keys_above_their_caps_are_refused() -> None:
    for key, chunk in ((None, bytes(65537)), (bytes(513), b"")):
        body = msgspec.msgpack.encode(["prefix", "a", 7, key, 1, 9, 6, 0, chunk])
        with pytest.raises(DecodeError):
            decode_body(Frame(FrameType.SNAP, body))


def test_tails_are_kept_up_to_a_bound() -> None:
    assert keep_tail([b"k", 1, b"v"], 3) == b""
    longer = [b"k", 1, b"v", "new", [1]]
    assert with_tail(longer[:3], keep_tail(longer, 3)) == longer
    assert keep_tail([b"k", 1, b"v", bytes(TAIL_BYTES_MAX)], 3) == b""


@pytest.mark.parametrize(
    "check", [lambda: checked_key(b""), lambda: checked_key("text"), lambda: checked_key(bytes(513)),
              lambda: checked_value(5), lambda: checked_value(bytes(65537)), lambda: checked_number(-1),
              lambda: checked_number(True), lambda: checked_number(1.0)]
)  # fmt: skip
def test_fields_of_entries_are_checked(check: object) -> None:
    with pytest.raises(DecodeError):
        check()  # type: ignore[operator]
