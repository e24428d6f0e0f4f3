"""Who may call what: the keys of the gateway and the browser origins it answers (SEC-1 to SEC-4, SEC-9, UP-6).

Owns the comparison of keys (constant time, over digests under a secret of this process), the three gates of the route
table, and CORS. Never stores or shows a key, and never forwards one: `is_secret` tells `wire/headers` what to leave
out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from smg.gateway.problem import invalid_api_key
from smg.wire.headers import Header

OPEN = "open"
SERVING = "serving"
ADMIN = "admin"

SHARED = "auth:shared"
"""The tenant of callers with `--api-key` (ADM-5)."""

_BEARER = re.compile(rb"bearer[ \t]+", re.IGNORECASE)
_AUTHORIZATION = b"authorization"
_API_KEY = b"x-api-key"


class Gates:
    """The three gates: `open` lets all pass, `serving` wants a serving key, `admin` an admin key.

    Without any key every gate is open. `api_key` opens serving and admin routes; `tenant_keys` (tenant to key) open
    serving routes only, and with them alone the admin routes are closed to everyone (SEC-4).
    """

    __slots__ = ("_digests", "_lengths", "_salt", "is_admin_open", "is_secret", "is_serving_open")

    def __init__(
        self,
        api_key: str | None = None,
        tenant_keys: Mapping[str, str] | None = None,
        salt: bytes | None = None,
    ) -> None:
        # Keys are looked up by digest under a secret: how long a look-up takes then tells nothing about a key.
        self._salt = os.urandom(32) if salt is None else salt
        self._digests: dict[bytes, str] = {}
        self._lengths: frozenset[int] = frozenset()
        for tenant, key in (tenant_keys or {}).items():
            self._add(key, f"auth:{tenant}")
        if api_key is not None:
            self._add(api_key, SHARED)
        self.is_serving_open = not self._digests
        self.is_admin_open = not self._digests
        self.is_secret: Callable[[bytes], bool] | None = self._is_secret if self._digests else None
        """Whether a header value is, or carries as bearer, a key of the gateway; None when there are no keys."""

    def serving(self, headers: Sequence[Header]) -> str | None:
        """Passes or raises `GatewayError` 401 (ERR-7); the tenant of the key, None on an open gateway.

        Every credential given must be right: a wrong one in either header is 401 (SEC-2).
        """
        if self.is_serving_open:
            return None
        tenant: str | None = None
        for name, value in headers:
            if name == _AUTHORIZATION:
                match = _BEARER.match(value)
                tenant = self._tenant_of(value[match.end() :].strip()) if match else None
            elif name == _API_KEY:
                tenant = self._tenant_of(value)
            else:
                continue
            if tenant is None:
                break
        if tenant is None:
            raise invalid_api_key()
        return tenant

    def admin(self, headers: Sequence[Header]) -> None:
        """Passes or raises `GatewayError` 401: only `--api-key` opens admin routes (SEC-4)."""
        if not self.is_admin_open and self.serving(headers) != SHARED:
            raise invalid_api_key()

    def check(self, gate: str, headers: Sequence[Header]) -> str | None:
        """Passes the gate of a route or raises `GatewayError` 401; the tenant on serving routes."""
        if gate == SERVING:
            return self.serving(headers)
        if gate == ADMIN:
            self.admin(headers)
        return None

    def _add(self, key: str, tenant: str) -> None:
        value = key.encode("utf-8")
        self._digests[self._digest(value)] = tenant
        self._lengths |= {len(value)}

    def _digest(self, value: bytes) -> bytes:
        return blake2b(value, key=self._salt, digest_size=32).digest()

    def _tenant_of(self, value: bytes) -> str | None:
        return self._digests.get(self._digest(value))

    def _is_secret(self, value: bytes) -> bool:
        # Lengths first: this runs for every header of every request, and the length of a key is no secret.
        if len(value) in self._lengths and self._tenant_of(value) is not None:
            return True
        match = _BEARER.match(value)
        return match is not None and self._tenant_of(value[match.end() :].strip()) is not None


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
