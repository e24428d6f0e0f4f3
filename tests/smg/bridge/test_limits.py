"""MSH-6, ADM-5: nodes tell each other what is asked of them, and give each other their parts of a limit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from mesh import Ephemeral, Member, Record, Status
from smg.bridge import words
from smg.bridge.limits import LIMITS, SILENT_MAX_S, SharedLimits
from smg.tenancy.admission import RATE_KEY
from smg.tenancy.bucket import TokenBucket
from smg.tenancy.shares import DIVIDE, FLOOR, LOCAL, OneLimit
from tests.smg.bridge.wire import Wire

NAMESPACES = [Ephemeral(name=LIMITS, coalesce_s=0.0, ttl_s=10.0, refresh_s=3.0)]


def boot_of(name: str) -> bytes:
    return name.encode() * 8


def member(name: str, status: Status = Status.ALIVE, since_s: float = 0.0) -> Member:
    record = Record(name=name, boot=boot_of(name), incarnation=1, status=status, host="h", port=1, born_s=0)
    return Member(record, since_s)


class Node:
    """One node's bridge on the wire, with a bucket of 20 requests a second."""

    def __init__(self, wire: Wire, name: str, mode: str = DIVIDE) -> None:
        self.name = name
        self.bucket = TokenBucket(20.0, 20.0, trio.current_time(), RATE_KEY)
        self.limits = SharedLimits(wire[name].state, mode)
        self.limits.add(OneLimit(self.bucket), trio.current_time())
        wire[name].hear[LIMITS] = lambda change: self.limits.on_change(change, trio.current_time())
        self.members: Sequence[Member] = ()
        self.refusing: set[str] = set()

    def begin(self) -> None:
        self.limits.begin(self.name, boot_of(self.name), trio.current_time())

    def step(self) -> None:
        self.limits.step(self.members, self.refusing.__contains__, trio.current_time())

    @property
    def share(self) -> float:
        return self.bucket.burst / self.bucket.capacity


class Trio:
    """Nodes a, b and c that know each other; `asked` are requests in a tenth of a second."""

    def __init__(self, names: str = "abc", mode: str = DIVIDE) -> None:
        self.wire = Wire(**dict.fromkeys(names, NAMESPACES))
        self.nodes = {name: Node(self.wire, name, mode) for name in names}
        for name, node in self.nodes.items():
            node.members = [member(other) for other in names if other != name]
            node.begin()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    async def run(self, seconds: float, **asked: int) -> None:
        for _ in range(round(seconds * 10)):
            for name, node in self.nodes.items():
                for _ in range(asked.get(name, 0)):
                    node.bucket.take(trio.current_time())
                node.step()
            self.wire.run()
            await trio.sleep(0.1)

    @property
    def shares(self) -> list[float]:
        return [node.share for node in self.nodes.values()]


async def test_until_a_node_is_in_the_mesh_it_gives_out_the_floor(autojump_clock):
    wire = Wire(a=NAMESPACES)
    node = Node(wire, "a")
    assert node.share == FLOOR
    assert node.limits.first(b"other", 0.0) == (FLOOR, FLOOR)
    node.step()
    assert node.share == FLOOR


async def test_a_node_that_finds_nobody_has_the_whole_limit(autojump_clock):
    nodes = Trio("a")
    await nodes.run(2.0, a=1)
    assert nodes.shares == [1.0]


async def test_parts_follow_demand_and_are_even_when_nobody_asks(autojump_clock):
    nodes = Trio()
    await nodes.run(1.5)
    assert nodes.shares == pytest.approx([1 / 3] * 3, abs=0.001)
    await nodes.run(2.0, b=5)
    assert nodes["b"].share > 0.95
    assert sum(nodes.shares) <= 1.0 + 1e-9
    row = nodes["a"].limits.document()["limits"][0]
    assert row["limit"] == "requests per second"
    assert row["nodes"]["b"]["demand"] == pytest.approx(2.5, rel=0.2)
    assert nodes["a"].limits.divided == 1
    await nodes.run(8.0)
    assert nodes.shares == pytest.approx([1 / 3] * 3, abs=0.001)
    assert [node.limits.divided for node in nodes.nodes.values()] == [0, 0, 0]


