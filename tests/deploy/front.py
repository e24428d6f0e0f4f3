"""Three real nodes in front of simulated engines, and the load balancers of `deploy/` in front of them.

Owns the processes and the places that the files of `deploy/` leave to the operator: addresses, ports, folders. Nothing else of
those files is changed, so what a test shows holds for what is shipped.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from tests.deploy.load import Browser, Failed
from tests.e2e.process import command, free_ports

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NODES = ("a", "b", "c")
GRACE_S = 3.0
"""Half of it is the time between SIGTERM and the closing of the port, which in production is 5 s."""

STARTS_WITHIN_S = 20.0


def found(program: str) -> str:
    """Where a program is; a missing one fails the test."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.fail(f"{program} is missing: ./scripts/test installs it", pytrace=False)
    return path


def replaced(text: str, changes: dict[str, str]) -> str:
    """The text with every key of `changes`, each of which must occur, replaced."""
    for old, new in changes.items():
        assert old in text, f"the file does not say {old!r} any more"
        text = text.replace(old, new)
    return text


async def answers(port: int, path: str, status: int = 200, host: str = "127.0.0.1") -> None:
    """Waits until somebody answers so."""
    with trio.fail_after(STARTS_WITHIN_S):
        while True:
            browser = Browser(host, port)
            try:
                if (await browser.ask("GET", path)).status == status:
                    return
            except Failed:
                pass
            finally:
                browser.leave()
            await trio.sleep(0.02)


