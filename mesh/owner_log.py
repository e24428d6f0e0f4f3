"""One owner's map in one life of it: entries in the order of their versions.

Owns the entries, the version up to which nothing is lacking, and the fingerprint of what is alive. It must
never know who may write, what is told to users, or when an entry is too old: `owner_maps` decides that.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from mesh.digest import fingerprint

ENTRY_BYTES = 176
"""What CPython 3.11 needs for an entry besides key and value: dict slot, struct, two bytes headers, a float
and an integer. Byte caps count it, so that a million tiny entries are not free."""


class Entry(msgspec.Struct, gc=False):
    """`value` None is a deletion. `said_s` is when, by our clock, its owner said it (or we heard it).

    `tail` are elements a newer version put behind the ones we know, encoded, forwarded as they came.
    """

    version: int
    value: bytes | None
    said_s: float
    tail: bytes = b""


class ResetState:
    """The receiving side of a whole map on its way: from whom, what comes next, which keys came."""

    __slots__ = ("has_refused", "next_since", "peer", "seen")

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.next_since = 0
        self.seen: set[bytes] = set()
        self.has_refused = False


class OwnerLog:
    """Invariants: `entries` is ordered by version; no entry is above `have` except during a reset; `bytes`,
    `alive`, `deleted` and `mark` are those of `entries`."""

    __slots__ = (
        "alive",
        "bytes",
        "deleted",
        "entries",
        "floor",
        "have",
        "is_truncated",
        "life",
        "mark",
        "owner",
        "reset",
        "touched_s",
    )

    def __init__(self, owner: str, life: int, now: float) -> None:
        self.owner = owner
        self.life = life
        self.have = 0
        """Nothing up to this version is lacking."""
        self.floor = 0
        """Deletions up to this version may have been forgotten: who has less must take the whole map."""
        self.entries: dict[bytes, Entry] = {}
        self.bytes = 0
        self.alive = 0
        self.deleted = 0
        self.mark = 0
        self.is_truncated = False
        """Entries were refused for lack of room; `have` does not tell."""
        self.reset: ResetState | None = None
        self.touched_s = now

    def get(self, key: bytes) -> bytes | None:
        """The living value of a key."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value

    def growth(self, key: bytes, entry: Entry) -> int:
        """By how many bytes `set` would grow the log."""
        old = self.entries.get(key)
        size = len(entry.tail) + len(entry.value or b"")
        return size + (ENTRY_BYTES + len(key) if old is None else -len(old.tail) - len(old.value or b""))

    def set(self, key: bytes, entry: Entry) -> int:
        """Replace the entry of a key, putting it last; the growth in bytes. Does not move `have`."""
        growth = -self.drop(key)
        self.entries[key] = entry
        size = ENTRY_BYTES + len(key) + len(entry.tail)
        if entry.value is None:
            self.deleted += 1
        else:
            size += len(entry.value)
            self.alive += 1
            self.mark ^= fingerprint(key, entry.value)
        self.bytes += size
        return growth + size

    def drop(self, key: bytes) -> int:
        """Forget an entry altogether; the bytes gained (0 if there was none)."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return 0
        size = ENTRY_BYTES + len(key) + len(entry.tail)
        if entry.value is None:
            self.deleted -= 1
        else:
            size += len(entry.value)
            self.alive -= 1
            self.mark ^= fingerprint(key, entry.value)
        self.bytes -= size
        return size

    def sort(self) -> None:
        """Restore the order after entries of old versions came in by a reset (nearly sorted: about linear)."""
        self.entries = dict(sorted(self.entries.items(), key=lambda item: item[1].version))

    def after(self, since: int) -> list[tuple[bytes, Entry]]:
        """Entries above a version, by rising version."""
        found: list[tuple[bytes, Entry]] = []
        for item in reversed(self.entries.items()):
            if item[1].version <= since:
                break
            found.append(item)
        found.reverse()
        return found

    def living(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of what is alive."""
        for key, entry in self.entries.items():
            if entry.value is not None:
                yield key, entry.value

    def forget_deletions(self, before_s: float) -> int:
        """Drop deletions said before a time and raise `floor`; the bytes gained."""
        old = [k for k, e in self.entries.items() if e.value is None and e.said_s <= before_s]
        gained = 0
        for key in old:
            self.floor = max(self.floor, self.entries[key].version)
            gained += self.drop(key)
        return gained
