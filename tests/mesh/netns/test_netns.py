"""Real agents in network namespaces: all scenarios are played side by side once, then each test looks at its own."""

from __future__ import annotations

from functools import cache

import pytest

from tests.mesh.netns.run import play
from tests.mesh.netns.scenarios import SCENARIOS, Measured

pytestmark = [pytest.mark.netns, pytest.mark.timeout(280)]


@cache
def _played(names: tuple[str, ...]) -> dict[str, Measured | BaseException]:
    return play(names)


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_real_agents_survive(name: str, request: pytest.FixtureRequest) -> None:
    ours = [item for item in request.session.items if item.path == request.path]
    wanted = tuple(item.callspec.params["name"] for item in ours)  # type: ignore[attr-defined]
    result = _played(wanted)[name]
    if isinstance(result, BaseException):
        raise result
