"""Last writer wins: one map that every node may write, the highest stamp of a key stays.

Owns the entries with their deletions, the forgetting of deletions, and the exchange by fingerprints of buckets: who
wrote what matters little here and maps are small, so content is compared instead of versions per writer.

Forgetting cannot resurrect. `watermark` is the highest stamp of a deletion that was forgotten. An entry that arrives
below it under a key we do not know is either one whose deletion we have forgotten or one we never saw; it is turned
into a deletion with the watermark's stamp, which travels like any other and ends the entry everywhere. So a node cut
off for longer than `tombstone_s` loses what was written only on its side before the watermark: the price of never
bringing a deleted key back. Newcomers take over the watermark as soon as their content equals a peer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from mesh.digest import Row
from mesh.errors import BoundError, DecodeError
from mesh.frames import Frame
from mesh.home import Home
from mesh.link import PUSH_VECTOR, Link
from mesh.namespace import Lww as LwwNamespace
from mesh.namespace import Put, Removed
from mesh.owner_log import ENTRY_BYTES
from mesh.owner_maps import check_sizes
from mesh.owner_records import DELTA_BYTES_MAX
from mesh.records import (
    PUSH,
    QUIET,
    Delta,
    Kind,
    Sums,
    Vector,
    WantKeys,
    checked_entry,
    checked_key,
    checked_number,
    checked_value,
    encode_body,
    keep_tail,
    with_tail,
)
from mesh.stamp import TIME_MAX, ZERO, Clock, Stamp

BUCKETS = 64
"""One bit each in a mask of 64 bits; sums of all are 600 bytes, sent only when the maps differ."""

KEYS_PENDING_MAX = 4096
"""Keys waiting for one slow peer beyond the size of the map (keys forgotten meanwhile); above it they are dropped
and the fingerprints find them again."""

STAMP_BYTES = 64
"""A stamp beside an entry: tuple and integer (the node's name is shared)."""

LINGER_S = 30.0
"""A deletion is kept at least this long after it came in, however old it is: time to pass it on."""

NODE_BYTES_MAX = 128


class Entry(msgspec.Struct, gc=False, frozen=True):
    """`value` None is a deletion; `said_s` is when it came in, by our clock; `sum` its fingerprint."""

    stamp: Stamp
    value: bytes | None
    said_s: float
    sum: int
    tail: bytes = b""


def _sum(key: bytes, stamp: Stamp, value: bytes | None) -> int:
    head = stamp.time.to_bytes(8, "big") + (b"\0" if value is None else b"\1") + stamp.node.encode()
    return xxh3_64_intdigest(key, xxh3_64_intdigest(value or b"", xxh3_64_intdigest(head)))


def bucket_of(key: bytes) -> int:
    """The bucket of a key, by its xxh3 with seed 0."""
    return xxh3_64_intdigest(key) % BUCKETS


class LwwMap:
    """See the module. Invariants: `_sums` are the xor of the entries' sums per bucket, deletions included;
    `_mark` is the xor over living entries; `bytes` is their account."""

    kind = Kind.LWW

    def __init__(self, namespace: LwwNamespace, home: Home, now: float) -> None:
        self.name = namespace.name
        self.home = home
        self.bytes_max = namespace.bytes_max
        self.coalesce_s = namespace.coalesce_s
        self.tombstone_s = namespace.tombstone_s
        self.entries: dict[bytes, Entry] = {}
        self.bytes = 0
        self.watermark = ZERO
        self.fresh: dict[bytes, str | None] = {}
        self.due = math.inf
        self._clock = Clock(home.name)
        self._sums = [0] * BUCKETS
        self._mark = 0
        self._deletions = 0
        self._collect_due = math.inf

    # ---- what users do ----------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """The living value."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value

    def items(self, owner: str | None) -> Iterator[tuple[str, bytes, bytes]]:
        """(writer, key, value) of what is alive."""
        for key, entry in list(self.entries.items()):
            if entry.value is not None and (owner is None or owner == entry.stamp.node):
                yield entry.stamp.node, key, entry.value

    def write(self, key: bytes, value: bytes | None, now: float) -> None:
        """Set or (None) delete a key. Raises BoundError (nothing changed) when it is too big or there is no room."""
        check_sizes(key, value)
        if not self._make_room(key, self._size(key, value), self.bytes_max):
            raise BoundError(f"namespace {self.name} is full")
        stamp = self._clock.stamp(self.home.wall(now))
        self._set(key, stamp, value, now, b"")
        self.touch(key, None, now)

    def touch(self, key: bytes, origin: str | None, now: float) -> None:
        """This key has news for all peers but the one it came from."""
        self.fresh[key] = origin
        self.due = min(self.due, now + self.coalesce_s)

    # ---- the map ----------------------------------------------------------------------------------------

    @staticmethod
    def _size(key: bytes, value: bytes | None, tail: bytes = b"") -> int:
        return ENTRY_BYTES + STAMP_BYTES + len(key) + len(value or b"") + len(tail)

    def _set(self, key: bytes, stamp: Stamp, value: bytes | None, now: float, tail: bytes) -> None:
        self._drop(key)
        entry = Entry(stamp, value, now, _sum(key, stamp, value), tail)
        self.entries[key] = entry
        self.bytes += self._size(key, value, tail)
        self._sums[bucket_of(key)] ^= entry.sum
        if value is None:
            self._deletions += 1
            self._collect_due = min(self._collect_due, self._expiry(entry))
        else:
            self._mark ^= entry.sum

    def _drop(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.bytes -= self._size(key, entry.value, entry.tail)
            self._sums[bucket_of(key)] ^= entry.sum
            if entry.value is None:
                self._deletions -= 1
            else:
                self._mark ^= entry.sum

    def _expiry(self, entry: Entry) -> float:
        """When a deletion is forgotten: by its stamp, so that all nodes do it together."""
        by_stamp = entry.stamp.wall_s + self.tombstone_s - self.home.wall_offset_s
        return max(by_stamp, entry.said_s + LINGER_S)

    def _forget(self, key: bytes) -> None:
        self.watermark = max(self.watermark, self.entries[key].stamp)
        self._drop(key)

    def _after(self, key: bytes, size: int) -> int:
        """Bytes of the map once this key's entry has this size."""
        old = self.entries.get(key)
        return self.bytes + size - (0 if old is None else self._size(key, old.value, old.tail))

    def _make_room(self, key: bytes, size: int, limit: int) -> bool:
        """Forget the oldest deletions early; living entries are never dropped."""
        after = self._after(key, size)
        if after <= max(limit, self.bytes):
            return True
        if not self._deletions:
            return False
        deletions = sorted((e.stamp, k) for k, e in self.entries.items() if e.value is None)
        for _, oldest in deletions:
            # Room for a while, because the search above looks at everything.
            if self._after(key, size) <= limit * 15 // 16:
                break
            self._forget(oldest)
            self.home.count("dropped_entries")
        return self._after(key, size) <= limit

    def _merge(
        self, link: Link, key: bytes, stamp: Stamp, value: bytes | None, tail: bytes, now: float
    ) -> None:
        """Take one entry of a peer."""
        if stamp.wall_s > self.home.wall(now) + self.home.settings.stamp_ahead_max_s:
            self.home.count("refused_stamps")
            return
        old = self.entries.get(key)
        origin: str | None = link.peer
        if old is None and stamp <= self.watermark:
            if value is None:
                return
            self.home.count("refused_resurrections")
            stamp, value, tail, origin = self.watermark, None, b"", None
        elif old is not None and (stamp, value is not None, value) <= (
            old.stamp,
            old.value is not None,
            old.value,
        ):
            return
        if not self._make_room(key, self._size(key, value, tail), 2 * self.bytes_max):
            self.home.count("refused_entries")
            return
        self._clock.observe(stamp)
        self._set(key, stamp, value, now, tail)
        if self.home.is_relay or origin is None:
            self.touch(key, origin, now)
        was = None if old is None else old.value
        if value is None:
            if was is not None:
                self.home.tell(Removed(self.name, stamp.node, key))
        elif value != was:
            self.home.tell(Put(self.name, stamp.node, key, value))

    # ---- the exchange -----------------------------------------------------------------------------------

    def _whole(self) -> int:
        total = 0
        for one in self._sums:
            total ^= one
        return total

    def vector(self, flags: int) -> Frame:
        """One row: the watermark and the fingerprint of everything."""
        row = Row(self.watermark.node, self.watermark.time, 0, self._whole())
        return encode_body(Vector(self.name, self.kind, flags, (row,)))

    def receive_vector(self, link: Link, vector: Vector, now: float) -> None:
        """Equal content: share the watermark. Else one side sends its sums: the one that is asked, or on opening,
        where both sides send a vector, the lower name."""
        for row in vector.rows[:1]:
            if row.mark == self._whole():
                theirs = Stamp(row.life, row.owner)
                if theirs.wall_s <= self.home.wall(now) + self.home.settings.stamp_ahead_max_s:
                    self.watermark = max(self.watermark, theirs)
            elif vector.flags & PUSH or (not vector.flags & QUIET and self.home.name < link.peer):
                link.has_sums = True
                link.wake()

    def receive_sums(self, link: Link, sums: Sums, now: float) -> None:
        """Send what is in the buckets that differ, and ask for theirs. Raises DecodeError."""
        if len(sums.sums) < BUCKETS:
            raise DecodeError("sums of too few buckets")
        mask = 0
        for index, one in enumerate(self._sums):
            if one != sums.sums[index]:
                mask |= 1 << index
        if mask:
            link.bucket_mask |= mask
            self._send_buckets(link, mask)

    def receive_want_keys(self, link: Link, want: WantKeys, now: float) -> None:
        """Send what is in these buckets."""
        self._send_buckets(link, want.mask)

    def _send_buckets(self, link: Link, mask: int) -> None:
        for key in self.entries:
            if mask >> bucket_of(key) & 1:
                link.keys[key] = None
        link.is_closing = True
        link.wake()

    def next_frame(self, link: Link, now: float) -> Frame | None:
        """The next frame for this peer."""
        if link.bucket_mask:
            mask, link.bucket_mask = link.bucket_mask, 0
            return encode_body(WantKeys(self.name, mask))
        if link.keys and link.is_heard:
            frame = self._delta_frame(link)
            if frame is not None:
                return frame
        if link.is_closing:
            link.is_closing = False
            return self.vector(QUIET)
        if link.has_sums:
            link.has_sums = False
            return encode_body(Sums(self.name, tuple(self._sums)))
        if link.vector:
            flags = PUSH if link.vector == PUSH_VECTOR else 0
            link.vector = 0
            return self.vector(flags)
        return None

    def _delta_frame(self, link: Link) -> Frame | None:
        entries: list[Any] = []
        size = 0
        while link.keys and size < DELTA_BYTES_MAX:
            key = next(iter(link.keys))
            del link.keys[key]
            entry = self.entries.get(key)
            if entry is not None:
                fields = [key, entry.value, entry.stamp.time, entry.stamp.node]
                entries.append(with_tail(fields, entry.tail))
                size += len(key) + len(entry.value or b"") + len(entry.tail) + len(entry.stamp.node) + 16
        return encode_body(Delta(self.name, "", 0, 0, 0, 0, entries)) if entries else None

    def receive_delta(self, link: Link, delta: Delta, now: float) -> None:
        """Merge entries. Raises DecodeError with nothing changed."""
        found: list[tuple[bytes, Stamp, bytes | None, bytes]] = []
        for raw in delta.entries:
            entry = checked_entry(raw, 4)
            time, node = checked_number(entry[2]), entry[3]
            if type(node) is not str or len(node.encode()) > NODE_BYTES_MAX or time > TIME_MAX:
                raise DecodeError("entry stamp")
            found.append(
                (checked_key(entry[0]), Stamp(time, node), checked_value(entry[1]), keep_tail(entry, 4))
            )
        for key, stamp, value, tail in found:
            self._merge(link, key, stamp, value, tail, now)

    # ---- the rest ---------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Hand what is fresh to the links."""
        fresh, self.fresh = self.fresh, {}
        self.due = math.inf
        for link in self.home.links_of(self.name):
            if not link.is_heard:
                continue  # its vector will show what it lacks
            for key, origin in fresh.items():
                if origin != link.peer:
                    link.keys[key] = None
            if len(link.keys) > KEYS_PENDING_MAX + len(self.entries):
                link.keys.clear()
                self.home.count("dropped_backlogs")
                link.send_vector(PUSH_VECTOR)
            link.wake()

    def deadline(self) -> float:
        """When `tick` is due."""
        return min(self.due, self._collect_due)

    def tick(self, now: float) -> None:
        """Flush and forget when due."""
        if now >= self._collect_due:
            self._collect(now)
        if now >= self.due:
            self.flush()

    def _collect(self, now: float) -> None:
        expiries = {k: self._expiry(e) for k, e in self.entries.items() if e.value is None}
        for key, expiry in expiries.items():
            if expiry <= now:
                self._forget(key)
        # Not more than once a second, however many deletions expire one after the other.
        self._collect_due = max(now + 1.0, min((e for e in expiries.values() if e > now), default=math.inf))

    def digest(self) -> int:
        """64 bits over what is alive."""
        return self._mark

    def stats(self) -> dict[str, int]:
        """Sizes."""
        return {
            "entries": len(self.entries) - self._deletions,
            "bytes": self.bytes,
            "deletions": self._deletions,
        }
