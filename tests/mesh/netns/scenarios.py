"""What real agents must survive on a real network, each as one play that returns what it measured, in seconds or bytes.

Owns the plays and their limits (the targets of the mesh). They are independent of each other and may run side by side.
`rounds` repeats the quick part of a play for the long form (scripts/mesh-night).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

import trio

from tests.mesh.netns.lab import PORT, SECRET, Lab, Node

Measured = dict[str, list[float]]
Scenario = Callable[[Lab, int], Awaitable[Measured]]

PAUSE_S = 25.0
PARTITION_S = 45.0
IDLE_S = 30.0
GARBAGE_PACKETS = 100_000

QUIET = ("status", "peer", "stranger", "unknown_key", "udp_blocked", "udp_open")
"""What an agent may say while it is flooded: its datagrams drown for a moment, so it is reached by stream."""

SPRAY = """
import os, random, socket, sys
host, port, packets = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(7)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
noise = [rng.randbytes(rng.randrange(1400)) for _ in range(500)]
noise += [b"\\xa7M\\x01" + bytes((flag,)) + rng.randbytes(rng.randrange(20, 1300)) for flag in (0, 1) for _ in range(250)]
for number in range(packets):
    udp.sendto(noise[number % len(noise)], (host, port))
for number in range(300):
    try:
        with socket.create_connection((host, port), 2) as tcp:
            tcp.sendall(noise[-1 - number % 600] + rng.randbytes(3000))
    except OSError:
        pass
