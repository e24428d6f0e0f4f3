"""One request rate over three nodes as processes of their own: what they admit together, and what dividing it costs the mesh.

`python -m tests.bench.cluster_limits [SECONDS]` prints admitted requests per second for clients that are spread evenly, all on
one node, and after one node was killed and another one has joined, with the bytes on the mesh beside those of an idle one. It
fails when a rate is not within 10 % of the limit.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import trio

from tests.e2e.fake_worker import fake_worker
from tests.e2e.gateway import CHAT
from tests.e2e.process import Process, free_ports, running_process

LIMIT = 20
ASKED = 60.0
SETTLE_S = 2.0
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


async def _ask(process: Process, per_s: float, admitted_s: list[float]) -> None:
    """One client at a steady pace, until the node is gone."""
    try:
        client = await process.connect()
        due_s = trio.current_time()
        while True:
            if (await client.ask(CHAT, BODY)).status == 200:
                admitted_s.append(trio.current_time())
            due_s = max(due_s + 1 / per_s, trio.current_time() - 1)
            await trio.sleep_until(due_s)
    except (OSError, trio.BrokenResourceError, AssertionError):
        return


async def _mesh_bytes(processes: Sequence[Process]) -> float:
    total = 0.0
    for process in processes:
        text = (await process.ask("/metrics", port=process.metrics_port)).body.decode()
        total += sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith('smg_mesh_bytes_total{direction="out"}')
        )
    return total


async def _phase(what: str, spread: Mapping[Process, float], seconds: float, settle_s: float) -> bool:
    """Load for a while; prints the rate, and whether it is near the limit."""
    admitted_s: list[float] = []
    nodes = list(spread)
    async with trio.open_nursery() as nursery:
        for process, per_s in spread.items():
            nursery.start_soon(_ask, process, per_s, admitted_s)
        await trio.sleep(settle_s)
        begin_s, before = trio.current_time(), await _mesh_bytes(nodes)
        await trio.sleep(seconds)
        end_s, after = trio.current_time(), await _mesh_bytes(nodes)
        nursery.cancel_scope.cancel()
    took_s = end_s - begin_s
    counts = [0] * max(1, int(took_s))
    for at_s in admitted_s:
        if 0 <= at_s - begin_s < len(counts):
            counts[int(at_s - begin_s)] += 1
    rate = sum(begin_s < at_s <= end_s for at_s in admitted_s) / took_s
    per_node = (after - before) / took_s / len(nodes)
    print(
        f"{what:42} {rate:5.1f}/s admitted (seconds: {min(counts)} to {max(counts)}), "
        f"{per_node:6.0f} B/s on the mesh per node"
    )
    return not sum(spread.values()) or abs(rate - LIMIT) <= 0.1 * LIMIT


async def _measure(seconds: float) -> bool:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(fake_worker("m"))
        ports = free_ports(4)

        async def start(name: str, place: int) -> Process:
            flags = (
                *("--ha-mesh", "--node-name", name, "--mesh-host", "127.0.0.1"),
                *("--mesh-port", str(ports[place]), "--seeds", f"127.0.0.1:{ports[0 if place else 1]}"),
                *("--rate-limit-tokens-per-second", str(LIMIT), "--worker-urls", worker.url),
            )
            return await stack.enter_async_context(running_process(*flags))

        a, b, c = [await start(name, place) for place, name in enumerate("abc")]
        await trio.sleep(3.0)
        good = [
            await _phase("idle", {a: 0.001, b: 0.001, c: 0.001}, min(seconds, 10.0), 1.0),
            await _phase("evenly on three nodes", dict.fromkeys((a, b, c), ASKED / 3), seconds, SETTLE_S),
            await _phase("all on one node", {b: ASKED, a: 0.001, c: 0.001}, seconds, SETTLE_S),
        ]
        b.process.send_signal(signal.SIGKILL)
        d = await start("d", 3)
        good.append(
            await _phase("after a kill and a join", dict.fromkeys((a, c, d), ASKED / 3), seconds, SETTLE_S)
        )
    return all(good[1:])


def main() -> int:
    """Measure and judge."""
    return 0 if trio.run(_measure, float(sys.argv[1]) if len(sys.argv) > 1 else 20.0) else 1


if __name__ == "__main__":
    sys.exit(main())
