"""MSH-1, MSH-4: a gateway without a mesh says so."""

from __future__ import annotations

import pytest

from smg.errors import GatewayError
from smg.gateway.mesh_api import NoMesh
from tests.smg.gateway.desk import document, request


async def test_msh_1_status_and_members_exist_without_a_mesh() -> None:
    status = await NoMesh().mesh_status(request("/mesh/status"))
    assert (status.status, document(status)) == (200, {"enabled": False})
    members = await NoMesh().mesh_members(request("/mesh/members"))
    assert (members.status, document(members)) == (200, {"members": [], "total": 0})


async def test_msh_4_there_is_nothing_to_leave() -> None:
    with pytest.raises(GatewayError) as caught:
        await NoMesh().mesh_leave(request("/mesh/leave", "POST"))
    assert (caught.value.status, caught.value.code) == (409, "mesh_disabled")
