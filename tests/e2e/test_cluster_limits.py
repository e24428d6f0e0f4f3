"""Three real nodes and one limit: together they admit the limit, however clients are spread and whoever comes or goes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from smg.tenancy.admission import RATE_KEY
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.fake_worker import fake_worker
from tests.e2e.gateway import CHAT, eventually

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
LIMIT = 20
ASKED = 60
"""Requests a second in all: three times the limit."""
SETTLE_S = 1.2
MEASURE_S = 1.75


class Load:
    """Clients that ask at a steady pace, so many requests a second on each node, and count what was admitted."""

    def __init__(self, nodes: Cluster, nursery: trio.Nursery, headers: tuple[str, ...] = ()) -> None:
        self._nodes = nodes
        self._nursery = nursery
        self._headers = headers
        self.per_s: dict[str, float] = {}
        self.admitted_s: list[float] = []
        self.refused = 0
        self.killed: set[str] = set()

    def spread(self, per_s: Mapping[str, float]) -> None:
        for name in per_s.keys() - self.per_s.keys():
            self._nursery.start_soon(self._ask, name)
        self.per_s = dict(per_s)

    async def _ask(self, name: str) -> None:
        due_s = trio.current_time()
        try:
            client = await self._nodes[name].connect()
            while name in self.per_s:
                answer = await client.ask(CHAT, BODY, *self._headers)
                if answer.status == 200:
                    self.admitted_s.append(trio.current_time())
                else:
                    assert answer.status == 429, answer
                    assert answer["retry-after"]
                    self.refused += 1
                due_s += 1 / self.per_s.get(name, 1.0)
                await trio.sleep_until(due_s)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError, AssertionError):
            if name not in self.killed:
                raise
        self.per_s.pop(name, None)

    async def rate(self, settle_s: float = SETTLE_S, measure_s: float = MEASURE_S) -> float:
        """Admitted per second over `measure_s`, after `settle_s`."""
        await trio.sleep(settle_s)
        begin_s = trio.current_time()
        await trio.sleep(measure_s)
        end_s = trio.current_time()
        return sum(begin_s < at_s <= end_s for at_s in self.admitted_s) / (end_s - begin_s)


@asynccontextmanager
async def limited(*flags: str) -> AsyncIterator[tuple[Cluster, trio.Nursery]]:
    async with fake_worker("m") as worker:
        async with cluster("a", "b", "c", workers=[worker], flags=flags) as nodes:
            # All are acquainted, and have even parts.
            await eventually(lambda: all(0.3 < nodes.mesh(name).limits.even < 0.34 for name in "abc"))
            async with trio.open_nursery() as nursery:
                yield nodes, nursery
                nursery.cancel_scope.cancel()


def shares(nodes: Cluster) -> dict[str, float]:
    return {name: node.metric("smg_mesh_rate_limit_share") for name, node in nodes.nodes.items()}


async def test_adm_3_three_nodes_admit_the_limit_and_not_three_times_the_limit():
    async with limited("--rate-limit-tokens-per-second", str(LIMIT)) as (nodes, nursery):
        load = Load(nodes, nursery)
        load.spread(dict.fromkeys("abc", ASKED / 3))
        evenly = await load.rate()
        assert 19 <= evenly <= 22, (evenly, shares(nodes))

        load.spread({"b": ASKED})
        on_one = await load.rate()
        assert 19 <= on_one <= 22, (on_one, shares(nodes))
        assert shares(nodes)["b"] > 0.95
        document = (await nodes["a"].ask("/mesh/limits")).document
        assert document["limits"][0]["limit"] == RATE_KEY.decode()
        assert document["limits"][0]["nodes"]["b"]["held"] > 0.95

        # The one that holds everything is killed, and another one joins.
        load.killed.add("b")
        await nodes.crash("b")
        load.spread({"a": ASKED / 2, "c": ASKED / 2})
        await nodes.start("d")
        await eventually(lambda: nodes["d"].ready_count == 1)
        load.spread(dict.fromkeys("acd", ASKED / 3))
        after = await load.rate(1.8)
        assert 18 <= after <= 22, (after, shares(nodes))
        assert sum(shares(nodes).values()) <= 1.02


async def test_a_cut_leaves_each_side_its_part():
    async with limited("--rate-limit-tokens-per-second", str(LIMIT)) as (nodes, nursery):
        load = Load(nodes, nursery)
        load.spread(dict.fromkeys("abc", ASKED / 3))
        await trio.sleep(1.0)
        nodes.network.cut("a", "b", "c")
        cut = await load.rate(0.5, 2.5)
        assert 15 <= cut <= 22, (cut, shares(nodes))
        assert sum(shares(nodes).values()) <= 1.03


async def test_adm_5_a_tenant_has_its_limit_once(tmp_path: Path):
    path = tmp_path / "limits.yaml"
    path.write_text(json.dumps({"default_policy": {"requests_per_minute": 60}}))
    flags = ("--tenant-rate-limit-enabled", "--tenant-rate-limit-config", str(path), "--api-key", "secret")
    async with limited(*flags) as (nodes, nursery):
        load = Load(nodes, nursery, ("authorization: Bearer secret",))
        load.spread(dict.fromkeys("abc", 50))
        await trio.sleep(1.5)
        # A full bucket of 60, and one a second; each node has an answer or two on its way.
        assert 52 <= len(load.admitted_s) <= 68, len(load.admitted_s)
        assert load.refused > 50
        await eventually(lambda: nodes.mesh("a").limits.divided == 1)
