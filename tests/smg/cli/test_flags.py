"""From arguments and environment to settings: CLI-3 to CLI-7 and CLI-10, row by row."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smg.cli.flags import (
    POLICIES_OF_THE_CONTRACT,
    SECRET_FILE_BYTES_MAX,
    default_policy,
    launch_parser,
    parse,
    policy_names,
    to_arguments,
    unknown_variables,
)
from smg.cli.later import LATER_ENV_NAMES, LATER_FLAGS
from smg.errors import SettingsError
from smg.settings import FIELDS, Prefill, Settings
from smg.settings_flag import Value, to_texts
from smg.settings_rules import check
from tests.smg.cli.strategies import POLICIES, settings_of, told


def parsed(line: str, environment: Mapping[str, str] | None = None) -> Settings:
    return parse(shlex.split(line), environment or {}, policies=POLICIES)


def refusal(line: str, environment: Mapping[str, str] | None = None) -> SettingsError:
    with pytest.raises(SettingsError) as refused:
        parsed(line, environment)
    assert "\n" not in str(refused.value)
    return refused.value


def test_no_arguments_give_the_defaults() -> None:
    assert parse([], {}, policies=("cache_aware",)) == Settings()


def test_list_values_after_one_flag_and_repeated_flags_add_up() -> None:
    settings = parsed("--worker-urls http://a http://b --port 1234 --worker-urls http://c")
    assert settings.workers.worker_urls == ("http://a", "http://b", "http://c")
    assert settings.listening.port == 1234


def test_a_list_flag_without_a_value_is_an_empty_list() -> None:
    assert parsed("--worker-urls --port 1").workers.worker_urls == ()
    assert parsed("--request-id-headers").telemetry.request_id_headers == ()


def test_the_last_of_several_single_values_counts() -> None:
    assert parsed("--port 1 --port 2").listening.port == 2
    assert (
        parsed(
            "--worker-overload-protection --disable-worker-overload-protection"
        ).routing.worker_overload_protection
        is False
    )


def test_prefill_and_decode_workers_are_read_in_order() -> None:
    settings = parsed(
        "--pd-disaggregation --prefill http://p1:1 8998 --prefill http://p2:1 none --prefill http://p3:1 "
        "--decode http://d1:1 --decode http://d2:1"
    )
    assert settings.pd.prefill == (
        Prefill("http://p1:1", 8998),
        Prefill("http://p2:1"),
        Prefill("http://p3:1"),
    )
    assert settings.pd.decode == ("http://d1:1", "http://d2:1")


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if field.flag.aliases], ids=lambda field: field.name
)
def test_every_alias_means_its_flag(field: object) -> None:
    from smg.settings_flag import Field

    assert isinstance(field, Field)
    text = field.flag.choices[1] if field.flag.choices else "7" if field.flag.at_most is None else "0.7"
    values = [] if field.kind is bool else [text]
    needed = ["--ha-mesh"] if field.name == "seeds" else []
    spelled = [parse([*needed, name, *values], {}, policies=POLICIES) for name in field.flag_names]
    assert spelled[0] != parse(needed, {}, policies=POLICIES)
    assert all(settings == spelled[0] for settings in spelled)


@given(told())
def test_settings_survive_the_way_through_arguments(values: Mapping[str, Value]) -> None:
    settings = settings_of(values)
    try:
        check(settings)
    except SettingsError:
        assume(False)
    arguments = to_arguments(settings)
    if settings.routing.policy == Settings().routing.policy:
        arguments.append(f"--policy={settings.routing.policy}")
    assert parse(arguments, {}, policies=POLICIES) == settings


@given(told(), st.sampled_from([",", " ", ", "]))
def test_settings_survive_the_way_through_the_environment(
    values: Mapping[str, Value], separator: str
) -> None:
    settings = settings_of(values)
    try:
        check(settings)
    except SettingsError:
        assume(False)
    environment = {"SMG_POLICY": settings.routing.policy}
    for field in FIELDS:
        value = getattr(getattr(settings, field.group), field.name)
        if value != field.default:
            assume(value != ())
            environment[field.env_name] = separator.join(to_texts(field, value))
    assert parse([], environment, policies=POLICIES) == settings


@given(st.lists(st.text(max_size=12), max_size=5))
def test_any_arguments_give_settings_or_one_line_of_refusal(arguments: list[str]) -> None:
    try:
        parse(arguments, {}, policies=POLICIES)
    except SettingsError as refused:
        assert len(str(refused).splitlines()) == 1
    except SystemExit as helped:
        assert helped.code == 0 and any(argument.startswith(("-h", "-V", "--")) for argument in arguments)


def test_the_command_line_wins_over_the_environment_and_replaces_lists() -> None:
    environment = {"SMG_PORT": "1", "SMG_WORKER_URLS": "http://a,http://b", "SMG_LOG_JSON": "true"}
    settings = parsed("--worker-urls http://c", environment)
    assert settings.listening.port == 1
    assert settings.workers.worker_urls == ("http://c",)
    assert settings.telemetry.log_json


@pytest.mark.parametrize(
    ("text", "is_on"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)]
)
def test_a_switch_in_the_environment_may_be_on_or_off(text: str, is_on: bool) -> None:
    assert parsed("", {"SMG_DISABLE_RETRIES": text}).retries.disable_retries is is_on


def test_the_opposite_of_a_switch_has_a_variable_too() -> None:
    assert parsed("", {"SMG_NO_REMOVE_UNHEALTHY_WORKERS": "1"}).health.remove_unhealthy_workers is False
    assert parsed("", {"SMG_NO_REMOVE_UNHEALTHY_WORKERS": "0"}).health.remove_unhealthy_workers is True


def test_aliases_have_variables_too() -> None:
    assert parsed("", {"SMG_RUNTIME": "vllm"}).workers.backend == "vllm"


def test_an_empty_variable_counts_as_not_given_except_for_keys() -> None:
    assert parsed("", {"SMG_PORT": "", "SMG_WORKER_URLS": ""}) == parsed("")
    assert refusal("", {"SMG_API_KEY": ""}).flag == "SMG_API_KEY"


def test_the_service_links_of_kubernetes_are_not_taken_for_settings() -> None:
    links = {
        "SMG_PORT": "tcp://10.0.0.1:80",
        "SMG_MESH_PORT": "tcp://10.0.0.2:80",
        "SMG_SERVICE_HOST": "10.0.0.1",
        "SMG_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert parsed("", links) == parsed("")


def test_a_wrong_variable_is_refused_by_its_own_name() -> None:
    refused = refusal("", {"SMG_PORT": "70000"})
    assert str(refused) == "SMG_PORT: '70000': must be between 1 and 65535"
    assert not refused.is_combination


def test_a_key_comes_from_a_file_without_its_last_line_end(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"s3cret\r\n")
    assert parsed(f"--api-key @{file}").auth.api_key == "s3cret"
    assert parsed("", {"SMG_WORKER_API_KEY": f"@{file}"}).workers.worker_api_key == "s3cret"
    assert parsed("--api-key @plain").auth.api_key == "@plain"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe", b"k" * (SECRET_FILE_BYTES_MAX + 1), b"two\nlines\n", b" padded\n"]
)
def test_a_file_that_holds_no_key_is_refused_without_being_shown(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    refused = refusal(f"--api-key @{file}")
    assert refused.flag == "--api-key"
    assert "two" not in str(refused) and "padded" not in str(refused)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused = refusal(f"--worker-api-key @{tmp_path}/none")
    assert f"{tmp_path}/none" in str(refused)
    assert refused.is_combination


def test_a_wrong_key_is_not_shown() -> None:
    assert "hidden" not in str(refusal("--api-key 'hidden\tkey'"))


WRONG_SYNTAX = """
--policy best | --worker-urls w:8000 | --worker-urls grpc://w:1 | --worker-urls grpcs://w:1 | --worker-urls ipc:///w
--port 0 | --port 65536 | --port x | --port -1 | --prometheus-port 0 | --health-check-port 70000
--balance-rel-threshold 0.9 | --prefix-hash-load-factor 0.5 | --retry-max-retries 0 | --retry-initial-backoff-ms 0
--retry-max-backoff-ms 0 | --retry-backoff-multiplier 0.5 | --retry-jitter-factor 1.1 | --retry-jitter-factor -0.1
--request-timeout-secs 0 | --connect-timeout-secs 0 | --header-read-timeout-secs 0 | --health-check-timeout-secs 0
--max-payload-size 0 | --cb-failure-threshold 0 | --cb-success-threshold 0 | --cb-timeout-duration-secs 0
--cb-window-duration-secs 0 | --health-failure-threshold 0 | --health-check-interval-secs 0
--rate-limit-tokens-per-second -1 | --max-concurrent-requests -2 | --queue-size -1 | --worker-overload-token-usage 1.1
--worker-overload-waiting-requests 0 | --model-alias a=a | --model-alias a | --decode grpc://d:1 | --prefill http://p 0
--log-level loud | --backend mystery | --assignment-mode best | --discovery-provider dns | --discovery-provider kubernetes
--cors-allowed-origins app.example | --request-id-headers 'x y' | --health-check-endpoint health | --host 'a b' | --port=
"""


@pytest.mark.parametrize(
    "line", [line.strip() for line in WRONG_SYNTAX.replace("\n", "|").split("|") if line.strip()]
)
def test_a_refused_value_is_named_with_its_flag_and_reason(line: str) -> None:
    refused = refusal(line)
    flag, *values = shlex.split(line.replace("=", " ")) if line.endswith("=") else shlex.split(line)
    assert refused.flag == flag
    assert not refused.is_combination
    assert refused.reason
    if values:
        assert values[-1] in str(refused)


WRONG_TOGETHER = """
--retry-initial-backoff-ms 100 --retry-max-backoff-ms 50 | --service-discovery | --discovery-provider file
--model-alias a=x a=y | --model-alias a=x --model-alias a=y | --prefill http://p | --decode http://d
--port 29000 | --health-check-port 30000
"""


@pytest.mark.parametrize(
    "line", [line.strip() for line in WRONG_TOGETHER.replace("\n", "|").split("|") if line.strip()]
)
def test_a_refused_combination_is_told_apart_from_wrong_syntax(line: str) -> None:
    assert refusal(line).is_combination


def test_a_mistake_of_form_names_the_flag_and_the_reason() -> None:
    assert str(refusal("--port")) == "--port: expected one argument"
    assert str(refusal("--log-json=3")).startswith("--log-json: ")
    assert str(refusal("--port 1 stray")) == "arguments: 'stray': belongs to no flag"


@pytest.mark.parametrize("flag", sorted(LATER_FLAGS))
def test_a_flag_of_a_later_release_is_refused_by_name_and_never_ignored(flag: str) -> None:
    assert str(refusal(flag)) == f"{flag}: not supported by this release"
    assert str(refusal(f"--port 1 {flag}=x")) == f"{flag}: not supported by this release"
    assert str(refusal(f"{flag} a b --port 1")) == f"{flag}: not supported by this release"


@pytest.mark.parametrize("name", sorted(LATER_ENV_NAMES))
def test_a_variable_of_a_later_release_is_refused_unless_it_says_off(name: str) -> None:
    assert "not supported by this release" in str(refusal("", {name: "1"}))
    assert parsed("", {name: "false"}) == parsed("")


def test_no_flag_is_both_there_and_refused() -> None:
    names = {name for field in FIELDS for name in field.flag_names} | {
        f"--{field.flag.off_flag}" for field in FIELDS if field.flag.off_flag
    }
    assert not names & LATER_FLAGS


def test_an_unknown_flag_is_refused_with_the_closest_one() -> None:
    assert str(refusal("--worker-url http://a")) == "--worker-url: unknown flag; did you mean --worker-urls?"
    assert str(refusal("--qqqq")) == "--qqqq: unknown flag"


def test_flags_are_not_abbreviated() -> None:
    assert refusal("--worker-u http://a").reason.startswith("unknown flag")


def test_help_lists_every_flag_exactly_once_with_its_default() -> None:
    text = launch_parser(policies=POLICIES).format_help()
    listed = re.findall(r"^  ((?:-\w, )?--[a-z0-9-]+.*)$", text, re.MULTILINE)
    names = [name for line in listed for name in re.findall(r"(?<!\S)--[a-z0-9-]+", line.partition("  ")[0])]
    wanted = [name for field in FIELDS for name in field.flag_names]
    wanted += [f"--{field.flag.off_flag}" for field in FIELDS if field.flag.off_flag]
    assert sorted(names) == sorted([*wanted, "--help", "--version"])
    words = " ".join(text.split())
    for field in FIELDS:
        if field.name != "policy":
            assert f"(default: {field.default_text})" in words, field.name


def test_help_shows_no_rows_of_the_contract() -> None:
    assert not re.search(r"\([A-Z]+-\d", launch_parser(policies=POLICIES).format_help())


def test_policies_are_those_of_the_shelf() -> None:
    assert parsed("--policy round_robin").routing.policy == "round_robin"
    assert str(refusal("--policy manual")) == "--policy: 'manual': not supported by this release"
    assert "did you mean round_robin" in str(refusal("--policy roundrobin"))
    assert refusal("", {"SMG_PREFILL_POLICY": "best"}).flag == "SMG_PREFILL_POLICY"


def test_the_default_policy_is_cache_aware_as_soon_as_the_shelf_has_it() -> None:
    assert default_policy(("least_load", "random")) == "least_load"
    assert default_policy(("least_load", "cache_aware")) == "cache_aware"
    assert parsed("").routing.policy == "cache_aware"


def test_the_shelf_has_only_policies_of_the_contract() -> None:
    assert set(policy_names()) <= set(POLICIES_OF_THE_CONTRACT)
    assert "least_load" in policy_names()


def test_the_declared_default_policy_is_the_one_that_starts() -> None:
    assert parse([], {}).routing.policy == Settings().routing.policy


def test_a_variable_that_is_nearly_one_of_ours_is_found() -> None:
    found = unknown_variables({"SMG_WORKER_URL": "x", "SMG_PORT": "1", "SMG_PORT_80_TCP": "x", "PATH": "x"})
    assert found == {"SMG_WORKER_URL": "SMG_WORKER_URLS"}
