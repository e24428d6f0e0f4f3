"""Keys of a cluster: ids, order, rotation."""

from __future__ import annotations

import pytest

from mesh.errors import BoundError, SettingsError
from mesh.keyring import Key, Keyring

ONE, TWO, THREE = b"1" * 16, b"2" * 16, b"3" * 16


def test_equal_secrets_have_equal_ids_and_others_do_not() -> None:
    assert Key(ONE).id == Key(ONE).id != Key(TWO).id


def test_keys_for_two_purposes_differ_and_have_32_bytes() -> None:
    assert Key(ONE).derive(b"a") != Key(ONE).derive(b"b")
    assert len(Key(ONE).derive(b"a")) == 32


def test_derivation_is_hkdf_of_rfc_5869() -> None:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    expected = HKDF(SHA256(), 32, b"smg mesh v1", b"info").derive(ONE)
    assert Key(ONE).derive(b"info") == expected


def test_a_secret_is_never_shown() -> None:
    assert "1111" not in repr(Keyring.of(ONE))


def test_the_first_key_sends_and_doubles_count_once() -> None:
    ring = Keyring.of(ONE, TWO, ONE)
    assert ring.ids == (Key(ONE).id, Key(TWO).id)
    assert ring.first is not None and ring.first.id == Key(ONE).id


def test_add_use_remove_leads_from_one_key_to_the_next() -> None:
    ring = Keyring.of(ONE).adding(TWO)
    assert ring.ids == (Key(ONE).id, Key(TWO).id)
    ring = ring.using(Key(TWO).id)
    assert ring.ids == (Key(TWO).id, Key(ONE).id)
    assert ring.removing(Key(ONE).id).ids == (Key(TWO).id,)


def test_the_sending_key_and_unknown_keys_cannot_be_removed_or_used() -> None:
    ring = Keyring.of(ONE, TWO)
    for wrong in (ring.removing, ring.using):
        with pytest.raises(BoundError):
            wrong(Key(THREE).id)
    with pytest.raises(BoundError):
        ring.removing(Key(ONE).id)


def test_short_secrets_and_long_rings_are_refused() -> None:
    with pytest.raises(SettingsError):
        Key(b"short")
    with pytest.raises(SettingsError):
        Keyring.of(*(bytes((i,)) * 16 for i in range(9)))


def test_an_empty_ring_has_no_first() -> None:
    assert Keyring().first is None
