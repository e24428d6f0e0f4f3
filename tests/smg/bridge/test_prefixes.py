"""Placements of one node in the index of another: told, lost, repaired, warmed; no agents, virtual time."""

from __future__ import annotations

from random import Random

import pytest
import trio

from mesh import Appended, Ephemeral, Stream
from mesh.namespace import Restored
from smg.bridge import words
from smg.bridge.chains import CHUNK_BLOCKS, Chains, runs_of
from smg.bridge.loads import LOAD
from smg.bridge.prefixes import BATCH_BLOCKS_MAX, FLUSHES_MAX, FLUSHES_PER_S, PREFIX, SharedPrefixes
from smg.fleet import load
from smg.fleet.block_hashes import ROOT
from smg.fleet.prefix_index import IndexSettings, Placement, PrefixIndex
from smg.fleet.worker import Kind
from smg.policies.cache_aware import CacheAware
from smg.policies.neighbours import News
from tests.smg.bridge.wire import FakePeers, Wire
from tests.smg.fleet.builders import fleet


class Node:
    """The rooms of one node that speak of prefixes."""

    def __init__(self, wire_name: str, *peers: str, blocks: int = 16_384) -> None:
        self.name = wire_name
        self.registry, self.workers = fleet(3)
        self.index = PrefixIndex(IndexSettings(worker_blocks=blocks))
        self.peers = FakePeers(wire_name, *peers)
        self.chains = Chains(
            self.registry,
            self.index,
            name=wire_name,
            nodes=lambda: (wire_name, *self.peers.live_names),
        )
        self.policy = CacheAware("m", index=self.index)
        self.done: list[str] = []
        self.soon: list[float] = []

    def connect(self, wire: Wire) -> None:
        node = wire[self.name]
        self.prefixes = SharedPrefixes(
            node.state,
            self.peers,  # type: ignore[arg-type]
            self.registry,
            self.index,
            self.chains,
            policy_of=lambda model, kind: self.policy if (model, kind) == ("m", Kind.REGULAR) else None,
            settle=lambda: None,
            telling=lambda: None,
            soon=lambda: self.soon.append(trio.current_time()),
            peers_done=lambda worker: self.done.append(worker.id),
        )
        node.hear[PREFIX] = lambda change: self.prefixes.on_change(change, trio.current_time())

    def place(self, hashes: list[int], worker: int = 0, seconds: float = 0.5) -> None:
        placement = self.index.place(self.workers[worker].id, hashes)
        self.prefixes.tell("m", News(placement, seconds), trio.current_time())

    def depth(self, hashes: list[int], worker: int = 0) -> int:
        return self.index.match(hashes).depth_of(self.index.bits_of(self.workers[worker].id))


def pair(**options: int) -> tuple[Wire, Node, Node]:
    nodes = {name: Node(name, *({"a", "b"} - {name}), **options) for name in "ab"}
    wire = Wire(
        **{
            name: [Ephemeral(name=LOAD), Stream(name=PREFIX, coalesce_s=0.0, source=node.chains)]
            for name, node in nodes.items()
        }
    )
    for node in nodes.values():
        node.connect(wire)
    wire.run()
    return wire, nodes["a"], nodes["b"]


async def test_few_placements_are_told_at_once_and_many_in_a_rhythm(autojump_clock):
    wire, a, b = pair()
    rhythm_s = 1.0 / FLUSHES_PER_S
    at_once = int(FLUSHES_MAX)
    for number in range(at_once):
        a.place([100 + number])
        wire.run()
        assert b.depth([100 + number]) == 1
    a.place([1, 2, 3, 4], seconds=0.1)
    a.place([1, 2, 3, 4, 5], seconds=0.1)
    wire.run()
    assert b.depth([1, 2, 3, 4, 5]) == 0  # they wait for their turn
    await trio.sleep(rhythm_s)
    a.prefixes.step(trio.current_time())
    wire.run()
    assert b.depth([1, 2, 3, 4, 5]) == 5
    assert b.peers.timings == [0.0] * at_once + [pytest.approx(rhythm_s, abs=0.002)]
    assert (a.prefixes.told, b.prefixes.heard) == (at_once + 2, at_once + 2)


async def test_heard_placements_count_in_the_account_of_the_worker(autojump_clock):
    wire, a, b = pair()
    b.policy._prices.account(b.workers[0])
    load.note_peers(b.workers[0], 1)
    now = trio.current_time()
    a.place([1], seconds=0.5)
    wire.run()
    assert b.policy._prices.known(b.workers[0].id).level_s(now) == pytest.approx(0.5)
    assert b.done == []  # it is in flight over there


async def test_what_a_peer_has_not_in_flight_is_over(autojump_clock):
    wire, a, b = pair()
    a.place([1])
    wire.run()
    assert b.done == [b.workers[0].id]


async def test_what_was_decided_for_a_node_is_not_counted_twice_by_it(autojump_clock):
    wire, a, b = pair()
    b.policy._prices.account(b.workers[0])
    a.prefixes.decide_for("b")
    a.place([1, 2], seconds=0.5)
    a.prefixes.decide_for(None)
    a.prefixes.tell_waiting(trio.current_time())
    wire.run()
    assert b.depth([1, 2]) == 2
    assert b.policy._prices.known(b.workers[0].id).level_s(trio.current_time()) == 0.0


