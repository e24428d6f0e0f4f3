"""UP-2: only the value concerned changes, every other byte stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.wire.json_splice import insert_members, quoted, replace_member

NAMES = st.one_of(
    st.sampled_from(["model", "stream", "data_parallel_rank", "a", 'mo"del', "\u00e9"]), st.text(max_size=6)
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=12),
    st.sampled_from(['"model"', '{"model":1}', "},{", "\\"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=12,
)
SPACE = st.sampled_from(["", " ", "\n  ", "\t", "\r\n"])


def spelled(text: str, escape: bool, ascii_only: bool) -> str:
    if escape and text:
        return '"' + "".join(f"\\u{ord(char):04x}" if ord(char) < 0x10000 else char for char in text) + '"'
    return json.dumps(text, ensure_ascii=ascii_only)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[tuple[str, str, str, str, str]], str]:
    """Pieces of an object: (before key, key as spelled, around colon, value, after value), with its names."""
    pieces = []
    for _ in range(draw(st.integers(0, 5))):
        name = draw(NAMES)
        key = spelled(name, draw(st.booleans()), draw(st.booleans()))
        value = json.dumps(
            draw(VALUES), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
        )
        pieces.append((draw(SPACE) + key + draw(SPACE) + ":" + draw(SPACE), name, value, draw(SPACE), ""))
    return pieces, draw(SPACE)


def written(pieces: list[Any], space: str, name: str | None = None, value: str = "") -> bytes:
    members = [head + (value if found == name else old) + after for head, found, old, after, _ in pieces]
    return (space + "{" + ",".join(members) + space + "}" + space).encode("utf-8", "surrogatepass")


def is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(documents(), NAMES, VALUES)
def test_a_replaced_member_changes_and_every_other_byte_stays(
    document: tuple[list[Any], str], name: str, value: Any
) -> None:
    pieces, space = document
    body = written(pieces, space)
    new = json.dumps(value)
    expected = written(pieces, space, name, new)
    assert replace_member(body, name, new.encode()) == expected
    if name in [piece[1] for piece in pieces]:
        assert replace_member(body, name, new.encode(), is_present=True) == expected
        assert json.loads(expected)[name] == value


@given(documents(), st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
def test_inserted_members_are_read_back_and_the_rest_is_equal(
    document: tuple[list[Any], str], members: dict[str, Any]
) -> None:
    pieces, space = document
    body = written(pieces, space)
    result = insert_members(body, {name: json.dumps(value).encode() for name, value in members.items()})
    assert json.loads(result) == {**json.loads(body), **members}
    present = {piece[1] for piece in pieces}
    if not present & members.keys():
        start = body.index(b"{") + 1
        assert result.startswith(body[:start])
        assert result.endswith(body[start:])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"b"}'),
        (b'{ "x":{"model":1}, "model" : "a" }', b'{ "x":{"model":1}, "model" : "b" }'),
        (b'{"model":"a","model":"c"}', b'{"model":"b","model":"b"}'),
        (b'{"\\u006dodel":"a","x":"\\"model\\":1"}', b'{"\\u006dodel":"b","x":"\\"model\\":1"}'),
        (b'{"x":"model","model":null}', b'{"x":"model","model":"b"}'),
        (b'{"model":{"a":[1,"}"]},"n":1.50}', b'{"model":"b","n":1.50}'),
        (b'{"x":"\\\\","model":"a"}', b'{"x":"\\\\","model":"b"}'),
    ],
)
def test_up_2_the_alias_of_a_model_is_replaced_in_place(body: bytes, expected: bytes) -> None:
    assert replace_member(body, "model", b'"b"', is_present=True) == expected
    assert replace_member(body, "model", b'"b"') == expected


def test_up_2_a_missing_member_is_put_in_front() -> None:
    assert insert_members(b'{"a":1}', {"r": b"3", "s": b'"x"'}) == b'{"r":3,"s":"x","a":1}'
    assert insert_members(b" { } ", {"r": b"3"}) == b' {"r":3 } '


def test_a_member_of_the_client_gives_way_to_ours() -> None:
    assert insert_members(b'{"r":7,"a":1}', {"r": b"3"}) == b'{"r":3,"a":1}'


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"x"', b"{", b'{"a"', b'{"a" 1}', b'{"a":', b'{"a":[1', b'{"a":"']
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        replace_member(body, "model", b"1")


@given(st.binary(max_size=60))
def test_garbage_gives_bytes_or_value_error(body: bytes) -> None:
    try:
        assert isinstance(replace_member(body, "model", b"1"), bytes)
        assert isinstance(insert_members(body, {"model": b"1"}), bytes)
    except ValueError:
        pass


@given(st.text())
def test_a_quoted_text_is_read_back(text: str) -> None:
    assert json.loads(quoted(text)) == text
