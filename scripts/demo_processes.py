"""The processes of the demo: engines and a gateway, started as anybody would start them, ended together.

Owns every process it starts and their logs under .demo/. It must never leave one behind.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

START_S = 30.0
STOP_S = 10.0
LOGS = Path(".demo")
SMG = (sys.executable, "-m", "smg")


class Processes:
    """Everything that runs; leaving the `with` block ends it."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._engines = 0
        LOGS.mkdir(exist_ok=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The gateway started last and ends first, so that it has no reason to complain of lost engines.
        for process in reversed(self._running.values()):
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_engine(self, *flags: str) -> str:
        """A simulated engine on a port that the system chooses; its URL."""
        self._engines += 1
        log = (LOGS / f"engine-{self._engines}.log").open("w")
        command = (*SMG, "engine", "--port", "0", *flags)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self._running[f"engine {self._engines}"] = process
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.strip().rpartition(" ")[2]
        if not url.startswith("http"):
            raise RuntimeError(f"the engine did not start: {said!r}, see {log.name}")
        self._running[url] = self._running.pop(f"engine {self._engines}")
        return url

    def start_gateway(self, *flags: str) -> str:
        """A gateway on free ports; its URL, when it listens."""
        port, metrics_port = free_ports(2)
        log = LOGS / "gateway.log"
        command = (
            *SMG, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port),
            # The demo is over when it is over: no load balancer has to notice first.
            "--shutdown-grace-period-secs", "1", *flags,
        )  # fmt: skip
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, text=True)
        url = f"http://127.0.0.1:{port}"
        self._running[url] = process
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return url
            time.sleep(0.05)
        raise RuntimeError(f"the gateway did not start:\n{log.read_text()}")

    def kill(self, url: str) -> None:
        """Ends the process behind a URL at once, as a crash would."""
        process = self._running.pop(url)
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on right now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
