"""Who may call what: serving keys, admin keys, tenants, and the browser origins that are answered (section 15, ADM-5).

Owns the three gates of the route table, the name of the tenant who pays for a request, and CORS. Keys are compared in
`tenancy/keys`, tokens checked in `tenancy/claims`. Never stores or shows a credential, and never forwards one of ours:
`is_secret` tells `wire/headers` what to leave out (SEC-3, UP-6).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol
from urllib.parse import parse_qsl

from smg.errors import GatewayError
from smg.gateway.problem import CONTROL_PLANE_REALM, DATA_PLANE_REALM, forbidden, invalid_api_key
from smg.net.exchange import Exchange
from smg.settings_access import ADMIN_ROLE, USER_ROLE
from smg.tenancy.claims import (
    KeySet,
    TokenRefused,
    TokenRules,
    head_of,
    is_addressed_to_us,
    is_token,
    principal_of,
)
from smg.tenancy.keys import ANYBODY, BEARER, KeyRing, Principal
from smg.wire.headers import Header

OPEN = "open"
SERVING = "serving"
ADMIN = "admin"

READING_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
"""What the role `user` may do on admin routes (SEC-5)."""

_AUTHORIZATION = b"authorization"
_API_KEY = b"x-api-key"
_TENANT = re.compile(rb"[\x21-\x7e]{1,128}")


class KeySource(Protocol):
    """Where the keys of the identity provider come from: `services/key_sets`."""

    async def keys(self, kid: str) -> KeySet:
        """The keys that hold now, asked for anew when `kid` is unknown; empty when there are none."""
        ...


class Tokens:
    """The check of tokens (SEC-6). `clock` gives seconds since 1970."""

    __slots__ = ("_clock", "_rules", "_source")

    def __init__(self, rules: TokenRules, source: KeySource, clock: Callable[[], float] = time.time) -> None:
        self._rules = rules
        self._source = source
        self._clock = clock

    async def principal(self, token: bytes) -> Principal:
        """Who a token speaks for. Waits for the provider's keys at most as long as one fetch. Raises TokenRefused."""
        head = head_of(token)
        keys = await self._source.keys(head.kid)
        return principal_of(token, head, keys, self._rules, self._clock())

    def is_ours(self, value: bytes) -> bool:
        """Whether a header's value is, or carries as bearer, a token made for this gateway."""
        match = BEARER.match(value)
        return is_addressed_to_us(value[match.end() :].strip() if match else value, self._rules)


class Gates:
    """The three gates: `open` lets all pass, `serving` wants a serving key, `admin` an admin key or a token.

    Without any key every gate is open. Admin routes are opened by control-plane keys and tokens; when there are none of
    these, by `--api-key`; when there is none either, but tenant keys, by nobody (SEC-4, SEC-5).
    """

    __slots__ = ("_has_control", "_keys", "_tokens", "is_admin_open", "is_secret", "is_serving_open")

    def __init__(self, keys: KeyRing | None = None, tokens: Tokens | None = None) -> None:
        self._keys = keys if keys is not None else KeyRing(b"")
        self._tokens = tokens
        self._has_control = self._keys.has_control_keys or tokens is not None
        self.is_serving_open = not self._keys.has_serving_keys
        self.is_admin_open = self.is_serving_open and not self._has_control
        self.is_secret: Callable[[bytes], bool] | None = None if self.is_admin_open else self._is_secret
        """Whether a header value is, or carries as bearer, a credential of the gateway; None when there are none."""

    @property
    def keys(self) -> KeyRing:
        """The ring that holds now."""
        return self._keys

    def renew(self, keys: KeyRing) -> None:
        """Takes the keys of a reload, which cannot open or close a gate that was the other before."""
        assert keys.has_serving_keys == self._keys.has_serving_keys
        assert keys.has_control_keys == self._keys.has_control_keys
        self._keys = keys

    def serving(self, headers: Sequence[Header], query: bytes = b"") -> Principal | None:
        """Passes or raises `GatewayError` 401 (ERR-7); whose key it is, None on an open gateway.

        Every credential given must be right and of one owner (SEC-2). A key in the query is none, and 401 even beside a
        right one: the query goes on to the worker as it came (UP-3).
        """
        if self.is_serving_open:
            return None
        if query and self._carries_key(query):
            raise invalid_api_key()
        found: Principal | None = None
        for value, _ in _credentials(headers):
            principal = self._keys.serving(value)
            if principal is None or (found is not None and found != principal):
                raise invalid_api_key()
            found = principal
        if found is None:
            raise invalid_api_key()
        return found

    async def admin(self, headers: Sequence[Header]) -> Principal:
        """Who calls an admin route, or raises `GatewayError` 401, caused by `TokenRefused` when a token was why.

        Waits only for the keys of the identity provider.
        """
        if self.is_admin_open:
            return ANYBODY
        found: Principal | None = None
        for value, is_bearer in _credentials(headers):
            principal = await self._administrator(value, is_bearer)
            if principal is None or (found is not None and found != principal):
                raise self._unknown()
            found = principal
        if found is None:
            raise self._unknown()
        return found

    async def _administrator(self, value: bytes, is_bearer: bool) -> Principal | None:
        if not self._has_control:
            principal = self._keys.serving(value)
            return principal if principal is not None and principal.role == ADMIN_ROLE else None
        if self._tokens is not None and is_bearer and is_token(value):
            try:
                return await self._tokens.principal(value)
            except TokenRefused as refused:
                raise self._unknown() from refused
        return self._keys.control(value)

    def _unknown(self) -> GatewayError:
        return invalid_api_key(CONTROL_PLANE_REALM if self._has_control else DATA_PLANE_REALM)

    def _is_secret(self, value: bytes) -> bool:
        return self._keys.is_secret(value) or (self._tokens is not None and self._tokens.is_ours(value))

    def _carries_key(self, query: bytes) -> bool:
        pairs = parse_qsl(query, keep_blank_values=True)
        return any(self._is_secret(value) or self._is_secret(name) for name, value in pairs)


