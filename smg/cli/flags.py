"""From what was typed, and what the environment says, to `Settings`, and back.

Owns the argument parser that is derived from `smg.settings`, the rules of precedence (command line, environment, default;
CLI-10), secrets in files, and the refusal of everything that would otherwise be ignored. It must never repeat a default or a
bound (they are in the declarations) and never start anything.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from smg import __version__
from smg.cli.later import LATER_ENV_NAMES, LATER_FLAGS
from smg.errors import SettingsError
from smg.settings import FIELDS, GROUPS, Settings
from smg.settings_flag import NOT_SUPPORTED, Field, Value, env_name, to_texts, to_value
from smg.settings_rules import check

POLICIES_OF_THE_CONTRACT = (
    "bucket",
    "cache_aware",
    "consistent_hashing",
    "least_load",
    "manual",
    "passthrough",
    "power_of_two",
    "prefix_hash",
    "random",
    "round_robin",
)
"""Names that are known words even while the policy is not in the table yet: they are refused as such (section 2)."""

SECRET_FILE_BYTES_MAX = 65_536
"""Longest secret file that is read: a key is a line; a longer file is the wrong file."""

_POLICY_FIELDS = ("policy", "prefill_policy", "decode_policy")
_SEPARATORS = re.compile(r"[,\s]+")
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)
_CONTRACT_ROWS = re.compile(r" \((?:[A-Z]+-[0-9]+(?:, )?)+\)")
_OFF_WORDS = frozenset({"", "0", "false", "no", "off"})
_METAVARS = {"seconds": "SECS", "milliseconds": "MS", "bytes": "BYTES"}

_EPILOG = """\
A list flag takes several values and may be repeated. Every flag can be given by the environment as SMG_<FLAG> in upper case
with underscores (a list separated by commas or spaces); the command line wins. A key may be given as @/path/to/file."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as one SettingsError instead of printing its usage, and guesses no names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError, with the flag first."""
        found = re.match(r"argument ([^/: ]*)[^:]*: (.*)", message, re.DOTALL)
        flag, reason = found.groups() if found else ("arguments", message)
        raise SettingsError(flag, "", reason.replace("\n", " "))


def policy_names() -> tuple[str, ...]:
    """The policies of this release, from the shelf itself."""
    from smg.policies import POLICIES

    return tuple(POLICIES)


def default_policy(policies: Collection[str]) -> str:
    """What `--policy` is when nobody says: cache_aware as soon as the shelf has it, until then least_load."""
    return "cache_aware" if "cache_aware" in policies else "least_load"


def launch_parser(prog: str = "smg", policies: Collection[str] | None = None) -> Parser:
    """The parser of `smg launch`: every setting once, in groups, each with its default (CLI-3)."""
    policies = policy_names() if policies is None else policies
    parser = Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description="Start a gateway node.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"smg {__version__}")
    for group, struct in GROUPS.items():
        section = parser.add_argument_group(group_title(struct))
        for field in FIELDS:
            if field.group == group:
                _add_field(section, field, policies)
    return parser


def group_title(struct: type[msgspec.Struct]) -> str:
    """What help and reference write over a group: the first line of its docstring without the full stop."""
    return (struct.__doc__ or "").partition("\n")[0].rstrip(".")


def public_doc(field: Field) -> str:
    """What help and reference say of a setting: its declaration without contract rows, with its choices and its unit."""
    doc = _CONTRACT_ROWS.sub("", field.flag.doc)
    if field.flag.choices:
        doc += f" One of {', '.join(field.flag.choices)}."
    if field.flag.unit and field.flag.unit not in _METAVARS:
        doc += f" In {field.flag.unit}."
    return doc


def parse(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    prog: str = "smg",
    policies: Collection[str] | None = None,
) -> Settings:
    """The settings that these arguments and this environment mean, checked (CLI-5, CLI-6, CLI-7, CLI-10).

    `policies` are the names of the shelf, read from it when not given. Raises SettingsError for the first mistake; prints and
    raises SystemExit(0) for --help and --version. Reads secret files, nothing else.
    """
    policies = policy_names() if policies is None else policies
    parser = launch_parser(prog, policies)
    return settings_from(read_arguments(parser, arguments), environment, policies)


