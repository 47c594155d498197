"""Rows on their way from a file to what they mean: every one is used, left out with its reason, or refused by line."""

import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from poise.data.files import RawRow, as_object, num_rows, raw_rows
from poise.data.in_memory import called
from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.runtime.folders import write_file_atomic
from poise.runtime.progress import console, shown_if_long

Row = TypeVar("Row")
OnBadRow = Literal["error", "skip"]
# Raises ValueError for a prompt with answers that a model cannot be given, such as turns that its template refuses.
Check = Callable[[Prompt, Sequence[str]], None]

# Texts that are scored at a time: the tokens of all texts of a file would need many times the memory of the texts.
TEXTS_PER_PART = 1024
_BAD_ROWS_IN_MEMORY = 1 << 20  # characters
# Columns of which a chat template or a processor would make a part of the prompt.
_NOT_SHOWN = (
    "tools", "functions", "documents", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios",
)  # fmt: skip
# Columns that are the prompt in some public forms, and beside a prompt may be a part of it that is left out.
_BESIDE_PROMPT = ("context", "history", "input")
_AS_TEXT_NOTHING = ("[]", "{}", "null", "None")
_SHORT = 100  # characters at the beginning of a file of bad rows


class BadRows:
    """Refused rows, to be set aside: in memory while they are few, else in a file that the system deletes.

    A file of any size can be read in constant memory, however many of its rows are bad.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_BAD_ROWS_IN_MEMORY, "w+", encoding="utf-8")  # noqa: SIM115
        self._count = 0

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        yield from map(json.loads, self._file)
        self._file.seek(0, os.SEEK_END)

    def __del__(self) -> None:
        self._file.close()


@dataclass
class Understood:
    """What was understood of a file: how many rows, of which form, and how each ended.

    used + ties + repeats + refused is the number of rows read so far.
    forms: rows by form.   notes: what was assumed of rows that say it only implicitly: (rows, an example).
    bad: the refused rows, for the file beside the data.   silent: nothing is printed or written.
    in_memory: the rows are a program's own, which messages name as the program does.
    can_skip: whoever reads can be told to leave bad rows out, which messages say.
    bar: reading shows one, where it takes long: for readers that read all rows before anything else is done.
    """

    path: str
    used: int = 0
    ties: int = 0
    repeats: int = 0
    refused: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    bad: BadRows = field(default_factory=BadRows)
    silent: bool = False
    in_memory: bool = False
    can_skip: bool = True
    bar: bool = False

    def __post_init__(self) -> None:
        self.in_memory |= called(self.path) != self.path

    def place(self, number: int) -> str:
        """A row as messages name it: `pairs.jsonl:3`, or `train_dataset, row 3` of a program's own rows."""
        return f"{called(self.path)}{', row ' if self.in_memory else ':'}{number}"

    @property
    def hint(self) -> str:
        """How bad rows are left out, for the end of a message."""
        if not self.can_skip:
            return ""
        if not self.in_memory:
            return " (--on-bad-row skip sets bad rows aside)"
        return ' (args.on_bad_row="skip" leaves bad rows out)' if called(self.path) != self.path else ""

    @property
    def num_rows(self) -> int:
        return self.used + self.ties + self.repeats + self.refused

    def note(self, what: str, example: str) -> None:
        """Count an assumption; the first row's example is kept."""
        count, first = self.notes.get(what, (0, example))
        self.notes[what] = (count + 1, first)

    def say(self) -> None:
        """Print the assumptions, once each with an example, and what was left out."""
        for what, (count, example) in self.notes.items():
            self._print(f"{count} rows {what}, e.g. {example}")
        if self.ties or self.repeats:
            self._print(f"{self.ties} rows in which nobody preferred either and {self.repeats} repeated ones left out")

    def set_aside(self) -> None:
        """Write the refused rows, with their reasons, to FILE.bad.jsonl, and say so."""
        if not self.refused:
            return
        path = Path(self.path)
        beside = path if path.is_file() and not self.path.startswith(("/dev/", "/proc/")) else Path(path.name)
        aside = beside.with_suffix(".bad.jsonl")
        _refuse_other_rows(aside)
        with write_file_atomic(aside) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.bad)
            file.flush()
            os.fsync(file.fileno())
        where = f"set aside in {aside}"
        if self.in_memory:  # the program's own rows: the file may be gone soon
            first = next(iter(self.bad))
            where = f"left out, e.g. row {first['line']}: {first['reason']}"
        self._print(f"{self.refused} bad rows of {self.num_rows} {where}")

    def _print(self, text: str) -> None:
        console.print(f"{called(self.path)}: {text}", markup=False)


