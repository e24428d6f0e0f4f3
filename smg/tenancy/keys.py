"""Who holds a key: gateway keys as digests, and the principals they stand for (SEC-1 to SEC-5, ADM-5).

Owns the ring of all keys of the gateway. A key is known by its digest under a secret of this process, found by a part of
the digest and compared whole in constant time, so neither what is stored nor how long a look-up takes tells anything
of a key. Keys that were taken off the ring go on being secrets: a caller who still sends one must not have it relayed to
a worker. It must never keep a key itself, and never decides what a principal may do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from hmac import compare_digest

import msgspec

from smg.settings_access import ADMIN_ROLE, Auth

BEARER = re.compile(rb"bearer[ \t]+", re.IGNORECASE)
"""The start of a bearer credential; its scheme is accepted in any case (SEC-2)."""

SHARED = "auth:shared"
"""The tenant of callers with `--api-key` (ADM-5)."""

KEY_BYTES_MAX = 8192
"""A longer value is no key of ours: nothing is hashed for it."""

RETIRED_MAX = 4096
"""How many keys that were taken away are remembered as secrets: years of daily changes."""

_SEEK_BYTES = (
    8  # enough that two keys never meet, and a part only, so that the dictionary compares no whole digest
)


class Principal(msgspec.Struct, frozen=True):
    """Who authenticated.

    `name` is the tenant for serving keys (`auth:red`, `auth:shared`), `key:<id>` or `token:<subject>` on the control plane.
    `method` says how: api_key, tenant_key, control_key, token, none. `role` is what it may do on admin routes: admin,
    user, or nothing.
    """

    name: str
    method: str
    role: str = ""


ANYBODY = Principal("anonymous", "none", ADMIN_ROLE)
"""The caller of an admin route that needs no key."""


class KeyRing:
    """Every key of the gateway.

    `serving` and `control` are (key, its principal). `retired` are digests of keys that once were on a ring with the same
    salt. `salt` is random and secret: at most 64 bytes.
    """

    __slots__ = (
        "_control",
        "_lengths",
        "_retired",
        "_salt",
        "_serving",
        "has_control_keys",
        "has_shared_key",
    )

    def __init__(
        self,
        salt: bytes,
        serving: Iterable[tuple[str, Principal]] = (),
        control: Iterable[tuple[str, Principal]] = (),
        retired: dict[bytes, int] | None = None,
    ) -> None:
        self._salt = salt
        lengths: set[int] = set()
        self._serving = self._filed(serving, lengths)
        self._control = self._filed(control, lengths)
        self._retired = retired or {}  # digest -> length of the key, oldest first
        # Lengths first: `is_secret` runs for every header of a new head, and the length of a key is no secret.
        self._lengths = frozenset(lengths | set(self._retired.values()))
        self.has_control_keys = bool(self._control)
        self.has_shared_key = any(entry[1].name == SHARED for entry in self._serving.values())

    @property
    def has_serving_keys(self) -> bool:
        """Whether serving needs a key (SEC-1)."""
        return bool(self._serving)

    def serving(self, value: bytes) -> Principal | None:
        """Whose serving key this is, or None."""
        return self._find(self._serving, value)

    def control(self, value: bytes) -> Principal | None:
        """Whose control-plane key this is, or None."""
        return self._find(self._control, value)

    def is_secret(self, value: bytes) -> bool:
        """Whether a header's value is, or carries as bearer, a key that is or was the gateway's (SEC-3)."""
        if len(value) in self._lengths and self._is_key(value):
            return True
        match = BEARER.match(value)
        return match is not None and self._is_key(value[match.end() :].strip())

    def successor(
        self, serving: Iterable[tuple[str, Principal]], control: Iterable[tuple[str, Principal]]
    ) -> KeyRing:
        """The ring after a reload: these keys, and the memory that those of this ring are secrets."""
        after = KeyRing(self._salt, serving, control)
        retired = dict(self._retired)
        for digest, _, length in (*self._serving.values(), *self._control.values()):
            retired.pop(digest, None)
            retired[digest] = length
        for digest, _, _ in (*after._serving.values(), *after._control.values()):
            retired.pop(digest, None)
        kept = dict(list(retired.items())[-RETIRED_MAX:])
        return KeyRing(self._salt, serving, control, kept)

    def changes_to(self, after: KeyRing) -> list[str]:
        """What is different in another ring with the same salt, in words without keys; sorted."""
        found = []
        for before_keys, after_keys in ((self._serving, after._serving), (self._control, after._control)):
            gone = [entry[1] for seek, entry in before_keys.items() if seek not in after_keys]
            new = [entry[1] for seek, entry in after_keys.items() if seek not in before_keys]
            found += [f"{principal.name}: a key was removed" for principal in gone]
            found += [f"{principal.name}: a key was added" for principal in new]
            for seek, entry in after_keys.items():
                before = before_keys.get(seek)
                if before is not None and before[1] != entry[1]:
                    old = f"{before[1].name} {before[1].role}".strip()
                    found.append(f"{old}: its key belongs to {entry[1].name} {entry[1].role}".strip())
        return sorted(found)

    def _filed(
        self, keys: Iterable[tuple[str, Principal]], lengths: set[int]
    ) -> dict[bytes, tuple[bytes, Principal, int]]:
        filed = {}
        for key, principal in keys:
            value = key.encode("utf-8")
            digest = self._digest(value)
            filed[digest[:_SEEK_BYTES]] = (digest, principal, len(value))
            lengths.add(len(value))
        return filed

    def _find(self, keys: dict[bytes, tuple[bytes, Principal, int]], value: bytes) -> Principal | None:
        if len(value) > KEY_BYTES_MAX:
            return None
        digest = self._digest(value)
        entry = keys.get(digest[:_SEEK_BYTES])
        if entry is None or not compare_digest(entry[0], digest):
            return None
        return entry[1]

    def _is_key(self, value: bytes) -> bool:
        if len(value) not in self._lengths:
            return False
        digest = self._digest(value)
        seek = digest[:_SEEK_BYTES]
        for keys in (self._serving, self._control):
            entry = keys.get(seek)
            if entry is not None and compare_digest(entry[0], digest):
                return True
        return digest in self._retired

    def _digest(self, value: bytes) -> bytes:
        return blake2b(value, key=self._salt, digest_size=32).digest()


def keys_of(auth: Auth) -> tuple[list[tuple[str, Principal]], list[tuple[str, Principal]]]:
    """The serving keys and the control-plane keys of the settings, each with its principal."""
    serving = [(key, Principal(f"auth:{tenant}", "tenant_key")) for tenant, key in auth.tenant_keys()]
    if auth.api_key is not None:
        serving.append((auth.api_key, Principal(SHARED, "api_key", ADMIN_ROLE)))
    control = [
        (each.key, Principal(f"key:{each.id}", "control_key", each.role)) for each in auth.control_keys()
    ]
    return serving, control