class Program:
    """A process whose output is kept for the message of a failing test."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self.output = output

    async def wait(self, within_s: float) -> int:
        with trio.fail_after(within_s):
            while (code := self.process.poll()) is None:
                await trio.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def start(
    folder: Path, name: str, words: Sequence[str], environment: dict[str, str] | None = None
) -> Program:
    """Starts a program; its output goes to `folder`. The environment is ours without settings of smg, or the given one."""
    output = folder / f"{name}.log"
    if environment is None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SMG_")}
    with output.open("ab") as file:
        process = subprocess.Popen(
            list(words), stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment
        )
    return Program(process, output)


class Site:
    """Engines, nodes and what stands in front of them; everything ends with `close`."""

    def __init__(self, folder: Path, engines: int = 3) -> None:
        self.folder = folder
        self.programs: dict[str, Program] = {}
        # One list of free ports for all, so that no two get the same.
        ports = free_ports(engines + 3 * len(NODES) + 4)
        self.engine_ports = ports[:engines]
        rest = iter(ports[engines:])
        self.ports = {name: next(rest) for name in NODES}
        self.metrics_ports = {name: next(rest) for name in NODES}
        self.mesh_ports = {name: next(rest) for name in NODES}
        self.haproxy_port, self.haproxy_figures_port, self.nginx_port, _ = rest

    def start_engines(self, *flags: str) -> None:
        ports = [str(port) for port in self.engine_ports]
        self.programs["engines"] = start(self.folder, "engines", command("engine", "--port", *ports, *flags))

    def start_node(self, name: str) -> None:
        seeds = [f"127.0.0.1:{port}" for port in self.mesh_ports.values()]
        workers = [f"http://127.0.0.1:{port}" for port in self.engine_ports]
        self.programs[name] = start(
            self.folder,
            name,
            command(
                *("--host", "127.0.0.1", "--port", str(self.ports[name])),
                *("--prometheus-port", str(self.metrics_ports[name]), "--node-name", name),
                *("--ha-mesh", "--mesh-host", "127.0.0.1", "--mesh-port", str(self.mesh_ports[name])),
                *("--seeds", *seeds, "--shutdown-grace-period-secs", str(GRACE_S)),
                *("--worker-urls", *workers),
            ),
        )

    async def node_ready(self, name: str) -> None:
        await answers(self.ports[name], "/readiness")

    async def start_all(self) -> None:
        self.start_engines("--prefill-tokens-per-second", "1000000")
        for port in self.engine_ports:
            await answers(port, "/health")
        for name in NODES:
            self.start_node(name)
        for name in NODES:
            await self.node_ready(name)

    async def start(self) -> None:
        """Engines, nodes, both load balancers; returns when requests pass through both."""
        await self.start_all()
        await self.start_haproxy()
        await self.start_nginx()

    async def held(self, name: str) -> int:
        """The inference requests that a node holds now, as it says itself."""
        browser = Browser("127.0.0.1", self.metrics_ports[name])
        page = (await browser.ask("GET", "/metrics")).body.decode()
        browser.leave()
        (value,) = re.findall(r"^smg_admission_inflight (\S+)$", page, re.MULTILINE)
        return int(float(value))

    def blamed(self) -> dict[str, set[str]]:
        """For each load balancer, the nodes that by its log have dropped a request which they had been sent."""
        lines = (self.folder / "haproxy.log").read_text()
        by_haproxy = set(re.findall(r" nodes/(\w+) \S+ -?\d+ \d+ - - S\S{3} ", lines))
        names = {str(port): name for name, port in self.ports.items()}
        by_nginx = {
            names[port]
            for line in (self.folder / "nginx" / "error.log").read_text().splitlines()
            if "[error]" in line and "while connecting" not in line
            for port in re.findall(r'upstream: "http://127\.0\.0\.1:(\d+)/', line)
        }
        return {"haproxy": by_haproxy, "nginx": by_nginx}

    def kill_node(self, name: str) -> None:
        """As the kernel ends it when memory is short."""
        self.programs[name].kill()

    async def stop_node(self, name: str) -> None:
        """As an init system stops it."""
        program = self.programs[name]
        program.process.send_signal(signal.SIGTERM)
        code = await program.wait(GRACE_S + 10)
        assert code == 0, program.output.read_text()[-2000:]

    async def start_haproxy(self) -> None:
        program = found("haproxy")
        changes = {
            f"10.0.0.{11 + place}:30000": f"127.0.0.1:{self.ports[name]}" for place, name in enumerate(NODES)
        }
        changes |= {
            "bind :80": f"bind 127.0.0.1:{self.haproxy_port}",
            "bind 127.0.0.1:8404": f"bind 127.0.0.1:{self.haproxy_figures_port}",
            "/run/haproxy/admin.sock": str(self.folder / "admin.sock"),
        }
        text = replaced((DEPLOY / "haproxy.cfg").read_text(), changes)
        if os.geteuid():
            text = re.sub(r"^    (user|group) haproxy\n", "", text, flags=re.MULTILINE)
        config = self.folder / "haproxy.cfg"
        config.write_text(text)
        check = subprocess.run([program, "-c", "-f", str(config)], capture_output=True, text=True)
        assert check.returncode == 0 and "WARNING" not in check.stderr, check.stderr
        self.programs["haproxy"] = start(self.folder, "haproxy", [program, "-db", "-f", str(config)])
        await answers(self.haproxy_port, "/readiness")

    async def start_nginx(self) -> None:
        program = found("nginx")
        logs = self.folder / "nginx"
        logs.mkdir()
        changes = {
            f"10.0.0.{11 + place}:30000": f"127.0.0.1:{self.ports[name]}" for place, name in enumerate(NODES)
        }
        changes |= {
            "listen 80 ": f"listen 127.0.0.1:{self.nginx_port} ",
            "/run/nginx.pid": str(logs / "pid"),
            "/var/log/nginx": str(logs),
        }
        text = replaced((DEPLOY / "nginx.conf").read_text(), changes)
        if os.geteuid():
            text = text.replace("user www-data;\n", "")
        config = self.folder / "nginx.conf"
        config.write_text(text)
        words = [
            program,
            "-e",
            str(logs / "start.log"),
            "-p",
            str(logs),
            "-c",
            str(config),
            "-g",
            "daemon off;",
        ]
        check = subprocess.run([*words, "-t"], capture_output=True, text=True)
        assert check.returncode == 0 and "[warn]" not in check.stderr, check.stderr
        self.programs["nginx"] = start(self.folder, "nginx", words)
        await answers(self.nginx_port, "/readiness")

    def close(self) -> None:
        """Ends everything, what stands in front first; workers of nginx go with their master."""
        for name in ("nginx", "haproxy", *NODES, "engines"):
            program = self.programs.get(name)
            if program is None:
                continue
            if name == "nginx" and program.process.poll() is None:
                program.process.terminate()
                try:
                    program.process.wait(3)
                except subprocess.TimeoutExpired:
                    pass
            program.kill()
