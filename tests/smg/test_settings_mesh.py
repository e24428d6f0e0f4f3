"""The mesh's settings: seeds in all their forms, names, and what may not be combined."""

from __future__ import annotations

import pytest

from smg.cli.flags import parse
from smg.errors import SettingsError
from smg.settings import Settings
from smg.settings_rules import warnings

POLICIES = ("cache_aware", "random")


def parsed(*arguments: str) -> Settings:
    return parse(arguments, {}, policies=POLICIES)


@pytest.mark.parametrize(
    ("arguments", "seeds"),
    [
        (["--seeds", "a:1,b:2", "c"], ("a:1", "b:2", "c")),
        (["--seeds", "a:1", "--seeds", "b:2"], ("a:1", "b:2")),
        (["--mesh-peer-urls", "router-2:30001", "[::1]:30001"], ("router-2:30001", "[::1]:30001")),
        (["--seeds", "10.0.0.1, 10.0.0.2:9"], ("10.0.0.1", "10.0.0.2:9")),
        (["--seeds", "::1"], ("::1",)),
        (["--seeds", "[fe80::1%eth0]"], ("[fe80::1%eth0]",)),
    ],
)
def test_seeds_are_a_comma_list_or_several_values(arguments: list[str], seeds: tuple[str, ...]) -> None:
    assert parsed("--ha-mesh", *arguments).mesh.seed_addresses() == seeds


@pytest.mark.parametrize("seed", ["a:0", "a:65536", "a:x", "a b", ":1", ",", "http://a:1", "[::1", "[::1]x"])
def test_seeds_that_nobody_could_dial_are_refused(seed: str) -> None:
    with pytest.raises(SettingsError, match="--seeds"):
        parsed("--ha-mesh", "--seeds", seed)


def test_seeds_come_from_the_environment_too() -> None:
    settings = parse(
        [], {"SMG_HA_MESH": "1", "SMG_SEEDS": "a:1,b:2", "SMG_NODE_NAME": "n"}, policies=POLICIES
    )
    assert settings.mesh.ha_mesh
    assert settings.mesh.seed_addresses() == ("a:1", "b:2")
    assert settings.mesh.node_name == "n"


def test_the_aliases_of_the_existing_system_are_accepted() -> None:
    mesh = parsed(
        "--enable-mesh",
        "--mesh-server-name",
        "n",
        "--mesh-advertise-host",
        "10.0.0.1",
        "--mesh-peer-urls",
        "b:1",
    ).mesh
    assert (mesh.ha_mesh, mesh.node_name, mesh.mesh_advertise, mesh.seeds) == (
        True,
        "n",
        "10.0.0.1",
        ("b:1",),
    )


@pytest.mark.parametrize("flag", ["--seeds", "--mesh-peer-urls"])
def test_seeds_without_a_mesh_are_a_configuration_error(flag: str) -> None:
    with pytest.raises(SettingsError, match="needs --ha-mesh") as wrong:
        parsed(flag, "a:1")
    assert wrong.value.is_combination


@pytest.mark.parametrize("name", ["", "a:b", "a b", "x" * 129])
def test_a_node_name_is_not_empty_and_has_no_colon(name: str) -> None:
    with pytest.raises(SettingsError, match="--node-name"):
        parsed("--ha-mesh", f"--node-name={name}")


@pytest.mark.parametrize("address", ["0.0.0.0", "0.0.0.0:30001", "[::]:1", "[::]", "::"])
def test_nothing_unspecified_is_advertised(address: str) -> None:
    with pytest.raises(SettingsError, match="--mesh-advertise"):
        parsed("--ha-mesh", "--mesh-advertise", address)


def test_mesh_tls_needs_all_three_files() -> None:
    with pytest.raises(SettingsError, match="--mesh-tls-cert and --mesh-tls-key"):
        parsed("--ha-mesh", "--mesh-tls-ca-cert", "ca.pem")


def test_a_secret_and_a_file_of_secrets_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="one of the two"):
        parsed("--ha-mesh", "--mesh-secret", "s" * 16, "--mesh-keys-file", "keys")


def test_the_mesh_port_is_nobody_elses() -> None:
    with pytest.raises(SettingsError, match="is the port of --port too"):
        parsed("--ha-mesh", "--mesh-port", "30000")
    assert parsed("--mesh-port", "30000").mesh.mesh_port == 30000  # no mesh, no listener


def test_an_open_mesh_and_a_short_secret_are_warned_of() -> None:
    assert not any("mesh" in line for line in warnings(parsed()))
    assert any("may join" in line for line in warnings(parsed("--ha-mesh")))
    assert any("guessed" in line for line in warnings(parsed("--ha-mesh", "--mesh-secret", "short")))
    assert not any("mesh" in line for line in warnings(parsed("--ha-mesh", "--mesh-secret", "s" * 32)))


def test_the_secret_is_never_shown() -> None:
    assert "s3cret-s3cret-s3cret" not in repr(parsed("--ha-mesh", "--mesh-secret", "s3cret-s3cret-s3cret"))
