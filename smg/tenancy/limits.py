"""Requests and tokens per minute of each tenant: what is reserved before a request is routed, and settled after it.

Owns the buckets of all tenants and the exactness of their balances (contract ADM-4, ADM-5, ADM-8). A tenant has a bucket of
requests and one of tokens as far as its plan limits them, and one more of each for the rule that matches the model. Of these
a request gets all or none:

    reservation = limits.reserve(tenant, model, estimate, now)    raises TenantLimited, and nothing was taken
    ...
    reservation.settle(used_tokens, now)    an answer came: what was too much comes back, what was too little is owed
    reservation.refund(now)                 nothing was answered: all comes back; one of the two, exactly once

It never waits, never refuses by HTTP (the gateway words the 429) and never knows where a tenant's name comes from.

The cluster's side (`tenancy/shares`, `bridge/limits`): `TenantLimits.buckets` are all there are now, `Bucket.key` is the same
on every node, `Bucket.read_demand` tells what was asked here since it was last read, and `Bucket.set_share` makes the bucket
the given part of the whole limit. `TenantLimits.first` says what buckets begin with that are made later, and
`TenantLimits.asked` which were asked lately, so that nobody has to look at all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import msgspec

from smg.errors import SmgError
from smg.tenancy.plans import Plan, Plans, Rule

REQUESTS = "requests"
TOKENS = "tokens"
TOO_LARGE = "too_large"
"""Why a request is refused: one of the first two is used up, or it asks for more tokens than a full bucket has."""

TENANTS_MAX = 65_536
"""Tenants without a plan of their own that are remembered one by one: at 1 KiB each, 64 MiB. Addresses are made by clients, and
only a flood from more of them than this within a minute meets the bound."""

EVICTIONS_TRIED = 8
"""Remembered tenants that are looked at to make room for a new one: each look moves on, so all are seen in turn."""

MODELS_REMEMBERED = 64
"""Models per tenant for which the matching buckets are remembered; names of models may be made by clients."""

OVERFLOW_TENANT = "ip:other"
"""Who pays for new tenants while nobody can be forgotten: all of them together, with one default policy."""

RETRY_AFTER_MAX_S = 3600.0
"""A longer wait than this is not told: by then the plan may be another one."""

SHARE_WAIT_S = 1.0
"""When to come back to a node whose share is nothing: what was asked of it moves shares there within a round of gossip."""

ASKED_MAX = 65_536
"""Buckets remembered as asked until somebody looks: ten times a second in a cluster, so this is never reached there."""

SECONDS_PER_MINUTE = 60.0

First = Callable[[bytes, float], tuple[float, float]]
"""(key, now) → what a new bucket begins with: its part of the limit, and its balance in parts of a full bucket."""

SLACK = 1e-6
"""What may be missing from a bucket: refilling is float arithmetic, and a client that comes back exactly when it was told to
must not be sent away for the last bit."""


class TenantLimited(SmgError):
    """A tenant has used up what its plan allows; nothing was taken.

    `reason` is `requests`, `tokens` or `too_large`; for the last one `asked` tokens never fit into `per_minute`.
    `retry_after_s` is when it is worth trying again.
    """

    def __init__(self, reason: str, retry_after_s: float, per_minute: float, asked: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.per_minute = per_minute
        self.asked = asked


class Bucket:
    """One limit of one tenant: `per_minute` at most at once, refilled continuously with `per_minute` a minute; full at first.

    For whoever divides limits between nodes:

    * `key` is the same on every node and after every restart: tenant, rule ("" for the tenant as a whole) and kind
      (`requests` or `tokens`), joined by zero bytes.
    * `per_minute` is the nominal limit, of the cluster as a whole; `share` the part of it that this node may give out,
      1.0 at first. `burst` and `rate_per_s` are what follows for this node.
    * `read_demand()` is the amount asked for since it was last read, admitted or not.
    * `set_share(now, fraction)` changes both burst and rate. The balance is never scaled: what is above the new burst is lost
      and nothing is won, so that shares that wander between nodes can never add up to more than the limit; a debt stays.

    A balance may be negative: an answer that was longer than its estimate is owed. So may it be after a request that asked
    for more than the burst of this node, though not more than the limit of the cluster: it is let in when the bucket is full,
    and the rest is owed too. Over any time the admitted amount is at most rate x time + burst + what is owed.
    """

    __slots__ = ("_asked", "_at_s", "_balance", "burst", "key", "kind", "per_minute", "rate_per_s", "share")

    def __init__(
        self, key: bytes, kind: str, per_minute: float, share: float, now: float, balance: float = math.inf
    ) -> None:
        self.key = key
        self.kind = kind
        self._asked = 0.0
        self._at_s = now
        self._balance = balance
        self.per_minute = per_minute
        self._spread(share)

    @property
    def capacity(self) -> float:
        """Tokens in a full bucket of the whole limit."""
        return self.per_minute

    @property
    def refill_s(self) -> float:
        """How long it takes until an empty one is full."""
        return SECONDS_PER_MINUTE

    def balance(self, now: float) -> float:
        """What there is now, negative for a debt; also brings the bucket up to date."""
        elapsed_s = now - self._at_s
        if elapsed_s > 0.0:
            self._at_s = now
            self._balance = min(self._balance + elapsed_s * self.rate_per_s, self.burst)
        return self._balance

    def take(self, amount: float, now: float) -> bool:
        """Takes `amount` if it is there, or if the bucket is full and it is more than a full one; False: nothing was taken."""
        self._asked += amount
        balance = self._balance
        if now > self._at_s:
            balance += (now - self._at_s) * self.rate_per_s
            if balance > self.burst:
                balance = self.burst
            self._at_s = now
        if balance + SLACK < amount and (balance + SLACK < self.burst or self.burst <= 0.0):
            self._balance = balance
            return False
        self._balance = balance - amount
        return True

    def ask(self, amount: float) -> None:
        """Counts as demand what another bucket has refused."""
        self._asked += amount

    def give_back(self, amount: float, now: float) -> None:
        """Returns a part of what was taken; a negative amount takes more. Never above the burst."""
        # What comes back before the refill or after it is the same; what is owed has to come out of the refilled bucket.
        balance = (self._balance if amount >= 0.0 else self.balance(now)) + amount
        self._balance = balance if balance < self.burst else self.burst

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` could be taken if nobody else takes any; a guess while the share is nothing."""
        if self.rate_per_s <= 0.0:
            return SHARE_WAIT_S
        missing = min(amount, self.burst) - self.balance(now)
        return 0.0 if missing <= SLACK else missing / self.rate_per_s

    def is_full(self, now: float) -> bool:
        """Whether forgetting the bucket and making it anew would change nothing."""
        return self.balance(now) + SLACK >= self.burst

    def read_demand(self) -> float:
        """The amount asked for since the last reading, admitted or not; begins anew."""
        asked, self._asked = self._asked, 0.0
        return asked

    def set_share(self, now: float, fraction: float) -> None:
        """From now on this node gives out `fraction` (0 to 1) of the limit; see the class."""
        assert 0.0 <= fraction <= 1.0, "a share is a part of the whole"
        self.balance(now)
        self._spread(fraction)

    def set_limit(self, now: float, per_minute: float) -> None:
        """The plan has changed; balance and debt stay, as far as they fit."""
        self.balance(now)
        self.per_minute = per_minute
        self._spread(self.share)

    def _spread(self, share: float) -> None:
        self.share = share
        self.burst = self.per_minute * share
        self.rate_per_s = self.burst / SECONDS_PER_MINUTE
        self._balance = min(self._balance, self.burst)


