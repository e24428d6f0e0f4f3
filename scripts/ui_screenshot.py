"""Takes the picture of the page `/ui` that README.md and docs/operate/ui.md show: three nodes, six simulated engines, some traffic.

Owns nothing that stays: processes and browser end with it. `scripts/ui_screenshot.py` writes docs/pictures/ui.png;
`--all FOLDER` writes the page at several widths, light and dark, for whoever changes it. Needs a Chromium (see
tests/e2e/browser.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.e2e.browser import Page, running_browser  # noqa: E402
from tests.e2e.process import free_ports  # noqa: E402

PICTURE = ROOT / "docs" / "pictures" / "ui.png"
PICTURE_BYTES_MAX = 300_000
MODEL = "llama-3.3-70b"
NODES = 3
ENGINES = 6
TALKERS = 40
ASSISTANTS = 5
TURNS = 8
SECONDS = 75.0
"""Until the headline numbers, which look back a minute, are about this traffic alone."""
STARTS_WITHIN_S = 20.0
WORDS = (
    "amber",
    "birch",
    "cloud",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "juniper",
    "kelp",
    "larch",
)

LOOKS: tuple[tuple[str, int, int, float, bool], ...] = (
    ("wide-light", 1440, 1000, 1, False),
    ("wide-dark", 1440, 1000, 1, True),
    ("tablet-light", 820, 1180, 1, False),
    ("phone-light", 390, 844, 2, False),
    ("phone-dark", 390, 844, 2, True),
)  # fmt: skip
"""Name, width, height, scale, dark."""


@asynccontextmanager
async def processes(commands: Sequence[Sequence[str]]) -> AsyncIterator[None]:
    """Runs these commands of `smg` until the block ends."""
    running = [
        await trio.lowlevel.open_process([sys.executable, "-m", "smg", *command], stdout=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
        with trio.CancelScope(shield=True):
            for process in running:
                await process.wait()


def commands_of(ports: Sequence[int]) -> list[list[str]]:
    """The engines and the nodes; `ports` are those of the engines, then three of each node: serving, metrics, mesh."""
    engines, nodes = ports[:ENGINES], ports[ENGINES:]
    quiet = ("--log-level", "error")
    commands = [["engine", "--port", *map(str, engines), "--model", MODEL, "--kv-blocks", "1100"]]
    for place in range(NODES):
        serving, metrics, mesh = nodes[3 * place : 3 * place + 3]
        command = [
            "--port",
            str(serving),
            "--prometheus-port",
            str(metrics),
            "--mesh-port",
            str(mesh),
            *quiet,
        ]
        command += [
            "--host",
            "127.0.0.1",
            "--ha-mesh",
            "--mesh-host",
            "127.0.0.1",
            "--node-name",
            f"gw-{place + 1}",
        ]
        if place:
            command += ["--seeds", f"127.0.0.1:{nodes[2]}"]
        else:
            command += ["--worker-urls", *(f"http://127.0.0.1:{port}" for port in engines)]
        commands.append(command)
    return commands  # fmt: skip


async def wait_ready(port: int) -> None:
    """Returns when a node can serve."""
    with trio.fail_after(STARTS_WITHIN_S):
        while True:
            try:
                answer = await ask(port, b"GET /readiness HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            except OSError:
                answer = b""
            if answer.startswith(b"HTTP/1.1 200"):
                return
            await trio.sleep(0.05)


async def ask(port: int, request: bytes) -> bytes:
    """The whole answer to a request that asks for a close."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        return b"".join([piece async for piece in stream])


async def talk(rng: Random, serving: Sequence[int]) -> None:
    """One conversation after the other; each question goes to any node and carries all that was said before it."""

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    await trio.sleep(rng.random() * 4)
    while True:
        system = f"You are assistant {rng.randrange(ASSISTANTS)}. " * 60
        messages = [{"role": "system", "content": system}, {"role": "user", "content": words(900)}]
        for _ in range(TURNS):
            body = json.dumps({"model": MODEL, "messages": messages, "stream": True, "max_tokens": rng.randint(12, 48),
                               "stream_options": {"include_usage": True}}).encode()  # fmt: skip
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            await ask(rng.choice(serving), head.encode() + body)
            messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": words(90)}]
            await trio.sleep(rng.uniform(0.2, 1.6))


async def take(page: Page, folder: Path | None) -> None:
    """Writes the pictures."""
    if folder is None:
        await page.look(1440, 1010)
        await trio.sleep(1.2)
        image = await page.picture()
        assert len(image) <= PICTURE_BYTES_MAX, f"{len(image)} bytes are too many for a README"
        PICTURE.write_bytes(image)
        return
    for name, width, height, scale, dark in LOOKS:
        await page.look(width, height, scale=scale, dark=dark)
        await trio.sleep(1.2)
        (folder / f"{name}.png").write_bytes(await page.picture(whole=True))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="write every look into this folder")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of traffic before the picture")
    arguments = parser.parse_args()
    if arguments.all is not None:
        arguments.all.mkdir(parents=True, exist_ok=True)
    trio.run(picture, arguments.all, arguments.seconds)


async def picture(folder: Path | None, seconds: float) -> None:
    """Runs the cluster, looks at it, and ends it."""
    ports = free_ports(ENGINES + 3 * NODES)
    serving, metrics = ports[ENGINES::3], ports[ENGINES + 1]
    async with processes(commands_of(ports)), running_browser() as browser, trio.open_nursery() as nursery:
        for port in serving:
            await wait_ready(port)
        page = await browser.page(f"http://127.0.0.1:{metrics}/ui")
        for place in range(TALKERS):
            nursery.start_soon(talk, Random(place), serving)
        await trio.sleep(seconds)
        await take(page, folder)
        print("\n".join(page.complaints) or "the browser did not complain")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    main()
