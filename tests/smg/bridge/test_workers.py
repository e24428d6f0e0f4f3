"""Whose list counts, what an order does, and what becomes of the lists of nodes that are gone (MSH-5)."""

from __future__ import annotations

import pytest
import trio

from mesh import Lww, Owned, Put
from smg.bridge import words
from smg.bridge.words import VERSION
from smg.bridge.workers import (
    ADOPTION_S,
    DELETION_KEPT_S,
    ORDERS,
    ORPHAN_S,
    WORKERS,
    Fleet,
    SharedWorkers,
)
from smg.fleet.health import HealthRules
from smg.fleet.worker import Status, Worker, WorkerSpec, worker_id
from tests.smg.bridge.wire import FakeMembers, Wire
from tests.smg.fleet.builders import registry

NAMESPACES = [Owned(name=WORKERS), Lww(name=ORDERS)]


class Node:
    """The lists of one node, with a fleet that follows them at once."""

    def __init__(self, wire: Wire, name: str, *peers: str, **options: object) -> None:
        self.wire = wire
        self.members = FakeMembers(name, *peers)
        self.registry = registry(health=HealthRules())
        self.lists: dict[str, dict[str, WorkerSpec]] = {}
        self.warnings: list[str] = []
        self.bad = False
        self.wall_s = 1_000.0
        state = wire[name].state
        self.workers = SharedWorkers(
            state,
            self.members,
            Fleet(registry=self.registry, report=self.report, drain=self.drain, warn=self.warn),
            wake=lambda: None,
            wall=lambda: self.wall_s + trio.current_time(),
            bad_everywhere=lambda known_id: self.bad,
            **options,  # type: ignore[arg-type]
        )
        wire[name].hear = {WORKERS: self.workers.on_change, ORDERS: self.workers.on_change}

    def report(self, source: str, specs: tuple[WorkerSpec, ...]) -> None:
        """As `Rosters.report`, without patience: workers that nobody lists are gone at once."""
        before = self.lists.get(source, {})
        self.lists[source] = {spec.url: spec for spec in specs}
        for url, spec in self.lists[source].items():
            worker = self.registry.by_url(url)
            if worker is None:
                self.registry.add(spec, trio.current_time())
            elif before.get(url) not in (None, spec):
                self.registry.update(worker, spec, trio.current_time())
        for url in before.keys() - self.lists[source].keys():
            worker = self.registry.by_url(url)
            if worker is not None and not any(url in specs for specs in self.lists.values()):
                self.drain(worker)

    def drain(self, worker: Worker) -> None:
        self.registry.remove(worker)

    def warn(self, message: str, **fields: object) -> None:
        self.warnings.append(message)

    def add(self, url: str, **fields: object) -> Worker:
        worker = self.registry.add(WorkerSpec(url=url, **fields), trio.current_time())  # type: ignore[arg-type]
        self.workers.added(worker)
        return worker

    def delete(self, url: str) -> None:
        worker = self.registry.by_url(url)
        assert worker is not None
        self.workers.deleted(worker)
        self.drain(worker)

    @property
    def urls(self) -> set[str]:
        return {worker.url for worker in self.registry.workers()}


class Mesh:
    """Nodes a, b, c."""

    def __init__(self, names: str = "ab", **options: object) -> None:
        self.wire = Wire(**dict.fromkeys(names, NAMESPACES))
        self.nodes = {
            name: Node(self.wire, name, *(other for other in names if other != name), **options)
            for name in names
        }
        self.settle()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def settle(self) -> None:
        for _ in range(10):
            self.wire.run()
            for node in self.nodes.values():
                if node.workers.is_dirty:
                    node.workers.settle(trio.current_time())
        assert not any(node.workers.is_dirty for node in self.nodes.values())

    def refresh(self) -> None:
        for node in self.nodes.values():
            node.workers.refresh(trio.current_time())
        self.settle()


def specs(*urls: str, **fields: object) -> tuple[WorkerSpec, ...]:
    return tuple(WorkerSpec(url=url, **fields) for url in urls)  # type: ignore[arg-type]


A, B, C = "http://a:1", "http://b:1", "http://c:1"


async def test_lists_of_flags_discovery_and_api_are_known_to_all(autojump_clock):
    mesh = Mesh()
    mesh["a"].workers.listed("flags", specs(A))
    mesh["a"].workers.listed("file", specs(B))
    mesh["a"].add(C)
    mesh.settle()
    assert mesh["b"].urls == {A, B, C}
    mesh["a"].workers.listed("file", ())
    mesh.settle()
    assert mesh["b"].urls == mesh["a"].urls == {A, C}


