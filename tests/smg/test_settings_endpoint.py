"""The template of `--kv-events`: filled in for any worker, refused with a reason otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.settings_endpoint import endpoints_of, event_endpoints


@pytest.mark.parametrize(
    ("template", "rank", "endpoints"),
    [
        ("tcp://{host}:5557", None, ("tcp://w:5557", None)),
        ("tcp://{host}:5557", 2, ("tcp://w:5559", None)),
        ("tcp://{host}:{port+1000}", None, ("tcp://w:9000", None)),
        ("tcp://{host}:{port+1000}", 1, ("tcp://w:9001", None)),
        ("tcp://{host}:{5557+rank}", 3, ("tcp://w:5560", None)),
        ("tcp://{host}:{ port + rank + 7 }", 1, ("tcp://w:8008", None)),
        (" tcp://{host}:5557 , tcp://{host}:5558", None, ("tcp://w:5557", "tcp://w:5558")),
        ("ipc:///run/events-{port}", 1, ("ipc:///run/events-8000", None)),
    ],
)
def test_a_template_is_filled_in(template, rank, endpoints):
    assert endpoints_of(template, "w", 8000, rank) == endpoints


def test_an_ipv6_address_is_bracketed():
    assert endpoints_of("tcp://{host}:5557", "fd00::1", 80, None) == ("tcp://[fd00::1]:5557", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "one endpoint"),
        ("tcp://{host}:5557,", "one endpoint"),
        ("a,b,c", "one endpoint"),
        ("http://{host}:5557", "tcp://HOST:PORT"),
        ("tcp://{host}", "tcp://HOST:PORT"),
        ("tcp://{host}:{model}", "not known"),
        ("tcp://{host}:{port-1}", "not known"),
        ("tcp://{host}:0", "port 0"),
        ("tcp://{host}:70000", "port 70000"),
        ("ipc://", "tcp://HOST:PORT"),
    ],
)
def test_what_gives_no_endpoint_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        event_endpoints(text)


@given(st.text(max_size=40))
def test_any_text_is_taken_or_refused_with_a_reason(text):
    try:
        event_endpoints(text)
    except ValueError as wrong:
        assert str(wrong)
