"""What a node loads and refuses for the sake of keys and certificates, seen from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_BUILD = """
import sys
from random import Random
from smg.cli.flags import Given
from smg.cli.node import Node
from smg.net.readiness import Readiness
import trio

async def main():
    given = Given(tuple(sys.argv[1:]), {})
    Node(given.settings(), Readiness(), Random(1), given)

trio.run(main)
print(*sorted({"joserfc"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "flags",
    [
        ("--api-key", "k", "--tenant-api-key", "red:r", "--control-plane-api-keys", "o:n:admin:k2"),
        ("--jwt-issuer", "https://idp.example", "--jwt-audience", "smg"),
    ],
)
def test_a_node_loads_no_library_of_tokens_before_it_runs(flags: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, *flags], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (
            ("--tls-cert-path", "{0}/none.pem", "--tls-key-path", "{0}/none.key"),
            1,
            "--tls-cert-path: '{0}/none.pem': No such file",
        ),
        (("--tls-cert-path", "{0}/none.pem"), 1, "--tls-cert-path: '{0}/none.pem': needs --tls-key-path"),
        (("--ca-cert-paths", "{0}/none.pem"), 1, "--ca-cert-paths: '{0}/none.pem': No such file"),
        (("--jwt-issuer", "https://idp"), 1, "--jwt-issuer: 'https://idp': needs --jwt-audience"),
        (("--jwt-issuer", "idp"), 2, "--jwt-issuer: 'idp': must begin with http:// or https://"),
        (("--jwt-audience", "smg"), 1, "--jwt-audience: 'smg': needs --jwt-issuer"),
        (("--tenant-api-key", "secret-1"), 2, "--tenant-api-key: ***: must be TENANT:KEY"),
        (
            ("--tenant-api-key", "a:secret-1", "b:secret-1"),
            1,
            "--tenant-api-key: 'b': has the key of tenant a too",
        ),
        (
            ("--api-key", "secret-1", "--tenant-api-key", "a:secret-1"),
            1,
            "--tenant-api-key: 'a': has the key of --api-key too",
        ),
        (
            ("--control-plane-api-keys", "a:b:root:secret-1"),
            2,
            "--control-plane-api-keys: ***: the role must be one of admin, user",
        ),
        (
            ("--control-plane-api-keys", "a:b:user:secret-1", "a:b:admin:secret-2"),
            1,
            "--control-plane-api-keys: 'a': is the id of two keys",
        ),
        (
            ("--api-key", "secret-1", "--control-plane-api-keys", "a:b:user:secret-1"),
            1,
            "--control-plane-api-keys: 'a': is the key of --api-key too",
        ),
    ],
)
def test_cli_6_what_cannot_work_ends_the_start_in_one_line(
    tmp_path: Path, flags: tuple[str, ...], code: int, words: str
) -> None:
    arguments = [flag.format(tmp_path) for flag in flags]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "smg",
            "--port",
            "1",
            *arguments,
        ],  # a port that is not ours: it must not come that far
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code
    assert done.stderr.startswith(f"smg: error: {words.format(tmp_path)}") and done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
