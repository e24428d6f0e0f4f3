"""The words of the priority scheduler: its classes, and what a file may say about classes and tenants (contract ADM-6).

Owns the four classes, their built-in rules, the structs of `--priority-scheduler-config` and how they become `Rules`. It
decides nothing about a request but its class.

Members have the names that the existing system uses. Two defaults differ on purpose: it reserves 32 and 128 slots whatever the
fleet, which is more than two workers have; here reservations are shares.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

BULK, DEFAULT, INTERACTIVE, SYSTEM = RANKS = range(4)
"""The classes; the higher goes first."""
CLASS_NAMES = ("bulk", "default", "interactive", "system")

TENANTS_MAX = 10_000
"""Tenants with rules of their own; each is a line of a file that somebody wrote."""
PREFILL_AHEAD_S = 0.25
"""Estimated prefill that is sent to a worker before its first answers: long against the way there and back (so that no engine
waits for work) and short against what a person notices."""
RESERVED_RATIO_MAX = 0.75
"""Reservations that do not fit are shrunk to this share of the slots: a class that reserves nothing must still get some."""

ClassName = Literal["bulk", "default", "interactive", "system"]
_Count = Annotated[int, Meta(ge=0, le=1_000_000)]
_Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class ClassRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one class; seconds and slots."""

    reserved_floor: int = 0
    """Slots that lower classes leave free, whatever the fleet."""
    reserved_share: float = 0.0
    """The same as a share of all slots; the larger of both holds."""
    queue_size: int
    queue_timeout_s: float
    starvation_s: float
    """Who waited this long may use slots that are reserved for higher classes."""
    can_preempt: bool = False

    def reserved(self, slots: int) -> int:
        """Slots that this class reserves of so many; a share is rounded down, or three classes would share out two slots."""
        return max(self.reserved_floor, int(self.reserved_share * slots))


class TenantRules(msgspec.Struct, frozen=True):
    """The rules of one tenant: its highest class (None: the default one) and its weight among the tenants of a class."""

    max_rank: int | None = None
    weight: float = 1.0


CLASSES = (
    ClassRules(queue_size=1024, queue_timeout_s=300.0, starvation_s=120.0),
    ClassRules(reserved_share=0.10, queue_size=512, queue_timeout_s=60.0, starvation_s=30.0),
    ClassRules(reserved_share=0.25, queue_size=256, queue_timeout_s=30.0, starvation_s=5.0, can_preempt=True),
    ClassRules(reserved_share=0.05, queue_size=64, queue_timeout_s=30.0, starvation_s=5.0, can_preempt=True),
)
"""The built-in rules, by rank."""


class Rules(msgspec.Struct, frozen=True):
    """Everything that can be configured. `prefill_ahead_s` None: only slots bound what is sent to workers."""

    classes: tuple[ClassRules, ...] = CLASSES
    tenants: dict[str, TenantRules] = {}
    default_max_rank: int = DEFAULT
    prefill_ahead_s: float | None = PREFILL_AHEAD_S

    def max_rank(self, tenant: str) -> int:
        """The highest class of a tenant."""
        found = self.tenants.get(tenant)
        return self.default_max_rank if found is None or found.max_rank is None else found.max_rank

    def weight(self, tenant: str) -> float:
        """Its weight."""
        found = self.tenants.get(tenant)
        return 1.0 if found is None else found.weight


class ClassMembers(msgspec.Struct, frozen=True):
    """A class in the file; what is left out stays as built in."""

    reserved_floor: _Count | None = None
    reserved_per_slot: Annotated[float, Meta(ge=0, le=1)] | None = None
    queue_size: _Count | None = None
    queue_timeout_secs: _Seconds | None = None
    starvation_threshold_secs: _Seconds | None = None
    can_preempt: bool | None = None

    def over(self, built_in: ClassRules) -> ClassRules:
        """The rules with these members in place of those built in."""
        given = {
            "reserved_floor": self.reserved_floor,
            "reserved_share": self.reserved_per_slot,
            "queue_size": self.queue_size,
            "queue_timeout_s": self.queue_timeout_secs,
            "starvation_s": self.starvation_threshold_secs,
            "can_preempt": self.can_preempt,
        }
        found: ClassRules = msgspec.structs.replace(
            built_in, **{name: value for name, value in given.items() if value is not None}
        )
        return found


