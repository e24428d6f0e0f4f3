"""When a node that has just started begins to take requests: as soon as it can tell what it would do with them.

Owns the rule. A node knows nothing of its workers in its first moments, and would answer 503 where a tenth of a second later
it serves; a load balancer that only counts refused connections (nginx, DNS) sends it requests in just these moments. So
connections wait in the kernel until a worker is ready, or until it is known that none is. Must never hold a node back for longer
than `FIRST_LOOK_S`, since its probes wait on the same port.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from smg.fleet.registry import Registry

FIRST_LOOK_S = 1.0
"""A worker answers its first probe in milliseconds and a mesh is joined in a fifth of a second; who is slower is not waited for."""
LOOK_S = 0.01


async def wait_decided(registry: Registry, is_ready: Callable[[], bool], *, may_find_some: bool) -> None:
    """Returns when a request would find a worker, when every worker has missed its first probe, or after `FIRST_LOOK_S`.

    `may_find_some`: workers may come from elsewhere, so a node without any waits as well.
    """
    with trio.move_on_after(FIRST_LOOK_S):
        while not is_ready():
            workers = registry.workers()
            if not workers and not may_find_some:
                return
            if workers and not any(worker.health.is_untried for worker in workers):
                return
            await trio.sleep(LOOK_S)
