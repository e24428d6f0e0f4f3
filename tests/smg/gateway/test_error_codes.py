"""The table of codes and the code that raises them say the same."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import smg
from smg.gateway.error_codes import CODES, THEMES
from smg.gateway.problem import LEG_CODES
from smg.gateway.routes import NOT_IMPLEMENTED, ROUTES, SUMMARIES

SOURCES = Path(smg.__file__).parent


def raised() -> dict[str, set[int]]:
    """Every literal code in the source with its statuses; `*` stands in a code for what is filled in."""
    found: dict[str, set[int]] = defaultdict(set)
    for leg, codes in LEG_CODES.items():  # raised out of a table, with the worker's status
        found[f"{leg}_error"] = set()
        for status, code in codes.items():
            found[code].add(status)
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "GatewayError" and len(node.args) > 1 and isinstance(node.args[0], ast.Constant):
                status, code = node.args[0].value, node.args[1]
                assert isinstance(status, int)
                if isinstance(code, ast.Constant):
                    found[str(code.value)].add(status)
                elif isinstance(code, ast.JoinedStr):
                    text = "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "*" for part in code.values
                    )
                    found[text].add(status)
            elif name == "bad_request":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                status_node = given.get("status", ast.Constant(400))
                if isinstance(status_node, ast.Constant) and "code" not in given:
                    found["bad_request"].add(int(str(status_node.value)))
    return found


def test_every_code_that_is_raised_is_in_the_table_with_its_status() -> None:
    table = {entry.code: set(entry.statuses) for entry in CODES}
    for code, statuses in raised().items():
        if code.startswith("*"):
            matching = [known for known in table if known.endswith(code[1:])]
            assert matching, f"no code ends like {code}"
        else:
            assert statuses <= table.get(code, set()), f"{code} is raised with {statuses}"


def test_every_code_of_the_table_is_raised_somewhere() -> None:
    found = raised()
    filled = tuple(code[1:] for code in found if code.startswith("*"))
    for entry in CODES:
        assert entry.code in found or entry.code.endswith(filled), entry.code


def test_codes_are_told_once_and_in_a_known_theme() -> None:
    codes = [entry.code for entry in CODES]
    assert len(set(codes)) == len(codes)
    assert {entry.theme for entry in CODES} == set(THEMES)


def test_every_endpoint_has_its_sentence() -> None:
    names = {name for methods in ROUTES.values() for name, _ in methods.values()} - {NOT_IMPLEMENTED}
    assert names == SUMMARIES.keys()
