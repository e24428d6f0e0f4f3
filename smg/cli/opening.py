"""When a node that has just started begins to take requests: as soon as it can tell what it would do with them.

Owns the rule. A node knows nothing of its workers in its first moments: it would answer 503 or 404, or send a request to an engine
of another model, where a tenth of a second later it serves. A load balancer that only counts refused connections (nginx, DNS)
sends it requests in just these moments. So connections wait in the kernel until every worker has been met. Must never hold a
node back for longer than `FIRST_LOOK_S`, since its probes wait on the same port.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from smg.fleet.registry import Registry
from smg.fleet.worker import Status, Worker

FIRST_LOOK_S = 1.0
"""A worker answers its first probe in milliseconds and a mesh is joined in a fifth of a second; who is slower is not waited for."""
LOOK_S = 0.01


async def wait_decided(
    registry: Registry, is_first_asked: Callable[[Worker], bool], *, may_find_some: bool
) -> None:
    """Returns when every worker has answered or missed its first probe and told its models, or after `FIRST_LOOK_S`.

    `is_first_asked`: whether a worker's models have been asked for and not been told. `may_find_some`: workers may come
    from elsewhere, so a node without any waits as well.
    """
    with trio.move_on_after(FIRST_LOOK_S):
        while not _is_decided(registry.workers(), is_first_asked, may_find_some):
            await trio.sleep(LOOK_S)


def _is_decided(
    workers: Sequence[Worker], is_first_asked: Callable[[Worker], bool], may_find_some: bool
) -> bool:
    if not workers:
        return not may_find_some
    return not any(
        worker.health.is_untried or (worker.status is Status.READY and is_first_asked(worker))
        for worker in workers
    )
