"""Replicated state of one node: namespaces of opaque bytes, each with one merge rule.

Owns what this node knows of every namespace, what each connected peer has been sent, and when something is
due. It must never wait, read a clock, log, or know what a value means. The shell (`mesh.agent`) tells it
which streams are open and who died or left, hands it frames, and sends the frames it gives back.

The shell's loop::

    replica.tick(now)                           # when now >= replica.deadline(), and after each input
    for peer in replica.peers_to_send():        # peers something is waiting for
        for frame in replica.frames_to_send(peer, now):
            write(frame)                        # a peer whose stream is full is simply not asked: nothing
                                                # piles up, later frames carry only the newest values
    while (change := replica.next_change()) is not None:
        tell(change)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import msgspec

from mesh.frames import Frame
from mesh.namespace import Change, Namespace


def life_number(born_s: int, boot: bytes) -> int:
    """Order number of one life of a member, from its record: later lives have higher numbers."""
    return (born_s & 0xFFFFFFFF) << 32 | int.from_bytes(boot[:4], "big")


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times and bounds that are not a namespace's own."""

    anti_entropy_interval_s: float = 10.0
    """Vectors are compared with one random connected peer this often (mesh.md 4.3)."""
    want_timeout_s: float = 2.0
    """A question to one peer that brought nothing is asked again, of anyone, after this long."""
    snapshot_bytes_per_s: float = 10_000_000.0
    """Pace of all outbound snapshots together."""
    snapshots_out_max: int = 2
    snapshot_idle_s: float = 10.0
    """An inbound snapshot without a chunk for this long is given up and asked for again."""
    stamp_ahead_max_s: float = 600.0
    """Last-writer-wins records stamped further ahead of our clock are refused and counted."""
    owners_max: int = 4096
    """Owners remembered per namespace; as many as the member table holds."""
    changes_max: int = 100_000
    """Changes waiting for `next_change`; when full, the oldest go and `Lost` is told."""


class Replica:
    """See the module. `now` is one monotonic clock in seconds; wall time = now + `wall_offset_s`."""

    def __init__(
        self,
        name: str,
        life: int,
        namespaces: Sequence[Namespace],
        now: float,
        rng: Random,
        *,
        wall_offset_s: float = 0.0,
        settings: ReplicaSettings | None = None,
    ) -> None:
        raise NotImplementedError

    # What the library's user does.

    def put(self, namespace: str, key: bytes, value: bytes, now: float) -> None:
        """Set a key (last writer wins, owned, ephemeral). Raises BoundError when too long or the namespace is full."""
        raise NotImplementedError

    def remove(self, namespace: str, key: bytes, now: float) -> None:
        """Delete a key (own key for owned and ephemeral). Unknown keys: nothing for maps of our own; for
        last writer wins a tombstone is left, so that it beats what we have not heard of yet."""
        raise NotImplementedError

    def add(self, namespace: str, key: bytes, amount: int, now: float) -> int:
        """Add to this node's shard of a counter in the current window (negative: take back). The new sum of all shards."""
        raise NotImplementedError

    def append(self, namespace: str, payload: bytes, now: float) -> int:
        """Append a delta to this node's stream; its sequence number. Raises BoundError when too long."""
        raise NotImplementedError

    def get(self, namespace: str, key: bytes, owner: str | None = None) -> bytes | None:
        """The value of a key: for last writer wins without owner, for owned and ephemeral of that owner."""
        raise NotImplementedError

    def items(self, namespace: str, owner: str | None = None) -> Iterator[tuple[str, bytes, bytes]]:
        """(owner, key, value) of a map namespace, of one owner or of all. Do not change the replica meanwhile."""
        raise NotImplementedError

    def total(self, namespace: str, key: bytes, now: float, window: int | None = None) -> int:
        """Sum of all shards of a counter, in the current window unless one is named."""
        raise NotImplementedError

    def window(self, namespace: str, now: float) -> int:
        """Number of the current window of a counter namespace."""
        raise NotImplementedError

    def leave(self, now: float) -> None:
        """Delete all our owned and ephemeral entries, because this node is about to leave for good."""
        raise NotImplementedError

    # What the shell tells.

    def peer_up(self, peer: str, life: int, now: float) -> None:
        """A stream to this peer is open (again: everything sent on the former one counts as lost)."""
        raise NotImplementedError

    def peer_down(self, peer: str, now: float) -> None:
        """The stream is gone. Says nothing about the peer's health; its entries stay."""
        raise NotImplementedError

    def set_relay(self, is_on: bool) -> None:
        """Pass on what others wrote (clusters where not all pairs are connected). Off: only our own goes out,
        and what was missed is repaired by vectors."""
        raise NotImplementedError

    def set_wall_offset(self, wall_offset_s: float) -> None:
        """Wall time minus `now`, when the shell sees that the wall clock was set."""
        raise NotImplementedError

    def owner_died(self, owner: str, life: int, now: float) -> None:
        """Membership holds this life dead: its ephemeral entries go at once, all else stays."""
        raise NotImplementedError

    def owner_left(self, owner: str, life: int, now: float) -> None:
        """This life (and earlier ones) left by own wish: owned and ephemeral entries go and do not come back."""
        raise NotImplementedError

    def owner_restarted(self, owner: str, life: int, now: float) -> None:
        """A newer life was seen: earlier entries go after the namespace's grace unless it lists them again."""
        raise NotImplementedError

    def owner_forgotten(self, owner: str, now: float) -> None:
        """Membership dropped the last trace of this name: drop all rows of it, whatever the rule (not counters)."""
        raise NotImplementedError

    def receive(self, peer: str, frame: Frame, now: float) -> None:
        """Take a frame of `STATE_TYPES` from a connected peer. Raises DecodeError (nothing changed) for garbage.
        Frames of unknown peers and unknown state types are counted and change nothing."""
        raise NotImplementedError

    # What the shell asks.

    def tick(self, now: float) -> None:
        """Do what is due: flush coalesced changes, expire, refresh, start anti-entropy, collect tombstones."""
        raise NotImplementedError

    def deadline(self) -> float:
        """When `tick` is due next (not later than now if a change wants to go out at once); inf if never."""
        raise NotImplementedError

    def peers_to_send(self) -> list[str]:
        """Connected peers for whom `frames_to_send` has something (or will at the deadline, for paced snapshots)."""
        raise NotImplementedError

    def frames_to_send(self, peer: str, now: float, bytes_max: int = 256 * 1024) -> list[Frame]:
        """Frames for this peer, about `bytes_max` at most; call again when they are written. Unsent changes of one
        key are one entry, the newest; nothing is queued per change, so a slow peer costs no memory."""
        raise NotImplementedError

    def next_change(self) -> Change | None:
        """The next thing the user should know, in order; None if there is none. Own writes are not repeated."""
        raise NotImplementedError

    def digest(self, namespace: str | None = None) -> int:
        """64 bits over what is visible in one namespace, or in all: equal digests mean equal state."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """Counters and sizes for metrics: `<namespace>.entries`, `<namespace>.bytes`, `refused_stamps`, ..."""
        raise NotImplementedError
