"""The probes: does the process live, may it get requests (LIFE-1, LIFE-2).

Owns what the two probes answer, on the serving port and on `--health-check-port` (LIFE-4). Looks at the registry each
time it is asked, so a change of a worker shows at once (LIFE-3); keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from smg.fleet.registry import Registry
from smg.fleet.worker import Kind, Status
from smg.gateway import problem
from smg.net.plain import Request, Response, json_response, text_response

INSUFFICIENT = "insufficient healthy workers"
DRAINING = "draining"

_PATHS = {"/liveness": "liveness", "/health": "liveness", "/readiness": "readiness"}


class Probes:
    """The endpoints `liveness` and `readiness`; `is_draining` tells whether the node is going away (LIFE-5).

    `needs_pair`: prefill-decode mode, where a worker of each kind is needed.
    """

    def __init__(
        self, registry: Registry, is_draining: Callable[[], bool], *, needs_pair: bool = False
    ) -> None:
        self._registry = registry
        self._is_draining = is_draining
        self._needs_pair = needs_pair

    async def liveness(self, request: Request) -> Response:
        """200 `OK` as long as the process runs."""
        return text_response(200, "OK")

    async def readiness(self, request: Request) -> Response:
        """200 with counts when requests can be served, else 503 with the reason; draining wins."""
        reason = self.reason_not_ready()
        if reason is not None:
            return json_response(503, {"status": "not ready", "reason": reason})
        workers = self._registry.workers()
        healthy = sum(1 for worker in workers if worker.status is Status.READY)
        return json_response(
            200, {"status": "ready", "healthy_workers": healthy, "total_workers": len(workers)}
        )

    async def only_probes(self, request: Request) -> Response:
        """The handler of the second listener: the three probes and nothing else (LIFE-4).

        Raises `GatewayError` 404, or 405 for another method than GET and HEAD.
        """
        name = _PATHS.get(request.path)
        if name is None:
            raise problem.unknown_url(request.method, request.path)
        if request.method not in ("GET", "HEAD"):
            raise problem.method_not_allowed(request.method, request.path, "GET, HEAD")
        return await (self.liveness if name == "liveness" else self.readiness)(request)

    def reason_not_ready(self) -> str | None:
        """Why no request should come here, or None."""
        if self._is_draining():
            return DRAINING
        kinds = {worker.kind for worker in self._registry.workers() if worker.status is Status.READY}
        needed = {Kind.PREFILL, Kind.DECODE} if self._needs_pair else set()
        return None if kinds and needed <= kinds else INSUFFICIENT
