"""Rows as they come out of files, before anything is made of them: text, mappings, and what cannot be taken apart."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from poise.runtime.records import parse_json


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be taken apart: why, and its text."""

    reason: str
    text: str

    def __str__(self) -> str:
        return self.text


RawRow = str | dict[str, Any] | Unreadable
Numbered = Iterator[tuple[int, RawRow]]


_MOST_DIGITS = 4000  # Python refuses to read longer integers


def as_object(raw: RawRow) -> dict[str, Any]:
    """A raw row as a mapping; ValueError says why it is none."""
    if isinstance(raw, dict):
        return raw
    if isinstance(raw, Unreadable):
        raise ValueError(raw.reason)
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        raise ValueError(not_utf8(raw, error.start)) from None
    row = parsed_json(raw)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    return row


def parsed_json(text: str) -> Any:
    """The value of a JSON text; ValueError says what is wrong with it, also if it is nested too deeply."""
    try:
        return parse_json(text, object_pairs_hook=once_each)
    except json.JSONDecodeError as error:
        more = "; a line holds one object" if error.msg == "Extra data" else ""
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{more}") from None
    except TwiceError:
        raise
    except ValueError:  # too deep, or an integer too long for Python, which may be in a column that nobody reads
        return parse_json(text, parse_int=whole_number, object_pairs_hook=once_each)


class TwiceError(ValueError):
    """An object that gives one name two values."""


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises TwiceError if it gives one name two different values: readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if value != found[name]:
                raise TwiceError(f"{name[:60]!r} is there twice, with different values")
    return found


def whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def not_utf8(text: str, at: int) -> str:
    return f"not UTF-8: byte 0x{ord(text[at]) & 0xFF:02x} at column {at + 1}; save the file as UTF-8"
