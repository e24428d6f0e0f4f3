"""Version vectors: what I know, what you lack."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.digest import Position, Row, compare, fingerprint, sealed_fingerprint

A, B = ("a", 1), ("b", 1)


def test_equal_vectors_have_nothing_to_say() -> None:
    assert compare({A: Position(3, 7)}, [Row("a", 1, 3, 7)]) == ([], [], [])


def test_more_there_is_lacking_here_and_less_there_is_behind() -> None:
    found = compare({A: Position(3), B: Position(3)}, [Row("a", 1, 5), Row("b", 1, 2)])
    assert found.lacking == [Row("a", 1, 5)]
    assert found.behind == [(B, 2)]


def test_what_they_do_not_list_they_have_nothing_of() -> None:
    assert compare({A: Position(3)}, []).behind == [(A, 0)]


def test_what_we_do_not_have_we_lack_even_at_version_zero() -> None:
    assert compare({}, [Row("a", 1, 0)]).lacking == [Row("a", 1, 0)]


def test_lives_of_one_owner_are_sources_of_their_own() -> None:
    found = compare({("a", 1): Position(3)}, [Row("a", 2, 1)])
    assert found.lacking == [Row("a", 2, 1)]
    assert found.behind == [(A, 0)]


def test_other_content_at_one_version_differs_only_where_both_are_checked() -> None:
    assert compare({A: Position(3, 7)}, [Row("a", 1, 3, 8)]).differing == [Row("a", 1, 3, 8)]
    assert compare({A: Position(3, 0)}, [Row("a", 1, 3, 8)]).differing == []
    assert compare({A: Position(3, 7)}, [Row("a", 1, 3, 0)]).differing == []


@given(st.dictionaries(st.binary(min_size=1, max_size=4), st.binary(max_size=4)))
def test_a_fingerprint_does_not_depend_on_the_order(entries: dict[bytes, bytes]) -> None:
    forward = backward = 0
    for key, value in entries.items():
        forward ^= fingerprint(key, value)
    for key, value in reversed(entries.items()):
        backward ^= fingerprint(key, value)
    assert forward == backward


def test_key_and_value_do_not_run_into_each_other() -> None:
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc") != fingerprint(b"a", b"cb")
    assert sealed_fingerprint("a", 1, 5) != sealed_fingerprint("a", 2, 5)
