"""Changing one member of a JSON object without touching any other byte (UP-2).

Owns the search for the top-level members of a body that was already decoded, so that it is known to be a valid UTF-8
JSON object. Never re-encodes anything: key order, white space, number forms and unknown members stay as the client
wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

_SPACE = re.compile(rb"[ \t\n\r]*")
# Possessive: a string is read once, whatever is in it.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\n\r,\]}]+")
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_LITERAL_VALUE = re.compile(rb'[ \t\n\r]*:[ \t\n\r]*("(?:[^"\\]++|\\.)*+"|[^ \t\n\r,\]}\[{"]+)', re.DOTALL)


def replace_member(body: bytes, name: str, value: bytes, *, is_present: bool = False) -> bytes:
    """`body` with the value of every top-level member `name` replaced by the JSON text `value`.

    Duplicates are all replaced, since readers disagree on which one counts. Without such a member the body comes back
    as it is. `is_present`: the caller has decoded the body and seen the member, which allows a short cut. Raises
    `ValueError` when the body is no JSON object.
    """
    span = _only_span(body, name) if is_present else None
    spans = [span] if span is not None else _spans(body, name)
    if not spans:
        return body
    pieces: list[bytes] = []
    done = 0
    for start, end in spans:
        pieces += (body[done:start], value)
        done = end
    pieces.append(body[done:])
    return b"".join(pieces)


def insert_members(body: bytes, members: Mapping[str, bytes]) -> bytes:
    """`body` with each of `members` (name to JSON text): replaced where it is, else put in front of all others.

    Raises `ValueError` when the body is no JSON object.
    """
    new: list[bytes] = []
    for name, value in members.items():
        if _may_have(body, name) and _spans(body, name):
            body = replace_member(body, name, value)
        else:
            new.append(quoted(name) + b":" + value)
    if not new:
        return body
    start = _object_start(body)
    at = _after_space(body, start)
    has_members = body[at : at + 1] != b"}"
    return b"".join((body[:start], b",".join(new), b"," if has_members else b"", body[start:]))


def quoted(text: str) -> bytes:
    """`text` as a JSON string."""
    return json.dumps(text).encode("ascii")


def _may_have(body: bytes, name: str) -> bool:
    """False when no key can be `name`: a plain name is spelled as it is or with `\\u00..` escapes, no other way."""
    return quoted(name) in body or b"\\u00" in body or not _is_plain(name)


def _is_plain(name: str) -> bool:
    return name.isascii() and name.replace("_", "a").isalnum()


def _only_span(body: bytes, name: str) -> tuple[int, int] | None:
    """The value of a member known to be there, when a single look finds it for certain, else None.

    Without `\\u00` escapes the key is spelled `"name"`; if this text occurs once in the whole body, it is the key.
    """
    key = quoted(name)
    at = body.find(key)
    if at < 0 or not _is_plain(name) or body.find(key, at + len(key)) >= 0 or b"\\u00" in body:
        return None
    match = _LITERAL_VALUE.match(body, at + len(key))
    return match.span(1) if match is not None else None


def _spans(body: bytes, name: str) -> list[tuple[int, int]]:
    return [(start, end) for key, start, end in _members(body) if key == name]


def _members(body: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, start of value, end of value) of each top-level member, in order."""
    at = _after_space(body, _object_start(body))
    if body[at : at + 1] == b"}":
        return
    while True:
        key = _STRING.match(body, at)
        if key is None:
            raise ValueError("the body is no JSON object")
        colon = _after_space(body, key.end())
        if body[colon : colon + 1] != b":":
            raise ValueError("the body is no JSON object")
        start = _after_space(body, colon + 1)
        end = _value_end(body, start)
        yield _text(key.group()), start, end
        at = _after_space(body, end)
        if body[at : at + 1] != b",":
            return
        at = _after_space(body, at + 1)


def _value_end(body: bytes, start: int) -> int:
    first = body[start : start + 1]
    if first == b'"':
        match = _STRING.match(body, start)
        if match is None:
            raise ValueError("the body is no JSON object")
        return match.end()
    if first not in (b"{", b"["):
        match = _SCALAR.match(body, start)
        if match is None:
            raise ValueError("the body is no JSON object")
        return match.end()
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(body, start):
        code = body[token.start()]
        if code == 123 or code == 91:  # { [
            depth += 1
        elif code == 125 or code == 93:  # } ]
            depth -= 1
            if depth == 0:
                return token.end()
    raise ValueError("the body is no JSON object")


def _object_start(body: bytes) -> int:
    """The place behind the opening brace."""
    at = _after_space(body, 0)
    if body[at : at + 1] != b"{":
        raise ValueError("the body is no JSON object")
    return at + 1


def _after_space(body: bytes, at: int) -> int:
    match = _SPACE.match(body, at)
    assert match is not None  # the pattern matches the empty text
    return match.end()


def _text(key: bytes) -> str:
    if b"\\" not in key:
        return key[1:-1].decode("utf-8")
    decoded = json.loads(key)
    assert isinstance(decoded, str)
    return decoded
