"""Routing keys that hold on every node (contract RT-6, MSH-6).

Owns the namespace `sticky` (last writer wins): model, leg and the key's 64-bit position → the worker it is on and when it was
used last. Policies ask it for keys they do not know and are told of keys that moved elsewhere. Keys that nobody uses are
forgotten by the first live node; it must never hold the text of a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import xxhash

from mesh import BoundError, Change, Lost, Put, Removed, State
from smg.bridge import words
from smg.bridge.words import VERSION, StickyKey
from smg.fleet.worker import Kind, Worker

STICKY = "sticky"
USES_PER_IDLE = 8
"""A key in use is told again this often within the time after which it would be forgotten."""
REFRESH_MIN_S = 1.0
"""... but not more often than this, however short that time is."""
LOOKS_PER_IDLE = 32
BYTES_MAX = 32 * 1024 * 1024
"""About 130,000 keys with what the mesh keeps beside each; as many as a model's own map holds."""


@runtime_checkable
class HearsKeys(Protocol):
    """A policy that remembers keys."""

    def heard_key(self, position: int, worker: Worker, now: float) -> None:
        """Another node has put this key onto `worker`."""
        ...


class SharedKeys:
    """See the module. `policy_of` gives the policy of a model and leg if there is one; `models` are the names served."""

    def __init__(
        self,
        state: State,
        *,
        name: str,
        idle_max_s: float,
        wall: Callable[[], float],
        worker_of: Callable[[bytes], Worker | None],
        policy_of: Callable[[str, Kind], object | None],
        models: Callable[[], tuple[str, ...]],
        is_first: Callable[[], bool],
    ) -> None:
        self._state = state
        self._name = name
        self._idle_max_s = idle_max_s
        self._wall = wall
        self._worker_of = worker_of
        self._policy_of = policy_of
        self._models = models
        self._is_first = is_first
        self._scopes: dict[bytes, tuple[str, Kind]] = {}
        self._due_s = 0.0
        self.garbage = 0
        self.refused = 0
        """Keys that the mesh had no room for."""

    def of(self, model: str, kind: Kind) -> KeysOf:
        """The keys of one model and leg, for its policy."""
        return KeysOf(self, model, kind)

    def find(self, key: bytes) -> str | None:
        """The id of the worker that a key is on; None when nobody knows it, or it was idle for too long."""
        word = self._read(self._state.get(STICKY, key))
        if word is None or word.used_s + self._idle_max_s < self._wall():
            return None
        worker = self._worker_of(word.ref)
        return None if worker is None else worker.id

    def put(self, key: bytes, worker_id: str) -> None:
        """A key is on a worker; told if that is new, or not told for long."""
        ref, wall_s = words.worker_ref(worker_id), self._wall()
        known = self._read(self._state.get(STICKY, key))
        pause_s = max(self._idle_max_s / USES_PER_IDLE, REFRESH_MIN_S)
        if known is not None and known.ref == ref and wall_s - known.used_s < pause_s:
            return
        try:
            self._state.put(STICKY, key, words.encode(StickyKey(VERSION, ref, wall_s)))
        except BoundError:
            self.refused += 1

    def on_change(self, change: Change, now: float) -> None:
        """Another node has put or forgotten a key."""
        if isinstance(change, Put):
            word = self._read(change.value)
            scope = self._scope(change.key)
            worker = None if word is None else self._worker_of(word.ref)
            if worker is None or scope is None:
                return
            policy = self._policy_of(*scope)
            if isinstance(policy, HearsKeys):
                policy.heard_key(int.from_bytes(change.key[-8:], "big"), worker, now)
        elif isinstance(change, Lost):
            for owner, key, value in list(self._state.items(STICKY)):
                if owner != self._name:
                    self.on_change(Put(STICKY, owner, key, value), now)
        elif not isinstance(change, Removed):
            self.garbage += 1

    def refresh(self, now: float) -> None:
        """Forget keys that nobody used for long; one node does it for all."""
        if now < self._due_s:
            return
        self._due_s = now + max(self._idle_max_s / LOOKS_PER_IDLE, REFRESH_MIN_S)
        if not self._is_first():
            return
        wall_s = self._wall()
        idle = [
            key
            for _, key, value in self._state.items(STICKY)
            if (word := self._read(value)) is None or word.used_s + 2 * self._idle_max_s < wall_s
        ]
        for key in idle:
            self._state.remove(STICKY, key)

    def _read(self, value: bytes | None) -> StickyKey | None:
        if value is None:
            return None
        word = words.read_sticky_key(value)
        if word is None:
            self.garbage += 1
        return word

    def _scope(self, key: bytes) -> tuple[str, Kind] | None:
        scope = self._scopes.get(key[:-8])
        if scope is None:
            self._scopes = {
                scope_of(model, kind): (model, kind) for model in ("", *self._models()) for kind in Kind
            }
            scope = self._scopes.get(key[:-8])
        return scope


class KeysOf:
    """`policies.shared_keys.SharedKeys` of one model and leg."""

    __slots__ = ("_keys", "_scope")

    def __init__(self, keys: SharedKeys, model: str, kind: Kind) -> None:
        self._keys = keys
        self._scope = scope_of(model, kind)

    def worker_of(self, position: int) -> str | None:
        """Where some node says the key is."""
        return self._keys.find(self._scope + position.to_bytes(8, "big"))

    def placed(self, position: int, worker_id: str, now: float) -> None:
        """The key is on this worker now."""
        self._keys.put(self._scope + position.to_bytes(8, "big"), worker_id)


def scope_of(model: str, kind: Kind) -> bytes:
    """The beginning of the keys of a model and leg: 5 bytes."""
    name = model.encode("utf-8", "surrogatepass")
    return xxhash.xxh32_intdigest(name).to_bytes(4, "big") + bytes((list(Kind).index(kind),))
