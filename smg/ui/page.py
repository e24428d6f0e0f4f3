"""The page itself: three files of this folder as one HTML document, and the policy under which browsers run it.

Owns the joining of markup, style and script (so that the page is one request, needs nobody else and works offline) and the
headers that go with it: nothing is loaded from anywhere, and only this very style and script run, told by their hashes. It
never puts a value into the page; those come by `/ui/events`, as data.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from smg.net.plain import Response

STYLE_PLACE = "/* style */"
SCRIPT_PLACE = "/* script */"


def page() -> Response:
    """The whole answer to `GET /ui`."""
    folder = files("smg.ui")
    markup, style, script = (
        folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    assert markup.count(STYLE_PLACE) == markup.count(SCRIPT_PLACE) == 1
    assert "</style" not in style and "</script" not in script, "would end its element"
    document = markup.replace(STYLE_PLACE, style).replace(SCRIPT_PLACE, script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = [
        ("content-security-policy", policy),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
        ("cache-control", "no-cache"),
    ]
    return Response(200, document.encode(), "text/html; charset=utf-8", headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
