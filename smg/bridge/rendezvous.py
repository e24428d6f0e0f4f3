"""Who of several nodes does what, without a message: the highest random weight.

Owns the one rule (Thaler and Ravishankar, 1998): all nodes that see the same members name the same one, and a member more or
less moves only its own share. It keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash


def ranked(key: bytes, names: Iterable[str]) -> list[str]:
    """The names by their weight for this key, the highest first; equal weights by name."""
    seed = xxhash.xxh3_64_intdigest(key)
    weigh = xxhash.xxh3_64_intdigest
    return sorted(names, key=lambda name: (-weigh(name.encode(), seed), name))


def first(key: bytes, names: Iterable[str]) -> str | None:
    """The name with the highest weight; None of nobody."""
    seed = xxhash.xxh3_64_intdigest(key)
    weigh = xxhash.xxh3_64_intdigest
    return min(names, key=lambda name: (-weigh(name.encode(), seed), name), default=None)