class Allowance:
    """What a tenant may use now, for the headers of ADM-8: the tightest bucket of a kind.

    `limit` is the nominal one per minute, `remaining` what this node would let through now, `reset_s` until it is full again.
    """

    __slots__ = ("limit", "remaining", "reset_s")

    def __init__(self, bucket: Bucket, now: float) -> None:
        balance = bucket.balance(now)
        self.limit = round(bucket.per_minute)
        self.remaining = max(0, math.floor(balance + SLACK))
        missing = bucket.burst - balance
        self.reset_s = (
            min(missing / bucket.rate_per_s, RETRY_AFTER_MAX_S)
            if bucket.rate_per_s > 0.0
            else RETRY_AFTER_MAX_S
        )


class Passed(msgspec.Struct, frozen=True, eq=False):
    """The buckets that a tenant's request for a model must pass: all, and those of requests and of tokens."""

    buckets: tuple[Bucket, ...]
    of_requests: tuple[Bucket, ...]
    of_tokens: tuple[Bucket, ...]


class Reservation(msgspec.Struct, eq=False):
    """What a request holds of the buckets of `account` until it is settled or refunded, exactly once. `tokens` is the estimate."""

    account: Account | None
    passed: Passed
    tokens: float

    def settle(self, used_tokens: float, now: float) -> None:
        """The request has used so many tokens; the request itself stays counted."""
        account = self.account
        assert account is not None, "a reservation was ended twice"
        self.account = None
        account.open_count -= 1
        rest = self.tokens - used_tokens
        if rest:
            for bucket in self.passed.of_tokens:
                bucket.give_back(rest, now)

    def refund(self, now: float) -> None:
        """Nothing was answered: everything comes back."""
        account = self.account
        assert account is not None, "a reservation was ended twice"
        self.account = None
        account.open_count -= 1
        for bucket in self.passed.buckets:
            bucket.give_back(self.tokens if bucket.kind is TOKENS else 1.0, now)


