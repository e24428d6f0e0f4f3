"""UP-4 to UP-7, DN-2, RID-1 to RID-3, HTTP-11, HTTP-12: what travels, and how targets are read."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.wire.headers import (
    forwarded,
    new_request_id,
    path_value,
    request_id,
    returned,
    split_target,
    value_of,
)

ID_NAMES = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")

NAMES = st.sampled_from(
    [b"content-type", b"cookie", b"x-request-id", b"x-request-id-a", b"openai-beta", b"authorization", b"connection", b"te",
     b"x-a", b"set-cookie", b"proxy-authenticate", b"keep-alive", b"content-length", b"x-smg-worker-id", b"upgrade", b"x-api-key"]
)  # fmt: skip
VALUES = st.one_of(
    st.binary(max_size=12).map(lambda raw: bytes(byte for byte in raw if byte >= 32)),
    st.sampled_from([b"close", b"x-a, te", b"Bearer KEY", b"KEY", b"keep-alive", b"Set-Cookie ,x-b", b""]),
)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=10)


def lines(block: bytes) -> list[tuple[bytes, bytes]]:
    assert block == b"" or block.endswith(b"\r\n")
    pairs = [line.split(b": ", 1) for line in block.split(b"\r\n")[:-1]]
    return [(name, value) for name, value in pairs]


@pytest.mark.parametrize(
    "name",
    [b"content-type", b"accept", b"accept-encoding", b"authorization", b"x-correlation-id", b"x-request-id-tag", b"traceparent",
     b"tracestate", b"x-smg-routing-key", b"openai-organization", b"openai-beta", b"anthropic-version", b"anthropic-beta",
     b"x-api-key"],
)  # fmt: skip
def test_up_4_a_listed_header_reaches_the_worker(name: bytes) -> None:
    assert lines(forwarded([(name, b"v")], "rid")) == [(b"x-request-id", b"rid"), (name, b"v")]


@pytest.mark.parametrize(
    "name",
    [b"cookie", b"user-agent", b"x-forwarded-for", b"x-forwarded-secret", b"forwarded", b"connection", b"keep-alive", b"te",
     b"trailer", b"upgrade", b"transfer-encoding", b"content-length", b"host", b"x-smg-tenant-id", b"x-smg-target-worker",
     b"x-request-id", b"x-anything", b"proxy-authorization", b"expect", b"origin", b"openai", b"x-openai-a", b"x-request-idx"],
)  # fmt: skip
def test_up_4_another_header_does_not(name: bytes) -> None:
    assert lines(forwarded([(name, b"v")], "rid")) == [(b"x-request-id", b"rid")]


def test_up_7_the_request_id_of_the_answer_replaces_the_clients() -> None:
    sent = lines(forwarded([(b"x-request-id", b"theirs"), (b"accept", b"*/*")], "ours"))
    assert [value for name, value in sent if name == b"x-request-id"] == [b"ours"]


def test_up_6_a_workers_own_key_is_its_only_authorization() -> None:
    client = [(b"authorization", b"Bearer client"), (b"x-api-key", b"client"), (b"accept", b"*/*")]
    assert lines(forwarded(client, "rid", b"own")) == [
        (b"x-request-id", b"rid"),
        (b"accept", b"*/*"),
        (b"authorization", b"Bearer own"),
    ]


def test_sec_3_a_header_that_holds_a_gateway_key_is_left_out_whatever_its_name() -> None:
    client = [
        (b"authorization", b"K"),
        (b"openai-organization", b"K"),
        (b"x-smg-routing-key", b"K"),
        (b"accept", b"*/*"),
    ]
    assert lines(forwarded(client, "rid", None, lambda value: value == b"K"))[1:] == [(b"accept", b"*/*")]


def test_trc_1_our_trace_replaces_the_clients_and_without_ours_theirs_passes() -> None:
    client = [(b"traceparent", b"00-a"), (b"tracestate", b"b")]
    assert lines(forwarded(client, "rid"))[1:] == client
    assert lines(forwarded(client, "rid", trace=b"traceparent: 00-z\r\n"))[1:] == [(b"traceparent", b"00-z")]


def test_duplicates_and_their_order_are_kept_both_ways() -> None:
    twice = [(b"anthropic-beta", b"a"), (b"anthropic-beta", b"b")]
    assert lines(forwarded(twice, "rid"))[1:] == twice
    assert lines(
        returned([(b"set-cookie", b"a"), (b"x-a", b"1"), (b"set-cookie", b"b"), (b"x-a", b"2")])
    ) == [
        (b"set-cookie", b"a"),
        (b"x-a", b"1"),
        (b"set-cookie", b"b"),
        (b"x-a", b"2"),
    ]


@pytest.mark.parametrize(
    "name",
    [b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
     b"upgrade", b"x-request-id", b"content-length", b"x-smg-worker-id"],
)  # fmt: skip
def test_dn_2_a_hop_by_hop_header_stays_here(name: bytes) -> None:
    assert lines(returned([(b"a", b"1"), (name, b"v"), (b"b", b"2")])) == [(b"a", b"1"), (b"b", b"2")]


@pytest.mark.parametrize("name", [b"content-type", b"content-encoding", b"retry-after", b"server", b"date", b"etag", b"location", b"x-ratelimit-limit-requests"])  # fmt: skip
def test_dn_2_rty_7_every_other_header_is_relayed(name: bytes) -> None:
    assert lines(returned([(name, b"v")])) == [(name, b"v")]


@pytest.mark.parametrize("where", ["before", "behind"])
def test_dn_2_headers_named_by_connection_stay_here(where: str) -> None:
    named = [(b"x-hop", b"1"), (b"x-two", b"2")]
    connection = [(b"connection", b"close, X-Hop"), (b"connection", b" x-two")]
    headers = named + connection if where == "behind" else connection + named
    assert lines(returned([*headers, (b"x-a", b"3")])) == [(b"x-a", b"3")]


def test_connection_cannot_take_the_description_of_the_body_away() -> None:
    headers = [
        (b"connection", b"content-type, content-encoding"),
        (b"content-type", b"a/b"),
        (b"content-encoding", b"gzip"),
    ]
    assert lines(returned(headers)) == headers[1:]


@given(HEADERS)
def test_what_returns_is_in_order_and_holds_no_hop_by_hop_header(headers: list[tuple[bytes, bytes]]) -> None:
    words = {
        word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")
    } - {b"content-type"}
    hop = {
        b"connection",
        b"keep-alive",
        b"te",
        b"upgrade",
        b"content-length",
        b"x-request-id",
        b"x-smg-worker-id",
    } | words
    expected = [header for header in headers if header[0] not in hop and not header[0].startswith(b"proxy-")]
    assert lines(returned(headers)) == expected


@given(HEADERS, st.sampled_from([None, b"own"]))
def test_no_key_and_no_unlisted_header_is_ever_forwarded(
    headers: list[tuple[bytes, bytes]], key: bytes | None
) -> None:
    sent = lines(forwarded(headers, "rid", key, lambda value: value in (b"KEY", b"Bearer KEY")))
    allowed = {
        b"content-type",
        b"x-request-id",
        b"x-request-id-a",
        b"openai-beta",
        b"authorization",
        b"x-api-key",
    }
    assert {name for name, _ in sent} <= allowed
    assert not any(value in (b"KEY", b"Bearer KEY") for _, value in sent)
    if key is not None:
        assert [value for name, value in sent if name in (b"authorization", b"x-api-key")] == [b"Bearer own"]


def test_rid_1_the_first_valid_header_in_the_order_of_the_setting_counts() -> None:
    headers = [(b"request-id", b"d"), (b"x-trace-id", b"c"), (b"x-correlation-id", b"b")]
    assert request_id(headers, ID_NAMES, "req-", Random(1)) == "b"
    assert request_id([*headers, (b"x-request-id", b"a")], ID_NAMES, "req-", Random(1)) == "a"
    assert request_id([*headers, (b"x-request-id", b"not valid")], ID_NAMES, "req-", Random(1)) == "b"
    assert request_id(headers, (b"my-id",), "req-", Random(1)).startswith("req-")


@pytest.mark.parametrize("value", [b"a", b"x" * 128, b"!~[]{}", b"chatcmpl-1"])
def test_rid_3_valid_values_are_taken(value: bytes) -> None:
    assert request_id([(b"x-request-id", value)], ID_NAMES, "req-", Random(1)) == value.decode()


@pytest.mark.parametrize(
    "value", [b"", b"x" * 129, b"a b", b"a\tb", b"a\r\nb", b"\xe9", b"\x7f", b"a\x00", b"a\n"]
)
def test_rid_3_http_16_invalid_values_are_as_if_absent(value: bytes) -> None:
    made = request_id([(b"x-request-id", value)], ID_NAMES, "req-", Random(1))
    assert re.fullmatch(r"req-[A-Za-z0-9]{24}", made)


@pytest.mark.parametrize("prefix", ["chatcmpl-", "cmpl-", "gnt-", "resp-", "msg_", "req-"])
def test_rid_2_made_ids_have_a_prefix_and_24_characters(prefix: str) -> None:
    rng = Random(7)
    made = {new_request_id(prefix, rng) for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(re.escape(prefix) + r"[A-Za-z0-9]{24}", one) for one in made)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/health", ("/health", "")),
        (b"/a?x=1&y=%20", ("/a", "x=1&y=%20")),
        (b"/a?", ("/a", "")),
        (b"/a?b?c", ("/a", "b?c")),
        (b"http://any-host/health", ("/health", "")),
        (b"HTTPS://h:1/v1/models?x=1", ("/v1/models", "x=1")),
        (b"http://host", ("/", "")),
        (b"http://host?x=/a", ("/", "x=/a")),
        (b"*", ("*", "")),
        (b"/%68ealth", ("/health", "")),
        (b"/v1/models/a%2Fb", ("/v1/models/a%2Fb", "")),
        (b"/v1%2fmodels", ("/v1%2fmodels", "")),
        (b"/%7Euser%2D", ("/~user-", "")),
        (b"/a%25%34%31", ("/a%2541", "")),
        (b"/%zz%4", ("/%zz%4", "")),
        (b"/\xff\xc3\xa9", ("/\xff\xc3\xa9", "")),
        (b"", ("", "")),
    ],
)
def test_http_11_http_12_targets_are_read_by_their_path(target: bytes, expected: tuple[str, str]) -> None:
    assert split_target(target) == expected


@given(st.binary(max_size=60))
def test_any_target_is_read_without_an_error(target: bytes) -> None:
    path, query = split_target(target)
    assert "?" not in path
    assert path.count("/") <= target.count(b"/") + 1
    assert isinstance(path_value(path), str)
    assert query.encode("latin-1") in target


def test_path_values_are_decoded_wholly() -> None:
    assert path_value("org%2Fmodel%20x") == "org/model x"
    assert path_value("%ff") == "\ufffd"
    assert path_value("%c3%a9") == "\u00e9"


def test_the_first_value_of_a_header_is_found() -> None:
    assert value_of([(b"a", b"1"), (b"a", b"2")], b"a") == b"1"
    assert value_of([], b"a") is None
