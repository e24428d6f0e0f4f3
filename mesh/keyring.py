"""The secrets of a cluster: which keys are held, and the keys derived from them.

Owns key ids, the order of the ring (the first sends, all receive) and the derivations. It must never read a file,
nor show a secret: its repr has ids only.

Derivation is HKDF-SHA256 (RFC 5869): extract once per secret, expand in one block per use. What a key is for is in
the info string, so no two uses share a key.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from mesh.errors import BoundError, SettingsError
from mesh.settings import KEY_IDS_MAX

SECRET_BYTES_MIN = 16
"""Shorter secrets can be guessed; 32 random bytes are advised."""

KEY_ID_BYTES = 4
_EXTRACT_SALT = b"smg mesh v1"


class Key:
    """One secret. Equal secrets have equal ids, so that no number has to be agreed on."""

    __slots__ = ("_root", "id")

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES_MIN:
            raise SettingsError(f"a mesh key has at least {SECRET_BYTES_MIN} bytes")
        self._root = hmac.digest(_EXTRACT_SALT, secret, "sha256")
        self.id = int.from_bytes(self.derive(b"id")[:KEY_ID_BYTES], "big")

    def derive(self, info: bytes) -> bytes:
        """32 bytes for one purpose."""
        return hmac.digest(self._root, info + b"\x01", "sha256")

    def __repr__(self) -> str:
        return f"Key({self.id:08x})"


class Keyring:
    """Keys in order. Immutable: a rotation makes a new ring, so that nobody sees half a change.

    Raises SettingsError for a ring of too many keys (members tell each other at most KEY_IDS_MAX ids).
    """

    __slots__ = ("_by_id", "keys")

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.keys = tuple({key.id: key for key in keys}.values())
        if len(self.keys) > KEY_IDS_MAX:
            raise SettingsError(f"a keyring has at most {KEY_IDS_MAX} keys")
        self._by_id = {key.id: key for key in self.keys}

    @classmethod
    def of(cls, *secrets: bytes) -> Keyring:
        """A ring of these secrets, the first sends."""
        return cls(Key(secret) for secret in secrets)

    @property
    def first(self) -> Key | None:
        """The key that sends."""
        return self.keys[0] if self.keys else None

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids in order, for the member record."""
        return tuple(self._by_id)

    def get(self, key_id: int) -> Key | None:
        """The key of this id."""
        return self._by_id.get(key_id)

    def adding(self, secret: bytes) -> Keyring:
        """Step one of a rotation: receive with this key too."""
        return Keyring((*self.keys, Key(secret)))

    def using(self, key_id: int) -> Keyring:
        """Step two: send with this key. Raises BoundError if it is not held."""
        if key_id not in self._by_id:
            raise BoundError(f"no key {key_id:08x}")
        return Keyring(sorted(self.keys, key=lambda key: key.id != key_id))

    def removing(self, key_id: int) -> Keyring:
        """Step three: forget this key. Raises BoundError for the key that sends and for one that is not held."""
        if key_id not in self._by_id or self.keys[0].id == key_id:
            raise BoundError(f"key {key_id:08x} is not held, or still sends")
        return Keyring(key for key in self.keys if key.id != key_id)

    def __repr__(self) -> str:
        return f"Keyring({list(self.keys)})"
