"""The limits file: what is accepted, where a mistake is, and how a change is told (ADM-4)."""

from __future__ import annotations

import pytest

from smg.errors import SettingsError
from smg.tenancy.plans import Plan, Plans, Rule
from smg.yaml_config import load_yaml

WHOLE = b"""
default_policy:
  requests_per_minute: 60
  model_rules:
    - {rule_id: big, matcher: {type: prefix, value: llama-}, tokens_per_minute: 1000}
    - {rule_id: huge, matcher: {type: prefix, value: llama-405}, tokens_per_minute: 500}
    - {rule_id: one, matcher: {type: exact, value: llama-405b}, requests_per_minute: 5}
tenants:
  - tenant_key: auth:red
    tokens_per_minute: 20000
    requests_per_minute: 100
  - tenant_key: ip:::1
"""


def read(text: bytes) -> Plans:
    return load_yaml(text, Plans, "--tenant-rate-limit-config")


def test_a_whole_file_is_read():
    plans = read(WHOLE)
    assert plans.default_policy is not None and len(plans.default_policy.model_rules) == 3
    assert plans.tenants[0].plan == Plan(tokens_per_minute=20000, requests_per_minute=100)
    assert plans.tenants[1].plan == Plan()


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ("llama-405b", "one"),
        ("llama-405b-fp8", "huge"),
        ("llama-8b", "big"),
        ("llama-", "big"),
        ("mistral", None),
        ("LLAMA-8b", None),
    ],
)
def test_the_exact_rule_goes_before_the_longest_prefix(model: str, rule: str | None):
    plan = read(WHOLE).default_policy
    assert plan is not None
    found = plan.rule_for(model)
    assert (found and found.rule_id) == rule


def test_the_order_of_rules_does_not_matter():
    plan = read(WHOLE).default_policy
    assert plan is not None
    turned = Plan(model_rules=plan.model_rules[::-1])
    for model in ("llama-405b", "llama-405b-fp8", "llama-8b"):
        assert turned.rule_for(model) == plan.rule_for(model)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (b"tenants:\n  - tenant_key: auth:a\n    tokens_per_minut: 1\n", 3, "tenants[0].tokens_per_minut"),
        (b"default_policy:\n  requests_per_minute: 0\n", 2, "default_policy.requests_per_minute"),
        (b"default_policy:\n  requests_per_minute: -5\n", 2, "default_policy.requests_per_minute"),
        (b"default_policy:\n  requests_per_minute: 1.5\n", 2, "default_policy.requests_per_minute"),
        (b"default_policy:\n  tokens_per_minute: lots\n", 2, "expected a whole number"),
        (b"default_policy:\n  tokens_per_minute: 99999999999999999\n", 2, "default_policy.tokens_per_minute"),
        (b"tenants:\n- tenant_key: red\n", 2, "begins with auth:"),
        (b"tenants:\n- tenant_key: 'auth:a b'\n", 2, "begins with auth:"),
        (b"tenants:\n- requests_per_minute: 5\n", 2, "tenants[0].tenant_key: is missing"),
        (b"tenants:\n- tenant_key: auth:a\n- tenant_key: auth:a\n", 1, "auth:a is named twice"),
        (b"tenant:\n- tenant_key: auth:a\n", 1, "tenant: is no member"),
        (b"tenants: {}\n", 1, "expected a list"),
        (b"- 1\n", 1, "expected members"),
        (
            b"default_policy:\n  model_rules:\n  - rule_id: a b\n    matcher: {type: exact, value: m}\n    tokens_per_minute: 1\n",
            3,
            "rule_id",
        ),
        (
            b"default_policy:\n  model_rules:\n  - rule_id: a\n    matcher: {type: regex, value: m}\n    tokens_per_minute: 1\n",
            4,
            "exact or prefix",
        ),
        (
            b"default_policy:\n  model_rules:\n  - rule_id: a\n    matcher: {type: exact, value: ''}\n    tokens_per_minute: 1\n",
            4,
            "needs a value",
        ),
        (
            b"default_policy:\n  model_rules:\n  - rule_id: a\n    matcher: {type: exact, value: m}\n",
            3,
            "limits nothing",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line_and_member(text: bytes, line: int, said: str):
    with pytest.raises(SettingsError) as error:
        read(text)
    assert f"line {line}" in str(error.value) and said in str(error.value), error.value
    assert str(error.value).startswith("--tenant-rate-limit-config")


def rules(*texts: str) -> bytes:
    lines = "".join(f"  - {text}\n" for text in texts)
    return f"default_policy:\n  model_rules:\n{lines}".encode()


def test_two_rules_may_share_neither_id_nor_matcher():
    rule = "{{rule_id: {}, matcher: {{type: {}, value: m}}, tokens_per_minute: 1}}".format
    read(rules(rule("a", "exact"), rule("b", "prefix")))
    with pytest.raises(SettingsError, match="given twice"):
        read(rules(rule("a", "exact"), rule("a", "prefix")))
    with pytest.raises(SettingsError, match="matches what another"):
        read(rules(rule("a", "exact"), rule("b", "exact")))


def test_a_change_is_told_number_by_number_and_rule_by_rule():
    before = read(WHOLE)
    assert before.changes_to(before) == []
    after = read(
        WHOLE.replace(b"requests_per_minute: 100", b"requests_per_minute: 200")
        .replace(b"    tokens_per_minute: 20000\n", b"")
        .replace(b"tokens_per_minute: 500", b"tokens_per_minute: 600")
        .replace(b"ip:::1", b"header:acme")
    )
    assert before.changes_to(after) == [
        "default policy: rule huge for prefix llama-405 is now unlimited requests and 600 tokens per minute",
        "auth:red: requests_per_minute 100 is now 200",
        "auth:red: tokens_per_minute 20000 is now unlimited",
        "header:acme: was added with unlimited requests and unlimited tokens per minute",
        "ip:::1: was removed",
    ]
    assert before.changes_to(Plans()) == [
        "default policy: was removed",
        "auth:red: was removed",
        "ip:::1: was removed",
    ]
    one = Plans(default_policy=Plan(model_rules=before.default_policy.model_rules[:1]))  # type: ignore[union-attr]
    assert Plans().changes_to(one) == [
        "default policy: was added with unlimited requests and unlimited tokens per minute, 1 rules"
    ]
    none = Plans(default_policy=Plan())
    assert one.changes_to(none) == ["default policy: rule big was removed"]
    assert none.changes_to(one) == [
        "default policy: rule big was added with unlimited requests and 1000 tokens per minute"
    ]
    assert isinstance(one.default_policy.model_rules[0], Rule)  # type: ignore[union-attr]
