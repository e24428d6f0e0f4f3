"""How late the event loop is: one timer, ten times a second.

This room owns `smg_event_loop_delay_seconds`. It must cost nothing worth measuring and must never do more than
sleep and look at the clock.
"""

from __future__ import annotations

import trio

from smg.telemetry.metrics import Metrics

INTERVAL_S = 0.1
"""Ten samples a second: a pause of 100 ms cannot pass unseen, and the wake-ups (66 us each) cost less than 0.1 % of a core."""


async def watch_loop_delay(metrics: Metrics, interval_s: float = INTERVAL_S) -> None:
    """Observe until cancelled how much later than asked each timer fires.

    A pause of several intervals is one observation of its length, since the next timer starts after it.
    """
    delay = metrics.histogram("smg_event_loop_delay_seconds")
    while True:
        due = trio.current_time() + interval_s
        await trio.sleep_until(due)
        delay.observe(max(0.0, trio.current_time() - due))
