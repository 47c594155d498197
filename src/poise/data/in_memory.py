"""Data that a Python program has in memory, written as the file that the readers know.

A `datasets.Dataset`, a list of rows or a list of prompts becomes JSON lines, so that each row is checked, counted and
named by its number in the way of every file, and a run folder holds what it was trained on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from poise.data.class_labels import with_class_names
from poise.data.types import Preference, Sample
from poise.errors import PoiseError
from poise.runtime.folders import own
from poise.runtime.run_folder import write_atomic

# A file's name or hub id, or rows: a `datasets.Dataset`, a list of mappings, of prompts.
Data = str | Path | Iterable[Any]

_GIVEN: dict[str, str] = {}  # file written by `as_file` -> what the program calls its rows


def as_file(data: Data, path: Path, column: str = "") -> str:
    """The name of a file that holds `data`: its own, or `path`, to which rows in memory are written.

    column: what a row that is no mapping is the value of, such as `prompt`.
    Raises PoiseError for data or a row of another type, and if `path` holds other rows already.
    """
    if isinstance(data, (str, Path)):
        return str(data)
    given = entries(data, path.stem)
    if schema := getattr(getattr(data, "features", None), "arrow_schema", None):  # of `datasets`
        given = with_class_names(given, schema.metadata)
    rows = enumerate(given, 1)
    text = "".join(f"{json.dumps(as_row(row, number, path.stem, column))}\n" for number, row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise PoiseError(f"{path.parent} was begun with another {path.stem}; choose another output")
    own(path.parent)
    write_atomic(path, text)
    _GIVEN[str(path)] = path.stem
    return str(path)


def called(path: str | Path) -> str:
    """What messages call a file: by its name, or as the program does that gave its rows in memory: `train_dataset`."""
    return _GIVEN.get(str(path), str(path))


def to_read_again(data: Data) -> Data:
    """The same, with the rows of an iterator, which gives them once only, in a list."""
    return list(data) if isinstance(data, Iterator) else data


def entries(data: Any, what: str) -> Iterable[Any]:
    """`data` to be read item by item. PoiseError for what is no sequence, or gives the names of columns instead."""
    kind = type(data).__name__
    if isinstance(data, Mapping):
        raise PoiseError(
            f"{what}: a list of rows or a `datasets.Dataset` was expected, not a {kind}, which has names; "
            f"give one split of several data sets, and columns as a list of rows"
        )
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        raise PoiseError(
            f'{what}: a {kind} gives the names of its columns, not its rows; give .to_dict("records") of it'
        )
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise PoiseError(f"{what}: a list was expected, not {kind}")
    return data


def as_row(row: Any, number: int, what: str, column: str = "") -> dict[str, Any]:
    """A row in memory as a mapping of what JSON can hold; numbers that are NaN are missing, as pandas writes them.

    Arrays and tensors become lists. Raises PoiseError for a row, or a value in it, of another type.

    >>> as_row("Review a film.", 1, "prompts", "prompt")
    {'prompt': 'Review a film.'}
    """
    if isinstance(row, (Sample, Preference)):
        row = asdict(row)
    if isinstance(row, Mapping):
        found = {str(name): _plain_or_raise(value, number, what, str(name)) for name, value in row.items()}
        return {name: None if value != value else value for name, value in found.items()}
    if column:
        value = _plain_or_raise(row, number, what, column)
        if isinstance(value, (str, list)):
            return {column: value}
    raise PoiseError(f"row {number} of {what} is of type {type(row).__name__}; a mapping of columns was expected")


def _plain_or_raise(value: Any, number: int, what: str, name: str) -> Any:
    try:
        return _plain(value)
    except RecursionError:
        problem = "holds itself, or is nested too deep"
    except TypeError as error:
        problem = f"holds {error}"
    raise PoiseError(f"row {number} of {what}: {name!r} {problem}; convert it to text or numbers, or leave it out")


def _plain(value: Any) -> Any:
    """A value as JSON can hold it. TypeError, saying of which type it is, for one that JSON cannot."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):  # arrays, tensors, numbers of NumPy
        return _plain(value.tolist())
    if type(value).__name__ in ("NAType", "NaTType"):  # what pandas writes where nothing is
        return None
    if isinstance(value, (date, time, timedelta, Decimal, UUID, Path)):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")
