"""Which parts of a node are read again, and how each change reaches the rooms that use it (hot reload).

Owns the list of the parts for the composition root; whoever adds a room with a file adds its part here. How a part is read
is its room's business, in which order and under which rules `services/reload` knows. It must never swap anything itself
before all was validated.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from functools import partial

from smg.bridge.mesh_node import MeshNode
from smg.cli.access import Access
from smg.cli.flags import Given
from smg.discovery.file import BrokenFile, File, parse
from smg.discovery.source import Source
from smg.discovery.static import specs_of
from smg.errors import SettingsError
from smg.fleet.worker import WorkerSpec
from smg.net.pool import ConnectionPool
from smg.net.server import Server
from smg.services.reload import Change, Part, Reload
from smg.settings import Settings
from smg.telemetry import log as logs


class Reloading:
    """The reload of one node: `reload` is the service.

    `serving` gives the server of the serving port once there is one; `report` takes the workers of the flags.
    """

    def __init__(
        self,
        settings: Settings,
        given: Given | None,
        access: Access,
        pool: ConnectionPool,
        sources: Sequence[Source],
        serving: Callable[[], Server | None],
        report: Callable[[tuple[WorkerSpec, ...]], None],
        mesh: MeshNode | None = None,
    ) -> None:
        self._worker_key = settings.workers.worker_api_key
        self._sources = sources
        self._serving = serving
        self._report = report
        self._discovery_file = settings.discovery.discovery_file
        self.reload = Reload(log=logs.logger("smg.reload"))
        for part in access.parts(
            given,
            use_server_context=self._use_server_context,
            use_worker_context=pool.use_context,
            forget_heads=self._forget_heads,
            use_worker_key=self._use_worker_key,
        ):
            self.reload.add(part)
        if mesh is not None and mesh.key_files():
            self.reload.add(Part("mesh keys", mesh.key_files(), partial(_prepare_mesh, mesh)))
        if self._discovery_file is not None:
            # The source watches its file itself; this part is for SIGHUP, which refuses a broken one with all the rest.
            self.reload.add(Part("discovery file", (), self._prepare_discovery))

    def _use_server_context(self, context: ssl.SSLContext) -> None:
        server = self._serving()
        if server is not None:
            server.use_tls(context)

    def _forget_heads(self) -> None:
        server = self._serving()
        if server is not None:
            server.forget_heads()

    def _use_worker_key(self, settings: Settings) -> None:
        """A key for workers was replaced: those without a key of their own get it (FLG-4)."""
        self._worker_key = settings.workers.worker_api_key
        self._report(specs_of(settings))
        self._look_again()

    def _look_again(self) -> None:
        for source in self._sources:
            if isinstance(source, File):
                source.look_again(self._worker_key)

    def _prepare_discovery(self) -> Change:
        path = self._discovery_file
        assert path is not None, "without a file there is no such part"
        with open(path, "rb") as file:
            text = file.read()
        try:
            parse(text)
        except BrokenFile as error:
            raise SettingsError("--discovery-file", repr(path), str(error), is_combination=True) from None
        return Change((), self._look_again)


def _prepare_mesh(mesh: MeshNode) -> Change | None:
    found = mesh.read_keys()
    return None if found is None else Change(*found)