class ClassesMember(msgspec.Struct, frozen=True):
    """`classes` in the file."""

    bulk: ClassMembers = ClassMembers()
    default: ClassMembers = ClassMembers()
    interactive: ClassMembers = ClassMembers()
    system: ClassMembers = ClassMembers()


class TenantMembers(msgspec.Struct, frozen=True):
    """A tenant in the file, by its key (`auth:teamA`, `header:x`, `ip:10.0.0.7`; ADM-5)."""

    max_class: ClassName | None = None
    weight: Annotated[float, Meta(gt=0, le=1_000)] = 1.0


class PriorityFile(msgspec.Struct, frozen=True):
    """`--priority-scheduler-config`. `prefill_ahead_secs: null` lifts the bound, 0 means one prefill at a time."""

    classes: ClassesMember = ClassesMember()
    tenant_policies: Annotated[dict[str, TenantMembers], Meta(max_length=TENANTS_MAX)] = {}
    prefill_ahead_secs: Annotated[float, Meta(ge=0, le=3_600)] | None = PREFILL_AHEAD_S

    def rules(self, default_max_class: str) -> Rules:
        """The rules that file and flag make together."""
        return Rules(
            classes=tuple(
                getattr(self.classes, name).over(built_in)
                for name, built_in in zip(CLASS_NAMES, CLASSES, strict=True)
            ),
            tenants={
                name: TenantRules(
                    None if told.max_class is None else CLASS_NAMES.index(told.max_class), told.weight
                )
                for name, told in self.tenant_policies.items()
            },
            default_max_rank=CLASS_NAMES.index(default_max_class),
            prefill_ahead_s=self.prefill_ahead_secs,
        )


_RANK_OF = {name.encode(): rank for rank, name in enumerate(CLASS_NAMES)}


def rank_of(value: bytes) -> int | None:
    """The class that a value of `X-SMG-Priority` names, in any case; None when it names none."""
    return _RANK_OF.get(value) if value in _RANK_OF else _RANK_OF.get(value.strip().lower())


def fitted(classes: tuple[ClassRules, ...], slots: int) -> tuple[tuple[int, ...], bool]:
    """Reserved slots by rank on a fleet of `slots`, and whether they had to be shrunk to fit (ADM-6).

    What does not fit shrinks in proportion, to `RESERVED_RATIO_MAX` of the slots.
    """
    wanted = tuple(rules.reserved(slots) for rules in classes)
    total = sum(wanted)
    if total <= slots:
        return wanted, False
    share = RESERVED_RATIO_MAX * slots / total
    return tuple(int(count * share) for count in wanted), True


def differences(old: Rules, new: Rules) -> list[str]:
    """What a reload changes, in lines for the log."""
    lines = []
    for name, before, after in zip(CLASS_NAMES, old.classes, new.classes, strict=True):
        for field in ClassRules.__struct_fields__:
            if getattr(before, field) != getattr(after, field):
                lines.append(f"class {name}: {field} {getattr(before, field)} -> {getattr(after, field)}")
    for field in ("default_max_rank", "prefill_ahead_s"):
        if getattr(old, field) != getattr(new, field):
            lines.append(f"{field} {getattr(old, field)} -> {getattr(new, field)}")
    lines += [f"tenant {name}: no rules any more" for name in sorted(old.tenants.keys() - new.tenants.keys())]
    for name in sorted(new.tenants):
        told = new.tenants[name]
        if old.tenants.get(name) != told:
            top = "default" if told.max_rank is None else CLASS_NAMES[told.max_rank]
            lines.append(
                f"tenant {name}: highest class {'as the flag' if told.max_rank is None else top}, weight {told.weight:g}"
            )
    return lines
