"""Requests in flight of all nodes add up and never drift; engines are asked by whom they should be asked."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mesh import Ephemeral, Put
from smg.bridge import words
from smg.bridge.loads import ENGINE, LOAD, RELAY_SILENCE_S, ROWS_MAX, SELF_POLLING_MAX, SharedLoads
from smg.bridge.words import VERSION, Burden
from smg.fleet import load
from smg.fleet.load import ReportRules
from smg.fleet.worker import LoadReport, WorkerSpec
from tests.smg.bridge.wire import Wire
from tests.smg.fleet.builders import fleet

NAMESPACES = [Ephemeral(name=LOAD, coalesce_s=0.0), Ephemeral(name=ENGINE, coalesce_s=0.0)]


class Node:
    def __init__(self, wire: Wire, name: str, *peers: str, workers: int = 2) -> None:
        self.registry, self.workers = fleet(workers)
        self.peers = list(peers)
        self.done: list[str] = []
        self.loads = SharedLoads(
            wire[name].state,
            self.registry,
            name=name,
            live=lambda: self.peers,
            rules=ReportRules(interval_s=0.25),
            owed_ms=lambda worker: 100.0 * worker.in_flight,
            peers_done=lambda worker: self.done.append(worker.id),
        )
        wire[name].hear = {
            LOAD: self.loads.on_load,
            ENGINE: lambda change: self.loads.on_engine(change, trio.current_time()),
        }

    @property
    def seen(self) -> list[int]:
        return [worker.peers_in_flight for worker in self.workers]


def mesh(names: str = "ab", **options: int) -> tuple[Wire, dict[str, Node]]:
    wire = Wire(**dict.fromkeys(names, NAMESPACES))
    nodes = {
        name: Node(wire, name, *(other for other in names if other != name), **options) for name in names
    }
    wire.run()
    return wire, nodes


async def test_the_requests_of_all_peers_add_up(autojump_clock):
    wire, nodes = mesh("abc")
    for name, counts in (("a", (3, 0)), ("b", (1, 2))):
        for worker, count in zip(nodes[name].workers, counts, strict=True):
            for _ in range(count):
                load.begin(worker)
        nodes[name].loads.look()
    wire.run()
    assert nodes["c"].seen == [4, 2]
    assert nodes["a"].seen == [1, 2]
    assert nodes["c"].loads.of_peers() == (6, pytest.approx(0.6))
    load.end(nodes["b"].workers[0])
    nodes["b"].loads.look()
    wire.run()
    assert nodes["c"].seen == [3, 2]
    for _ in range(3):
        load.end(nodes["a"].workers[0])
    nodes["a"].loads.look()
    wire.run()
    assert nodes["c"].seen == [0, 2]
    assert nodes["c"].done == [nodes["c"].workers[0].id]


async def test_nothing_changed_nothing_said(autojump_clock):
    wire, nodes = mesh()
    load.begin(nodes["a"].workers[0])
    nodes["a"].loads.look()
    wire.run()
    before = wire["a"].replica.stats()
    for _ in range(5):
        nodes["a"].loads.look()
        nodes["b"].loads.look()
    assert wire["a"].replica.stats() == before
    assert not wire["a"].replica.peers_to_send()


async def test_a_node_that_dies_takes_its_load_along(autojump_clock):
    wire, nodes = mesh()
    load.begin(nodes["a"].workers[0])
    nodes["a"].loads.look()
    wire.run()
    assert nodes["b"].seen == [1, 0]
    wire["b"].replica.owner_died("a", wire["a"].life, trio.current_time())
    wire["b"].tell()
    assert nodes["b"].seen == [0, 0]


async def test_a_word_that_was_lost_is_said_again(autojump_clock):
    wire, nodes = mesh()
    load.begin(nodes["a"].workers[0])
    nodes["a"].loads.look()
    wire.run(is_lossy=True)
    assert nodes["b"].seen == [0, 0]
    await wire.pause(12)
    assert nodes["b"].seen == [1, 0]


async def test_load_on_a_worker_that_is_not_here_yet_counts_when_it_comes(autojump_clock):
    wire, nodes = mesh()
    late = nodes["a"].registry.add(WorkerSpec(url="http://late:1", model_id="m"), 0.0)
    load.begin(late)
    nodes["a"].loads.look()
    wire.run()
    here = nodes["b"].registry.add(WorkerSpec(url="http://late:1", model_id="m"), 0.0)
    assert here.peers_in_flight == 1
    nodes["b"].registry.remove(here)
    load.end(late)
    nodes["a"].loads.look()
    wire.run()
    assert nodes["b"].loads.of_peers() == (0, 0.0)


async def test_a_fleet_of_thousands_is_told_in_several_values(autojump_clock):
    wire, nodes = mesh(workers=ROWS_MAX + 5)
    for worker in nodes["a"].workers:
        load.begin(worker)
    nodes["a"].loads.look()
    wire.run()
    assert sum(nodes["b"].seen) == ROWS_MAX + 5
    for worker in nodes["a"].workers[3:]:
        load.end(worker)
    nodes["a"].loads.look()
    wire.run()
    assert sum(nodes["b"].seen) == 3


ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=3, unique_by=lambda row: row[0])


@given(st.lists(st.tuples(st.sampled_from(["p", "q"]), ROWS), max_size=20))
def test_the_sum_is_that_of_the_last_words(said: list[tuple[str, list[tuple[int, int]]]]) -> None:
    registry, workers = fleet(3)
    loads = SharedLoads(
        None,  # type: ignore[arg-type]
        registry,
        name="a",
        live=list,
        rules=ReportRules(),
        owed_ms=lambda worker: 0.0,
        peers_done=lambda worker: None,
    )
    last: dict[str, list[tuple[int, int]]] = {}
    for node, rows in said:
        word = Burden(VERSION, tuple((words.worker_ref(workers[place].id), n, 0) for place, n in rows))
        loads.on_load(Put(LOAD, node, b"\0\0", words.encode(word)))
        last[node] = rows
    for place, worker in enumerate(workers):
        assert worker.peers_in_flight == sum(
            n for rows in last.values() for where, n in rows if where == place
        )


async def test_in_a_small_mesh_everybody_asks_and_in_a_large_one_somebody(autojump_clock):
    _, nodes = mesh()
    urls = [f"http://w{number}:1" for number in range(200)]
    assert all(node.loads.is_poller(url, 0.0) for node in nodes.values() for url in urls)
    names = [f"n{number}" for number in range(SELF_POLLING_MAX + 1)]
    crowd = Wire(**dict.fromkeys(names, NAMESPACES))
    asked = dict.fromkeys(urls, 0)
    for name in names:
        node = Node(crowd, name, *(other for other in names if other != name))
        node.loads._heard_s = dict.fromkeys(urls, 0.0)
        for url in urls:
            asked[url] += node.loads.is_poller(url, 0.0)
    assert set(asked.values()) == {1}


async def test_an_engine_whose_asker_is_silent_is_asked_by_all(autojump_clock):
    names = [f"n{number}" for number in range(SELF_POLLING_MAX + 1)]
    wire = Wire(**dict.fromkeys(names, NAMESPACES))
    node = Node(wire, names[0], *names[1:])
    node.loads._heard_s["http://w:1"] = 0.0
    silent_s = RELAY_SILENCE_S + 2.0
    assert node.loads.is_poller("http://w:1", silent_s)
    assert node.loads.is_poller("http://never heard of:1", 0.0)


async def test_an_engines_answer_is_passed_on_with_its_age(autojump_clock):
    names = [f"n{number}" for number in range(SELF_POLLING_MAX + 1)]
    wire = Wire(**dict.fromkeys(names, NAMESPACES))
    nodes = {name: Node(wire, name, *(other for other in names if other != name)) for name in names}
    wire.run()
    url = nodes["n0"].workers[0].base_url
    asker = next(
        name
        for name, node in nodes.items()
        if not node.loads._heard_s.setdefault(url, 0.0) and node.loads.is_poller(url, 0.0)
    )
    for age_s in (0.5, 0.25):
        now = trio.current_time()
        told = LoadReport(at_s=now - age_s, running=3, waiting=2, kv_usage=0.5)
        nodes[asker].loads.polled(nodes[asker].workers[0], told, now)
        wire.run()
        for name, node in nodes.items():
            report = node.workers[0].report
            if name != asker:
                assert report is not None and (report.running, report.waiting, report.kv_usage) == (3, 2, 0.5)
                assert report.at_s == pytest.approx(told.at_s, abs=0.001)
        await trio.sleep(0.25)


async def test_garbage_is_counted(autojump_clock):
    _, nodes = mesh()
    nodes["a"].loads.on_load(Put(LOAD, "b", b"\0\0", b"garbage"))
    nodes["a"].loads.on_engine(Put(ENGINE, "b", b"k" * 16, b"garbage"), 0.0)
    assert nodes["a"].loads.garbage == 2
