"""The generated reference is the one in the repository, and names everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from smg.settings import FIELDS

HOUSE = Path(__file__).resolve().parents[3]


def test_the_reference_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(HOUSE / "scripts" / "reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_settings_page_names_every_flag_and_variable_once() -> None:
    rows = [
        line.split("|")
        for line in (HOUSE / "docs/reference/settings.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `--")
    ]
    assert [row[2].strip() for row in rows] == [f"`{field.env_name}`" for field in FIELDS]
    for row, field in zip(rows, FIELDS, strict=True):
        assert all(f"`{name}`" in row[1] for name in field.flag_names)
        assert row[5].strip()
