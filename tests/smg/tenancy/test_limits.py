"""Tenant limits: all buckets or none, exact under every schedule, never more than rate and burst (ADM-4, ADM-5, ADM-8)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.tenancy import limits as limits_module
from smg.tenancy.limits import (
    OVERFLOW_TENANT,
    REQUESTS,
    TOKENS,
    TOO_LARGE,
    Bucket,
    Reservation,
    TenantLimited,
    TenantLimits,
)
from smg.tenancy.plans import Matcher, Plan, Plans, Rule, TenantPlan

RED = "auth:red"


def one(requests: int | None = None, tokens: int | None = None, **more: Any) -> TenantLimits:
    """Limits of which the tenant red has a plan and nobody else."""
    plan = TenantPlan(tenant_key=RED, requests_per_minute=requests, tokens_per_minute=tokens, **more)
    return TenantLimits(Plans(tenants=(plan,)))


def rule(value: str, requests: int | None = None, tokens: int | None = None, kind: str = "exact") -> Rule:
    matcher = Matcher(type=kind, value=value)
    return Rule(rule_id=f"r-{value}", matcher=matcher, requests_per_minute=requests, tokens_per_minute=tokens)


def reserve(
    limits: TenantLimits, now: float, tokens: float = 0, tenant: str = RED, model: str = "m"
) -> Reservation | None:
    return limits.reserve(tenant, model, lambda: tokens, now)


def refused(
    limits: TenantLimits, now: float, tokens: float = 0, tenant: str = RED, model: str = "m"
) -> TenantLimited:
    with pytest.raises(TenantLimited) as error:
        reserve(limits, now, tokens, tenant, model)
    return error.value


def balances(limits: TenantLimits, now: float) -> dict[bytes, float]:
    return {bucket.key: bucket.balance(now) for bucket in limits.buckets()}


def bucket_of(limits: TenantLimits, kind: str = TOKENS) -> Bucket:
    (found,) = [bucket for bucket in limits.buckets() if bucket.kind is kind]
    return found


def test_a_minutes_worth_is_there_at_once_and_comes_back_over_a_minute():
    limits = one(requests=3)
    for _ in range(3):
        assert reserve(limits, 0.0) is not None
    error = refused(limits, 0.0)
    assert (error.reason, error.per_minute) == (REQUESTS, 3)
    assert error.retry_after_s == pytest.approx(20.0)
    refused(limits, 19.9)
    assert reserve(limits, 20.0) is not None
    refused(limits, 20.0)
    assert reserve(limits, 40.0) is not None
    for _ in range(3):
        reserve(limits, 1000.0)
    refused(limits, 1000.0)


def test_tokens_are_reserved_and_what_was_too_much_comes_back():
    limits = one(tokens=100)
    reservation = reserve(limits, 0.0, 80)
    assert reservation is not None
    assert refused(limits, 0.0, 30).reason == TOKENS
    reservation.settle(10, 0.0)
    assert balances(limits, 0.0) == {b"auth:red\0\0tokens": 90.0}
    assert reserve(limits, 0.0, 90) is not None


def test_what_was_too_little_is_owed():
    limits = one(tokens=60)
    reservation = reserve(limits, 0.0, 10)
    assert reservation is not None
    reservation.settle(90, 0.0)
    error = refused(limits, 0.0, 1)
    assert error.retry_after_s == pytest.approx(31.0)
    refused(limits, 30.0, 1)
    assert reserve(limits, 31.0, 1) is not None


def test_a_refund_gives_request_and_tokens_back_and_a_settlement_keeps_the_request():
    limits = one(requests=1, tokens=100)
    first = reserve(limits, 0.0, 100)
    assert first is not None
    first.refund(0.0)
    second = reserve(limits, 0.0, 100)
    assert second is not None
    second.settle(0, 0.0)
    assert refused(limits, 0.0).reason == REQUESTS


def test_a_refund_never_fills_a_bucket_above_its_burst():
    limits = one(requests=1, tokens=100)
    reservation = reserve(limits, 0.0, 100)
    assert reservation is not None
    reservation.refund(3600.0)
    assert set(balances(limits, 3600.0).values()) == {1.0, 100.0}


def test_a_reservation_ends_once():
    reservation = reserve(one(requests=5), 0.0)
    assert reservation is not None
    reservation.settle(0, 0.0)
    for end in (lambda: reservation.refund(0.0), lambda: reservation.settle(0, 0.0)):
        with pytest.raises(AssertionError):
            end()


def test_a_request_gets_all_its_buckets_or_none():
    limits = one(requests=2, tokens=100, model_rules=(rule("m", requests=1),))
    before = {}
    assert reserve(limits, 0.0, 10) is not None
    before = balances(limits, 0.0)
    assert refused(limits, 0.0, 10).reason == REQUESTS
    assert balances(limits, 0.0) == before
    assert reserve(limits, 0.0, 10, model="other") is not None
    assert refused(limits, 0.0, 10, model="other").per_minute == 2


def test_a_rule_has_a_bucket_of_its_own_beside_the_tenants():
    limits = one(tokens=100, model_rules=(rule("big", tokens=50, kind="prefix"),))
    assert reserve(limits, 0.0, 40, model="big-1") is not None
    assert refused(limits, 0.0, 20, model="big-2").per_minute == 50
    assert reserve(limits, 0.0, 60, model="small") is not None
    assert refused(limits, 0.0, 10, model="big-3").per_minute == 100
    assert set(balances(limits, 0.0)) == {b"auth:red\0\0tokens", b"auth:red\0r-big\0tokens"}


def test_more_than_the_limit_is_told_to_be_too_large_and_takes_nothing():
    limits = one(requests=10, tokens=100)
    error = refused(limits, 0.0, 101)
    assert (error.reason, error.asked, error.per_minute) == (TOO_LARGE, 101, 100)
    assert error.retry_after_s >= 1
    assert set(balances(limits, 0.0).values()) == {10.0, 100.0}
    assert reserve(limits, 0.0, 100) is not None
    assert refused(limits, 0.0, 10**400).reason == TOO_LARGE  # no arithmetic on what a client invents


def test_no_estimate_is_made_where_tokens_are_not_limited():
    def never() -> float:
        raise AssertionError("asked for")

    assert one(requests=1).reserve(RED, "m", never, 0.0) is not None
    assert one().reserve(RED, "m", never, 0.0) is None
    assert one(requests=1).reserve("auth:blue", "m", never, 0.0) is None


def test_who_has_no_plan_has_the_default_one_by_himself():
    limits = TenantLimits(
        Plans(
            default_policy=Plan(requests_per_minute=1),
            tenants=(TenantPlan(tenant_key=RED),),
        )
    )
    for tenant in ("ip:1", "ip:2", "auth:blue"):
        assert reserve(limits, 0.0, tenant=tenant) is not None
        refused(limits, 0.0, tenant=tenant)
    for _ in range(5):
        assert reserve(limits, 0.0) is None  # named, and nothing is limited


def test_the_tightest_bucket_of_a_kind_is_what_a_client_is_told():
    limits = one(requests=10, tokens=100, model_rules=(rule("m", requests=2),))
    reserve(limits, 0.0, 30)
    told = limits.allowances(RED, "m", 0.0)
    assert (told[REQUESTS].limit, told[REQUESTS].remaining) == (2, 1)
    assert told[REQUESTS].reset_s == pytest.approx(30.0)
    assert (told[TOKENS].limit, told[TOKENS].remaining) == (100, 70)
    assert limits.allowances(RED, "other", 0.0)[REQUESTS].remaining == 9
    assert limits.allowances("auth:blue", "m", 0.0) == {}


# ---- bounds


def used_up(limits: TenantLimits, now: float, tenant: str) -> None:
    reservation = reserve(limits, now, tenant=tenant)
    assert reservation is not None
    reservation.settle(0, now)


def test_only_those_with_full_buckets_are_forgotten():
    limits = TenantLimits(Plans(default_policy=Plan(requests_per_minute=1)), tenants_max=2)
    used_up(limits, 0.0, "ip:a")
    used_up(limits, 30.0, "ip:b")
    used_up(limits, 60.0, "ip:c")  # a is full again and goes, b is not
    assert limits.tenant_count == 2
    refused(limits, 60.0, tenant="ip:b")
    refused(limits, 60.0, tenant="ip:c")
    used_up(limits, 60.0, "ip:d")  # nobody can go: d pays with all who have no place
    refused(limits, 60.0, tenant="ip:e")
    used_up(limits, 90.0, "ip:e")  # b is full again


def test_a_flood_of_names_gets_one_bucket_together_and_no_full_one_for_coming_back():
    limits = TenantLimits(Plans(default_policy=Plan(requests_per_minute=2)), tenants_max=50)
    admitted = 0
    for round_ in range(4):
        for number in range(200):
            try:
                admitted += reserve(limits, 0.0 + round_ * 1e-3, tenant=f"ip:{number}") is not None
            except TenantLimited:
                pass
    assert limits.tenant_count == 50
    assert admitted == 50 * 2 + 2
    assert OVERFLOW_TENANT.encode() in b"".join(balances(limits, 1.0))


def test_who_has_a_request_in_flight_is_not_forgotten():
    limits = TenantLimits(Plans(default_policy=Plan(tokens_per_minute=60)), tenants_max=1)
    reservation = reserve(limits, 0.0, 30, tenant="ip:a")
    assert reservation is not None
    reserve(limits, 600.0, 60, tenant="ip:b")
    reservation.settle(90, 600.0)  # the debt is a's and does not get lost
    assert refused(limits, 600.0, 31, tenant="ip:a").reason == TOKENS
    assert reserve(limits, 1200.0, 1, tenant="ip:c") is not None  # a is full again and goes
    assert limits.tenant_count == 1


def test_looking_for_someone_to_forget_has_an_end_and_moves_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits_module, "EVICTIONS_TRIED", 2)
    limits = TenantLimits(Plans(default_policy=Plan(requests_per_minute=1)), tenants_max=4)
    for number in range(3):
        reserve(limits, 0.0, tenant=f"ip:busy-{number}")  # in flight for ever
    idle = reserve(limits, 0.0, tenant="ip:idle")
    assert idle is not None
    idle.settle(0, 0.0)
    reserve(limits, 100.0, tenant="ip:new-1")
    assert limits.tenant_count == 4 and any(b"ip:other" in key for key in balances(limits, 100.0))
    assert reserve(limits, 100.0, tenant="ip:new-2") is not None
    assert b"ip:idle\0\0requests" not in balances(limits, 100.0)


def test_models_that_clients_invent_make_no_buckets():
    limits = one(requests=1_000_000, tokens=1_000_000, model_rules=(rule("llama", tokens=5, kind="prefix"),))
    for number in range(1000):
        reserve(limits, 0.0, 0, model=f"llama-{number}")
    assert len(list(limits.buckets())) == 3
    (account,) = limits._named.values()
    assert len(account.known) <= limits_module.MODELS_REMEMBERED


# ---- another file


def test_a_reload_keeps_balances_debts_and_shares():
    limits = one(requests=10, tokens=100, model_rules=(rule("m", tokens=50),))
    reservation = reserve(limits, 0.0, 40)
    assert reservation is not None
    bucket_of(limits, REQUESTS).set_share(0.0, 0.5)
    plan = TenantPlan(
        tenant_key=RED, requests_per_minute=20, tokens_per_minute=30, model_rules=(rule("m", tokens=500),)
    )
    limits.renew(Plans(tenants=(plan,)), 0.0)
    assert balances(limits, 0.0) == {
        b"auth:red\0\0requests": 5.0,  # its share, and no more because the limit is higher
        b"auth:red\0\0tokens": 30.0,  # cut to the new burst
        b"auth:red\0r-m\0tokens": 10.0,
    }
    reservation.settle(60, 0.0)  # what was reserved before is settled after
    assert balances(limits, 0.0)[b"auth:red\0\0tokens"] == 10.0
    assert balances(limits, 0.0)[b"auth:red\0r-m\0tokens"] == -10.0
    assert bucket_of(limits, REQUESTS).burst == 10.0


def test_a_tenant_that_is_named_later_keeps_what_it_has_used_and_one_without_a_plan_is_free():
    default = Plan(requests_per_minute=10)
    limits = TenantLimits(Plans(default_policy=default))
    for _ in range(10):
        reserve(limits, 0.0)
    named = TenantPlan(tenant_key=RED, requests_per_minute=20)
    limits.renew(Plans(default_policy=default, tenants=(named,)), 0.0)
    refused(limits, 0.0)
    limits.renew(Plans(default_policy=default), 0.0)
    refused(limits, 0.0)
    limits.renew(Plans(tenants=(TenantPlan(tenant_key="auth:blue"),)), 0.0)
    assert reserve(limits, 0.0) is None
    assert limits.tenant_count == 1


def test_the_common_bucket_of_a_flood_follows_the_default_policy():
    limits = TenantLimits(Plans(default_policy=Plan(requests_per_minute=1)), tenants_max=1)
    reserve(limits, 0.0, tenant="ip:a")
    reserve(limits, 0.0, tenant="ip:b")
    limits.renew(Plans(default_policy=Plan(requests_per_minute=2)), 0.0)
    assert refused(limits, 0.0, tenant="ip:c").per_minute == 2
    limits.renew(Plans(tenants=(TenantPlan(tenant_key=RED, requests_per_minute=1),)), 0.0)
    assert list(limits.buckets()) == []


# ---- shares of a cluster


def test_a_share_makes_burst_and_rate_a_part_and_never_makes_tokens():
    bucket = Bucket(b"k", TOKENS, 60.0, 1.0, 0.0)
    bucket.set_share(0.0, 0.25)
    assert (bucket.balance(0.0), bucket.burst, bucket.rate_per_s) == (15.0, 15.0, 0.25)
    bucket.set_share(0.0, 1.0)
    assert bucket.balance(0.0) == 15.0
    bucket.set_share(10.0, 0.0)
    assert bucket.balance(10.0) == 0.0 and not bucket.take(1.0, 10.0)


def test_a_debt_stays_whatever_the_share():
    bucket = Bucket(b"k", TOKENS, 60.0, 1.0, 0.0)
    bucket.give_back(-100.0, 0.0)
    for share in (0.0, 0.5, 1.0):
        bucket.set_share(0.0, share)
        assert bucket.balance(0.0) == -40.0


def test_what_is_larger_than_the_share_enters_when_the_bucket_is_full_and_is_owed():
    limits = one(tokens=60)
    limits.first = lambda key, now: (0.5, 0.5)
    assert reserve(limits, 0.0, 50) is not None
    assert balances(limits, 0.0)[b"auth:red\0\0tokens"] == -20.0
    refused(limits, 99.9, 50)
    assert reserve(limits, 100.0, 50) is not None
    assert refused(limits, 0.0, 61).reason == TOO_LARGE


def test_demand_is_what_was_asked_admitted_or_not_since_it_was_read():
    limits = one(requests=2)
    for _ in range(2):
        reserve(limits, 0.0)
    for _ in range(3):
        refused(limits, 0.0)
    bucket = bucket_of(limits, REQUESTS)
    assert (bucket.read_demand(), bucket.read_demand()) == (5.0, 0.0)


def test_a_share_of_nothing_refuses_with_a_wait_that_has_an_end():
    limits = one(requests=6)
    reserve(limits, 0.0)
    bucket_of(limits, REQUESTS).set_share(0.0, 0.0)
    assert refused(limits, 0.0).retry_after_s == limits_module.SHARE_WAIT_S
    assert refused(limits, 1e9).reason == REQUESTS
    assert limits.allowances(RED, "m", 0.0)[REQUESTS].remaining == 0


# ---- every schedule

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 70)),
        st.tuples(st.just("wait"), st.floats(0, 90)),
        st.tuples(st.just("settle"), st.integers(0, 90)),
        st.tuples(st.just("refund"), st.just(0)),
        st.tuples(st.just("share"), st.floats(0, 1)),
    ),
    max_size=60,
)


@given(STEPS)
def test_what_is_held_used_and_left_is_never_more_than_rate_and_burst(steps: list[tuple[str, Any]]):
    limits = one(requests=4, tokens=60)
    now, rate_s, held = 0.0, 1.0, []
    made_tokens, made_requests = 60.0, 4.0  # what the limit allows until now
    used_tokens, used_requests, owed = 0.0, 0.0, 0.0
    reserve(limits, now, 0).refund(now)  # type: ignore[union-attr]
    for step, value in steps:
        if step == "ask":
            try:
                reservation = reserve(limits, now, value)
            except TenantLimited as error:
                assert error.retry_after_s >= 0.0
            else:
                assert reservation is not None
                held.append(reservation)
        elif step == "wait":
            now += value
            made_tokens += value * rate_s
            made_requests += value * rate_s * 4 / 60
        elif step == "share":
            for bucket in limits.buckets():
                bucket.set_share(now, value)
            rate_s = value
        elif held:
            reservation = held.pop(0)
            if step == "settle":
                used_tokens += value
                used_requests += 1
                owed += max(value - reservation.tokens, 0.0)
                reservation.settle(value, now)
            else:
                reservation.refund(now)
        tokens, requests = bucket_of(limits).balance(now), bucket_of(limits, REQUESTS).balance(now)
        held_tokens = sum(reservation.tokens for reservation in held)
        assert used_tokens + held_tokens + tokens <= made_tokens + 1e-6
        assert used_requests + len(held) + requests <= made_requests + 1e-6
        assert tokens <= bucket_of(limits).burst + 1e-9
        # What is owed is at most one request larger than the share, and answers that were longer than they said.
        assert tokens >= -60.0 - owed - 1e-6


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 60)), max_size=80))
def test_without_debts_no_more_is_admitted_than_burst_and_rate(asked: list[tuple[float, int]]):
    limits = one(tokens=60)
    now, admitted = 0.0, 0.0
    for pause_s, tokens in asked:
        now += pause_s
        try:
            reserve(limits, now, tokens)
            admitted += tokens
        except TenantLimited as error:
            # ... and it is admitted when it was told to come back.
            assert error.reason == TOKENS
            wait_s = error.retry_after_s
            later = bucket_of(limits).balance(now) + wait_s * 1.0
            assert later + 1e-5 >= tokens
        assert admitted <= 60.0 + now + 1e-5


@given(st.lists(st.tuples(st.floats(0, 3), st.sampled_from((0, 1)), st.floats(0, 1)), max_size=60))
def test_two_nodes_whose_shares_wander_admit_the_limit_together(steps: list[tuple[float, int, float]]):
    nodes = [one(requests=30), one(requests=30)]
    for node in nodes:
        node.first = lambda key, now: (0.5, 0.5)
        reserve(node, 0.0).refund(0.0)  # type: ignore[union-attr]
    now, admitted = 0.0, 0
    for pause_s, place, share in steps:
        now += pause_s
        for node, part in zip(nodes, (share, 1.0 - share), strict=True):
            bucket_of(node, REQUESTS).set_share(now, part)
        for _ in range(5):
            try:
                reserve(nodes[place], now)
                admitted += 1
            except TenantLimited:
                break
        # One request per node may be let in by a bucket that is full with less than one.
        assert admitted <= 30 + now / 2 + 2 + 1e-6


def test_buckets_that_were_asked_are_told_once_and_only_to_those_who_want_to_know():
    limits = one(requests=60, tokens=600)
    reserve(limits, 0.0, 10)
    assert not list(limits.asked())
    limits.heeds_demand = True
    reserve(limits, 0.0, 10)
    assert {bucket.kind for bucket in limits.asked()} == {REQUESTS, TOKENS}
    assert not list(limits.asked())


def test_a_bucket_is_found_by_its_key_and_begins_with_what_it_is_given():
    limits = one(tokens=600)
    limits.first = lambda key, now: (0.5, 0.1) if key == b"auth:red\0\0tokens" else (1.0, 1.0)
    assert limits.find(b"auth:red\0\0tokens") is None
    reserve(limits, 0.0, 10)
    found = limits.find(b"auth:red\0\0tokens")
    assert found is not None
    assert (found.burst, found.balance(0.0)) == (300.0, 50.0)
    assert (found.capacity, found.refill_s) == (600.0, 60.0)
    assert limits.find(b"auth:red\0\0requests") is None
    assert limits.find(b"auth:nobody\0\0tokens") is None
