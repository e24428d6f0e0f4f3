"""Which address of ours the others are told."""

from __future__ import annotations

import pytest

from mesh.advertise import Advertised
from mesh.errors import SettingsError, WeatherError
from mesh.member import Address
from mesh.settings import AgentSettings


class Kernel:
    """Knows two routes and two names."""

    def __init__(self, default: str | None = "10.0.0.5") -> None:
        self.default = default

    async def resolve(self, host: str, port: int) -> list[Address]:
        known = {"seed.example": "192.168.1.7", "we.example": "203.0.113.5"}
        if host[0].isdigit():
            return [(host, port)]
        if host in known:
            return [(known[host], port)]
        raise WeatherError("unknown")

    def source_towards(self, address: Address | None) -> str | None:
        if address is None:
            return self.default
        return "192.168.1.5" if address[0].startswith("192.168.") else self.default


def advertised(kernel: Kernel | None = None, **settings: object) -> Advertised:
    return Advertised(AgentSettings(name="a", **settings), kernel or Kernel())  # type: ignore[arg-type]


async def test_what_is_given_wins() -> None:
    assert await advertised(advertise="198.51.100.7").find(("0.0.0.0", 7946)) == ("198.51.100.7", 7946)
    assert await advertised(advertise="198.51.100.7:9").find(("10.0.0.1", 7946)) == ("198.51.100.7", 9)
    assert await advertised(advertise="we.example:9").find(("0.0.0.0", 7946)) == ("203.0.113.5", 9)


@pytest.mark.parametrize("advertise", ["0.0.0.0", "[::]:5", "*", "unknown.example", "0.0.0.0:7946"])
async def test_what_nobody_can_dial_is_refused(advertise: str) -> None:
    with pytest.raises(SettingsError):
        await advertised(advertise=advertise).find(("10.0.0.1", 7946))


async def test_a_bound_address_is_advertised() -> None:
    assert await advertised(seeds=("seed.example:1",)).find(("10.0.0.1", 7946)) == ("10.0.0.1", 7946)


async def test_else_it_is_the_address_that_reaches_the_first_seed_that_resolves() -> None:
    for bound in ("0.0.0.0", "::"):
        found = advertised(seeds=("unknown.example:1", "seed.example:1", "10.9.9.9:1"))
        assert await found.find((bound, 7946)) == ("192.168.1.5", 7946)
        assert found.improve(("192.168.1.5", 7946), "10.0.0.5") is None, "it was no guess"


async def test_without_a_seed_it_is_the_default_route_until_a_seed_is_reached() -> None:
    found = advertised(seeds=("unknown.example:1",))
    assert await found.find(("0.0.0.0", 7946)) == ("10.0.0.5", 7946)
    assert found.improve(("10.0.0.5", 7946), None) is None
    assert found.improve(("10.0.0.5", 7946), "10.0.0.5") is None
    assert found.improve(("10.0.0.5", 7946), "127.0.0.1") is None
    assert found.improve(("10.0.0.5", 7946), "192.168.1.5") == ("192.168.1.5", 7946)
    assert found.improve(("192.168.1.5", 7946), "172.16.0.5") is None, "once is enough"


async def test_with_no_network_at_all_it_is_loopback() -> None:
    assert await advertised(Kernel(default=None)).find(("0.0.0.0", 7946)) == ("127.0.0.1", 7946)
