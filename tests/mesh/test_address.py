"""Addresses as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.address import bare_host, format_address, parse_address
from mesh.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:5", ("10.0.0.1", 5)),
        ("router-2:30001", ("router-2", 30001)),
        ("router-2", ("router-2", 7946)),
        (" a.example ", ("a.example", 7946)),
        ("[::1]:30001", ("::1", 30001)),
        ("[fe80::1]", ("fe80::1", 7946)),
        ("::1", ("::1", 7946)),
        ("2001:db8::7:30001", ("2001:db8::7:30001", 7946)),
    ],
)
def test_an_address_has_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, 7946) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":5",
        "a:",
        "a:b",
        "a:0",
        "a:70000",
        "[::1",
        "[::1]5",
        "[]:5",
        "[::1]:",
        "a b:5",
        "http://a:5",
        "a:١",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_address(text, 7946)


def test_without_a_default_a_port_is_needed() -> None:
    with pytest.raises(SettingsError, match="port"):
        parse_address("router-2", 0)


@given(st.sampled_from(["10.0.0.1", "::1", "a.example", "2001:db8::1"]), st.integers(1, 65535))
def test_what_is_formatted_is_parsed_again(host: str, port: int) -> None:
    assert parse_address(format_address((host, port)), 1) == (host, port)


def test_mapped_addresses_are_shown_as_what_they_are() -> None:
    assert bare_host("::ffff:10.0.0.1") == "10.0.0.1"
    assert bare_host("::ffff:1") == "::ffff:1"
    assert bare_host("10.0.0.1") == "10.0.0.1"
