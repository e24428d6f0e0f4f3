"""SEC-6: which tokens open an admin route, with which role, and that every forgery is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.tenancy.claims import (
    KEYS_MAX,
    LEEWAY_S,
    TOKEN_BYTES_MAX,
    BadKeySet,
    KeySet,
    TokenRefused,
    TokenRules,
    head_of,
    is_addressed_to_us,
    is_token,
    key_set,
    principal_of,
)
from smg.tenancy.keys import Principal
from tests.smg.tenancy.token_maker import Signer, b64, confused_token, none_token, packed

NOW = 1_800_000_000.0
RULES = TokenRules("https://idp.example", "smg")
CLAIMS = {"iss": "https://idp.example", "aud": "smg", "sub": "alice", "exp": int(NOW) + 600}
RSA = Signer("r1")
EC = Signer("e1", "P-256")
EC384 = Signer("e3", "P-384")
KEYS = key_set({"keys": [RSA.jwk(), EC.jwk(), EC384.jwk()]})


def checked(token: str, *, keys: KeySet = KEYS, rules: TokenRules = RULES, now: float = NOW) -> Principal:
    raw = token.encode()
    return principal_of(raw, head_of(raw), keys, rules, now)


def refusal(token: str, **options: Any) -> str:
    with pytest.raises(TokenRefused) as refused:
        checked(token, **options)
    return refused.value.reason


@pytest.mark.parametrize(
    ("signer", "algorithm"),
    [(RSA, "RS256"), (RSA, "RS384"), (RSA, "RS512"), (EC, "ES256"), (EC384, "ES384")],
)
def test_the_five_algorithms_are_accepted(signer: Signer, algorithm: str) -> None:
    assert checked(signer.token(CLAIMS, algorithm)) == Principal("token:alice", "token", "user")


def test_the_algorithm_must_be_the_one_that_the_key_names() -> None:
    keys = key_set({"keys": [RSA.jwk(alg="RS256")]})
    assert checked(RSA.token(CLAIMS, "RS256"), keys=keys).name == "token:alice"
    assert refusal(RSA.token(CLAIMS, "RS512"), keys=keys) == "algorithm is not the key's"
    assert refusal(EC.token(CLAIMS, kid="r1"), keys=keys) == "algorithm is not the key's"


def test_none_and_unsigned_tokens_are_refused() -> None:
    for algorithm in ("none", "None", "NONE", "", "RS256"):
        assert refusal(none_token(CLAIMS, "r1", algorithm)) in ("algorithm not accepted", "bad signature")


def test_a_public_key_is_no_secret_for_hmac() -> None:
    assert refusal(confused_token(CLAIMS, RSA)) == "algorithm not accepted"
    forged = confused_token(CLAIMS, RSA).partition(".")[2]
    head = packed({"alg": "RS256", "kid": "r1"})
    assert refusal(f"{head}.{forged}") == "bad signature"


def test_a_key_in_the_token_is_no_key() -> None:
    own = Signer("mine", name="other")
    for header in ({"jwk": own.jwk()}, {"jku": "https://evil.example/keys"}, {"x5c": ["MII"]}):
        assert refusal(own.token(CLAIMS, kid="r1", **header)) == "bad signature"
        assert refusal(own.token(CLAIMS, **header)) == "unknown kid"


def test_extensions_that_must_be_understood_are_not() -> None:
    assert refusal(RSA.token(CLAIMS, crit=["b64"], b64=False)) == "header asks for extensions"


def test_a_token_without_kid_names_no_key() -> None:
    for kid in (None, "", 7, ["r1"]):
        assert refusal(RSA.token(CLAIMS, kid=kid)) == "no kid"


def test_every_changed_byte_breaks_the_token() -> None:
    token = RSA.token(CLAIMS)
    head, body, signature = token.split(".")
    other = packed({**CLAIMS, "sub": "mallory"})
    assert refusal(f"{head}.{other}.{signature}") == "bad signature"
    assert refusal(f"{head}.{body}.{signature[:-4]}AAAA") == "bad signature"
    assert refusal(f"{head}.{body}.") == "bad signature"
    assert refusal(f"{head}.{body}.{signature}{signature}") == "bad signature"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"iss": "https://idp.example/"}, "wrong issuer"),
        ({"iss": None}, "wrong issuer"),
        ({"iss": ["https://idp.example"]}, "wrong issuer"),
        ({"aud": "other"}, "wrong audience"),
        ({"aud": None}, "wrong audience"),
        ({"aud": ["other", "smg2"]}, "wrong audience"),
        ({"aud": {"smg": 1}}, "wrong audience"),
        ({"exp": None}, "no expiry"),
        ({"exp": "tomorrow"}, "malformed time"),
        ({"exp": True}, "malformed time"),
        ({"exp": NOW - LEEWAY_S - 1}, "expired"),
        ({"nbf": NOW + LEEWAY_S + 1}, "not valid yet"),
        ({"iat": NOW + LEEWAY_S + 1}, "not valid yet"),
    ],
)
def test_claims_that_do_not_fit(changed: dict[str, Any], reason: str) -> None:
    claims = {name: value for name, value in {**CLAIMS, **changed}.items() if value is not None}
    assert refusal(RSA.token(claims)) == reason


def test_clocks_may_be_half_a_minute_apart() -> None:
    assert checked(RSA.token({**CLAIMS, "exp": NOW - LEEWAY_S + 1})).name == "token:alice"
    assert checked(RSA.token({**CLAIMS, "nbf": NOW + LEEWAY_S - 1, "iat": NOW + 29})).name == "token:alice"
    token = RSA.token({**CLAIMS, "exp": NOW})
    assert checked(token, now=NOW + 30) and refusal(token, now=NOW + 31) == "expired"


def test_one_of_several_audiences_is_enough() -> None:
    assert checked(RSA.token({**CLAIMS, "aud": ["other", "smg"]})).name == "token:alice"


@pytest.mark.parametrize("payload", [b"[]", b"7", b"not json", b"", b'{"iss":', b"\xff\xfe"])
def test_a_good_signature_under_no_claims_is_worth_nothing(payload: bytes) -> None:
    text = f"{packed({'alg': 'RS256', 'kid': 'r1'})}.{b64(payload)}"
    assert refusal(f"{text}.{b64(RSA.sign(text.encode(), 'RS256'))}") == "malformed claims"


def test_a_long_token_is_refused_before_it_is_read() -> None:
    assert refusal(RSA.token({**CLAIMS, "groups": "x" * TOKEN_BYTES_MAX})) == "too long"
    assert refusal(RSA.token(CLAIMS, x="y" * 5000)) == "header too long"
    assert checked(RSA.token({**CLAIMS, "groups": ["g" * 40] * 150}, x5t="y" * 1000)).role == "user"


@given(st.binary(max_size=200))
def test_no_bytes_are_a_token_by_accident(noise: bytes) -> None:
    with pytest.raises(TokenRefused):
        principal_of(noise, head_of(noise), KEYS, RULES, NOW)


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_no_three_parts_are_a_token_by_accident(head: str, body: str, signature: str) -> None:
    raw = f"{head}.{body}.{signature}".encode()
    with pytest.raises(TokenRefused):
        principal_of(raw, head_of(raw), KEYS, RULES, NOW)


NESTED = "[" * 5000 + "]" * 5000


def test_deep_nesting_is_refused_and_no_fault() -> None:
    assert refusal(f"{b64(NESTED.encode())[:4000]}.{b64(b'{}')}.x") == "malformed header"
    text = f"{packed({'alg': 'RS256', 'kid': 'r1'})}.{b64(NESTED[2500:7500].encode())}"
    assert refusal(f"{text}.{b64(RSA.sign(text.encode(), 'RS256'))}") == "malformed claims"


def test_sets_leave_out_what_signs_nothing_here() -> None:
    def usable(*keys: dict[str, Any]) -> set[tuple[str, str]]:
        return set(key_set({"keys": list(keys)}))

    all_rsa = {("r1", "RS256"), ("r1", "RS384"), ("r1", "RS512")}
    assert usable(RSA.jwk()) == all_rsa
    assert usable(RSA.jwk(alg="PS256")) == usable(RSA.jwk(use="enc")) == usable(RSA.jwk(alg="ES256")) == set()
    assert usable(Signer("e5", "P-521").jwk()) == set()
    assert usable({"kty": "oct", "kid": "s", "k": "c2VjcmV0"}) == set()
    assert usable({**RSA.jwk(), "kty": "oct", "k": "c2VjcmV0"}) == set()
    assert usable({"kty": "OKP", "kid": "o", "crv": "Ed25519", "x": "AAAA"}) == set()
    assert usable(Signer(None).jwk()) == usable(RSA.jwk(kid="")) == set()
    assert usable(Signer("weak", bits=1024).jwk()) == set()
    broken = [
        RSA.jwk(n="!!"),
        RSA.jwk(n=7),
        RSA.jwk(e=None),
        EC.jwk(x="AAAA"),
        EC.jwk(y=None),
        {"kty": "RSA", "kid": "x"},
    ]
    assert usable(*broken, "nonsense", RSA.jwk()) == all_rsa  # type: ignore[arg-type]


def test_a_private_key_in_a_set_is_used_as_a_public_one() -> None:
    number = RSA.key.private_numbers().d
    keys = key_set({"keys": [RSA.jwk(d=b64(number.to_bytes(256, "big")))]})
    assert checked(RSA.token(CLAIMS), keys=keys).name == "token:alice"


def test_of_two_keys_with_one_name_the_first_stands() -> None:
    other = Signer("r1", name="impostor")
    keys = key_set({"keys": [RSA.jwk(), other.jwk(), EC.jwk(kid="r1")]})
    assert (
        checked(RSA.token(CLAIMS), keys=keys) and refusal(other.token(CLAIMS), keys=keys) == "bad signature"
    )
    assert checked(EC.token(CLAIMS, kid="r1"), keys=keys)


@pytest.mark.parametrize("document", [None, [], {}, {"keys": {}}, {"keys": [{}] * (KEYS_MAX + 1)}])
def test_a_document_that_is_no_key_set(document: Any) -> None:
    with pytest.raises(BadKeySet):
        key_set(document)


MAPPED = TokenRules(
    "https://idp.example", "smg", role_of_name={"Gateway.Admin": "admin", "Gateway.View": "user"}
)
INSIDE = TokenRules("https://idp.example", "smg", role_claim="realm_access.roles")


@pytest.mark.parametrize(
    ("rules", "claims", "role"),
    [
        (RULES, {}, "user"),
        (RULES, {"roles": ["admin"]}, "admin"),
        (RULES, {"roles": "admin"}, "admin"),
        (RULES, {"role": "admin"}, "admin"),
        (RULES, {"groups": ["x", "admin"]}, "admin"),
        (RULES, {"group": "admin"}, "admin"),
        (RULES, {"roles": ["user"], "groups": ["admin"]}, "user"),
        (RULES, {"roles": ["user", "admin"]}, "admin"),
        (RULES, {"roles": ["Admin", "ADMIN", "administrator"]}, "user"),
        (RULES, {"roles": {"admin": True}}, "user"),
        (RULES, {"roles": [["admin"], 1, None]}, "user"),
        (RULES, {"scope": "admin"}, "user"),
        (MAPPED, {"roles": ["Gateway.Admin"]}, "admin"),
        (MAPPED, {"roles": ["Gateway.View"]}, "user"),
        (MAPPED, {"roles": ["admin"]}, "user"),
        (MAPPED, {"roles": ["admin"], "groups": ["Gateway.Admin"]}, "admin"),
        (INSIDE, {"realm_access": {"roles": ["admin"]}}, "admin"),
        (INSIDE, {"realm_access": ["admin"]}, "user"),
        (INSIDE, {"realm_access.roles": "admin"}, "admin"),
    ],
)
def test_roles(rules: TokenRules, claims: dict[str, Any], role: str) -> None:
    assert checked(RSA.token({**CLAIMS, **claims}), rules=rules).role == role


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({"sub": "alice"}, "token:alice"),
        ({"sub": None, "client_id": "ci"}, "token:ci"),
        ({"sub": 7, "azp": "app"}, "token:app"),
        ({"sub": None}, "token:unnamed"),
        ({"sub": "x" * 500}, "token:" + "x" * 128),
    ],
)
def test_who_a_token_speaks_for(claims: dict[str, Any], name: str) -> None:
    assert checked(RSA.token({**CLAIMS, **claims})).name == name


def test_three_parts_make_a_token() -> None:
    assert is_token(b"a.b.c") and is_token(b"..")
    assert not is_token(b"sk-abc") and not is_token(b"a.b") and not is_token(b"a.b.c.d.e")


def test_up_6_tokens_for_this_gateway_are_known_without_a_key() -> None:
    token = RSA.token(CLAIMS).encode()
    assert is_addressed_to_us(token, RULES)
    assert is_addressed_to_us(none_token({**CLAIMS, "aud": ["a", "smg"]}, "x").encode(), RULES)
    for other in (
        RSA.token({**CLAIMS, "aud": "worker"}).encode(),
        RSA.token({**CLAIMS, "iss": "https://other"}).encode(),
        b"a.b.c",
        b"",
        b"..",
        b"sk-key",
        json.dumps(CLAIMS).encode(),
        b"\xff.\xff.\xff",
    ):
        assert not is_addressed_to_us(other, RULES)
