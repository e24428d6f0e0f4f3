"""What a user of the library may hang into an agent to see it work: metrics and log lines, as plain callables.

Owns the four places. They are called between two awaits, so they must be quick, and an exception in one ends the agent
like any other bug. Must never decide anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec


def _nothing(*_arguments: object) -> None:
    return None


class Hooks(msgspec.Struct, frozen=True, kw_only=True):
    """All hooks of one agent; those not given cost a call of an empty function."""

    message: Callable[[str, str, int], None] = _nothing
    """(kind, "in" or "out", bytes): a datagram (kind `datagram`) or a stream frame (its type's name, in lower case)."""

    lag: Callable[[float], None] = _nothing
    """Seconds by which the loop woke later than it asked for; several times a second."""

    log: Callable[[str, Mapping[str, object]], None] = _nothing
    """(event, fields): something an operator may want to know; the events are listed in docs/mesh/operating.md."""
