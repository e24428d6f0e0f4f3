"""One origin's delta stream in one life of it: the latest payloads, by sequence number.

Owns the ring and its byte account. It must never decide who gets what: `delta_streams` does.
"""

from __future__ import annotations

from typing import TypeAlias

Item: TypeAlias = bytes | tuple[bytes, bytes]
"""A payload, or a payload and the encoded elements that a newer version put behind it."""

ITEM_BYTES = 48
"""What a payload costs besides its bytes: object header and list slot."""


class StreamLog:
    """Invariant: the ring holds the payloads `first` .. `have`, without a hole; it is empty when first == have + 1."""

    __slots__ = ("_items", "_start", "bytes", "have", "life", "owner")

    def __init__(self, owner: str, life: int) -> None:
        self.owner = owner
        self.life = life
        self.have = 0
        self.bytes = 0
        # A list with a moving start, cut when half is waste: slices in constant time, which a deque has not.
        self._items: list[Item] = []
        self._start = 0

    @property
    def first(self) -> int:
        """Sequence number of the oldest payload kept."""
        return self.have + 1 - (len(self._items) - self._start)

    @staticmethod
    def item_bytes(item: Item) -> int:
        """What an item counts."""
        if isinstance(item, bytes):
            return ITEM_BYTES + len(item)
        return 3 * ITEM_BYTES + len(item[0]) + len(item[1])

    def append(self, item: Item, *, is_kept: bool) -> None:
        """The next payload."""
        self.have += 1
        if is_kept:
            self._items.append(item)
            self.bytes += self.item_bytes(item)
        elif self._items:
            self.clear()

    def clear(self) -> None:
        """Empty the ring."""
        self._items.clear()
        self._start = 0
        self.bytes = 0

    def jump(self, have: int) -> None:
        """Go on after this sequence number (a snapshot holds all before)."""
        self.clear()
        self.have = have

    def drop_oldest(self) -> None:
        """Drop the oldest payload. There must be one."""
        item = self._items[self._start]
        self._items[self._start] = b""
        self.bytes -= self.item_bytes(item)
        self._start += 1
        if self._start * 2 > len(self._items):
            del self._items[: self._start]
            self._start = 0

    def trim(self, bytes_max: int) -> None:
        """Drop the oldest until the ring fits."""
        while self.bytes > bytes_max:
            self.drop_oldest()

    def after(self, since: int, bytes_max: int) -> list[Item]:
        """Payloads that follow `since` (not before `first - 1`), about so many bytes of them, at least one."""
        index = self._start + since + 1 - self.first
        assert index >= self._start
        end = index
        size = 0
        while end < len(self._items) and size < bytes_max:
            size += self.item_bytes(self._items[end])
            end += 1
        return self._items[index:end]
