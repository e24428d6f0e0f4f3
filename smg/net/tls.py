"""TLS contexts: what the serving port shows, and what is shown to and asked of workers (SEC-10).

Owns versions, ALPN and the reading of certificate files, with errors that name the flag and the file. A context is built
whole before it is used, so that half a change on disk never reaches a connection. It must never open a connection and
never show a private key.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from smg.errors import SettingsError

ALPN = ("http/1.1",)
"""The one protocol that is spoken, on both sides."""


def server_context(cert_path: str, key_path: str) -> ssl.SSLContext:
    """What the serving port shows: TLS 1.2 or later. Reads files; raises SettingsError (with `is_combination`)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _tighten(context)
    _load_chain(context, cert_path, key_path, "--tls-cert-path", "--tls-key-path")
    return context


def worker_context(
    ca_paths: Sequence[str] = (), cert_path: str | None = None, key_path: str | None = None
) -> ssl.SSLContext:
    """What workers are asked for and shown: a certificate of the system's or these authorities, and ours if any.

    Reads files; raises SettingsError (with `is_combination`).
    """
    context = ssl.create_default_context()
    _tighten(context)
    for path in ca_paths:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ValueError) as error:
            raise _unusable("--ca-cert-paths", path, error) from None
    if cert_path is not None and key_path is not None:
        _load_chain(context, cert_path, key_path, "--client-cert-path", "--client-key-path")
    return context


def describe(cert_path: str) -> str:
    """Whose certificate a file holds and until when, for the log. Raises SettingsError."""
    from cryptography import x509

    try:
        with open(cert_path, "rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read())
    except (OSError, ValueError) as error:
        raise _unusable("certificate", cert_path, error) from None
    until = certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"serial {certificate.serial_number:x}, valid until {until}"


def _tighten(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that renegotiates makes the server compute for it, and no HTTP client needs it.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(ALPN))


def _load_chain(
    context: ssl.SSLContext, cert_path: str, key_path: str, cert_flag: str, key_flag: str
) -> None:
    for flag, path in ((cert_flag, cert_path), (key_flag, key_path)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise _unusable(flag, path, error) from None
    try:
        # An empty passphrase instead of none: OpenSSL would ask the terminal for it.
        context.load_cert_chain(cert_path, key_path, password="")
    except ssl.SSLError as error:
        if _holds_certificate(cert_path):
            raise _unusable(key_flag, key_path, error) from None
        raise _unusable(cert_flag, cert_path, error) from None
    except (OSError, ValueError) as error:
        raise _unusable(cert_flag, cert_path, error) from None


def _holds_certificate(path: str) -> bool:
    """Whether the certificate is not to blame: OpenSSL's errors do not always tell which file they are about."""
    try:
        describe(path)
    except SettingsError:
        return False
    return True


def _unusable(flag: str, path: str, error: Exception) -> SettingsError:
    if isinstance(error, ssl.SSLError):
        reason = {
            "KEY_VALUES_MISMATCH": "is not the key of the certificate",
            "NO_CERTIFICATE_OR_CRL_FOUND": "holds no certificate",
        }.get(error.reason or "", "cannot be used: no PEM, or locked by a passphrase")
    elif isinstance(error, OSError):
        reason = error.strerror or "cannot be read"
    else:
        reason = "cannot be used"
    return SettingsError(flag, repr(path), reason, is_combination=True)