async def test_a_limit_that_nobody_asks_costs_nothing(autojump_clock):
    nodes = Trio()
    await nodes.run(2.0, a=3)
    await nodes.run(60.0)  # until deletions are forgotten, too
    said = nodes.wire["a"].replica.stats()
    await nodes.run(5.0)
    assert nodes.wire["a"].replica.stats() == said
    assert list(nodes.wire["a"].state.items(LIMITS)) == []


async def test_what_a_dead_process_held_is_made_anew_and_what_a_silent_node_held_is_kept(autojump_clock):
    nodes = Trio()
    await nodes.run(3.0, a=2, b=2, c=2)
    held = nodes["c"].share
    lost = nodes.nodes.pop("c")
    for name in "ab":
        nodes.wire[name].replica.owner_died("c", nodes.wire["c"].life, trio.current_time())
        nodes.wire[name].tell()
        others = [member(other) for other in "ab" if other != name]
        nodes[name].members = [*others, member("c", Status.DEAD, trio.current_time())]
    await nodes.run(2.0, a=2, b=2)
    assert sum(nodes.shares) + held <= 1.0 + 1e-9
    assert sum(nodes.shares) > 0.5
    for name in "ab":
        nodes[name].refusing.add("c")
    await nodes.run(0.5, a=2, b=2)
    assert sum(nodes.shares) == pytest.approx(1.0, abs=0.01)
    assert lost.share == held


async def test_a_node_that_was_silent_for_ten_minutes_has_gone(autojump_clock):
    nodes = Trio()
    await nodes.run(1.5)
    nodes.nodes.pop("c")
    for name in "ab":
        others = [member(other) for other in "ab" if other != name]
        nodes[name].members = [*others, member("c", Status.DEAD, trio.current_time())]
    await nodes.run(0.2)
    assert nodes.shares == pytest.approx([1 / 3] * 2, abs=0.001)
    await trio.sleep(SILENT_MAX_S)
    await nodes.run(0.2)
    assert nodes.shares == pytest.approx([1 / 2] * 2, abs=0.001)


async def test_with_local_each_side_of_a_cut_has_the_whole_limit(autojump_clock):
    nodes = Trio(mode=LOCAL)
    await nodes.run(2.0, a=2, b=2, c=2)
    for name in "abc":
        friends = {"a": "b", "b": "a", "c": ""}[name]
        nodes[name].members = [
            member(other, Status.ALIVE if other in friends else Status.DEAD, trio.current_time())
            for other in "abc"
            if other != name
        ]
    await nodes.run(2.0, a=2, b=2, c=2)
    assert nodes["a"].share + nodes["b"].share == pytest.approx(1.0, abs=0.01)
    assert nodes["c"].share == pytest.approx(1.0, abs=0.01)


async def test_a_node_that_has_left_goes_on_with_an_even_part_at_least(autojump_clock):
    nodes = Trio()
    await nodes.run(3.0, a=5)
    assert nodes["c"].share < 0.05
    nodes["c"].limits.end(trio.current_time())
    assert nodes["c"].share == pytest.approx(1 / 3)
    assert nodes["c"].limits.first(b"new", 0.0)[0] == pytest.approx(1 / 3)


async def test_a_mesh_that_never_came_up_leaves_a_plain_limit(autojump_clock):
    node = Node(Wire(a=NAMESPACES), "a")
    node.limits.end(trio.current_time())
    assert node.share == 1.0


async def test_a_word_that_finds_no_room_is_told_again(autojump_clock):
    small = [Ephemeral(name=LIMITS, bytes_max=20, coalesce_s=0.0)]
    wire = Wire(a=small)
    node = Node(wire, "a")
    node.begin()
    node.bucket.take(trio.current_time())
    node.step()
    node.step()
    assert list(wire["a"].state.items(LIMITS)) == []
    assert node.limits.divided == 1


async def test_garbage_is_counted_and_changes_nothing(autojump_clock):
    nodes = Trio("ab")
    await nodes.run(1.5)
    nodes.wire["a"].state.put(LIMITS, RATE_KEY, b"garbage")
    nodes.wire["a"].state.put(LIMITS, b"x", words.encode(words.Share(1, b"12345678", 1, 1, 1, 0.0, 1, ())))
    nodes.wire.run()
    assert nodes["b"].limits.garbage == 2
    assert nodes["b"].limits.divided == 0
