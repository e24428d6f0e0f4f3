"""The engines' own words about their caches: every documented form is read, and nothing else is believed."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.fleet.kv_events import (
    Batch,
    Cleared,
    KvEventError,
    Removed,
    Sequence,
    Stored,
    Verdict,
    decode,
    number_of,
    replay_request,
    split,
)

pack = msgspec.msgpack.encode


def stored_row(form: str, **changes):
    fields = {
        "block_hashes": [11, 12],
        "parent_block_hash": 10,
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": None,
        "group_idx": None,
        **changes,
    }
    if form == "map":
        return {"type": "BlockStored", **fields}
    return ["BlockStored", *fields.values()]


def batch(form: str, rows, rank=0) -> bytes:
    if form == "map":
        return pack({"ts": 5.5, "events": rows, "data_parallel_rank": rank})
    return pack([5.5, rows, rank])


def only(payload: bytes):
    events = decode(payload).events
    assert len(events) == 1
    return events[0]


@pytest.mark.parametrize("form", ["array", "map"])
def test_both_forms_of_a_batch_say_the_same(form):
    removed = {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}
    cleared = {"type": "AllBlocksCleared"}
    rows = [stored_row(form), removed, cleared]
    if form == "array":
        rows[1:] = [["BlockRemoved", [7], "GPU"], ["AllBlocksCleared"]]
    assert decode(batch(form, rows)) == Batch(
        5.5, (Stored((11, 12), 10, (1, 2, 3, 4), 2), Removed((7,)), Cleared()), 0
    )


def test_the_short_arrays_of_sglang_are_read():
    told = decode(pack([1.0, [["BlockStored", [-5], None, [9, 8], 2, None], ["BlockRemoved", [-5]]]]))
    assert told == Batch(1.0, (Stored((-5,), None, (9, 8), 2), Removed((-5,))), None)


def test_digests_may_be_names_of_blocks():
    event = only(batch("array", [stored_row("array", block_hashes=[b"\x01" * 32, b"\x02" * 32])]))
    assert event.hashes == (b"\x01" * 32, b"\x02" * 32)


@pytest.mark.parametrize("form", ["array", "map"])
def test_later_fields_and_unknown_kinds_are_passed_over(form):
    later = {"type": "BlockMoved", "from": 1} if form == "map" else ["BlockMoved", 1]
    row = stored_row(form)
    if form == "map":
        row["colour"] = "green"
    else:
        row += ["full_attention", None, "green"]
    assert decode(batch(form, [later, row])).events == (Stored((11, 12), 10, (1, 2, 3, 4), 2),)


def test_an_adapter_is_told_by_name_or_by_number():
    assert only(batch("map", [stored_row("map", lora_id=3, lora_name="sql")])).adapter == "sql"
    assert only(batch("map", [stored_row("map", lora_id=3)])).adapter == "3"
    named = only(batch("map", [stored_row("map", lora_name="sql", extra_keys=[["sql"], ["sql"]], lora_id=3)]))
    assert named.is_plain


@pytest.mark.parametrize("keys", [[["salt"], None], [["image", 3], None], [[["image", 3]], None], [5, None]])
def test_blocks_of_salted_or_pictured_prompts_are_told_apart(keys):
    event = only(batch("map", [stored_row("map", extra_keys=keys)]))
    assert not event.is_plain and event.tokens == ()


def test_pairs_of_tokens_are_no_prompt():
    assert not only(batch("map", [stored_row("map", token_ids=[[1, 2], [2, 3], [3, 4], [4, 5]])])).is_plain
    assert not only(batch("map", [stored_row("map", token_ids=[1, 2, 3])])).is_plain


@pytest.mark.parametrize("changes", [{"medium": "CPU"}, {"group_idx": 1}, {"medium": 5}, {"medium": ["GPU"]}])
def test_blocks_elsewhere_than_in_the_accelerators_first_cache_are_not_resident(changes):
    assert not only(batch("map", [stored_row("map", **changes)])).is_resident


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        pack(5),
        pack([1.0]),
        pack(["now", []]),
        pack([1.0, {}]),
        pack({"ts": 1.0}),
        pack([1.0, [5]]),
        pack([1.0, [[]]]),
        pack([1.0, [[5, 6]]]),
        pack([1.0, [["BlockRemoved", 5]]]),
        pack([1.0, [["BlockRemoved", [1.5]]]]),
        pack([1.0, [["BlockStored", [1], 1.5, [1], 1]]]),
        pack([1.0, [["BlockStored", [1], None, [1], 0]]]),
        pack([1.0, [["BlockStored", [1], None, "abc", 1]]]),
        b"\x91" * 5_000 + b"\x90",
    ],
)
def test_what_is_not_understood_is_refused(payload):
    with pytest.raises(KvEventError):
        decode(payload)


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(payload):
    try:
        assert isinstance(decode(payload), Batch)
    except KvEventError:
        pass


words = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(
            st.sampled_from(
                ["ts", "events", "type", "block_hashes", "token_ids", "block_size", "extra_keys"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(
    words, st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]), st.lists(words, max_size=9)
)
def test_any_msgpack_is_decoded_or_refused(word, kind, fields):
    for payload in (pack(word), pack([1.0, [[kind, *fields]]]), pack([1.0, [word]])):
        try:
            assert isinstance(decode(payload), Batch)
        except KvEventError:
            pass


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=60)
def test_a_flipped_bit_is_noticed_or_harmless(seed, flips):
    rng = Random(seed)
    payload = bytearray(batch("array", [stored_row("array"), ["BlockRemoved", [7], "GPU"]]))
    for _ in range(flips):
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    try:
        decode(bytes(payload))
    except KvEventError:
        pass


def test_a_long_event_is_split_without_a_change():
    event = Stored(tuple(range(1, 11)), 99, tuple(range(20)), 2)
    parts = split(event, 4)
    assert [len(part.hashes) for part in parts] == [4, 4, 2]
    assert [part.parent for part in parts] == [99, 4, 8]
    assert sum((part.tokens for part in parts), ()) == event.tokens
    assert split(Removed((1, 2, 3)), 2) == [Removed((1, 2)), Removed((3,))]
    assert split(Cleared(), 1) == [Cleared()]


# -- order -------------------------------------------------------------------------------------


def test_messages_in_order_are_next():
    order = Sequence()
    assert [order.judge(number, b"x%d" % number) for number in range(4)] == [Verdict.NEXT] * 4


def test_a_missing_message_is_a_gap_until_it_was_replayed():
    order = Sequence()
    order.judge(0, b"a")
    assert order.judge(3, b"d") is Verdict.GAP
    assert order.judge(3, b"d") is Verdict.GAP
    assert order.expected == 1
    assert order.replayed(1) and order.replayed(2)
    assert order.judge(3, b"d") is Verdict.NEXT


def test_a_gap_may_be_given_up():
    order = Sequence()
    assert order.judge(7, b"h") is Verdict.GAP
    order.skip_to(7)
    assert order.judge(7, b"h") is Verdict.NEXT
    assert order.judge(8, b"i") is Verdict.NEXT


def test_what_a_replay_brought_is_not_taken_twice():
    order = Sequence()
    order.judge(0, b"a")
    for number in (1, 2, 3):
        assert order.replayed(number)
    assert not order.replayed(3)
    assert not order.replayed(9)
    assert order.judge(2, b"c") is Verdict.REPEATED
    assert order.judge(3, b"d") is Verdict.REPEATED
    assert order.judge(4, b"e") is Verdict.NEXT


def test_the_same_message_twice_is_passed_over():
    order = Sequence()
    order.judge(0, b"a")
    assert order.judge(0, b"a") is Verdict.REPEATED
    assert order.judge(1, b"b") is Verdict.NEXT


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_number_that_is_not_above_the_last_tells_of_a_new_process(number):
    order = Sequence()
    for known in range(6):
        order.judge(known, b"old%d" % known)
    assert order.judge(number, b"new") is Verdict.RESTART
    assert order.expected == 0
    assert order.judge(number, b"new") is (Verdict.NEXT if number == 0 else Verdict.GAP)


def test_numbers_have_eight_bytes():
    assert number_of(replay_request(2**40)) == 2**40
    for part in (b"", b"\0" * 7, b"\0" * 9):
        with pytest.raises(KvEventError):
            number_of(part)
