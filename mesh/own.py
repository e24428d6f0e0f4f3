"""What this node says about itself: its record, and the only hand that raises its incarnation.

Owns the own record. Must never decide when to refute (`judge`) or to leave (`farewell`).
"""

from __future__ import annotations

import msgspec

from mesh.member import INCARNATION_MAX, Accusation, Record, Status
from mesh.messages import Source


class Own:
    """The own record. Invariant: the incarnation never falls, and the life (boot) never changes."""

    __slots__ = ("record",)

    def __init__(self, record: Record) -> None:
        self.record = record.checked()

    @property
    def name(self) -> str:
        """Our name."""
        return self.record.name

    def source(self, fingerprint: int) -> Source:
        """The head of every message of ours."""
        record = self.record
        return Source(record.name, record.boot, record.incarnation, fingerprint)

    def raise_to(self, incarnation: int) -> None:
        """Take this incarnation, which is above ours."""
        assert self.record.incarnation < incarnation <= INCARNATION_MAX
        self.record = msgspec.structs.replace(self.record, incarnation=incarnation)

    def change(self, changes: dict[str, object]) -> None:
        """Say something else about ourselves, one incarnation higher. Raises SettingsError; then nothing changed."""
        record = msgspec.structs.replace(
            self.record, incarnation=self.record.incarnation + 1, **changes
        ).checked()
        self.record = record

    def leave(self) -> Accusation:
        """We are leaving: our record says so from now on. Returns the farewell to spread."""
        self.record = msgspec.structs.replace(self.record, status=Status.LEFT)
        record = self.record
        return Accusation(record.name, record.boot, record.incarnation, Status.LEFT, record.name)

    def is_elder_than(self, other: Record) -> bool:
        """Which of two lives with one name stays: the one born first; the boot id settles a tie, anywhere alike."""
        return (self.record.born_s, self.record.boot) < (other.born_s, other.boot)
