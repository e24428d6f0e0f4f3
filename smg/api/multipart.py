"""The text fields of a multipart form, found without changing a byte of it (UP-8).

Owns the cutting of `multipart/form-data` bodies into parts as RFC 7578 describes them. Never copies a file part and
never rebuilds a body: an alias is replaced in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NoReturn

from smg.errors import GatewayError

PARTS_MAX = 128
"""Parts of one form; transcription forms have about ten, more is an attempt to keep us busy."""
PART_HEAD_BYTES_MAX = 8192
"""Header bytes of one part, as servers of forms commonly allow."""
FIELD_BYTES_MAX = 65536
"""A longer field is no name or switch; routing does not read it."""

_BOUNDARY = re.compile(
    rb"\s*multipart/form-data\s*;(?:.*;)?\s*boundary=(?:\"([^\"\r\n]{1,200})\"|([^\s;\"]{1,200}))",
    re.IGNORECASE,
)
_NAME = re.compile(
    rb"content-disposition:\s*form-data\b[^\r\n]*?[;\s]name=(?:\"([^\"\r\n]*)\"|([^\s;]+))", re.IGNORECASE
)


def text_fields(body: bytes, content_type: bytes | None) -> dict[str, str]:
    """Name and text of each part; the first of equal names counts, long parts have the text `""`.

    Raises `GatewayError` 400 `invalid_type` for another content type and `invalid_json` for a form that is none (the
    contract has no code of its own for forms).
    """
    fields: dict[str, str] = {}
    for name, start, end in _parts(body, content_type):
        if name not in fields:
            value = body[start:end] if end - start <= FIELD_BYTES_MAX else b""
            fields[name] = value.decode("utf-8", "replace")
    return fields


def replace_field(body: bytes, content_type: bytes | None, name: str, value: bytes) -> bytes:
    """`body` with the value of every part `name` replaced and every other byte kept.

    Raises as `text_fields`, and `ValueError` when the new value would end its part.
    """
    if b"\r\n--" in value:
        raise ValueError("a form value may not contain a delimiter")
    pieces: list[bytes] = []
    done = 0
    for found, start, end in _parts(body, content_type):
        if found == name:
            pieces += (body[done:start], value)
            done = end
    pieces.append(body[done:])
    return b"".join(pieces)


def _parts(body: bytes, content_type: bytes | None) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of the value of each part, in order."""
    match = _BOUNDARY.match(content_type or b"")
    if match is None:
        raise GatewayError(400, "invalid_type", "Expected request with `Content-Type: multipart/form-data`")
    delimiter = b"--" + (match.group(1) or match.group(2))
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if at == 1:
        _refuse()
    for _ in range(PARTS_MAX + 1):
        at += len(delimiter)
        if body.startswith(b"--", at):
            return
        line_end = body.find(b"\r\n", at, at + 256)  # transport padding is white space only
        if line_end < 0 or body[at:line_end].strip(b" \t"):
            _refuse()
        head = line_end + 2
        blank = body.find(b"\r\n\r\n", line_end, line_end + PART_HEAD_BYTES_MAX)
        if blank < 0:
            _refuse()
        start = blank + 4
        end = body.find(b"\r\n" + delimiter, blank + 2)
        if end < 0:
            _refuse()
        name = _NAME.search(body, head, blank)
        if name is not None:
            yield (name.group(1) or name.group(2) or b"").decode("utf-8", "replace"), start, max(start, end)
        at = end + 2
    raise GatewayError(400, "invalid_json", f"The form has more than {PARTS_MAX} parts")


def _refuse() -> NoReturn:
    raise GatewayError(400, "invalid_json", "The request body is not a valid multipart form")
