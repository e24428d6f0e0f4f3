"""Addresses as people write them: `host:port`, `[::1]:port`, a bare host with the default port.

Owns the grammar of seeds and of the advertised address. It must never resolve a name.
"""

from __future__ import annotations

from mesh.errors import SettingsError
from mesh.member import Address

_MAPPED = "::ffff:"


def parse_address(text: str, default_port: int) -> Address:
    """Host (name or IP address, without brackets) and port of a text; `default_port` 0 = there is none. Raises SettingsError."""
    text = text.strip()
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise SettingsError(f"not an address: {text!r}")
        port = rest[1:]
        if rest == ":":
            raise SettingsError(f"not an address: {text!r}")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        if not port:
            raise SettingsError(f"not an address: {text!r}")
    if not host or any(letter.isspace() for letter in host) or "/" in host:
        raise SettingsError(f"not an address: {text!r}")
    if not port and default_port:
        return (host, default_port)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise SettingsError(f"no port between 1 and 65535: {text!r}")
    return (host, int(port))


def format_address(address: Address) -> str:
    """The text of an address; brackets around an IPv6 host."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bare_host(host: str) -> str:
    """The IPv4 address in an IPv4-mapped IPv6 address, else the host itself."""
    return host[len(_MAPPED) :] if host.startswith(_MAPPED) and "." in host else host
