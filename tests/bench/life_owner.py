"""The question to the owner of a session, asked of real nodes: its time, and what an owner that hangs costs.

Owns that one play. All prompts are new and of one length, all engines have time, so a request takes what the engine takes, plus what
the node needs to decide. It must never draw a time of a question from its own clock: nodes measure it themselves.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from random import Random

import trio

from smg.lab.conversations import CHARS_PER_TOKEN, WORDS
from tests.bench.life_site import Node, Site
from tests.bench.life_talk import quantile
from tests.bench.life_verdict import Verdict
from tests.e2e.gateway import CHAT, Client

TOKENS = 600
"""67 ms of prefill: enough to be worth a question."""
WARM_S = 3.0
PAUSE_S = 0.03
LATE_MAX = 9
"""Waits for an owner that hangs, of one node, until the mesh knows that it is dead."""
LATE_S = 0.03
"""20 ms, and what a busy loop adds."""
HUNG_S = 15.0


@dataclass
class Asked:
    """One request: how long it took, and what the node's counters say that it did for it."""

    at_s: float
    took_s: float
    what: str
    owner: str = ""


async def owner(place: Site, verdict: Verdict, seconds: float) -> None:
    """Three nodes that are asked in turn, one request at a time, all sessions new; then one of them hangs."""
    await place.start_engines()
    await place.start_nodes("abc")
    nodes = list(place.nodes.values())
    await _ask_all(nodes, WARM_S, 1)
    before = [await _waits(node) for node in nodes]
    asked = await _ask_in_turn(nodes, seconds)
    after = [await _waits(node) for node in nodes]
    _judge_quiet(verdict, asked, before, after)
    await _hang(place, verdict)


async def _hang(place: Site, verdict: Verdict) -> None:
    """`c` is stopped: its ports take everything and answer nothing."""
    a, b, c = place.nodes.values()
    c.signal(signal.SIGSTOP)
    stopped_s = trio.current_time()
    asked = await _ask_all([a, b], HUNG_S, 3)
    alive = (await a.document("/mesh/status"))["alive"]
    c.signal(signal.SIGCONT)
    woken_s = trio.current_time()
    _judge_hang(verdict, asked, stopped_s)
    verdict.note(f"after {HUNG_S:.0f} s the others see {alive} alive")
    again_s = 0.0
    with trio.move_on_after(20.0):
        while not again_s:
            found = await _ask_all([a], 0.5, int(10 + 2 * trio.current_time()))
            if any(each.owner == "c" for each in found):
                again_s = trio.current_time() - woken_s
    verdict.must(again_s > 0, f"c decides for its sessions again {again_s:.1f} s after it goes on")


async def _ask_in_turn(nodes: list[Node], seconds: float) -> list[Asked]:
    """Nothing else goes on meanwhile, not even a look at a counter: who decided is in the receipt."""
    found: list[Asked] = []
    rng = Random(2)
    clients = [Client(await trio.open_tcp_stream(node.host.address, node.port)) for node in nodes]
    end_s = trio.current_time() + seconds
    while trio.current_time() < end_s:
        for client in clients:
            found.append(await _ask_one(client, rng))
            await trio.sleep(PAUSE_S)
    return found


async def _ask_all(nodes: list[Node], seconds: float, seed: int) -> list[Asked]:
    found: list[Asked] = []
    async with trio.open_nursery() as nursery:
        for place, node in enumerate(nodes):
            nursery.start_soon(_client, node, seconds, Random(1000 * seed + place), found)
    return found


async def _client(node: Node, seconds: float, rng: Random, found: list[Asked]) -> None:
    """One request after the other, and the node's counters between them."""
    client = Client(await trio.open_tcp_stream(node.host.address, node.port))
    end_s = trio.current_time() + seconds
    counts = await _counts(client)
    while trio.current_time() < end_s:
        asked = await _ask_one(client, rng)
        now = await _counts(client)
        asked.what = next((name for name in now if now[name] > counts[name]), "own")
        counts = now
        found.append(asked)
        await trio.sleep(PAUSE_S)
    await client.leave()


async def _ask_one(client: Client, rng: Random) -> Asked:
    text = " ".join(rng.choices(WORDS, k=TOKENS))[: TOKENS * CHARS_PER_TOKEN]
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    began_s = trio.current_time()
    answer = await client.ask(CHAT, body, "x-smg-explain: 1")
    took_s = trio.current_time() - began_s
    assert answer.status == 200, answer
    receipt = json.loads(answer["x-smg-explain"])
    return Asked(began_s, took_s, "followed" if receipt.get("owner") else "own", receipt.get("owner") or "")


