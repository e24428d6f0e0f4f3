"""The figures of docs/mesh/measurements.md: detection, healing, false deaths, spread and idle cost, by simulation.

`python -m tests.sim.measure detect --members 3,10,64 --runs 40` prints one JSON line per configuration. The yardstick
`memberlist` is this machine with memberlist's LAN values and without what memberlist has not: kept streams, the
refused rule, repair by fingerprint, and (unless `memberlist+redial`) the re-dial of the dead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import msgspec

from mesh.member import Status
from mesh.messages import MemberDown, MemberUp, Suspected
from mesh.settings import MEMBERLIST_LAN, SwimSettings
from tests.sim.network import Cut
from tests.sim.node import Node
from tests.sim.world import World, grow

CONFIGS: dict[str, tuple[SwimSettings, bool]] = {
    "ours": (SwimSettings(), True),
    "ours-norefuse": (SwimSettings(refused_rule=False), True),
    "memberlist": (MEMBERLIST_LAN, False),
    "memberlist+redial": (msgspec.structs.replace(MEMBERLIST_LAN, redial_interval_s=5.0), False),
}


def _at(values: list[float], share: float) -> float | None:
    """A percentile, None for no values."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else None


def _summary(values: list[float], runs: int) -> dict[str, Any]:
    return {
        "p50": _at(values, 0.5),
        "p95": _at(values, 0.95),
        "max": _at(values, 1.0),
        "never": runs - len(values),
        "runs": runs,
    }


def _world(config: str, seed: int) -> World:
    settings, keeps_streams = CONFIGS[config]
    return World(seed, settings, keeps_streams=keeps_streams)


def _when_all(world: World, event: type, victim: str, since_s: float, limit_s: float) -> float | None:
    """Seconds until every other process has told `event` about the victim."""
    told: set[str] = set()
    last_s = 0.0
    place = len(world.log)
    waited_s = 0.0
    while waited_s < limit_s:
        world.run(0.1)
        waited_s += 0.1
        for when_s, node, what in world.log[place:]:
            if isinstance(what, event) and what.record.name == victim:  # type: ignore[attr-defined]
                told.add(node.name)
                last_s = when_s
        place = len(world.log)
        if len(told) >= len([name for name in world.nodes if name != victim]):
            return last_s - since_s
    return None


def detect(config: str, members: int, runs: range, how: str) -> dict[str, Any]:
    """From a death to all knowing it. how: kill (port refuses), hang (SIGSTOP), host (packets vanish)."""
    times: list[float] = []
    suspect: list[float] = []
    for run in runs:
        world = _world(config, run * 7919 + members)
        names = grow(world, members)
        rng = Random(run)
        world.run(rng.random() * 2)
        victim = rng.choice(names)
        start_s = world.loop.now
        place = len(world.log)
        if how == "hang":
            world.pause(victim, 3600.0)
        else:
            world.crash(victim, host_lost=how == "host")
        took_s = _when_all(world, MemberDown, victim, start_s, 60.0)
        first = [when_s - start_s for when_s, _, what in world.log[place:] if isinstance(what, Suspected)]
        suspect += first[:1]
        if took_s is not None:
            times.append(took_s)
    return {"suspect_p50": _at(suspect, 0.5), **_summary(times, len(runs))}


def restart(config: str, members: int, runs: range) -> dict[str, Any]:
    """kill -9 and a new life of the same name at once: until all see the new life."""
    times: list[float] = []
    for run in runs:
        world = _world(config, run * 31 + members)
        names = grow(world, members)
        world.run(Random(run).random() * 2)
        victim = names[-1]
        seed = world.seed_of(names[0])
        start_s = world.loop.now
        world.crash(victim)
        world.run(0.3)
        node = world.start(victim, [seed], members - 1)

        def is_seen(node: Node = node, world: World = world) -> bool:
            boot = node.swim.own.boot
            views = [other.swim.member(node.name) for other in world.nodes.values() if other is not node]
            return world.all_see_all() and all(
                view is not None and view.record.boot == boot for view in views
            )

        if world.run_until(is_seen, 60.0) is not None:
            times.append(world.loop.now - start_s)
    return _summary(times, len(runs))


def join(config: str, members: int, runs: range) -> dict[str, Any]:
    """All start within 100 ms, each knows the first as seed: until all see all."""
    times: list[float] = []
    for run in runs:
        world = _world(config, run * 13 + members)
        rng = Random(run)
        names = [f"n{number:04d}" for number in range(members)]
        seed = f"{names[0]}:7946"
        for name in names:
            world.loop.at(rng.random() * 0.1, world.start, name, [seed])
        took_s = world.run_until(lambda w=world: len(w.nodes) == members and w.all_see_all(), 30.0)  # type: ignore[misc]
        if took_s is not None:
            times.append(took_s)
    return _summary(times, len(runs))


