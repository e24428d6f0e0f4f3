"""The ring of a stream."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.stream_log import ITEM_BYTES, StreamLog


def filled(count: int) -> StreamLog:
    log = StreamLog("a", 1)
    for number in range(1, count + 1):
        log.append(b"%d" % number, is_kept=True)
    return log


def test_payloads_are_numbered_from_one() -> None:
    log = filled(3)
    assert (log.first, log.have) == (1, 3)
    assert log.after(0, 10**6) == [b"1", b"2", b"3"]
    assert log.after(2, 10**6) == [b"3"]
    assert log.after(3, 10**6) == []


def test_an_empty_ring_begins_behind_its_end() -> None:
    assert StreamLog("a", 1).first == 1
    log = filled(3)
    log.jump(10)
    assert (log.first, log.have, log.bytes) == (11, 10, 0)


def test_at_least_one_payload_is_taken_and_then_what_fits() -> None:
    log = filled(9)
    assert log.after(0, 1) == [b"1"]
    assert log.after(0, 2 * (ITEM_BYTES + 1)) == [b"1", b"2"]


def test_what_is_not_kept_only_counts() -> None:
    log = filled(3)
    log.append(b"x", is_kept=False)
    assert (log.first, log.have, log.bytes) == (5, 4, 0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 400)), max_size=60))
def test_trimming_keeps_the_newest_and_the_account(steps: list[tuple[int, int]]) -> None:
    log = StreamLog("a", 1)
    model: list[bytes] = []
    first = 1
    for size, cap in steps:
        log.append(bytes(size), is_kept=True)
        model.append(bytes(size))
        log.trim(cap)
        while sum(len(item) + ITEM_BYTES for item in model) > cap:
            del model[0]
            first += 1
        assert log.bytes == sum(len(item) + ITEM_BYTES for item in model)
        assert log.first == first
        assert log.after(first - 1, 10**9) == model


def test_a_payload_with_unknown_elements_counts_them() -> None:
    assert StreamLog.item_bytes((b"abc", b"tail")) > StreamLog.item_bytes(b"abctail")
