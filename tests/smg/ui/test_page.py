"""The page as it is served: one document, a policy that fits it, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re

from smg.ui.page import page


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
