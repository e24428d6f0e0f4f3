"""Both sides count the same deltas; what is lost is seen, what comes twice is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smg.bridge.announced import Announced

REFS = st.sampled_from([b"worker-1", b"worker-2", b"worker-3"])
NEWS = st.lists(st.tuples(REFS, st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)), max_size=4)
DELTAS = st.lists(st.tuples(NEWS, st.lists(REFS, max_size=1)), max_size=12)


def told(deltas, order) -> dict[bytes, tuple[int, int]]:
    books = Announced()
    for number in order:
        news, flushed = deltas[number]
        books.add(number + 1, news, flushed)
    return {ref: (blocks, xor) for ref, blocks, xor in books.fingerprints()}


@given(DELTAS, st.randoms())
def test_deltas_that_come_twice_count_once(deltas, random) -> None:
    order = list(range(len(deltas)))
    # The mesh may deliver a range again, in order, after a snapshot.
    again = order[:]
    if order:
        back = random.randrange(len(order))
        again = order[: len(order)] + order[back:]
    assert told(deltas, order) == told(deltas, again)


@given(DELTAS)
def test_a_lost_delta_changes_the_fingerprint(deltas) -> None:
    order = list(range(len(deltas)))
    whole = told(deltas, order)
    for lost in order:
        news, flushed = deltas[lost]
        later = [number for number in order if number > lost]
        if flushed or not news or any(deltas[number][1] for number in later):
            continue  # what a later flush forgets cannot be missed
        assert told(deltas, [number for number in order if number != lost]) != whole


def test_a_snapshot_replaces_what_was_known() -> None:
    books = Announced()
    books.add(1, [(b"w", [1, 2])], [])
    books.add(2, [(b"v", [3])], [])
    books.begin(9, [(b"w", 5, 7)], None)
    assert list(books.fingerprints()) == [(b"w", 5, 7)]
    books.add(9, [(b"w", [1])], [])  # the snapshot held it
    assert list(books.fingerprints()) == [(b"w", 5, 7)]
    books.add(10, [(b"w", [1])], [])
    assert list(books.fingerprints()) == [(b"w", 6, 6)]


def test_a_snapshot_of_one_worker_leaves_the_others_alone() -> None:
    books = Announced()
    books.add(1, [(b"w", [1]), (b"v", [3])], [])
    books.begin(5, [(b"w", 2, 9), (b"v", 8, 8)], b"w")
    assert {ref: (blocks, xor) for ref, blocks, xor in books.fingerprints()} == {
        b"w": (2, 9),
        b"v": (1, 3),
    }


def test_a_flush_begins_at_nothing() -> None:
    books = Announced()
    books.add(1, [(b"w", [1, 2])], [])
    books.add(2, [(b"w", [4])], [b"w"])
    assert list(books.fingerprints()) == [(b"w", 1, 4)]
    assert books.rows(b"w") == ((b"w", 1, 4),)
    assert books.rows(b"v") == ()
