"""Replicated state of one node: namespaces of opaque bytes, each with one merge rule.

Owns the namespaces, what each connected peer is still to be told, and when something is due. It must never wait,
read a clock, log, or know what a value means. The shell (`mesh.agent`) tells it which streams are open and who died
or left, hands it frames, and sends the frames it gives back::

    replica.tick(now)                           # when now >= replica.deadline(), and after each input
    for peer in replica.peers_to_send():        # peers something is waiting for
        for frame in replica.frames_to_send(peer, now):
            write(frame)                        # a peer whose stream is full is not asked: nothing piles up,
                                                # later frames carry only the newest values
    while (change := replica.next_change()) is not None:
        tell(change)                            # handled when next_change is called again

The merge rules are in `lww`, `owned`, `ephemeral`, `counter` and `delta_streams`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from mesh.counter import Counters
from mesh.delta_streams import DeltaStreams
from mesh.ephemeral import Ephemeral
from mesh.errors import DecodeError
from mesh.frames import STATE_TYPES, Frame
from mesh.home import Home, ReplicaSettings
from mesh.link import PLAIN_VECTOR, PUSH_VECTOR, Link
from mesh.lww import LwwMap
from mesh.namespace import Change, Namespace
from mesh.namespace import Counter as CounterNamespace
from mesh.namespace import Ephemeral as EphemeralNamespace
from mesh.namespace import Lww as LwwNamespace
from mesh.namespace import Owned as OwnedNamespace
from mesh.owned import Owned
from mesh.records import Body, Delta, Snap, SnapWant, Sums, Vector, Want, WantKeys, decode_body

__all__ = ["Replica", "ReplicaSettings", "life_above", "life_number"]

Store: TypeAlias = LwwMap | Owned | Ephemeral | Counters | DeltaStreams

OPENING_RETRY_S = 1.0
"""A peer whose vectors have not come this long after the stream opened is sent ours again; the wait doubles."""

OPENING_RETRY_MAX_S = 30.0


def life_number(born_s: int, boot: bytes) -> int:
    """Order number of one life of a member, from its record: lives born later have higher numbers."""
    return (born_s & 0xFFFFFFFF) << 32 | int.from_bytes(boot[:4], "big")


def life_above(incarnation: int) -> int:
    """Order number above those of all lives that membership outranked by this incarnation (seconds << 16 | counter).

    It rises with the incarnation, so that of several lives whose clocks were set back the last one is the latest.
    """
    return ((incarnation >> 16) + 1) << 32 | (incarnation & 0xFFFF) << 16


def _store(namespace: Namespace, home: Home, now: float) -> Store:
    match namespace:
        case LwwNamespace():
            return LwwMap(namespace, home, now)
        case OwnedNamespace():
            return Owned(namespace, home, now)
        case EphemeralNamespace():
            return Ephemeral(namespace, home, now)
        case CounterNamespace():
            return Counters(namespace, home, now)
        case _:
            return DeltaStreams(namespace, home, now)


class Replica:
    """See the module. `now` is one monotonic clock in seconds; wall time = now + `wall_offset_s`.

    Namespaces are declared once, in the order in which their frames get their turn. Asking for a namespace that
    was not declared, or for what its rule does not do, is a bug of the caller (KeyError, AssertionError).
    """

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
        self._home = Home(name, life, rng, settings or ReplicaSettings(), wall_offset_s)
        self._stores: dict[str, Store] = {one.name: _store(one, self._home, now) for one in namespaces}
        assert len(self._stores) == len(namespaces), "two namespaces of one name"
        self._waiting: dict[str, None] = {}
        self._openings: dict[str, tuple[float, float]] = {}
        """peer → (when to send our vectors again, next wait), until all of its vectors have come."""
        self._anti_entropy_due = now + self._interval()

    def _interval(self) -> float:
        # Spread, so that nodes which started together do not ask together for ever.
        return self._home.settings.anti_entropy_interval_s * self._home.rng.uniform(0.75, 1.25)

    @property
    def name(self) -> str:
        """This node's name."""
        return self._home.name

    # ---- what the library's user does -------------------------------------------------------------------

    def put(self, namespace: str, key: bytes, value: bytes, now: float) -> None:
        """Set a key (last writer wins, owned, ephemeral). Raises BoundError when too long or the namespace is full."""
        store = self._stores[namespace]
        assert isinstance(store, LwwMap | Owned | Ephemeral)
        store.write(key, value, now)

    def remove(self, namespace: str, key: bytes, now: float) -> None:
        """Delete a key (own key for owned and ephemeral). Unknown keys: nothing for maps of our own; for
        last writer wins a deletion is left, so that it beats what we have not heard of yet."""
        store = self._stores[namespace]
        assert isinstance(store, LwwMap | Owned | Ephemeral)
        store.write(key, None, now)

    def add(self, namespace: str, key: bytes, amount: int, now: float) -> int:
        """Add to this node's shard of a counter in the current window (negative: take back); the new sum of all
        shards. Raises BoundError when too long or the namespace is full."""
        store = self._stores[namespace]
        assert isinstance(store, Counters)
        return store.add(key, amount, now)

    def append(self, namespace: str, payload: bytes, now: float) -> int:
        """Append a delta to this node's stream; its sequence number. Raises BoundError when too long."""
        store = self._stores[namespace]
        assert isinstance(store, DeltaStreams)
        return store.append(payload, now)

    def get(self, namespace: str, key: bytes, owner: str | None = None) -> bytes | None:
        """The value of a key: for last writer wins of anyone, for owned and ephemeral of `owner` (None: our own)."""
        store = self._stores[namespace]
        if isinstance(store, LwwMap):
            return store.get(key)
        assert isinstance(store, Owned | Ephemeral)
        return store.get(self.name if owner is None else owner, key)

    def items(self, namespace: str, owner: str | None = None) -> Iterator[tuple[str, bytes, bytes]]:
        """(owner, key, value) of a map namespace, of one owner or of all. Do not change the replica meanwhile."""
        store = self._stores[namespace]
        assert isinstance(store, LwwMap | Owned | Ephemeral)
        return store.items(owner)

    def total(self, namespace: str, key: bytes, now: float, window: int | None = None) -> int:
        """Sum of all shards of a counter, in the current window unless one is named."""
        store = self._stores[namespace]
        assert isinstance(store, Counters)
        return store.total(key, store.window(now) if window is None else window)

    def totals(self, namespace: str) -> Iterator[tuple[bytes, int, int]]:
        """(key, window, sum) of all counters of a namespace."""
        store = self._stores[namespace]
        assert isinstance(store, Counters)
        return store.items()

    def window(self, namespace: str, now: float) -> int:
        """Number of the current window of a counter namespace."""
        store = self._stores[namespace]
        assert isinstance(store, Counters)
        return store.window(now)

    def leave(self, now: float) -> None:
        """Delete all our owned and ephemeral entries, because this node is about to leave for good."""
        for store in self._stores.values():
            if isinstance(store, Owned | Ephemeral):
                store.clear_own(now)

    # ---- what the shell tells ---------------------------------------------------------------------------

    def peer_up(self, peer: str, life: int, now: float) -> None:
        """A stream to this peer is open (again: everything sent on the former one counts as lost)."""
        assert peer != self.name
        if peer in self._home.links:
            self.peer_down(peer, now)

        def wake() -> None:
            self._waiting[peer] = None

        self._home.links[peer] = links = {name: Link(peer, wake) for name in self._stores}
        self._openings[peer] = (now + OPENING_RETRY_S, 2 * OPENING_RETRY_S)
        self.owner_restarted(peer, life, now)
        for store in self._stores.values():
            if isinstance(store, DeltaStreams):
                store.peer_up(peer)
        for link in links.values():
            link.send_vector(PLAIN_VECTOR)

    def peer_down(self, peer: str, now: float) -> None:
        """The stream is gone. Says nothing about the peer's health; its entries stay."""
        if self._home.links.pop(peer, None) is None:
            return
        self._openings.pop(peer, None)
        self._waiting.pop(peer, None)
        for store in self._stores.values():
            if not isinstance(store, LwwMap):
                store.peer_down(peer)

    def set_relay(self, is_on: bool) -> None:
        """Pass on what others wrote (clusters where not all pairs are connected). Off: only our own goes out,
        and what was missed is repaired by vectors."""
        self._home.is_relay = is_on

    def set_wall_offset(self, wall_offset_s: float) -> None:
        """Wall time minus `now`, when the shell sees that the wall clock was set."""
        self._home.wall_offset_s = wall_offset_s

    def owner_died(self, owner: str, life: int, now: float) -> None:
        """Membership holds this life dead: its ephemeral entries go at once, all else stays."""
        for store in self._stores.values():
            if not isinstance(store, LwwMap):
                store.owner_died(owner, life, now)

    def owner_left(self, owner: str, life: int, now: float) -> None:
        """This life (and earlier ones) left by own wish: owned and ephemeral entries go and do not come back."""
        for store in self._stores.values():
            if not isinstance(store, LwwMap):
                store.owner_left(owner, life, now)

    def owner_restarted(self, owner: str, life: int, now: float) -> None:
        """A newer life was seen: earlier entries go after the namespace's grace unless it lists them again."""
        for store in self._stores.values():
            if not isinstance(store, LwwMap):
                store.owner_restarted(owner, life, now)

    def own_outranked(self, life: int, now: float) -> None:
        """Membership heard of a life of ours above this one (our clock was set back): go on as that life plus one.

        Counters do not care: every life has a shard of its own, and moving it would count it twice."""
        for store in self._stores.values():
            if not isinstance(store, LwwMap | Counters) and store.life <= life:
                store.outrank(life, now)

    def owner_forgotten(self, owner: str, now: float) -> None:
        """Membership dropped the last trace of this name: drop all rows of it, whatever the rule (not counters)."""
        for store in self._stores.values():
            if not isinstance(store, LwwMap):
                store.owner_forgotten(owner, now)

    def receive(self, peer: str, frame: Frame, now: float) -> None:
        """Take a frame of `STATE_TYPES` from a connected peer. Raises DecodeError (nothing changed) for garbage.
        Frames of unknown peers, types and namespaces are counted and change nothing."""
        if frame.type not in STATE_TYPES:
            raise DecodeError("not a state frame")
        links = self._home.links.get(peer)
        if links is None:
            self._home.count("frames_of_strangers")
            return
        body = decode_body(frame)
        store = None if body is None else self._stores.get(body.namespace)
        if body is None or store is None:
            self._home.count("unknown_frames")
            return
        if not self._dispatch(store, links[body.namespace], body, now):
            self._home.count("mismatched_frames")

    def _dispatch(self, store: Store, link: Link, body: Body, now: float) -> bool:
        """Hand a body to its namespace; False if the rule has no such frame (the peer declares another rule)."""
        match body:
            case Delta():
                store.receive_delta(link, body, now)
            case Vector():
                if body.kind != store.kind:
                    return False
                if link.is_heard and body.flags == 0:
                    # It opens again, so it has not heard us: our own opening came before it listened to this stream.
                    self._openings.setdefault(link.peer, (now + OPENING_RETRY_S, OPENING_RETRY_S))
                self._heard(link)
                store.receive_vector(link, body, now)
            case Want() if not isinstance(store, LwwMap):
                store.receive_want(link, body, now)
            case Sums() if isinstance(store, LwwMap):
                store.receive_sums(link, body, now)
            case WantKeys() if isinstance(store, LwwMap):
                store.receive_want_keys(link, body, now)
            case SnapWant() if isinstance(store, DeltaStreams):
                store.receive_snap_want(link, body, now)
            case Snap() if isinstance(store, DeltaStreams):
                store.receive_snap(link, body, now)
            case _:
                return False
        return True

    def _heard(self, link: Link) -> None:
        if not link.is_heard:
            link.is_heard = True
            link.wake()
            if all(other.is_heard for other in self._home.links[link.peer].values()):
                self._openings.pop(link.peer, None)

    # ---- what the shell asks ----------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Do what is due: flush coalesced changes, expire, refresh, start anti-entropy, collect deletions."""
        for store in self._stores.values():
            if now >= store.deadline():
                store.tick(now)
        for peer, (due, wait) in list(self._openings.items()):
            if now >= due:
                links = self._home.links[peer].values()
                # All heard: the peer asked for it. A pushed vector does not ask again, so no two replicas echo.
                is_asked = all(link.is_heard for link in links)
                if is_asked:
                    del self._openings[peer]
                else:
                    self._openings[peer] = (now + wait, min(2 * wait, OPENING_RETRY_MAX_S))
                for link in links:
                    link.send_vector(PUSH_VECTOR if is_asked else PLAIN_VECTOR)
        if now >= self._anti_entropy_due:
            self._anti_entropy_due = now + self._interval()
            if self._home.links:
                peer = self._home.rng.choice(list(self._home.links))
                for link in self._home.links[peer].values():
                    link.send_vector(PUSH_VECTOR)

    def deadline(self) -> float:
        """When `tick` is due next (not later than now if a change wants to go out at once)."""
        due = self._anti_entropy_due
        for store in self._stores.values():
            store_due = store.deadline()
            if store_due < due:
                due = store_due
        if self._openings:
            due = min(due, min(opening[0] for opening in self._openings.values()))
        return due

    def peers_to_send(self) -> list[str]:
        """Connected peers for whom `frames_to_send` has something."""
        return list(self._waiting)

    def frames_to_send(self, peer: str, now: float, bytes_max: int = 256 * 1024) -> list[Frame]:
        """Frames for this peer, about `bytes_max` at most; call again when they are written. Unsent changes of one
        key are one entry, the newest; nothing is queued per change, so a slow peer costs no memory.

        Namespaces take turns, a frame each, so that a long repair of one does not hold up the others."""
        frames: list[Frame] = []
        links = self._home.links.get(peer)
        if links is None:
            return frames
        # A wake during the calls below means that there is more to say after this call.
        self._waiting.pop(peer, None)
        busy = list(links.items())
        size = 0
        while busy and size < bytes_max:
            still_busy = []
            for item in busy:
                frame = self._stores[item[0]].next_frame(item[1], now)
                if frame is not None:
                    frames.append(frame)
                    size += len(frame.body) + 5
                    still_busy.append(item)
            busy = still_busy
        if busy:
            self._waiting[peer] = None
        return frames

    def next_change(self) -> Change | None:
        """The next thing the user should know, in order; None if there is none. Own writes are not repeated.

        A change counts as handled when this is called again (snapshots and fingerprints rely on it)."""
        return self._home.next_change()

    def digest(self, namespace: str | None = None) -> int:
        """64 bits over what is visible in one namespace, or in all: equal digests mean equal state."""
        if namespace is not None:
            return self._stores[namespace].digest()
        total = 0
        for name, store in self._stores.items():
            total ^= xxh3_64_intdigest(store.digest().to_bytes(8, "big"), xxh3_64_intdigest(name.encode()))
        return total

    def stats(self) -> dict[str, int]:
        """Counters and sizes for metrics: `<namespace>.entries`, `<namespace>.bytes`, `refused_stamps`, ..."""
        found = dict(self._home.counts)
        for name, store in self._stores.items():
            for what, value in store.stats().items():
                found[f"{name}.{what}"] = value
        found["changes_waiting"] = self._home.changes_waiting
        found["peers"] = len(self._home.links)
        return found