def _refuse_other_rows(path: Path) -> None:
    """Raise PoiseError if a file of bad rows would take the place of a file that is none."""
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = file.read(_SHORT)
            ours = not first or (first.startswith('{"line": ') and '"reason": ' in first)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise PoiseError(f"bad rows are set aside in {path}, and that holds something else; move it")


def parsed_rows(
    understood: Understood,
    parse: Callable[[dict[str, Any]], Row],
    on_bad_row: OnBadRow,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> Iterator[tuple[int, Row]]:
    """(line, parsed row) of every good row, as the file is read.

    A bad row raises PoiseError with file:line and the reason; with on_bad_row="skip" it is counted as refused.
    rows: of the file, if they have been read already.
    """
    source = raw_rows(understood.path) if rows is None else rows
    # The bar has no name here, so that it ends with the loop and not with the traceback.
    for number, raw in _with_bar(understood.path, source) if understood.bar else source:
        try:
            given = as_object(raw)
            row = parse(given)
        except (ValueError, TypeError, OverflowError, RecursionError, AttributeError, KeyError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"cannot be read ({type(error).__name__})"
            if on_bad_row == "error":
                raise PoiseError(f"{understood.place(number)}: {reason}{understood.hint}") from None
            understood.refused += 1
            understood.bad.append({"line": number, "reason": reason, "row": str(raw)})
        else:
            for name in _NOT_SHOWN + (_BESIDE_PROMPT if given.get("prompt") else ()):
                said = given.get(name)
                if said and said not in (*_AS_TEXT_NOTHING, given.get("prompt")) and not _is_history(name, said):
                    understood.note(f"have {name!r} beside the text, which no model is shown", f"line {number}")
            yield number, row


def _with_bar(path: str, rows: Iterable[tuple[int, RawRow]]) -> Iterator[tuple[int, RawRow]]:
    return shown_if_long(f"reading {Path(path).name}", rows, lambda: num_rows(path), lambda row: row[0])


def _is_history(name: str, value: Any) -> bool:
    """Earlier turns, which are read."""
    return name == "history" and isinstance(value, list)


def read_rows(path: str | Path, parse: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """Every row, parsed. A bad one raises PoiseError, as `parsed_rows` says; so does a file without rows."""
    understood = Understood(str(path), can_skip=False, bar=True)
    rows = []
    for _, row in parsed_rows(understood, parse, "error"):
        understood.used += 1
        rows.append(row)
    finish(understood)
    return rows


def in_parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows, the last one of what is left, each read only when it is asked for.

    >>> list(in_parts("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part


def finish(understood: Understood) -> None:
    """Say what was left out and assumed; PoiseError if no row is used."""
    if not understood.silent:
        understood.set_aside()
        understood.say()
    if not understood.used:
        raise PoiseError(f"{called(understood.path)} has no usable row")


def short(value: Any, length: int = 60) -> str:
    """A value as a message shows it.

    >>> short("a" * 9, 5)
    "'aaa…"
    """
    text = value if isinstance(value, str) else json.dumps(value)
    shown = repr(text[: length + 2])
    return shown if len(shown) <= length and len(text) <= length + 2 else shown[: length - 1] + "…"
