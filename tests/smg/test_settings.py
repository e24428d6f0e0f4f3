"""The declarations themselves: complete, consistent with the contract, and safe to print."""

from __future__ import annotations

import msgspec
import pytest

from smg.errors import SettingsError
from smg.settings import (
    FIELDS,
    GROUPS,
    Auth,
    Discovery,
    Health,
    Limits,
    Listening,
    LoadPolls,
    Prefill,
    Routing,
    Settings,
    Telemetry,
    Workers,
)
from smg.settings_flag import (
    Field,
    Flag,
    declared_fields,
    header_name,
    listen_host,
    model_alias,
    origin,
    to_texts,
    to_value,
    worker_url,
)

BY_NAME = {field.name: field for field in FIELDS}

# Contract section 2, by hand: the flag and what its parentheses say.
CONTRACT_DEFAULTS = """
host 0.0.0.0 | port 30000 | health-check-port off | max-payload-size 536870912 | max-buffered-request-bytes 1048576
header-read-timeout-secs 30 | idle-connection-timeout-secs 90 | stream-body-stall-timeout-secs 300 | cors-allowed-origins none
shutdown-grace-period-secs 180 | worker-urls none | worker-api-key none | worker-startup-timeout-secs 1800
worker-startup-delay 0 | worker-startup-check-interval 2 | model-alias none | backend auto | enable-igw off | dp-aware off
upstream-pool-idle-timeout-secs 3 | drain-timeout-secs 600 | balance-abs-threshold 64 | balance-rel-threshold 1.5
assignment-mode random | max-idle-secs 14400 | prefix-token-count 256 | prefix-hash-load-factor 1.25
least-load-kv-pressure-weight 0.15 | least-load-default-throughput 2000 | least-load-mean-prefill-tokens 1024
overload-token-usage-threshold 1 | eviction-interval-secs 60 | block-size 16 | cache-ttl-secs 0 | kv-events none
record-trace none | routing-key-override off | routing-key-headers none | worker-overload-waiting-requests 8 | worker-overload-token-usage 0.8
worker-overload-shed off | bucket-adjust-interval-secs 5 | retry-max-retries 5 | retry-initial-backoff-ms 50
retry-max-backoff-ms 30000 | retry-backoff-multiplier 1.5 | retry-jitter-factor 0.2 | disable-retries off
retry-budget-ratio 0.2 | retry-budget-min-per-sec 10 | request-timeout-secs 1800 | connect-timeout-secs 10
cb-failure-threshold 10 | cb-success-threshold 3 | cb-timeout-duration-secs 60 | cb-window-duration-secs 120
disable-circuit-breaker off | health-check-endpoint /health | health-check-interval-secs 60 | health-check-timeout-secs 5
health-failure-threshold 3 | health-success-threshold 2 | disable-health-check off | disable-load-monitoring off
max-concurrent-requests -1 | queue-size 100 | queue-timeout-secs 60 | rate-limit-tokens-per-second none | api-key none
log-level info | log-dir none | log-json off | prometheus-port 29000 | enable-trace off
otlp-traces-endpoint localhost:4317 | sse-keepalive-secs 15 | service-discovery off | discovery-file none
discovery-check-interval-secs 30 | pd-disaggregation off | prefill none | decode none
ha-mesh off | seeds none | mesh-port 30001 | mesh-host 0.0.0.0 | mesh-secret none | mesh-private-workers off | mesh-label smg
mesh-keys-file none
"""

CONTRACT_ALIASES = {
    "backend": "runtime",
    "balance-abs-threshold": "spill-abs-threshold",
    "balance-rel-threshold": "spill-rel-threshold",
    "cache-threshold": "cache-match-threshold",
    "eviction-interval-secs": "eviction-interval",
    "max-idle-secs": "sticky-key-idle-secs",
    "routing-key-override": "sticky-sessions",
    "ha-mesh": "enable-mesh",
    "seeds": "mesh-peer-urls",
    "mesh-advertise": "mesh-advertise-host",
    "node-name": "mesh-server-name",
}


@pytest.mark.parametrize(
    ("flag", "default"),
    [entry.split() for entry in CONTRACT_DEFAULTS.replace("\n", "|").split("|") if entry.strip()],
)
def test_defaults_are_those_of_the_contract(flag: str, default: str) -> None:
    field = BY_NAME[flag.replace("-", "_")]
    assert field.flag_name == f"--{flag}"
    assert field.default_text == default


