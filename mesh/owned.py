"""Owned maps: entries of each owner survive its crash, follow it into its next life, and go when it leaves.

Owns what happens to entries when their owner dies (nothing), restarts (the former life's entries stand until the
new life has said its own, at most for the grace) or leaves (they go and do not come back), and the forgetting of
deletions. The exchange between nodes is `owner_maps`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mesh.home import Home
from mesh.namespace import Owned as OwnedNamespace
from mesh.namespace import Put, Removed
from mesh.owner_log import OwnerLog
from mesh.owner_maps import OwnerMaps
from mesh.records import Kind

COLLECTIONS_PER_TOMBSTONE = 16
"""Deletions are looked for this often per `tombstone_s`: they live at most a sixteenth longer than promised."""


class Owned(OwnerMaps):
    """See the module."""

    kind = Kind.OWNED
    is_checked = True

    def __init__(self, namespace: OwnedNamespace, home: Home, now: float) -> None:
        super().__init__(namespace.name, home, namespace.bytes_max, namespace.coalesce_s)
        self.tombstone_s = namespace.tombstone_s
        self.restart_grace_s = namespace.restart_grace_s
        self._shadows: dict[str, tuple[float, OwnerLog]] = {}
        """owner → (until when, entries of its former life that the new one has not said or deleted)."""
        self._collect_due = now + self.tombstone_s / COLLECTIONS_PER_TOMBSTONE

    def get(self, owner: str, key: bytes) -> bytes | None:
        """The value an owner gives to a key."""
        log = self.logs.get((owner, self.lives.latest(owner)))
        value = None if log is None else log.get(key)
        if value is None and owner in self._shadows:
            return self._shadows[owner][1].get(key)
        return value

    def items(self, owner: str | None) -> Iterator[tuple[str, bytes, bytes]]:
        """(owner, key, value) of one owner or all."""
        for log in list(self.logs.values()):
            if owner is None or log.owner == owner:
                for key, value in log.living():
                    yield log.owner, key, value
        for name, (_, shadow) in self._shadows.items():
            if owner is None or name == owner:
                for key, value in shadow.living():
                    yield name, key, value

    def changed(self, log: OwnerLog, key: bytes, old: bytes | None, new: bytes | None) -> None:
        """Tell, unless the former life said the same."""
        shadow = self._shadows.get(log.owner)
        if shadow is not None and key in shadow[1].entries:
            old = shadow[1].get(key)
            self.bytes -= shadow[1].drop(key)
        if old == new:
            return
        if new is None:
            self.home.tell(Removed(self.name, log.owner, key))
        else:
            self.home.tell(Put(self.name, log.owner, key, new))

    def make_room(self, log: OwnerLog, growth: int, now: float) -> bool:
        """Forget the older half of all deletions early; living entries are never dropped."""
        said = sorted(
            e.said_s
            for one in self.logs.values()
            if one.deleted
            for e in one.entries.values()
            if e.value is None
        )
        if not said:
            return False
        for one in self.logs.values():
            if one.deleted and one.reset is None:
                self.bytes -= one.forget_deletions(said[len(said) // 2])
        self.home.count("forgotten_early", len(said) // 2 + 1)
        return self.bytes + growth <= self.bytes_max

    def life_begins(self, old: OwnerLog, now: float) -> None:
        """Keep the former life's entries for the grace, together with what is left of the one before."""
        before = self._shadows.pop(old.owner, None)
        if before is not None:
            self.bytes -= before[1].bytes
            for key, entry in before[1].entries.items():
                if key not in old.entries:
                    self.bytes += old.set(key, entry)
        self._shadows[old.owner] = (now + self.restart_grace_s, old)

    def log_ends(self, log: OwnerLog) -> None:
        """The owner left: what its former life left behind goes too."""
        self._end_shadow(log.owner)
        super().log_ends(log)

    def _end_shadow(self, owner: str) -> None:
        _, shadow = self._shadows.pop(owner, (0.0, None))
        if shadow is None:
            return
        self.bytes -= shadow.bytes
        for key, _value in shadow.living():
            self.home.tell(Removed(self.name, owner, key))

    def housekeeping(self, now: float) -> None:
        """End shadows whose grace is over and forget old deletions."""
        for owner in [o for o, (until, _) in self._shadows.items() if until <= now]:
            self._end_shadow(owner)
        if now >= self._collect_due:
            self._collect_due = now + self.tombstone_s / COLLECTIONS_PER_TOMBSTONE
            for log in self.logs.values():
                if log.deleted and log.reset is None:
                    self.bytes -= log.forget_deletions(now - self.tombstone_s)

    def next_housekeeping(self) -> float:
        """End of the first grace, or the next collection."""
        if not self._shadows:
            return self._collect_due
        return min(self._collect_due, min(until for until, _ in self._shadows.values()))
