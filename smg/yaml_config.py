"""Settings out of a YAML file, checked against a struct; every error names the line and the member that is wrong.

Owns the way from a document to a frozen struct: types, bounds (`msgspec.Meta`), unknown, missing and repeated members.
What the members mean is declared by the room that uses them. It must never accept what it does not understand: a member
with a typing error in its name would be a limit that nobody applies.

The lines come from the nodes that PyYAML composes; a parser that gives plain values has forgotten them. Only the
values of scalars are taken from it (its safe constructor), so that no document can make objects.
"""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from smg.errors import SettingsError

FILE_BYTES_MAX = 4 << 20
"""Largest file: a rule for each of 10,000 tenants is a tenth of this. A path to something else must not fill the memory."""
DEPTH_MAX = 32
"""Deepest nesting: our structs need four. The composer of C has no stack to spare for a document made of brackets."""
NODES_MAX = 200_000
"""Values that are read: an anchor that is repeated ten times in ten levels is a small file and a large document."""

T = TypeVar("T")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_KINDS = {
    "tag:yaml.org,2002:bool": "a truth value",
    "tag:yaml.org,2002:int": "a whole number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
    "tag:yaml.org,2002:str": "text",
}


class _Wrong(Exception):
    """A value that cannot be used, at a node; the reader says where that is."""

    def __init__(self, mark: Any, where: str, reason: str) -> None:
        super().__init__(reason)
        self.line = mark.line + 1
        self.where = where
        self.reason = reason


def load_yaml(source: str | bytes, type_: type[T], flag: str) -> T:
    """The document in `source`, a path (str) or the text itself (bytes), as a `type_`: a `msgspec.Struct`.

    `flag` is the one that names the file. An empty document is a struct of defaults. Reads the file. Raises
    `SettingsError`, as `--flag: limits.yaml line 7: tenants[0].tokens_per_minute: expected a whole number, got text`.
    """
    if isinstance(source, bytes):
        return parse_yaml(source, type_, flag, "the document")
    try:
        with open(source, "rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(
            flag, repr(source), error.strerror or type(error).__name__, is_combination=True
        ) from None
    return parse_yaml(text, type_, flag, source)


def parse_yaml(text: bytes, type_: type[T], flag: str, name: str) -> T:
    """As `load_yaml` for a text; `name` stands for the file in errors."""
    try:
        if len(text) > FILE_BYTES_MAX:
            raise SettingsError(flag, name, f"is larger than {FILE_BYTES_MAX} bytes", is_combination=True)
        document: T = _Reader().read(_composed(text), type_, "")
        return document
    except _Wrong as wrong:
        where = f"{name} line {wrong.line}"
        reason = f"{wrong.where}: {wrong.reason}" if wrong.where else wrong.reason
        raise SettingsError(flag, where, reason, is_combination=True) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name} line {mark.line + 1}"
        raise SettingsError(flag, where, f"is not YAML: {error.problem}", is_combination=True) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # bytes that are no characters have no line
        reason = " ".join(str(error).split())[:120]
        raise SettingsError(flag, name, f"is not YAML: {reason}", is_combination=True) from None


