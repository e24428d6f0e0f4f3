"""Names, secrets and seeds: the same on all nodes of a mesh, different elsewhere."""

from __future__ import annotations

import pytest

from smg.bridge import identity, words
from smg.bridge.peers import mismatch
from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockSettings
from smg.settings import Mesh


def test_a_node_is_named_after_its_host_and_port_unless_it_is_told():
    assert identity.node_name(Mesh(node_name="n")) == "n"
    default = identity.node_name(Mesh(mesh_port=1234))
    assert default.endswith("-1234") and ":" not in default


def test_seeds_are_equal_with_equal_secret_and_label_only():
    one = identity.cluster_seed(Mesh(mesh_secret="s" * 20))
    assert one == identity.cluster_seed(Mesh(mesh_secret="s" * 20, node_name="other", mesh_port=9))
    others = {
        identity.cluster_seed(Mesh(mesh_secret="t" * 20)),
        identity.cluster_seed(Mesh(mesh_secret="s" * 20, mesh_label="other")),
        identity.cluster_seed(Mesh()),
    }
    assert one not in others and len(others) == 3


def test_a_file_of_secrets_is_read_in_order(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# newest first\n" + "n" * 20 + "\n\n" + "o" * 20 + "\n")
    assert identity.secrets_of(Mesh(mesh_keys_file=str(path))) == (b"n" * 20, b"o" * 20)


def test_the_seed_does_not_change_while_secrets_are_rotated(tmp_path):
    path = tmp_path / "keys"
    seeds = set()
    for content in ("a" * 20, "b" * 20 + "\n" + "a" * 20, "b" * 20):
        path.write_text(content)
        seeds.add(identity.cluster_seed(Mesh(mesh_keys_file=str(path))))
    assert len(seeds) == 1


@pytest.mark.parametrize("content", [b"", b"\n# nothing\n", b"\xff\xfe", b"x" * 70_000])
def test_a_file_that_is_no_use_is_refused(tmp_path, content):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="--mesh-keys-file"):
        identity.secrets_of(Mesh(mesh_keys_file=str(path)))
    with pytest.raises(SettingsError, match="--mesh-keys-file"):
        identity.secrets_of(Mesh(mesh_keys_file=str(tmp_path / "missing")))


def test_short_secrets_are_stretched_and_long_ones_are_taken_as_they_are():
    (short,) = identity.secrets_of(Mesh(mesh_secret="short"))
    assert len(short) == 32 and short == identity.secrets_of(Mesh(mesh_secret="short"))[0]
    assert identity.secrets_of(Mesh(mesh_secret="l" * 16)) == (b"l" * 16,)
    assert identity.secrets_of(Mesh()) == ()


def test_tls_files_that_do_not_fit_are_refused(tmp_path):
    assert identity.tls_of(Mesh()) is None
    path = tmp_path / "not.pem"
    path.write_text("no certificate")
    with pytest.raises(SettingsError, match="--mesh-tls-cert"):
        identity.tls_of(Mesh(mesh_tls_ca_cert=str(path), mesh_tls_cert=str(path), mesh_tls_key=str(path)))


def test_settings_become_those_of_an_agent():
    parameters = identity.parameters_of(BlockSettings(cluster_seed=7))
    settings = identity.agent_settings(
        Mesh(
            node_name="n",
            seeds=("a:1,b:2", "c"),
            mesh_host="10.0.0.1",
            mesh_port=5,
            mesh_advertise="me:6",
            mesh_label="l",
            mesh_secret="s" * 20,
        ),
        parameters,
    )
    assert (settings.name, settings.seeds, settings.host, settings.port) == (
        "n",
        ("a:1", "b:2", "c"),
        "10.0.0.1",
        5,
    )
    assert (settings.advertise, settings.label, settings.secrets) == ("me:6", "l", (b"s" * 20,))
    assert words.read_parameters(settings.meta) == parameters
    assert len(settings.meta) <= 256


def test_nodes_whose_hashes_do_not_meet_are_told_why():
    def of(**fields: int) -> words.Parameters:
        return identity.parameters_of(BlockSettings(**fields))

    ours = of(cluster_seed=1)
    assert mismatch(ours, of(cluster_seed=1)) == ""
    assert "secret" in mismatch(ours, of(cluster_seed=2))
    assert "1024" in mismatch(ours, of(cluster_seed=1, block_bytes=1024))
    assert "says nothing" in mismatch(ours, None)
    assert ours.seed_check != 1  # the seed itself is not told
