"""`cache_aware`: the cheapest in seconds; what it explains is what it does; nobody owns what was taken away."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.api.call import Call
from smg.api.endpoints import GENERATE
from smg.fleet.block_hashes import BlockHasher
from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.service_model import CacheCapacity, PrefillModels
from smg.fleet.worker import Worker, WorkerSpec
from smg.policies.cache_aware import NO_CACHE_S, CacheAware, CacheAwareSettings
from smg.policies.price import FLEET_MAX
from smg.policies.threshold import ThresholdRule
from tests.smg.fleet.builders import registry, reported, url_of, workers_of
from tests.smg.policies.site import Site, call, text_of

# -- the choice --------------------------------------------------------------------------------


def test_the_next_turn_goes_where_the_last_one_went():
    site = Site(workers_of(8))
    history = text_of(1, 20)
    first = site.serve(history)
    for turn in range(5):
        history += text_of(100 + turn, 2)
        assert site.serve(history) is first


def test_unknown_prompts_spread_over_idle_workers():
    site = Site(workers_of(4))
    used = {site.serve(text_of(seed, 4), after_s=60.0).order for seed in range(60)}
    assert used == {0, 1, 2, 3}


def test_a_burst_of_unknown_prompts_is_dealt_evenly_before_any_answer():
    site = Site(workers_of(4))
    for seed in range(40):
        site.send(text_of(seed, 20))
    assert {worker.in_flight for worker in site.workers} == {10}


def test_a_holder_that_is_too_busy_is_left_for_an_idle_worker():
    site = Site(workers_of(2))
    history = text_of(1, 10)
    holder = site.serve(history)
    assert site.chosen(history) is holder
    for seed in range(30):
        site.send(text_of(1000 + seed, 100), to=holder)
    assert site.chosen(history) is not holder


def test_a_long_prefix_is_worth_a_longer_wait_than_a_short_one():
    def others_until_it_moves(blocks: int) -> int:
        site = Site(workers_of(2))
        history = text_of(1, blocks)
        holder = site.serve(history)
        for sent in range(500):
            if site.chosen(history) is not holder:
                return sent
            site.send(text_of(2000 + sent, 20), to=holder)
        return 500

    assert others_until_it_moves(10) < others_until_it_moves(100) < 500


def test_waiting_drains_with_time_and_with_first_bytes():
    site = Site(workers_of(1))
    asked, worker = site.send(text_of(1, 200))
    first = site.rows("x")[worker.id].wait
    assert first > 1.0
    site.now += 0.5
    assert site.rows("x")[worker.id].wait == pytest.approx(first - 0.5)
    site.policy.first_byte(asked, worker, 0.6, site.now)
    assert site.rows("x")[worker.id].wait == 0.0


def test_a_stream_that_is_late_still_counts_as_being_prefilled():
    site = Site(workers_of(1))
    site.send(text_of(1, 50))
    second, worker = site.send(text_of(2, 50))
    site.now += 1000.0
    waits = site.rows("x")[worker.id].wait
    assert waits == pytest.approx(site.policy._prices.accounts[worker.id].placed[id(second)].seconds)


def test_plain_requests_are_taken_to_be_prefilled_in_their_time():
    site = Site(workers_of(1))
    for seed in range(3):
        site.send(text_of(seed, 50), is_stream=False)
    worker = site.workers[0]
    before = site.rows("x")[worker.id].wait
    site.now += before / 2
    assert site.rows("x")[worker.id].wait == pytest.approx(before / 2)
    site.now += before
    assert site.rows("x")[worker.id].wait == 0.0


def test_priority_breaks_ties_and_cost_multiplies():
    built = registry()
    specs: list[dict[str, Any]] = [{"priority": 50}, {"priority": 60}, {"priority": 60, "cost": 1.5}]
    workers = tuple(
        built.add(WorkerSpec(url_of(number), model_id="m", **fields), 0.0)
        for number, fields in enumerate(specs)
    )
    assert {Site(workers, seed=seed).chosen(text_of(1, 5)).order for seed in range(20)} == {1}


def test_others_requests_in_a_report_count_and_age():
    site = Site(workers_of(2))
    busy = site.workers[0]
    reported(busy, site.now, running=5, waiting=4, waiting_tokens=48_000)
    reported(site.workers[1], site.now)
    waited = site.rows("x")[busy.id].wait
    assert waited > 4.0
    site.now += 2.0
    assert site.rows("x")[busy.id].wait == pytest.approx(waited - 2.0)
    assert site.chosen(text_of(1, 4)) is site.workers[1]


def test_a_report_of_our_own_requests_adds_nothing_to_our_own_account():
    site = Site(workers_of(1))
    worker = site.workers[0]
    for seed in range(4):
        site.send(text_of(seed, 40))
    before = site.rows("x")[worker.id].wait
    reported(worker, site.now, running=1, waiting=3, waiting_tokens=90_000)
    assert site.rows("x")[worker.id].wait == pytest.approx(before)


def test_what_an_old_report_told_drains_and_is_not_told_again():
    site = Site(workers_of(1))
    worker = site.workers[0]
    reported(worker, site.now, until_s=site.now + 0.75, running=5, waiting=9, waiting_tokens=90_000)
    told = site.rows("x")[worker.id].wait
    assert told > 1.0
    site.now += 1.0
    assert site.rows("x")[worker.id].wait == pytest.approx(told - 1.0)
    site.now += 100.0
    assert site.rows("x")[worker.id].wait == 0.0


def test_a_full_cache_costs_the_end_of_a_running_answer_unless_the_prompt_fits():
    site = Site(workers_of(2))
    reported(site.workers[0], site.now, running=0, kv_usage=0.99, kv_capacity_tokens=100_000)
    reported(site.workers[1], site.now, running=0, kv_usage=0.90, kv_capacity_tokens=100_000)
    rows = site.rows(text_of(1, 50))
    assert rows[site.workers[0].id].wait > 1.0
    assert rows[site.workers[1].id].wait == 0.0
    assert site.rows("short")[site.workers[0].id].wait == 0.0


def test_a_busier_fleet_pays_more_for_a_hit():
    idle, busy = Site(workers_of(2)), Site(workers_of(2))
    for seed in range(60):
        busy.answer(*busy.send(text_of(seed, 100)), after_s=0.9)
    prompt = text_of(999, 40)
    cheap = idle.rows(prompt)[idle.workers[0].id].prefill / PrefillModels().get("m").seconds(5120, 0)
    dear = busy.rows(prompt)[busy.workers[0].id].prefill / busy.policy._fits.get("m").seconds(5120, 0)
    assert dear > 1.5 * cheap


def test_the_pace_is_learned_also_from_answers_that_tell_no_usage():
    site = Site(workers_of(1))
    fit = site.policy._fits.get("m")
    before = fit.seconds(10_000, 0)
    for seed in range(40):
        site.answer(*site.send(text_of(seed, 80)), after_s=0.05)  # 80 blocks: about 10,000 tokens
    assert fit.seconds(10_000, 0) == pytest.approx(0.05, rel=0.2) != before


def test_a_fit_that_is_much_too_slow_is_corrected_also_where_peers_never_leave_a_worker_idle():
    site = Site(workers_of(1))
    worker = site.workers[0]
    fit = site.policy._fits.get("m")
    before = fit.seconds(10_000, 0)
    for seed in range(60):
        sent = site.send(text_of(seed, 80))
        site.policy._prices.account(worker).peer_placed(
            before, site.now
        )  # by this fit, there is always something left
        site.answer(*sent, after_s=0.05)
    assert fit.seconds(10_000, 0) < 0.2 * before


def test_an_answer_without_usage_teaches_nothing_where_something_may_have_been_cached():
    site = Site(workers_of(1))
    history = text_of(1, 80)
    site.serve(history, prompt_tokens=10_000, cached_tokens=0)
    fit = site.policy._fits.get("m")
    before = fit.observations
    site.serve(history)
    assert fit.observations == before


def test_more_than_the_told_cache_is_claimed_until_an_answer_tells_what_was_cached():
    site = Site(workers_of(1))
    worker = site.workers[0]
    reported(worker, site.now, kv_capacity_tokens=128_000)  # 1,000 blocks of 4 x 128 characters
    site.serve(text_of(1, 4))
    index = site.policy._index
    assert index.capacity_of(worker.id) == 1_500
    site.serve(text_of(1, 4), prompt_tokens=512, cached_tokens=512)
    assert index.capacity_of(worker.id) == pytest.approx(1_000, rel=0.01)


def cacheless_site(count: int) -> Site:
    """All workers have answered for long that nothing of what must have been there was cached."""
    site = Site(workers_of(count))
    for worker in site.workers:
        for _ in range(CacheCapacity.MISSES + CacheCapacity.ANSWERS + 1):
            site.serve(text_of(1, 4), to=worker, after_s=0.01, prompt_tokens=512, cached_tokens=0)
    return site


def test_where_no_engine_has_a_cache_prompts_are_not_hashed_and_load_alone_decides():
    site = cacheless_site(2)
    assert [site.policy._index.blocks_of(worker.id) for worker in site.workers] == [0, 0]
    asked, busy = site.send(text_of(1, 4))
    assert site.policy.question(asked).blocks == ()
    assert site.chosen(text_of(1, 4)) is not busy
    assert site.policy.question(call(text_of(1, 4))).tokens == pytest.approx(512, rel=0.1)


def test_a_worker_without_a_cache_is_tried_again_after_a_minute_or_a_restart():
    site = cacheless_site(1)
    site.now += NO_CACHE_S
    site.serve(text_of(1, 4))
    assert site.policy._index.blocks_of(site.workers[0].id) == 4
    site = cacheless_site(1)
    site.policy.flushed(site.workers[0])
    site.serve(text_of(1, 4))
    assert site.policy._index.blocks_of(site.workers[0].id) == 4


def test_one_worker_with_a_cache_is_enough_to_hash_prompts_again():
    site = cacheless_site(1)
    site.workers = [*site.workers, workers_of(2)[1]]
    for seed in range(4):
        site.send(text_of(seed, 4))
    assert site.policy._index.blocks_of(site.workers[0].id) == 0
    assert site.policy._index.blocks_of(site.workers[1].id) > 0


def test_token_ids_are_routed_by_their_own_prefixes():
    site = Site(workers_of(8))
    ids = list(range(1000, 3000))

    def tokens(given: list[int]) -> Call:
        return Call(GENERATE, "m", b"", {"input_ids": given}, is_stream=True)

    first = site.policy.choose(tokens(ids), site.workers, site.now, site.rng)
    assert first is not None
    site.policy.placed(tokens(ids), first, site.now)
    site.now += 60.0
    for _ in range(5):
        assert site.policy.choose(tokens([*ids, 7]), site.workers, site.now, site.rng) is first


def test_cache_salts_are_kept_apart():
    site = Site(workers_of(2))
    worker = site.workers[0]
    asked = call(text_of(1, 20), cache_salt="a")
    site.policy.placed(asked, worker, site.now)

    def matched(salt: str) -> int:
        salted = call(text_of(1, 20), cache_salt=salt)
        return site.policy.terms(salted, site.workers, site.now, site.rng)[0].matched_blocks

    assert (matched("a"), matched("b")) == (20, 0)


def test_no_candidates_no_choice():
    site = Site(())
    assert site.policy.choose(call("x"), (), 1.0, site.rng) is None
    assert site.policy.terms(call("x"), (), 1.0, site.rng) == []


# -- what is taken away ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["removed", "flushed"])
def test_a_worker_that_left_or_flushed_owns_nothing(verb):
    site = Site(workers_of(3))
    history = text_of(1, 30)
    holder = site.serve(history)
    getattr(site.policy, verb)(holder)
    assert {row.matched_blocks for row in site.rows(history).values()} == {0}


def test_prefixes_of_a_lost_worker_are_learned_again_where_load_is_least():
    site = Site(workers_of(4))
    prompts = [text_of(seed, 10) for seed in range(60)]
    for prompt in prompts:
        site.serve(prompt, to=site.workers[0])
    site.policy.removed(site.workers[0])
    site.workers = site.workers[1:]
    for prompt in prompts:
        site.send(prompt)
    assert max(worker.in_flight for worker in site.workers) <= 21


def test_requests_that_end_after_their_worker_left_are_settled():
    site = Site(workers_of(2))
    asked, worker = site.send(text_of(1, 5))
    site.policy.removed(worker)
    site.answer(asked, worker, prompt_tokens=640, cached_tokens=0)
    assert not any(account.placed for account in site.policy._prices.accounts.values())
    assert site.policy._prices.known(worker.id) is None


def test_a_failed_request_leaves_no_debt():
    site = Site(workers_of(1))
    asked, worker = site.send(text_of(1, 50))
    site.answer(asked, worker, status=503)
    assert site.rows("x")[worker.id].wait == 0.0
    assert not any(account.placed for account in site.policy._prices.accounts.values())


def test_two_models_never_influence_each_other():
    index, hasher, fits = PrefixIndex(), BlockHasher(), PrefillModels()
    workers = workers_of(3)
    one = Site(workers, CacheAware("a", None, index, hasher, fits))
    two = Site(workers, CacheAware("b", None, index, hasher, fits))
    history = text_of(1, 20)
    asked = call(history, model="a")
    one.policy.placed(asked, workers[0], one.now)
    assert one.rows(history)[workers[0].id].matched_blocks == 20
    assert {row.matched_blocks for row in two.rows(history).values()} == {0}
    assert {row.wait for row in two.rows(history).values()} == {0.0}


# -- learning ----------------------------------------------------------------------------------


def test_prefill_seconds_and_token_length_are_learned_from_answers():
    site = Site(workers_of(1))
    worker = site.workers[0]
    for seed in range(80):
        blocks = 5 + seed % 40
        tokens = blocks * 512 // 2  # two characters a token, not four
        asked, _ = site.send(text_of(seed, blocks))
        site.answer(asked, worker, after_s=0.002 + tokens / 48_000, prompt_tokens=tokens, cached_tokens=0)
        site.now += 5.0
    site.now += 300.0  # an idle fleet: the price is the dial's
    row = site.rows(text_of(999, 40))[worker.id]
    assert row.prefill / 2.5 == pytest.approx(10_240 / 48_000, rel=0.15)


def test_a_worker_that_forgets_sooner_than_thought_is_believed_less():
    site = Site(workers_of(1))
    worker = site.workers[0]
    reported(worker, site.now, running=0, kv_capacity_tokens=128_000)
    prompts = [text_of(seed, 20) for seed in range(45)]
    for _ in range(6):
        for prompt in prompts:
            asked, _ = site.send(prompt)
            site.answer(asked, worker, after_s=0.5, prompt_tokens=2560, cached_tokens=0)
    assert site.policy._index.blocks_of(worker.id) < 850
    assert site.policy._index.capacity_of(worker.id) < 850


# -- explain -----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from(["price", "threshold"]))
@settings(max_examples=60, deadline=None)
def test_explain_changes_nothing_and_predicts_the_next_choice(seed, mode):
    rng = Random(seed)
    site = Site(workers_of(rng.randrange(2, 6)), CacheAware("m", CacheAwareSettings(mode=mode)), seed)
    twin = Site(workers_of(len(site.workers)), CacheAware("m", CacheAwareSettings(mode=mode)), seed)
    prompts = [text_of(rng.getrandbits(32), 3)]
    open_calls: list[tuple[Call, Worker]] = []
    for _ in range(30):
        prompt = rng.choice(prompts) + text_of(rng.getrandbits(32), rng.randrange(1, 6))
        prompts.append(prompt)
        explained = site.policy.choose(call(prompt), site.workers, site.now, copy.copy(site.rng))
        first = site.policy.terms(call(prompt), site.workers, site.now, copy.copy(site.rng))
        assert site.policy.terms(call(prompt), site.workers, site.now, copy.copy(site.rng)) == first
        if mode == "price":
            lowest = min(row.cost for row in first)
            assert next(row.cost for row in first if row.worker_id == explained.id) <= lowest + 1e-8
        asked, worker = site.send(prompt)
        assert worker is explained
        open_calls.append((asked, worker))
        # The twin was never asked to explain, and chooses the same.
        assert twin.send(prompt)[1].order == worker.order
        site.now = twin.now = site.now + rng.random() * 0.3


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_cost_grows_with_the_wait_and_with_uncached_tokens(seed):
    rng = Random(seed)
    site = Site(workers_of(3))
    prompt = text_of(seed, 30)
    depths = sorted(rng.sample(range(1, 30), 2))
    short, long = site.workers[0], site.workers[1]
    site.serve(prompt[: 512 * depths[0]], to=short)
    site.serve(prompt[: 512 * depths[1]], to=long)
    site.now += 100.0
    rows = site.rows(prompt)
    assert rows[long.id].cost < rows[short.id].cost < rows[site.workers[2].id].cost
    site.send(text_of(seed + 1, rng.randrange(1, 50)), to=long)
    assert site.rows(prompt)[long.id].cost > rows[long.id].cost


# -- large fleets ------------------------------------------------------------------------------


def test_a_large_fleet_keeps_sessions_and_balance():
    site = Site(workers_of(FLEET_MAX * 3))
    histories = [text_of(seed, 8) for seed in range(200)]
    homes = [site.send(history)[1] for history in histories]
    assert max(worker.in_flight for worker in site.workers) <= 3
    site.now += 60.0
    for history, home in zip(histories[:40], homes[:40], strict=True):
        assert site.chosen(history + text_of(77, 1)) is home


def test_explain_lists_every_worker_of_a_large_fleet():
    site = Site(workers_of(FLEET_MAX + 10))
    history = text_of(1, 8)
    holder = site.serve(history)
    rows = site.rows(history)
    assert len(rows) == FLEET_MAX + 10
    assert rows[holder.id].matched_blocks == 8
    assert site.chosen(history) is holder


def test_workers_that_join_and_leave_a_large_fleet_are_seen_at_once():
    workers = workers_of(FLEET_MAX + 20)
    site = Site(workers[:-1])
    history = text_of(1, 8)
    holder = site.serve(history)
    site.workers = tuple(worker for worker in workers if worker is not holder)
    assert site.chosen(history) is not holder
    for seed in range(200):
        site.send(text_of(5000 + seed, 8))
    assert workers[-1].in_flight > 0
    assert holder.in_flight == 0


# -- threshold mode ----------------------------------------------------------------------------


def threshold_site(count: int, **numbers: Any) -> Site:
    rule = ThresholdRule(**numbers)
    return Site(workers_of(count), CacheAware("m", CacheAwareSettings(mode="threshold", threshold=rule)))


def test_threshold_mode_takes_the_longest_prefix_above_the_threshold():
    site = threshold_site(3, threshold=0.3)
    prompt = text_of(1, 10)
    site.serve(prompt[: 512 * 5], to=site.workers[1])
    site.send("x" * 600, to=site.workers[1])
    assert site.chosen(prompt) is site.workers[1]
    row = site.rows(prompt)[site.workers[1].id]
    assert (row.matched_blocks, row.cost) == (5, None)
    assert row.reason == "longest prefix 50% > 30%"


def test_threshold_mode_takes_the_least_loaded_below_it_and_out_of_balance():
    site = threshold_site(2, threshold=0.5, balance_abs=4, balance_rel=1.5)
    prompt = text_of(1, 10)
    site.serve(prompt[: 512 * 5], to=site.workers[0])
    site.send("y" * 600, to=site.workers[0])
    assert site.chosen(prompt) is site.workers[1]
    site.serve(prompt, to=site.workers[0])
    assert site.chosen(prompt) is site.workers[0]
    for seed in range(5):
        site.send(text_of(seed, 1), to=site.workers[0])
    assert site.chosen(prompt) is site.workers[1]


def test_threshold_mode_knows_imbalance_of_kv_usage():
    site = threshold_site(2, token_usage=0.2)
    prompt = text_of(1, 10)
    site.serve(prompt, to=site.workers[0])
    site.send("z", to=site.workers[0])
    reported(site.workers[0], site.now, kv_usage=0.9)
    reported(site.workers[1], site.now, kv_usage=0.5)
    assert site.chosen(prompt) is site.workers[1]
