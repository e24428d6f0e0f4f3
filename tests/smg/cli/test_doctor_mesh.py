"""What `smg doctor` sees of a mesh: peers in both directions, secrets that differ, files that do not fit."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from mesh import Agent, AgentSettings
from smg.cli.doctor_mesh import _seeds, examine_mesh
from smg.settings import Mesh

SECRET = "s" * 20
PATIENCE_S = 5.0


@contextmanager
def peer(secret: str = SECRET) -> Iterator[int]:
    """A member in a thread of its own; its port."""
    started = threading.Event()
    found: list[int] = []
    cancel: list[trio.CancelScope] = []
    token: list[trio.lowlevel.TrioToken] = []

    async def run() -> None:
        settings = AgentSettings(
            name="peer", host="127.0.0.1", port=0, label="smg", secrets=(secret.encode(),)
        )
        agent = Agent(settings)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                found.append((await nursery.start(agent.run))[1])
                cancel.append(scope)
                token.append(trio.lowlevel.current_trio_token())
                started.set()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield found[0]
    finally:
        token[0].run_sync_soon(cancel[0].cancel)
        thread.join(PATIENCE_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def examined(timeout_s: float = PATIENCE_S, **fields: object) -> list[tuple[str, str, str]]:
    settings = Mesh(
        ha_mesh=True,
        mesh_host="127.0.0.1",
        mesh_port=free_port(),
        node_name="n",
        **fields,  # type: ignore[arg-type]
    )
    return [(found.status, found.check, found.seen) for found in examine_mesh(settings, timeout_s)]


def test_a_peer_is_reached_in_both_directions() -> None:
    with peer() as port:
        port_line, peer_line = examined(seeds=(f"127.0.0.1:{port}",), mesh_secret=SECRET)
    assert port_line[0] == "OK" and "TCP and UDP" in port_line[2]
    assert peer_line[:2] == ("OK", f"peer peer at 127.0.0.1:{port}")
    assert "and reaches us" in peer_line[2]


def test_another_secret_is_no_member() -> None:
    with peer() as port:
        _, line = examined(1.5, seeds=(f"127.0.0.1:{port}",), mesh_secret="t" * 20)
    assert line[:2] == ("WARN", "--seeds")


def test_nobody_there_may_be_the_first_node() -> None:
    _, line = examined(0.5, seeds=("127.0.0.1:9",))
    assert line[0] == "WARN" and "127.0.0.1:9" in line[2]
    _, line = examined(0.5)
    assert line == ("OK", "--ha-mesh", "no seeds: a mesh of one that others may join")


def test_a_port_in_use_is_told_and_the_peers_are_asked_all_the_same() -> None:
    with peer() as port, socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Mesh(
            ha_mesh=True,
            mesh_host="127.0.0.1",
            mesh_port=taken.getsockname()[1],
            node_name="n",
            seeds=(f"127.0.0.1:{port}",),
            mesh_secret=SECRET,
        )
        lines = examine_mesh(settings, PATIENCE_S)
    assert [line.status for line in lines] == ["WARN", "OK"]
    assert "in use" in lines[0].seen


def test_files_that_are_no_use_fail(tmp_path: Path) -> None:
    (line,) = examined(mesh_keys_file=str(tmp_path / "missing"))
    assert line[:2] == ("FAIL", "--mesh-keys-file")
    keys = tmp_path / "keys"
    keys.write_text("k" * 20 + "\n" + "o" * 20)
    assert ("OK", "--mesh-keys-file", "2 secret(s), the first one seals") in examined(
        mesh_keys_file=str(keys)
    )


def test_seeds_get_the_mesh_port_where_they_name_none() -> None:
    seeds = _seeds(Mesh(seeds=("a,b:1,[::1],[::1]:2,::1",), mesh_port=7))
    assert seeds == ("a:7", "b:1", "[::1]:7", "[::1]:2", "[::1]:7")
