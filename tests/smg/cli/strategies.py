"""Random settings: every field gets values that its declaration allows, whatever fields there are."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from smg.settings import FIELDS, GROUPS, Settings
from smg.settings_access import control_key, provider_url, role_mapping, tenant_key
from smg.settings_endpoint import event_endpoints
from smg.settings_flag import (
    Field,
    Prefill,
    Value,
    header_name,
    listen_host,
    model_alias,
    origin,
    url_path,
    worker_url,
)
from smg.settings_mesh import advertised, node_name, seed_list

POLICIES = ("cache_aware", "least_load", "power_of_two", "random", "round_robin")
"""A table of policies for tests that are not about which policies there are."""

_NAMES = st.from_regex(r"\A[a-z][a-z0-9.-]{0,8}[a-z0-9]\Z")
_PORTS = st.integers(1, 65535)
_URLS = st.builds(
    "{}://{}:{}{}".format, st.sampled_from(["http", "https"]), _NAMES, _PORTS, st.sampled_from(["", "/a/b"])
)
_TEXTS = {
    header_name: _NAMES,
    listen_host: st.sampled_from(["0.0.0.0", "::", "::1", "10.0.0.1", "localhost"]),
    model_alias: st.builds("{}={}".format, _NAMES, _NAMES.map(lambda name: f"models/{name}")),
    origin: st.just("*") | st.builds("https://{}".format, _NAMES),
    url_path: _NAMES.map(lambda name: f"/{name}"),
    event_endpoints: st.builds(
        "tcp://{}:{}".format, _NAMES | st.just("{host}"), _PORTS | st.just("{port+1}")
    ),
    worker_url: _URLS,
    seed_list: _NAMES,  # a comma list is the same as several values
    advertised: _NAMES,
    node_name: _NAMES,
    tenant_key: st.builds("{}:{}".format, _NAMES, _NAMES),
    control_key: st.builds(
        "{}:{}:{}:{}".format, _NAMES, _NAMES, st.sampled_from(["admin", "user"]), _NAMES.map("k:{}".format)
    ),
    provider_url: _URLS,
    role_mapping: st.builds("{}={}".format, _NAMES, st.sampled_from(["admin", "user"])),
}
_SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20).filter(
    lambda key: not key.startswith("@/")
)
_PREFILL = st.builds(Prefill, _URLS, st.none() | _PORTS)


def values(field: Field) -> st.SearchStrategy[Value]:
    """Values other than None that the declaration of the field allows."""
    flag = field.flag
    items: st.SearchStrategy[object]
    if field.kind is bool:
        items = st.booleans() if flag.off_flag else st.just(True)
    elif field.kind is Prefill:
        items = _PREFILL
    elif field.kind is str:
        if field.name.endswith("policy"):
            items = st.sampled_from(POLICIES)
        elif flag.choices:
            items = st.sampled_from(flag.choices)
        elif flag.is_secret:
            items = _SECRETS if flag.form is None else _TEXTS[flag.form]
        else:
            items = _NAMES if flag.form is None else _TEXTS[flag.form]
    else:
        items = _numbers(field)
    if field.is_list:
        return st.lists(items, max_size=4, unique=True).map(tuple)  # type: ignore[arg-type]
    return items  # type: ignore[return-value]


@st.composite
def told(draw: st.DrawFn) -> Mapping[str, Value]:
    """Values for a few fields, by field name."""
    fields = draw(st.lists(st.sampled_from(FIELDS), unique_by=lambda field: field.name, max_size=12))
    return {field.name: draw(values(field)) for field in fields}


def settings_of(values_by_name: Mapping[str, Value]) -> Settings:
    """Settings with these values and defaults elsewhere."""
    groups = {
        group: struct(
            **{
                field.name: values_by_name[field.name]
                for field in FIELDS
                if field.group == group and field.name in values_by_name
            }
        )
        for group, struct in GROUPS.items()
    }
    return Settings(**groups)  # type: ignore[arg-type]


def _numbers(field: Field) -> st.SearchStrategy[object]:
    flag = field.flag
    low = flag.at_least if flag.at_least is not None else flag.above
    if field.kind is int:
        start = int(low or 0) + (flag.above is not None)
        return st.integers(start, int(flag.at_most) if flag.at_most is not None else 10**12)
    return st.floats(
        low,
        flag.at_most if flag.at_most is not None else 1e12,
        exclude_min=flag.above is not None,
        allow_nan=False,
        allow_infinity=False,
    )
