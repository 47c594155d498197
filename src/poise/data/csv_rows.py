"""CSV and TSV as rows."""

import csv
import io
import itertools
import re
import sys
from pathlib import Path

from poise.data.raw import Numbered, Unreadable, not_utf8
from poise.errors import PoiseError

_SEPARATORS = ",;\t|"
_NAMES = {"prompt", "chosen", "rejected", "completion", "messages"}


def csv_rows(file: io.TextIOWrapper, path: Path) -> Numbered:
    """Rows of a table with a header. A row's number is that of the line on which it begins.

    Excel's first line `sep=;` names the separator. If the header has a space after each separator, the rows have too.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    before, first = 0, file.readline()
    said = re.fullmatch(r'"?sep=(.)"?\s*', first)
    while first and (not first.strip() or (said and not before)):
        before, first = before + 1, file.readline()
    separator = said[1] if said else _separator(first)
    spaced = first.count(separator) == first.count(f"{separator} ") > 0
    lines = itertools.chain([first], file)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=spaced)
    header = [name.strip() for name in next(reader, [])]
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise PoiseError(f"{path}:{before + 1}: the header names {sorted(twice)[0]!r} twice")
    while True:
        start = before + reader.line_num + 1
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
            yield start, Unreadable(not_utf8(text, at), text)
        elif len(cells) != len(header):
            yield start, Unreadable(f"{len(cells)} cells, and the header has {len(header)}", text)
        else:
            yield start, dict(zip(header, cells, strict=True))


def looks_like_header(line: str) -> bool:
    """Does a line name columns that Poise reads?"""
    cells = {cell.strip().strip('"').lower() for cell in line.split(_separator(line))}
    return len(cells) > 1 and bool(cells & _NAMES)


def _separator(header: str) -> str:
    return max(_SEPARATORS, key=header.count)
