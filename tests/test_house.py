"""The laws of the house that an import checker cannot see: sizes, docstrings, machines that never wait, names of rooms.

Owns the walk over every Python file of the repository and one test per law. Which rooms are machines is read from the
contracts in `pyproject.toml`, so that the two checkers cannot disagree. It must never know what a room does.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
DOCSTRING_WORDS_MIN = 6
"""With fewer, a docstring can only repeat the file's name. Tests, whose names are sentences, may be half as talkative."""

CODE_FOLDERS = ("smg", "mesh", "tests", "scripts")
TEXT_FOLDERS = (*CODE_FOLDERS, "docs", "deploy", ".ci")
TEXT_SUFFIXES = {
    "", ".py", ".md", ".toml", ".svg", ".yaml", ".yml", ".sh", ".json", ".service", ".txt", ".html", ".css", ".js",
}  # fmt: skip

WAITING_MODULES = {
    "anyio", "asyncio", "concurrent", "logging", "multiprocessing", "select", "selectors", "signal", "socket",
    "ssl", "subprocess", "threading", "time", "trio", "smg.net", "smg.telemetry",
}  # fmt: skip
"""What a machine must not import: each of these waits, reads a clock, or speaks to the world outside."""

CHANCE_MODULES = {"secrets", "uuid.uuid1", "uuid.uuid4"}
CLOCK_CALLS = {"now", "utcnow", "today"}
OUTSIDE_CALLS = {"open", "input", "print", "exec", "eval", "breakpoint"}

PATTERN_WORDS = {
    "manager", "handler", "helper", "helpers", "util", "utils", "common", "misc", "base", "context", "data",
    "info", "object", "processor", "core", "stuff", "new", "old", "tmp",
}  # fmt: skip
"""Words that say how a room is made or nothing at all; a room that needs one has not found its noun (docs/style.md)."""

UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
HOMES = ("root", "home", "Users")
PLACES_OF_ONE_MACHINE = re.compile(rf"/(?:{'|'.join(HOMES)})/\w|{re.escape(str(HOUSE))}/")
"""Home folders, and wherever this copy of the project lies."""
REGISTRIES = re.compile(
    "|".join((r"\bpypi" + r"\.org", r"pythonhosted" + r"\.org", r"npmjs" + r"\.(org|com)", r"proxy\.golang"))
)


@cache
def _project() -> dict[str, object]:
    return tomllib.loads((HOUSE / "pyproject.toml").read_text())


def _contract(name: str) -> dict[str, list[str]]:
    tool = _project()["tool"]
    assert isinstance(tool, dict)
    (found,) = [each for each in tool["importlinter"]["contracts"] if each["name"] == name]
    return found  # type: ignore[no-any-return]


def _python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((HOUSE / folder).rglob("*.py")):
            if "__pycache__" not in path.parts and "pb" not in path.parts:
                yield path


def _text_files() -> Iterator[Path]:
    tops = [path for path in HOUSE.iterdir() if path.is_file()]
    inside = [path for folder in TEXT_FOLDERS for path in (HOUSE / folder).rglob("*") if path.is_file()]
    for path in sorted(tops + inside):
        hidden = {part for part in path.relative_to(HOUSE).parts if part.startswith(".") and part != ".ci"}
        if path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts and not hidden:
            yield path


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def _place(path: Path, line: int | None = None) -> str:
    return f"{path.relative_to(HOUSE)}" + (f":{line}" if line else "")


