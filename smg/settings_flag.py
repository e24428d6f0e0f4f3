"""How one setting is declared, and how its text becomes a value and its value text again.

Owns `Flag` (what a declaration says), `Field` (a declaration with its name, type and default) and the pure conversion in
both directions, which the command line, the environment, `--help` and the reference page share. A setting itself is never
declared here (see `smg.settings`), and nothing here reads a file, an environment variable or a clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec

from smg.errors import SettingsError

NOT_SUPPORTED = "not supported by this release"
"""The words every refusal of something that comes in a later release uses (contract section 2)."""

HIDDEN = "***"
"""What is shown instead of a secret."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HOST = re.compile(r"[0-9A-Za-z:._%-]+")


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """What a setting says about itself, beside its type and default: written once, in the annotation of its field."""

    doc: str
    """What it does and why the default is what it is; whole sentences."""
    unit: str = ""
    """Unit of a number: seconds, milliseconds, bytes, requests ..."""
    aliases: tuple[str, ...] = ()
    """Other accepted flag names, without dashes."""
    off_flag: str = ""
    """The flag that sets a boolean to false, without dashes."""
    choices: tuple[str, ...] = ()
    """The only accepted words."""
    synonyms: tuple[tuple[str, str], ...] = ()
    """Words that mean one of the choices: (word, choice)."""
    later: tuple[str, ...] = ()
    """Words of the contract that this release does not support yet."""
    at_least: float | None = None
    """Smallest accepted number."""
    at_most: float | None = None
    """Largest accepted number."""
    above: float | None = None
    """Number that the value must exceed."""
    is_secret: bool = False
    """The value is never shown, and may be given as `@/path/to/file` (CLI-10)."""
    form: Callable[[str], str] | None = None
    """Checks and normalises one text; raises ValueError with the reason."""
    shown_default: str = ""
    """The default in words, where the value alone does not tell it."""
    metavar: str = ""
    """Name of the value in the help."""


class Prefill(msgspec.Struct, frozen=True):
    """One prefill worker of `--prefill URL [PORT]`: its URL and its bootstrap port (None: the word `none`, or not given)."""

    url: str
    bootstrap_port: int | None = None


Value = bool | int | float | str | tuple[str, ...] | tuple[float, ...] | tuple[Prefill, ...] | None
"""Every type a setting may have."""


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One declared setting: the group it is in, its name, its plain type, its default and its declaration."""

    group: str
    name: str
    kind: type
    """bool, int, float, str or Prefill; of the items when `is_list`."""
    is_list: bool
    is_optional: bool
    default: Value
    flag: Flag

    @property
    def flag_name(self) -> str:
        """The flag with its dashes, such as `--retry-max-retries`."""
        return "--" + self.name.replace("_", "-")

    @property
    def flag_names(self) -> tuple[str, ...]:
        """The flag and its aliases, with dashes; the flag that turns a boolean off is not among them."""
        return (self.flag_name, *(f"--{alias}" for alias in self.flag.aliases))

    @property
    def env_name(self) -> str:
        """The environment variable, such as `SMG_RETRY_MAX_RETRIES` (CLI-10)."""
        return env_name(self.flag_name)

    @property
    def default_text(self) -> str:
        """The default as help and reference show it."""
        if self.flag.shown_default:
            return self.flag.shown_default
        if self.default is None or self.default == ():
            return "none"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return " ".join(to_texts(self, self.default))


def env_name(flag: str) -> str:
    """The environment variable of a flag: `SMG_` and its name in upper case with underscores (CLI-10)."""
    return "SMG_" + flag.lstrip("-").replace("-", "_").upper()


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What the groups share: a printed form that hides secrets, so that no log line or traceback can show a key (WRK-14)."""

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self.__rich_repr__()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        secrets = {field.name for field in declared_fields("", type(self)) if field.flag.is_secret}
        values = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return [(name, HIDDEN if name in secrets and value else value) for name, value in values]