def test_aliases_are_those_of_the_contract() -> None:
    assert {
        field.flag_name[2:]: field.flag.aliases[0] for field in FIELDS if field.flag.aliases
    } == CONTRACT_ALIASES


def test_no_two_settings_share_a_name_a_flag_or_a_variable() -> None:
    flags = [flag for field in FIELDS for flag in field.flag_names]
    flags += [f"--{field.flag.off_flag}" for field in FIELDS if field.flag.off_flag]
    assert len(flags) == len(set(flags))
    assert len({field.env_name for field in FIELDS}) == len(FIELDS)


def test_every_setting_explains_itself_and_numbers_have_a_unit_and_a_bound() -> None:
    for field in FIELDS:
        assert len(field.flag.doc) > 20 and field.flag.doc.endswith("."), field.name
        if field.kind in (int, float):
            assert field.flag.at_least is not None or field.flag.above is not None, field.name
            assert field.flag.unit or field.name.endswith("port"), field.name


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_default_is_a_value_that_its_own_declaration_accepts(field: Field) -> None:
    texts = to_texts(field, field.default)
    if texts:
        assert to_value(field, texts) == field.default


def test_the_top_struct_has_each_group_under_its_name() -> None:
    settings = Settings()
    assert list(GROUPS) == list(Settings.__struct_fields__)
    for group, struct in GROUPS.items():
        assert type(getattr(settings, group)) is struct


def test_settings_cannot_be_changed_after_they_are_made() -> None:
    with pytest.raises(AttributeError):
        Settings().listening.port = 1  # type: ignore[misc]


def test_printing_settings_never_shows_a_key() -> None:
    settings = Settings(auth=Auth(api_key="hidden-1"), workers=Workers(worker_api_key="hidden-2"))
    for shown in (repr(settings), str(settings.auth), repr(settings.workers.__rich_repr__())):
        assert "hidden" not in shown
    assert "***" in repr(settings)
    assert settings.auth.api_key == "hidden-1"


def test_a_field_without_a_declaration_is_a_bug_that_shows_at_import() -> None:
    class Careless(msgspec.Struct):
        port: int = 1

    with pytest.raises(TypeError, match=r"Careless\.port"):
        declared_fields("careless", Careless)


def test_limits_of_requests_follow_the_cores_unless_told() -> None:
    assert Limits().in_flight_max(2) == 4096
    assert Limits().in_flight_max(64) == 65536
    assert Limits(max_concurrent_requests=0).in_flight_max(2) is None
    assert Limits(max_concurrent_requests=7).in_flight_max(2) == 7
    assert Limits().requests_per_second() is None
    assert Limits(rate_limit_tokens_per_second=0.0).requests_per_second() is None
    assert Limits(rate_limit_tokens_per_second=0.5).requests_per_second() == 0.5


def test_load_is_polled_often_only_for_policies_that_weigh_it() -> None:
    assert [
        LoadPolls().interval_secs(policy) for policy in ("cache_aware", "least_load", "power_of_two")
    ] == [0.25] * 3
    assert LoadPolls().interval_secs("round_robin") == 10.0
    assert LoadPolls(load_monitor_interval=3.0).interval_secs("least_load") == 3.0


def test_overload_protection_is_off_only_with_the_policy_that_weighs_waiting_itself() -> None:
    assert Routing(policy="round_robin").protects_from_overload()
    assert not Routing(policy="cache_aware").protects_from_overload()
    assert Routing(policy="cache_aware", worker_overload_protection=True).protects_from_overload()
    assert not Routing(policy="random", worker_overload_protection=False).protects_from_overload()


def test_unhealthy_workers_are_removed_by_default_only_with_discovery() -> None:
    found = Discovery(discovery_file="/workers.json")
    assert not Settings().removes_unhealthy_workers()
    assert Settings(discovery=found).removes_unhealthy_workers()
    kept = Settings(discovery=found, health=Health(remove_unhealthy_workers=False))
    assert not kept.removes_unhealthy_workers()


