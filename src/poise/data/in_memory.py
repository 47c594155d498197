"""Data that a Python program has in memory, written as the file that the readers know.

A `datasets.Dataset`, a list of rows or a list of prompts becomes JSON lines, so that each row is checked, counted and
named by its number in the way of every file, and a run folder holds what it was trained on.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from poise.errors import PoiseError
from poise.runtime.folders import own
from poise.runtime.run_folder import write_atomic

# A file's name or hub id, or rows: a `datasets.Dataset`, a list of mappings, of prompts.
Data = str | Path | Iterable[Any]


def as_file(data: Data, path: Path, column: str = "") -> str:
    """The name of a file that holds `data`: its own, or `path`, to which rows in memory are written.

    column: what a row that is no mapping is the value of, such as `prompt`.
    Raises PoiseError for a row of another type, and if `path` holds other rows already.
    """
    if isinstance(data, (str, Path)):
        return str(data)
    lines = [json.dumps(as_row(row, number, path.stem, column), default=str) for number, row in enumerate(data, 1)]
    text = "".join(f"{line}\n" for line in lines)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise PoiseError(f"{path.parent} was begun with another {path.stem}; choose another output")
    own(path.parent)
    write_atomic(path, text)
    return str(path)


def as_row(row: Any, number: int, what: str, column: str = "") -> dict[str, Any]:
    """A row in memory as a mapping; numbers that are NaN are missing, as pandas writes them.

    >>> as_row("Review a film.", 1, "prompts", "prompt")
    {'prompt': 'Review a film.'}
    """
    if isinstance(row, Mapping):
        return {str(key): None if value != value else value for key, value in row.items()}
    if column and isinstance(row, (str, list)):
        return {column: row}
    raise PoiseError(f"row {number} of {what} is of type {type(row).__name__}; a mapping of columns was expected")
