"""Builds who may call and how the way is sealed: gates, tokens, audit, TLS contexts, and how each of them is reloaded.

Owns the wiring of section 15 for the composition root, and the parts of a hot reload that belong to it. Starts nothing. It
must never log a value of a secret: what a reload changed is told by the names of the owners.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

from smg.cli.flags import Given
from smg.gateway.audit import Audit
from smg.gateway.gates import Cors, Gates, Tenants, Tokens
from smg.net.client import Client
from smg.net.pool import ConnectionPool
from smg.net.readiness import Readiness
from smg.net.tls import describe, server_context, worker_context
from smg.services.key_sets import KeySets
from smg.services.reload import Change, Part
from smg.settings import Auth, Settings, Tls
from smg.telemetry import log as logs
from smg.tenancy.claims import TokenRules
from smg.tenancy.keys import KeyRing, keys_of

_PROVIDER_IDLE_S = 3.0
_PROVIDER_CONNECT_S = 5.0


class Access:
    """The rooms of section 15 of one node.

    `key_sets` is a service, None without an identity provider; `serving_context` is that of the serving port, None without
    TLS. Raises `SettingsError` when a file cannot be used.
    """

    def __init__(self, settings: Settings, readiness: Readiness) -> None:
        auth = settings.auth
        self._tls = settings.tls
        # Keys are known by digests under a secret: how long a look-up takes then tells nothing about a key.
        keys = KeyRing(os.urandom(32), *keys_of(auth))
        self._worker_key = settings.workers.worker_api_key
        self._provider_pool: ConnectionPool | None = None
        self.key_sets = self._make_key_sets(auth, readiness) if auth.jwt_issuer is not None else None
        self.gates = Gates(keys, self._make_tokens(auth))
        self.tenants = Tenants(auth.tenant_header_name if auth.trust_tenant_header else None)
        origins = settings.listening.cors_allowed_origins
        self.cors = Cors(origins) if origins else None
        self.serving_context = _serving_context(settings.tls)
        self.audit = Audit(logs.logger("smg.audit")) if auth.control_plane_audit_enabled else None

    def worker_context(self) -> ssl.SSLContext | None:
        """The context towards workers; None: the default one, made when the first https worker is met. Reads files."""
        return _worker_context(self._tls)

    def parts(
        self,
        given: Given | None,
        *,
        use_server_context: Callable[[ssl.SSLContext], None],
        use_worker_context: Callable[[ssl.SSLContext], None],
        forget_heads: Callable[[], None],
        use_worker_key: Callable[[Settings], None],
    ) -> list[Part]:
        """What of these rooms can be reloaded; the functions carry a change to where it is used."""
        tls = self._tls
        parts = []
        if given is not None:
            keys = _KeysPart(self, given, forget_heads, use_worker_key)
            parts.append(Part("keys", given.secret_files(), keys.prepare))
        if tls.tls_cert_path is not None and tls.tls_key_path is not None:
            files = (tls.tls_cert_path, tls.tls_key_path)

            def serving() -> Callable[[], None]:
                return partial(use_server_context, server_context(*files))

            parts.append(Part("serving certificate", files, _ContextPart(files, serving).prepare))
        own = () if tls.client_cert_path is None else (tls.client_cert_path, tls.client_key_path or "")
        worker_files = own + tls.ca_cert_paths
        if worker_files:
            towards = partial(self._towards_others, use_worker_context)
            part = _ContextPart(worker_files, towards)
            parts.append(Part("worker certificates", worker_files, part.prepare))
        return parts

    def _towards_others(self, use_worker_context: Callable[[ssl.SSLContext], None]) -> Callable[[], None]:
        """New contexts for workers and for the provider, and how they are swapped."""
        context = _worker_context(self._tls)
        assert context is not None, "its files are named"
        pool = self._provider_pool
        provider = None if pool is None else worker_context(self._tls.ca_cert_paths)

        def apply() -> None:
            use_worker_context(context)
            if pool is not None and provider is not None:
                pool.use_context(provider)

        return apply

    def _make_key_sets(self, auth: Auth, readiness: Readiness) -> KeySets:
        """With connections of their own: the provider is never shown the certificate that is for workers."""
        assert auth.jwt_issuer is not None
        self._provider_pool = ConnectionPool(
            readiness,
            idle_timeout_s=_PROVIDER_IDLE_S,
            connect_timeout_s=_PROVIDER_CONNECT_S,
            context=worker_context(self._tls.ca_cert_paths),
        )
        fetch = Client(readiness, self._provider_pool).fetch
        return KeySets(fetch, auth.jwt_issuer, auth.jwt_jwks_uri, log=logs.logger("smg.tokens"))

    def _make_tokens(self, auth: Auth) -> Tokens | None:
        if self.key_sets is None or auth.jwt_issuer is None or auth.jwt_audience is None:
            return None
        rules = TokenRules(auth.jwt_issuer, auth.jwt_audience, auth.jwt_role_claim, auth.role_of_name())
        return Tokens(rules, self.key_sets)


class _KeysPart:
    """Every secret that came from a file: the gateway's keys and the key for workers."""

    def __init__(
        self,
        access: Access,
        given: Given,
        forget_heads: Callable[[], None],
        use_worker_key: Callable[[Settings], None],
    ) -> None:
        self._access = access
        self._given = given
        self._forget_heads = forget_heads
        self._use_worker_key = use_worker_key

    def prepare(self) -> Change | None:
        """See `Part.prepare`."""
        access = self._access
        settings = self._given.settings()
        keys = access.gates.keys.successor(*keys_of(settings.auth))
        lines = access.gates.keys.changes_to(keys)
        has_worker_key = settings.workers.worker_api_key != access._worker_key

        def apply() -> None:
            access.gates.renew(keys)
            self._forget_heads()
            if has_worker_key:
                access._worker_key = settings.workers.worker_api_key
                self._use_worker_key(settings)

        if has_worker_key:
            lines.append("workers: their key was replaced")
        return Change(tuple(lines), apply) if lines else None


class _ContextPart:
    """A TLS context and the files it is made of. `make` reads them and gives the swap; it raises `SettingsError`."""

    def __init__(self, files: tuple[str, ...], make: Callable[[], Callable[[], None]]) -> None:
        self._files = files
        self._make = make
        self._loaded = _digest(files)

    def prepare(self) -> Change | None:
        """See `Part.prepare`."""
        digest = _digest(self._files)
        if digest == self._loaded:
            return None
        swap = self._make()

        def apply() -> None:
            self._loaded = digest
            swap()

        return Change((f"certificate with {describe(self._files[0])}",), apply)


def _serving_context(tls: Tls) -> ssl.SSLContext | None:
    if tls.tls_cert_path is None or tls.tls_key_path is None:
        return None
    return server_context(tls.tls_cert_path, tls.tls_key_path)


def _worker_context(tls: Tls) -> ssl.SSLContext | None:
    if tls.client_cert_path is None and not tls.ca_cert_paths:
        return None
    return worker_context(tls.ca_cert_paths, tls.client_cert_path, tls.client_key_path)


def _digest(paths: tuple[str, ...]) -> bytes:
    """A digest of what is in the files now. Raises OSError."""
    found = blake2b()
    for path in paths:
        with open(path, "rb") as file:
            found.update(blake2b(file.read()).digest())
    return found.digest()