async def test_what_is_decided_for_a_node_is_told_when_the_answer_has_left(autojump_clock):
    wire, a, b = pair()
    for number in range(int(FLUSHES_MAX) + 1):
        a.prefixes.decide_for("b")
        a.place([number])
        a.prefixes.decide_for(None)
        assert (
            a.prefixes.told == number and len(a.soon) == number + 1
        )  # nothing was done but to ask for a call
        a.prefixes.tell_waiting(trio.current_time())
        a.prefixes.tell_waiting(trio.current_time())
        assert a.prefixes.told == min(number + 1, FLUSHES_MAX)  # in the rhythm of all placements
    await trio.sleep(1.0 / FLUSHES_PER_S)
    a.prefixes.tell_waiting(trio.current_time())
    wire.run()
    assert all(b.depth([number]) == 1 for number in range(int(FLUSHES_MAX) + 1))


async def test_what_is_decided_for_nodes_is_told_at_once_when_it_is_too_much(autojump_clock):
    _wire, a, _b = pair()
    a.prefixes.decide_for("b")
    a.place(list(range(BATCH_BLOCKS_MAX)))
    assert a.prefixes.told == 1


async def test_a_placement_whose_beginning_is_unknown_is_asked_for(autojump_clock):
    wire, a, b = pair()
    chain = list(range(1, 30))
    a.place(chain[:20])
    wire.run()
    b.index.forget(b.workers[0].id)  # evicted here, for whatever reason
    await trio.sleep(1)
    a.place(chain)
    wire.run()
    assert b.depth(chain) == 0
    ((peer, question),) = b.prefixes.questions()
    assert peer == "a" and b.prefixes.questions() == []
    b.prefixes.answered(a.chains.answer(words.read_question(question)))
    assert b.depth(chain) == len(chain)


async def test_a_very_long_placement_is_told_in_parts(autojump_clock):
    wire, a, b = pair()
    chain = list(range(1, 2 * BATCH_BLOCKS_MAX + 10))
    a.place(chain)
    wire.run()
    assert b.depth(chain) == len(chain)


async def test_a_flush_travels_and_does_not_come_back(autojump_clock):
    wire, a, b = pair()
    flushed: list[str] = []
    b.registry.subscribe(lambda change: flushed.append(type(change).__name__))
    a.place([1, 2])
    wire.run()
    b.registry.subscribe(lambda change: b.policy.flushed(change.worker))
    a.registry.flushed(a.workers[0])
    wire.run()
    assert flushed == ["Flushed"]
    assert b.depth([1, 2]) == 0
    assert wire["b"].replica.stats()["prefix.sources"] >= 1
    assert b.prefixes.told == 0


async def test_placements_of_a_node_that_hashes_otherwise_are_not_taken_in(autojump_clock):
    wire, a, b = pair()
    b.peers.strangers.add("a")
    a.place([1, 2])
    wire.run()
    assert b.depth([1, 2]) == 0
    assert list(a.chains.fingerprints("a")) == list(b.chains.fingerprints("a")) != []


async def test_placements_on_workers_that_are_not_here_are_counted(autojump_clock):
    wire, a, b = pair()
    b.registry.remove(b.workers[2])
    a.place([1], worker=2)
    wire.run()
    assert b.prefixes.unknown == 1
    assert b.index.entries == 0


async def test_trunk_blocks_are_told_and_not_echoed(autojump_clock):
    wire, a, b = pair()
    for child in range(20):
        a.index.place(a.workers[0].id, [1, 100 + child])
    assert a.index.trunk()
    a.prefixes.step(trio.current_time() + 10)
    wire.run()
    assert b.index.trunk() == a.index.trunk()
    before = wire["b"].replica.stats()
    b.prefixes.step(trio.current_time() + 10)
    assert wire["b"].replica.stats() == before


async def test_what_was_lost_silently_is_found_by_fingerprints_and_brought_by_a_snapshot(autojump_clock):
    wire, a, b = pair()
    a.place([1, 2, 3])
    wire.run()
    # b loses a delta behind the mesh's back: its book and its index lack it.
    hear = wire["b"].hear[PREFIX]
    wire["b"].hear[PREFIX] = lambda change: None if isinstance(change, Appended) else hear(change)
    await trio.sleep(1)
    a.place([1, 2, 3, 4, 5])
    wire.run()
    wire["b"].hear[PREFIX] = hear
    assert b.depth([1, 2, 3, 4, 5]) == 3
    await wire.pause(30)
    assert b.depth([1, 2, 3, 4, 5]) == 5
    assert list(a.chains.fingerprints("a")) == list(b.chains.fingerprints("a"))
    assert a.chains.snapshots >= 1


