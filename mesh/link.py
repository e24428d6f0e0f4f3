"""What is to be said to one peer about one namespace.

Owns the outbox of that pair: cursors (up to where each source was sent), which sources or keys have news, and
the questions to ask. It never holds a value: what is sent is read from the state at the moment of sending, so
a slow peer costs a few integers per source, and an entry that changed twice is sent once.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.digest import Source
from mesh.records import SnapWant

PLAIN_VECTOR = 1
PUSH_VECTOR = 2


class Link:
    """Outbox of one (peer, namespace). `wake` tells the replica that there is something to send.

    Invariant: a source in `cursors` was sent to the peer, without a hole, up to that version, or the peer said
    itself that it has it.
    """

    __slots__ = (
        "bucket_mask",
        "cursors",
        "has_sums",
        "is_closing",
        "is_heard",
        "keys",
        "peer",
        "pending",
        "resets",
        "snap_want",
        "vector",
        "wake",
        "wants",
    )

    def __init__(self, peer: str, wake: Callable[[], None]) -> None:
        self.peer = peer
        self.wake = wake
        self.is_heard = False
        """The peer's vector came: before that we do not know what it lacks, and send nothing but our vector."""
        self.cursors: dict[Source, int] = {}
        self.resets: set[Source] = set()
        """Sources whose whole map is on its way to the peer."""
        self.pending: dict[Source, None] = {}
        """Sources with news (bounded by the sources of the namespace)."""
        self.keys: dict[bytes, None] = {}
        """Last writer wins: keys with news (bounded by `lww.KEYS_PENDING_MAX`)."""
        self.wants: dict[Source, tuple[int, int]] = {}
        """Questions: source → (since, flags)."""
        self.vector = 0
        """0, PLAIN_VECTOR or PUSH_VECTOR: our vector is to be sent."""
        self.has_sums = False
        """Last writer wins: our bucket sums are to be sent."""
        self.snap_want: SnapWant | None = None
        """Streams: the snapshot to ask this peer for."""
        self.is_closing = False
        """Last writer wins: our watermark is to be sent when all keys are."""
        self.bucket_mask = 0
        """Last writer wins: buckets to ask for."""

    def send_vector(self, kind: int) -> None:
        """Our vector is due for this peer."""
        self.vector = max(self.vector, kind)
        self.wake()

    def add_pending(self, source: Source) -> None:
        """There is news of this source."""
        self.pending[source] = None
        self.wake()

    def add_want(self, source: Source, since: int, flags: int) -> None:
        """Ask for what follows `since`."""
        self.wants[source] = (since, flags)
        self.wake()

    def set_cursor_at_least(self, source: Source, version: int) -> None:
        """The peer showed that it has this source up to the version."""
        if self.cursors.get(source, -1) < version:
            self.cursors[source] = version

    def forget(self, source: Source) -> None:
        """The source is gone."""
        self.cursors.pop(source, None)
        self.resets.discard(source)
        self.pending.pop(source, None)
        self.wants.pop(source, None)
