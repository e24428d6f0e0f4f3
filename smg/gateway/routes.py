"""The map of the house front: every path the gateway answers, per method which endpoint and which gate.

Owns the literal table, the matching of paths, and the `Allow` lists (HTTP-9, HTTP-10). Never calls an endpoint:
`gateway/app` binds names to code. Paths that are not here are 404 `unknown_url`, among them `/metrics` on the serving
port (OPS-9).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from smg.api.endpoints import ENDPOINTS
from smg.gateway.gates import ADMIN, OPEN, SERVING
from smg.gateway.problem import ANTHROPIC, OPENAI, RESPONSES, WORKER_API

GENERATE = "generate"
"""The endpoint of everything in `smg.api.endpoints`: relayed to a worker."""
NOT_IMPLEMENTED = "not_implemented"
"""The endpoint of paths that this release answers with 501 (ERR-22)."""

Methods = Mapping[str, tuple[str, str]]

_STATE_OBJECT: Methods = {"GET": (NOT_IMPLEMENTED, SERVING), "DELETE": (NOT_IMPLEMENTED, SERVING)}
_LATER_POST: Methods = {"POST": (NOT_IMPLEMENTED, SERVING)}
_LATER_GET: Methods = {"GET": (NOT_IMPLEMENTED, SERVING)}

# Template -> method -> (endpoint, gate). `{name}` takes one segment, `{name...}` all that is left, slashes too.
# HEAD comes with GET, OPTIONS with everything (HTTP-9).
ROUTES: Mapping[str, Methods] = {
    # probes (section 3)
    "/liveness": {"GET": ("liveness", OPEN)},
    "/health": {"GET": ("liveness", OPEN)},
    "/readiness": {"GET": ("readiness", OPEN)},
    # inference (section 9)
    **{path: {"POST": (GENERATE, SERVING)} for path in ENDPOINTS},
    "/v1/models": {"GET": ("models", OPEN)},
    "/v1/models/{id...}": {"GET": ("model", OPEN)},
    # not in this release: no tokenizer, no sessions, no stored state (sections 9 and 17)
    "/v1/tokenize": _LATER_POST,
    "/v1/detokenize": _LATER_POST,
    "/v1/interactions": _LATER_POST,
    "/v1/interactions/{id...}": {**_STATE_OBJECT, **_LATER_POST},
    "/v1/realtime": {**_LATER_GET, **_LATER_POST},
    "/v1/realtime/{id...}": {**_LATER_GET, **_LATER_POST},
    "/v1/responses/{id}": _STATE_OBJECT,
    "/v1/responses/{id}/cancel": _LATER_POST,
    "/v1/responses/{id}/input_items": _LATER_GET,
    "/v1/conversations": _LATER_POST,
    "/v1/conversations/{id}": {**_STATE_OBJECT, **_LATER_POST},
    "/v1/conversations/{id}/items": {**_LATER_GET, **_LATER_POST},
    "/v1/conversations/{id}/items/{item_id}": _STATE_OBJECT,
    "/parse/function_call": {"POST": (NOT_IMPLEMENTED, ADMIN)},
    "/parse/reasoning": {"POST": (NOT_IMPLEMENTED, ADMIN)},
    "/v1/tokenizers": {"GET": (NOT_IMPLEMENTED, ADMIN), "POST": (NOT_IMPLEMENTED, ADMIN)},
    "/v1/tokenizers/{id}": {"GET": (NOT_IMPLEMENTED, ADMIN), "DELETE": (NOT_IMPLEMENTED, ADMIN)},
    "/v1/tokenizers/{id}/status": {"GET": (NOT_IMPLEMENTED, ADMIN)},
    # what workers say, relayed or merged (section 16)
    "/health_generate": {"GET": ("health_generate", OPEN)},
    "/get_server_info": {"GET": ("get_server_info", OPEN)},
    "/server_info": {"GET": ("get_server_info", OPEN)},
    "/get_model_info": {"GET": ("get_model_info", OPEN)},
    "/model_info": {"GET": ("get_model_info", OPEN)},
    "/engine_metrics": {"GET": ("engine_metrics", OPEN)},
    "/get_loads": {"GET": ("get_loads", ADMIN)},
    "/flush_cache": {"POST": ("flush_cache", ADMIN)},
    "/start_profile": {"POST": ("start_profile", ADMIN)},
    "/stop_profile": {"POST": ("stop_profile", ADMIN)},
    # workers (section 10)
    "/workers": {"GET": ("list_workers", ADMIN), "POST": ("add_worker", ADMIN)},
    "/workers/{id}": {
        "GET": ("get_worker", ADMIN),
        "PATCH": ("patch_worker", ADMIN),
        "PUT": ("put_worker", ADMIN),
        "DELETE": ("delete_worker", ADMIN),
    },
    # explain (section 13)
    "/route/explain": {"POST": ("explain", ADMIN)},
    "/v1/route/explain": {"POST": ("explain", ADMIN)},
    # what tenants used
    "/v1/usage": {"GET": ("usage", ADMIN)},
    # mesh (MSH-1)
    "/mesh/status": {"GET": ("mesh_status", ADMIN)},
    "/mesh/members": {"GET": ("mesh_members", ADMIN)},
    "/mesh/limits": {"GET": ("mesh_limits", ADMIN)},
    "/mesh/leave": {"POST": ("mesh_leave", ADMIN)},
}

SUMMARIES: Mapping[str, str] = {
    "liveness": "200 as long as the process runs.",
    "readiness": "200 when a worker can serve, else 503 with the reason.",
    GENERATE: "Inference: checked, admitted, routed and relayed.",
    "models": "The served models.",
    "model": "One served model.",
    "health_generate": "The engine's own test, from the first ready worker; `?model=` selects.",
    "get_server_info": "The engine's description of itself, without keys; `?model=` selects.",
    "get_model_info": "The engine's description of its model; `?model=` selects.",
    "engine_metrics": "The Prometheus metrics of all engines as one page.",
    "get_loads": "What every worker says of its load now.",
    "flush_cache": "Empties the KV cache of every worker.",
    "start_profile": "Starts the profiler of every worker, or of one by `url`.",
    "stop_profile": "Stops the profilers.",
    "list_workers": "`GET` lists the workers, `?model=` selects.",
    "add_worker": "`POST` adds one.",
    "get_worker": "`GET` shows a worker.",
    "patch_worker": "`PATCH` changes what it names.",
    "put_worker": "`PUT` replaces its specification.",
    "delete_worker": "`DELETE` drains and removes it.",
    "explain": "Which worker an inference body would go to, and why.",
    "usage": "What each tenant has used of each model; `?tenant=` and `?model=` select.",
    "mesh_status": "The state of the mesh.",
    "mesh_members": "The members of the mesh.",
    "mesh_limits": "Who holds which part of the limits that are divided by demand now.",
    "mesh_leave": "Leaves the mesh.",
}
"""What each endpoint does, in a sentence: the words of docs/reference/routes.md."""

ADMIN_PREFIXES = ("/workers", "/mesh", "/route", "/v1/route", "/parse", "/v1/tokenizers", "/v1/usage")
"""Below these the key is asked for before 404 or 405 is said (HTTP-10)."""

UNKNOWN_TEMPLATE = "other"
"""The path label of what is not in the table (section 19)."""


class Route(msgspec.Struct, frozen=True, eq=False):
    """One line of the table: its methods with HEAD added, its `Allow` value, and the family of its error bodies."""

    template: str
    methods: Methods
    allow: str
    dialect: str


def dialect_of(path: str) -> str:
    """The family of error bodies for a path, known or not (section 8)."""
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    if path == "/v1/responses":
        return RESPONSES
    if path == "/workers" or path.startswith("/workers/"):
        return WORKER_API
    return OPENAI


def is_admin_path(path: str) -> bool:
    """True below an admin prefix, whether the path exists or not."""
    return path.startswith(ADMIN_PREFIXES) and any(
        path == prefix or path.startswith(prefix + "/") for prefix in ADMIN_PREFIXES
    )


def find(path: str) -> tuple[Route, dict[str, str]] | None:
    """The route of a path and its parameters (still percent-encoded), or None."""
    route = EXACT.get(path)
    if route is not None:
        return route, _NO_PARAMETERS
    segments = path.split("/")
    for pattern, route in _TEMPLATES.get(len(segments), ()):
        found = _match(pattern, segments)
        if found is not None:
            return route, found
    for pattern, route in _OPEN_ENDED:
        head = len(pattern) - 1
        if len(segments) > head and segments[:head] == list(pattern[:head]):
            rest = "/".join(segments[head:])
            if rest:
                return route, {pattern[head].strip("{.}"): rest}
    return None


def _match(pattern: tuple[str, ...], segments: list[str]) -> dict[str, str] | None:
    found = {}
    for word, segment in zip(pattern, segments, strict=True):
        if word.startswith("{"):
            if not segment:
                return None
            found[word[1:-1]] = segment
        elif word != segment:
            return None
    return found


def _routes() -> dict[str, Route]:
    routes = {}
    for template, methods in ROUTES.items():
        served = dict(methods)
        if "GET" in served:
            served["HEAD"] = served["GET"]
        allow = ", ".join(sorted((*served, "OPTIONS")))
        routes[template] = Route(template, served, allow, dialect_of(template))
    return routes


_NO_PARAMETERS: dict[str, str] = {}

BY_TEMPLATE: Mapping[str, Route] = _routes()
"""Every route by its template, in the order of the table."""

EXACT: Mapping[str, Route] = {
    template: route for template, route in BY_TEMPLATE.items() if "{" not in template
}
"""The routes without parameters by their path: nearly every request is answered by one look-up here."""

_TEMPLATES: dict[int, list[tuple[tuple[str, ...], Route]]] = {}
_OPEN_ENDED: list[tuple[tuple[str, ...], Route]] = []
for _template, _route in BY_TEMPLATE.items():
    if _template.endswith("...}"):
        _OPEN_ENDED.append((tuple(_template.split("/")), _route))
    elif "{" in _template:
        _words = tuple(_template.split("/"))
        _TEMPLATES.setdefault(len(_words), []).append((_words, _route))
