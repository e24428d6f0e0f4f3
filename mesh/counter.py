"""Counters: the sum of one shard per node and life, per window of wall time.

Owns windows, sums, and the dropping of ended windows. A shard is an absolute number that only its own life writes
(newest version wins, so amounts may be taken back); a restarted node starts a new shard beside the old one, and
both count until their window has expired, so sums are exact through crashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mesh.errors import BoundError
from mesh.home import Home
from mesh.namespace import KEY_BYTES_MAX, Counted
from mesh.namespace import Counter as CounterNamespace
from mesh.owner_log import OwnerLog
from mesh.owner_maps import OwnerMaps
from mesh.records import Kind

WINDOW_BYTES = 8
"""An entry's key is the window number, big-endian, and the counter's name; so keys sort by window."""

SHARD_BYTES_MAX = 16
"""A shard is a signed big-endian integer, shortest form."""

IDLE_LOG_S = 60.0
"""A log whose shards have all expired is forgotten after this: peers whose clocks are behind have dropped theirs."""


def shard_bytes(value: int) -> bytes:
    """Shortest signed big-endian form."""
    return value.to_bytes((value.bit_length() + 8) // 8, "big", signed=True)


def shard_value(data: bytes | None) -> int:
    """The number; nothing counts as zero."""
    return int.from_bytes(data, "big", signed=True) if data else 0


class Counters(OwnerMaps):
    """See the module. Invariant: `_sums` are the sums over all logs of living entries."""

    kind = Kind.COUNTER
    keeps_lives = True

    def __init__(self, namespace: CounterNamespace, home: Home, now: float) -> None:
        super().__init__(namespace.name, home, namespace.bytes_max, namespace.coalesce_s)
        self.window_s = namespace.window_s
        self.windows_kept = namespace.windows_kept
        self._sums: dict[bytes, int] = {}
        self._windows: dict[bytes, int] = {}
        """Window → how many sums it has; there are few windows."""
        self._expire_due = now if math.isfinite(self.window_s) else math.inf

    def window(self, now: float) -> int:
        """Number of the window at this time."""
        return max(0, int(self.home.wall(now) // self.window_s)) if math.isfinite(self.window_s) else 0

    def total(self, key: bytes, window: int) -> int:
        """Sum of all shards."""
        return self._sums.get(window.to_bytes(WINDOW_BYTES, "big") + key, 0)

    def items(self) -> Iterator[tuple[bytes, int, int]]:
        """(key, window, total) of all counters."""
        for full, value in self._sums.items():
            yield full[WINDOW_BYTES:], int.from_bytes(full[:WINDOW_BYTES], "big"), value

    def add(self, key: bytes, amount: int, now: float) -> int:
        """Add to the own shard; the new sum. Raises BoundError when there is no room."""
        if len(key) + WINDOW_BYTES > KEY_BYTES_MAX:
            raise BoundError(f"a counter's name has at most {KEY_BYTES_MAX - WINDOW_BYTES} bytes")
        full = self.window(now).to_bytes(WINDOW_BYTES, "big") + key
        shard = shard_bytes(shard_value(self.own.get(full)) + amount)
        if len(shard) > SHARD_BYTES_MAX:
            raise BoundError("a shard has at most 127 bits")
        self.write(full, shard, now)
        return self._set_sum(full, self._sums.get(full, 0) + amount)

    def admits(self, key: bytes, value: bytes | None, now: float) -> bool:
        """Shards of windows that are neither over nor far ahead of our clock."""
        if value is None or len(key) < WINDOW_BYTES or len(value) > SHARD_BYTES_MAX:
            return False
        window = int.from_bytes(key[:WINDOW_BYTES], "big")
        if not math.isfinite(self.window_s):
            return window == 0
        ahead = 1 + math.ceil(self.home.settings.stamp_ahead_max_s / self.window_s)
        return -self.windows_kept <= window - self.window(now) <= ahead

    def changed(self, log: OwnerLog, key: bytes, old: bytes | None, new: bytes | None) -> None:
        """Keep the sum and tell it."""
        total = self._sums.get(key, 0) + shard_value(new) - shard_value(old)
        if new is None and not any(key in other.entries for other in self.logs.values()):
            self._drop_sum(key)
            return
        self._set_sum(key, total)
        if new is not None:
            window = int.from_bytes(key[:WINDOW_BYTES], "big")
            self.home.tell(Counted(self.name, key[WINDOW_BYTES:], window, total))

    def _set_sum(self, key: bytes, total: int) -> int:
        if key not in self._sums:
            window = key[:WINDOW_BYTES]
            self._windows[window] = self._windows.get(window, 0) + 1
        self._sums[key] = total
        return total

    def _drop_sum(self, key: bytes) -> None:
        if self._sums.pop(key, None) is not None:
            window = key[:WINDOW_BYTES]
            self._windows[window] -= 1
            if not self._windows[window]:
                del self._windows[window]

    def make_room(self, log: OwnerLog, growth: int, now: float) -> bool:
        """Drop the oldest windows, never the current one."""
        current = self.window(now).to_bytes(WINDOW_BYTES, "big")
        while self.bytes + growth > self.bytes_max:
            oldest = min(self._windows, default=current)
            if oldest >= current:
                return False
            self._drop_windows(int.from_bytes(oldest, "big") + 1)
            self.home.count("dropped_entries")
        return True

    def life_begins(self, old: OwnerLog, now: float) -> None:
        """Never called: lives stand side by side."""
        raise AssertionError("counters keep lives")

    def owner_left(self, owner: str, life: int, now: float) -> None:
        """What a node has counted stays until its window is over."""

    def housekeeping(self, now: float) -> None:
        """Drop ended windows and logs that have nothing left."""
        current = self.window(now)
        self._expire_due = max(now, (current + 1) * self.window_s - self.home.wall_offset_s)
        if self._expire_due <= now:
            self._expire_due = now + self.window_s
        self._drop_windows(current - self.windows_kept)
        for source in [
            s for s, log in self.logs.items() if not log.entries and s != (self.home.name, self.life)
        ]:
            if self.logs[source].touched_s < now - max(IDLE_LOG_S, self.window_s):
                self.drop_log(source)

    def _drop_windows(self, first_kept: int) -> None:
        if first_kept <= 0:
            return
        limit = first_kept.to_bytes(WINDOW_BYTES, "big")
        for log in self.logs.values():
            for key in [k for k in log.entries if k[:WINDOW_BYTES] < limit]:
                self.bytes -= log.drop(key)
        for key in [k for k in self._sums if k[:WINDOW_BYTES] < limit]:
            self._drop_sum(key)

    def next_housekeeping(self) -> float:
        """End of the current window."""
        return self._expire_due
