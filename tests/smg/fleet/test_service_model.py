"""The service model learns seconds, token lengths and capacities, and never learns nonsense."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.fleet.service_model import (
    CacheCapacity,
    PrefillModel,
    PrefillModels,
    PrefillSeed,
    TokenLength,
    seed_for,
)


def truth(u: float, h: float) -> float:
    return 0.008 + u / 12_000 + 2e-9 * u * (h + u / 2)


def teach(fit: PrefillModel, rng: Random, count: int, noise: float = 0.15, factor: float = 1.0) -> None:
    for _ in range(count):
        u, h = rng.randrange(1, 20_000), rng.choice([0, rng.randrange(30_000)])
        fit.observe(u, h, factor * truth(u, h) * rng.lognormvariate(0, noise))


def worst_error(fit: PrefillModel) -> float:
    cases = [(500, 0), (2_000, 0), (8_000, 0), (20_000, 0), (1_000, 20_000), (8_000, 8_000)]
    return max(abs(fit.seconds(u, h) / truth(u, h) - 1) for u, h in cases)


@pytest.mark.parametrize("wrong", [0.25, 0.5, 2.0, 4.0])
def test_a_wrong_start_is_corrected_within_a_few_dozen_answers(wrong):
    seed = PrefillSeed(0.008 * wrong, wrong / 12_000, 2e-9 * wrong)
    fit = PrefillModel(seed)
    teach(fit, Random(3), 60)
    assert worst_error(fit) < 0.3


def test_a_worker_thirty_times_faster_than_the_seed_is_learned():
    fit = PrefillModel()
    rng = Random(3)
    for _ in range(200):
        u = rng.randrange(100, 20_000)
        fit.observe(u, 0, 0.0005 + u * 4e-6)
    assert fit.seconds(8_000, 0) == pytest.approx(0.0325, rel=0.25)


def test_it_follows_a_worker_that_becomes_slower():
    fit = PrefillModel()
    teach(fit, Random(1), 500)
    teach(fit, Random(2), 400, factor=2.0)
    assert fit.seconds(8_000, 0) == pytest.approx(2 * truth(8_000, 0), rel=0.2)


def test_stalls_among_the_answers_do_not_teach_much():
    fit = PrefillModel()
    rng = Random(4)
    for number in range(400):
        u = rng.randrange(1, 10_000)
        stall = 30.0 if number % 25 == 0 else 0.0
        fit.observe(u, 0, truth(u, 0) * rng.lognormvariate(0, 0.1) + stall)
    assert worst_error(fit) < 0.35


def test_ten_thousand_equal_answers_do_not_wind_the_fit_up():
    fit = PrefillModel()
    teach(fit, Random(1), 300)
    rng = Random(5)
    for _ in range(10_000):
        fit.observe(1_000, 0, truth(1_000, 0) * rng.lognormvariate(0, 0.1))
    assert fit.seconds(1_000, 0) == pytest.approx(truth(1_000, 0), rel=0.1)
    assert fit.seconds(20_000, 0) == pytest.approx(truth(20_000, 0), rel=0.6)


@given(
    st.lists(
        st.tuples(st.integers(1, 100_000), st.integers(0, 200_000), st.floats(0, 1e6, allow_nan=False)),
        max_size=40,
    ),
    st.integers(1, 50_000),
    st.integers(0, 100_000),
    st.integers(1, 10_000),
)
def test_cost_grows_with_uncached_tokens_whatever_was_taught(lessons, uncached, cached, more):
    fit = PrefillModel()
    for u, h, seconds in lessons:
        fit.observe(u, h, seconds)
    assert 0 < fit.seconds(uncached, cached) < fit.seconds(uncached + more, cached)
    if more <= cached:  # the same prompt with less of it cached
        assert fit.seconds(uncached, cached) < fit.seconds(uncached + more, cached - more)


def test_the_first_guess_comes_from_the_size_in_the_name():
    assert seed_for("meta-llama/Llama-3.1-8B-Instruct") == seed_for("some-model")
    assert seed_for("Llama-3.3-70B").per_token_s == pytest.approx(70 / 8 / 12_000)
    assert seed_for("Qwen3-30B-A3B").per_token_s == pytest.approx(3 / 8 / 12_000)
    assert seed_for("Mixtral-8x7B").per_token_s == pytest.approx(14 / 8 / 12_000)
    assert seed_for("qwen2.5-0.5b").per_token_s == pytest.approx(0.5 / 8 / 12_000)


def test_models_and_classes_have_fits_of_their_own_and_a_new_class_inherits():
    fits = PrefillModels()
    teach(fits.get("m", "h100"), Random(1), 50, factor=3.0)
    assert fits.get("m", "a10").seconds(8_000, 0) == pytest.approx(3 * truth(8_000, 0), rel=0.25)
    assert fits.get("other").seconds(8_000, 0) == pytest.approx(truth(8_000, 0))
    assert fits.get("m", "h100") is fits.get("m", "h100")


def test_the_number_of_fits_is_bounded():
    fits = PrefillModels()
    for number in range(3_000):
        fits.get(f"m{number}")
    assert len(fits._fits) <= 1_024


def test_characters_per_token_are_learned_and_images_are_not_believed():
    length = TokenLength()
    assert length.tokens(4_000) == 1_000
    for _ in range(60):
        length.observe(3_000, 2_000)
    assert length.chars_per_token == pytest.approx(1.5, rel=0.05)
    for _ in range(60):
        length.observe(10, 5_000)
    assert length.chars_per_token == pytest.approx(1.5, rel=0.05)
    assert length.tokens(0) == 1


def test_capacity_shrinks_by_a_tenth_when_the_worker_had_less_than_claimed():
    capacity = CacheCapacity(500_000)
    changes = [capacity.observe(1_000, 500, 500_000, float(second)) for second in range(0, 62, 2)]
    assert sum(changes) == 1
    assert capacity.tokens == 450_000


def test_a_busy_worker_is_learned_before_the_minute_is_over():
    capacity = CacheCapacity(500_000)
    changes = [capacity.observe(1_000, 0, 500_000, 0.001 * number) for number in range(CacheCapacity.ANSWERS)]
    assert changes[-1]
    assert capacity.tokens == 450_000


def test_a_bound_that_was_never_reached_shrinks_from_what_was_claimed():
    capacity = CacheCapacity(8_000_000)
    for number in range(CacheCapacity.ANSWERS):
        capacity.observe(1_000, 0, 500_000, 0.001 * number)
    assert capacity.tokens == 450_000


def test_capacity_grows_by_a_fiftieth_while_its_bound_is_reached_and_claims_hold():
    capacity = CacheCapacity(500_000)
    for number in range(CacheCapacity.ANSWERS):
        capacity.observe(1_000, 1_000, 495_000, 0.001 * number)
    assert capacity.tokens == 510_000
    for number in range(CacheCapacity.ANSWERS):
        capacity.observe(1_000, 1_000, 150_000, 0.001 * number)
    assert capacity.tokens == 510_000


def test_answers_without_a_claim_and_single_answers_teach_nothing():
    capacity = CacheCapacity(500_000)
    for second in range(200):
        assert not capacity.observe(0, 0, 500_000, float(second))
    capacity.observe(1_000, 0, 500_000, 300.0)
    assert not capacity.observe(1_000, 0, 500_000, 400.0)
    assert capacity.tokens == 500_000


def test_capacity_never_falls_to_nothing():
    capacity = CacheCapacity(100_000)
    for number in range(10_000):
        capacity.observe(1_000, 0, capacity.tokens, 0.01 * number)
    assert capacity.tokens == CacheCapacity.TOKENS_MIN


def test_a_worker_with_full_slots_does_not_look_many_times_slower():
    fit = PrefillModel()
    rng = Random(6)
    for _ in range(2_000):  # four of five answers waited seconds for a slot, and nothing told so
        u = rng.randrange(1, 4_000)
        blocked = rng.random() < 0.8
        fit.observe(u, 8_000, truth(u, 8_000) + (rng.uniform(1, 20) if blocked else 0.0), is_queued=blocked)
        u = rng.randrange(1, 4_000)
        fit.observe(u, 8_000, truth(u, 8_000) + (rng.uniform(1, 20) if rng.random() < 0.2 else 0.0))
    assert worst_error(fit) < 0.6