def declared_fields(group: str, struct: type[msgspec.Struct]) -> tuple[Field, ...]:
    """The settings a group struct declares, in their order. Raises TypeError for a field without a `Flag`."""
    hints = get_type_hints(struct, include_extras=True)
    found = []
    for info in msgspec.structs.fields(struct):
        annotation = hints[info.name]
        flags = [extra for extra in get_args(annotation)[1:] if isinstance(extra, Flag)]
        if len(flags) != 1:
            raise TypeError(f"{struct.__name__}.{info.name} needs exactly one Flag")
        kind, is_list, is_optional = _plain_type(get_args(annotation)[0])
        found.append(
            Field(
                group=group,
                name=info.name,
                kind=kind,
                is_list=is_list,
                is_optional=is_optional,
                default=info.default,
                flag=flags[0],
            )
        )
    return tuple(found)


def to_value(field: Field, texts: list[str]) -> Value:
    """The value that the given texts mean. One text for a single setting (of several the last counts), any for a list.

    Raises SettingsError that names the flag, the text and the reason.
    """
    if field.kind is Prefill:
        return _prefill_workers(field, texts)
    if field.is_list:
        return tuple(_one(field, text) for text in texts)
    value: Value = _one(field, texts[-1])
    return value


def to_texts(field: Field, value: Value) -> list[str]:
    """The texts that `to_value` reads as this value. None has no text: an absent flag is its only form."""
    if value is None:
        return []
    if not isinstance(value, tuple):
        return [_text(value)]
    texts = []
    for item in value:
        if isinstance(item, Prefill):
            texts += [item.url, "none" if item.bootstrap_port is None else str(item.bootstrap_port)]
        else:
            texts.append(_text(item))
    return texts


def shown(field: Field, text: str) -> str:
    """The text as a message may show it: secrets are hidden (WRK-14)."""
    return HIDDEN if field.flag.is_secret else repr(text)


def worker_url(text: str) -> str:
    """A worker URL, scheme and host in lower case and without a last `/` (WRK-7). Raises ValueError with the reason (CLI-7)."""
    scheme = text.partition("://")[0].lower() if "://" in text else text.partition(":")[0].lower()
    if scheme in ("grpc", "grpcs", "ipc"):
        raise ValueError(f"{scheme}:// workers are {NOT_SUPPORTED}")
    if scheme not in ("http", "https") or "://" not in text:
        raise ValueError("must begin with http:// or https://")
    host, port = _host_and_port(text)
    parts = urlsplit(text)
    if parts.query or parts.fragment or text[-1] in "?#":
        raise ValueError("a worker URL has no query and no fragment")
    return f"{scheme}://{host}{port}{parts.path.rstrip('/')}"


def origin(text: str) -> str:
    """An origin of a browser page (`https://app.example`) or `*` (SEC-9). Raises ValueError with the reason."""
    if text == "*":
        return text
    if not text.lower().startswith(("http://", "https://")):
        raise ValueError("must be * or begin with http:// or https://")
    host, port = _host_and_port(text)
    parts = urlsplit(text)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("an origin has no path")
    return f"{parts.scheme}://{host}{port}"


def model_alias(text: str) -> str:
    """An `alias=name` pair (MOD-4). Raises ValueError with the reason (CLI-7)."""
    alias, equals, name = (part.strip() for part in text.partition("="))
    if not (alias and equals and name):
        raise ValueError("must be alias=model")
    if alias == name:
        raise ValueError("an alias may not map to itself")
    return f"{alias}={name}"


def header_name(text: str) -> str:
    """A header name in lower case. Raises ValueError with the reason."""
    if not _HEADER_NAME.fullmatch(text):
        raise ValueError("is no header name")
    return text.lower()


