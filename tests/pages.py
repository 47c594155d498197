"""What the tests of the pages share: a page as a parser sees it, and the browser that shows it."""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Collection
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from poise.errors import PoiseError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._text: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self._text).split())

    @property
    def security_policy(self) -> str:
        content = next(tag["content"] for name, tag in self.tags if name == "meta" and "http-equiv" in tag)
        assert content
        return content

    def assert_fetches_nothing(self) -> None:
        links = [
            value for _, attributes in self.tags for name, value in attributes.items()
            if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        ]  # fmt: skip
        assert all(link and link.startswith(("#", "data:")) for link in links)
        assert "@import" not in self.html

    def assert_accessible(self) -> None:
        """Identifiers are unique, no heading is skipped, every column and row of a table is named."""
        identifiers = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(identifiers) == len(set(identifiers)) > 0
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        assert all("scope" in attributes for tag, attributes in self.tags if tag == "th")


# NUL, ESC, a bidi override, a hidden tag, a zero-width space, a lone surrogate: none may reach a page or card.
UNSEEN = "\x00\x1b[31m\u202e\U000e0041\u200b\ud800"
SHOWN = r"\x00\x1b[31m\u202e\U000e0041\u200b\ud800"


def poisoned(value: Any, keys: Collection[str] = ("prompt", "completion", "device", "system")) -> Any:
    """JSON with characters that are not seen at the end of every text under one of the keys."""
    if isinstance(value, list):
        return [poisoned(one, keys) for one in value]
    if not isinstance(value, dict):
        return value
    return {k: v + UNSEEN if k in keys and isinstance(v, str) else poisoned(v, keys) for k, v in value.items()}


def poison(folder: Path) -> None:
    """Every JSON file of a folder, `poisoned`."""
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))


def assert_all_is_seen(text: str) -> None:
    assert SHOWN in text.replace("&#39;", "'")
    assert not set(text) & set(UNSEEN) - set("[31m")


def assert_wrong_forms_are_one_line(folder: Path, build: Callable[[Path], object], value: object) -> None:
    """A page built from results.json with `value` in the place of any one field: built, or refused in one line."""
    file = folder / "results.json"
    before = json.loads(file.read_text())
    for field in before:
        file.write_text(json.dumps(before | {field: value}))
        with contextlib.suppress(PoiseError):  # no other error leaves; what is optional may be of any form
            build(folder)
