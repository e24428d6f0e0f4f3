"""Tokens of an identity provider: may this JWT open an admin route, and with which role (SEC-6)?

Owns the reading of key sets, headers and claims, with joserfc for the signatures. Keys and time are handed in. The room is
strict where tokens are forged: a signature is checked only with an algorithm that the key itself allows, never with
one that the token chooses; secrets (`oct`) are no keys here; a header that asks for extensions is refused. Fetching keys
is `services/key_sets`. Reasons are for the log of the operator: a caller learns nothing but 401.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import Any

import msgspec

from smg.settings_access import ADMIN_ROLE, USER_ROLE
from smg.tenancy.keys import Principal

TOKEN_BYTES_MAX = 16 << 10
"""Longest token: those of large directories, with hundreds of groups, have some 8 KiB."""
HEADER_BYTES_MAX = 4096
"""Longest header of a token, encoded; room for a certificate thumbprint, not for a chain of certificates."""
KEYS_MAX = 64
"""Most keys of one set: providers have two or three."""
LEEWAY_S = 30.0
"""How far the clocks of provider and gateway may be apart (SEC-6)."""
RSA_BITS_MIN = 2048
"""Shorter RSA keys can be broken (NIST SP 800-131A)."""
OTHER_ROLE_CLAIMS = ("role", "roles", "groups", "group")
"""Claims that may name a role, after the configured one, in this order (SEC-6)."""
SUBJECT_CHARS_MAX = 128
"""What is logged of a subject."""

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384")
"""The accepted algorithms (SEC-6)."""
_OF_KEY_TYPE = {"RSA": ("RS256", "RS384", "RS512"), "P-256": ("ES256",), "P-384": ("ES384",)}

KeySet = Mapping[tuple[str, str], Any]
"""(kid, algorithm) to the key that verifies it."""


class TokenRefused(Exception):
    """The token opens nothing; `reason` is a short fixed text for the log. Nothing changed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadKeySet(ValueError):
    """The document is no set of keys that can be used."""


class TokenRules(msgspec.Struct, frozen=True):
    """What a token must say: who made it, for whom, and which names mean which role."""

    issuer: str
    audience: str
    role_claim: str = "roles"
    role_of_name: Mapping[str, str] = {}


class TokenHead(msgspec.Struct, frozen=True):
    """The unverified header of a token: which key to look for."""

    kid: str
    algorithm: str


def load_library() -> None:
    """Imports what signatures are checked with: some 100 ms, which no request should pay for."""
    from joserfc import errors, jwk, jws

    assert errors and jwk and jws


def is_token(value: bytes) -> bool:
    """Whether a credential has the three parts of a JWT: then it is one, and has no second chance as a key (SEC-6)."""
    return value.count(b".") == 2