async def _counts(client: Client) -> dict[str, int]:
    """What became of this node's questions so far."""
    counts: dict[str, int] = (await client.ask("/mesh/status")).document["owner"]
    del counts["answered"]
    return counts


async def _waits(node: Node) -> dict[float, float]:
    """How many answers took at most so many seconds, by the node's own clock; under 0 the sum of all."""
    buckets = await node.metrics("smg_mesh_owner_wait_seconds_bucket")
    found = {float(labels.split('le="')[1].partition('"')[0]): count for labels, count in buckets.items()}
    found[0.0] = (await node.metrics("smg_mesh_owner_wait_seconds_sum"))[""]
    return found


def _between(counts: dict[float, float], share: float) -> float:
    """A quantile in ms, from cumulated counts by edge in s: even within its bucket."""
    wanted, sooner_s, below = share * counts[float("inf")], 0.0, 0.0
    for edge_s in sorted(counts):
        if counts[edge_s] >= wanted and counts[edge_s] > below:
            if edge_s == float("inf"):
                return edge_s
            part = (wanted - below) / (counts[edge_s] - below)
            return 1000 * (sooner_s + part * (edge_s - sooner_s))
        sooner_s, below = edge_s, counts[edge_s]
    return 0.0


def _judge_quiet(
    verdict: Verdict, asked: list[Asked], before: list[dict[float, float]], after: list[dict[float, float]]
) -> None:
    counts: dict[float, float] = {}
    for old, new in zip(before, after, strict=True):
        for edge_s in new:
            counts[edge_s] = counts.get(edge_s, 0.0) + new[edge_s] - old.get(edge_s, 0.0)
    mean_ms = 1000 * counts.pop(0.0) / max(1.0, counts[float("inf")])
    total = counts[float("inf")]
    within = ", ".join(
        f"{counts[edge] / total:.1%} within {1000 * edge:g} ms" for edge in (0.0005, 0.001, 0.0025)
    )
    p50_ms, p99_ms = _between(counts, 0.5), _between(counts, 0.99)
    verdict.must(
        p99_ms <= 1.0,
        f"{total:.0f} questions to owners: mean {mean_ms:.2f} ms, p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms; {within}",
    )
    own = [each.took_s * 1000 for each in asked if each.what == "own"]
    followed = [each.took_s * 1000 for each in asked if each.what == "followed"]
    verdict.must(
        len(followed) >= 0.99 * total and len(followed) > len(asked) / 3,
        f"{len(followed)} of {len(asked)} requests were decided by another node",
    )
    verdict.note(
        f"whole request p50 {quantile(own, 0.5):.2f} ms, p99 {quantile(own, 0.99):.2f} ms where the node owns the session "
        f"({len(own)}), p50 {quantile(followed, 0.5):.2f} ms, p99 {quantile(followed, 0.99):.2f} ms where it asks ({len(followed)})"
    )


def _judge_hang(verdict: Verdict, asked: list[Asked], stopped_s: float) -> None:
    own_s = quantile([each.took_s for each in asked if each.what == "own"], 0.5)
    by_what: dict[str, list[Asked]] = {}
    for each in sorted(asked, key=lambda each: each.at_s):
        by_what.setdefault(each.what, []).append(each)
    for what, found in sorted(by_what.items()):
        extra_ms = [1000 * (each.took_s - own_s) for each in found]
        verdict.note(
            f"{what:8} {len(found):4} requests, from {found[0].at_s - stopped_s:.1f} to {found[-1].at_s - stopped_s:.1f} s: "
            f"extra p50 {quantile(extra_ms, 0.5):+.2f} ms, p99 {quantile(extra_ms, 0.99):+.2f} ms"
        )
    late = [*by_what.get("late", ()), *by_what.get("failed", ())]
    waits_ms = ", ".join(
        f"{1000 * (each.took_s - own_s):.0f} ms at {each.at_s - stopped_s:.1f} s" for each in late
    )
    verdict.must(
        len(late) <= 2 * LATE_MAX and all(each.took_s - own_s <= LATE_S for each in late),
        f"an owner that hangs: {len(late)} of {len(asked)} requests of two nodes waited for it ({waits_ms})",
    )
    rest_ms = [1000 * (each.took_s - own_s) for each in by_what.get("resting", ())]
    verdict.must(
        quantile(rest_ms, 0.5) <= 1.0,
        f"the {len(rest_ms)} others of its sessions while it is not known dead: {quantile(rest_ms, 0.5):+.2f} ms at p50",
    )
