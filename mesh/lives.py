"""Which life of each owner counts: the latest heard of, unless the owner has left.

Owns both memories and their bound, for one namespace. It must never hold entries.
"""

from __future__ import annotations

from collections.abc import Container

from mesh.digest import Source
from mesh.home import Home


class Lives:
    """Invariant: at most twice `owners_max` names in each table; who lives is never dropped for who is gone."""

    __slots__ = ("_gone", "_home", "_latest")

    def __init__(self, home: Home) -> None:
        self._home = home
        self._latest: dict[str, int] = {}
        self._gone: dict[str, int] = {}

    def latest(self, owner: str) -> int:
        """The latest life heard of; -1 if none."""
        return self._latest.get(owner, -1)

    def set_own(self, life: int) -> None:
        """Our own present life."""
        self._latest[self._home.name] = life

    def is_old(self, source: Source) -> bool:
        """Has this life ended, by a later one or by leaving?"""
        owner, life = source
        return life <= self._gone.get(owner, -1) or life < self._latest.get(owner, 0)

    def has_left(self, source: Source) -> bool:
        """Has the owner left in this life or a later one?"""
        return source[1] <= self._gone.get(source[0], -1)

    def hear(self, source: Source, held: Container[Source]) -> int | None:
        """Raise the owner's latest life. The life it replaces (-1: none), or None if this one is not newer. When the
        table is full, names of which nothing is `held` are dropped."""
        owner, life = source
        former = self.latest(owner)
        if life <= former:
            return None
        if len(self._latest) >= 2 * self._home.settings.owners_max:
            self._latest = {o: n for o, n in self._latest.items() if (o, n) in held or o == self._home.name}
        self._latest[owner] = life
        return former

    def leave(self, owner: str, life: int) -> None:
        """This life and earlier ones have left for good."""
        self._gone[owner] = max(life, self._gone.pop(owner, -1))
        while len(self._gone) > 2 * self._home.settings.owners_max:
            del self._gone[next(iter(self._gone))]
