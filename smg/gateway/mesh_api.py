"""The mesh endpoints of a gateway without a mesh (MSH-1, MSH-4).

Owns the three answers that say so; clients and dashboards find the paths in every gateway.
"""

from __future__ import annotations

from smg.errors import GatewayError
from smg.net.plain import Request, Response, json_response


class NoMesh:
    """The endpoints `mesh_status`, `mesh_members` and `mesh_leave` of a node that is alone."""

    async def mesh_status(self, request: Request) -> Response:
        """200 `{"enabled":false}`."""
        return json_response(200, {"enabled": False})

    async def mesh_members(self, request: Request) -> Response:
        """200 with an empty list."""
        return json_response(200, {"members": [], "total": 0})

    async def mesh_leave(self, request: Request) -> Response:
        """Raises `GatewayError` 409 `mesh_disabled`."""
        raise GatewayError(409, "mesh_disabled", "This gateway is in no mesh; start it with --ha-mesh")
