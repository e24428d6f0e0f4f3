"""YAML into structs: what is understood, and that every refusal names its line and member."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from smg.errors import SettingsError
from smg.yaml_config import DEPTH_MAX, FILE_BYTES_MAX, load_yaml


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant_key: str
    tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    is_on: bool = True

    def __post_init__(self) -> None:
        if self.tenant_key == "nobody":
            raise ValueError("nobody is no tenant")


class Limits(msgspec.Struct, frozen=True):
    tenants: Annotated[tuple[Rule, ...], Meta(max_length=3)] = ()
    by_name: dict[str, Rule] = {}
    words: list[str] = []


GOOD = b"""\
# limits
tenants:
  - tenant_key: auth:a
    tokens_per_minute: 1000
  - {tenant_key: "auth:b", share: 1, is_on: no}
by_name:
  7:
    tenant_key: auth:c
    tokens_per_minute: ~
words: [x, "1"]
"""


def refusal(text: bytes, type_: Any = Limits) -> str:
    with pytest.raises(SettingsError) as error:
        load_yaml(text, type_, "--limits")
    assert error.value.is_combination
    return str(error.value)


def test_a_document_becomes_structs():
    found = load_yaml(GOOD, Limits, "--limits")
    assert found.tenants == (Rule("auth:a", 1000), Rule("auth:b", None, 1.0, False))
    assert found.by_name == {"7": Rule("auth:c")}
    assert found.words == ["x", "1"]


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"{}", b"---\n"])
def test_an_empty_document_is_all_defaults(text):
    assert load_yaml(text, Limits, "--limits") == Limits()


def test_a_file_is_read_and_named(tmp_path):
    path = tmp_path / "limits.yaml"
    path.write_bytes(GOOD)
    assert load_yaml(str(path), Limits, "--limits").words == ["x", "1"]
    path.write_bytes(GOOD.replace(b"1000", b"many"))
    with pytest.raises(SettingsError) as error:
        load_yaml(str(path), Limits, "--limits")
    assert str(error.value) == (
        f"--limits: {path} line 4: tenants[0].tokens_per_minute: expected a whole number, got text"
    )


def test_a_file_that_is_not_there_or_too_large_is_said_so(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        load_yaml(str(tmp_path / "none.yaml"), Limits, "--limits")
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    with pytest.raises(SettingsError, match="is larger than"):
        load_yaml(str(path), Limits, "--limits")


CHANGES = [
    (b"share: 1", b"share: 1.5", "line 5: tenants[1].share: expected float <= 1.0"),
    (b"share: 1", b"share: .inf", "line 5: tenants[1].share: expected a finite number"),
    (b"is_on: no", b"is_on: 0", "line 5: tenants[1].is_on: expected true or false, got a whole number"),
    (b"1000", b"0", "line 4: tenants[0].tokens_per_minute: expected int >= 1"),
    (b"1000", b"1.5", "line 4: tenants[0].tokens_per_minute: expected a whole number, got a number"),
    (b"tokens_per_minute: 1000", b"tokens: 1", "line 4: tenants[0].tokens: is no member; there are is_on,"),
    (b"tenant_key: auth:a", b"share: 0", "line 3: tenants[0].tenant_key: is missing"),
    (b"auth:c", b"nobody", 'line 8: by_name["7"]: nobody is no tenant'),
    (b"auth:c", b"12", 'line 8: by_name["7"].tenant_key: expected text, got a whole number; put it'),
    (b"auth:c", b"2024-01-01", 'by_name["7"].tenant_key: expected text, got a date'),
    (b'"1"]', b"on]", "line 10: words[1]: expected text, got a truth value; put it between quotation marks"),
    (b'[x, "1"]', b"x", "line 10: words: expected a list, got text"),
    (b"auth:a", b"[a]", "line 3: tenants[0].tenant_key: expected text, got a list"),
    (b"words:", b"tenants:", "line 10: tenants: is given twice"),
    (b"words:", b"[a]:", "line 10: the name of a member is one word"),
    (b"words:", b"<<:", "line 10: <<: is no member"),
    (b"words: [", b"words: [[", "is not YAML"),
    (b"# limits", b"%bad", "line 1: is not YAML"),
    (b"auth:a", b"!!python/object/apply:os.system [a]", "expected text, got a list"),
    (b"auth:a", b"!!python/name:os.system ''", "expected text, got a value of type tag:yaml.org,2002:python"),
    (b"1000", b"!!int many", "'many' cannot be read"),
    (b"# limits", b"a: 1\n---\n", "is not YAML"),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES, ids=[change[2][:50] for change in CHANGES])
def test_a_refusal_names_line_and_member(old, new, message):
    assert GOOD.count(old) == 1
    assert message in refusal(GOOD.replace(old, new))


def test_a_list_has_its_bound():
    assert "line 1: tenants: has more than 3 entries" in refusal(
        b"tenants: [{}, {}, {}, {}]".replace(b"{}", b"{tenant_key: a}")
    )


def test_a_document_of_brackets_ends_before_the_stack_does():
    text = b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1)
    assert f"line 1: is nested deeper than {DEPTH_MAX} levels" in refusal(text)
    refusal(b"[" * 1_000_000)


def test_anchors_may_repeat_a_value_but_not_without_end():
    anchored = b"by_name:\n  a: &rule {tenant_key: x}\n  b: *rule\n"
    assert load_yaml(anchored, Limits, "--limits").by_name == {"a": Rule("x"), "b": Rule("x")}

    class Deep(msgspec.Struct, frozen=True):
        items: list[list[list[list[list[list[str]]]]]] = []

    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%b]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 6)]
    text = b"{" + b", ".join(lines) + b", items: *a5}"
    assert "is no member" in refusal(text, Deep)
    nested = b"&a0 [x, x, x, x, x, x, x, x, x, x]"
    for n in range(1, 6):
        nested = b"&a%d [%b%b]" % (n, nested, b", *a%d" % (n - 1) * 9)
    assert "the document has more than" in refusal(b"items: " + nested, Deep)
    assert "is not YAML" in refusal(b"by_name: *nobody")


def test_a_document_that_contains_itself_ends():
    assert refusal(b"by_name: &a\n  x: *a\n")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(text):
    try:
        load_yaml(text, Limits, "--limits")
    except SettingsError as error:
        assert "\n" not in str(error)


@given(st.lists(st.sampled_from(GOOD.decode().split("\n")), max_size=20))
def test_any_order_of_lines_is_read_or_refused(lines):
    try:
        load_yaml("\n".join(lines).encode(), Limits, "--limits")
    except SettingsError as error:
        assert str(error).startswith("--limits: the document line ")
