"""The settings of who may call and how the way is sealed: keys, tokens, tenants, certificates.

Owns these two groups for `smg.settings`, which is the room's face: read them there. Like it, this file only declares, and
cuts the texts of keys into their parts; it must never read a file, compare a key or repeat one in a message.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from smg.settings_flag import HIDDEN, Flag, Group, header_name

ADMIN_ROLE = "admin"
USER_ROLE = "user"
ROLES = (ADMIN_ROLE, USER_ROLE)
"""What a key of the control plane may do: everything, or only look (SEC-5)."""

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._@/-]{0,127}")


class ControlKey(msgspec.Struct, frozen=True):
    """One key of `--control-plane-api-keys`; printed without the key."""

    id: str
    name: str
    role: str
    key: str

    def __repr__(self) -> str:
        return f"ControlKey(id={self.id!r}, name={self.name!r}, role={self.role!r}, key={HIDDEN!r})"


def tenant_key(text: str) -> str:
    """A `TENANT:KEY` pair. Raises ValueError with the reason, which holds nothing of the key."""
    tenant, colon, key = text.partition(":")
    if not (colon and key):
        raise ValueError("must be TENANT:KEY")
    if not _NAME.fullmatch(tenant):
        raise ValueError("the tenant's name may have letters, digits and . _ @ / - only, at most 128")
    if key != key.strip():
        raise ValueError("the key begins or ends with white space")
    return text


def control_key(text: str) -> str:
    """An `ID:NAME:ROLE:KEY` quadruple. Raises ValueError with the reason, which holds nothing of the key."""
    parts = text.split(":", 3)
    if len(parts) != 4 or not parts[3]:
        raise ValueError("must be ID:NAME:ROLE:KEY")
    if not _NAME.fullmatch(parts[0]):
        raise ValueError("the id may have letters, digits and . _ @ / - only, at most 128")
    if not parts[1].strip() or len(parts[1]) > 128:
        raise ValueError("the name must have between 1 and 128 characters")
    if parts[2].lower() not in ROLES:
        raise ValueError(f"the role must be one of {', '.join(ROLES)}")
    if parts[3] != parts[3].strip():
        raise ValueError("the key begins or ends with white space")
    return text


def provider_url(text: str) -> str:
    """A URL of an identity provider, kept as it is: the issuer is compared with tokens. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https:// and name a host")
    if "@" in parts.netloc or parts.fragment or any(character.isspace() for character in text):
        raise ValueError("may have no user name, no fragment and no white space")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("the port must be between 1 and 65535") from None
    return text


def role_mapping(text: str) -> str:
    """A `NAME=ROLE` pair; the name is the provider's. Raises ValueError with the reason."""
    name, equals, role = text.rpartition("=")
    if not (equals and name and role):
        raise ValueError("must be NAME=ROLE")
    if role.lower() not in ROLES:
        raise ValueError(f"the role must be one of {', '.join(ROLES)}")
    return f"{name}={role.lower()}"


