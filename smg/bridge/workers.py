"""Workers that nodes list: a worker exists while any known node lists it (contract MSH-5).

Owns this node's list as the others see it, theirs as we see it, and the two orders of the worker API that hold everywhere:
a deletion, which beats all lists until the worker is added again, and an edit. What follows for our own fleet goes the way
of discovery, as one more source called `mesh`. It must never judge a worker's health, and it tells a worker's key to nobody
unless the mesh is sealed.

* `workers` (owned): worker id → `Listing`, of this node's flags, discovery and API.
* `orders` (last writer wins): kind and worker id → `Order`.

A node that leaves takes its list along; one that crashes does not. What only dead nodes list stays as long as somebody
reaches it, and after ten minutes the first live node by name adopts it, for the dead one's list is forgotten some day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from mesh import BoundError, Change, Lost, Put, Removed, State
from smg.bridge import words
from smg.bridge.words import ADOPTED, API, DELETED, DISCOVERY, EDITED, FLAG, VERSION, Listing, Order
from smg.errors import GatewayError
from smg.fleet import registry as fleet
from smg.fleet.registry import Registry
from smg.fleet.worker import Status, Worker, WorkerSpec, normalised_url, worker_id
from smg.fleet.worker_spec import checked

WORKERS = "workers"
ORDERS = "orders"
SOURCE = "mesh"
"""Name of the source of discovery that lists the peers' workers."""
FLAGS_SOURCE = "flags"

DELETION_KEPT_S = 24 * 3600.0
"""A deletion beats lists this long (mesh.md 3.1)."""
ORPHAN_S = 60.0
"""A worker that only dead nodes list and that nobody reaches goes after this: longer than a restart of either."""
ADOPTION_S = 600.0
"""Nodes that are dead for longer than this are taken to be gone for good."""


