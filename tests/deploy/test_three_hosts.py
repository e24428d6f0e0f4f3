"""The walk through three hosts, walked: every command of docs/operate/three-hosts.md on addresses of the loopback.

Owns the change of addresses and of ports that others here may use; commands are otherwise run as they stand on the page, in
their order.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import trio

from smg.cli.flags import Given
from tests.deploy.front import Program, answers, replaced, start
from tests.deploy.load import Browser
from tests.test_docs import FENCE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operate" / "three-hosts.md"
HOSTS = {
    "10.0.0.11": "127.0.0.2",
    "10.0.0.12": "127.0.0.3",
    "10.0.0.13": "127.0.0.4",
    "10.0.0.21": "127.0.0.5",
    "10.0.0.22": "127.0.0.6",
}
NODES = [HOSTS[f"10.0.0.{last}"] for last in (11, 12, 13)]


def free_everywhere(count: int) -> list[int]:
    """Ports that are free on every address, for TCP and UDP."""
    kept: list[socket.socket] = []
    ports: list[int] = []
    while len(ports) < count:
        listener = socket.create_server(("0.0.0.0", 0))
        kept.append(listener)
        port = listener.getsockname()[1]
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kept.append(datagrams)
        try:
            datagrams.bind(("0.0.0.0", port))
        except OSError:
            continue
        ports.append(port)
    for sock in kept:
        sock.close()
    return ports


class Walk:
    """The commands of the page in another place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self.port, metrics_port, mesh_port, engine_port = free_everywhere(4)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SMG_")},
            "SMG_PROMETHEUS_PORT": str(metrics_port),
            "SMG_MESH_PORT": str(mesh_port),
            "SMG_SHUTDOWN_GRACE_PERIOD_SECS": "1",
        }
        self.engine_port = engine_port
        self.text = replaced(
            PAGE.read_text(),
            {
                **HOSTS,
                ":30000": f":{self.port}",
                ":8000": f":{engine_port}",
                "--port 8000": f"--port {engine_port}",
                "/etc/smg": str(folder),
            },
        )

    def commands(self) -> Iterator[list[str]]:
        for language, block in FENCE.findall(self.text):
            if language == "sh":
                for line in block.splitlines():
                    if words := shlex.split(line, comments=True):
                        yield words

    async def smg(self, words: list[str]) -> None:
        """Starts what goes on running, and waits for what ends."""
        command = [sys.executable, "-m", "smg", *words]
        if words[0] != "engine" and not words[0].startswith("-"):
            environment = {**self.environment, "SMG_PORT": str(self.port)}
            run = await trio.run_process(
                command, env=environment, capture_stdout=True, capture_stderr=True, check=False
            )
            said = (run.stdout + run.stderr).decode()
            assert run.returncode == 0, f"{shlex.join(words)}\n{said}"
            self.check(words, said)
            return
        address = words[words.index("--host") + 1]
        with_port = command if words[0] == "engine" else [*command, "--port", str(self.port)]
        self.programs.append(
            start(self.folder, f"{words[0].strip('-')}-{address}", with_port, self.environment)
        )
        if words[0] == "engine":
            await answers(self.engine_port, "/health", host=address)

    def check(self, words: list[str], said: str) -> None:
        """What the page says of the output."""
        if words[:2] == ["mesh", "members"]:
            assert said.count("alive") == 3, said
        if words == ["workers", "--gateway", f"http://{NODES[0]}:{self.port}"]:
            assert said.count("ready") == 2, said
        if words[:2] == ["route", "explain"]:
            assert f":{self.engine_port}" in said, said

    async def curl(self, words: list[str]) -> None:
        url = urlsplit(words[0])
        body = json.loads(words[words.index("-d") + 1]) if "-d" in words else None
        browser = Browser(url.hostname or "", url.port or 0)
        answer = await browser.ask("GET" if body is None else "POST", url.path, body)
        browser.leave()
        assert answer.status == 200, answer.body

    async def all_see_all(self) -> None:
        with trio.fail_after(20):
            for host in NODES:
                await answers(self.port, "/readiness", host=host)
                while True:
                    browser = Browser(host, self.port)
                    members = json.loads((await browser.ask("GET", "/mesh/members")).body)["members"]
                    browser.leave()
                    if [member["state"] for member in members] == ["alive"] * len(NODES):
                        break
                    await trio.sleep(0.02)

    def close(self) -> None:
        for program in self.programs:
            program.kill()


async def test_the_commands_of_the_page_do_what_it_says(tmp_path):
    walk = Walk(tmp_path)
    seen = set()
    try:
        for words in walk.commands():
            seen.add(words[0])
            if words[0] == "openssl":
                subprocess.run(shlex.join(words[:-2]) + f" > {words[-1]}", shell=True, check=True)
            elif words[0] == "smg":
                if len(walk.programs) == 5 and words[1] != "doctor":
                    await walk.all_see_all()
                await walk.smg(words[1:])
            elif words[0] == "curl":
                await walk.curl(words[1:])
        assert {"smg", "curl", "openssl"} <= seen and len(walk.programs) == 5
    finally:
        walk.close()


def test_the_variables_of_the_service_mean_what_the_flags_meant():
    (block,) = [text for language, text in FENCE.findall(PAGE.read_text()) if language == "ini"]
    values = dict(line.split("=", 1) for line in block.splitlines())
    commands = [
        shlex.split(line)
        for line in PAGE.read_text().splitlines()
        if line.startswith("smg --host 10.0.0.11 ")
    ]
    words = commands[0][1:]
    place = words.index("--mesh-secret")
    del words[place : place + 2]
    by_file, by_flag = Given((), values).settings(), Given(tuple(words), {}).settings()
    assert by_file.mesh.seed_addresses() == by_flag.mesh.seed_addresses()
    for one, other in zip(msgspec.structs.astuple(by_file), msgspec.structs.astuple(by_flag), strict=True):
        if one != by_file.mesh:
            assert one == other
    assert msgspec.structs.replace(by_file.mesh, seeds=()) == msgspec.structs.replace(by_flag.mesh, seeds=())