"""


def seeds_of(lab: Lab, *nodes: Node) -> tuple[str, str]:
    return ("--seeds", ",".join(f"{lab.ip(node.place)}:{PORT}" for node in nodes))


def all_say(nodes: list[Node], name: str, state: str) -> bool:
    return all(node.members.get(name) == state for node in nodes)


def never(nodes: list[Node], *events: str) -> None:
    for node in nodes:
        found = [line for line in node.lines if line["event"] in events]
        assert not found, (node.name, found)


async def join(lab: Lab, rounds: int) -> Measured:
    took: list[float] = []
    a = await lab.start("a")
    for number in range(rounds):
        others: list[Node] = []

        async def one(name: str, others: list[Node] = others) -> None:
            others.append(await lab.start(name, *seeds_of(lab, a)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, f"b{number}")
            nursery.start_soon(one, f"c{number}")
        last_s = max(node.ready_s for node in others)
        took.append(max(0.0, await lab.until(lab.all_alive, 5.0, last_s)))
        for node in others:
            await lab.kill(node)
    assert max(took) <= 1.0, took
    return {"join of three": took}


async def late_seed_by_name(lab: Lab, rounds: int) -> Measured:
    took: list[float] = []
    for number in range(rounds):
        b = await lab.start(f"b{number}", "--seeds", f"late{number}.mesh:{PORT}")
        await trio.sleep(8)
        a = await lab.start(f"a{number}")
        lab.name_host(f"late{number}.mesh", a.place)
        took.append(await lab.until(lambda a=a, b=b: all_say([b], a.name, "alive"), 10.0, a.ready_s))  # type: ignore[misc]
        for node in (a, b):
            await lab.kill(node)
    assert max(took) <= 5.0, took
    return {"seed by name, 8 s late": took}


async def dead_first_seed(lab: Lab, rounds: int) -> Measured:
    took: list[float] = []
    a = await lab.start("a")
    nobody, closed = lab.add_host() + 100, lab.add_host()
    seeds = f"{lab.ip(nobody)}:{PORT},{lab.ip(closed)}:{PORT},no.such.name:{PORT},{lab.ip(a.place)}:{PORT}"
    for number in range(rounds):
        b = await lab.start(f"b{number}", "--seeds", seeds)
        took.append(max(0.0, await lab.until(lab.all_alive, 5.0, b.ready_s)))
        await lab.kill(b)
    assert max(took) <= 1.0, took
    return {"join past dead seeds": took}


async def kill_and_restart(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abc")
    down: list[float] = []
    back: list[float] = []
    for _ in range(rounds):
        await trio.sleep(2)
        victim, others = nodes[2], nodes[:2]
        killed_s = trio.current_time()
        await lab.kill(victim)
        down.append(await lab.until(lambda others=others: all_say(others, "c", "dead"), 5.0, killed_s))  # type: ignore[misc]
        old = dict(others[0].boots)["c"]
        nodes[2] = await lab.restart(victim)

        def is_back(others: list[Node] = others, old: str = old) -> bool:
            return all_say(others, "c", "alive") and all(node.boots["c"] != old for node in others)

        back.append(max(0.0, await lab.until(is_back, 5.0, nodes[2].ready_s)))
        await lab.until(lab.all_alive, 5.0)
    assert max(down) <= 1.0, down
    assert max(back) <= 1.0, back
    return {"kill -9 known to all": down, "restart under the same name": back}


async def quick_restart(lab: Lab, rounds: int) -> Measured:
    """Nobody has noticed the death when the new life is there."""
    nodes = await lab.mesh("abc")
    took: list[float] = []
    for _ in range(rounds):
        await trio.sleep(1)
        lab.cut(nodes[2])  # nothing is heard of the death
        await lab.kill(nodes[2])
        lab.mend(nodes[2])
        nodes[2] = await lab.restart(nodes[2])
        took.append(max(0.0, await lab.until(lab.all_alive, 5.0, nodes[2].ready_s)))
    assert max(took) <= 1.0, took
    return {"restart after a silent death": took}


async def pause(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abc")
    others = nodes[:2]
    down: list[float] = []
    back: list[float] = []
    for _ in range(rounds):
        await trio.sleep(2)
        stopped_s = trio.current_time()
        lab.signal(nodes[2], signal.SIGSTOP)
        down.append(await lab.until(lambda: all_say(others, "c", "dead"), 10.0, stopped_s))
        await trio.sleep(PAUSE_S - (trio.current_time() - stopped_s))
        continued_s = trio.current_time()
        lab.signal(nodes[2], signal.SIGCONT)
        back.append(await lab.until(lab.all_alive, 20.0, continued_s))
        await trio.sleep(5)
        assert lab.all_alive()
    assert max(down) <= 4.0, down
    assert max(back) <= 15.0, back
    never([nodes[2]], "member_down")
    return {"hang of 25 s known to all": down, "alive again after it": back}


async def short_freeze(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abc")
    for number in range(5 * rounds):
        node = nodes[number % 3]
        lab.signal(node, signal.SIGSTOP)
        await trio.sleep(0.5)
        lab.signal(node, signal.SIGCONT)
        await trio.sleep(2)
    never(nodes, "member_down")
    return {}


async def partition(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abc")
    a, b, c = nodes
    down: list[float] = []
    healed: list[float] = []
    shared: list[float] = []
    for number in range(rounds):
        await trio.sleep(2)
        cut_s = trio.current_time()
        lab.cut(c)
        down.append(await lab.until(lambda: all_say([a, b], "c", "dead"), 10.0, cut_s))
        await lab.until(lambda: all_say([c], "a", "dead") and all_say([c], "b", "dead"), 10.0)
        writer = await lab.start(f"w{number}", *seeds_of(lab, a), "--put", f"round{number}=x")
        await trio.sleep(PARTITION_S - (trio.current_time() - cut_s))
        mended_s = trio.current_time()
        lab.mend(c)
        healed.append(await lab.until(lab.all_alive, 20.0, mended_s))
        key = f"b'round{number}'"
        has_it = lambda key=key: any(line.get("key") == key for line in c.lines)  # noqa: E731
        shared.append(await lab.until(has_it, 10.0, mended_s))
        await lab.kill(writer)
    assert max(down) <= 4.0, down
    assert max(healed) <= 15.0, healed
    assert max(shared) <= 25.0, shared
    return {
        "lost host known to all": down,
        "cut of 45 s healed": healed,
        "write of the other side there": shared,
    }


async def leave(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abc")
    took: list[float] = []
    for _ in range(rounds):
        await trio.sleep(1)
        left_s = trio.current_time()
        lab.signal(nodes[2], signal.SIGTERM)
        took.append(await lab.until(lambda: all_say(nodes[:2], "c", "left"), 5.0, left_s))
        with trio.fail_after(5):
            assert await nodes[2].process.wait() == 0
        await trio.sleep(3)
        assert all_say(nodes[:2], "c", "left")
        never(nodes[:2], "suspected", "member_down")
        nodes[2] = await lab.restart(nodes[2])
        await lab.until(lab.all_alive, 5.0)
    assert max(took) <= 1.0, took
    return {"leave known to all": took}


async def udp_blocked(lab: Lab, rounds: int) -> Measured:
    places = [lab.add_host() for _ in range(3)]
    for place in places:
        lab.block_udp(place)
    a = await lab.start("a", place=places[0])
    flags = (*seeds_of(lab, a), "--status-interval", "1")
    nodes = [a, await lab.start("b", *flags, place=places[1]), await lab.start("c", *flags, place=places[2])]
    joined_s = max(0.0, await lab.until(lab.all_alive, 5.0, nodes[2].ready_s))
    await trio.sleep(10)
    rates = await traffic(nodes, 15.0 * rounds)
    never(nodes, "suspected", "member_down")
    assert {row["transport"] for row in nodes[1].status().values()} == {"tcp"}
    assert joined_s <= 1.0, joined_s
    assert max(rates) <= 1900, rates
    return {"join of three, UDP blocked": [joined_s], "bytes/s, UDP blocked": rates}


async def traffic(nodes: list[Node], seconds: float) -> list[float]:
    """Bytes per second that each host sends, Ethernet headers included."""
    before = [node.sent_bytes() for node in nodes]
    start_s = trio.current_time()
    await trio.sleep(seconds)
    took_s = trio.current_time() - start_s
    return [(node.sent_bytes() - old) / took_s for node, old in zip(nodes, before, strict=True)]


async def idle(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abc")
    await trio.sleep(12)
    cpu = [node.cpu_s() for node in nodes]
    start_s = trio.current_time()
    rates = await traffic(nodes, IDLE_S * rounds)
    took_s = trio.current_time() - start_s
    shares = [100 * (node.cpu_s() - old) / took_s for node, old in zip(nodes, cpu, strict=True)]
    never(nodes, "suspected", "member_down")
    assert max(rates) <= 1500, rates
    assert max(shares) <= 1.0, shares
    return {"bytes/s, idle": rates, "% of a core, idle": shares}


async def idle_of_sixteen(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abcdefghijklmnop")
    await trio.sleep(15)
    cpu = [node.cpu_s() for node in nodes]
    start_s = trio.current_time()
    rates = await traffic(nodes, IDLE_S * rounds)
    took_s = trio.current_time() - start_s
    shares = [100 * (node.cpu_s() - old) / took_s for node, old in zip(nodes, cpu, strict=True)]
    assert max(rates) <= 3000, rates
    return {"bytes/s, idle, 16 members": rates, "% of a core, idle, 16 members": shares}


async def garbage(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("ab", "--status-interval", "1")
    attacker = lab.add_host()
    before = [len(node.lines) for node in nodes]
    start_s = trio.current_time()
    command = lab.command(attacker, sys.executable, "-c", SPRAY, lab.ip(nodes[0].place), str(PORT))
    await trio.run_process([*command, str(GARBAGE_PACKETS * rounds)], stdout=subprocess.DEVNULL)
    took_s = trio.current_time() - start_s
    await trio.sleep(3)
    for node, old in zip(nodes, before, strict=True):
        news = [line for line in node.lines[old:] if line["event"] not in QUIET]
        assert not news, (node.name, news)
        assert len([line for line in node.lines if line["event"] == "stranger"]) <= 2 + took_s / 10
    counts = [line for line in nodes[0].lines if line["event"] == "status"][-1]["counts"]
    turned_away = sum(counts.get(f"seal_{what}", 0) for what in ("garbage", "unknown_key", "plain_refused"))
    assert turned_away > 1000, counts
    late = await lab.start("c", *seeds_of(lab, nodes[0]))
    joined_s = max(0.0, await lab.until(lab.all_alive, 5.0, late.ready_s))
    return {"join after garbage": [joined_s], "garbage packets read": [float(turned_away)]}


async def strangers(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("ab", "--label", "one")
    seeds = seeds_of(lab, nodes[0])
    others = [
        await lab.start("x", *seeds, "--label", "one", secret=SECRET[::-1]),
        await lab.start("y", *seeds, "--label", "two"),
        await lab.start("z", *seeds, "--label", "one", secret=""),
    ]
    await trio.sleep(10 * rounds)
    for node in nodes:
        assert set(node.members) == {"a", "b"} - {node.name}, node.members
    for node in others:
        assert not node.members, (node.name, node.members)
    never(nodes, "suspected", "member_down")
    return {}


async def loss(lab: Lab, rounds: int) -> Measured:
    nodes = await lab.mesh("abcd")
    for node in nodes:
        lab.lose(node.place, 0.05)
    await trio.sleep(40 * rounds)
    never(nodes, "member_down")
    return {}


SCENARIOS: dict[str, Scenario] = {
    play.__name__: play
    for play in (
        partition,
        pause,
        idle,
        loss,
        udp_blocked,
        kill_and_restart,
        join,
        late_seed_by_name,
        dead_first_seed,
        quick_restart,
        short_freeze,
        leave,
        garbage,
        strangers,
    )
}
"""The longest first."""
NIGHT: dict[str, Scenario] = {idle_of_sixteen.__name__: idle_of_sixteen}
"""Too costly for every day."""
