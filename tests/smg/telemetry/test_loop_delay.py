"""The loop's lateness under a clock that the test moves."""

from __future__ import annotations

import trio
import trio.testing

from smg.telemetry.loop_delay import watch_loop_delay
from smg.telemetry.metrics import Metrics


async def test_an_idle_loop_is_never_late(autojump_clock: trio.testing.MockClock) -> None:
    metrics = Metrics()
    with trio.move_on_after(1.05):
        await watch_loop_delay(metrics)
    delay = metrics.histogram("smg_event_loop_delay_seconds")
    assert delay.count == 10
    assert delay.counts[0] == 10


async def test_a_blocked_loop_is_seen_with_the_length_of_the_block(
    mock_clock: trio.testing.MockClock,
) -> None:
    metrics = Metrics()
    delay = metrics.histogram("smg_event_loop_delay_seconds")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_loop_delay, metrics)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0.1 + 0.7)  # nothing of the loop ran for 0.7 s after the timer was due
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert delay.count == 1
    assert abs(delay.sum_s - 0.7) < 1e-9
    assert delay.counts[list(delay.bounds_s).index(1.0)] == 1
