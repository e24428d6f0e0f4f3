"""`python -m mesh` as an operator runs it: processes, real sockets on loopback, their lines and exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from mesh.__main__ import EXIT_CONFLICT, EXIT_SETTINGS, main
from tests.mesh.test_transport import make_tls

SECRET = "a secret of the mesh, 32 bytes.."


class Process:
    """One bare agent and the lines it has printed."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.port = 0
        self._more = trio.Event()

    async def read(self) -> None:
        left = b""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            *lines, left = (left + data).split(b"\n")
            self.lines += [json.loads(line) for line in lines]
            self._more.set()
            self._more = trio.Event()

    async def until(self, event: str, **fields: object) -> dict[str, Any]:
        """The first line like this, waited for if need be."""
        with trio.fail_after(20):
            while True:
                for line in self.lines:
                    if line["event"] == event and all(
                        line.get(key) == value for key, value in fields.items()
                    ):
                        return line
                await self._more.wait()


Start = Callable[..., Any]


@asynccontextmanager
async def starter() -> AsyncIterator[Start]:
    async with trio.open_nursery() as nursery:
        running: list[Process] = []

        async def start(name: str, *flags: str) -> Process:
            command = [sys.executable, "-m", "mesh", "--name", name, "--host", "127.0.0.1", "--json", *flags]
            if "--port" not in flags:
                command += ["--port", "0"]
            process = Process(
                await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )
            running.append(process)
            nursery.start_soon(process.read)
            process.port = (await process.until("listening"))["port"]
            return process

        try:
            yield start
        finally:
            for each in running:
                if each.process.poll() is None:
                    each.process.kill()
            with trio.move_on_after(5, shield=True):
                for each in running:
                    await each.process.wait()
            nursery.cancel_scope.cancel()


async def test_agents_join_share_die_and_leave() -> None:
    async with starter() as start:
        a = await start("a", "--secret", SECRET)
        seeds = ("--seeds", f"127.0.0.1:1,127.0.0.1:{a.port}")
        b = await start("b", "--secret", SECRET, *seeds, "--put", "color=blue")
        c = await start("c", "--secret", SECRET, *seeds)
        for each, other in ((a, "b"), (a, "c"), (b, "c"), (c, "b")):
            await each.until("member_up", name=other)
        put = await c.until("put")
        assert (put["key"], put["value"]) == ("b'color'", "b'blue'")
        await a.until("put")
        b.process.kill()
        down = await a.until("member_down", name="b")
        await c.until("member_down", name="b")
        assert down["accuser"] in ("a", "c")
        c.process.send_signal(signal.SIGTERM)
        with trio.fail_after(10):
            assert await c.process.wait() == 0
        assert (await c.until("leave_done"))["acked"] == 1
        await a.until("left", name="c")
        assert not any(line["event"] == "suspected" and line["name"] == "c" for line in a.lines)
        a.process.send_signal(signal.SIGINT)
        with trio.fail_after(10):
            assert await a.process.wait() == 0


async def test_a_taken_name_ends_with_its_own_exit_code() -> None:
    async with starter() as start:
        a = await start("a")
        elder = await start("b", "--seeds", f"127.0.0.1:{a.port}")
        await a.until("member_up", name="b")
        await trio.sleep(1.1)  # births are counted in whole seconds
        younger = await start("b", "--seeds", f"127.0.0.1:{a.port}")
        with trio.fail_after(10):
            assert await younger.process.wait() == EXIT_CONFLICT
        assert elder.process.poll() is None


async def test_tls_without_a_secret_joins_and_a_plain_one_does_not(tmp_path: Path) -> None:
    ca = trustme.CA()
    files = make_tls(tmp_path, ca, "mesh.local").files
    tls = (
        "--tls-ca",
        files.ca,
        "--tls-cert",
        files.certificate,
        "--tls-key",
        files.key,
        "--tls-name",
        "mesh.local",
    )
    async with starter() as start:
        a = await start("a", *tls)
        b = await start("b", *tls, "--seeds", f"127.0.0.1:{a.port}", "--status-interval", "0.2")
        plain = await start("p", "--seeds", f"127.0.0.1:{a.port}")
        await a.until("member_up", name="b")
        status = await b.until("status", alive=2)
        assert status["state"] == "alive"
        assert (await b.until("peer", name="a"))["is_protected"] is True
        await plain.until("stream_failed")
        assert not any(line["event"] == "member_up" for line in plain.lines)
        assert not any(line.get("name") == "p" for line in a.lines)


def test_wrong_flags_exit_with_two_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--name", "a:b"], "no ':'"),
        (["--name", "a", "--secret", "short"], "16 bytes"),
        (["--name", "a", "--secret", f"@{tmp_path}/none"], "cannot read"),
        (["--name", "a", "--tls-ca", "x"], "go together"),
        (["--name", "a", "--seeds", "b:c"], "no port"),
        (["--name", "a", "--advertise", "0.0.0.0", "--port", "0"], "nobody can dial"),
        (["--name", "a", "--host", "192.0.2.77", "--port", "0"], "cannot listen"),
    ):
        assert main(flags) == EXIT_SETTINGS
        assert words in capsys.readouterr().err


def test_a_keyring_file_has_one_secret_per_line(tmp_path: Path) -> None:
    from mesh.__main__ import _secrets

    file = tmp_path / "keys"
    file.write_text(f"{SECRET}\n\n  second secret of 16 bytes \n")
    assert _secrets(f"@{file}") == (SECRET.encode(), b"second secret of 16 bytes")
    assert _secrets("") == ()