def listen_host(text: str) -> str:
    """A host name or address to listen on; an IPv6 address may be in brackets. Raises ValueError with the reason."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not _HOST.fullmatch(bare):
        raise ValueError("is no host name or address")
    return bare


def url_path(text: str) -> str:
    """A path on a worker, such as `/health`. Raises ValueError with the reason."""
    if not text.startswith("/") or any(character.isspace() for character in text):
        raise ValueError("must begin with / and contain no white space")
    return text


def not_empty(text: str) -> str:
    """Any text but an empty one. Raises ValueError with the reason."""
    if not text.strip():
        raise ValueError("may not be empty")
    return text


def _host_and_port(url: str) -> tuple[str, str]:
    """Host in lower case, with brackets if IPv6, and `:port` or nothing. Raises ValueError with the reason."""
    if any(character.isspace() or ord(character) < 32 for character in url):
        raise ValueError("contains white space")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("may not contain a user name or password")
    if not parts.hostname or not parts.hostname.isascii():
        raise ValueError("has no host name or address")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the port must be between 1 and 65535") from None
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("the port must be between 1 and 65535")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return host, "" if port is None else f":{port}"


def _plain_type(annotation: Any) -> tuple[type, bool, bool]:
    """(kind, is_list, is_optional) of a field's type."""
    is_optional = False
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
        is_optional = True
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True, is_optional
    return annotation, False, is_optional


def _one(field: Field, text: str) -> Any:
    flag = field.flag
    try:
        if field.kind is bool:
            return _boolean(text)
        if field.kind is str:
            return _word(flag, text)
        return _number(field, text)
    except ValueError as wrong:
        raise SettingsError(field.flag_name, shown(field, text), str(wrong)) from None


def _boolean(text: str) -> bool:
    if text.strip().lower() in _TRUE:
        return True
    if text.strip().lower() in _FALSE:
        return False
    raise ValueError("must be true or false")


def _word(flag: Flag, text: str) -> str:
    if flag.later and text in flag.later:
        raise ValueError(NOT_SUPPORTED)
    if flag.choices:
        word = dict(flag.synonyms).get(text.lower(), text.lower())
        if word not in flag.choices:
            raise ValueError(f"must be one of {', '.join(flag.choices)}")
        return word
    if flag.is_secret:
        return _secret(text) if flag.form is None else flag.form(_secret(text))
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("contains a control character")
    return not_empty(text) if flag.form is None else flag.form(text)


def _secret(text: str) -> str:
    """A key must survive the way through a header field: visible ASCII without space at its ends (SEC-2)."""
    if not text:
        raise ValueError("is empty; leave it out for no key")
    if not all(" " <= character <= "~" for character in text):
        raise ValueError("may contain visible ASCII characters only")
    if text != text.strip():
        raise ValueError("begins or ends with white space")
    return text


def _number(field: Field, text: str) -> int | float:
    flag = field.flag
    stripped = text.strip()
    value: int | float
    if field.kind is int:
        if not _INTEGER.fullmatch(stripped):
            raise ValueError("must be a whole number")
        value = int(stripped)
    else:
        if not _NUMBER.fullmatch(stripped):
            raise ValueError("must be a number")
        value = float(stripped)
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
    if flag.at_least is not None and flag.at_most is not None and not flag.at_least <= value <= flag.at_most:
        raise ValueError(f"must be between {_text(flag.at_least)} and {_text(flag.at_most)}")
    if flag.at_least is not None and value < flag.at_least:
        raise ValueError(f"must be at least {_text(flag.at_least)}")
    if flag.at_most is not None and value > flag.at_most:
        raise ValueError(f"must be at most {_text(flag.at_most)}")
    if flag.above is not None and value <= flag.above:
        raise ValueError(f"must be greater than {_text(flag.above)}")
    return value


def _prefill_workers(field: Field, texts: list[str]) -> tuple[Prefill, ...]:
    """`URL [PORT] URL [PORT] ...`: a word with `://` begins a worker, any other is the port of the one before."""
    workers: list[Prefill] = []
    may_have_port = False
    for text in texts:
        try:
            if "://" in text:
                workers.append(Prefill(worker_url(text)))
                may_have_port = True
            elif may_have_port:
                workers[-1] = Prefill(workers[-1].url, _bootstrap_port(text))
                may_have_port = False
            else:
                raise ValueError("must begin with http:// or https://")
        except ValueError as wrong:
            raise SettingsError(field.flag_name, repr(text), str(wrong)) from None
    return tuple(workers)


def _bootstrap_port(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not _INTEGER.fullmatch(text) or not 1 <= int(text) <= 65535:
        raise ValueError("the bootstrap port must be between 1 and 65535, or none")
    return int(text)


def _text(value: bool | int | float | str) -> str:
    """The shortest text of a value: `3`, not `3.0`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
