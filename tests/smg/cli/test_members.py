"""What each of several processes gets of the settings that were given for all."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.cli.members import Host, Member, member_settings, share
from smg.errors import SettingsError
from smg.settings import Limits, Listening, Mesh, Routing, Settings, Telemetry, Workers
from smg.settings_rules import check

HOST = Host(name="a", address="10.0.0.5", cores=2)


def member(place: int, count: int = 2, secret: str | None = "s" * 32) -> Member:
    return Member(place=place, count=count, mesh_ports=tuple(range(4000, 4000 + count)), secret=secret)


def settings_of(place: int, settings: Settings, count: int = 2) -> Settings:
    return member_settings(settings, member(place, count), HOST)


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_all_shares_together_are_the_whole(total: int, count: int) -> None:
    shares = [share(total, member(place, count)) for place in range(count)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@given(
    st.integers(-1, 5000), st.integers(0, 5000), st.one_of(st.none(), st.floats(0, 1e6)), st.integers(1, 64)
)
def test_limits_of_all_processes_are_those_that_were_given(
    slots: int, queue: int, rate: float | None, count: int
) -> None:
    limits = Limits(max_concurrent_requests=slots, queue_size=queue, rate_limit_tokens_per_second=rate)
    settings = Settings(limits=limits, listening=Listening(processes=count))
    try:
        check(settings)
    except SettingsError:
        assert 0 < slots < count
        return
    parts = [settings_of(place, settings, count).limits for place in range(count)]
    whole = limits.in_flight_max(HOST.cores)
    if whole is None:
        assert all(part.in_flight_max(HOST.cores) is None for part in parts)
    else:
        assert sum(part.in_flight_max(HOST.cores) or 0 for part in parts) == whole
        assert all(part.max_concurrent_requests > 0 for part in parts)
    assert queue <= sum(part.queue_size for part in parts) < queue + count
    assert all((part.queue_size == 0) == (queue == 0) for part in parts)
    rates = [part.requests_per_second() for part in parts]
    assert rates == [limits.requests_per_second()] * count  # divided by the mesh


def test_without_a_mesh_the_processes_are_one_of_their_own_on_the_loopback() -> None:
    given_mesh = Mesh(
        mesh_host="10.1.2.3",
        mesh_keys_file="/k",
        mesh_tls_cert="/c",
        mesh_private_workers=True,
        mesh_advertise="x",
        owner_placement=False,
    )
    mesh = settings_of(1, Settings(mesh=given_mesh)).mesh
    assert mesh.ha_mesh and not mesh.mesh_private_workers and not mesh.owner_placement
    assert mesh.mesh_keys_file is mesh.mesh_tls_cert is mesh.mesh_advertise is None
    assert (mesh.node_name, mesh.mesh_host, mesh.mesh_port) == ("a-1", "127.0.0.1", 4001)
    assert (mesh.mesh_secret, mesh.seeds) == ("s" * 32, ("127.0.0.1:4000",))


def test_in_a_mesh_each_process_has_a_name_and_a_port_and_knows_the_others() -> None:
    given_mesh = Mesh(
        ha_mesh=True,
        mesh_port=4000,
        mesh_secret="given",
        mesh_label="prod",
        seeds=("b,10.0.0.7:5000", "[::1]", "fd00::2", "[fd00::3]:6000"),
    )
    mesh = settings_of(1, Settings(mesh=given_mesh)).mesh
    assert (mesh.node_name, mesh.mesh_port, mesh.mesh_host) == ("a-1", 4001, "0.0.0.0")
    assert (mesh.mesh_secret, mesh.mesh_label, mesh.mesh_advertise) == ("given", "prod", None)
    # What was given comes first: the way to the first seed decides what is advertised.
    assert mesh.seeds == (
        "b:4000",
        "10.0.0.7:5000",
        "[::1]:4000",
        "[fd00::2]:4000",
        "[fd00::3]:6000",
        "10.0.0.5:4000",
    )


@pytest.mark.parametrize(
    ("told", "advertised"),
    [
        (None, None),
        ("gw.example", "gw.example"),
        ("gw.example:7000", "gw.example:7002"),
        ("[fd00::1]:7000", "[fd00::1]:7002"),
        ("fd00::1", "fd00::1"),
    ],
)
def test_an_advertised_port_counts_upwards_as_the_mesh_port_does(
    told: str | None, advertised: str | None
) -> None:
    settings = Settings(mesh=Mesh(ha_mesh=True, mesh_advertise=told))
    assert settings_of(2, settings, 3).mesh.mesh_advertise == advertised


def test_files_that_have_one_writer_are_one_per_process() -> None:
    settings = Settings(
        telemetry=Telemetry(log_dir="/var/log/smg"), routing=Routing(record_trace="/t/day.jsonl")
    )
    found = settings_of(1, settings)
    assert found.telemetry.log_dir == "/var/log/smg/process-1"
    assert found.routing.record_trace == "/t/day-1.jsonl"


def test_all_other_settings_are_the_same_for_all() -> None:
    settings = Settings(workers=Workers(worker_urls=("http://w:1",)))
    found = settings_of(0, settings)
    same = msgspec.structs.replace(
        found,
        mesh=settings.mesh,
        limits=settings.limits,
        telemetry=settings.telemetry,
        routing=settings.routing,
    )
    assert same == settings
    assert found.telemetry == settings.telemetry and found.routing == settings.routing
