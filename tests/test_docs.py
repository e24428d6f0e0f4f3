"""The documents keep their word: links lead somewhere, commands exist, flags are real, every page can be found.

Owns the reading of Markdown, by its links and its blocks of code; it must never judge how a page is written.
"""

from __future__ import annotations

import os
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
PAGES = (
    sorted(HOUSE.glob("*.md"))
    + sorted((HOUSE / "docs").rglob("*.md"))
    + sorted((HOUSE / "deploy").rglob("*.md"))
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FRAGMENT_KINDS = ("feature", "fix", "change", "removal")


def _name(page: Path) -> str:
    return str(page.relative_to(HOUSE))


def _links(page: Path) -> Iterator[tuple[Path, str]]:
    """Links of a page to places in this repository: the file they name and the anchor in it."""
    text = FENCE.sub("", page.read_text())
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            place, _, anchor = target.partition("#")
            yield ((page.parent / place).resolve() if place else page), anchor


@cache
def _anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer makes of the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target, anchor in _links(page):
        assert target.exists(), f"{_name(page)} points at {target}, which does not exist"
        assert target.is_relative_to(HOUSE), f"{_name(page)} points out of the repository: {target}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{_name(page)}: no heading #{anchor} in {_name(target)}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [HOUSE / "README.md"]
    while todo:
        page = todo.pop()
        if page.is_dir():  # viewers show a folder as the list of its pages
            todo += page.glob("*.md")
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        todo += [target for target, _ in _links(page)]
    hidden = [_name(page) for page in PAGES if page not in seen and page.parent.name != "news"]
    assert not hidden, f"no link leads to {hidden}"


def _commands(page: Path) -> Iterator[list[str]]:
    """Commands of the shell blocks of a page, one list of words each, lines joined where they continue."""
    for language, block in FENCE.findall(page.read_text()):
        if language in ("sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield words


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_script_a_page_names_can_be_run(page: Path) -> None:
    named = set(re.findall(r"(?:^|[\s`(])(?:\./)?(scripts/[\w.-]*\w|\.ci/run)", page.read_text()))
    for script in named:
        path = HOUSE / script
        assert path.exists(), f"{_name(page)} names {script}, which does not exist"
        assert path.suffix or os.access(path, os.X_OK), (
            f"{_name(page)} names {script}, which cannot be executed"
        )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_smg_command_in_a_page_is_accepted(page: Path) -> None:
    for words in _commands(page):
        words = words[1:] if words[0] in ("exec", "nohup") else words
        if Path(words[0]).name == "smg":
            rest = words[1 : words.index("&")] if "&" in words else words[1:]
            _accept(rest, f"{_name(page)}: {shlex.join(words)}")


def _accept(words: list[str], where: str) -> None:
    from smg.cli.flags import launch_parser
    from smg.cli.main import available_commands

    command = words.pop(0) if words and not words[0].startswith("-") else "launch"
    assert command in {*available_commands(), "start"}, f"{where}: there is no command {command}"
    if command in ("launch", "start"):
        flags = {flag for action in launch_parser("smg")._actions for flag in action.option_strings}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in flags | {"--version"}, f"{where}: there is no flag {word}"


def test_the_readme_names_every_policy() -> None:
    from smg.policies import POLICIES

    readme = (HOUSE / "README.md").read_text()
    assert [policy for policy in POLICIES if f"`{policy}`" not in readme] == []


def test_the_unit_for_systemd_starts_a_command_that_exists() -> None:
    unit = (HOUSE / "deploy" / "smg.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    program, *words = shlex.split(command)
    assert Path(program).name == "smg"
    _accept(words, "deploy/smg.service")


def test_the_pictures_are_drawings_that_parse_and_say_what_they_show() -> None:
    pictures = sorted((HOUSE / "docs" / "pictures").glob("*"))
    assert pictures
    for picture in pictures:
        if picture.suffix == ".png":
            continue  # a photograph of the page: see below
        assert picture.suffix == ".svg", picture
        root = ET.parse(picture).getroot()
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and title.text, f"{picture.name} has no <title> for those who cannot see it"


def test_the_photograph_of_the_page_is_small_and_described_where_it_is_shown() -> None:
    (picture,) = (HOUSE / "docs" / "pictures").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size <= 300_000
    for page in ("README.md", "docs/operate/ui.md"):
        (words,) = re.findall(rf"!\[(.*?)\]\([^)]*{picture.name}\)", (HOUSE / page).read_text())
        assert len(words.split()) > 8, page


def test_fragments_of_news_are_named_by_their_kind() -> None:
    for fragment in (HOUSE / "docs" / "news").glob("*"):
        slug, kind = fragment.name.split(".")[0], fragment.name.split(".")[1]
        assert re.fullmatch(r"[a-z0-9-]+", slug), fragment
        assert kind in FRAGMENT_KINDS and fragment.name.endswith(".md"), fragment