class Account:
    """The buckets of one tenant, by rule and kind; made as they are needed, so that unused rules cost nothing.

    `open_count` is the number of reservations that are not ended.
    """

    __slots__ = ("_buckets", "known", "name", "open_count", "plan")

    def __init__(self, name: str, plan: Plan) -> None:
        self.name = name
        self.plan = plan
        self.open_count = 0
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self.known: dict[str, Passed] = {}
        """What `for_model` has found, by model."""

    def buckets(self) -> Iterable[Bucket]:
        """All that were needed so far."""
        return self._buckets.values()

    def bucket(self, rule_id: str, kind: str) -> Bucket | None:
        """One of these."""
        return self._buckets.get((rule_id, kind))

    def for_model(self, model: str, first: First, now: float) -> Passed:
        """The buckets that a request for a model must pass; none when nothing limits it."""
        found = self.known.get(model)
        if found is None:
            buckets = self._find(model, first, now)
            found = Passed(
                buckets,
                tuple(bucket for bucket in buckets if bucket.kind is REQUESTS),
                tuple(bucket for bucket in buckets if bucket.kind is TOKENS),
            )
            if len(self.known) >= MODELS_REMEMBERED:
                self.known.clear()
            self.known[model] = found
        return found

    def is_idle(self, now: float) -> bool:
        """Whether forgetting the account would change nothing."""
        return not self.open_count and all(bucket.is_full(now) for bucket in self._buckets.values())

    def adopt(self, plan: Plan, now: float) -> None:
        """Takes another plan. Buckets that are still limits keep their balances; the others are forgotten."""
        self.plan = plan
        self.known.clear()
        limits: dict[tuple[str, str], int] = {}
        for kind, per_minute in _kinds(plan):
            limits["", kind] = per_minute
        for rule in plan.model_rules:
            for kind, per_minute in _kinds(rule):
                limits[rule.rule_id, kind] = per_minute
        for key in list(self._buckets):
            if key not in limits:
                del self._buckets[key]
            elif self._buckets[key].per_minute != limits[key]:
                self._buckets[key].set_limit(now, limits[key])

    def _find(self, model: str, first: First, now: float) -> tuple[Bucket, ...]:
        rule = self.plan.rule_for(model)
        found = [self._bucket("", kind, per_minute, first, now) for kind, per_minute in _kinds(self.plan)]
        if rule is not None:
            found += [
                self._bucket(rule.rule_id, kind, per_minute, first, now) for kind, per_minute in _kinds(rule)
            ]
        return tuple(found)

    def _bucket(self, rule_id: str, kind: str, per_minute: int, first: First, now: float) -> Bucket:
        bucket = self._buckets.get((rule_id, kind))
        if bucket is None:
            key = b"\0".join((self.name.encode(), rule_id.encode(), kind.encode()))
            share, part = first(key, now)
            bucket = self._buckets[rule_id, kind] = Bucket(
                key, kind, per_minute, share, now, part * per_minute
            )
        return bucket


