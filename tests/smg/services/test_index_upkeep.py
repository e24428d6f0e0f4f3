"""Upkeep: what departed is swept, what nobody used for the TTL is forgotten, and nothing else."""

from __future__ import annotations

import pytest
import trio

from smg.fleet.prefix_index import PrefixIndex
from smg.services.index_upkeep import IndexUpkeep
from tests.smg.fleet.builders import fleet


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex()


def depth(index: PrefixIndex, worker_id: str, blocks: list[int]) -> int:
    return index.match(blocks).depth_of(index.bits_of(worker_id))


async def test_what_a_departed_worker_held_is_swept_after_an_interval(index, autojump_clock):
    registry, workers = fleet(2)
    upkeep = IndexUpkeep(registry, index, interval_s=60.0, ttl_s=0.0)
    index.place(workers[0].id, list(range(1, 5_001)))
    index.place(workers[1].id, [1, 2, 3])
    index.forget(workers[0].id)
    async with trio.open_nursery() as nursery:
        await nursery.start(upkeep.run)
        await trio.sleep(59)
        assert index.entries > 4_000
        await trio.sleep(2)
        assert index.entries == 3
        nursery.cancel_scope.cancel()


async def test_without_a_ttl_nothing_is_forgotten_for_its_age(index, autojump_clock):
    registry, workers = fleet(1)
    index.place(workers[0].id, [1, 2, 3])
    async with trio.open_nursery() as nursery:
        await nursery.start(IndexUpkeep(registry, index, interval_s=60.0, ttl_s=0.0).run)
        await trio.sleep(1e6)
        nursery.cancel_scope.cancel()
    assert depth(index, workers[0].id, [1, 2, 3]) == 3


@pytest.mark.parametrize("interval_s", [1.0, 7.0, 60.0, 500.0])
async def test_an_unused_prefix_lives_for_one_to_two_ttls(index, autojump_clock, interval_s):
    registry, workers = fleet(2)
    async with trio.open_nursery() as nursery:
        await nursery.start(IndexUpkeep(registry, index, interval_s=interval_s, ttl_s=100.0).run)
        await trio.sleep(50)
        for worker in workers:
            index.place(worker.id, [1, 2, 3])
            index.place(worker.id, [7, 8, 9])
        for _ in range(10):
            await trio.sleep(30)
            index.place(workers[0].id, [7, 8])
            if trio.current_time() <= 149:
                assert depth(index, workers[1].id, [1, 2, 3]) == 3
        assert depth(index, workers[0].id, [1, 2, 3]) == 0
        assert depth(index, workers[0].id, [7, 8, 9]) == 2
        assert depth(index, workers[1].id, [7, 8, 9]) == 0
        nursery.cancel_scope.cancel()