def read_arguments(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, and refuse by name what the parser does not know. Raises SettingsError."""
    known, unknown = parser.parse_known_args(arguments)
    flags = [word for word in unknown if word.startswith("-") and word != "--"]
    if flags:
        flag = flags[0].partition("=")[0]
        if flag in LATER_FLAGS:
            raise SettingsError(flag, "", NOT_SUPPORTED)
        raise SettingsError(flag, "", "unknown flag" + did_you_mean(flag, parser._option_string_actions))
    if unknown:
        raise SettingsError("arguments", repr(unknown[0]), "belongs to no flag")
    return known


def settings_from(
    given: argparse.Namespace, environment: Mapping[str, str], policies: Collection[str]
) -> Settings:
    """The settings of parsed arguments over the environment over the defaults, checked. Raises SettingsError."""
    _refuse_later_variables(environment)
    groups: dict[str, dict[str, Value]] = {group: {} for group in GROUPS}
    for field in FIELDS:
        told = _told(field, getattr(given, field.name, None), environment)
        if told is None:
            if field.name == "policy":
                groups[field.group][field.name] = default_policy(policies)
            continue
        source, texts = told
        try:
            if field.flag.is_secret:
                texts = _read_secrets(field, texts, source)
            value = to_value(field, texts)
        except SettingsError as wrong:
            raise SettingsError(
                source, wrong.value, wrong.reason, is_combination=wrong.is_combination
            ) from None
        if field.name in _POLICY_FIELDS:
            _check_policy(source, str(value), policies)
        groups[field.group][field.name] = value
    made: dict[str, Any] = {group: GROUPS[group](**values) for group, values in groups.items()}
    settings = Settings(**made)
    check(settings)
    return settings


def to_arguments(settings: Settings) -> list[str]:
    """The shortest arguments that `parse` reads as these settings: only what differs from the default."""
    arguments = []
    for field in FIELDS:
        value = getattr(getattr(settings, field.group), field.name)
        if value == field.default:
            continue
        if field.kind is bool:
            arguments.append(field.flag_name if value else f"--{field.flag.off_flag}")
        elif field.is_list and not value:
            arguments.append(field.flag_name)
        elif field.name == "prefill":
            arguments += [field.flag_name, *to_texts(field, value)]
        else:
            arguments += [f"{field.flag_name}={text}" for text in to_texts(field, value)]
    return arguments


def read_secret(text: str, source: str) -> str:
    """The secret itself, or the content of the file that `@/path/to/file` names, without its last line end (CLI-10).

    Raises SettingsError that names the source and the file, never what is in it.
    """
    if not text.startswith("@/"):
        return text
    try:
        with open(text[1:], "rb") as file:
            content = file.read(SECRET_FILE_BYTES_MAX + 1)
    except OSError as wrong:
        raise SettingsError(
            source, repr(text), wrong.strerror or "cannot be read", is_combination=True
        ) from None
    if len(content) > SECRET_FILE_BYTES_MAX:
        raise SettingsError(
            source, repr(text), f"is longer than {SECRET_FILE_BYTES_MAX} bytes", is_combination=True
        )
    try:
        secret = content.decode("utf-8")
    except UnicodeDecodeError:
        raise SettingsError(source, repr(text), "is not text", is_combination=True) from None
    secret = secret.removesuffix("\n").removesuffix("\r")
    if not secret:
        raise SettingsError(source, repr(text), "is empty", is_combination=True)
    return secret


class Given(msgspec.Struct, frozen=True):
    """What a node was started with, kept so that its secret files can be read again (hot reload)."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def settings(self) -> Settings:
        """As `parse`: the settings that it means now. Raises SettingsError."""
        return parse(self.arguments, self.environment)

    def secret_files(self) -> tuple[str, ...]:
        """See `secret_files`."""
        return secret_files(self.arguments, self.environment)


def secret_files(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """The files that these arguments and this environment take secrets from, in the order of the settings.

    Raises SettingsError as `parse` does.
    """
    given = read_arguments(launch_parser(policies=()), arguments)
    found: dict[str, None] = {}
    for field in FIELDS:
        told = _told(field, getattr(given, field.name, None), environment) if field.flag.is_secret else None
        for text in told[1] if told is not None else ():
            _, path = _cut_file(field, text)
            if path is not None:
                found[path] = None
    return tuple(found)


def positive_seconds(text: str) -> float:
    """A number of seconds above 0, for the `type` of an argument that is no setting."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`; did you mean X?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that begin with SMG_ and mean nothing, each with its closest known name or an empty text.

    They start no error, since Kubernetes makes such variables for a Service that is called smg; `smg doctor` shows them.
    """
    known = {name for field in FIELDS for name, _ in _variables(field)}
    found = {}
    for name in sorted(environment):
        if name.startswith("SMG_") and name not in known and name not in LATER_ENV_NAMES:
            close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
            if close:
                found[name] = close[0]
    return found


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help whose lines never break inside a name such as x-request-id, so that it can be copied and searched."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def _add_field(section: argparse._ArgumentGroup, field: Field, policies: Collection[str]) -> None:
    doc = public_doc(field)
    if field.name in _POLICY_FIELDS:
        doc += f" One of {', '.join(sorted(policies))}."
    default = default_policy(policies) if field.name == "policy" else field.default_text
    shared: dict[str, Any] = {
        "dest": field.name,
        "default": None,
        "help": f"{doc} (default: {default})".replace("%", "%%"),
    }
    if field.kind is bool:
        section.add_argument(*field.flag_names, action="store_const", const=["true"], **shared)
        if field.flag.off_flag:
            shared["help"] = f"The opposite of {field.flag_name}."
            section.add_argument(f"--{field.flag.off_flag}", action="store_const", const=["false"], **shared)
        return
    metavar = field.flag.metavar or _metavar(field)
    if field.is_list:
        section.add_argument(*field.flag_names, action="extend", nargs="*", metavar=metavar, **shared)
    else:
        section.add_argument(*field.flag_names, action="store", metavar=metavar, **shared)


def _read_secrets(field: Field, texts: list[str], source: str) -> list[str]:
    """The texts of a secret setting with every file read (CLI-10).

    For a list a file has one text per line, and only the key of a text may be in a file: `red:@/run/keys/red`.
    """
    found = []
    for text in texts:
        before, path = _cut_file(field, text)
        if path is None:
            found.append(text)
            continue
        secret = read_secret(f"@{path}", source)
        if before or not field.is_list:
            found.append(before + secret)
        else:
            lines = [line.strip() for line in secret.splitlines() if line.strip()]
            if not lines:  # else a file that was emptied by mistake would open the gateway
                raise SettingsError(source, repr(text), "is empty", is_combination=True)
            found += lines
    return found


def _cut_file(field: Field, text: str) -> tuple[str, str | None]:
    """(what stands before it, the path) of a secret that is in a file; (text, None) of one that is not."""
    if text.startswith("@/"):
        return "", text[1:]
    before, at, path = text.partition(":@/")
    return (f"{before}:", f"/{path}") if at and field.is_list else (text, None)


def _metavar(field: Field) -> str:
    if field.kind is str:
        return field.name.rpartition("_")[2].upper()
    return _METAVARS.get(field.flag.unit, "N")


def _told(
    field: Field, arguments: str | list[str] | None, environment: Mapping[str, str]
) -> tuple[str, list[str]] | None:
    """(who said it, the texts) for a setting that the command line or else the environment gives; None if nobody does."""
    if arguments is not None:
        return field.flag_name, [arguments] if isinstance(arguments, str) else arguments
    for name, is_off_flag in _variables(field):
        text = environment.get(name)
        if text is None or (text == "" and not field.flag.is_secret):
            continue
        if field.kind is int and _SERVICE_LINK.match(text):
            continue  # Kubernetes sets SMG_PORT=tcp://10.0.0.1:80 in every pod beside a Service called smg
        if field.is_list:
            return name, [word for word in _SEPARATORS.split(text) if word]
        if is_off_flag:
            return name, ["false" if to_value(field, [text]) else "true"]
        return name, [text]
    return None


def _variables(field: Field) -> list[tuple[str, bool]]:
    """The variables that give a setting, the flag's own first; True for the one of the flag that turns it off."""
    names = [(env_name(flag), False) for flag in field.flag_names]
    if field.flag.off_flag:
        names.append((env_name(field.flag.off_flag), True))
    return names


def _refuse_later_variables(environment: Mapping[str, str]) -> None:
    for name in LATER_ENV_NAMES.keys() & environment.keys():
        text = environment[name]
        if text.strip().lower() not in _OFF_WORDS and not _SERVICE_LINK.match(text):
            raise SettingsError(name, "", f"{LATER_ENV_NAMES[name]} is {NOT_SUPPORTED}")


def _check_policy(source: str, name: str, policies: Collection[str]) -> None:
    if name in policies:
        return
    if name in POLICIES_OF_THE_CONTRACT:
        raise SettingsError(source, repr(name), NOT_SUPPORTED)
    reason = f"must be one of {', '.join(sorted(policies))}"
    raise SettingsError(source, repr(name), reason + did_you_mean(name, policies))
