"""The mesh endpoints (contract section 20): what this node knows of its mesh, and leaving it.

Owns the answers' form; what stands in them is asked of whoever connects nodes, by two small protocols, since the gateway never
opens the mesh. A node without a mesh has the same paths and says so (MSH-1). `SessionOwners` is the request path's view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from smg.api.call import Call
from smg.errors import GatewayError
from smg.fleet.worker import Worker
from smg.net.plain import Request, Response, json_response
from smg.policies.policy import Policy


class SessionOwners(Protocol):
    """Nodes that decide for the requests of a session (docs/routing.md 4.5)."""

    def worth(self, call: Call, policy: Policy) -> object | None:
        """What to ask and whom, when the answer would be worth the wait; else None. Changes nothing, waits for nothing."""
        ...

    async def consult(self, call: Call, worth: object) -> str | None:
        """Ask; the next `choose` of the call follows the answer. The owner's name when it answered. Waits milliseconds."""
        ...

    async def predict(
        self, call: Call, policy: Policy, candidates: Sequence[Worker]
    ) -> tuple[Worker, str] | None:
        """(worker, owner) that `consult` and `choose` would come to; books nothing anywhere (EXP-1)."""
        ...


class MeshView(Protocol):
    """The mesh as operators see it."""

    def status(self) -> dict[str, Any]:
        """`GET /mesh/status`."""
        ...

    def members(self) -> list[dict[str, Any]]:
        """The rows of `GET /mesh/members`, this node included."""
        ...

    def limits_document(self) -> dict[str, Any]:
        """`GET /mesh/limits`."""
        ...

    def leave(self) -> bool:
        """Begin to leave; False when that was begun before."""
        ...


class MeshApi:
    """The endpoints `mesh_status`, `mesh_members`, `mesh_limits` and `mesh_leave` of a member."""

    def __init__(self, view: MeshView) -> None:
        self._view = view

    async def mesh_status(self, request: Request) -> Response:
        """200 with the state of this node in its mesh."""
        return json_response(200, self._view.status())

    async def mesh_members(self, request: Request) -> Response:
        """200 with all members that are known, dead and left ones too."""
        members = self._view.members()
        return json_response(200, {"members": members, "total": len(members)})

    async def mesh_limits(self, request: Request) -> Response:
        """200 with the limits that are divided by demand now, and who holds which part."""
        return json_response(200, self._view.limits_document())

    async def mesh_leave(self, request: Request) -> Response:
        """202; the node says farewell and goes on serving (MSH-4). Raises `GatewayError` 409 `already_left`."""
        if not self._view.leave():
            raise GatewayError(409, "already_left", "This node has left its mesh already")
        return json_response(202, {"status": "leaving"})


class NoMesh:
    """The endpoints `mesh_status`, `mesh_members`, `mesh_limits` and `mesh_leave` of a node that is alone."""

    async def mesh_status(self, request: Request) -> Response:
        """200 `{"enabled":false}`."""
        return json_response(200, {"enabled": False})

    async def mesh_members(self, request: Request) -> Response:
        """200 with an empty list."""
        return json_response(200, {"members": [], "total": 0})

    async def mesh_limits(self, request: Request) -> Response:
        """200 with an empty list."""
        return json_response(200, {"limits": [], "total": 0})

    async def mesh_leave(self, request: Request) -> Response:
        """Raises `GatewayError` 409 `mesh_disabled`."""
        raise GatewayError(409, "mesh_disabled", "This gateway is in no mesh; start it with --ha-mesh")