def _module_name(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _machine_files() -> list[Path]:
    machines = _contract("Machines never wait")["source_modules"]
    mesh = _contract("The machines of the mesh never wait")
    waiting = {line.split(" -> ")[0] for line in mesh["ignore_imports"]}
    found = []
    for path in _python_files("smg", "mesh"):
        name = _module_name(path)
        is_smg_machine = any(name == room or name.startswith(room + ".") for room in machines)
        is_mesh_machine = name.startswith("mesh.") and not any(fnmatch(name, room) for room in waiting)
        if is_smg_machine or is_mesh_machine:
            found.append(path)
    return found


def _none(faults: list[str]) -> None:
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def test_no_file_is_longer_than_the_wall() -> None:
    faults = []
    for path in _python_files(*CODE_FOLDERS):
        lines = len(path.read_bytes().splitlines())
        if lines > FILE_LINES_MAX:
            faults.append(
                f"{_place(path)}: {lines} lines, the wall is at {FILE_LINES_MAX}: find the second room"
            )
    _none(faults)


def test_no_function_is_longer_than_a_screen() -> None:
    faults = []
    for path in _python_files(*CODE_FOLDERS):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    faults.append(
                        f"{_place(path, node.lineno)}: {node.name} has {lines} lines, {FUNCTION_LINES_MAX} is most"
                    )
    _none(faults)


def test_every_file_says_what_it_is_for() -> None:
    faults = []
    for path in _python_files(*CODE_FOLDERS):
        if (
            path.name == "__init__.py"
            and path.is_relative_to(HOUSE / "tests")
            and not path.read_bytes().strip()
        ):
            continue
        text = ast.get_docstring(_tree(path)) or ""
        is_test = path.is_relative_to(HOUSE / "tests")
        if len(text.split()) < DOCSTRING_WORDS_MIN // (1 + is_test):
            faults.append(f"{_place(path)}: the first lines do not say what this room is for: {text!r}")
    _none(faults)


def test_the_rooms_that_must_not_wait_are_found() -> None:
    names = {_module_name(path) for path in _machine_files()}
    assert {
        "smg.errors",
        "smg.fleet.registry",
        "smg.policies.least_load",
        "mesh.swim",
        "mesh.replica",
    } <= names
    assert not {"mesh", "smg.net.server", "smg.gateway.app", "smg.cli.main"} & names


@pytest.mark.parametrize("path", _machine_files(), ids=_place)
def test_a_machine_does_not_wait_read_clocks_or_draw_lots(path: Path) -> None:
    _none([f"{_place(path, line)}: {what}" for line, what in faults_of_a_machine(_tree(path))])


def faults_of_a_machine(tree: ast.Module) -> list[tuple[int, str]]:
    """What in this module a machine must not do, by line."""
    faults: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        match node:
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                faults.append((node.lineno, "waits"))
            case ast.Import(names=names):
                for name in names:
                    faults += _faults_of_import(node.lineno, name.name, [])
            case ast.ImportFrom(module=str(module), names=names, level=0):
                faults += _faults_of_import(node.lineno, module, [name.name for name in names])
            case ast.Call(func=ast.Name(id=name)) if name in OUTSIDE_CALLS:
                faults.append((node.lineno, f"calls {name}()"))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="datetime" | "date"), attr=name)) if (
                name in CLOCK_CALLS
            ):
                faults.append((node.lineno, f"reads a clock: {name}()"))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="random"), attr=name)) if name != "Random":
                faults.append((node.lineno, f"draws from the one generator of the process: random.{name}()"))
            case ast.Attribute(value=ast.Name(id="uuid"), attr="uuid1" | "uuid4" as name):
                faults.append((node.lineno, f"draws lots: uuid.{name}"))
            case ast.Attribute(value=ast.Name(id="os"), attr="urandom" | "environ" | "getenv" as name):
                faults.append((node.lineno, f"asks the system: os.{name}"))
    for statement in tree.body:
        for node in ast.walk(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Random", "random.Random"):
                faults.append((node.lineno, "keeps a generator of its own; it must be handed in"))
    return faults


def _faults_of_import(line: int, module: str, names: list[str]) -> list[tuple[int, str]]:
    top = module.partition(".")[0]
    reached = {top, module, *(f"{module}.{name}" for name in names)}
    faults = [(line, f"imports {name}") for name in sorted(reached & WAITING_MODULES)]
    faults += [(line, f"imports {name}, which draws lots") for name in sorted(reached & CHANCE_MODULES)]
    if module == "random" and set(names) - {"Random"}:
        faults.append((line, "imports the one generator of the process; take a Random instead"))
    return faults


@pytest.mark.parametrize(
    "text",
    [
        "async def wait(): ...",
        "import trio",
        "import time as clock",
        "from time import monotonic",
        "from concurrent.futures import Future",
        "import logging.config",
        "from smg.net import server",
        "from random import choice",
        "import random\nrandom.shuffle([])",
        "from random import Random\n_RNG = Random()",
        "import datetime\ndatetime.now()",
        "import os\nos.urandom(3)",
        "import secrets",
        "import uuid\nuuid.uuid4()",
        "from uuid import uuid4",
        "def read(): return open('x')",
    ],
)
def test_the_checker_of_machines_sees(text: str) -> None:
    assert faults_of_a_machine(ast.parse(text))


def test_the_checker_of_machines_lets_a_machine_through() -> None:
    text = (
        "from random import Random\nfrom math import inf\n"
        "def choose(rng: Random, now: float) -> float:\n    return rng.random() + now\n"
    )
    assert not faults_of_a_machine(ast.parse(text))


def test_nothing_is_left_unfinished() -> None:
    _none(_places_matching(UNFINISHED))


def test_no_path_of_one_machine_and_no_registry_is_written_down() -> None:
    _none(_places_matching(PLACES_OF_ONE_MACHINE) + _places_matching(REGISTRIES))


def _places_matching(pattern: re.Pattern[str]) -> list[str]:
    faults = []
    for path in _text_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if found := pattern.search(line):
                faults.append(f"{_place(path, number)}: {found.group()!r}")
    return faults


def test_no_room_is_named_after_a_pattern() -> None:
    faults = []
    for path in _python_files(*CODE_FOLDERS):
        for part in path.relative_to(HOUSE).with_suffix("").parts:
            words = PATTERN_WORDS & set(part.split("_"))
            if words:
                faults.append(f"{_place(path)}: {words.pop()!r} says nothing about what lives there")
    _none(sorted(set(faults)))


def test_no_package_is_empty() -> None:
    faults = []
    for path in _python_files("smg", "mesh"):
        siblings = [each for each in path.parent.iterdir() if each.suffix == ".py" and each != path]
        if path.name == "__init__.py" and not siblings and not any(path.parent.glob("*/__init__.py")):
            faults.append(f"{_place(path)}: a room is created when something lives in it")
    _none(faults)


def test_every_folder_of_code_is_a_package() -> None:
    faults = []
    for path in _python_files("smg", "mesh", "tests"):
        if not (path.parent / "__init__.py").exists():
            faults.append(f"{_place(path.parent)}: no __init__.py")
    _none(sorted(set(faults)))


def test_tests_mirror_the_rooms_they_test() -> None:
    faults = []
    for path in _python_files("tests/smg"):
        room = path.parent.relative_to(HOUSE / "tests")
        if not (HOUSE / room).is_dir():
            faults.append(f"{_place(path)}: there is no room {room}")
    _none(sorted(set(faults)))


def test_the_house_is_described_as_it_stands() -> None:
    """docs/house.md names every folder of code, and no folder that is not there."""
    page = (HOUSE / "docs" / "house.md").read_text()
    named = set(re.findall(r"`((?:smg|mesh|tests)/(?:[a-z0-9_]+/)*)`", page))
    standing = {f"{_place(path.parent)}/" for path in _python_files("smg", "mesh", "tests")}
    standing = {folder for folder in standing if not folder.startswith("tests/smg/")}
    _none([f"docs/house.md does not know {folder}" for folder in sorted(standing - named)])
    _none(
        [
            f"docs/house.md tells of {folder}, which is not there"
            for folder in sorted(named - standing - {"tests/smg/"})
        ]
    )