class TenantLimits:
    """The limits of all tenants of one node.

    `first` is what a bucket begins with: full, and the whole of its limit; a node of a cluster begins with its part.
    `heeds_demand`: remember which buckets were asked. `tenants_max` bounds how many tenants without a plan of their own are remembered.
    """

    def __init__(self, plans: Plans, *, tenants_max: int = TENANTS_MAX) -> None:
        self.first: First = _whole
        self.heeds_demand = False
        self._asked: dict[Bucket, None] = {}
        self._tenants_max = tenants_max
        self._plans = plans
        self._named = {tenant.tenant_key: Account(tenant.tenant_key, tenant.plan) for tenant in plans.tenants}
        # In the order in which they came, or were last looked at and found busy: the first one is the next to go.
        self._others: dict[str, Account] = {}
        self._overflow: Account | None = None

    @property
    def plans(self) -> Plans:
        """What holds now."""
        return self._plans

    @property
    def tenant_count(self) -> int:
        """Tenants that are remembered, with and without a plan of their own."""
        return len(self._named) + len(self._others)

    def buckets(self) -> Iterator[Bucket]:
        """Every bucket there is now. Do not keep them over a wait: tenants are forgotten when they are idle."""
        for accounts in (self._named, self._others):
            for account in accounts.values():
                yield from account.buckets()
        if self._overflow is not None:
            yield from self._overflow.buckets()

    def asked(self) -> Iterable[Bucket]:
        """The buckets that were asked since this was last called."""
        asked, self._asked = self._asked, {}
        return asked

    def find(self, key: bytes) -> Bucket | None:
        """The bucket with this key, if it is here."""
        tenant, _, rest = key.partition(b"\0")
        rule_id, _, kind = rest.partition(b"\0")
        name = tenant.decode("utf-8", "replace")
        account = self._named.get(name) or self._others.get(name)
        if account is None:
            return None
        return account.bucket(rule_id.decode("utf-8", "replace"), kind.decode("utf-8", "replace"))

    def reserve(
        self, tenant: str, model: str, estimate: Callable[[], float], now: float
    ) -> Reservation | None:
        """Takes one request and the tokens of `estimate` out of all buckets of a tenant for a model; None: nothing limits it.

        The estimate is made only when tokens are limited. Raises TenantLimited, and nothing was taken.
        """
        account = self._named.get(tenant) or self._others.get(tenant) or self._new(tenant, now)
        if account is None:
            return None
        passed = account.known.get(model) or account.for_model(model, self.first, now)
        if not passed.buckets:
            return None
        if self.heeds_demand and len(self._asked) < ASKED_MAX:
            self._asked.update(dict.fromkeys(passed.buckets))
        for bucket in passed.of_requests:
            if not bucket.take(1.0, now):
                raise _refused(passed, bucket, estimate(), now)
        tokens = 0.0
        if passed.of_tokens:
            tokens = estimate()
            for bucket in passed.of_tokens:
                if tokens > bucket.per_minute or not bucket.take(tokens, now):
                    raise _refused(passed, bucket, tokens, now)
        account.open_count += 1
        return Reservation(account, passed, tokens)

    def allowances(self, tenant: str, model: str, now: float) -> dict[str, Allowance]:
        """What is left to a tenant, by kind (ADM-8); empty when nothing limits it."""
        account = self._named.get(tenant) or self._others.get(tenant) or self._new(tenant, now)
        found: dict[str, Allowance] = {}
        if account is not None:
            for bucket in account.for_model(model, self.first, now).buckets:
                allowance = Allowance(bucket, now)
                known = found.get(bucket.kind)
                if known is None or allowance.remaining < known.remaining:
                    found[bucket.kind] = allowance
        return found

    def renew(self, plans: Plans, now: float) -> None:
        """Takes the plans of a reload; what still is a limit keeps its balance, its debt and its share."""
        self._plans = plans
        accounts = {**self._others, **self._named}
        self._named, self._others = {}, {}
        for tenant in plans.tenants:
            account = accounts.pop(tenant.tenant_key, None)
            if account is None:
                account = Account(tenant.tenant_key, tenant.plan)
            else:
                account.adopt(tenant.plan, now)
            self._named[tenant.tenant_key] = account
        default = plans.default_policy
        if default is None:
            self._overflow = None
            return
        for name, account in accounts.items():
            account.adopt(default, now)
            self._others[name] = account
        if self._overflow is not None:
            self._overflow.adopt(default, now)

    def _new(self, tenant: str, now: float) -> Account | None:
        """The account of a tenant that is not remembered; None without a default policy."""
        plan = self._plans.default_policy
        if plan is None:
            return None
        if len(self._others) >= self._tenants_max and not self._forget_one(now):
            if self._overflow is None:
                self._overflow = Account(OVERFLOW_TENANT, plan)
            return self._overflow
        account = self._others[tenant] = Account(tenant, plan)
        return account

    def _forget_one(self, now: float) -> bool:
        """Makes room. Only who has all its buckets full is forgotten: else coming back would be a new full bucket."""
        for _ in range(min(EVICTIONS_TRIED, len(self._others))):
            name = next(iter(self._others))
            account = self._others.pop(name)
            if account.is_idle(now):
                return True
            self._others[name] = account
        return False


