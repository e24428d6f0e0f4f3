"""The metrics port of a node: `GET /metrics`, and the page `/ui` with its events.

Owns which paths that port has. It has no keys, so nothing else may come here that changes anything or holds a secret.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import trio

from smg import __version__
from smg.fleet.registry import Registry
from smg.gateway import problem
from smg.gateway.decisions import Decisions
from smg.gateway.mesh_api import MeshView
from smg.net.plain import Request, Response, StreamResponse
from smg.telemetry.metrics import CONTENT_TYPE, Metrics
from smg.ui.snapshot import Rooms, Snapshots
from smg.ui.viewers import Ui

Sample = tuple[str, tuple[str, ...], float]


class MetricsPort:
    """The handler of the port. `ui` None: the page is off."""

    def __init__(self, metrics: Metrics, ui: Ui | None) -> None:
        self._metrics = metrics
        self._ui = ui
        if ui is not None:
            metrics.add_source(self._samples)

    def close(self) -> None:
        """The node drains: the page's viewers are sent away; metrics go on."""
        if self._ui is not None:
            self._ui.close()

    async def serve(self, request: Request) -> Response | StreamResponse:
        """One request. Raises `GatewayError` 404, 405, 503."""
        path = request.path
        if path not in ("/metrics", "/ui", "/ui/", "/ui/events"):
            raise problem.unknown_url(request.method, path)
        if path != "/metrics" and self._ui is None:
            raise problem.page_is_off(path)
        if request.method not in ("GET", "HEAD"):
            raise problem.method_not_allowed(request.method, path, "GET, HEAD")
        if path == "/metrics" or self._ui is None:
            return Response(200, await self._metrics.render_text(), CONTENT_TYPE)
        if path == "/ui/events":
            return await self._ui.events(request)
        return await self._ui.show(request)

    def _samples(self) -> Iterable[Sample]:
        if self._ui is not None:
            yield "smg_ui_viewers", (), float(self._ui.viewers)


def ui_of(
    registry: Registry,
    metrics: Metrics,
    decisions: Decisions,
    mesh: MeshView | None,
    cache_samples: Callable[[], Iterable[Sample]],
    waiting: Callable[[], tuple[int, int]],
) -> Ui:
    """The page of a node that is made of these rooms."""
    rooms = Rooms(
        registry=registry,
        metrics=metrics,
        decisions=decisions,
        mesh=mesh,
        cache_samples=cache_samples,
        waiting=waiting,
        version=__version__,
    )
    return Ui(Snapshots(rooms, trio.current_time()).take, decisions.switch, time.time)
