"""Use of limits counted over all nodes: what tenants and the whole mesh have taken in this window.

Owns the two counters of the mesh (`limits` by the second, `limits_minute` by the minute), in which every node has a shard that
only it raises, so that the sum is exact however the network behaves. A window's use goes when its time is over. The limits
themselves, and what follows when one is reached, are not here.
"""

from __future__ import annotations

from mesh import BoundError, State

LIMITS = "limits"
LIMITS_MINUTE = "limits_minute"
SECOND, MINUTE = LIMITS, LIMITS_MINUTE


class SharedUse:
    """Use in windows of one second or one minute of wall time. Keys are names of limits, at most 512 bytes long."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.refused = 0
        """Amounts that the mesh had no room for; then only this node's own bookkeeping counts."""

    def take(self, key: bytes, amount: int, window: str = SECOND) -> int:
        """Count `amount` (negative: give back); the use of all nodes in this window, as far as heard, this included."""
        try:
            return self._state.add(window, key, amount)
        except BoundError:
            self.refused += 1
            return self.used(key, window)

    def used(self, key: bytes, window: str = SECOND) -> int:
        """The use of all nodes in this window, as far as heard."""
        return self._state.total(window, key)

    def used_before(self, key: bytes, window: str = SECOND) -> int:
        """The use of all nodes in the window before this one, for those who smooth over the edge."""
        return self._state.total(window, key, self._state.window(window) - 1)
