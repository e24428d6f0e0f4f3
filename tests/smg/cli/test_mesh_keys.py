"""`smg mesh keys`: the file of secrets is edited whole and private, and steps are refused while others are not as far."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from smg.bridge.identity import key_id
from smg.cli import mesh_keys
from smg.cli.main import main
from smg.cli.remote import RemoteError
from smg.errors import SettingsError

ONE, TWO, THREE = (f"secret number {number} of the mesh, a long one" for number in (1, 2, 3))
IDS = [key_id(secret) for secret in (ONE, TWO, THREE)]


class Mesh:
    """A gateway `a` that reads `path` when it is asked, and a peer `b` that holds `theirs`."""

    url = "http://gateway"

    def __init__(self, path: Path, theirs: list[str]) -> None:
        self.path = path
        self.theirs = theirs
        self.peer_state = "alive"
        self.is_deaf = False

    def ask(self, method: str, path: str) -> dict[str, Any]:
        assert (method, path) == ("GET", "/mesh/status")
        lines = [] if self.is_deaf else self.path.read_text().splitlines()
        own = [key_id(line) for line in lines if line and not line.startswith("#")]
        peer = {"name": "b", "state": self.peer_state, "key_ids": [key_id(each) for each in self.theirs]}
        return {"enabled": True, "node": "a", "key_ids": own, "peers": [peer]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the mesh\n\n{ONE}\n")
    path.chmod(0o644)
    return path


def step(mesh: Mesh, *words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    mesh_keys.add_arguments(parser)
    arguments = parser.parse_args([*words, "--file", str(mesh.path), "--timeout-secs", "0.2"])
    return mesh_keys.change(mesh, arguments)  # type: ignore[arg-type]


def test_a_rotation_in_three_steps_keeps_comments_and_closes_the_file(file: Path):
    mesh = Mesh(file, [ONE, TWO])
    told = step(mesh, "add", "--secret", TWO)
    assert [row["key"] for row in told["keys"]] == IDS[:2]
    assert IDS[1] in told["next"]
    assert file.read_text() == f"# of the mesh\n\n{ONE}\n{TWO}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    step(mesh, "use", IDS[1])
    assert file.read_text() == f"# of the mesh\n\n{TWO}\n{ONE}\n"
    mesh.theirs = [TWO, ONE]
    step(mesh, "remove", IDS[0])
    assert file.read_text() == f"# of the mesh\n\n{TWO}\n"
    assert os.listdir(file.parent) == ["keys"]


def test_a_new_secret_is_long_and_not_shown(file: Path):
    told = step(Mesh(file, [ONE]), "add")
    new = file.read_text().splitlines()[-1]
    assert len(new) >= 40
    assert new not in str(told)
    assert new not in "\n".join(mesh_keys.sentences(told))


def test_adding_a_known_secret_again_changes_nothing(file: Path):
    step(Mesh(file, [ONE]), "add", "--secret", ONE)
    assert file.read_text() == f"# of the mesh\n\n{ONE}\n"


def test_a_key_that_others_do_not_hold_is_not_used(file: Path):
    mesh = Mesh(file, [ONE])
    step(mesh, "add", "--secret", TWO)
    before = file.read_text()
    with pytest.raises(RemoteError, match="b would not understand"):
        step(mesh, "use", IDS[1])
    assert file.read_text() == before
    mesh.peer_state = "dead"  # who is not there is not waited for
    step(mesh, "use", IDS[1])


def test_a_key_that_seals_is_not_removed_here_or_elsewhere(file: Path):
    mesh = Mesh(file, [ONE, TWO])
    step(mesh, "add", "--secret", TWO)
    with pytest.raises(RemoteError, match="this node seals"):
        step(mesh, "remove", IDS[0])
    step(mesh, "use", IDS[1])
    with pytest.raises(RemoteError, match="b still seal"):
        step(mesh, "remove", IDS[0])
    step(mesh, "remove", IDS[0], "--force")
    assert ONE not in file.read_text()


def test_a_key_that_is_not_in_the_file_is_named(file: Path):
    for verb in ("use", "remove"):
        with pytest.raises(RemoteError, match=f"no key {IDS[2]}; it has {IDS[0]}"):
            step(Mesh(file, [ONE]), verb, IDS[2])


def test_a_node_that_does_not_read_the_file_is_complained_of(file: Path):
    mesh = Mesh(file, [ONE])
    mesh.is_deaf = True
    with pytest.raises(RemoteError, match="is it the node's --mesh-keys-file"):
        step(mesh, "add", "--secret", TWO)


def test_a_ring_has_its_bound(file: Path):
    mesh = Mesh(file, [ONE])
    for number in range(mesh_keys.KEYS_MAX - 1):
        step(mesh, "add", "--secret", f"another secret with the number {number}")
    with pytest.raises(RemoteError, match="8 keys already"):
        step(mesh, "add", "--secret", TWO)


@pytest.mark.parametrize("secret", ["", " a", "#a", "a\nb"])
def test_a_secret_is_one_line(file: Path, secret: str):
    with pytest.raises(SettingsError, match="one line"):
        step(Mesh(file, [ONE]), "add", f"--secret={secret}")


def test_a_link_or_a_change_under_way_is_refused(file: Path):
    mesh = Mesh(file, [ONE])
    other = file.with_name("keys.new")
    other.write_text("half")
    with pytest.raises(SettingsError, match="being changed by somebody else"):
        step(mesh, "add", "--secret", TWO)
    other.unlink()
    link = file.with_name("link")
    link.symlink_to(file)
    mesh.path = link
    with pytest.raises(SettingsError, match="is a link"):
        step(mesh, "add", "--secret", TWO)
    assert file.read_text() == f"# of the mesh\n\n{ONE}\n"


def test_files_that_are_no_use_are_refused(tmp_path: Path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe" * 20)
    for path, reason in ((empty, "no secret"), (binary, "not text"), (tmp_path / "none", "No such file")):
        with pytest.raises(SettingsError, match=reason):
            step(Mesh(path, [ONE]), "list")


def test_the_file_has_to_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SMG_MESH_KEYS_FILE", raising=False)
    assert main(["mesh", "keys", "list"]) != 0
    assert "--mesh-keys-file" in capsys.readouterr().err
