"""Chains of blocks for peers that lack them: snapshots for a node that joins or lost something, single chains on demand.

Owns the books of what each node has announced (`announced.py`) and the answers made from this node's prefix index. It is the
mesh's `StreamSource` of the namespace `prefix`. It must never change the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from smg.bridge import rendezvous, words
from smg.bridge.announced import Announced
from smg.bridge.words import AskedChains, AskedPage, Basis, Flushed, Gone, Item, Placed, Run, Trunk
from smg.fleet import registry as fleet
from smg.fleet.block_hashes import ROOT
from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.registry import Registry
from smg.fleet.worker import Worker

CHUNK_BLOCKS = 2_000
"""Blocks in one chunk of a snapshot: taking it in pauses the loop for a millisecond."""
TELLERS = 3
"""In a mesh of more than four, so many nodes tell a joiner the chains of each worker; all hold them."""
SMALL_MESH = 4
CHAINS_MAX = 64
"""Lost chains answered in one answer; more of them are asked for again."""
READERS_MAX = 4
"""Nodes that are warmed at the same time; pages of one worker are at most half a megabyte."""
ANSWER_BLOCKS_MAX = 4_000
"""Blocks in one answer, about 32 KB."""


class Chains:
    """See the module. `nodes` names all live nodes, this one included."""

    def __init__(
        self, registry: Registry, index: PrefixIndex, *, name: str, nodes: Callable[[], Sequence[str]]
    ) -> None:
        self._index = index
        self._name = name
        self._nodes = nodes
        self._announced: dict[str, Announced] = {name: Announced()}
        self.workers: dict[bytes, Worker] = {}
        """The fleet by the references that nodes use; read only."""
        self._pages: dict[tuple[str, bytes], list[bytes]] = {}  # (reader, worker) → pages
        self.snapshots = 0
        """Snapshots told."""
        for worker in registry.workers():
            self.workers[words.worker_ref(worker.id)] = worker
        registry.subscribe(self._changed)

    # -- books

    def count(self, owner: str, sequence: int, items: Sequence[Item]) -> None:
        """A delta of a node, this one or a peer."""
        self._of(owner).add(
            sequence,
            [
                (item.ref, words.unpack_hashes(item.hashes))
                for item in items
                if type(item) is Placed and item.hashes
            ],
            [item.ref for item in items if type(item) is Flushed or type(item) is Gone],
        )

    def begin(self, owner: str, basis: Basis, key: bytes | None) -> None:
        """A snapshot of a peer begins."""
        self._of(owner).begin(basis.sequence, basis.rows, key)

    def forget(self, owner: str) -> None:
        """A life of a peer is over."""
        if owner != self._name:
            self._announced.pop(owner, None)

    def _of(self, owner: str) -> Announced:
        found = self._announced.get(owner)
        if found is None:
            found = self._announced[owner] = Announced()
        return found

    # -- the mesh's StreamSource

    def fingerprints(self, origin: str) -> Iterator[tuple[bytes, int, int]]:
        """(worker, blocks, xor) of what a node has announced, as this one knows it."""
        announced = self._announced.get(origin)
        return announced.fingerprints() if announced is not None else iter(())

    def snapshot(self, origin: str, key: bytes | None) -> Iterator[bytes] | None:
        """What a node has announced, and whole chains as this one knows them; None for a node never heard."""
        announced = self._announced.get(origin)
        if announced is None:
            return None
        self.snapshots += 1
        basis = Basis(announced.sequence, announced.rows(key))
        return self._chunks(basis, self._told_by_us(key))

    def _told_by_us(self, key: bytes | None) -> list[tuple[bytes, Worker]]:
        if key is not None:
            return [(key, self.workers[key])] if key in self.workers else []
        nodes = self._nodes()
        if len(nodes) <= SMALL_MESH:
            return list(self.workers.items())
        return [
            (ref, worker)
            for ref, worker in self.workers.items()
            if self._name in rendezvous.ranked(ref, nodes)[:TELLERS]
        ]

    def _chunks(self, basis: Basis, workers: list[tuple[bytes, Worker]]) -> Iterator[bytes]:
        yield words.batch([basis])
        yield words.batch([Trunk(words.pack_trunk(self._index.trunk().items()))])
        for ref, worker in workers:
            if self.workers.get(ref) is not worker:
                continue  # it left while the snapshot went out
            yield from self._pages_of(ref, worker)

    def _pages_of(self, ref: bytes, worker: Worker) -> Iterator[bytes]:
        """All chains of a worker, the newest first, in pieces that are taken in within a millisecond."""
        runs: list[tuple[int, bytes]] = []
        blocks = 0
        for parent, hashes in runs_of(self._index.chains(worker.id, self._index.capacity_of(worker.id))):
            runs.append((parent, words.pack_hashes(hashes)))
            blocks += len(hashes) + 2
            if blocks >= CHUNK_BLOCKS:
                yield words.batch([Run(ref, tuple(runs))])
                runs, blocks = [], 0
        if runs:
            yield words.batch([Run(ref, tuple(runs))])

    # -- warming a node that has just begun

    def page(self, peer: str, asked: AskedPage) -> bytes:
        """One page for a node that has just begun; empty when there are no more.

        Its first page fixes the others, so that what is placed meanwhile makes no hole.
        """
        worker = self.workers.get(asked.ref)
        if worker is None:
            return words.batch([])
        key = (peer, asked.ref)
        if asked.page == 0:
            self._pages.pop(key, None)
            while len(self._pages) >= READERS_MAX:
                self._pages.pop(next(iter(self._pages)))
            self._pages[key] = list(self._pages_of(asked.ref, worker))
        pages = self._pages.get(key, [])
        if asked.page < len(pages):
            return pages[asked.page]
        self._pages.pop(key, None)
        return words.batch([])

    # -- single chains

    def answer(self, asked: AskedChains) -> bytes:
        """The chains that a peer lost, as many as fit."""
        runs: list[Item] = []
        blocks = 0
        for ref, block in asked.rows[:CHAINS_MAX]:
            worker = self.workers.get(ref)
            chain = self._index.chain_to(worker.id, block) if worker is not None else []
            blocks += len(chain) + 2
            if blocks > ANSWER_BLOCKS_MAX:
                break
            if chain:
                runs.append(Run(ref, ((ROOT, words.pack_hashes(chain)),)))
        return words.batch(runs)

    def _changed(self, change: fleet.Change) -> None:
        worker = change.worker
        ref = words.worker_ref(worker.id)
        if isinstance(change, fleet.Added):
            self.workers[ref] = worker
        elif isinstance(change, fleet.Removed) and self.workers.get(ref) is worker:
            del self.workers[ref]


def runs_of(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """(parent, block) pairs, parents first, as runs (parent, blocks that follow it in turn)."""
    run: list[int] = []
    start = ROOT
    for parent, block in pairs:
        if run and parent == run[-1] and len(run) < CHUNK_BLOCKS:
            run.append(block)
            continue
        if run:
            yield start, run
        start, run = parent, [block]
    if run:
        yield start, run
