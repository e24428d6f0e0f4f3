"""SEC-1 to SEC-6, SEC-9, UP-6, ADM-5: who may call, who pays, and what stays here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from smg.errors import GatewayError
from smg.gateway.gates import Cors, Gates, Tenants, Tokens, authorise
from smg.settings import Auth
from smg.tenancy.claims import KeySet, TokenRefused, TokenRules
from smg.tenancy.keys import ANYBODY, SHARED, KeyRing, Principal, keys_of
from smg.wire.http1 import RequestHead

KEY = "gateway-key-canary"
TENANTS = ("red:red-key", "blue:blue-key", "blue:blue-key-2")
CONTROL = ("ops:Operators:admin:ops-key", "eye:Viewers:user:eye-key")
DATA_REALM = (("www-authenticate", 'Bearer realm="data-plane"'),)
CONTROL_REALM = (("www-authenticate", 'Bearer realm="control-plane"'),)
Headers = list[tuple[bytes, bytes]]


def gates_of(auth: Auth, tokens: Tokens | None = None, salt: bytes = b"salt") -> Gates:
    return Gates(KeyRing(salt, *keys_of(auth)), tokens)


def bearer(value: str) -> Headers:
    return [(b"authorization", b"Bearer " + value.encode())]


def refused(gates: Gates, headers: Headers) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        gates.serving(headers)
    return caught.value


async def refused_admin(gates: Gates, headers: Headers) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await gates.admin(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    return caught.value


async def test_sec_1_without_keys_every_gate_is_open() -> None:
    gates = Gates()
    for headers in ([], bearer("anything")):
        assert gates.serving(headers) is None
        assert await gates.admin(headers) is ANYBODY
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
async def test_sec_2_accepted_forms(header: tuple[bytes, bytes]) -> None:
    gates = gates_of(Auth(api_key=KEY))
    for principal in (gates.serving([header]), await gates.admin([header])):
        assert principal is not None and principal.name == SHARED


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"gateway-key-canary")],
        [(b"authorization", b"Basic gateway-key-canary")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"wrong")],
        [(b"x-api-key", b"Bearer gateway-key-canary")],
        [(b"x-api-key", b"gateway-key-canary"), (b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer gateway-key-canary"), (b"x-api-key", b"wrong")],
        [(b"x-api-key", b"gateway-key-canary"), (b"x-api-key", b"wrong")],
        [(b"x-key", b"gateway-key-canary")],
        [(b"authorization", b"Bearer gateway-key-canar")],
        [(b"authorization", b"Bearer \xff")],
        [(b"authorization", b"Bearer " + b"x" * 100_000)],
    ],
)
async def test_sec_2_err_7_a_wrong_or_missing_key_is_401(headers: Headers) -> None:
    gates = gates_of(Auth(api_key=KEY))
    for error in (refused(gates, headers), await refused_admin(gates, headers)):
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert error.headers == DATA_REALM
        assert "canary" not in error.message


def test_sec_2_two_keys_of_different_owners_are_one_too_many() -> None:
    gates = gates_of(Auth(tenant_api_key=TENANTS))
    assert refused(gates, [*bearer("red-key"), (b"x-api-key", b"blue-key")]).status == 401
    both = gates.serving([*bearer("blue-key"), (b"x-api-key", b"blue-key-2")])
    assert both is not None and both.name == "auth:blue"


@pytest.mark.parametrize("query", [b"api_key=red-key", b"a=1&b=%72ed-key", b"red-key", b"t=Bearer%20red-key"])
def test_a_key_in_the_query_is_refused_even_beside_a_right_one(query: bytes) -> None:
    gates = gates_of(Auth(tenant_api_key=TENANTS))
    with pytest.raises(GatewayError):
        gates.serving(bearer("red-key"), query)
    assert gates.serving(bearer("red-key"), b"a=1&b=red&c") is not None


async def test_sec_4_tenant_keys_open_serving_and_never_admin() -> None:
    gates = gates_of(Auth(api_key=KEY, tenant_api_key=TENANTS))
    for key, tenant in (("red-key", "auth:red"), ("blue-key", "auth:blue"), ("blue-key-2", "auth:blue")):
        assert gates.serving(bearer(key)) == Principal(tenant, "tenant_key")
        await refused_admin(gates, bearer(key))
    assert (await gates.admin(bearer(KEY))).role == "admin"


async def test_sec_4_with_tenant_keys_only_admin_is_closed_to_everyone() -> None:
    gates = gates_of(Auth(tenant_api_key=TENANTS))
    await refused_admin(gates, [])
    await refused_admin(gates, bearer("red-key"))


async def test_sec_5_control_keys_open_admin_and_nothing_else() -> None:
    gates = gates_of(Auth(api_key=KEY, control_plane_api_keys=CONTROL))
    assert await gates.admin(bearer("ops-key")) == Principal("key:ops", "control_key", "admin")
    assert await gates.admin(bearer("eye-key")) == Principal("key:eye", "control_key", "user")
    for headers in ([], bearer(KEY), bearer("wrong")):
        assert (await refused_admin(gates, headers)).headers == CONTROL_REALM
    for key in ("ops-key", "eye-key"):
        assert refused(gates, bearer(key)).headers == DATA_REALM


async def test_sec_5_control_keys_alone_leave_serving_open() -> None:
    gates = gates_of(Auth(control_plane_api_keys=CONTROL))
    assert gates.is_serving_open and gates.serving(bearer("ops-key")) is None
    assert gates.is_secret is not None and gates.is_secret(b"ops-key")
    await refused_admin(gates, [])


@pytest.mark.parametrize(
    ("role", "method", "may"),
    [
        ("admin", "DELETE", True),
        ("user", "GET", True),
        ("user", "HEAD", True),
        ("user", "POST", False),
        ("user", "PATCH", False),
        ("user", "DELETE", False),
        ("", "GET", False),
    ],
)
def test_sec_5_err_8_roles(role: str, method: str, may: bool) -> None:
    principal = Principal("key:x", "control_key", role)
    if may:
        authorise(principal, method)
        return
    with pytest.raises(GatewayError) as caught:
        authorise(principal, method)
    assert (caught.value.status, caught.value.code) == (403, "forbidden")


class NoProvider:
    async def keys(self, kid: str) -> KeySet:
        return {}


async def test_sec_6_a_three_part_token_has_no_second_chance_as_a_key() -> None:
    tokens = Tokens(TokenRules("https://idp", "smg"), NoProvider())
    auth = Auth(control_plane_api_keys=("dots:Dots:admin:a.b.c", *CONTROL))
    gates = gates_of(auth, tokens)
    error = await refused_admin(gates, bearer("a.b.c"))
    assert error.headers == CONTROL_REALM
    assert isinstance(error.__cause__, TokenRefused) and "header" in error.__cause__.reason
    assert (await gates.admin(bearer("ops-key"))).name == "key:ops"
    assert (await gates_of(auth).admin(bearer("a.b.c"))).name == "key:dots"


def test_sec_3_up_6_keys_are_known_in_every_form_and_other_values_are_not() -> None:
    gates = gates_of(Auth(api_key=KEY, tenant_api_key=TENANTS, control_plane_api_keys=CONTROL))
    is_secret = gates.is_secret
    assert is_secret is not None
    for value in (KEY.encode(), b"Bearer " + KEY.encode(), b"bearer   red-key", b"blue-key", b"eye-key"):
        assert is_secret(value)
    for value in (b"", b"Bearer ", b"wrong", b"gateway-key-canarY", b"Bearer other", b"\xff"):
        assert not is_secret(value)


def test_sec_3_a_key_that_was_replaced_stays_a_secret() -> None:
    gates = gates_of(Auth(api_key=KEY, tenant_api_key=TENANTS))
    is_secret = gates.is_secret
    assert is_secret is not None
    gates.renew(gates.keys.successor(*keys_of(Auth(api_key="another", tenant_api_key=("red:red-key",)))))
    for value in (KEY.encode(), b"Bearer " + KEY.encode(), b"blue-key", b"another", b"red-key"):
        assert is_secret(value)
    assert refused(gates, bearer(KEY)).status == 401
    assert gates.serving(bearer("another")) is not None


async def test_two_gates_with_other_salts_agree() -> None:
    for salt in (b"a", b"b"):
        assert gates_of(Auth(api_key=KEY), salt=salt).serving(bearer(KEY)) is not None


def test_wrk_14_a_gate_keeps_digests_and_no_key() -> None:
    gates = gates_of(Auth(api_key=KEY, tenant_api_key=TENANTS, control_plane_api_keys=CONTROL))
    kept = repr([getattr(gates, name) for name in Gates.__slots__]) + repr(gates)
    kept += repr([getattr(gates.keys, name) for name in KeyRing.__slots__])
    for key in (KEY, "red-key", "blue-key", "ops-key", "eye-key"):
        assert key not in kept


def asking(
    *headers: tuple[bytes, bytes], principal: Principal | None = None, peer: str = "10.0.0.9"
) -> object:
    head = RequestHead(b"POST", b"/", list(headers), False)
    head.principal = principal
    return SimpleNamespace(head=head, peer=peer)


@pytest.mark.parametrize(
    ("exchange", "tenant"),
    [
        (asking(), "ip:10.0.0.9"),
        (asking((b"x-tenant", b"acme")), "header:acme"),
        (asking((b"x-tenant", b"acme"), principal=Principal("auth:red", "tenant_key")), "auth:red"),
        (asking(principal=Principal(SHARED, "api_key", "admin")), "auth:shared"),
        (asking((b"x-tenant", b"")), "ip:10.0.0.9"),
        (asking((b"x-tenant", b"a b")), "ip:10.0.0.9"),
        (asking((b"x-tenant", b"\xff")), "ip:10.0.0.9"),
        (asking((b"x-tenant", b"x" * 129)), "ip:10.0.0.9"),
        (asking((b"x-tenant", b"acme"), (b"x-tenant", b"evil")), "ip:10.0.0.9"),
    ],
)
def test_adm_5_tenants(exchange: object, tenant: str) -> None:
    tenants = Tenants("X-Tenant")
    assert tenants.of(exchange) == tenant  # type: ignore[arg-type]
    assert tenants.of(exchange) == tenant  # type: ignore[arg-type]


def test_adm_5_no_header_is_trusted_unless_told() -> None:
    assert Tenants().of(asking((b"x-smg-tenant-id", b"acme"))) == "ip:10.0.0.9"  # type: ignore[arg-type]


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
