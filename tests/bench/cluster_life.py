"""How a cluster lives and dies, over real processes: `python -m tests.bench.cluster_life kill|restart|cut|soak|owner [--seconds N]`.

Each play prints what it measured and fails when that is out of bounds. kill: one node of three by SIGKILL under load, then again
in the same place. restart: all nodes, one after the other, in order. cut: one node is parted from the others for N seconds and
load stays on both sides (needs root: network namespaces). owner: what asking the owner of a session costs, also one that hangs.
soak: N seconds of steady load. Owns the plays; the processes are `life_site.py`'s, the clients `life_talk.py`'s.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import trio

from tests.bench.life_owner import owner
from tests.bench.life_site import ENGINES, LOOK_S, Host, Node, Site, matched_blocks, site, workers_ready
from tests.bench.life_talk import LIFE_S, Talks, between, hit_ratio, kept_ratio, quantile
from tests.bench.life_verdict import Verdict
from tests.deploy.load import Failed
from tests.mesh.netns.lab import Lab, lab, remove_leftovers

TALKS_PER_S = 5.0
"""Six requests each, so 30 requests a second: a quarter of what the engines can prefill."""
KNOWN = 20
"""Prompts that a node which is back is asked about."""
WARM_SHARE = 0.99
LEARNT_SHARE = 0.9
"""After a cut in which both sides were full of what the other one lacks: each can take in only the newest half."""
LEARN_S = 3.0
ALL = ("a", "b", "c")
SAMPLE_S = 5.0
GRACE_S = 15.0


async def _began(place: Site, nursery: trio.Nursery, settle_s: float = LIFE_S + 2.0) -> Talks:
    """Load that has become steady."""
    await place.start_balancer()
    assert place.balancer is not None
    talks = Talks(place.port, place.balancer, place.name_of, TALKS_PER_S)
    nursery.start_soon(talks.run)
    await trio.sleep(settle_s)
    return talks


def _failed(verdict: Verdict, talks: Talks, *, may_break: bool = False) -> None:
    """No request of all may have failed; no connection broken unless it may."""
    problems = [ask.problem for ask in talks.asks if ask.ended_s and ask.problem]
    verdict.must(not problems, f"{len(talks.asks)} requests, {len(problems)} failed", "; ".join(problems[:3]))
    if not may_break:
        broken = [each for ask in talks.asks for each in ask.broken]
        verdict.must(not broken, f"{len(broken)} connections broken", str(broken[:3]))


# -- kill


async def kill(place: Site, verdict: Verdict, seconds: float) -> None:
    """SIGKILL for `a`, the one node that was told where the engines are."""
    await place.start_engines()
    await place.start_nodes("abc")
    async with trio.open_nursery() as nursery:
        talks = await _began(place, nursery)
        await trio.sleep(seconds)
        victim = place.nodes["a"]
        held = talks.held_by("a")
        victim.signal(signal.SIGKILL)
        killed_s = trio.current_time()
        await victim.ends(5.0)
        await trio.sleep(2.0 + seconds)
        _judge_kill(verdict, talks, killed_s, seconds, held)
        await _back(place, verdict, talks, victim)
        await trio.sleep(5.0)
        again = between(talks.asks, trio.current_time() - 4.0, trio.current_time())
        verdict.must(
            any(ask.node == "a" for ask in again), f"hits with the node back {hit_ratio(again):.1%} (4 s)"
        )
        talks.is_over = True
    _failed(verdict, talks, may_break=True)


def _judge_kill(verdict: Verdict, talks: Talks, killed_s: float, seconds: float, held: int) -> None:
    broken = [each for ask in talks.asks for each in ask.broken]
    foreign = [each for each in broken if each[0] != "a"]
    verdict.must(
        not foreign and len(broken) <= held + 2,
        f"the node held {held} requests when it was killed; {len(broken)} connections broke, {len(foreign)} of them "
        "of other nodes; all were asked again and answered",
        str(foreign[:3]),
    )
    before = between(talks.asks, killed_s - seconds, killed_s)
    after = between(talks.asks, killed_s + 2.0, killed_s + 2.0 + seconds)
    for what, ratio in (("hits", hit_ratio), ("hits of what was computed before", kept_ratio)):
        was, now = ratio(before), ratio(after)
        verdict.must(
            now >= 0.98 * was,
            f"{what}: {was:.2%} in {seconds:.0f} s before ({len(before)} requests), {now:.2%} from 2 s after the kill "
            f"({len(after)} requests on the others)",
        )
    for what, asks in (("before", before), ("from 2 s after", after)):
        times = [ask.ttft_s * 1000 for ask in asks]
        verdict.note(
            f"first token {what}: p50 {quantile(times, 0.5):.0f} ms, p99 {quantile(times, 0.99):.0f} ms"
        )
    soon = between(talks.asks, killed_s, killed_s + 2.0)
    verdict.note(f"in the 2 s between: {len(soon)} requests, hits {hit_ratio(soon):.1%}")


async def _back(place: Site, verdict: Verdict, talks: Talks, victim: Node) -> None:
    """The node again, and how soon it knows what the others know of prompts it has never seen."""
    known = [talks.ended[-1 - number] for number in range(min(KNOWN, len(talks.ended)))]
    peer = place.nodes["b"]
    started_s = trio.current_time()
    place.launch(victim)
    await _until(lambda: _alive(peer, len(ALL)))
    joined_s = trio.current_time()
    share = here = there = 0.0
    with trio.move_on_after(10.0):
        while share < WARM_SHARE:
            here = there = 0
            for body in known:
                try:
                    ours, _ = await matched_blocks(victim, body)
                except (Failed, AssertionError):
                    break  # it does not listen yet, or has no worker
                theirs, _ = await matched_blocks(peer, body)
                there += sum(theirs.values())
                here += sum(min(ours.get(worker, 0), depth) for worker, depth in theirs.items())
            share = here / max(1.0, there)
    warm_s = trio.current_time()
    verdict.must(
        warm_s - joined_s <= 2.0 and share >= WARM_SHARE,
        f"the node is back: in the mesh {joined_s - started_s:.2f} s after its start, warm {warm_s - joined_s:.2f} s after "
        f"joining: knows {here:.0f} of the {there:.0f} blocks that {peer.name} knows of {len(known)} prompts",
    )


async def _alive(node: Node, count: int) -> bool:
    return bool((await node.document("/mesh/status"))["alive"] == count)


async def _until(is_so: Callable[[], Awaitable[bool]], within_s: float = 20.0) -> None:
    with trio.fail_after(within_s):
        while not await is_so():
            await trio.sleep(LOOK_S)


# -- restart


async def restart(place: Site, verdict: Verdict, seconds: float) -> None:
    """SIGTERM, start, wait until it is ready, the next one; clients must not notice."""
    await place.start_engines()
    await place.start_nodes("abc", "--shutdown-grace-period-secs", f"{GRACE_S:g}", everywhere=True)
    async with trio.open_nursery() as nursery:
        talks = await _began(place, nursery)
        begin_s = trio.current_time()
        for node in list(place.nodes.values()):
            started_s = trio.current_time()
            node.signal(signal.SIGTERM)
            code = await node.ends(GRACE_S + 10.0)
            gone_s = trio.current_time()
            place.launch(node)
            await place.ready(node)
            verdict.must(
                code == 0,
                f"{node.name}: ended with {code} after {gone_s - started_s:.1f} s, ready again "
                f"{trio.current_time() - gone_s:.1f} s later",
            )
            await trio.sleep(seconds / len(ALL))
        during = between(talks.asks, begin_s, trio.current_time())
        verdict.note(
            f"hits {hit_ratio(between(talks.asks, begin_s - 5.0, begin_s)):.1%} before, {hit_ratio(during):.1%} meanwhile"
        )
        talks.is_over = True
    _failed(verdict, talks)


# -- cut


class Watch:
    """Looks at every node all the time: are all engines ready, and how long was nothing answered at most?"""

    def __init__(self, place: Site) -> None:
        self.lost: list[str] = []
        self.looks = 0
        self._place = place

    async def run(self) -> None:
        while True:
            for node in self._place.nodes.values():
                count = await workers_ready(node)
                self.looks += 1
                if count != ENGINES:
                    self.lost.append(f"{node.name} had {count}")
            await trio.sleep(0.25)


def _longest_gap_s(talks: Talks, names: str, begin_s: float, end_s: float) -> float:
    """The longest time in which none of these nodes began an answer that came whole."""
    asks = [ask for ask in between(talks.asks, begin_s, end_s) if ask.node in names]
    times = [begin_s, *sorted(ask.asked_s for ask in asks), end_s]
    return max(later - sooner for sooner, later in pairwise(times))


async def cut(place: Site, verdict: Verdict, seconds: float, spaces: Sequence[str], hub: str) -> None:
    """`c` is parted from `a` and `b`; only `a` was told where the engines are."""
    await place.start_engines()
    hosts = [
        Host(f"{hub.rpartition('.')[0]}.{number + 1}", ("ip", "netns", "exec", space))
        for number, space in enumerate(spaces)
    ]
    await place.start_nodes("abc", hosts=hosts)
    watch = Watch(place)
    async with trio.open_nursery() as nursery:
        talks = await _began(place, nursery)
        nursery.start_soon(watch.run)
        await trio.sleep(10.0)
        cut_s = trio.current_time()
        for other in hosts[:2]:
            for chain, way in (("INPUT", "-s"), ("OUTPUT", "-d")):
                _iptables(spaces[2], "-A", chain, way, other.address, "-j", "DROP")
        nursery.start_soon(_say_when_noticed, place, verdict, cut_s)
        await trio.sleep(seconds)
        heal_s = trio.current_time()
        placed = {
            side: [body for node, body in talks.recent if node in side][-KNOWN // 2 :] for side in ("ab", "c")
        }
        views = [(await node.document("/mesh/status"))["alive"] for node in place.nodes.values()]
        verdict.must(views == [2, 2, 1], f"alive as a, b, c saw it at the end of the cut: {views}")
        _iptables(spaces[2], "-F")
        await _judge_heal(place, verdict, heal_s, placed)
        await trio.sleep(max(0.0, heal_s + 8.0 - trio.current_time()))
        talks.is_over = True
        agreed_s = await _agreed(place, heal_s)
        verdict.must(
            agreed_s <= 10.0,
            f"and again {agreed_s:.2f} s after healing, when the load has ended after 8 s of them",
        )
        nursery.cancel_scope.cancel()
    _judge_cut(verdict, talks, watch, cut_s, heal_s)


def _judge_cut(verdict: Verdict, talks: Talks, watch: Watch, cut_s: float, heal_s: float) -> None:
    _failed(verdict, talks)
    during = between(talks.asks, cut_s, heal_s)
    for side in ("ab", "c"):
        count = sum(ask.node in side for ask in during)
        gap_s = _longest_gap_s(talks, side, cut_s, heal_s)
        verdict.must(
            gap_s < 1.0,
            f"side {side} answered {count} requests during the cut; never more than {gap_s:.2f} s apart",
        )
    verdict.must(
        not watch.lost,
        f"{watch.looks} looks at the workers of all nodes, {len(watch.lost)} without all of them",
        str(watch.lost[:3]),
    )
    before = between(talks.asks, cut_s - 10.0, cut_s)
    verdict.note(
        f"hits {hit_ratio(before):.1%} in 10 s before the cut, {hit_ratio(during):.1%} during it "
        f"({len(during)} requests; conversations go from side to side), {hit_ratio(between(talks.asks, heal_s + 1.0, heal_s + 6.0)):.1%} "
        "in the seconds after"
    )


async def _say_when_noticed(place: Site, verdict: Verdict, cut_s: float) -> None:
    await _until(lambda: _alive(place.nodes["a"], 2), 60.0)
    verdict.note(f"a knows that c is gone {trio.current_time() - cut_s:.1f} s after the cut")


async def _judge_heal(
    place: Site, verdict: Verdict, heal_s: float, placed: dict[str, list[dict[str, object]]]
) -> None:
    """All see all again, agree although the load goes on, and each side learns what the other one placed."""
    nodes = list(place.nodes.values())
    for node in nodes:
        await _until(partial(_alive, node, len(ALL)))
    verdict.note(f"all see all alive {trio.current_time() - heal_s:.2f} s after healing")
    agreed_s = await _agreed(place, heal_s)
    verdict.must(agreed_s <= 10.0, f"digests of all three agree {agreed_s:.2f} s after healing, under load")
    share = first = 0.0
    with trio.move_on_after(LEARN_S):
        while share < WARM_SHARE:
            share = await _known_beyond(nodes, placed)
            first = first or share
    took_s = trio.current_time() - heal_s
    count = sum(map(len, placed.values()))
    verdict.must(
        share >= LEARNT_SHARE and took_s <= 10.0,
        f"each side knows {first:.1%} of the blocks of the other side's last {count} prompts then, {share:.1%} "
        f"{took_s:.2f} s after healing",
    )


async def _known_beyond(nodes: list[Node], placed: dict[str, list[dict[str, object]]]) -> float:
    """The share of the blocks of these prompts, as the side knows them that placed them, that the other side knows too."""
    here = there = 0
    for side, bodies in placed.items():
        for body in bodies:
            depths = {node.name: max((await matched_blocks(node, body))[0].values()) for node in nodes}
            known = max(depth for name, depth in depths.items() if name in side)
            there += known
            here += min(known, *(depth for name, depth in depths.items() if name not in side))
    return here / max(1, there)


async def _agreed(place: Site, since_s: float) -> float:
    """Seconds until `state_digest` is the same on all nodes."""
    with trio.move_on_after(30.0):
        while True:
            found: list[str] = []

            async def read(node: Node, found: list[str] = found) -> None:
                found.append((await node.document("/mesh/status"))["state_digest"])

            async with trio.open_nursery() as nursery:
                for node in place.nodes.values():
                    nursery.start_soon(read, node)
            if len(set(found)) == 1:
                break
            await trio.sleep(LOOK_S)
    return trio.current_time() - since_s


def _iptables(space: str, *rule: str) -> None:
    subprocess.run(["ip", "netns", "exec", space, "iptables", "-w", "5", *rule], check=True)


async def _cut_outside(seconds: float, logs: Path | None) -> int:
    """Makes the network, and plays inside it: clients, balancer and engines on a host of their own."""
    remove_leftovers()
    code = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_by_signal, nursery.cancel_scope)
        code = await _cut_in_lab(seconds, logs)
        nursery.cancel_scope.cancel()
    return code


async def _cancel_by_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


async def _cut_in_lab(seconds: float, logs: Path | None) -> int:
    async with lab() as net:
        spaces = [net.space(net.add_host()) for _ in ALL]
        hub = net.add_host()
        words = (
            sys.executable, "-m", "tests.bench.cluster_life", "cut", "--seconds", str(seconds),
            *(() if logs is None else ("--logs", str(logs))), "--inside", net.ip(hub), *spaces,
        )  # fmt: skip
        return await _run_inside(net, hub, words)


async def _run_inside(net: Lab, hub: int, words: Sequence[str]) -> int:
    process = await trio.lowlevel.open_process(net.command(hub, *words))
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            with trio.CancelScope(shield=True), trio.move_on_after(10.0):
                await process.wait()


# -- soak


async def soak(place: Site, verdict: Verdict, seconds: float) -> None:
    """Steady load of new conversations; engines and indexes are full after the first half minute and forget as they learn."""
    await place.start_engines()
    await place.start_nodes("abc")
    rss: dict[str, list[int]] = {name: [] for name in ALL}
    lags: list[float] = []
    async with trio.open_nursery() as nursery:
        talks = await _began(place, nursery)
        begin_s = trio.current_time()
        while trio.current_time() - begin_s < seconds:
            await trio.sleep(min(SAMPLE_S, seconds / 20))
            for node in place.nodes.values():
                rss[node.name].append(node.rss_kib)
                lags.append((await node.document("/mesh/status"))["lag_secs"]["max"])
            if len(rss["a"]) % 12 == 0:
                print(
                    f"  {trio.current_time() - begin_s:4.0f} s  {_row(rss)}  {len(talks.asks)} requests",
                    flush=True,
                )
        took_s = trio.current_time() - begin_s
        answered = between(talks.asks, begin_s, trio.current_time())
        for node in place.nodes.values():
            await _judge_memory(verdict, node, rss[node.name])
        talks.is_over = True
    verdict.note(
        f"{len(answered)} requests in {took_s:.0f} s, hits {hit_ratio(answered):.1%}, "
        f"first token p50 {quantile([ask.ttft_s * 1000 for ask in answered], 0.5):.0f} ms, "
        f"p99 {quantile([ask.ttft_s * 1000 for ask in answered], 0.99):.0f} ms"
    )
    await _judge_lag(place, verdict, lags)
    _failed(verdict, talks)


def _row(rss: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {each[-1] / 1024:.1f} MiB" for name, each in rss.items())


async def _judge_memory(verdict: Verdict, node: Node, rss: list[int]) -> None:
    """The second half against its own beginning; means of five samples, for one sample has the garbage of its moment."""
    half = rss[len(rss) // 2 :]
    begin, end = sum(half[:5]) / len(half[:5]), sum(half[-5:]) / len(half[-5:])
    index = sum((await node.metrics("smg_cache_index_bytes")).values())
    verdict.must(
        end < 1.05 * begin,
        f"{node.name}: RSS {rss[0] / 1024:.1f} MiB at first, {begin / 1024:.1f} at half time, {end / 1024:.1f} at the end "
        f"({end / begin - 1:+.1%} in the second half, most {max(rss) / 1024:.1f}); index {index / 2**20:.2f} MiB",
    )


async def _judge_lag(place: Site, verdict: Verdict, lags: list[float]) -> None:
    shares: dict[float, float] = {}
    total = 0.0
    for node in place.nodes.values():
        for labels, value in (await node.metrics("smg_mesh_lag_seconds_bucket")).items():
            edge_s = float(labels.split('le="')[1].partition('"')[0])
            shares[edge_s] = shares.get(edge_s, 0.0) + value
        total += (await node.metrics("smg_mesh_lag_seconds_count"))[""]
    p50_s, p99_s = (
        min(edge for edge, count in shares.items() if count >= share * total) for share in (0.5, 0.99)
    )
    verdict.must(
        p99_s < 1.0 and total > 0,
        f"mesh lag of {total:.0f} placements: p50 <= {p50_s * 1000:g} ms, p99 <= {p99_s * 1000:g} ms; "
        f"most that a node showed in its status {max(lags) * 1000:.0f} ms",
    )


# -- all

PLAYS: dict[str, tuple[float, Callable[[Site, Verdict, float], Awaitable[None]]]] = {
    "kill": (20.0, kill),
    "restart": (10.0, restart),
    "soak": (600.0, soak),
    "owner": (45.0, owner),
}
CUT_SECONDS = 60.0


async def _play(arguments: argparse.Namespace, folder: Path) -> int:
    verdict = Verdict()
    hub = arguments.inside[0] if arguments.inside else "127.0.0.1"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_by_signal, nursery.cancel_scope)
        async with site(folder, hub) as place:
            if arguments.inside:
                await cut(place, verdict, arguments.seconds or CUT_SECONDS, arguments.inside[1:], hub)
            else:
                seconds, play = PLAYS[arguments.play]
                await play(place, verdict, arguments.seconds or seconds)
        verdict.is_over = True
        nursery.cancel_scope.cancel()
    return verdict.code()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cluster_life", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("play", choices=[*PLAYS, "cut"])
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="length of a window, of the cut, of the soak (default: the play's own)",
    )
    parser.add_argument(
        "--logs", type=Path, default=None, help="where logs of the processes stay (default: nowhere)"
    )
    parser.add_argument("--inside", nargs="+", default=(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play == "cut" and not arguments.inside:
        return trio.run(_cut_outside, arguments.seconds, arguments.logs)
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        return trio.run(_play, arguments, logs)


if __name__ == "__main__":
    sys.exit(main())
