"""SEC-1 to SEC-4, SEC-9, UP-6: who may call, and what stays here."""

from __future__ import annotations

import pytest

from smg.errors import GatewayError
from smg.gateway.gates import ADMIN, OPEN, SERVING, SHARED, Cors, Gates

KEY = "gateway-key-canary"
TENANTS = {"red": "red-key", "blue": "blue-key"}


def refused(gates: Gates, gate: str, *headers: tuple[bytes, bytes]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        gates.check(gate, headers)
    return caught.value


@pytest.mark.parametrize("gate", [OPEN, SERVING, ADMIN])
def test_sec_1_without_keys_every_gate_is_open(gate: str) -> None:
    gates = Gates()
    assert gates.check(gate, []) is None
    assert gates.check(gate, [(b"authorization", b"Bearer anything")]) is None
    assert gates.is_secret is None


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer gateway-key-canary"),
        (b"authorization", b"bearer gateway-key-canary"),
        (b"authorization", b"BEARER  gateway-key-canary "),
        (b"x-api-key", b"gateway-key-canary"),
    ],
)
def test_sec_2_accepted_forms(header: tuple[bytes, bytes]) -> None:
    gates = Gates(KEY)
    assert gates.check(SERVING, [header]) == SHARED
    gates.check(ADMIN, [header])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"gateway-key-canary")],
        [(b"authorization", b"Basic gateway-key-canary")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"")],
        [(b"x-api-key", b"wrong")],
        [(b"x-api-key", b"Bearer gateway-key-canary")],
        [(b"x-api-key", b"gateway-key-canary"), (b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer gateway-key-canary"), (b"x-api-key", b"wrong")],
        [(b"x-api-key", b"gateway-key-canary"), (b"x-api-key", b"wrong")],
        [(b"x-key", b"gateway-key-canary")],
        [(b"authorization", b"Bearer gateway-key-canar")],
        [(b"authorization", b"Bearer \xff")],
    ],
)
def test_sec_2_err_7_a_wrong_or_missing_key_is_401(headers: list[tuple[bytes, bytes]]) -> None:
    for gate in (SERVING, ADMIN):
        error = refused(Gates(KEY), gate, *headers)
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert error.headers == (("www-authenticate", 'Bearer realm="data-plane"'),)
        assert "canary" not in error.message


def test_sec_1_the_open_gate_asks_for_nothing() -> None:
    assert Gates(KEY).check(OPEN, [(b"authorization", b"Bearer wrong")]) is None


def test_sec_4_tenant_keys_open_serving_and_never_admin() -> None:
    gates = Gates(KEY, TENANTS)
    red = (b"authorization", b"Bearer red-key")
    assert gates.check(SERVING, [red]) == "auth:red"
    assert gates.check(SERVING, [(b"x-api-key", b"blue-key")]) == "auth:blue"
    assert refused(gates, ADMIN, red).status == 401
    gates.check(ADMIN, [(b"x-api-key", KEY.encode())])


def test_sec_4_with_tenant_keys_only_admin_is_closed_to_everyone() -> None:
    gates = Gates(None, TENANTS)
    assert refused(gates, ADMIN).status == 401
    assert refused(gates, ADMIN, (b"x-api-key", b"red-key")).status == 401


def test_sec_3_up_6_keys_are_known_in_every_form_and_other_values_are_not() -> None:
    is_secret = Gates(KEY, TENANTS).is_secret
    assert is_secret is not None
    for value in (KEY.encode(), b"Bearer " + KEY.encode(), b"bearer   red-key", b"blue-key"):
        assert is_secret(value)
    for value in (b"", b"Bearer ", b"wrong", b"gateway-key-canarY", b"Bearer other", b"\xff"):
        assert not is_secret(value)


def test_two_gates_with_other_salts_agree() -> None:
    assert Gates(KEY, salt=b"a").check(SERVING, [(b"x-api-key", KEY.encode())]) == SHARED
    assert Gates(KEY, salt=b"b").check(SERVING, [(b"x-api-key", KEY.encode())]) == SHARED


def test_wrk_14_a_gate_keeps_digests_and_no_key() -> None:
    gates = Gates(KEY, TENANTS)
    kept = repr([getattr(gates, name) for name in Gates.__slots__]) + repr(gates)
    for key in (KEY, *TENANTS.values()):
        assert key not in kept


def test_sec_9_a_listed_origin_is_echoed_and_others_are_not() -> None:
    cors = Cors(["https://a.example", "https://b.example"])
    assert dict(cors.lines(b"https://a.example")) == {
        "vary": "Origin",
        "access-control-allow-origin": "https://a.example",
        "access-control-expose-headers": "x-request-id, x-smg-error-code, x-smg-worker-id, retry-after",
    }
    for origin in (b"https://evil.example", b"https://a.example.evil", b"null", None):
        assert cors.lines(origin) == [("vary", "Origin")]
    assert cors.block(None) == b"vary: Origin\r\n"


def test_sec_9_a_star_allows_every_origin_by_echo() -> None:
    assert (
        dict(Cors(["*"]).lines(b"https://any.example"))["access-control-allow-origin"]
        == "https://any.example"
    )
    assert "access-control-allow-origin" not in dict(Cors(["*"]).lines(None))


def test_sec_9_preflights() -> None:
    cors = Cors(["https://a.example"])
    headers = cors.preflight(b"https://a.example", b"POST", b"content-type, X-SMG-Foo,evil\r\n")
    assert headers is not None
    found = dict(headers)
    assert found["access-control-allow-origin"] == "https://a.example"
    assert found["access-control-allow-methods"] == "GET, POST, PUT, PATCH, DELETE, OPTIONS"
    assert found["access-control-max-age"] == "3600"
    allowed = found["access-control-allow-headers"].split(", ")
    assert allowed[:9] == [
        "content-type", "authorization", "x-api-key", "anthropic-version", "anthropic-beta", "traceparent", "tracestate",
        "x-request-id", "x-smg-*",
    ]  # fmt: skip
    assert allowed[9:] == ["x-smg-foo"]


def test_sec_9_what_is_no_allowed_preflight() -> None:
    cors = Cors(["https://a.example"])
    assert cors.preflight(b"https://evil.example", b"POST", None) is None
    assert cors.preflight(b"https://a.example", None, None) is None
    assert cors.preflight(None, b"POST", None) is None
