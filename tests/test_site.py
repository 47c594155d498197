"""The documentation builds without a warning, its pictures can be drawn, and every public name of Poise is in it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import poise

ROOT = Path(__file__).parents[1]


def loaded(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<(link|script|img)[^>]+(href|src)=.https?:", page), "the pages are to be read offline"
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "--kl-coef" in commands


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | {"reference/commands.md"}  # that one is generated


@pytest.mark.parametrize("name", ["overoptimization", "heads", "objectives", "scale"])
def test_every_picture_can_be_drawn(name: str) -> None:
    figures = loaded("figures")
    own = {path.stem for path in (ROOT / "docs" / "images").glob("*.svg")} - {"frontier"}  # docs/frontier_page.py
    assert set(figures.FIGURES) == own
    assert figures.drawn(name).startswith("<svg")


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    parts = {name: home.partition(":") for name, home in poise._HOMES.items()}
    homes = {f"{module}.{there or name}" for name, (module, _, there) in parts.items()}
    assert listed == homes
    assert [name for name in poise.__all__ if not name.startswith("__") and not getattr(poise, name).__doc__] == []


def test_docstrings_become_markdown() -> None:
    as_markdown = loaded("docstrings").as_markdown
    assert as_markdown("Sum.\n\nx: terms.\n\n>>> f(1)\n1") == "Sum.\n\n- `x`: terms.\n\n```pycon\n>>> f(1)\n1\n```"


def test_links_that_leave_the_documentation_become_text() -> None:
    class Page:
        class file:  # noqa: N801
            src_uri = "start/own.md"

    plain = loaded("hooks").on_page_markdown
    text = "[a](../data.md) [b](../../src/x.py) [c](https://example.org)"
    assert plain(text, Page, None, None) == "[a](../data.md) `b` [c](https://example.org)"