def _composed(text: bytes) -> Any:
    """The node of the one document; an empty one is an empty mapping."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_MAX:
                raise _Wrong(event.start_mark, "", f"is nested deeper than {DEPTH_MAX} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    node = yaml.compose(text, Loader=_Loader)
    return yaml.compose("{}", Loader=_Loader) if node is None or _is_null(node) else node


class _Reader:
    """One reading of a document: converts nodes, and counts them."""

    def __init__(self) -> None:
        self._nodes = 0
        self._scalars = yaml.SafeLoader("")  # its constructor alone is used

    def read(self, node: Any, type_: Any, where: str) -> Any:
        """The value of `node` as a `type_`. Raises `_Wrong`."""
        self._nodes += 1
        if self._nodes > NODES_MAX:
            raise _Wrong(node.start_mark, where, f"the document has more than {NODES_MAX} values")
        plain = get_args(type_)[0] if get_origin(type_) is Annotated else type_
        origin = get_origin(plain)
        if origin in (Union, UnionType):
            members = [kind for kind in get_args(plain) if kind is not NoneType]
            assert len(members) == 1, "of unions only optional types are read"
            return None if _is_null(node) else self.read(node, members[0], where)
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            return self._struct(node, plain, where)
        if origin is dict:
            return self._mapping(node, type_, plain, where)
        if origin in (list, tuple, frozenset):
            return self._sequence(node, type_, plain, where)
        return self._scalar(node, type_, plain, where)

    def _struct(self, node: Any, type_: type[msgspec.Struct], where: str) -> msgspec.Struct:
        entries = self._entries(node, where)
        hints = get_type_hints(type_, include_extras=True)
        fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
        values = {}
        for name, (key, value) in entries.items():
            if name not in fields:
                known = ", ".join(sorted(fields))
                raise _Wrong(key.start_mark, _below(where, name), f"is no member; there are {known}")
            field = fields[name]
            values[field.name] = self.read(value, hints[field.name], _below(where, name))
        for name, field in fields.items():
            if field.required and name not in entries:
                raise _Wrong(node.start_mark, _below(where, name), "is missing")
        try:
            return type_(**values)
        except ValueError as error:
            raise _Wrong(node.start_mark, where, str(error)) from None

    def _mapping(self, node: Any, type_: Any, plain: Any, where: str) -> Any:
        found = {}
        for name, (_, value) in self._entries(node, where).items():
            found[name] = self.read(value, get_args(plain)[1], f'{where}["{name}"]')
        return self._bounded(node, found, type_, where)

    def _sequence(self, node: Any, type_: Any, plain: Any, where: str) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            raise _Wrong(node.start_mark, where, f"expected a list, got {_kind(node)}")
        item = get_args(plain)[0]
        found = [self.read(each, item, f"{where}[{place}]") for place, each in enumerate(node.value)]
        return self._bounded(node, (get_origin(plain) or list)(found), type_, where)

    def _scalar(self, node: Any, type_: Any, plain: Any, where: str) -> Any:
        expected = _WORDS.get(plain, "")
        if not isinstance(node, yaml.ScalarNode):
            raise _Wrong(node.start_mark, where, f"expected {expected or 'one value'}, got {_kind(node)}")
        if plain is str and node.tag != "tag:yaml.org,2002:str":
            raise _Wrong(
                node.start_mark, where, f"expected text, got {_kind(node)}; put it between quotation marks"
            )
        try:
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise _Wrong(node.start_mark, where, f"{node.value!r} cannot be read") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _Wrong(node.start_mark, where, "expected a finite number")
        try:
            return msgspec.convert(value, type_)
        except msgspec.ValidationError as error:
            reason = _words(str(error))
            if expected and str(error).startswith("Expected") and " got " in str(error):
                reason = f"expected {expected}, got {_kind(node)}"
            raise _Wrong(node.start_mark, where, reason) from None

    def _bounded(self, node: Any, value: Any, type_: Any, where: str) -> Any:
        """Checks the bounds that an annotation sets for a whole list or mapping."""
        for extra in get_args(type_)[1:] if get_origin(type_) is Annotated else ():
            if isinstance(extra, msgspec.Meta):
                if extra.max_length is not None and len(value) > extra.max_length:
                    raise _Wrong(node.start_mark, where, f"has more than {extra.max_length} entries")
                if extra.min_length is not None and len(value) < extra.min_length:
                    raise _Wrong(node.start_mark, where, f"has fewer than {extra.min_length} entries")
        return value

    def _entries(self, node: Any, where: str) -> dict[str, tuple[Any, Any]]:
        """Name to nodes of key and value; YAML itself would let the last of two equal names win."""
        if not isinstance(node, yaml.MappingNode):
            raise _Wrong(node.start_mark, where, f"expected members, got {_kind(node)}")
        found: dict[str, tuple[Any, Any]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Wrong(key.start_mark, where, "the name of a member is one word")
            if key.value in found:
                raise _Wrong(key.start_mark, _below(where, key.value), "is given twice")
            found[key.value] = (key, value)
        return found


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _is_null(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: Any) -> str:
    """What stands there, in words."""
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "members"
    return _KINDS.get(node.tag, f"a value of type {node.tag}")


def _words(message: str) -> str:
    """A message of msgspec as the end of a sentence of ours: "Expected `int` >= 1 - at `$`" is "expected int >= 1"."""
    text = message.partition(" - at ")[0].replace("`", "")
    return text[:1].lower() + text[1:]
