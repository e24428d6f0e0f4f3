"""The supervisor's own arithmetic; its work is tested on real processes (tests/e2e/test_processes.py)."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from smg.cli import supervisor
from smg.cli.supervisor import free_mesh_ports, interpreter, members_of
from smg.settings import Listening, Mesh, Settings


def test_ports_of_a_mesh_of_their_own_are_free_for_both_protocols_and_differ() -> None:
    ports = free_mesh_ports(6)
    assert len(set(ports)) == 6
    for port in ports:
        with socket.create_server(("127.0.0.1", port)), socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", port))


def test_they_are_not_among_those_the_kernel_gives_away(monkeypatch, tmp_path) -> None:
    (tmp_path / "range").write_text("30000\t60999\n")
    monkeypatch.setattr(supervisor, "EPHEMERAL_RANGE", str(tmp_path / "range"))
    assert all(20_000 <= port < 30_000 for port in free_mesh_ports(8))
    (tmp_path / "range").write_text("1024 65535\n")
    assert len(free_mesh_ports(3)) == 3


def test_each_start_has_a_secret_of_its_own_unless_the_mesh_has_one() -> None:
    alone = Settings(listening=Listening(processes=3))
    first, again = members_of(alone), members_of(alone)
    secrets = {member.secret for member in first}
    assert len(secrets) == 1 and len(secrets.pop() or "") >= 32
    assert first[0].secret != again[0].secret
    meshed = members_of(Settings(listening=Listening(processes=3), mesh=Mesh(ha_mesh=True, mesh_port=5000)))
    assert [member.mesh_ports for member in meshed] == [(5000, 5001, 5002)] * 3
    assert {member.secret for member in meshed} == {None}
    assert [member.place for member in meshed] == [0, 1, 2]


@pytest.mark.parametrize("is_among", [True, False])
def test_a_process_looks_for_modules_in_the_working_directory_only_if_we_do(monkeypatch, is_among) -> None:
    path = [place for place in sys.path if place not in ("", os.getcwd())]
    monkeypatch.setattr(sys, "path", [*path, os.getcwd()] if is_among else path)
    assert interpreter() == [sys.executable, *([] if is_among else ["-P"])]
