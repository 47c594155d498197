"""JSON lines, JSON arrays, and objects one after another, as rows."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from poise.data.csv_rows import looks_like_header
from poise.data.raw import Numbered, TwiceError, Unreadable, not_utf8, once_each, parsed_json, whole_number
from poise.errors import PoiseError

_CHUNK = 1 << 16


def json_rows(file: Iterable[str], path: Path, suffix: str) -> Numbered:
    """JSON lines; or one JSON array; or objects written over several lines."""
    lines = iter(file)
    blank, first = 0, next(lines, "")
    while first and not first.strip():
        blank, first = blank + 1, next(lines, "")
    seen = [first]
    if looks_like_header(first) and not first.lstrip().startswith(("{", "[")):
        raise PoiseError(f"{path}:{blank + 1}: a table, by its first line; name it .csv or .tsv")
    several_lines = (suffix == ".json" or first.strip() == "{") and not _is_whole(first)
    if first.lstrip().startswith("["):
        several_lines = True
        if _is_whole(first):  # the array is complete: the file, or the first of its lines
            seen += _up_to_text(lines)
            several_lines = not seen[-1].strip() or len(seen) == 1
    rest = itertools.chain(seen, lines)
    if several_lines:
        yield from _Documents(rest, path, blank + 1).rows()
    else:
        yield from (
            (i, line.rstrip("\n").removeprefix("\ufeff")) for i, line in enumerate(rest, blank + 1) if line.strip()
        )


def _is_whole(line: str) -> bool:
    try:
        parsed_json(line)
    except ValueError:
        return False
    return True


def _up_to_text(lines: Iterator[str]) -> list[str]:
    """Lines up to the first that is not blank."""
    found: list[str] = []
    for line in lines:
        found.append(line)
        if line.strip():
            break
    return found


class _Documents:
    """Objects of a JSON array, or of a file of objects one after another, decoded as the text comes in.

    Raises PoiseError at a fault of syntax: where the next object begins is then unknown.
    """

    def __init__(self, parts: Iterator[str], path: Path, line: int):
        self.parts, self.path, self.line = parts, path, line
        self.text, self.at = "", 0
        self.decoder = json.JSONDecoder(parse_int=whole_number, object_pairs_hook=once_each)

    def rows(self) -> Numbered:
        in_array = self._next_character() == "["
        if in_array:
            self.at += 1
        expects_comma = False
        while True:
            character = self._next_character()
            if not character:
                if in_array:
                    self._fail("the JSON array is not closed")
                return
            if in_array and character == "]":
                self.at += 1
                if self._next_character():
                    self._fail("text after the end of the JSON array")
                return
            if in_array and expects_comma:
                if character != ",":
                    self._fail("not JSON: a comma was expected")
                self.at += 1
                self._next_character()
            line, value = self.line, self._value()
            expects_comma = True
            yield (
                line,
                value
                if isinstance(value, dict)
                else Unreadable(f"a JSON object was expected, not {type(value).__name__}", json.dumps(value)),
            )

    def _next_character(self) -> str:
        """The next one that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(_CHUNK):
                return ""

    def _value(self) -> Any:
        """The value that begins here. Text is read in pieces that double, so that a long value takes linear time."""
        size = _CHUNK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError:
                self._fail("not read: JSON nested too deeply")
            except TwiceError as error:
                self._fail(str(error))
            except json.JSONDecodeError as error:
                # A fault near the end of what was read may be only its end; an open string begins anywhere.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if not cut or not self._more(size):
                    self.line += self.text.count("\n", self.at, error.pos)
                    self._fail(f"not JSON: {error.msg}")
            else:
                if end < len(self.text) or isinstance(value, dict | list | str) or not self._more(size):
                    self.line += self.text.count("\n", self.at, end)
                    self.at = end
                    return value
            size *= 2

    def _more(self, size: int) -> bool:
        """Read `size` more characters; False if there are none."""
        kept = [self.text[self.at :]]
        self.at, count = 0, 0
        for part in self.parts:
            try:
                part.encode()
            except UnicodeEncodeError as error:
                self.text = "".join(kept)
                self.line += self.text.count("\n")
                self._fail(not_utf8(part, error.start))
            kept.append(part)
            count += len(part)
            if count >= size:
                break
        self.text = "".join(kept)
        return count > 0

    def _fail(self, reason: str) -> NoReturn:
        raise PoiseError(f"{self.path}:{self.line}: {reason}")
