"""Deltas of owner logs as frames, and back.

Owns how much goes into one frame and the checking of what comes. It must never change a log.
"""

from __future__ import annotations

from typing import Any

from mesh.errors import DecodeError
from mesh.frames import Frame
from mesh.owner_log import Entry, OwnerLog
from mesh.records import (
    FIRST,
    LAST,
    RESET,
    Delta,
    checked_entry,
    checked_key,
    checked_number,
    checked_value,
    encode_body,
    keep_tail,
    with_tail,
)

DELTA_BYTES_MAX = 128 * 1024
"""Entries of one delta frame, about. Small enough that other frames get their turn on a slow stream."""


def encode_delta(
    namespace: str, log: OwnerLog, since: int, *, is_reset: bool, has_age: bool, now: float
) -> tuple[Frame, int]:
    """What follows `since`, as much as fits one frame, and the version it reaches."""
    entries: list[Any] = []
    upto, size = log.have, 0
    for key, entry in log.after(since):
        if size >= DELTA_BYTES_MAX:
            upto = entries[-1][1]
            break
        value = entry.value
        size += len(key) + len(value or b"") + len(entry.tail) + 8
        fields: list[Any] = [key, entry.version, value]
        if has_age:
            fields.append(max(0, int((now - entry.said_s) * 1000.0)))
        entries.append(with_tail(fields, entry.tail))
    flags = 0
    if is_reset:
        flags = RESET | (FIRST if since == 0 else 0) | (LAST if upto >= log.have else 0)
    return encode_body(Delta(namespace, log.owner, log.life, since, upto, flags, entries)), upto


def decode_delta(delta: Delta, *, has_age: bool, now: float) -> list[tuple[bytes, Entry]]:
    """The entries, all checked. Raises DecodeError."""
    known = 4 if has_age else 3
    found: list[tuple[bytes, Entry]] = []
    last = delta.since
    for raw in delta.entries:
        entry = checked_entry(raw, known)
        version = checked_number(entry[1])
        if not last < version <= delta.upto:
            raise DecodeError("versions of a delta rise from since to upto")
        last = version
        said_s = now - checked_number(entry[3]) / 1000.0 if has_age else now
        tail = keep_tail(entry, known)
        found.append((checked_key(entry[0]), Entry(version, checked_value(entry[2]), said_s, tail)))
    if delta.upto < delta.since:
        raise DecodeError("a delta ends before it starts")
    return found
