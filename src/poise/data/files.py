"""Files, folders and hub data sets as rows, one at a time, each with its line number. No row is interpreted here.

The content decides how a file is read, not its name: JSON lines, a JSON array, Parquet, CSV; plain or compressed with
gzip, bzip2, xz or zstd; UTF-8, or UTF-16 and UTF-32 with a byte order mark. FIFOs and /dev/stdin are read as they come.
"""

import csv
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from poise.errors import PoiseError, first_line


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be taken apart: why, and its text."""

    reason: str
    text: str

    def __str__(self) -> str:
        return self.text


RawRow = str | dict[str, Any] | Unreadable
Numbered = Iterator[tuple[int, RawRow]]

_COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = {".gz", ".bz2", ".xz", ".zst"}
# UTF-32 comes first: its mark begins with that of UTF-16.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"),
)  # fmt: skip
_PARQUET, _ZIP = b"PAR1", b"PK\x03\x04"
_ROWS_AT_ONCE = 1024  # of Parquet and Arrow
_PARQUET_BUFFER = 1 << 20  # bytes of a column
_CHUNK = 1 << 16
_MOST_DIGITS = 4000  # Python refuses to read longer integers


def raw_rows(path: str | Path) -> Numbered:
    """(line number in the file, JSON text or ready row); blank lines are passed over.

    Rows of files without lines (Parquet, folders, the hub) are numbered from 1. A row that cannot be taken apart comes
    as `Unreadable`; a file that cannot be read on is a PoiseError.
    """
    path = Path(path)
    try:
        if path.is_dir():
            yield from enumerate(map(_nan_as_missing, _saved_data_set(path)), 1)
        elif is_hub_id(path):
            yield from enumerate(map(_nan_as_missing, _hub_data_set(str(path))), 1)
        else:
            with path.open("rb") as file:
                yield from _rows_of(file, path)
    except FileNotFoundError:
        raise PoiseError(f"no such file: {path}") from None
    except PoiseError:
        raise
    except Exception as error:  # noqa: BLE001  the one boundary of ten decoders, each with errors of its own
        raise PoiseError(f"cannot read {path}: {first_line(error)}") from None


def is_hub_id(path: Path) -> bool:
    """Is this no file, and of the form OWNER/NAME?"""
    return not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and not path.suffix


def can_be_read_twice(path: str | Path) -> bool:
    """Is this a file or folder, not a FIFO, a terminal or the hub?"""
    path = Path(path)
    return path.is_dir() or (path.is_file() and not str(path).startswith(("/dev/", "/proc/")))


def as_object(raw: RawRow) -> dict[str, Any]:
    """A raw row as a mapping; ValueError says why it is none."""
    if isinstance(raw, dict):
        return raw
    if isinstance(raw, Unreadable):
        raise ValueError(raw.reason)
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        raise ValueError(_not_utf8(raw, error.start)) from None
    row = parsed_json(raw)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    return row


def parsed_json(text: str) -> Any:
    """The value of a JSON text; ValueError says what is wrong with it, also if it is nested too deeply."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not read: JSON nested too deeply") from None
    except ValueError:  # an integer too long for Python; as a number it may still be a column that nobody reads
        return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _not_utf8(text: str, at: int) -> str:
    return f"not UTF-8: byte 0x{ord(text[at]) & 0xFF:02x} at column {at + 1}; save the file as UTF-8"


