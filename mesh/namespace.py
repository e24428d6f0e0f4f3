"""The words of replicated state: what a namespace is, how it merges, and what its users are told.

Owns the declarations (one struct per merge rule, each with its bounds and times) and the changes that
`Replica.next_change` hands out. It must never hold state, and it must never look into a value: keys,
values and payloads are opaque bytes to everything in `mesh`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec

KEY_BYTES_MAX = 512
"""Longest key. Keys repeat in every record of a map, so a long key is a mistake and not a need."""

VALUE_BYTES_MAX = 64 * 1024
"""Largest value, payload or snapshot chunk. Sixteen of them fit in one stream frame."""

MIB = 1024 * 1024


class Lww(msgspec.Struct, frozen=True, kw_only=True):
    """Last writer wins: any node writes any key, the highest hybrid logical stamp stays.

    Above `bytes_max` a local write raises `BoundError`; what peers write is taken up to twice that,
    then refused and counted. Deletions are remembered for `tombstone_s`; a write older than a forgotten
    deletion is turned into a deletion again, so nothing comes back.
    """

    name: str
    bytes_max: int = 4 * MIB
    coalesce_s: float = 0.0
    tombstone_s: float = 24 * 3600.0


class Owned(msgspec.Struct, frozen=True, kw_only=True):
    """Each owner writes its own map; entries survive the owner's crash and go when it leaves.

    After a restart the entries of the former life are kept for `restart_grace_s`, so that an owner which
    lists the same things again causes no removal. Above `bytes_max` (all owners together) further entries
    of peers are refused and fetched again when there is room; a local write raises `BoundError`.
    """

    name: str
    bytes_max: int = 8 * MIB
    coalesce_s: float = 0.0
    tombstone_s: float = 3600.0
    restart_grace_s: float = 2.0


class Ephemeral(msgspec.Struct, frozen=True, kw_only=True):
    """Each owner's absolute numbers of the moment: newest sequence wins, gone `ttl_s` after the last word.

    The owner's own entries stay until it removes them and are said again every `refresh_s`. They go at once
    when their owner dies or leaves. Above `bytes_max` the entries that would expire first are dropped.
    """

    name: str
    bytes_max: int = MIB
    coalesce_s: float = 0.05
    ttl_s: float = 3.0
    refresh_s: float = 1.0


class Counter(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers that are the sum of one shard per node and life, counted per window of wall time.

    Window number = wall seconds // `window_s`; a shard goes `windows_kept` windows after its own has ended,
    whether its node lives or not. `window_s` of infinity is one window that never ends. Above `bytes_max`
    the oldest windows are dropped first.
    """

    name: str
    bytes_max: int = MIB
    coalesce_s: float = 0.1
    window_s: float = math.inf
    windows_kept: int = 2


class StreamSource(Protocol):
    """What the user of a delta stream supplies so that gaps too wide for the ring can be filled.

    Both methods speak of what `origin` has announced, as this node knows it now (for its own name: all that
    it has appended). They are called between two awaits and must be quick; the iterator of `snapshot` is
    advanced one chunk at a time, paced, while further deltas are applied. Deltas must be idempotent, because
    a snapshot may already contain the work of deltas which are delivered again after it.
    """

    def fingerprints(self, origin: str) -> Iterable[tuple[bytes, int, int]]:
        """(key, count, xor) for each key, such as a worker; count and xor below 2**64. Empty: not checked."""
        ...

    def snapshot(self, origin: str, key: bytes | None) -> Iterator[bytes] | None:
        """Chunks of at most `VALUE_BYTES_MAX` for one key, or for all with None; None if it cannot be told."""
        ...


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """Ordered delta streams, one per origin; a bounded ring of the latest payloads, snapshots beyond it.

    `bytes_max` bounds the rings of all origins together, `ring_bytes_max` each; the oldest payloads are
    dropped. Only with relaying are the rings of other origins filled.
    """

    name: str
    bytes_max: int = 16 * MIB
    ring_bytes_max: int = 4 * MIB
    coalesce_s: float = 0.1
    source: StreamSource | None = None


Namespace = Lww | Owned | Ephemeral | Counter | Stream


class Put(msgspec.Struct, frozen=True):
    """Another node set a key. `owner` is the map's owner, for last-writer-wins the writer."""

    namespace: str
    owner: str
    key: bytes
    value: bytes


class Removed(msgspec.Struct, frozen=True):
    """A key is gone: deleted, expired, or its owner left or (ephemeral) died."""

    namespace: str
    owner: str
    key: bytes


class Counted(msgspec.Struct, frozen=True):
    """Another node's shard of a counter moved; `total` is the new sum in that window."""

    namespace: str
    key: bytes
    window: int
    total: int


class Appended(msgspec.Struct, frozen=True):
    """The next delta of an origin's stream, in order, each once (again after a snapshot that held it)."""

    namespace: str
    owner: str
    sequence: int
    payload: bytes


class Restored(msgspec.Struct, frozen=True):
    """A chunk of a snapshot of what `owner` announced, for one key or (None) for all.

    At `is_first` forget what that covers, at `is_last` it is complete. If a later `Restored` begins again
    with `is_first`, the former snapshot was cut short.
    """

    namespace: str
    owner: str
    key: bytes | None
    chunk: bytes
    is_first: bool
    is_last: bool


class Restarted(msgspec.Struct, frozen=True):
    """The origin of a stream began a new life; its sequence starts again at 1.

    Its fingerprints start from nothing too. What it announced before may be kept apart, if it is still true."""

    namespace: str
    owner: str


class Ended(msgspec.Struct, frozen=True):
    """The origin of a stream left or was forgotten; nothing more will come from this life of it."""

    namespace: str
    owner: str


class Lost(msgspec.Struct, frozen=True):
    """Changes were lost to a bound: read `Replica.items` again (owner "" means the whole namespace)."""

    namespace: str
    owner: str


Change = Put | Removed | Counted | Appended | Restored | Restarted | Ended | Lost
