"""TLS between members: both sides show a certificate of the cluster's CA, read from files, read again on wish.

Owns the two contexts and the check of the cluster's name in the peer's certificate. It must never open a connection.
Contexts are replaced, never changed: streams that are open keep theirs, new streams get the new ones.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import msgspec

from mesh.errors import SettingsError, WeatherError


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of one node. All members trust the same CA, which should sign nothing else.

    `name`: a DNS name that every member's certificate must have among its alternative names, such as `mesh.local`;
    empty means that the CA's signature alone admits.
    """

    ca: str
    certificate: str
    key: str
    name: str = ""


class TlsContexts:
    """`client` dials, `server` accepts; both demand the peer's certificate. TLS 1.3 only.

    Raises SettingsError when a file is missing or does not fit.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.client, self.server = _contexts(files)

    def reload(self) -> None:
        """Read the files again, for streams opened from now on. Raises SettingsError; then nothing changed."""
        self.client, self.server = _contexts(self.files)


def _contexts(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    contexts = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    for context in contexts:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.ca)
            context.load_cert_chain(files.certificate, files.key)
        except (OSError, ssl.SSLError) as error:
            paths = f"{files.ca}, {files.certificate}, {files.key}"
            raise SettingsError(f"cannot use the mesh's TLS files ({paths}): {error}") from error
    return contexts


def check_peer_name(certificate: Mapping[str, Any] | None, name: str) -> None:
    """Raises WeatherError when a verified peer certificate does not carry the cluster's name."""
    if not name:
        return
    names = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"]
    if name not in names:
        raise WeatherError(f"the peer's certificate is for {', '.join(names) or 'no name'}, not for {name}")