def authorise(principal: Principal, method: str) -> None:
    """Raises `GatewayError` 403 (ERR-8) when the role is too low for a method on an admin route (SEC-5)."""
    if principal.role == ADMIN_ROLE or (principal.role == USER_ROLE and method in READING_METHODS):
        return
    raise forbidden()


class Tenants:
    """Who pays for a request (ADM-5): `auth:<tenant>`, `auth:shared`, `header:<value>` or `ip:<peer>`.

    `header` is the name of the trusted header, None to trust none.
    """

    __slots__ = ("_header",)

    def __init__(self, header: str | None = None) -> None:
        self._header = None if header is None else header.lower().encode("latin-1")

    def of(self, exchange: Exchange) -> str:
        """The tenant of a request that has passed its gate; worked out once for all that repeat its head."""
        head = exchange.head
        tenant = head.tenant
        if tenant is None:
            tenant = head.tenant = self._of(exchange)
        return tenant

    def _of(self, exchange: Exchange) -> str:
        head = exchange.head
        if isinstance(head.principal, Principal):
            return head.principal.name
        if self._header is not None:
            values = [value for name, value in head.headers if name == self._header]
            # Two values would let a caller add his own to that of the proxy.
            if len(values) == 1 and _TENANT.fullmatch(values[0]):
                return f"header:{values[0].decode('ascii')}"
        return f"ip:{exchange.peer}"


def _credentials(headers: Sequence[Header]) -> Iterator[tuple[bytes, bool]]:
    """Every credential given, and whether it is a bearer; an authorization of another scheme is the empty one."""
    for name, value in headers:
        if name == _AUTHORIZATION:
            match = BEARER.match(value)
            yield (value[match.end() :].strip() if match else b"", True)
        elif name == _API_KEY:
            yield value, False


class Cors:
    """CORS as SEC-9 says; made only when `--cors-allowed-origins` is given."""

    _METHODS = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
    _HEADERS = (
        "content-type",
        "authorization",
        "x-api-key",
        "anthropic-version",
        "anthropic-beta",
        "traceparent",
        "tracestate",
        "x-request-id",
        "x-smg-*",
    )
    _EXPOSED = "x-request-id, x-smg-error-code, x-smg-worker-id, retry-after"
    _MAX_AGE_S = 3600
    _OWN_HEADER = re.compile(rb"x-smg-[a-z0-9-]{1,64}")
    _REQUESTED_MAX = 16  # a browser page of ours asks for three or four

    __slots__ = ("_allows_all", "_origins")

    def __init__(self, allowed_origins: Sequence[str]) -> None:
        self._allows_all = "*" in allowed_origins
        self._origins = frozenset(origin.encode("latin-1") for origin in allowed_origins)

    def lines(self, origin: bytes | None) -> list[tuple[str, str]]:
        """The headers that every answer gets; `origin` is the request's `Origin`."""
        headers = [("vary", "Origin")]
        if self._allows(origin):
            assert origin is not None
            headers += [
                ("access-control-allow-origin", origin.decode("latin-1")),
                ("access-control-expose-headers", self._EXPOSED),
            ]
        return headers

    def block(self, origin: bytes | None) -> bytes:
        """`lines` as bytes of a head, for relayed answers."""
        return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in self.lines(origin))

    def preflight(
        self, origin: bytes | None, requested_method: bytes | None, requested_headers: bytes | None
    ) -> list[tuple[str, str]] | None:
        """The headers of the answer 200 to a preflight, or None when the request is no preflight we allow."""
        if requested_method is None or not self._allows(origin):
            return None
        names = list(self._HEADERS)
        # `x-smg-*` is the promise; browsers know no such pattern, so the names asked for are repeated.
        for word in (requested_headers or b"").lower().split(b",")[: self._REQUESTED_MAX]:
            if self._OWN_HEADER.fullmatch(word.strip()):
                names.append(word.strip().decode("ascii"))
        return [
            *self.lines(origin),
            ("access-control-allow-methods", self._METHODS),
            ("access-control-allow-headers", ", ".join(names)),
            ("access-control-max-age", str(self._MAX_AGE_S)),
        ]

    def _allows(self, origin: bytes | None) -> bool:
        return origin is not None and (self._allows_all or origin in self._origins)
