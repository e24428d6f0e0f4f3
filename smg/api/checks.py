"""What the gateway checks of a request body before it chooses a worker (MOD-5 to MOD-7, ERR-1 to ERR-6).

Owns the decoding of bodies and the table of members it looks at. Never changes a body, never checks more than the
contract names: everything else in a body is the worker's business (MOD-6).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from smg.api import multipart
from smg.api.endpoints import Endpoint
from smg.errors import GatewayError

DEPTH_MAX = 128
"""Containers inside each other that a body may have, the outermost object included (MOD-7)."""

_TEXT = (str,)
_TEXT_OR_LIST = (str, list)
# vLLM takes a mapping for pictures as query, input or documents: passed on, the worker knows what it can read.
_ANY_TEXT = (str, list, dict)
_LIST = (list,)

_KIND_WORDS: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}

# Members of which an empty array is an error of its own (ERR-4).
_MAY_NOT_BE_EMPTY = frozenset(("messages", "input", "documents"))

_REQUIRED: Mapping[str, tuple[tuple[str, tuple[type, ...]], ...]] = {
    "chat": (("messages", _LIST),),
    "completions": (("prompt", _TEXT_OR_LIST),),
    "generate": (),
    "embeddings": (("input", _ANY_TEXT),),
    "rerank": (("query", _ANY_TEXT), ("documents", (list, dict))),
    "classify": (),
    "messages": (("messages", _LIST),),
    "count_tokens": (("messages", _LIST),),
    "responses": (("input", _TEXT_OR_LIST),),
    "transcriptions": (("file", _TEXT),),
}

# (member, lowest, highest, is an integer); None = no such bound.
_Range = tuple[str, float | None, float | None, bool]
_SAMPLING: tuple[_Range, ...] = (("temperature", 0.0, 2.0, False), ("top_p", 0.0, 1.0, False))
_PENALTIES: tuple[_Range, ...] = (
    ("frequency_penalty", -2.0, 2.0, False),
    ("presence_penalty", -2.0, 2.0, False),
    ("n", 1, None, True),
)
_TOKENS_FROM_1: tuple[_Range, ...] = (("max_tokens", 1, None, True),)
_TOKENS_FROM_0: tuple[_Range, ...] = (("max_tokens", 0, None, True),)
_RANGES: Mapping[str, tuple[_Range, ...]] = {
    "chat": _SAMPLING + _PENALTIES + _TOKENS_FROM_1,
    "completions": _SAMPLING + _PENALTIES + _TOKENS_FROM_0,
    "messages": _SAMPLING + _TOKENS_FROM_1,
    "responses": _SAMPLING,
}

# What needs state that this release does not keep (STA-1).
_STATEFUL_MEMBERS = ("previous_response_id", "conversation", "background")

_decode = msgspec.json.Decoder().decode
_JSON_TYPE = re.compile(rb"\s*(?:application|text)/(?:[!#$&^_.+\w-]+\+)?json\s*(?:;.*)?\Z", re.IGNORECASE)
_SURROGATES = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u[dD][89a-fA-F]..")


def decode_body(endpoint: Endpoint, body: bytes, content_type: bytes | None) -> dict[str, Any]:
    """The JSON object in `body`; for multipart endpoints its short text fields (`stream` as a bool).

    Raises `GatewayError` 400: `json_parse_error` (ERR-6), `invalid_json` (ERR-1, MOD-7), `invalid_type` (ERR-2).
    """
    if not endpoint.is_json:
        return _decode_form(body, content_type)
    # The exact spelling of nearly every client first; the pattern costs more than the rest of the check.
    if content_type != b"application/json" and (content_type is None or not _JSON_TYPE.match(content_type)):
        raise GatewayError(
            400,
            "json_parse_error",
            "Expected request with `Content-Type: application/json`",
            is_closing=False,
        )
    return decode_object(body)


def decode_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, whatever its content type. Raises `GatewayError` 400 as `decode_body` does."""
    try:
        document = _decode(body)
    except RecursionError:
        _refuse_depth()
    except msgspec.ValidationError:
        document = _decode_wide(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        document = _decode_again(body, error)
    if type(document) is not dict:
        raise GatewayError(400, "invalid_type", "The request body must be a JSON object")
    if _has_many_containers(body) and _is_deeper(document, DEPTH_MAX):
        _refuse_depth()
    return document


def check(endpoint: Endpoint, document: dict[str, Any]) -> None:
    """Checks the members that MOD-5 and MOD-6 name.

    Raises `GatewayError` 400 with `param` (ERR-2 to ERR-5), or 501 `not_implemented` for what needs state the
    gateway does not keep. Optional members that are null count as absent, as clients' libraries send them.
    """
    get = document.get
    model = get("model")
    if model is None or model == "":
        if endpoint.needs_model:
            _refuse_missing("model")
    elif type(model) is not str:
        _refuse_type("model", _TEXT)
    stream = get("stream")
    if stream is not None and type(stream) is not bool:
        raise GatewayError(400, "invalid_type", "`stream` must be a boolean", param="stream")
    name = endpoint.name
    for member, types in _REQUIRED[name]:
        value = get(member)
        if value is None:
            _refuse_missing(member)
        if type(value) not in types:
            _refuse_type(member, types)
        if member in _MAY_NOT_BE_EMPTY and value == []:
            raise GatewayError(400, "empty_array", f"`{member}` must not be empty", param=member)
    if name == "messages" and get("max_tokens") is None:
        _refuse_missing("max_tokens")
    for bounds in _RANGES.get(name, ()):
        value = get(bounds[0])
        if value is not None:
            _check_range(value, bounds)
    if name == "responses":
        _check_stateless(document)


def is_stream(document: dict[str, Any]) -> bool:
    """True when the client asked for a stream."""
    return document.get("stream") is True


def refuse_content_encoding(value: bytes | None) -> None:
    """Raises `GatewayError` 415 for a body with `Content-Encoding` other than `identity` (HTTP-15)."""
    if value is not None and value.strip().lower() not in (b"", b"identity"):
        raise GatewayError(
            415,
            "unsupported_content_encoding",
            "Request bodies with a Content-Encoding other than identity are not accepted",
        )


def _decode_form(body: bytes, content_type: bytes | None) -> dict[str, Any]:
    fields: dict[str, Any] = dict(multipart.text_fields(body, content_type))
    if "stream" in fields:
        fields["stream"] = fields["stream"].strip().lower() in ("true", "1")
    return fields


def _decode_again(body: bytes, error: Exception) -> object:
    """A second reading for bodies with half a surrogate pair, which is JSON by grammar and refused by msgspec.

    The halves become U+FFFD in our reading only: text with them cannot be encoded, so it could not be hashed. The
    worker gets the client's bytes.
    """
    if b"\\ud" in body or b"\\uD" in body:
        mended = _SURROGATES.sub(_mend, body)
        if mended != body:
            try:
                return _decode(mended)
            except RecursionError:
                _refuse_depth()
            except msgspec.ValidationError:
                return _decode_wide(mended)
            except (msgspec.DecodeError, UnicodeDecodeError) as again:
                error = again
    reason = "is empty" if not body.strip() else f"is not valid JSON: {_shown(error)}"
    raise GatewayError(400, "invalid_json", f"The request body {reason}") from None


def _mend(match: re.Match[bytes]) -> bytes:
    return match.group() if len(match.group()) == 12 else b"\\ufffd"


def _decode_wide(body: bytes) -> object:
    """Reads numbers beyond msgspec's range (`1e999`, thousands of digits) that JSON allows."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_int=_wide_integer)
    except RecursionError:
        _refuse_depth()
    except ValueError as error:
        raise GatewayError(
            400, "invalid_json", f"The request body is not valid JSON: {_shown(error)}"
        ) from None


def _wide_integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than CPython converts
        return float(digits)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON value")


def _shown(error: Exception) -> str:
    """The place and kind of a syntax error, in one short line without text of the body."""
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start}"
    return str(error).removeprefix("JSON is malformed: ").splitlines()[0][:120]


def _has_many_containers(body: bytes) -> bool:
    """Whether `body` has more opening brackets than may be nested; a few jumps of `find` where `count` reads all."""
    left = DEPTH_MAX
    find = body.find
    for bracket in (b"{", b"["):
        at = find(bracket)
        while at >= 0:
            if left == 0:
                return True
            left -= 1
            at = find(bracket, at + 1)
    return False


def _is_deeper(document: dict[str, Any], depth_max: int) -> bool:
    level: list[Any] = [document]
    for _ in range(depth_max):
        below: list[Any] = []
        for node in level:
            children = node.values() if type(node) is dict else node
            below += [child for child in children if type(child) is dict or type(child) is list]
        if not below:
            return False
        level = below
    return True


def _refuse_depth() -> NoReturn:
    raise GatewayError(
        400, "invalid_json", f"The request body is nested deeper than {DEPTH_MAX} levels"
    ) from None


def _refuse_missing(member: str) -> NoReturn:
    raise GatewayError(
        400, "missing_required_parameter", f"Missing required parameter: `{member}`", param=member
    )


def _refuse_type(member: str, types: tuple[type, ...]) -> NoReturn:
    words = " or ".join(_KIND_WORDS[kind] for kind in types)
    raise GatewayError(400, "invalid_type", f"`{member}` must be {words}", param=member)


def _check_range(value: object, bounds: _Range) -> None:
    member, lowest, highest, is_integer = bounds
    kind = type(value)
    if kind is not int and (is_integer or kind is not float):
        word = "an integer" if is_integer else "a number"
        raise GatewayError(400, "invalid_type", f"`{member}` must be {word}", param=member)
    assert isinstance(value, (int, float))
    family = "integer" if is_integer else "decimal"
    if lowest is not None and value < lowest:
        raise GatewayError(
            400, f"{family}_below_min_value", f"`{member}` must be at least {lowest:g}", param=member
        )
    if highest is not None and value > highest:
        raise GatewayError(
            400, f"{family}_above_max_value", f"`{member}` must be at most {highest:g}", param=member
        )


def _check_stateless(document: dict[str, Any]) -> None:
    for member in _STATEFUL_MEMBERS:
        value = document.get(member)
        if value is not None and value is not False:
            raise GatewayError(
                501, "not_implemented", f"`{member}` is not supported by this release", param=member
            )