def _nan_as_missing(row: dict[str, Any]) -> dict[str, Any]:
    """Columnar formats write NaN where a number is missing, as pandas does."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


# ---- one open file ----


def _rows_of(file: Any, path: Path) -> Numbered:
    """Rows of a buffered binary file, by its first bytes."""
    head = _peek(file)
    if head.startswith(_PARQUET):
        if not file.seekable():
            file = io.BytesIO(file.read())
        yield from enumerate(map(_nan_as_missing, _parquet(file)), 1)
        return
    if head.startswith(_ZIP):
        raise PoiseError(f"cannot read {path}: a zip archive; unpack it, or save the table as CSV")
    for magic, name in _COMPRESSION.items():
        if head.startswith(magic):
            with io.BufferedReader(_decompressed(file, name)) as inside:
                yield from _rows_of(inside, path)
            return
    suffix = _inner_suffix(path)
    if suffix == ".parquet":
        raise PoiseError(f"cannot read {path}: it is not a Parquet file")
    encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")
    # Bytes that are not UTF-8 become lone surrogates, so that their rows can be named by line.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    if suffix in (".csv", ".tsv"):
        with io.TextIOWrapper(file, encoding, errors, newline="") as text:
            yield from _csv(text, path)
    else:
        with io.TextIOWrapper(file, encoding, errors) as text:
            yield from _json(text, path, suffix)


def _peek(file: io.BufferedReader) -> bytes:
    """The first bytes of a file that nobody has read yet; a FIFO gives them once there are any."""
    return file.peek(8)[:8]


def _inner_suffix(path: Path) -> str:
    """`.csv` of `x.csv` and of `x.csv.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED_NAMES else suffix


def _decompressed(file: IO[bytes], name: str) -> Any:
    if name == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=file)
    if name == "bz2":
        import bz2

        return bz2.BZ2File(file)
    if name == "xz":
        import lzma

        return lzma.LZMAFile(file)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), name)


def _parquet(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    # Without buffers of whole columns: a row group may be the whole file.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    for batch in table.iter_batches(_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _saved_data_set(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder saved by `datasets`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise PoiseError(f"{folder} is a folder that `datasets` did not save; name a file") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise PoiseError(
                f"{folder} has the splits {', '.join(loaded)} and no `train`; give the folder of one split"
            )
        loaded = loaded["train"]
    yield from loaded


def _hub_data_set(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    from poise.runtime.quiet import quiet_loading

    with quiet_loading():
        try:
            loaded = datasets.load_dataset(name, split="train")
        except Exception as error:  # noqa: BLE001  the hub client raises a dozen kinds
            raise PoiseError(f"no such file, and no data set of the hub: {name} ({type(error).__name__})") from None
    yield from loaded


# ---- CSV ----


def _csv(file: io.TextIOWrapper, path: Path) -> Numbered:
    """Rows of a table with a header. A row's number is that of the line on which it begins."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    first = file.readline()
    separator = max(",;\t", key=first.count)
    reader = csv.reader(itertools.chain([first], file), delimiter=separator, strict=True)
    header = [name.strip() for name in next(reader, [])]
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise PoiseError(f"{path}:1: the header names {sorted(twice)[0]!r} twice")
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise PoiseError(f"{path}:{start}: a quote that is opened here is never closed") from None
            yield start, Unreadable(f"not CSV: {error}", "")
            continue
        if not cells:
            continue
        text = separator.join(cells)
        at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if at is not None and not text.isascii():
            yield start, Unreadable(_not_utf8(text, at), text)
        elif len(cells) != len(header):
            yield start, Unreadable(f"{len(cells)} cells, and the header has {len(header)}", text)
        else:
            yield start, dict(zip(header, cells, strict=True))


# ---- JSON ----


def _json(file: Iterable[str], path: Path, suffix: str) -> Numbered:
    """JSON lines; or one JSON array; or, in a .json file, objects written over several lines."""
    lines = iter(file)
    blank, first = 0, next(lines, "")
    while first and not first.strip():
        blank, first = blank + 1, next(lines, "")
    seen = [first]
    several_lines = suffix == ".json" and not _is_whole(first)
    if first.lstrip().startswith("["):
        several_lines = True
        if _is_whole(first):  # the array is complete: the file, or the first of its lines
            seen += _up_to_text(lines)
            several_lines = not seen[-1].strip() or len(seen) == 1
    rest = itertools.chain(seen, lines)
    if several_lines:
        yield from _Documents(rest, path, blank + 1).rows()
    else:
        yield from ((i, line.rstrip("\n")) for i, line in enumerate(rest, blank + 1) if line.strip())


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
        self.decoder = json.JSONDecoder(parse_int=_integer)

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
                self._fail(_not_utf8(part, error.start))
            kept.append(part)
            count += len(part)
            if count >= size:
                break
        self.text = "".join(kept)
        return count > 0

    def _fail(self, reason: str) -> NoReturn:
        raise PoiseError(f"{self.path}:{self.line}: {reason}")