class Members(Protocol):
    """What this room wants to know of the mesh."""

    name: str

    def live(self) -> Iterable[str]:
        """Names of the live members, without this node."""
        ...

    def dead_for_s(self, name: str, now: float) -> float | None:
        """How long a member is dead; None when it is not."""
        ...


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What this room does to the fleet of this node."""

    registry: Registry
    report: Callable[[str, tuple[WorkerSpec, ...]], None]
    """The whole list of a source (`Rosters.report`)."""
    drain: Callable[[Worker], None]
    warn: Callable[..., None]


class SharedWorkers:
    """See the module. `wake` asks for a call of `settle` between two events; `bad_everywhere` tells whether no live
    peer reaches a worker; `wall` is wall time in seconds."""

    def __init__(
        self,
        state: State,
        members: Members,
        fleet: Fleet,
        *,
        wake: Callable[[], None],
        wall: Callable[[], float],
        bad_everywhere: Callable[[str], bool],
        is_private: bool = False,
        tells_keys: bool = False,
        default_key: str | None = None,
    ) -> None:
        self._state = state
        self._members = members
        self._fleet = fleet
        self._registry = fleet.registry
        self._wake = wake
        self._wall = wall
        self._bad_everywhere = bad_everywhere
        self._is_private = is_private
        self._tells_keys = tells_keys
        self._default_key = default_key
        self._sources: dict[str, dict[str, WorkerSpec]] = {}  # our flags and discovery: source → url → spec
        self._api: dict[str, WorkerSpec] = {}  # added through our own API, by url
        self._told: dict[str, tuple[int, WorkerSpec, str]] = {}  # our listings as the mesh has them, by url
        self._theirs: dict[str, dict[str, Listing]] = {}  # url → node → its listing
        self._orders: dict[tuple[int, str], Order] = {}  # by kind and url
        self._bad_since: dict[str, float] = {}  # url of an orphan that nobody reaches → since when
        self._given_up: set[str] = set()  # orphans that were let go
        self._adopted: dict[
            str, tuple[str, WorkerSpec]
        ] = {}  # url → the dead node whose listing we took over
        self.is_dirty = False
        self.garbage = 0
        self._registry.subscribe(self._changed)

    # -- what happens on this node

    def reporter(self, source: str) -> Callable[[tuple[WorkerSpec, ...]], None]:
        """What a source of discovery reports to, in place of the roster's own."""

        def report(specs: tuple[WorkerSpec, ...]) -> None:
            self.listed(source, specs)

        return report

    def listed(self, source: str, specs: tuple[WorkerSpec, ...]) -> None:
        """The whole truth of a source. What it dropped and lists again was added again: a deletion of it is over."""
        before = self._sources.get(source)
        now = {spec.url: spec for spec in specs}
        self._sources[source] = now
        if before is not None:
            for url in now.keys() - before.keys():
                self._take_back(DELETED, url)
        self._publish()
        self._report_source(source)

    def added(self, worker: Worker) -> None:
        """A worker was added through this node's API: orders of its former life are void."""
        self._take_back(DELETED, worker.url)
        self._take_back(EDITED, worker.url)
        self._api[worker.spec.url] = worker.spec
        self._publish()
        self._touch()

    def edited(self, worker: Worker) -> None:
        """A worker's specification was changed through this node's API."""
        if worker.url in self._api:
            self._api[worker.url] = worker.spec
            self._publish()
        has_order = (EDITED, worker.url) in self._orders
        if has_order or not (worker.url in self._api and self._lists_alone(worker.url)):
            self._give_order(EDITED, worker.url, worker.spec)

    def deleted(self, worker: Worker) -> None:
        """A worker is deleted through this node's API: from now on no list counts."""
        self._api.pop(worker.url, None)
        self._take_back(EDITED, worker.url)
        self._give_order(DELETED, worker.url, None)
        self._publish()
        self._touch()

    # -- what peers say

    def on_change(self, change: Change) -> None:
        """A change of one of the two namespaces."""
        if isinstance(change, Lost):
            self._read_again()
            return
        if not isinstance(change, Put | Removed):
            return
        if change.namespace == ORDERS:
            self._on_order(change)
        elif isinstance(change, Put):
            self._on_listing(change.owner, change.value)
        else:
            self._drop_listing(change.owner, words.id_of_key(change.key))
        self._touch()

    def settle(self, now: float) -> None:
        """Let our fleet follow all lists and orders."""
        self.is_dirty = False
        for source in list(self._sources):
            self._report_source(source)
        self._fleet.report(SOURCE, tuple(self._theirs_wanted()))
        for kind, url in list(self._orders):
            worker = self._registry.by_url(url)
            if worker is None or worker.status is Status.DRAINING:
                continue
            if kind == DELETED:
                self._api.pop(url, None)
                self._fleet.drain(worker)
            else:
                spec = self._spec_of(url, worker.spec)
                if spec != worker.spec:
                    self._update(worker, spec, now)
        self._publish()

    def refresh(self, now: float) -> None:
        """Once a second: deletions grow old, orphans are let go or adopted."""
        wall_s = self._wall()
        for (kind, url), order in list(self._orders.items()):
            is_over = kind == DELETED and wall_s - order.at_s > DELETION_KEPT_S
            is_void = kind == EDITED and not self._is_listed(url)
            if (is_over or is_void) and self._is_first():
                self._take_back(kind, url)
        self._look_after_orphans(now)

    def names(self) -> set[str]:
        """Ids of all workers that some node lists; for tests and status."""
        return {worker_id(url) for url in self._theirs} | {worker_id(url) for url in self._told}

    # -- our own list

    def _own(self) -> dict[str, tuple[int, WorkerSpec, str]]:
        """What we list, the highest origin of each URL, as peers should hear it."""
        found: dict[str, tuple[int, WorkerSpec, str]] = {}
        for url, (adopted_from, spec) in self._adopted.items():
            found[url] = (ADOPTED, spec, adopted_from)
        for source, specs in self._sources.items():
            if source == FLAGS_SOURCE and self._is_private:
                continue
            origin = FLAG if source == FLAGS_SOURCE else DISCOVERY
            for url, spec in specs.items():
                if url not in found or found[url][0] < origin:
                    found[url] = (origin, spec, "")
        for url, spec in self._api.items():
            found[url] = (API, spec, "")
        return found

    def _publish(self) -> None:
        own = self._own()
        for url in self._told.keys() - own.keys():
            del self._told[url]
            self._state.remove(WORKERS, words.worker_key(worker_id(url)))
        for url, told in own.items():
            if self._told.get(url) == told:
                continue
            origin, spec, adopted_from = told
            if not self._tells_keys and spec.api_key is not None:
                spec = msgspec.structs.replace(spec, api_key=None)
            word = Listing(VERSION, origin, self._wall(), spec, adopted_from)
            try:
                self._state.put(WORKERS, words.worker_key(worker_id(url)), words.encode(word))
            except BoundError as error:
                self._fleet.warn("worker is not told to the mesh", worker=url, reason=str(error))
                continue
            self._told[url] = told

    def _lists_alone(self, url: str) -> bool:
        is_told_by_source = any(url in specs for specs in self._sources.values())
        return not is_told_by_source and not self._theirs.get(url)

    # -- the peers' lists

    def _on_listing(self, owner: str, value: bytes) -> None:
        listing = words.read_listing(value)
        try:
            spec = None if listing is None else checked(listing.spec)
        except GatewayError:
            spec = None
        if listing is None or spec is None:
            self.garbage += 1
            return
        self._theirs.setdefault(spec.url, {})[owner] = msgspec.structs.replace(listing, spec=spec)
        self._given_up.discard(spec.url)

    def _drop_listing(self, owner: str, listed_id: str) -> None:
        for url, listings in list(self._theirs.items()):
            if owner in listings and worker_id(url) == listed_id:
                del listings[owner]
                if not listings:
                    del self._theirs[url]
                return

    def _theirs_wanted(self) -> Iterator[WorkerSpec]:
        """The workers that peers list, or dead ones did, and nobody deleted."""
        for url, (_, spec) in self._adopted.items():
            if url not in self._theirs and (DELETED, url) not in self._orders and url not in self._given_up:
                yield self._spec_of(url, spec)
        for url, listings in self._theirs.items():
            if (DELETED, url) in self._orders or url in self._given_up:
                continue
            best = max(listings.items(), key=lambda item: (item[1].origin, item[1].listed_s, item[0]))[1]
            spec = best.spec
            if spec.api_key is None and self._default_key is not None and best.origin in (FLAG, DISCOVERY):
                spec = msgspec.structs.replace(spec, api_key=self._default_key)
            yield self._spec_of(url, spec)

    def _report_source(self, source: str) -> None:
        specs = self._sources[source]
        self._fleet.report(
            source,
            tuple(
                self._spec_of(url, spec) for url, spec in specs.items() if (DELETED, url) not in self._orders
            ),
        )

    def _spec_of(self, url: str, spec: WorkerSpec) -> WorkerSpec:
        """The specification that counts: an edit's, with our key where the edit could not tell one."""
        order = self._orders.get((EDITED, url))
        if order is None or order.spec is None:
            return spec
        if order.spec.api_key is None and spec.api_key is not None and not self._tells_keys:
            return msgspec.structs.replace(order.spec, api_key=spec.api_key)
        return order.spec

    def _is_listed(self, url: str) -> bool:
        """Does anybody list this worker, or the worker it is a rank of?"""
        base = normalised_url(url)[0]
        return any(
            each in self._theirs
            or each in self._told
            or any(each in specs for specs in self._sources.values())
            for each in (url, base)
        )

    # -- orders

    def _give_order(self, kind: int, url: str, spec: WorkerSpec | None) -> None:
        told = spec
        if spec is not None and not self._tells_keys and spec.api_key is not None:
            told = msgspec.structs.replace(spec, api_key=None)
        order = Order(VERSION, kind, url, self._wall(), self._members.name, told)
        try:
            self._state.put(ORDERS, _order_key(kind, url), words.encode(order))
        except BoundError as error:
            self._fleet.warn("order is not told to the mesh", worker=url, reason=str(error))
        self._orders[(kind, url)] = msgspec.structs.replace(order, spec=spec)

    def _take_back(self, kind: int, url: str) -> None:
        if self._orders.pop((kind, url), None) is not None:
            self._state.remove(ORDERS, _order_key(kind, url))
            self._touch()

    def _on_order(self, change: Put | Removed) -> None:
        if isinstance(change, Removed):
            for kind, url in list(self._orders):
                if _order_key(kind, url) == change.key:
                    del self._orders[(kind, url)]
            return
        order = words.read_order(change.value)
        if order is not None and order.spec is not None:
            try:
                order = msgspec.structs.replace(order, spec=checked(order.spec))
            except GatewayError:
                order = None
        if order is None or change.key != _order_key(order.kind, order.url):
            self.garbage += 1
            return
        if order.kind == DELETED and self._wall() - order.at_s > DELETION_KEPT_S:
            return
        self._orders[(order.kind, order.url)] = order

    # -- nodes that died

    def _look_after_orphans(self, now: float) -> None:
        live = {self._members.name, *self._members.live()}
        for url in self._bad_since.keys() - self._theirs.keys():
            del self._bad_since[url]
        changed = False
        for url, listings in self._theirs.items():
            is_orphan = url not in self._told and live.isdisjoint(listings)
            if not is_orphan:
                self._bad_since.pop(url, None)
                if url in self._given_up and not live.isdisjoint(listings):
                    self._given_up.discard(url)
                    changed = True
                continue
            if self._is_lost(url):
                since_s = self._bad_since.setdefault(url, now)
                if now - since_s > ORPHAN_S and url not in self._given_up:
                    self._given_up.add(url)
                    changed = True
            else:
                self._bad_since.pop(url, None)
                self._adopt(url, listings, now)
        for url, (dead, _) in list(self._adopted.items()):
            if dead in live or any(node in live for node in self._theirs.get(url, ())):
                del self._adopted[url]  # its owner is back, or somebody else lists it: their word counts
                changed = True
        if changed:
            self._touch()
        self._publish()

    def _is_lost(self, url: str) -> bool:
        worker = self._registry.by_url(url)
        if worker is None:
            return url not in self._given_up and self._bad_everywhere(worker_id(url))
        return worker.status in (Status.NOT_READY, Status.FAILED) and self._bad_everywhere(worker.id)

    def _adopt(self, url: str, listings: dict[str, Listing], now: float) -> None:
        if not self._is_first() or url in self._adopted:
            return
        for node in sorted(listings):
            if (self._members.dead_for_s(node, now) or 0.0) > ADOPTION_S:
                self._adopted[url] = (node, listings[node].spec)
                return

    def _is_first(self) -> bool:
        """Is this node the first live one by name, who does what one of all should do?"""
        return all(self._members.name < name for name in self._members.live())

    # -- the rest

    def _read_again(self) -> None:
        """Changes were lost to a bound."""
        self._theirs.clear()
        own_edits = {
            key: order for key, order in self._orders.items() if order.by == self._members.name and order.spec
        }
        self._orders.clear()
        for owner, _, value in list(self._state.items(WORKERS)):
            if owner != self._members.name:
                self._on_listing(owner, value)
        for owner, key, value in list(self._state.items(ORDERS)):
            self._on_order(Put(ORDERS, owner, key, value))
        self._orders.update({key: order for key, order in own_edits.items() if key in self._orders})
        self._touch()

    def _update(self, worker: Worker, spec: WorkerSpec, now: float) -> None:
        try:
            self._registry.update(worker, spec, now)
        except GatewayError as error:
            self._fleet.warn("edit of another node is not applied", worker=worker.url, reason=error.message)

    def _changed(self, change: fleet.Change) -> None:
        """A removal may make room for what is still listed; an addition may be of what is deleted."""
        if isinstance(change, fleet.Removed | fleet.Added):
            self._touch()

    def _touch(self) -> None:
        if not self.is_dirty:
            self.is_dirty = True
            self._wake()


def _order_key(kind: int, url: str) -> bytes:
    return bytes((kind,)) + words.worker_key(worker_id(url))
