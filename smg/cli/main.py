"""The word `smg` and the words after it: finds the command, hands it its arguments, turns mistakes into exit codes.

Owns the table of subcommands and the exit codes of CLI-6: 0 done, 1 a configuration or an attempt that cannot work, 2 wrong
syntax, 130 interrupted. It loads a room only when its command runs, so that `smg --version` answers at once and `--help` needs
no engine (CLI-3); it must never contain what a command does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from smg import __version__

_LAUNCH_WORDS = ("launch", "start")
_LATER_COMMANDS: tuple[str, ...] = ()
_MODULES = {
    "engine": "smg.lab.engine",
    "simulate": "smg.lab.simulate_command",
    "workers": "smg.cli.remote",
    "route": "smg.cli.route",
    "mesh": "smg.cli.mesh_command",
    "usage": "smg.cli.usage_command",
}
_SUMMARIES = {
    "launch": "start a gateway node (also: start, or no command at all)",
    "engine": "start a simulated OpenAI-compatible engine with a KV cache",
    "simulate": "replay a trace through the real policies",
    "workers": "list, add and remove the workers of a running gateway",
    "route": "explain where a running gateway would send a request, and why",
    "mesh": "show the mesh as a running gateway sees it, and leave it",
    "usage": "show what each tenant has used of each model",
    "doctor": "check a configuration and the reachability of its workers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"smg {__version__}")
        return 0
    try:
        return _command(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ValueError as wrong:
        from smg.errors import SettingsError

        if not isinstance(wrong, SettingsError):
            raise
        print(f"smg: error: {wrong}", file=sys.stderr)
        return 1 if wrong.is_combination else 2


def available_commands() -> dict[str, str]:
    """The commands of this installation, each with what it does; one whose module is not here is not among them."""
    return {
        name: summary for name, summary in _SUMMARIES.items() if name not in _MODULES or _has(_MODULES[name])
    }


def _command(arguments: list[str]) -> int:
    word = arguments[0] if arguments else "--"
    if word.startswith("-"):
        return _launch(arguments, "smg")
    rest = arguments[1:]
    if word in _LAUNCH_WORDS:
        return _launch(rest, f"smg {word}")
    if word == "doctor":
        from smg.cli.doctor import main as examine

        return examine(rest)
    if word in _MODULES and _has(_MODULES[word]):
        return _run_module(word, rest)
    return _refuse_command(word)


def _launch(arguments: list[str], prog: str) -> int:
    import os

    from smg.cli.flags import Given, launch_parser, parse

    if any(word in ("-h", "--help") for word in arguments):
        parser = launch_parser(prog)
        if prog == "smg":
            parser.usage = "smg [flags]\n       smg COMMAND [flags]"
            parser.description = "Commands:\n" + "\n".join(
                f"  {name:<10}{summary}" for name, summary in available_commands().items()
            )
        parser.print_help()
        return 0
    settings = parse(arguments, os.environ, prog=prog)
    import trio

    from smg.cli.place import place_of_environment

    place = place_of_environment(os.environ)
    if settings.listening.processes > 1:
        from smg.cli.supervisor import supervise

        return trio.run(supervise, settings, tuple(arguments), place)
    from smg.cli.serve import serve

    return trio.run(serve, settings, Given(tuple(arguments), dict(os.environ)), place)


def _run_module(word: str, arguments: list[str]) -> int:
    from importlib import import_module

    from smg.cli.flags import Parser, read_arguments

    module = import_module(_MODULES[word])
    parser = Parser(prog=f"smg {word}", description=f"{_SUMMARIES[word].capitalize()}.")
    module.add_arguments(parser)
    run: Callable[[object], int] = module.main
    return run(read_arguments(parser, arguments))


def _refuse_command(word: str) -> int:
    from smg.cli.flags import did_you_mean
    from smg.settings_flag import NOT_SUPPORTED

    known = available_commands()
    if word in _LATER_COMMANDS or word in _MODULES:
        reason = NOT_SUPPORTED
    else:
        reason = f"unknown command{did_you_mean(word, known)} (commands: {', '.join(known)})"
    print(f"smg: error: {word!r}: {reason}", file=sys.stderr)
    return 2


def _has(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