async def test_a_worker_stays_while_any_node_lists_it(autojump_clock):
    mesh = Mesh("abc")
    for name in "ab":
        mesh[name].workers.listed("file", specs(A))
    mesh.settle()
    mesh["a"].workers.listed("file", ())
    mesh.settle()
    assert all(node.urls == {A} for node in mesh.nodes.values())
    mesh["b"].workers.listed("file", ())
    mesh.settle()
    assert all(node.urls == set() for node in mesh.nodes.values())


async def test_of_several_specifications_the_api_counts_then_discovery_then_flags(autojump_clock):
    mesh = Mesh("abc")
    mesh["a"].workers.listed("flags", specs(A, priority=1))
    mesh.settle()
    assert mesh["c"].registry.by_url(A).spec.priority == 1
    mesh["b"].workers.listed("file", specs(A, priority=2))
    mesh.settle()
    assert mesh["c"].registry.by_url(A).spec.priority == 2


async def test_a_deletion_beats_all_lists_and_an_addition_ends_it(autojump_clock):
    mesh = Mesh("abc")
    for name in "abc":
        mesh[name].workers.listed("flags", specs(A, B))
    mesh.settle()
    mesh["b"].delete(A)
    mesh.settle()
    assert all(node.urls == {B} for node in mesh.nodes.values())
    mesh["c"].workers.listed("flags", specs(A, B))  # the same list again changes nothing
    mesh.settle()
    assert mesh["c"].urls == {B}
    mesh["a"].add(A)
    mesh.settle()
    assert all(node.urls == {A, B} for node in mesh.nodes.values())


async def test_discovery_that_drops_a_worker_and_finds_it_again_adds_it(autojump_clock):
    mesh = Mesh()
    mesh["a"].workers.listed("file", specs(A))
    mesh.settle()
    mesh["b"].delete(A)
    mesh.settle()
    for listed in ((), specs(A)):
        mesh["a"].workers.listed("file", listed)
        mesh.settle()
    assert mesh["b"].urls == {A}


async def test_a_deletion_is_over_after_a_day(autojump_clock):
    mesh = Mesh()
    mesh["a"].workers.listed("flags", specs(A))
    mesh.settle()
    mesh["a"].delete(A)
    mesh.settle()
    for node in mesh.nodes.values():
        node.wall_s += DELETION_KEPT_S + 1
    mesh.refresh()
    assert mesh["a"].urls == mesh["b"].urls == {A}


async def test_an_edit_holds_over_every_list_and_goes_with_the_worker(autojump_clock):
    mesh = Mesh("abc")
    mesh["a"].workers.listed("flags", specs(A, priority=1))
    mesh.settle()
    worker = mesh["b"].registry.by_url(A)
    mesh["b"].registry.update(worker, WorkerSpec(url=A, priority=99), trio.current_time())
    mesh["b"].workers.edited(worker)
    mesh.settle()
    assert [node.registry.by_url(A).spec.priority for node in mesh.nodes.values()] == [99, 99, 99]
    mesh["a"].workers.listed("flags", ())
    mesh.settle()
    mesh.refresh()
    mesh["a"].workers.listed("flags", specs(A, priority=1))
    mesh.settle()
    assert [node.registry.by_url(A).spec.priority for node in mesh.nodes.values()] == [1, 1, 1]


async def test_what_only_this_node_lists_is_edited_in_its_list(autojump_clock):
    mesh = Mesh()
    worker = mesh["a"].add(A)
    mesh.settle()
    mesh["a"].registry.update(worker, WorkerSpec(url=A, cost=2.0), trio.current_time())
    mesh["a"].workers.edited(worker)
    mesh.settle()
    assert mesh["b"].registry.by_url(A).spec.cost == 2.0
    assert list(mesh.wire["b"].state.items(ORDERS)) == []


async def test_private_flags_are_not_told(autojump_clock):
    mesh = Mesh(is_private=True)
    mesh["a"].workers.listed("flags", specs(A))
    mesh["a"].workers.listed("file", specs(B))
    mesh.settle()
    assert mesh["b"].urls == {B}
    assert mesh["a"].urls == {A, B}


