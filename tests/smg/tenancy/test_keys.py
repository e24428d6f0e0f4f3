"""The ring of keys: who holds one, what a reload changes, and that no key is kept or shown."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smg.tenancy.keys as room
from smg.settings import Auth
from smg.tenancy.keys import KEY_BYTES_MAX, RETIRED_MAX, SHARED, KeyRing, Principal, keys_of

SALT = b"s" * 32
RED = Principal("auth:red", "tenant_key")
OPS = Principal("key:ops", "control_key", "admin")
KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


def ring(serving: dict[str, Principal], control: dict[str, Principal] | None = None) -> KeyRing:
    return KeyRing(SALT, serving.items(), (control or {}).items())


@given(
    st.dictionaries(
        KEYS, st.sampled_from("abc").map(lambda name: Principal(f"auth:{name}", "tenant_key")), max_size=8
    ),
    KEYS,
)
def test_a_ring_answers_as_a_dictionary_of_keys_would(keys: dict[str, Principal], other: str) -> None:
    made = ring(keys)
    for key in (*keys, other, f"{other} ", other[:-1]):
        assert made.serving(key.encode()) == keys.get(key)
        assert (
            made.is_secret(key.encode()) is made.is_secret(b"bearer " + key.strip().encode())
            or key != key.strip()
        )
        assert made.control(key.encode()) is None


def test_the_two_planes_do_not_mix() -> None:
    made = ring({"one": RED}, {"two": OPS})
    assert made.serving(b"one") is RED and made.control(b"two") is OPS
    assert made.serving(b"two") is None and made.control(b"one") is None
    assert made.is_secret(b"one") and made.is_secret(b"Bearer two")


def test_keys_are_compared_by_digests_in_constant_time_and_only_so(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(room, "compare_digest", watched)
    made = ring({"right-key": RED})
    assert made.serving(b"right-key") is RED
    assert made.serving(b"wrong-key") is None
    assert len(compared) == 1, "a wrong key meets no stored digest at all"
    assert all(len(a) == len(b) == 32 and b"key" not in a + b for a, b in compared)


def test_a_value_too_long_for_a_key_is_not_even_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ring({"key": RED})
    monkeypatch.setattr(KeyRing, "_digest", lambda self, value: pytest.fail("hashed"))
    assert made.serving(b"x" * (KEY_BYTES_MAX + 1)) is None
    assert not made.is_secret(b"x" * (KEY_BYTES_MAX + 1))


def test_unicode_and_bytes_that_are_no_text_are_just_wrong() -> None:
    made = ring({"key": RED})
    for value in ("kéy".encode(), "ｋｅｙ".encode(), b"\xff\x00\xfe", b"k\x00ey", "key\u200b".encode(), b""):
        assert made.serving(value) is None and not made.is_secret(value)


def test_what_a_reload_changes_is_told_without_keys() -> None:
    before = KeyRing(
        SALT,
        *keys_of(
            Auth(api_key="k1", tenant_api_key=("red:k2", "blue:k3"), control_plane_api_keys=("o:n:admin:k4",))
        ),
    )
    after = before.successor(
        *keys_of(
            Auth(
                api_key="k9",
                tenant_api_key=("red:k2", "green:k3", "blue:k5"),
                control_plane_api_keys=("o:n:user:k4",),
            )
        )
    )
    assert before.changes_to(after) == [
        "auth:blue: a key was added",
        "auth:blue: its key belongs to auth:green",
        "auth:shared: a key was added",
        "auth:shared: a key was removed",
        "key:o admin: its key belongs to key:o user",
    ]
    assert (
        before.changes_to(
            before.successor(
                *keys_of(
                    Auth(
                        api_key="k1",
                        tenant_api_key=("red:k2", "blue:k3"),
                        control_plane_api_keys=("o:n:admin:k4",),
                    )
                )
            )
        )
        == []
    )


def test_a_key_that_comes_back_is_a_key_again_and_one_that_went_a_secret() -> None:
    first = ring({"a": RED, "b": RED})
    second = first.successor({"b": RED}.items(), ())
    third = second.successor({"a": RED, "c": RED}.items(), ())
    assert second.serving(b"a") is None and second.is_secret(b"a") and second.is_secret(b"Bearer a")
    assert third.serving(b"a") is RED and third.is_secret(b"b") and third.serving(b"b") is None


def test_the_memory_of_old_keys_is_bounded() -> None:
    made = ring({"key-0": RED})
    old = {f"old-{number:05}": RED for number in range(RETIRED_MAX)}
    made = made.successor(old.items(), ()).successor({"last": RED}.items(), ())
    assert len(made._retired) == RETIRED_MAX
    assert not made.is_secret(b"key-0") and made.is_secret(b"old-04095")


def test_principals_of_the_settings() -> None:
    serving, control = keys_of(
        Auth(api_key="k", tenant_api_key=("red:a:b",), control_plane_api_keys=("ci:Build:USER:x:y",))
    )
    assert ("a:b", Principal("auth:red", "tenant_key")) in serving
    assert ("k", Principal(SHARED, "api_key", "admin")) in serving
    assert control == [("x:y", Principal("key:ci", "control_key", "user"))]
