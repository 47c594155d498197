"""JSON and JSON lines that this project writes and reads again: every number in them is finite, or null on purpose.

A file may have been cut off, edited, or written by another version. `read_object` and `read_rows` refuse what is not
strict JSON, and check the fields that their caller reads against a dataclass; further fields are not looked at.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, cast

from poise.errors import PoiseError, first_line
from poise.runtime.settings import finite_or_raise, hints, problem, shown

Json = dict[str, Any]

_LARGEST_FILE = 512 * 2**20  # bytes of a JSON file that is still read: a study's page-pool.json is tens of megabytes


def parse_json(text: str | bytes, **options: Any) -> Any:
    """As `json.loads`, whose options it takes. Every trouble with the text is a ValueError, deep nesting included."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_object(path: Path, kind: type | None = None, *, strict: bool = True) -> Json:
    """The object in a JSON file. Raises PoiseError, one line, for a file that cannot be read or holds none.

    kind: a dataclass that names the fields which must be there, with their types and ranges.
    strict: refuse NaN and infinities; other projects write them (`time_step_limit` of Mamba's config.json).
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise PoiseError(f"cannot read {path}: it is larger than such a file can be")
        found = parse_json(path.read_text(encoding="utf-8"), parse_constant=_refused if strict else None)
    except OSError as error:
        raise PoiseError(f"cannot read {path}: {error.strerror}") from None
    except PoiseError:
        raise
    except ValueError as error:
        raise PoiseError(f"cannot read {path}: it is not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise PoiseError(f"cannot read {path}: it holds no JSON object")
    return checked(found, kind, str(path)) if kind else found


def read_rows(path: Path, kind: type | None = None) -> Iterator[Json]:
    """Rows of a JSON-lines file that this project wrote, one at a time; the part of a last line is left out.

    kind: as `read_object` takes it, for every row. Raises PoiseError, one line with the row's number, for a row that
    is not what it should be, also for a part of a line that is not the last.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            try:
                row = parse_json(line.decode("utf-8"), parse_constant=_refused)
            except ValueError as error:
                if not whole:  # a killed process left it
                    return
                raise PoiseError(f"{path}:{number}: not JSON: {first_line(error)}") from None
            if not isinstance(row, dict):
                raise PoiseError(f"{path}:{number}: not a JSON object")
            yield checked(row, kind, f"{path}:{number}") if kind else row


def checked(saved: Any, kind: type, what: str) -> Json:
    """`saved` as it is, if it has the fields of the dataclass `kind`, each of its type and in its range.

    A field with a default may be missing; fields that `kind` does not name are not looked at. what: the object, for
    the message. Raises PoiseError for a field that is missing or wrong.
    """
    if not isinstance(saved, Mapping):
        raise PoiseError(f"{what} must be an object, got {shown(saved)}")
    types = hints(kind)
    for field in fields(cast(Any, kind)):
        if field.name in saved:
            if wrong := problem(saved[field.name], types[field.name]):
                raise PoiseError(f"{what}: {field.name} must be {wrong}, got {shown(saved[field.name])}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise PoiseError(f"{what} lacks {field.name!r}; it is damaged, or of another version")
    return cast(Json, saved)


def as_text(value: Any, what: str, indent: int | None = None) -> str:
    """`value` as strict JSON. Raises PoiseError, naming the field, for a number in it that is not finite."""
    return json.dumps(finite_or_raise(value, what), indent=indent, allow_nan=False)


def as_lines(rows: Iterable[Json], what: str) -> Iterator[str]:
    """Rows as strict JSON lines, one at a time; raises as `as_text` does."""
    for number, row in enumerate(rows, 1):
        yield as_text(row, f"{what}, row {number}") + "\n"


def undefined_as_none(value: Any) -> Any:
    """A statistic, or a list or dict of them, for JSON: None where it is undefined (NaN), as the std of one value is.

    Only for statistics that may be undefined: a NaN anywhere else is a fault, which writing refuses.

    >>> undefined_as_none([0.5, math.nan])
    [0.5, None]
    """
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: undefined_as_none(one) for key, one in value.items()}
    return [undefined_as_none(one) for one in value] if isinstance(value, (list, tuple)) else value


def mend_last_line(path: Path) -> None:
    """Cut off the part of a line that a killed process left at a file's end, so that rows can be appended."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        tail, start = b"", end
        while start and b"\n" not in tail:
            start = max(start - 65536, 0)
            file.seek(start)
            tail = file.read(end - start)
        file.truncate(start + tail.rfind(b"\n") + 1)


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
