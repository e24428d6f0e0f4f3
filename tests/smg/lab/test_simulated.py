"""The simulated engine in real time, driven by a virtual clock."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from smg.lab.engine_model import EngineFull, EngineSettings
from smg.lab.simulated import Generation, Simulated, count_tokens

SETTINGS = EngineSettings(
    prefill_base_s=1.0,
    prefill_tokens_per_s=1e9,
    attention_s_per_pair=0.0,
    decode_base_s=2.0,
    decode_per_running_s=0.0,
    block_tokens=4,
    slots=2,
    waiting_max=1,
    emits_tokens=True,
)


async def arrivals(generation: Generation) -> list[float]:
    """When each token left."""
    times = []
    while (await generation.wait_more(len(times))) > len(times):
        times.append(round(trio.current_time(), 6))
    return times


@pytest.mark.parametrize(("speed", "times"), [(1.0, [1, 3, 5]), (2.0, [0.5, 1.5, 2.5]), (0.5, [2, 6, 10])])
async def test_tokens_leave_when_the_model_says_at_the_speed_of_the_engine(
    nursery: trio.Nursery, autojump_clock: MockClock, speed: float, times: list[float]
) -> None:
    engine = Simulated(SETTINGS, speed=speed)
    await nursery.start(engine.run)
    with engine.submit(b"x" * 64, 3) as generation:
        assert await arrivals(generation) == times
        assert generation.is_finished
    assert engine.model.finished_total == 1


async def test_a_generation_that_is_closed_early_frees_its_slot_for_the_next(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    engine = Simulated(SETTINGS)
    await nursery.start(engine.run)
    generations = [engine.submit(b"%d" % number * 64, 100) for number in range(2)]
    await trio.sleep(2.5)  # both have prefilled, one after the other
    waiting = engine.submit(b"w" * 64, 1)
    with pytest.raises(EngineFull):
        engine.submit(b"z", 1)
    await trio.sleep(10)
    assert waiting.produced == 0
    generations[0].close()
    generations[0].close()
    await trio.sleep(1.5)
    assert waiting.is_finished
    assert generations[0].is_finished
    assert await generations[0].wait_more(1000) == generations[0].produced
    generations[1].close()
    assert engine.model.running == 0
    assert engine._generations == {}


async def test_the_cache_is_told_with_the_first_token(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    engine = Simulated(SETTINGS)
    await nursery.start(engine.run)
    for expected in (0, 16):
        with engine.submit(b"p" * 64 + b"tail", 1) as generation:
            await generation.wait_finished()
            assert generation.cached_tokens == expected
            assert generation.prompt_tokens == 17
    assert engine.flush() == 4
    with engine.submit(b"p" * 64, 1) as generation:
        await generation.wait_finished()
        assert generation.cached_tokens == 0


async def test_throughput_is_over_a_second_at_least(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    engine = Simulated(SETTINGS)
    await nursery.start(engine.run)
    with engine.submit(b"p", 1000):
        await trio.sleep(20)
        assert engine.throughput_tps() == pytest.approx(0.5, abs=0.1)
        await trio.sleep(0.2)
        assert engine.throughput_tps() == pytest.approx(0.5, abs=0.1)


def test_four_bytes_are_a_token() -> None:
    assert [count_tokens(b"x" * length) for length in (0, 1, 4, 5, 8)] == [1, 1, 1, 2, 2]