class Auth(Group, frozen=True, kw_only=True):
    """Keys and tenants: who may call."""

    api_key: Annotated[
        str | None,
        Flag(
            is_secret=True,
            metavar="KEY",
            doc="Key that inference and admin calls must bring (SEC-1, SEC-2). It is never sent to workers. None: open.",
        ),
    ] = None
    tenant_api_key: Annotated[
        tuple[str, ...],
        Flag(
            is_secret=True,
            form=tenant_key,
            metavar="TENANT:KEY",
            doc="Key of a tenant: it opens inference and no admin route (SEC-4). A tenant may have several, so that keys can be "
            "changed one after the other. A file has one pair per line.",
        ),
    ] = ()
    control_plane_api_keys: Annotated[
        tuple[str, ...],
        Flag(
            is_secret=True,
            form=control_key,
            metavar="ID:NAME:ROLE:KEY",
            doc="Key of the admin routes; the role is admin (everything) or user (GET only). With one of these, or tokens, serving "
            "keys open no admin route (SEC-5). A file has one per line.",
        ),
    ] = ()
    control_plane_audit_enabled: Annotated[
        bool,
        Flag(
            off_flag="disable-audit-logging",
            doc="One log line per admin call, whatever --log-level says: who, what, how it ended (SEC-8).",
        ),
    ] = True
    jwt_issuer: Annotated[
        str | None,
        Flag(
            form=provider_url,
            metavar="URL",
            doc="Identity provider whose tokens open admin routes; also where its keys are discovered (SEC-6, SEC-7).",
        ),
    ] = None
    jwt_audience: Annotated[
        str | None,
        Flag(
            metavar="AUDIENCE",
            doc="Audience that a token must be made for, so that one made for another service opens nothing (SEC-6).",
        ),
    ] = None
    jwt_jwks_uri: Annotated[
        str | None,
        Flag(
            form=provider_url,
            metavar="URL",
            shown_default="as the issuer says",
            doc="Where the provider's keys are. Only an address named here or by --jwt-issuer may be a private one (SEC-7).",
        ),
    ] = None
    jwt_role_mapping: Annotated[
        tuple[str, ...],
        Flag(
            form=role_mapping,
            metavar="NAME=ROLE",
            doc="A role or group of the provider that means admin or user here. With any, only mapped names count; without, the "
            "words admin and user themselves (SEC-6).",
        ),
    ] = ()
    jwt_role_claim: Annotated[
        str,
        Flag(
            metavar="CLAIM",
            doc="Claim that names the role; realm_access.roles looks inside. Then role, roles, groups, group are tried (SEC-6).",
        ),
    ] = "roles"
    trust_tenant_header: Annotated[
        bool,
        Flag(
            doc="Callers without a key of ours are the tenant that a header names (ADM-5). Only behind a proxy that sets it: "
            "whoever reaches the gateway may otherwise be anybody."
        ),
    ] = False
    tenant_header_name: Annotated[
        str, Flag(form=header_name, metavar="HEADER", doc="The header of --trust-tenant-header.")
    ] = "x-smg-tenant-id"

    def tenant_keys(self) -> tuple[tuple[str, str], ...]:
        """(tenant, key) of every tenant key."""
        pairs = (text.partition(":") for text in self.tenant_api_key)
        return tuple((tenant, key) for tenant, _, key in pairs)

    def control_keys(self) -> tuple[ControlKey, ...]:
        """The keys of the control plane."""
        parts = (text.split(":", 3) for text in self.control_plane_api_keys)
        return tuple(ControlKey(id, name, role.lower(), key) for id, name, role, key in parts)

    def role_of_name(self) -> dict[str, str]:
        """The provider's name of a role to ours; empty without a mapping."""
        pairs = (text.rpartition("=") for text in self.jwt_role_mapping)
        return {name: role for name, _, role in pairs}


class Tls(Group, frozen=True, kw_only=True):
    """TLS: certificates on the serving port and towards workers."""

    tls_cert_path: Annotated[
        str | None,
        Flag(
            metavar="PATH",
            doc="Certificate chain (PEM) of the serving port, which then speaks TLS 1.2 or later. Read again when it changes (SEC-10).",
        ),
    ] = None
    tls_key_path: Annotated[
        str | None, Flag(metavar="PATH", doc="Its private key (PEM), without a passphrase.")
    ] = None
    client_cert_path: Annotated[
        str | None,
        Flag(
            metavar="PATH",
            doc="Certificate chain (PEM) shown to https workers that ask for one. Read again when it changes (SEC-10).",
        ),
    ] = None
    client_key_path: Annotated[
        str | None, Flag(metavar="PATH", doc="Its private key (PEM), without a passphrase.")
    ] = None
    ca_cert_paths: Annotated[
        tuple[str, ...],
        Flag(
            metavar="PATH",
            doc="Certificate authorities (PEM) that are trusted for https workers and the identity provider, beside those of the "
            "system (SEC-10).",
        ),
    ] = ()

    def files(self) -> tuple[str, ...]:
        """Every file that is named."""
        named = (self.tls_cert_path, self.tls_key_path, self.client_cert_path, self.client_key_path)
        return tuple(path for path in named if path is not None) + self.ca_cert_paths
