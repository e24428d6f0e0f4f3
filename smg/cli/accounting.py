"""Builds what counts and bounds the tenants' use: the book, the limits of the limits file, and how that file is read again.

Owns the wiring of ADM-4 and of usage accounting for the composition root, and the part of a hot reload that belongs to it.
Starts nothing. A file that is wrong ends the start, and never a running node.
"""

from __future__ import annotations

import time

import trio

from smg.bridge.identity import node_name
from smg.errors import SettingsError
from smg.gateway.accounts import Accounts
from smg.gateway.gates import Tenants
from smg.gateway.usage_api import PeerBooks, UsageApi
from smg.services.reload import Change, Part
from smg.settings import Settings
from smg.telemetry import log as logs
from smg.telemetry.metrics import Metrics
from smg.tenancy.keys import SHARED
from smg.tenancy.limits import TenantLimits
from smg.tenancy.plans import Plans
from smg.tenancy.usage import Book
from smg.yaml_config import load_yaml

FLAG = "--tenant-rate-limit-config"


class Accounting:
    """The accounts of one node: `accounts` for the request path, `limits` when there are any, the `book` of usage and since
    when it counts (seconds since 1970).

    Raises `SettingsError` when the limits file cannot be used.
    """

    def __init__(self, settings: Settings, tenants: Tenants, metrics: Metrics) -> None:
        limits = settings.limits
        self._path = limits.tenant_rate_limit_config if limits.tenant_rate_limit_enabled else None
        self.limits = None if self._path is None else TenantLimits(read_plans(self._path))
        self.book = Book()
        self.since_s = time.time()
        self.accounts = Accounts(tenants, self.book, metrics, self.limits)
        mesh = settings.mesh
        self._node = node_name(mesh) if mesh.ha_mesh else "local"
        metrics.add_source(self.book.samples)
        if self.limits is not None:
            for doubt in doubts(self.limits.plans, settings):
                logs.logger("smg").warn(doubt)

    def api(self, peers: PeerBooks | None) -> UsageApi:
        """`GET /v1/usage`; `peers` tells the books of the other nodes of a mesh."""
        return UsageApi(self.book, node=self._node, since_s=self.since_s, peers=peers)

    def parts(self) -> list[Part]:
        """What of these rooms can be reloaded."""
        return [] if self._path is None else [Part("tenant limits", (self._path,), self._prepare)]

    def _prepare(self) -> Change | None:
        """See `Part.prepare`: the file is read whole before anything changes; balances and debts stay."""
        limits = self.limits
        assert limits is not None and self._path is not None, "without a file there is no such part"
        plans = read_plans(self._path)
        lines = limits.plans.changes_to(plans)
        if not lines:
            return None
        return Change(tuple(lines), lambda: limits.renew(plans, trio.current_time()))


def doubts(plans: Plans, settings: Settings) -> list[str]:
    """Tenants of the file that nobody can be; one line each. They may come to be: keys are read again too."""
    auth = settings.auth
    known = {f"auth:{tenant}" for tenant, _ in auth.tenant_keys()}
    if auth.api_key is not None:
        known.add(SHARED)
    found = []
    for tenant in plans.tenants:
        name = tenant.tenant_key
        if name.startswith("auth:") and name not in known:
            found.append(f"{FLAG}: {name}: no key of this tenant is given")
        elif name.startswith("header:") and not auth.trust_tenant_header:
            found.append(f"{FLAG}: {name}: names nobody without --trust-tenant-header")
    return found


def read_plans(path: str) -> Plans:
    """The limits file. Raises `SettingsError` with line and member."""
    plans = load_yaml(path, Plans, FLAG)
    if plans == Plans():
        raise SettingsError(
            FLAG, repr(path), "limits nobody; give default_policy or tenants", is_combination=True
        )
    return plans