@pytest.mark.parametrize("seed", range(5))
async def test_a_snapshot_gives_the_same_matches_and_the_same_order_of_use(autojump_clock, seed):
    rng = Random(seed)
    _, a, b = pair()
    prompts = []
    for number in range(60):
        shared = rng.choice(prompts)[: rng.randrange(1, 10)] if prompts and rng.random() < 0.6 else []
        prompt = [*shared, *(number * 1_000 + step for step in range(rng.randrange(1, 40)))]
        prompts.append(prompt)
        a.place(prompt, worker=rng.randrange(3))
    chunks = list(a.chains.snapshot("a", None))
    for place, chunk in enumerate(chunks):
        is_last = place == len(chunks) - 1
        b.prefixes.on_change(Restored(PREFIX, "a", None, chunk, place == 0, is_last), 0.0)
    while b.prefixes.has_touches:
        b.prefixes.touch()
    for prompt in prompts:
        assert [b.depth(prompt, place) for place in range(3)] == [
            a.depth(prompt, place) for place in range(3)
        ]
    for one, other in zip(a.workers, b.workers, strict=True):
        # Evict the same number on both: the same chains must survive.
        keep = a.index.blocks_of(one.id) // 2
        for index, worker in ((a.index, one), (b.index, other)):
            index.set_capacity(worker.id, keep)
            for step in range(80):
                index.place(worker.id, [10**9 + step])
        survivors = [
            {block for _, block in index.chains(worker.id, 10**6)}
            for index, worker in ((a.index, one), (b.index, other))
        ]
        common = len(survivors[0] & survivors[1])
        assert common >= 0.8 * len(survivors[0])


async def test_a_node_that_begins_reads_pages_until_they_are_empty(autojump_clock):
    _, a, b = pair()
    for number in range(3):
        a.place([number * 10_000 + step for step in range(1, CHUNK_BLOCKS + 5)], worker=number)
    pages = 0
    for worker in b.workers:
        page = 0
        while b.prefixes.warmed(
            a.chains.page("b", words.AskedPage(words.VERSION, words.PAGE, words.worker_ref(worker.id), page))
        ):
            page += 1
            pages += 1
            assert page < 10
    assert pages == 6
    while b.prefixes.has_touches:
        b.prefixes.touch()
    assert b.index.entries == a.index.entries
    unknown = words.AskedPage(words.VERSION, words.PAGE, b"nobody!!", 0)
    assert words.read_batch(a.chains.page("b", unknown)) == ([], 0)


async def test_a_snapshot_stops_where_the_reader_is_full(autojump_clock):
    _, a, b = pair()
    for number in range(50):
        a.place([number * 100 + step for step in range(1, 21)])
    b.index.set_capacity(b.workers[0].id, 200)
    for chunk in a.chains.snapshot("a", None):
        b.prefixes.on_change(Restored(PREFIX, "a", None, chunk, False, False), 0.0)
    assert b.index.blocks_of(b.workers[0].id) == 200
    assert b.depth([4901 + step for step in range(20)]) == 20  # the newest are there
    assert b.depth([1 + step for step in range(20)]) == 0


async def test_a_full_reader_takes_the_newest_half_of_a_snapshot_and_keeps_its_own_newest(autojump_clock):
    # As after a long cut: both sides are full, each of what the other lacks.
    _, a, b = pair()
    for node in (a, b):
        node.index.set_capacity(node.workers[0].id, 200)
    for number in range(10):
        a.place([number * 100 + step for step in range(1, 21)])
        b.place([50_000 + number * 100 + step for step in range(1, 21)])
    chunks = list(a.chains.snapshot("a", None))
    for place, chunk in enumerate(chunks):
        is_last = place == len(chunks) - 1
        b.prefixes.on_change(Restored(PREFIX, "a", None, chunk, place == 0, is_last), 0.0)
    theirs = [b.depth([number * 100 + step for step in range(1, 21)]) for number in range(10)]
    ours = [b.depth([50_000 + number * 100 + step for step in range(1, 21)]) for number in range(10)]
    assert theirs == [0] * 5 + [20] * 5
    assert ours == [0] * 5 + [20] * 5
    assert not b.prefixes._read


def test_runs_say_the_same_as_the_pairs_they_are_made_of():
    index = PrefixIndex()
    for number in range(5):
        index.place("w", [1, 2, *(number * 100 + step for step in range(3, 9))])
    pairs = index.chains("w", 1_000)
    again = PrefixIndex()
    for parent, hashes in runs_of(pairs):
        assert again.apply(Placement("w", parent, tuple(hashes)))
    assert {block for _, block in again.chains("w", 1_000)} == {block for _, block in pairs}
    assert list(runs_of([])) == []
    assert list(runs_of([(ROOT, 5)])) == [(ROOT, [5])]


def test_in_a_large_mesh_three_nodes_tell_the_chains_of_a_worker():
    names = [f"n{number}" for number in range(9)]
    tellers: dict[bytes, int] = {}
    for name in names:
        node = Node(name, *(other for other in names if other != name))
        for ref, _ in node.chains._told_by_us(None):
            tellers[ref] = tellers.get(ref, 0) + 1
        assert node.chains.snapshot("never heard of", None) is None
    assert sorted(tellers.values()) == [3, 3, 3]
