"""Gives the limits of a node to its mesh, so that they hold for all nodes together.

Owns the list of what is shared: the request rate (ADM-3) and the limits of tenants (ADM-4, ADM-5). Slots and queue
(`--max-concurrent-requests`) are each node's own: they guard its memory, and a request in flight cannot be moved.
"""

from __future__ import annotations

from smg.bridge.limits import SharedLimits
from smg.tenancy.admission import Admission
from smg.tenancy.limits import TenantLimits
from smg.tenancy.shares import OneLimit


def share_limits(
    shared: SharedLimits, admission: Admission, tenants: TenantLimits | None, now: float
) -> None:
    """Call it before the node runs."""
    if admission.rate_limit is not None:
        shared.add(OneLimit(admission.rate_limit), now)
    if tenants is not None:
        tenants.first = shared.first
        tenants.heeds_demand = True
        shared.add(tenants, now)
