"""One tenant floods with long prompts, another asks something short: over real sockets, with a simulated engine (ADM-6).

A short form of `tests/bench/fairness.py`, with room for a busy machine; what is exact is in
`tests/smg/tenancy/test_scheduler_fairness.py`.
"""

from __future__ import annotations

import argparse
from random import Random

import pytest
import trio

from smg.lab.engine import add_arguments, run_engines
from tests.bench.fairness import ask, request
from tests.e2e.gateway import Gateway, eventually, running_gateway

SPEED = 8.0
LONG_S = 3.8 / SPEED
"""One prefill of the flood: 32,000 tokens."""
NOISE_S = 0.25
"""Of a machine that runs other tests beside; less than another prefill."""
SHORTS = 8


async def waits(gateway: Gateway, flood: int, is_stream: bool) -> list[float]:
    """Seconds to the first byte of the short requests, one every 0.2 s, beside so many long ones."""
    rng, times = Random(3), []

    async def flooding() -> None:
        while True:
            await ask(gateway.port, request("flood", 32_000, is_stream, rng))

    async def asking() -> None:
        first_s, _, is_answer = await ask(gateway.port, request("other", 100, True, rng))
        assert is_answer
        times.append(first_s)

    async with trio.open_nursery() as nursery:
        for _ in range(flood):
            nursery.start_soon(flooding)
        if flood:
            await eventually(lambda: gateway.metric("smg_scheduler_queue_depth") >= flood - 2)
        for _ in range(SHORTS):
            nursery.start_soon(asking)
            await trio.sleep(0.2)
        await eventually(lambda: len(times) == SHORTS, within_s=10.0)
        nursery.cancel_scope.cancel()
    return times


@pytest.mark.parametrize("is_stream", [True, False], ids=["streams", "plain"])
async def test_a_short_request_waits_for_one_prefill_of_the_flood_at_most(is_stream: bool):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--port", "0", "--speed", str(SPEED)])
    keys = "--tenant-api-key", "flood:key-flood", "other:key-other"
    async with trio.open_nursery() as nursery:
        [(_, url)] = await nursery.start(run_engines, arguments, lambda line: None)
        flags = "--priority-scheduler-enabled", *keys, "--worker-urls", url
        async with running_gateway(*flags, ready=False) as gateway:
            await eventually(lambda: gateway.node.registry.served_models() == ("sim",))
            alone = await waits(gateway, 0, is_stream)
            beside = await waits(gateway, 10, is_stream)
            assert max(beside) <= max(alone) + LONG_S + NOISE_S
            assert max(beside) > max(alone)  # there was a flood
        nursery.cancel_scope.cancel()
