"""The page as it is served: one document, a policy that fits it, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from smg.ui.page import page

READABLE = 4.5
"""Contrast of text, WCAG 2.2 level AA."""


def test_the_policy_names_exactly_the_style_and_the_script_of_the_page() -> None:
    answer = page()
    policy = dict(answer.headers)["content-security-policy"]
    document = answer.body.decode()
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", document, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert len(text) > 1000
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_needs_nothing_from_elsewhere() -> None:
    document = page().body.decode()
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'<>)]+""", document))
    text_only = {"http://www.w3.org/2000/svg", "http://HOST:PORT"}
    assert {found.rstrip("/") for found in addresses if not found.startswith("// ")} <= text_only
    assert not re.search(r"<(?:link|script|img|iframe)[^>]+(?:src|href)=(?!['\"]data:)", document)


def test_the_page_has_no_way_to_turn_text_into_markup() -> None:
    document = page().body.decode()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
    ):
        assert word not in document, word


def test_the_page_has_no_attributes_that_the_policy_would_refuse() -> None:
    document = page().body.decode()
    markup = re.sub(r"<(style|script)>.*?</\1>", "", document, flags=re.S)
    assert not re.search(r"\s(?:style|on[a-z]+)=", markup)


def test_the_page_is_small() -> None:
    assert len(page().body) < 60_000


def _schemes() -> dict[str, dict[str, str]]:
    """The colours of the light and of the dark scheme."""
    blocks = re.findall(r":root \{(.*?)\}", page().body.decode(), re.S)
    light, dark = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    return {"light": light, "dark": dark}


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_can_be_read_on_what_it_stands(scheme: str) -> None:
    colours = _schemes()[scheme]
    pairs = [(text, "card") for text in ("text", "quiet", "accent", "good", "warn", "bad", "idle")]
    pairs += [(text, "ground") for text in ("text", "quiet", "good", "bad", "idle")] + [("bad", "bad-soft")]
    for text, ground in pairs:
        low, high = sorted((_luminance(colours[text]), _luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= READABLE, (text, ground)
