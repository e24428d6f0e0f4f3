"""Which address of ours the others are told: given, bound, or found by asking the kernel how we reach the first seed.

Owns that choice, and its correction when a seed that could not be resolved at the start is reached later. An address
nobody can dial is refused. Must never be asked before the port is known.
"""

from __future__ import annotations

import ipaddress

import trio

from mesh.address import parse_address
from mesh.errors import SettingsError, WeatherError
from mesh.member import UNSPECIFIED_HOSTS, Address
from mesh.settings import AgentSettings
from mesh.transport import Transport

LOOPBACK = "127.0.0.1"


class Advertised:
    """The choice of one agent."""

    __slots__ = ("_is_guess", "_settings", "_transport")

    def __init__(self, settings: AgentSettings, transport: Transport) -> None:
        self._settings = settings
        self._transport = transport
        self._is_guess = False
        """Nothing told us which interface the mesh is on."""

    async def find(self, bound: Address) -> Address:
        """The address to advertise. Raises SettingsError for one that nobody can dial or resolve."""
        host, port = bound
        if self._settings.advertise:
            host, port = parse_address(self._settings.advertise, port)
            if host in UNSPECIFIED_HOSTS or _is_unspecified(host):
                raise SettingsError(f"nobody can dial the advertised host {host!r}")
            found = await self._resolve(host, port)
            if not found:
                raise SettingsError(f"the advertised host {host!r} does not resolve")
            return found[0]
        if host not in UNSPECIFIED_HOSTS:
            return bound
        for seed in self._settings.seeds:
            for address in await self._resolve(*parse_address(seed, self._settings.port)):
                source = self._transport.source_towards(address)
                if source is not None and source not in UNSPECIFIED_HOSTS:
                    return (source, port)
        self._is_guess = True
        return (self._transport.source_towards(None) or LOOPBACK, port)

    def improve(self, own: Address, local_host: str | None) -> Address | None:
        """A seed was reached from this local address: the address to advertise from now on, None if it is right."""
        if not self._is_guess or local_host is None:
            return None
        if local_host != own[0] and not ipaddress.ip_address(local_host).is_loopback:
            self._is_guess = False
            return (local_host, own[1])
        return None

    async def _resolve(self, host: str, port: int) -> list[Address]:
        try:
            with trio.move_on_after(self._settings.resolve_s):
                return await self._transport.resolve(host, port)
        except WeatherError:
            pass  # the seed is asked for again, for ever, by the membership machine
        return []


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
