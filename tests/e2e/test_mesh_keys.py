"""The secret of a mesh changes under load, by the command an operator gives: no request and no member is lost (MSH-8)."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from smg.cli import main as command_line
from tests.e2e.cluster import Cluster
from tests.e2e.fake_worker import fake_worker
from tests.e2e.gateway import CHAT, eventually

OLD = "an old secret of the mesh, long enough"
NEW = "a new secret of the mesh, long enough too"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Rotation:
    """Two nodes with files of secrets, and the commands on each."""

    def __init__(self, nodes: Cluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.nodes = nodes
        self.folder = folder
        self.capsys = capsys

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.keys"

    async def run(self, name: str, *words: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, document, stderr) of one command on one node's host."""
        url = self.nodes[name].url
        arguments = ["mesh", "keys", *words, "--file", str(self.file(name)), "--gateway", url, "--json"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hurry, name)
            code = await trio.to_thread.run_sync(command_line.main, arguments)
            nursery.cancel_scope.cancel()
        told = self.capsys.readouterr()
        return code, json.loads(told.out) if told.out else {}, told.err

    async def _hurry(self, name: str) -> None:
        """As SIGHUP does, so that nobody waits for the watch of the files."""
        while True:
            await trio.sleep(0.1)
            self.nodes[name].node.reload.ask()


async def test_msh_8_a_secret_is_changed_under_load_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failed: list[object] = []

    async def ask(name: str) -> None:
        client = await nodes[name].connect()
        while True:
            answer = await client.ask(CHAT, BODY)
            if answer.status != 200:
                failed.append(answer)
            if nodes.states("a")["b"] != "alive" or nodes.states("b")["a"] != "alive":
                failed.append((nodes.states("a"), nodes.states("b")))
            await trio.sleep(0.01)

    async with fake_worker("m") as worker, fake_worker("m") as late, trio.open_nursery() as nursery:
        nodes = Cluster(nursery, ())
        rotation = Rotation(nodes, tmp_path, capsys)
        for name in "abc":
            rotation.file(name).write_text(f"# of {name}\n{OLD if name < 'c' else NEW}\n")
        await nodes.start("a", "--mesh-keys-file", str(rotation.file("a")), workers=[worker])
        await nodes.start("b", "--mesh-keys-file", str(rotation.file("b")))
        await nodes.settled(1)
        for name in "ab":
            nursery.start_soon(ask, name)

        code, told, _ = await rotation.run("a", "add", "--secret", NEW)
        assert code == 0
        old, new = (row["key"] for row in told["keys"])
        assert [row["nodes"] for row in told["keys"]] == [["a", "b"], ["a"]]
        assert stat.S_IMODE(os.stat(rotation.file("a")).st_mode) == 0o600
        # Not before everybody holds it.
        code, _, error = await rotation.run("a", "use", new)
        assert code == 1
        assert "b would not understand" in error
        assert (await rotation.run("b", "add", "--secret", NEW))[0] == 0
        await eventually(lambda: nodes.mesh("a").agent.key_holders(int(new, 16)) == (2, 2))
        assert (await rotation.run("a", "use", new))[0] == 0
        # Not while somebody seals with it.
        await eventually(lambda: nodes.mesh("b").agent.member("a").record.key_ids[0] == int(new, 16))
        code, _, error = await rotation.run("a", "remove", old)
        assert code == 1
        assert "b still seal" in error
        assert (await rotation.run("b", "use", new))[0] == 0
        await eventually(lambda: nodes.mesh("a").agent.member("b").record.key_ids[0] == int(new, 16))
        for name in "ab":
            assert (await rotation.run(name, "remove", old))[0] == 0
            assert rotation.file(name).read_text() == f"# of {name}\n{NEW}\n"
        code, told, _ = await rotation.run("b", "list")
        assert [(row["key"], row["nodes"], row["sealing"]) for row in told["keys"]] == [
            (new, ["b", "a"], ["b", "a"])
        ]

        # What is said now is heard, also by a node that knows the new secret alone.
        assert (await nodes["a"].ask("/workers", {"url": late.url})).status == 202
        await eventually(lambda: nodes.all_ready(2), 2.0)
        await nodes.start("c", "--mesh-keys-file", str(rotation.file("c")))
        await eventually(lambda: nodes.all_alive() and nodes.all_ready(2), 3.0)
        assert not failed, failed[:3]
        nursery.cancel_scope.cancel()
