"""What nodes say survives the way, grows at its tail, and is never taken for what it is not."""

from __future__ import annotations

import math
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.bridge import words
from smg.bridge.words import VERSION
from smg.fleet.worker import WorkerSpec, worker_id
from smg.tenancy.usage import Row

SPEC = WorkerSpec(url="http://w:1", model_id="m", labels={"a": "b"}, api_key="k", priority=60)
REF = b"12345678"
WORDS = [
    (words.read_parameters, words.Parameters(VERSION, 512, 128, 2**64 - 1, "1.0")),
    (words.read_listing, words.Listing(VERSION, words.API, 12.5, SPEC)),
    (words.read_listing, words.Listing(VERSION, words.ADOPTED, 12.5, SPEC, "gone")),
    (words.read_order, words.Order(VERSION, words.DELETED, "http://w:1", 12.5, "a")),
    (words.read_order, words.Order(VERSION, words.EDITED, "http://w:1", 12.5, "a", SPEC)),
    (words.read_observation, words.Observation(VERSION, words.FAILS)),
    (words.read_burden, words.Burden(VERSION, ((REF, 3, 1200), (REF, 0, 0)))),
    (words.read_engine_load, words.EngineLoad(VERSION, 3, 1, 2, None, 5, 0.5, None, 2.0, None, 9)),
    (words.read_sticky_key, words.StickyKey(VERSION, REF, 1e9)),
    (words.read_told, words.Told(VERSION, b"x" * 16, 0.5, 7)),
    (words.read_told, words.Told(VERSION)),
    (words.read_question, words.Asked(VERSION, words.PLACEMENT, True, "m", 500, 128.5, None, 2000, b"")),
    (words.read_question, words.AskedChains(VERSION, words.CHAINS, ((REF, 2**64 - 1),))),
    (words.read_question, words.AskedPage(VERSION, words.PAGE, REF, 3)),
    (words.read_question, words.AskedUsage(VERSION, words.USAGE, 7, "auth:a", None)),
    (words.read_usage_page, words.UsagePage(VERSION, 1.7e9, (Row("t", "m", 1, 2, 3, 4, 5),), 8, True)),
]
ITEMS = [
    words.Placed(REF, 7, 2**64 - 1, 12.5, 30, words.pack_hashes([1, 2**64 - 1]), 9),
    words.Flushed(REF),
    words.Trunk(words.pack_trunk([(5, 8), (2**64 - 1, 70_000)])),
    words.Run(REF, ((0, words.pack_hashes([1, 2])), (2, words.pack_hashes([3])))),
    words.Basis(4, ((REF, 10, 2**63),)),
    words.Gone(REF),
]


@pytest.mark.parametrize(("read", "word"), WORDS)
def test_a_word_survives_the_way(read, word):
    assert read(words.encode(word)) == word


@pytest.mark.parametrize(("read", "word"), WORDS)
def test_a_word_may_have_grown_at_its_tail(read, word):
    parts = msgspec.msgpack.decode(words.encode(word))
    assert read(msgspec.msgpack.encode([*parts, "new", {"and": 1}])) == word


@pytest.mark.parametrize(("read", "word"), WORDS)
def test_a_word_of_another_version_is_no_word(read, word):
    parts = msgspec.msgpack.decode(words.encode(word))
    assert read(msgspec.msgpack.encode([VERSION + 1, *parts[1:]])) is None


@pytest.mark.parametrize(("read", "word"), WORDS)
def test_mutilated_words_raise_nothing(read, word):
    rng = Random(len(words.encode(word)))
    data = words.encode(word)
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        read(bytes(mutated[: rng.randrange(len(mutated) + 1)]))


@given(st.binary(max_size=200))
def test_garbage_raises_nothing(data: bytes):
    for read, _ in WORDS:
        read(data)
    items, unknown = words.read_batch(data)
    assert unknown == 1 or items == []
    assert words.unpack_hashes(data) == words.unpack_hashes(data[: len(data) // 8 * 8])
    assert len(words.unpack_trunk(data)) == len(data) // words.TRUNK_BYTES
    words.id_of_key(data)


def test_items_travel_together_and_in_order():
    items, unknown = words.read_batch(words.batch(ITEMS))
    assert (items, unknown) == (ITEMS, 0)


def test_an_item_of_an_unknown_kind_is_skipped_and_counted():
    raw = [msgspec.msgpack.encode(item) for item in ITEMS]
    raw.insert(2, msgspec.msgpack.encode([99, "from the future"]))
    data = msgspec.msgpack.encode([VERSION, [msgspec.Raw(each) for each in raw]])
    assert words.read_batch(data) == (ITEMS, 1)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_poison_arithmetic_are_refused(number: float):
    placed = words.Placed(REF, 7, 0, number, 0, b"")
    assert words.read_batch(words.batch([placed])) == ([], 1)
    assert words.read_told(words.encode(words.Told(VERSION, b"", number))) is None
    assert words.read_sticky_key(words.encode(words.StickyKey(VERSION, REF, number))) is None
    asked = words.Asked(VERSION, words.PLACEMENT, True, "m", 500, number, None, 2000, b"")
    assert words.read_question(words.encode(asked)) is None
    load = words.EngineLoad(VERSION, 3, 1, 2, None, 5, None, None, None, number)
    assert words.read_engine_load(words.encode(load)) is None


def test_a_negative_prefill_is_refused():
    assert words.read_batch(words.batch([words.Placed(REF, 7, 0, -1.0, 0, b"")])) == ([], 1)


def test_an_edit_needs_a_specification():
    assert words.read_order(words.encode(words.Order(VERSION, words.EDITED, "http://w:1", 1.0, "a"))) is None
    assert words.read_order(words.encode(words.Order(VERSION, 9, "http://w:1", 1.0, "a"))) is None


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_hashes_survive_the_way(hashes: list[int]):
    assert words.unpack_hashes(words.pack_hashes(hashes)) == tuple(hashes)


def test_counters_of_a_trunk_are_capped():
    assert words.unpack_trunk(words.pack_trunk([(5, 70_000)])) == [(5, words.CHILDREN_MAX)]


def test_ids_and_their_short_forms():
    one = worker_id("http://w:1")
    assert words.id_of_key(words.worker_key(one)) == one
    assert words.worker_ref(one) == words.worker_key(one)[:8]
    assert words.id_of_key(b"short") == ""


def test_a_new_prefix_costs_about_thirty_bytes_and_eight_a_block():
    small = words.Placed(REF, 2**32 - 1, 2**63, 55.5, 40, words.pack_hashes([2**63]))
    large = words.Placed(REF, 2**32 - 1, 2**63, 55.5, 40, words.pack_hashes([2**63] * 18))
    assert len(words.encode(small)) <= 48
    assert len(words.encode(large)) - len(words.encode(small)) == 17 * 8