def late(config: str, members: int, runs: range) -> dict[str, Any]:
    """The first seed is dead, the second a name nobody knows, the third is known by name and starts 5 to 20 s after
    all others: from its start until all see all."""
    times: list[float] = []
    for run in runs:
        world = _world(config, run * 23 + members)
        rng = Random(run)
        names = [f"n{number:04d}" for number in range(members)]
        seeds = ["10.9.9.9:7946", "nobody:7946", f"{names[0]}:7946"]
        for name in names[1:]:
            world.loop.at(rng.random(), world.start, name, seeds)
        world.run(5.0 + rng.random() * 15.0)
        world.start(names[0], seeds)
        took_s = world.run_until(lambda w=world: len(w.nodes) == members and w.all_see_all(), 60.0)  # type: ignore[misc]
        if took_s is not None:
            times.append(took_s)
    return _summary(times, len(runs))


def heal(config: str, members: int, runs: range, how: str, cut_s: float = 50.0) -> dict[str, Any]:
    """From the end of a cut to all seeing all. how: halves, one (isolated)."""
    times: list[float] = []
    for run in runs:
        world = _world(config, run * 17 + members)
        grow(world, members)
        side = set(range(members // 2)) if how == "halves" else {members - 1}
        cut = world.cut(Cut(side))
        world.run(cut_s + Random(run).random() * 10)
        world.mend(cut)
        took_s = world.run_until(world.all_see_all, 90.0, 0.05)
        if took_s is not None:
            times.append(took_s)
    return _summary(times, len(runs))


def _wrong(world: World, spent_s: float, pairs: int, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Wrong deaths in a log of a run in which nobody died."""
    down: dict[tuple[str, str], float] = {}
    wrong_s, deaths, suspicions = 0.0, 0, 0
    last: dict[str, float] = {}
    for when_s, node, event in world.log:
        if isinstance(event, Suspected):
            suspicions += 1
        elif isinstance(event, MemberDown) and event.record.name not in skip:
            name = event.record.name
            down.setdefault((node.name, name), when_s)
            if when_s - last.get(name, -1e9) > 10.0:
                deaths += 1
            last[name] = when_s
        elif isinstance(event, MemberUp):
            since_s = down.pop((node.name, event.record.name), None)
            wrong_s += when_s - since_s if since_s is not None else 0.0
    wrong_s += sum(world.loop.now - since_s for since_s in down.values())
    return {"deaths": deaths, "suspicions": suspicions, "wrong_share": wrong_s / (spent_s * pairs)}


def false_deaths(
    config: str, members: int, hours: float, loss: float, first: int, udp_blocked: bool = False
) -> dict[str, Any]:
    """Nobody dies for `hours` node-hours under packet loss: wrong deaths and the share of wrongly dead pairs.

    In worlds of an hour at most each: what never heals would otherwise count the more the longer it is watched."""
    left_s = hours * 3600.0 / members
    total = {"deaths": 0, "suspicions": 0, "wrong_share": 0.0}
    sent = spent_s = 0.0
    for seed in itertools.count(1000 + first):
        chunk_s = min(3600.0, left_s)
        if chunk_s < 1.0:
            break
        world = _world(config, seed)
        grow(world, members)
        world.network.weather.loss = loss
        if udp_blocked:
            world.cut(Cut(set(range(members)), is_udp_only=True, inner=True))
        world.log.clear()
        before = sum(world.network.bytes_sent.values())
        world.run(chunk_s)
        found = _wrong(world, chunk_s, members * (members - 1))
        found["wrong_share"] *= chunk_s
        total = {key: total[key] + found[key] for key in total}
        sent += sum(world.network.bytes_sent.values()) - before
        left_s -= chunk_s
        spent_s += chunk_s
    return {
        "node_hours": round(hours, 1),
        "deaths": total["deaths"],
        "suspicions": total["suspicions"],
        "wrong_pairs_percent": round(100 * total["wrong_share"] / spent_s, 4),
        "bytes_per_s": round(sent / (members * spent_s)),
    }


def freeze(config: str, members: int, hours: float, freeze_s: float, first: int) -> dict[str, Any]:
    """One node in eight freezes every 20 s or so: deaths of the frozen, per node-hour of such life, and of others."""
    spent_s = hours * 3600.0 / members
    world = _world(config, 77 + first)
    names = grow(world, members)
    frozen = names[: max(1, members // 8)]
    rng = Random(5 + first)
    world.log.clear()
    start_s = world.loop.now

    def again(name: str) -> None:
        world.pause(name, freeze_s)
        world.loop.at(world.loop.now + freeze_s + rng.expovariate(1 / 20), again, name)

    for name in frozen:
        world.loop.at(world.loop.now + rng.random() * 20, again, name)
    world.run(spent_s)
    others = frozenset(frozen)
    found = _wrong(world, spent_s, members * (members - 1))
    healthy = _wrong(world, spent_s, members * (members - 1), skip=others)
    frozen_hours = len(frozen) * (world.loop.now - start_s) / 3600.0
    return {
        "frozen_node_hours": round(frozen_hours, 2),
        "deaths_per_frozen_node_hour": round((found["deaths"] - healthy["deaths"]) / frozen_hours, 2),
        "deaths_of_healthy": healthy["deaths"],
    }


def spread(config: str, members: int, runs: range, loss: float = 0.0) -> dict[str, Any]:
    """One update about a node: until all have it."""
    times: list[float] = []
    for run in runs:
        world = _world(config, run * 3 + members)
        names = grow(world, members, settle_s=8.0)
        world.network.weather.loss = loss
        node = world.nodes[names[run % members]]
        world.run(Random(run).random())
        start_s = world.loop.now
        node.swim.update_own(node.clock(), meta=b"news")
        node.drain()

        def is_known(world: World = world, name: str = node.name) -> bool:
            views = (other.swim.member(name) for other in world.nodes.values() if other.name != name)
            return all(view is not None and view.record.meta == b"news" for view in views)

        if world.run_until(is_known, 60.0, 0.01) is not None:
            times.append(world.loop.now - start_s)
    return _summary(times, len(runs))


def idle(config: str, members: int, seconds: float) -> dict[str, Any]:
    """Nothing happens: bytes and packets a second per node."""
    world = _world(config, 4)
    grow(world, members, settle_s=10.0)
    sent, packets = sum(world.network.bytes_sent.values()), sum(world.network.packets_sent.values())
    world.run(seconds)
    spent = members * seconds
    return {
        "bytes_per_s": round((sum(world.network.bytes_sent.values()) - sent) / spent),
        "packets_per_s": round((sum(world.network.packets_sent.values()) - packets) / spent, 2),
        "suspect": sum(
            member.status != Status.ALIVE for node in world.nodes.values() for member in node.swim.members()
        ),
    }


def rows(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The configurations asked for, and how to measure each."""
    first, hours, loss = options.first, options.hours, float(options.loss)
    for config in options.config.split(","):
        for members in (int(text) for text in options.members.split(",")):
            count = max(3, options.runs // (1 if members < 200 else 8))
            head = {"what": options.what, "config": config, "members": members}
            for how in options.how.split(","):
                at: tuple[str, int] = (config, members)
                runs = range(first, first + count)
                measures: dict[str, Callable[[], dict[str, Any]]] = {
                    "detect": partial(detect, *at, runs, how or "kill"),
                    "restart": partial(restart, *at, runs),
                    "join": partial(join, *at, runs),
                    "late": partial(late, *at, runs),
                    "heal": partial(heal, *at, runs, how or "halves"),
                    "loss": partial(false_deaths, *at, hours, loss, first),
                    "blocked": partial(false_deaths, *at, hours, 0.0, first, udp_blocked=True),
                    "freeze": lambda at=at, h=how: freeze(*at, hours, float(h or "0.5"), first),
                    "spread": partial(spread, *at, runs, loss),
                    "idle": partial(idle, *at, 300.0 if members < 200 else 60.0),
                }
                yield {**head, "how": how, "loss": loss}, measures[options.what]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.measure", description=__doc__)
    parser.add_argument(
        "what",
        choices=["detect", "restart", "join", "late", "heal", "loss", "blocked", "freeze", "spread", "idle"],
    )
    parser.add_argument("--config", default="ours", help="of: " + "; ".join(CONFIGS).replace(", ", " "))
    parser.add_argument("--members", default="3,10,64")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--how", default="", help="detect: kill,hang,host; heal: halves,one; freeze: seconds")
    parser.add_argument("--loss", default="0")
    parser.add_argument("--first", type=int, default=0, help="number of the first run: slices of a long one")
    parser.add_argument("--hours", type=float, default=50.0, help="node-hours of loss, blocked and freeze")
    for head, measure in rows(parser.parse_args()):
        print(json.dumps({**head, **measure()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
