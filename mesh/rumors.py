"""News on its way: every rumor is told a limited number of times, the least told first.

Owns the queue of rumors and its bound: one per member name, a newer one replaces the older. Must never judge whether
a rumor is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mesh.member import News

MISSES_MAX = 8
"""Stop looking for a rumor that still fits after this many did not."""

OWN_HEAD_START = 2
"""News about ourselves (a refutation, a farewell) is told this many times before anything else gets a turn."""


def transmit_limit(mult: float, members: int) -> int:
    """How often each member tells a rumor: mult * (1 + log10 N), and never less than for ten members.

    SWIM's lambda log N (section 4.1) without memberlist's steps, equal to them at powers of ten. With m tellings by
    each, a rumor misses somebody in about N * exp(-m) of all cases. ceil(log10(N + 1)) gives 64 members no more
    tellings than ten, and somebody did not hear of one death in fifty, but waited for its own suspicion or a repair.
    """
    return math.ceil(mult * max(2.0, 1.0 + math.log10(max(1, members))))


class _Rumor:
    __slots__ = ("news", "sent", "size_bytes")

    def __init__(self, news: News, sent: int, size_bytes: int) -> None:
        self.news = news
        self.sent = sent
        self.size_bytes = size_bytes


class Rumors:
    """The queue. `measure` gives the encoded size of one piece of news (`codec.news_bytes`)."""

    __slots__ = ("_buckets", "_by_name", "_measure", "_own_name")

    def __init__(self, own_name: str, measure: Callable[[News], int]) -> None:
        self._own_name = own_name
        self._measure = measure
        self._by_name: dict[str, _Rumor] = {}
        # sent count -> rumors in order of arrival; a dict is an ordered set with cheap removal
        self._buckets: dict[int, dict[str, _Rumor]] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def put(self, news: News) -> None:
        """Tell this from now on; it replaces what was told about the same name.

        Bound: the judge only puts news about members of its table, and drops a name with its row.
        """
        name = news.name
        self.drop(name)
        sent = -OWN_HEAD_START if name == self._own_name else 0
        rumor = _Rumor(news, sent, self._measure(news))
        self._by_name[name] = rumor
        self._buckets.setdefault(sent, {})[name] = rumor

    def drop(self, name: str) -> None:
        """Stop telling news about this name."""
        rumor = self._by_name.pop(name, None)
        if rumor is not None:
            self._take(name, rumor)

    def fill(self, room_bytes: int, limit: int, count_max: int) -> list[News]:
        """Choose at most `count_max` pieces of news for one packet, the least told first and among those the newest; counts them as told.

        `limit` is `transmit_limit` for today's number of members; a rumor told that often leaves the queue.
        """
        if not self._by_name:
            return []
        chosen: list[_Rumor] = []
        misses = 0
        for sent in sorted(self._buckets):
            for rumor in reversed(self._buckets[sent].values()):
                if rumor.size_bytes <= room_bytes and len(chosen) < count_max:
                    room_bytes -= rumor.size_bytes
                    chosen.append(rumor)
                else:
                    misses += 1
                    if misses >= MISSES_MAX:
                        break
            if misses >= MISSES_MAX:
                break
        for rumor in reversed(chosen):
            self._count(rumor, limit)
        return [rumor.news for rumor in chosen]

    def clear(self) -> None:
        """Tell nothing any more."""
        self._by_name.clear()
        self._buckets.clear()

    def _count(self, rumor: _Rumor, limit: int) -> None:
        name = rumor.news.name
        self._take(name, rumor)
        rumor.sent += 1
        if rumor.sent >= limit:
            del self._by_name[name]
        else:
            self._buckets.setdefault(rumor.sent, {})[name] = rumor

    def _take(self, name: str, rumor: _Rumor) -> None:
        bucket = self._buckets[rumor.sent]
        del bucket[name]
        if not bucket:
            del self._buckets[rumor.sent]
