"""Coverage-guided fuzzing of the HTTP/1.1 machines, by hand: `python tests/fuzz/fuzz_http1.py [-max_total_time=60]`.

Runs until a machine breaks a promise of `http1_machines`; then the bytes are printed and kept as `crash-*`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["smg.wire.http1", "smg.wire.headers", "smg.net.upstream"]):
    from tests.fuzz import http1_machines as machines


def one(data: bytes) -> None:
    """The first byte chooses the machine, the second where the input is cut."""
    if len(data) < 3:
        return
    machine = (machines.read_requests, machines.read_chunks, machines.read_answers)[data[0] % 3]
    text = data[2:]
    machine(text, data[1] * len(text) // 255)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
