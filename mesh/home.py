"""What all namespaces of one node share: its name, the relay switch, who is connected, and the changes to tell.

Owns the bounded queue of changes and the counters of what was refused. It must never know a merge rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

import msgspec

from mesh.digest import Source
from mesh.link import Link
from mesh.namespace import Change, Lost
from mesh.settings import NAME_BYTES_MAX

LIFE_BORN_BITS = 32
"""A life number's upper half is its birth in wall seconds, see `replica.life_number`."""


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times and bounds that are not a namespace's own."""

    anti_entropy_interval_s: float = 10.0
    """Vectors are compared with one random connected peer this often (mesh.md 4.3)."""
    want_timeout_s: float = 2.0
    """A question to one peer that brought nothing is asked again, of anyone, after this long."""
    snapshot_bytes_per_s: float = 10_000_000.0
    """Pace of all outbound snapshots together: a tenth of a gigabit link."""
    snapshots_out_max: int = 2
    snapshot_idle_s: float = 10.0
    """An inbound snapshot without a chunk for this long is given up and asked for again."""
    stamp_ahead_max_s: float = 600.0
    """Last-writer-wins records and lives further ahead of our wall clock are refused and counted: one accepted
    stamp of the far future could never be overwritten."""
    owners_max: int = 4096
    """Owners remembered per namespace; as many as the member table holds."""
    changes_max: int = 100_000
    """Changes waiting for `next_change`; when full the oldest go and `Lost` is told."""


class Home:
    """Shared by the stores of one replica."""

    __slots__ = (
        "_changes",
        "_lost",
        "counts",
        "is_relay",
        "life",
        "links",
        "name",
        "rng",
        "settings",
        "wall_offset_s",
    )

    def __init__(
        self, name: str, life: int, rng: Random, settings: ReplicaSettings, wall_offset_s: float
    ) -> None:
        self.name = name
        self.life = life
        self.rng = rng
        self.settings = settings
        self.wall_offset_s = wall_offset_s
        self.is_relay = False
        self.counts: dict[str, int] = {}
        self.links: dict[str, dict[str, Link]] = {}
        """peer → namespace → link, of connected peers."""
        self._changes: deque[Change | Callable[[], None]] = deque()
        self._lost: dict[tuple[str, str], None] = {}

    def count(self, what: str, times: int = 1) -> None:
        """Count something for `Replica.stats`."""
        self.counts[what] = self.counts.get(what, 0) + times

    def wall(self, now: float) -> float:
        """Wall time in seconds."""
        return now + self.wall_offset_s

    def is_credible(self, owner: str, life: int, now: float) -> bool:
        """Is this the name of a member, and was this life born no further ahead of our wall clock than is tolerated?
        Counts refusals."""
        if len(owner.encode()) > NAME_BYTES_MAX:
            self.count("refused_owners")
            return False
        if life >> LIFE_BORN_BITS <= self.wall(now) + self.settings.stamp_ahead_max_s and life < 1 << 64:
            return True
        self.count("refused_lives")
        return False

    def is_connected(self, peer: str) -> bool:
        """Is there a stream to this peer?"""
        return peer in self.links

    def links_of(self, namespace: str) -> list[Link]:
        """The links of all connected peers for one namespace."""
        return [links[namespace] for links in self.links.values()]

    def tell(self, change: Change) -> None:
        """Queue a change for the user."""
        if len(self._changes) >= self.settings.changes_max:
            oldest = self._changes.popleft()
            if not callable(oldest):
                self._lost[(oldest.namespace, oldest.owner if hasattr(oldest, "owner") else "")] = None
                self.count("lost_changes")
        self._changes.append(change)

    def when_told(self, check: Callable[[], None]) -> None:
        """Run `check` once all changes queued so far have been handed out (and so, handled)."""
        if self._changes:
            self._changes.append(check)
        else:
            check()

    @property
    def has_untold(self) -> bool:
        """Are there changes the user has not taken yet?"""
        return bool(self._changes)

    @property
    def changes_waiting(self) -> int:
        """How many."""
        return len(self._changes)

    def next_change(self) -> Change | None:
        """Take the next change."""
        if self._lost:
            namespace, owner = next(iter(self._lost))
            del self._lost[(namespace, owner)]
            return Lost(namespace, owner)
        while self._changes:
            first = self._changes.popleft()
            if not callable(first):
                return first
            first()
        return None


def forget_source(home: Home, namespace: str, source: Source) -> None:
    """Drop what the links remember of a source that is gone."""
    for links in home.links.values():
        links[namespace].forget(source)