def _whole(key: bytes, now: float) -> tuple[float, float]:
    """What a bucket of a node that is alone begins with."""
    return 1.0, 1.0


def _kinds(limits: Plan | Rule) -> Iterator[tuple[str, int]]:
    if limits.requests_per_minute is not None:
        yield REQUESTS, limits.requests_per_minute
    if limits.tokens_per_minute is not None:
        yield TOKENS, limits.tokens_per_minute


def _refused(passed: Passed, refusing: Bucket, tokens: float, now: float) -> TenantLimited:
    """`refusing` has not given: those before it get back what they gave, those behind it hear what was asked."""
    has_given = True
    for bucket in (*passed.of_requests, *passed.of_tokens):
        amount = 1.0 if bucket.kind is REQUESTS else tokens
        if bucket is refusing:
            has_given = False
        elif has_given:
            bucket.give_back(amount, now)
        else:
            bucket.ask(amount)
    return _refusal(passed.buckets, tokens, now)


def _refusal(buckets: tuple[Bucket, ...], tokens: float, now: float) -> TenantLimited:
    """The reason that keeps the request out for longest."""
    found: TenantLimited | None = None
    for bucket in buckets:
        asked = 1.0 if bucket.kind is REQUESTS else tokens
        if asked > bucket.per_minute:
            return TenantLimited(TOO_LARGE, SECONDS_PER_MINUTE, bucket.per_minute, tokens)
        wait_s = min(bucket.wait_s(asked, now), RETRY_AFTER_MAX_S)
        if found is None or wait_s > found.retry_after_s:
            found = TenantLimited(bucket.kind, wait_s, bucket.per_minute, tokens)
    assert found is not None, "somebody refused"
    return found
