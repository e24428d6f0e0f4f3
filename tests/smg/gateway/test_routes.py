"""The route table: HTTP-9, HTTP-10, HTTP-12, OPS-9, MSH-1, sections 3, 9, 10, 13, 16, 17."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.api.endpoints import ENDPOINTS
from smg.gateway.explain import Explain
from smg.gateway.fan_out import FanOut
from smg.gateway.mesh_api import NoMesh
from smg.gateway.models import Models
from smg.gateway.probes import Probes
from smg.gateway.routes import (
    BY_TEMPLATE,
    GENERATE,
    NOT_IMPLEMENTED,
    ROUTES,
    dialect_of,
    find,
    is_admin_path,
)
from smg.gateway.usage_api import UsageApi
from smg.gateway.workers_api import WorkersApi


def target(path: str, method: str) -> tuple[str, str] | None:
    found = find(path)
    return found[0].methods.get(method) if found else None


@pytest.mark.parametrize("path", ENDPOINTS)
def test_inference_endpoints_take_post_with_a_serving_key(path: str) -> None:
    assert target(path, "POST") == ("generate", "serving")
    assert target(path, "GET") is None
    assert BY_TEMPLATE[path].allow == "OPTIONS, POST"


@pytest.mark.parametrize(
    "path",
    ["/liveness", "/health", "/readiness", "/health_generate", "/v1/models", "/v1/models/m", "/get_server_info",
     "/get_model_info", "/server_info", "/model_info", "/engine_metrics"],
)  # fmt: skip
def test_sec_1_these_paths_never_need_a_key(path: str) -> None:
    for method in ("GET", "HEAD"):
        found = target(path, method)
        assert found is not None
        assert found[1] == "open"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/flush_cache"), ("GET", "/get_loads"), ("POST", "/start_profile"), ("POST", "/stop_profile"),
     ("GET", "/workers"), ("POST", "/workers"), ("GET", "/workers/x"), ("PATCH", "/workers/x"), ("PUT", "/workers/x"),
     ("DELETE", "/workers/x"), ("POST", "/route/explain"), ("POST", "/v1/route/explain"), ("GET", "/mesh/status"),
     ("GET", "/mesh/members"), ("POST", "/mesh/leave"), ("POST", "/parse/reasoning"), ("GET", "/v1/tokenizers")],
)  # fmt: skip
def test_admin_endpoints_want_an_admin_key(method: str, path: str) -> None:
    found = target(path, method)
    assert found is not None
    assert found[1] == "admin"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/tokenize"), ("POST", "/v1/detokenize"), ("POST", "/v1/interactions"), ("GET", "/v1/realtime"),
     ("POST", "/v1/realtime/sessions"), ("GET", "/v1/realtime/a/b"), ("GET", "/v1/responses/r"), ("DELETE", "/v1/responses/r"),
     ("POST", "/v1/responses/r/cancel"), ("GET", "/v1/responses/r/input_items"), ("POST", "/v1/conversations"),
     ("GET", "/v1/conversations/c"), ("POST", "/v1/conversations/c"), ("DELETE", "/v1/conversations/c"),
     ("GET", "/v1/conversations/c/items"), ("POST", "/v1/conversations/c/items"), ("GET", "/v1/conversations/c/items/i"),
     ("DELETE", "/v1/conversations/c/items/i")],
)  # fmt: skip
def test_err_22_what_needs_more_than_this_release_is_501(method: str, path: str) -> None:
    assert target(path, method) == ("not_implemented", "serving")


@pytest.mark.parametrize(
    "path",
    ["/", "", "*", "/metrics", "/v1/systemone", "/v1/decisions", "/v1/rl/x", "/v1/rl", "/wasm", "/wasm/x", "/v1", "/v1/models/",
     "/health/", "/HEALTH", "/v1/chat/completions/", "//health", "/workers/", "/workers/a/b", "/v1/responses//cancel",
     "/v1%2Fmodels", "/v1/conversations/c/items/i/x", "/liveness?x", "/\xff"],
)  # fmt: skip
def test_http_10_ops_9_unknown_paths_are_unknown(path: str) -> None:
    assert find(path) is None


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/workers/abc", {"id": "abc"}),
        ("/v1/models/m", {"id": "m"}),
        ("/v1/models/org/model", {"id": "org/model"}),
        ("/v1/models/org%2Fmodel", {"id": "org%2Fmodel"}),
        ("/v1/conversations/c/items/i", {"id": "c", "item_id": "i"}),
        ("/v1/models", {}),
    ],
)
def test_parameters_are_handed_over(path: str, parameters: dict[str, str]) -> None:
    found = find(path)
    assert found is not None
    assert found[1] == parameters


def test_http_9_head_comes_with_get_and_allow_lists_all_methods() -> None:
    for template, methods in ROUTES.items():
        route = BY_TEMPLATE[template]
        listed = route.allow.split(", ")
        assert set(methods) <= set(listed)
        assert "OPTIONS" in listed
        assert ("HEAD" in listed) == ("GET" in methods) == ("HEAD" in route.methods)
    assert BY_TEMPLATE["/workers/{id}"].allow == "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/workers", True), ("/workers/x", True), ("/workers/x/y/z", True), ("/mesh/nothing", True), ("/route", True),
        ("/v1/route/x", True), ("/workersx", False), ("/v1/models", False), ("/metrics", False), ("/v1/chat/completions", False),
    ],
)  # fmt: skip
def test_http_10_below_admin_prefixes_the_key_comes_first(path: str, expected: bool) -> None:
    assert is_admin_path(path) is expected


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/messages/nothing", "anthropic"),
        ("/v1/responses", "responses"),
        ("/workers", "worker"),
        ("/workers/x/y", "worker"),
        ("/v1/chat/completions", "openai"),
        ("/nothing", "openai"),
    ],
)
def test_error_bodies_follow_the_path(path: str, dialect: str) -> None:
    assert dialect_of(path) == dialect


@given(st.text(alphabet=st.sampled_from("/ab{}.%workersv1models"), max_size=40))
def test_any_path_is_found_or_not_without_an_error(path: str) -> None:
    found = find(path)
    if found is not None:
        route, parameters = found
        filled = route.template
        for name, value in parameters.items():
            filled = filled.replace("{" + name + "...}", value).replace("{" + name + "}", value)
        assert filled == path


def test_every_endpoint_of_the_table_has_code_in_exactly_one_place() -> None:
    rooms = (Probes, Models, NoMesh, WorkersApi, FanOut, Explain, UsageApi)
    names = {name for methods in ROUTES.values() for name, _ in methods.values()} - {
        GENERATE,
        NOT_IMPLEMENTED,
    }
    for name in names:
        assert sum(hasattr(room, name) for room in rooms) == 1, name
