"""MSH-1, MSH-4: a member tells what it knows and leaves once; a gateway without a mesh says so."""

from __future__ import annotations

from typing import Any

import pytest

from smg.errors import GatewayError
from smg.gateway.mesh_api import MeshApi, NoMesh
from tests.smg.gateway.desk import document, request


async def test_msh_1_status_and_members_exist_without_a_mesh() -> None:
    status = await NoMesh().mesh_status(request("/mesh/status"))
    assert (status.status, document(status)) == (200, {"enabled": False})
    members = await NoMesh().mesh_members(request("/mesh/members"))
    assert (members.status, document(members)) == (200, {"members": [], "total": 0})
    limits = await NoMesh().mesh_limits(request("/mesh/limits"))
    assert (limits.status, document(limits)) == (200, {"limits": [], "total": 0})


async def test_msh_4_there_is_nothing_to_leave() -> None:
    with pytest.raises(GatewayError) as caught:
        await NoMesh().mesh_leave(request("/mesh/leave", "POST"))
    assert (caught.value.status, caught.value.code) == (409, "mesh_disabled")


class FakeView:
    def __init__(self) -> None:
        self.leaves = 0

    def status(self) -> dict[str, Any]:
        return {"enabled": True, "node": "a"}

    def members(self) -> list[dict[str, Any]]:
        return [{"name": "a"}, {"name": "b"}]

    def limits_document(self) -> dict[str, Any]:
        return {"limits": [{"limit": "l"}], "total": 1}

    def leave(self) -> bool:
        self.leaves += 1
        return self.leaves == 1


async def test_a_member_shows_what_it_knows() -> None:
    api = MeshApi(FakeView())
    assert document(await api.mesh_status(request("/mesh/status"))) == {"enabled": True, "node": "a"}
    assert document(await api.mesh_members(request("/mesh/members"))) == {
        "members": [{"name": "a"}, {"name": "b"}],
        "total": 2,
    }
    assert document(await api.mesh_limits(request("/mesh/limits"))) == {
        "limits": [{"limit": "l"}],
        "total": 1,
    }


async def test_msh_4_a_member_leaves_once() -> None:
    api = MeshApi(FakeView())
    answer = await api.mesh_leave(request("/mesh/leave", "POST"))
    assert (answer.status, document(answer)) == (202, {"status": "leaving"})
    with pytest.raises(GatewayError) as caught:
        await api.mesh_leave(request("/mesh/leave", "POST"))
    assert (caught.value.status, caught.value.code) == (409, "already_left")
