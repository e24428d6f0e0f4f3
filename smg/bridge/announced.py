"""What each node has announced of its placements: counts and fingerprints per worker, by which losses are found.

Owns that bookkeeping, the same on the announcing and on the hearing side: both feed it the same deltas in the same order, so
unequal fingerprints mean that something was lost. Deltas may come twice (the mesh promises each at least once); a sequence
number is counted once. It knows nothing of the index: what was announced may be evicted long since.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

MASK = (1 << 63) - 1
"""Counts and xors stay below 2**63: the mesh carries them in signed 64 bits."""


ROWS_MAX = 20_000
"""Rows above which those that count nothing are dropped; more than a fleet has workers."""


class _Row:
    __slots__ = ("blocks", "sequence", "xor")

    def __init__(self, blocks: int, xor: int, sequence: int) -> None:
        self.blocks = blocks
        self.xor = xor
        self.sequence = sequence


class Announced:
    """Of one node. Keys are worker references."""

    __slots__ = ("_rows", "sequence")

    def __init__(self) -> None:
        self._rows: dict[bytes, _Row] = {}
        self.sequence = 0
        """The newest delta counted."""

    def add(
        self, sequence: int, news: Iterable[tuple[bytes, Sequence[int]]], flushed: Iterable[bytes]
    ) -> None:
        """Count one delta: workers that begin at nothing again, then (worker, new blocks)."""
        self.sequence = max(self.sequence, sequence)
        fresh: set[bytes] = set()
        for ref in flushed:
            row = self._row(ref)
            if row.sequence < sequence:
                row.blocks = row.xor = 0
                fresh.add(ref)
        for ref, hashes in news:
            row = self._row(ref)
            if row.sequence >= sequence and ref not in fresh:
                continue
            fresh.add(ref)
            row.sequence = sequence
            row.blocks += len(hashes)
            for block in hashes:
                row.xor ^= block
        for ref in fresh:
            self._rows[ref].sequence = sequence
        if len(self._rows) > ROWS_MAX:
            self._rows = {ref: row for ref, row in self._rows.items() if row.blocks}

    def begin(self, sequence: int, rows: Iterable[tuple[bytes, int, int]], only: bytes | None) -> None:
        """A snapshot begins: what it tells replaces what is known of one worker, or of all."""
        if only is None:
            self._rows.clear()
            self.sequence = sequence
        else:
            self._rows.pop(only, None)
        for ref, blocks, xor in rows:
            if only in (None, ref):
                self._rows[ref] = _Row(blocks, xor, sequence)

    def fingerprints(self) -> Iterator[tuple[bytes, int, int]]:
        """(worker, blocks, xor) of all workers with any."""
        for ref, row in self._rows.items():
            if row.blocks:
                yield ref, row.blocks & MASK, row.xor & MASK

    def rows(self, only: bytes | None) -> tuple[tuple[bytes, int, int], ...]:
        """The same for a snapshot, unmasked."""
        return tuple(
            (ref, row.blocks, row.xor) for ref, row in self._rows.items() if only is None or ref == only
        )

    def _row(self, ref: bytes) -> _Row:
        row = self._rows.get(ref)
        if row is None:
            row = self._rows[ref] = _Row(0, 0, 0)
        return row
