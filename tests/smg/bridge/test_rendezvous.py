"""All nodes name the same one, and one more or less moves only its own share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smg.bridge import rendezvous

NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@given(st.binary(max_size=16), NAMES, st.randoms())
def test_the_order_of_the_names_does_not_matter(key: bytes, names: list[str], random) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)
    assert rendezvous.first(key, names) == rendezvous.first(key, shuffled) == rendezvous.ranked(key, names)[0]


@given(st.binary(max_size=16), NAMES)
def test_who_leaves_moves_only_what_was_its_own(key: bytes, names: list[str]) -> None:
    owner = rendezvous.first(key, names)
    for name in names:
        rest = [other for other in names if other != name]
        if rest and name != owner:
            assert rendezvous.first(key, rest) == owner
        elif rest:
            assert rendezvous.first(key, rest) == rendezvous.ranked(key, names)[1]


def test_keys_spread_over_the_nodes() -> None:
    names = [f"node-{number}" for number in range(8)]
    owned = dict.fromkeys(names, 0)
    for number in range(8_000):
        owned[rendezvous.first(number.to_bytes(8, "big"), names) or ""] += 1
    assert all(850 < count < 1_150 for count in owned.values())


def test_nobody_owns_anything_where_nobody_is() -> None:
    assert rendezvous.first(b"key", []) is None