def test_metrics_listen_on_all_interfaces_of_the_serving_family() -> None:
    assert Settings().metrics_host() == "0.0.0.0"
    assert Settings(listening=Listening(host="127.0.0.1")).metrics_host() == "0.0.0.0"
    assert Settings(listening=Listening(host="::1")).metrics_host() == "::"
    assert Settings(telemetry=Telemetry(prometheus_host="10.0.0.1")).metrics_host() == "10.0.0.1"


def test_aliases_map_to_models() -> None:
    assert Workers(model_alias=("a=org/m", "b=m=2")).aliases() == {"a": "org/m", "b": "m=2"}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://Worker-1:8000/", "http://worker-1:8000"),
        ("HTTPS://[::1]:8000/v/", "https://[::1]:8000/v"),
        ("http://w", "http://w"),
    ],
)
def test_worker_urls_are_normalised(text: str, url: str) -> None:
    assert worker_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "worker:8000",
        "grpc://w:1",
        "grpcs://w:1",
        "ipc:///run/w",
        "ftp://w",
        "http://",
        "http://:80",
        "http://w:0",
        "http://w:65536",
        "http://w:x",
        "http://w:",
        "http://u:p@w",
        "http://w?x=1",
        "http://w#f",
        "http://w?",
        "http://[::1",
        "http://w x",
        "http://w\n",
        "http://wörker",
        "http:/w",
        "",
    ],
)
def test_worker_urls_that_cannot_be_called_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        worker_url(text)


@pytest.mark.parametrize("scheme", ["grpc", "grpcs", "ipc"])
def test_workers_of_later_releases_are_refused_as_such(scheme: str) -> None:
    with pytest.raises(ValueError, match="not supported by this release"):
        worker_url(f"{scheme}://w:1")


def test_other_forms_accept_and_refuse() -> None:
    assert origin("*") == "*"
    assert origin("HTTPS://App.example/") == "https://app.example"
    assert model_alias(" gpt-4 = org/m=1 ") == "gpt-4=org/m=1"
    assert header_name("X-Key") == "x-key"
    assert listen_host("[::1]") == "::1"
    for form, text in (
        (origin, "app.example"),
        (origin, "https://app.example/path"),
        (model_alias, "a"),
        (model_alias, "=b"),
        (model_alias, "a="),
        (model_alias, "a=a"),
        (header_name, "x key"),
        (header_name, ""),
        (listen_host, "a b"),
        (listen_host, ""),
    ):
        with pytest.raises(ValueError):
            form(text)


@pytest.mark.parametrize(
    ("texts", "workers"),
    [
        (["http://a:1"], (Prefill("http://a:1"),)),
        (["http://a:1", "8998", "http://b:1", "none"], (Prefill("http://a:1", 8998), Prefill("http://b:1"))),
        (["http://a:1", "http://b:1", "9"], (Prefill("http://a:1"), Prefill("http://b:1", 9))),
        ([], ()),
    ],
)
def test_prefill_workers_may_name_their_bootstrap_port(
    texts: list[str], workers: tuple[Prefill, ...]
) -> None:
    assert to_value(BY_NAME["prefill"], texts) == workers


@pytest.mark.parametrize(
    "texts", [["8998"], ["http://a:1", "1", "2"], ["http://a:1", "0"], ["http://a:1", "x"], ["a:1"]]
)
def test_prefill_ports_without_a_worker_or_out_of_range_are_refused(texts: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        to_value(BY_NAME["prefill"], texts)
    assert refused.value.flag == "--prefill"
    assert repr(texts[-1]) == refused.value.value


@pytest.mark.parametrize("text", ["1_000", "0x10", "1.5", " ", "１", "1e3", "nan"])
def test_whole_numbers_are_digits_only(text: str) -> None:
    with pytest.raises(SettingsError, match="whole number"):
        to_value(BY_NAME["queue_size"], [text])


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "1,5", "five", ""])
def test_numbers_are_finite(text: str) -> None:
    with pytest.raises(SettingsError, match="number"):
        to_value(BY_NAME["request_timeout_secs"], [text])


def test_flags_can_be_declared_with_both_bounds_and_say_so() -> None:
    field = Field(
        group="g", name="share", kind=float, is_list=False, is_optional=False, default=0.5,
        flag=Flag(doc="A share.", at_least=0, at_most=1),
    )  # fmt: skip
    with pytest.raises(SettingsError, match="between 0 and 1"):
        to_value(field, ["1.5"])