@pytest.mark.parametrize("is_sealed", [True, False])
async def test_keys_of_workers_are_told_in_a_sealed_mesh_only(autojump_clock, is_sealed: bool):
    mesh = Mesh(tells_keys=is_sealed)
    mesh["a"].add(A, api_key="sk-secret")
    mesh.settle()
    assert mesh["b"].registry.by_url(A).spec.api_key == ("sk-secret" if is_sealed else None)
    told = b"".join(value for _, _, value in mesh.wire["b"].state.items(WORKERS))
    assert (b"sk-secret" in told) is is_sealed
    # An edit of b must not take a's own key away.
    worker = mesh["b"].registry.by_url(A)
    mesh["b"].registry.update(worker, WorkerSpec(url=A, priority=7), trio.current_time())
    mesh["b"].workers.edited(worker)
    mesh.settle()
    if not is_sealed:
        assert mesh["a"].registry.by_url(A).spec.api_key == "sk-secret"
    assert mesh["a"].registry.by_url(A).spec.priority == 7


async def test_workers_of_peers_lists_get_this_nodes_key_for_workers(autojump_clock):
    mesh = Mesh(default_key="sk-mine")
    mesh["a"].workers.listed("flags", specs(A))
    mesh["a"].add(B)
    mesh.settle()
    assert mesh["b"].registry.by_url(A).spec.api_key == "sk-mine"
    assert mesh["b"].registry.by_url(B).spec.api_key is None  # whoever adds by hand says what key it wants


async def test_lists_of_a_dead_node_stay_while_somebody_reaches_the_worker(autojump_clock):
    mesh = Mesh("abc")
    mesh["c"].workers.listed("flags", specs(A))
    mesh.settle()
    for name in "ab":
        mesh[name].members.alive.remove("c")
        mesh[name].members.died_s["c"] = trio.current_time()
    b = mesh["b"]
    b.registry.set_status(b.registry.by_url(A), Status.READY, 0.0)
    b.registry.set_status(b.registry.by_url(A), Status.NOT_READY, 0.0)
    for seconds in (1, ORPHAN_S + 1):
        await trio.sleep(seconds)
        mesh.refresh()
        assert b.urls == {A}  # the others reach it
    b.bad = True
    mesh.refresh()
    assert b.urls == {A}
    await trio.sleep(ORPHAN_S + 1)
    mesh.refresh()
    assert b.urls == set()
    b.members.alive.append("c")
    mesh.refresh()
    assert b.urls == {A}


async def test_the_first_live_node_adopts_the_list_of_a_node_that_is_dead_for_long(autojump_clock):
    mesh = Mesh("abc")
    mesh["c"].workers.listed("flags", specs(A))
    mesh.settle()
    for name in "ab":
        mesh[name].members.alive.remove("c")
        mesh[name].members.died_s["c"] = trio.current_time()
    await trio.sleep(ADOPTION_S + 1)
    mesh.refresh()
    for name in "ab":
        mesh.wire[name].replica.owner_forgotten("c", trio.current_time())
        mesh.wire[name].tell()
    mesh.settle()
    assert mesh["b"].urls == {A}
    listed = [words.read_listing(value) for _, _, value in mesh.wire["b"].state.items(WORKERS)]
    assert [(each.origin, each.adopted_from) for each in listed] == [(words.ADOPTED, "c")]
    # c is back, and does not list it any more.
    for name in "ab":
        mesh[name].members.alive.append("c")
    mesh.refresh()
    assert mesh["a"].urls == mesh["b"].urls == set()


async def test_garbage_and_impossible_workers_are_counted_and_change_nothing(autojump_clock):
    mesh = Mesh()
    bad = [
        b"garbage",
        words.encode(words.Listing(VERSION, words.API, 1.0, WorkerSpec(url="no scheme"))),
        words.encode(words.Listing(VERSION, words.API, 1.0, WorkerSpec(url=A, cost=-1.0))),
    ]
    for value in bad:
        mesh["a"].workers.on_change(Put(WORKERS, "b", b"k" * 16, value))
    order = words.Order(VERSION, words.DELETED, A, 1.0, "b")
    mesh["a"].workers.on_change(Put(ORDERS, "b", b"wrong key", words.encode(order)))
    mesh.settle()
    assert mesh["a"].workers.garbage == 4
    assert mesh["a"].urls == set()


async def test_names_are_the_ids_of_all_listed_workers(autojump_clock):
    mesh = Mesh()
    mesh["a"].workers.listed("flags", specs(A))
    mesh["b"].workers.listed("flags", specs(B))
    mesh.settle()
    assert mesh["a"].workers.names() == {worker_id(A), worker_id(B)}
