"""The demo ends well: its own checks (no request failed, nothing still counted) are the assertions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent


def test_the_demo_loses_an_engine_and_no_request() -> None:
    command = [sys.executable, "scripts/demo_story.py"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No request failed." in done.stdout
