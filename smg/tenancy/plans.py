"""What tenants may use, in the words of the limits file (contract ADM-4).

Owns the structs that `--tenant-rate-limit-config` is decoded into, what must hold between their members, and how the change
from one file to the next is told. It never counts a request: `tenancy/limits` does. It must never read a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, TypeAlias

import msgspec

PER_MINUTE_MAX = 1_000_000_000_000
"""A larger limit is none, and far below where float arithmetic on balances loses whole tokens."""

PerMinute: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=PER_MINUTE_MAX)]
"""A limit; nothing at all is not one, since a tenant is shut out by taking its key away."""

EXACT = "exact"
PREFIX = "prefix"

_RULE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TENANT_KEY = re.compile(r"(?:auth|header|ip):[\x21-\x7e]{1,256}")


class Matcher(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which models a rule is about: the one of that name, or all whose name begins with `value`.

    `type` is `exact` or `prefix`.
    """

    type: str
    value: str

    def __post_init__(self) -> None:
        """Raises ValueError for another type or an empty value."""
        if self.type not in (EXACT, PREFIX):
            raise ValueError(f"a matcher's type is {EXACT} or {PREFIX}, not {self.type[:40]!r}")
        if not self.value:
            raise ValueError("a matcher needs a value")

    def matches(self, model: str) -> bool:
        """Whether the rule is about a model, by its canonical name."""
        return model == self.value if self.type == EXACT else model.startswith(self.value)


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A limit of its own for some models, beside that of the tenant as a whole. At least one number is given."""

    rule_id: str
    matcher: Matcher
    tokens_per_minute: PerMinute | None = None
    requests_per_minute: PerMinute | None = None

    def __post_init__(self) -> None:
        """Raises ValueError with the reason when it cannot mean anything."""
        if not _RULE_ID.fullmatch(self.rule_id):
            raise ValueError("a rule_id may have letters, digits and . _ - only, at most 128")
        if self.tokens_per_minute is None and self.requests_per_minute is None:
            raise ValueError(
                f"rule {self.rule_id} limits nothing; give tokens_per_minute or requests_per_minute"
            )


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The limits of one tenant. What is not given is not limited."""

    tokens_per_minute: PerMinute | None = None
    requests_per_minute: PerMinute | None = None
    model_rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError with the reason when it cannot mean anything."""
        _check_rules(self.model_rules)

    def rule_for(self, model: str) -> Rule | None:
        """The one rule that counts for a model: the exact one, else that with the longest prefix."""
        return rule_for(self.model_rules, model)


class TenantPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The plan of a tenant that is named: `auth:<tenant>`, `auth:shared`, `header:<value>` or `ip:<address>` (ADM-5)."""

    tenant_key: str
    tokens_per_minute: PerMinute | None = None
    requests_per_minute: PerMinute | None = None
    model_rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError with the reason when it cannot mean anything."""
        if not _TENANT_KEY.fullmatch(self.tenant_key):
            raise ValueError(
                "a tenant_key begins with auth:, header: or ip: and has no spaces, such as auth:red"
            )
        _check_rules(self.model_rules)

    @property
    def plan(self) -> Plan:
        """The limits without the name."""
        return Plan(
            tokens_per_minute=self.tokens_per_minute,
            requests_per_minute=self.requests_per_minute,
            model_rules=self.model_rules,
        )


class Plans(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole limits file. Tenants that are not named have the default policy each; without one, no limit."""

    default_policy: Plan | None = None
    tenants: tuple[TenantPlan, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError when a tenant is named twice."""
        seen: set[str] = set()
        for tenant in self.tenants:
            if tenant.tenant_key in seen:
                raise ValueError(f"tenant {tenant.tenant_key} is named twice")
            seen.add(tenant.tenant_key)

    def changes_to(self, after: Plans) -> list[str]:
        """What is different in another file, one line for each number and rule."""
        before_of = {tenant.tenant_key: tenant.plan for tenant in self.tenants}
        after_of = {tenant.tenant_key: tenant.plan for tenant in after.tenants}
        lines = list(_changes("default policy", self.default_policy, after.default_policy))
        for key in sorted({*before_of, *after_of}):
            lines += _changes(key, before_of.get(key), after_of.get(key))
        return lines


def rule_for(rules: tuple[Rule, ...], model: str) -> Rule | None:
    """The rule for a model: the exact one, else that with the longest prefix, else None."""
    found: Rule | None = None
    for rule in rules:
        if not rule.matcher.matches(model):
            continue
        if rule.matcher.type == EXACT:
            return rule
        if found is None or len(rule.matcher.value) > len(found.matcher.value):
            found = rule
    return found


def _check_rules(rules: tuple[Rule, ...]) -> None:
    ids: set[str] = set()
    matchers: set[Matcher] = set()
    for rule in rules:
        if rule.rule_id in ids:
            raise ValueError(f"rule_id {rule.rule_id} is given twice")
        if rule.matcher in matchers:
            raise ValueError(f"rule {rule.rule_id} matches what another rule of this tenant matches")
        ids.add(rule.rule_id)
        matchers.add(rule.matcher)


def _changes(name: str, before: Plan | None, after: Plan | None) -> Iterator[str]:
    if before == after:
        return
    if after is None:
        yield f"{name}: was removed"
        return
    if before is None:
        yield f"{name}: was added with {_told(after)}"
        return
    for member in ("requests_per_minute", "tokens_per_minute"):
        old, new = getattr(before, member), getattr(after, member)
        if old != new:
            yield f"{name}: {member} {_shown(old)} is now {_shown(new)}"
    old_rules = {rule.rule_id: rule for rule in before.model_rules}
    new_rules = {rule.rule_id: rule for rule in after.model_rules}
    for rule_id in sorted({*old_rules, *new_rules}):
        old_rule, new_rule = old_rules.get(rule_id), new_rules.get(rule_id)
        if new_rule is None:
            yield f"{name}: rule {rule_id} was removed"
        elif old_rule is None:
            yield f"{name}: rule {rule_id} was added with {_told(new_rule)}"
        elif old_rule != new_rule:
            matcher = f"{new_rule.matcher.type} {new_rule.matcher.value}"
            yield f"{name}: rule {rule_id} for {matcher} is now {_told(new_rule)}"


def _told(limits: Plan | Rule) -> str:
    told = f"{_shown(limits.requests_per_minute)} requests and {_shown(limits.tokens_per_minute)} tokens per minute"
    count = len(limits.model_rules) if isinstance(limits, Plan) else 0
    return f"{told}, {count} rules" if count else told


def _shown(number: int | None) -> str:
    return "unlimited" if number is None else str(number)