def key_set(document: Any) -> KeySet:
    """The usable keys of a JWKS document; those of other kinds or for other uses are left out.

    Raises BadKeySet when it is no JWKS or has too many keys.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise BadKeySet("has no list of keys")
    if len(entries) > KEYS_MAX:
        raise BadKeySet(f"has more than {KEYS_MAX} keys")
    found: dict[tuple[str, str], Any] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        kid = entry.get("kid")
        if not isinstance(kid, str) or not kid or entry.get("use", "sig") != "sig":
            continue
        algorithms = _algorithms_of(entry)
        key = _key_of(entry) if algorithms else None
        for algorithm in algorithms if key is not None else ():
            # Two keys under one name and algorithm cannot be told apart: the first one stands.
            found.setdefault((kid, algorithm), key)
    return found


def head_of(token: bytes) -> TokenHead:
    """The kid and algorithm that a token names. Raises TokenRefused."""
    if len(token) > TOKEN_BYTES_MAX:
        raise TokenRefused("too long")
    head = token.partition(b".")[0]
    if len(head) > HEADER_BYTES_MAX:
        raise TokenRefused("header too long")
    header = _decoded(head)
    if header is None:
        raise TokenRefused("malformed header")
    algorithm, kid = header.get("alg"), header.get("kid")
    if algorithm not in ALGORITHMS:
        raise TokenRefused("algorithm not accepted")
    if not isinstance(kid, str) or not kid:
        raise TokenRefused("no kid")
    if "crit" in header:
        raise TokenRefused("header asks for extensions")
    return TokenHead(kid, algorithm)


def principal_of(token: bytes, head: TokenHead, keys: KeySet, rules: TokenRules, now: float) -> Principal:
    """Who a token speaks for, its signature and claims checked; `now` in seconds since 1970. Raises TokenRefused."""
    key = keys.get((head.kid, head.algorithm))
    if key is None:
        is_known = any(kid == head.kid for kid, _ in keys)
        raise TokenRefused("algorithm is not the key's" if is_known else "unknown kid")
    claims = _verified(token, head.algorithm, key)
    if claims.get("iss") != rules.issuer:
        raise TokenRefused("wrong issuer")
    audience = claims.get("aud")
    if rules.audience not in (audience if isinstance(audience, list) else [audience]):
        raise TokenRefused("wrong audience")
    expires_s = _time(claims, "exp")
    if expires_s is None:
        raise TokenRefused("no expiry")
    if now > expires_s + LEEWAY_S:
        raise TokenRefused("expired")
    for claim in ("nbf", "iat"):
        begins_s = _time(claims, claim)
        if begins_s is not None and now < begins_s - LEEWAY_S:
            raise TokenRefused("not valid yet")
    return Principal(f"token:{_subject(claims)}", "token", _role(claims, rules))


def is_addressed_to_us(token: bytes, rules: TokenRules) -> bool:
    """Whether a token, verified or not, says it is for this gateway: then it is a credential of ours (UP-6)."""
    if len(token) > TOKEN_BYTES_MAX or not is_token(token):
        return False
    claims = _decoded(token.split(b".")[1])
    if claims is None or claims.get("iss") != rules.issuer:
        return False
    audience = claims.get("aud")
    return rules.audience in (audience if isinstance(audience, list) else [audience])


def _algorithms_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """What a key may verify: the algorithm it names, else all of its kind."""
    kind = entry.get("kty")
    possible = _OF_KEY_TYPE.get(str(entry.get("crv") if kind == "EC" else kind), ())
    named = entry.get("alg")
    if named is None:
        return possible
    return (named,) if named in possible else ()


def _key_of(entry: dict[str, Any]) -> Any:
    """The key of joserfc for a JWK's public part, or None when it cannot be used."""
    from joserfc.errors import JoseError
    from joserfc.jwk import ECKey, RSAKey

    public: dict[str, Any] = {
        name: entry[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in entry
    }
    try:
        if public["kty"] == "EC":
            return ECKey.import_key(public)
        if len(str(public["n"])) * 6 < RSA_BITS_MIN:
            return None
        key = RSAKey.import_key(public)
        return key if key.public_key.key_size >= RSA_BITS_MIN else None
    except (JoseError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _verified(token: bytes, algorithm: str, key: Any) -> dict[str, Any]:
    """The claims under a good signature. Raises TokenRefused."""
    from joserfc import jws
    from joserfc.errors import JoseError

    registry = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    registry.max_header_length = HEADER_BYTES_MAX
    try:
        payload = jws.deserialize_compact(token, key, registry=registry).payload
    except (JoseError, ValueError, TypeError, UnicodeError, RecursionError):
        raise TokenRefused("bad signature") from None
    claims = _parsed(payload)
    if claims is None:
        raise TokenRefused("malformed claims")
    return claims


def _decoded(part: bytes) -> dict[str, Any] | None:
    try:
        return _parsed(urlsafe_b64decode(part + b"=" * (-len(part) % 4)))
    except (binascii.Error, ValueError):
        return None


def _parsed(text: bytes | None) -> dict[str, Any] | None:
    try:
        document = msgspec.json.decode(text or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _time(claims: dict[str, Any], claim: str) -> float | None:
    """A claim's seconds since 1970, None without it. Raises TokenRefused."""
    value = claims.get(claim)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenRefused("malformed time")
    return value


def _subject(claims: dict[str, Any]) -> str:
    for claim in ("sub", "client_id", "azp"):
        value = claims.get(claim)
        if isinstance(value, str) and value:
            return value[:SUBJECT_CHARS_MAX]
    return "unnamed"


def _role(claims: dict[str, Any], rules: TokenRules) -> str:
    """The role that the first claim with a known name gives; in one claim the highest counts."""
    known = rules.role_of_name or {ADMIN_ROLE: ADMIN_ROLE, USER_ROLE: USER_ROLE}
    for claim in (rules.role_claim, *OTHER_ROLE_CLAIMS):
        value = claims.get(claim)
        if value is None and "." in claim:
            value = _inside(claims, claim.split("."))
        names = value if isinstance(value, list) else [value]
        roles = {known[name] for name in names if isinstance(name, str) and name in known}
        if roles:
            return ADMIN_ROLE if ADMIN_ROLE in roles else USER_ROLE
    return USER_ROLE


def _inside(claims: Any, path: list[str]) -> Any:
    for name in path:
        claims = claims.get(name) if isinstance(claims, dict) else None
    return claims
