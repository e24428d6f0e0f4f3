"""A consistent-hash ring: keys and workers on one circle, a key belongs to the next worker clockwise.

Owns the points. Who may get a request is the caller's matter: points of others are stepped over, so that a key moves
only when its own worker is out, and a worker that comes back finds its keys. Positions depend on nothing but names, so
all nodes of a mesh place keys alike. Karger et al., "Consistent Hashing and Random Trees" (1997), section 4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator

from xxhash import xxh3_64_intdigest

POINTS = 150
"""Points per worker (contract section 12): the largest share of n workers is then within some 25 % of 1/n."""


def position_of(key: str) -> int:
    """Where a key lies on the circle: 64 bits."""
    return xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"))


class HashRing:
    """Worker ids on a circle of 64-bit positions."""

    __slots__ = ("_ids", "_owner_at", "_positions")

    def __init__(self) -> None:
        self._positions: list[int] = []  # sorted
        self._owner_at: dict[int, str] = {}  # its keys are exactly the positions
        self._ids: set[str] = set()

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, worker_ids: Iterable[str]) -> None:
        """Puts workers on the ring; those that are there already stay. One call for many sorts once."""
        owner_at = self._owner_at
        has_grown = False
        for worker_id in worker_ids:
            if worker_id in self._ids:
                continue
            self._ids.add(worker_id)
            name = worker_id.encode()
            for point in range(POINTS):
                position = xxh3_64_intdigest(name, point)
                other = owner_at.get(position)
                if other is None:
                    self._positions.append(position)
                    owner_at[position] = worker_id
                    has_grown = True
                elif worker_id < other:  # the same winner whatever the order of arrival
                    owner_at[position] = worker_id
        if has_grown:
            self._positions.sort()

    def discard(self, worker_id: str) -> None:
        """Takes a worker off the ring, if it is there."""
        if worker_id not in self._ids:
            return
        self._ids.discard(worker_id)
        self._owner_at = {at: owner for at, owner in self._owner_at.items() if owner != worker_id}
        self._positions = [at for at in self._positions if at in self._owner_at]

    def owner(self, position: int, allowed: Container[str]) -> str | None:
        """The first worker of `allowed` from `position` on, clockwise; None when none of them is on the ring."""
        owner_at = self._owner_at
        positions = self._positions
        start = bisect_left(positions, position)
        for index in range(start, len(positions)):
            owner = owner_at[positions[index]]
            if owner in allowed:
                return owner
        for index in range(start):
            owner = owner_at[positions[index]]
            if owner in allowed:
                return owner
        return None

    def natural_owner(self, position: int) -> str | None:
        """The first worker from `position` on, whoever it is; None on an empty ring."""
        if not self._positions:
            return None
        index = bisect_left(self._positions, position)
        return self._owner_at[self._positions[index if index < len(self._positions) else 0]]

    def clockwise(self, position: int) -> Iterator[str]:
        """Workers from `position` on, once around; a worker comes up as often as it has points."""
        positions = self._positions
        start = bisect_left(positions, position)
        for index in range(start, start + len(positions)):
            yield self._owner_at[positions[index % len(positions)]]
