"""The simulated engine: what it computes, in which order, and that it never loses a block or a slot."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.lab.engine_model import (
    BlocksRemoved,
    BlocksStored,
    EngineFull,
    EngineModel,
    EngineSettings,
    Finished,
    FirstToken,
    Token,
    hash_prompt,
)

SETTINGS = EngineSettings()


def firsts(events):
    return {event.request_id: event for event in events if isinstance(event, FirstToken)}


def drain(engine: EngineModel):
    events = []
    while (at := engine.deadline()) is not None:
        events += engine.advance(at)
    return events


def test_a_lone_prompt_takes_the_seconds_of_the_formula():
    engine = EngineModel()
    engine.submit("a", list(range(1, 5)), 2048, 10, 0.0)
    first = firsts(drain(engine))["a"]
    assert first.at_s == pytest.approx(0.008 + 2048 / 12000 + 2e-9 * 2048 * 1024)
    assert first.cached_tokens == 0


def test_the_same_prompt_again_computes_only_its_last_token():
    engine = EngineModel()
    engine.submit("a", [1, 2, 3, 4], 2048, 1, 0.0)
    drain(engine)
    engine.submit("b", [1, 2, 3, 4], 2048, 1, 10.0)
    assert firsts(drain(engine))["b"].cached_tokens == 2047


def test_a_shared_prefix_is_cached_up_to_the_first_different_block():
    engine = EngineModel()
    engine.submit("a", [1, 2, 3, 4], 2048, 1, 0.0)
    engine.submit("b", [1, 2, 30, 40], 2048, 1, 0.0)
    assert firsts(drain(engine))["b"].cached_tokens == 1024


def test_prefills_are_first_come_first_served_and_do_not_overlap():
    engine = EngineModel()
    for number, name in enumerate("abc"):
        engine.submit(name, [number * 10 + 1], 512, 100, 0.0)
    got = firsts(drain(engine))
    assert got["a"].at_s < got["b"].at_s < got["c"].at_s
    assert got["b"].at_s - got["a"].at_s == pytest.approx(got["b"].prefill_s)


def test_decoding_requests_slow_a_prefill_down():
    engine = EngineModel()
    engine.submit("a", [1], 512, 10_000, 0.0)
    engine.advance(1.0)
    assert engine.decoding == 1
    engine.submit("b", [2], 512, 1, 1.0)
    assert firsts(drain(engine))["b"].prefill_s == pytest.approx(SETTINGS.prefill_s(512, 0) * (1 + 0.5 / 64))


def test_the_answer_ends_after_its_tokens_at_the_rate_of_the_batch():
    engine = EngineModel()
    engine.submit("a", [1], 512, 11, 0.0)
    events = drain(engine)
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.at_s - firsts(events)["a"].at_s == pytest.approx(10 * (0.012 + 0.0003))
    assert engine.output_tokens_total == 11


def test_streamed_tokens_end_at_the_same_time_as_the_unstreamed_answer():
    ends = []
    for emits_tokens in (False, True):
        engine = EngineModel(EngineSettings(emits_tokens=emits_tokens))
        engine.submit("a", [1], 512, 50, 0.0)
        events = drain(engine)
        ends.append(next(event.at_s for event in events if isinstance(event, Finished)))
        if emits_tokens:
            numbers = [event.number for event in events if isinstance(event, Token)]
            assert numbers == list(range(2, 51))
        assert engine.output_tokens_total == 50
    assert ends[0] == pytest.approx(ends[1])


def test_the_least_recently_used_leaf_goes_first_when_the_cache_is_full():
    engine = EngineModel(EngineSettings(cache_blocks=6))
    engine.submit("a", [1, 2], 1024, 1, 0.0)
    drain(engine)
    engine.submit("b", [3, 4], 1024, 1, 10.0)
    drain(engine)
    engine.submit("c", [5, 6], 1024, 1, 20.0)
    drain(engine)
    assert engine.match([1, 2]) == 1  # the leaf went, its parent stayed
    assert engine.match([3, 4]) == 2
    assert engine.match([5, 6]) == 2


def test_blocks_of_running_requests_are_never_evicted():
    engine = EngineModel(EngineSettings(cache_blocks=8))
    engine.submit("long", [1, 2, 3], 1536, 400, 0.0)
    engine.advance(1.0)
    for number in range(20):
        engine.submit(f"short{number}", [100 + number, 200 + number], 1024, 1, 1.0 + number / 10)
    engine.advance(3.0)
    assert engine.running >= 1
    assert engine.match([1, 2, 3]) == 3


def test_a_request_waits_for_memory_while_others_run_and_starts_when_they_end():
    engine = EngineModel(EngineSettings(cache_blocks=4))
    engine.submit("a", [1, 2, 3], 1536, 100, 0.0)
    engine.submit("b", [4, 5, 6], 1536, 1, 0.0)
    events = drain(engine)
    end_of_a = next(e.at_s for e in events if isinstance(e, Finished) and e.request_id == "a")
    assert firsts(events)["b"].at_s == pytest.approx(end_of_a + firsts(events)["b"].prefill_s)


def test_an_aborted_prefill_leaves_no_blocks_that_were_not_computed():
    engine = EngineModel()
    engine.submit("a", [1, 2], 1024, 1, 0.0)
    assert engine.abort("a", 0.01)
    assert engine.match([1, 2]) == 0
    assert engine.used_blocks == 0
    assert not engine.abort("a", 0.02)


def test_aborting_a_waiting_request_lets_the_next_one_start():
    engine = EngineModel(EngineSettings(slots=1))
    engine.submit("a", [1], 512, 1000, 0.0)
    engine.submit("b", [2], 512, 1, 0.0)
    engine.submit("c", [3], 512, 1, 0.0)
    engine.abort("b", 0.5)
    engine.abort("a", 0.5)
    assert set(firsts(drain(engine))) == {"a", "c"}


def test_flush_forgets_idle_blocks_only():
    engine = EngineModel()
    engine.submit("a", [1], 512, 1, 0.0)
    drain(engine)
    engine.submit("b", [2], 512, 1000, 10.0)
    engine.advance(11.0)
    assert engine.flush(11.0) == 1
    assert engine.match([1]) == 0
    assert engine.match([2]) == 1


def test_the_queue_has_a_bound_and_a_refusal_changes_nothing():
    engine = EngineModel(EngineSettings(slots=1, waiting_max=1))
    engine.submit("a", [1], 512, 1, 0.0)
    engine.submit("b", [2], 512, 1, 0.0)
    with pytest.raises(EngineFull):
        engine.submit("c", [3], 512, 1, 0.0)
    assert engine.waiting == 1
    with pytest.raises(ValueError):
        engine.submit("a", [1], 512, 1, 0.0)


def test_block_events_replayed_give_the_cache():
    engine = EngineModel(EngineSettings(cache_blocks=20, emits_blocks=True))
    rng = Random(3)
    held: set[int] = set()
    for number in range(200):
        family = rng.randrange(6)
        blocks = [family * 100 + i for i in range(rng.randrange(1, 8))]
        engine.submit(str(number), blocks, len(blocks) * 512, rng.randrange(1, 40), number * 0.1)
    for event in drain(engine):
        if isinstance(event, BlocksStored):
            held.update(event.hashes)
        elif isinstance(event, BlocksRemoved):
            assert held.issuperset(event.hashes)
            held.difference_update(event.hashes)
    assert held == {
        family * 100 + i for family in range(6) for i in range(8) if engine.match([family * 100 + i])
    }
    assert len(held) <= 20


def test_the_backlog_counts_siblings_in_the_queue_once():
    engine = EngineModel()
    engine.submit("running", [9], 512, 1, 0.0)
    for number in range(4):
        engine.submit(f"sibling{number}", list(range(20, 40)), 10_240, 1, 0.0)
    assert engine.waiting_uncached_tokens == 10_240 + 3
    expected = SETTINGS.prefill_s(512, 0) + SETTINGS.prefill_s(10_240, 0) + 3 * SETTINGS.prefill_s(1, 10_239)
    assert engine.backlog_s(0.0) == pytest.approx(expected)


def test_equal_prompts_hash_equal_and_a_changed_block_changes_all_that_follow():
    text = "x" * 1000 + "y" * 1000
    hashes = hash_prompt(text, 256)
    assert hashes == hash_prompt(text.encode(), 256)
    assert len(hashes) == 7  # the last, half full block does not count
    other = hash_prompt(text[:600] + "z" + text[601:], 256)
    assert other[:2] == hashes[:2]
    assert not set(other[2:]) & set(hashes[2:])
    assert not set(hash_prompt(text, 256, seed=1)) & set(hashes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_after_any_mix_of_submits_and_aborts_everything_is_given_back(seed, emits_tokens):
    rng = Random(seed)
    engine = EngineModel(EngineSettings(cache_blocks=30, slots=4, emits_tokens=emits_tokens))
    now, alive, first, ended, aborted = 0.0, [], set(), set(), set()
    last = 0.0
    for number in range(60):
        now += rng.random() * 0.3
        for event in engine.advance(now):
            assert last <= event.at_s <= now
            last = event.at_s
            if isinstance(event, FirstToken):
                first.add(event.request_id)
            elif isinstance(event, Finished):
                ended.add(event.request_id)
        if rng.random() < 0.3 and alive:
            victim = alive.pop(rng.randrange(len(alive)))
            if engine.abort(victim, now):
                aborted.add(victim)
        else:
            blocks = [rng.randrange(3) * 50 + i for i in range(rng.randrange(1, 10))]
            engine.submit(
                str(number), blocks, len(blocks) * 512 - rng.randrange(400), rng.randrange(1, 60), now
            )
            alive.append(str(number))
        assert engine.running <= 4
        assert engine.cached_blocks <= 30 or engine.running == 1
    for event in drain(engine):
        if isinstance(event, Finished):
            ended.add(event.request_id)
    assert engine.running == engine.waiting == engine.decoding == engine.used_blocks == 0
    assert engine.waiting_uncached_tokens == 0
    assert engine.backlog_s(now) == 0.0
    assert not ended & aborted
    assert engine.finished_total == len(ended)
