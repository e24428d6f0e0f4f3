"""The words after `smg`: which command runs, with what exit code, and what is not loaded (CLI-1, 3, 6, 13)."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

from smg import __version__
from smg.cli import main as main_module
from smg.cli.flags import Given
from smg.cli.main import available_commands, main
from smg.cli.place import Place
from smg.settings import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Settings]]:
    """The settings that reached the composition root, which is a fake that ends at once with exit code 7."""
    seen: list[Settings] = []

    async def serve(settings: Settings, given: Given, place: Place) -> int:
        assert given.settings() == settings
        assert not place.inherited.serving
        assert not place.notifier.is_heard
        seen.append(settings)
        return 7

    fake = types.ModuleType("smg.cli.serve")
    fake.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smg.cli.serve", fake)
    yield seen


def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_more_than_one_process_is_the_supervisors_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def supervise(settings: Settings, arguments: tuple[str, ...], place: Place) -> int:
        seen.append((settings.listening.processes, arguments))
        return 7

    fake = types.ModuleType("smg.cli.supervisor")
    fake.supervise = supervise  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smg.cli.supervisor", fake)
    assert main(["launch", "--processes", "3", "--port", "4000"]) == 7
    assert seen == [(3, ("--processes", "3", "--port", "4000"))]


@pytest.mark.parametrize("word", [[], ["launch"], ["start"]])
def test_launch_start_and_no_command_are_the_same(word: list[str], started: list[Settings]) -> None:
    assert main([*word, "--port", "1234", "--worker-urls", "http://a", "http://b"]) == 7
    assert started[0].listening.port == 1234
    assert started[0].workers.worker_urls == ("http://a", "http://b")


def test_a_gateway_without_workers_starts(started: list[Settings]) -> None:
    assert main([]) == 7
    assert started[0].workers.worker_urls == ()


def test_the_environment_reaches_the_settings(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMG_PORT", "4321")
    assert main(["launch"]) == 7
    assert started[0].listening.port == 4321


@pytest.mark.parametrize(
    "arguments", [["--version"], ["-V"], ["launch", "--version"], ["start", "-V"], ["--port", "1", "-V"]]
)
def test_version_is_printed_on_stdout(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr() == (f"smg {__version__}\n", "")


def test_python_m_smg_is_the_same_command() -> None:
    done = ran("-m", "smg", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"smg {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["launch", "--help"], ["start", "--port", "1", "-h"]]
)
def test_help_ends_well_and_lists_the_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "--retry-max-retries" in shown
    assert ("Commands:" in shown) == arguments[0].startswith("-")


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_load_no_engine_and_no_event_loop(flag: str) -> None:
    heavy = ["trio", "rich", "httptools", "smg.lab.engine", "smg.cli.serve", "smg.gateway"]
    if flag == "--version":
        heavy += ["argparse", "msgspec", "smg.settings", "smg.policies"]
    code = f"import sys; from smg.cli.main import main; main([{flag!r}]); print([m for m in {heavy!r} if m in sys.modules])"
    assert ran("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--port", "70000"], 2, "smg: error: --port: '70000': must be between 1 and 65535"),
        (
            ["launch", "--history-backend=redis"],
            2,
            "smg: error: --history-backend: not supported by this release",
        ),
        (["--service-discovery"], 1, "smg: error: --service-discovery: needs --discovery-file"),
        (["--no-such-flag"], 2, "smg: error: --no-such-flag: unknown flag"),
        (["lanch"], 2, "smg: error: 'lanch': unknown command; did you mean launch?"),
        (["workers", "frob"], 2, "smg: error: VERB: invalid choice"),
        (["doctor", "--prot"], 2, "smg: error: --prot: unknown flag; did you mean --port?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_starts_nothing(
    arguments: list[str], code: int, line: str, started: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1
    assert started == []


def test_a_command_whose_room_is_not_here_is_absent_from_help_and_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(main_module._MODULES, "simulate", "smg.lab.no_such_room")
    assert "simulate" not in available_commands()
    assert main(["simulate"]) == 2
    assert "not supported by this release" in capsys.readouterr().err
    monkeypatch.setitem(main_module._MODULES, "simulate", "smg.no_such_floor.room")
    assert "simulate" not in available_commands()


def test_a_command_in_a_room_of_its_own_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    room = types.ModuleType("smg.cli.fake_room")
    room.add_arguments = lambda parser: parser.add_argument("--seed", type=int)  # type: ignore[attr-defined]
    room.main = lambda given: given.seed + 1  # type: ignore[attr-defined]
    room.__spec__ = types.SimpleNamespace(name="smg.cli.fake_room")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "smg.cli.fake_room", room)
    monkeypatch.setitem(main_module._MODULES, "simulate", "smg.cli.fake_room")
    assert "simulate" in available_commands()
    assert main(["simulate", "--seed", "3"]) == 4
    assert main(["simulate", "--sed", "3"]) == 2


def test_an_interrupt_before_the_gateway_runs_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "_command", interrupted)
    assert main(["launch"]) == 130


def test_a_bug_is_not_taken_for_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(main_module, "_command", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["launch"])
