"""The documentation: its links lead somewhere, and its commands are ones that exist."""

import re
import tomllib
from pathlib import Path

import pytest

from meerkat_engine.cli import main
from meerkat_engine.fed.config.run_config import SETTINGS

from helpers.imports import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    listed = {link.partition("#")[0] for link in LINK.findall((ROOT / "docs" / "README.md").read_text())}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    names = "|".join(sorted(main.commands, key=len, reverse=True))  # bench-server before bench
    for command, rest in re.findall(rf"meerkat-engine ({names})\b([^\n`]*)", text):
        known = {"--help"} | {option for parameter in main.commands[command].params for option in parameter.opts}
        for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", rest):
            assert option in known, f"meerkat-engine {command} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_extras_are_installed_from_the_clone(page: Path) -> None:
    """The name is on no package index, where anybody could take it."""
    assert not re.search(r"meerkat-engine\[", page.read_text())


def test_no_example_depends_on_the_name_on_an_index() -> None:
    for project in (ROOT / "examples").rglob("pyproject.toml"):
        dependencies = tomllib.loads(project.read_text())["project"]["dependencies"]
        assert not [each for each in dependencies if each.startswith("meerkat-engine")]


def test_every_setting_has_its_own_flat_name() -> None:
    assert len({(each.section, each.name) for each in SETTINGS.values()}) == len(SETTINGS)
