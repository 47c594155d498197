"""Files, folders and hub data sets as rows, one at a time, each with its line number. No row is interpreted here.

The content decides how a file is read, not its name: JSON lines, a JSON array, Parquet, Arrow, CSV; plain or compressed
with gzip, bzip2, xz or zstd; UTF-8, or UTF-16 and UTF-32 with a byte order mark. FIFOs and /dev/stdin are read as they
come.
"""

import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from poise.data.class_labels import with_class_names
from poise.data.csv_rows import csv_rows
from poise.data.json_rows import json_rows
from poise.data.raw import Numbered, RawRow, Unreadable, as_object, parsed_json
from poise.errors import PoiseError, first_line

__all__ = [
    "Numbered", "RawRow", "Unreadable", "as_object", "can_be_read_twice", "is_hub_id", "no_such_file", "num_rows",
    "parsed_json", "raw_rows", "steady_pyarrow",
]  # fmt: skip

_COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = {".gz", ".bz2", ".xz", ".zst"}
# UTF-32 comes first: its mark begins with that of UTF-16.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"),
)  # fmt: skip
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
# What is no data, by its first bytes, and what to do.
_NO_DATA = {
    b"PK\x03\x04": "a zip archive; unpack it, or save the table as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save the table as CSV",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; `git lfs pull` fetches it",
    b"%PDF": "a PDF",
    b"<!DOCTYPE": "a web page", b"<!doctype": "a web page", b"<html": "a web page",
    b"ORC": "an ORC file; save it as Parquet",
    b"\x80\x04": "a pickle, which is never loaded; save it as JSON lines",
    b"\x80\x05": "a pickle, which is never loaded; save it as JSON lines",
}  # fmt: skip
# What `datasets` says of a data set whose parts have other names.
_OTHER_PARTS = re.compile("Unknown split|Config name is missing|Bad split")
_HEAD = 64  # bytes by which a file is recognized
_ROWS_AT_ONCE = 1024  # of Parquet and Arrow
_PARQUET_BUFFER = 1 << 20  # bytes of a column


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
        raise PoiseError(no_such_file(path)) from None
    except PoiseError:
        raise
    except Exception as error:  # noqa: BLE001  the one boundary of ten decoders, each with errors of its own
        raise PoiseError(f"cannot read {path}: {first_line(error)}") from None


def num_rows(path: str | Path) -> int | None:
    """The number of the last row of a file of JSON lines or Parquet, without reading rows; None of any other."""
    path = Path(path)
    if not can_be_read_twice(path) or path.is_dir():
        return None
    with path.open("rb") as file:
        head = _peek(file)
        if head.startswith(_PARQUET):
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(file).num_rows)
        if not head.lstrip().startswith(b"{"):
            return None
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))


def no_such_file(path: str | Path) -> str:
    """The message for a file that is not there."""
    return f"no such file: {path}" + (" (standard input is /dev/stdin)" if str(path) == "-" else "")


def is_hub_id(path: Path) -> bool:
    """Is this no file, and of the form OWNER/NAME?"""
    return not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and not path.suffix


def can_be_read_twice(path: str | Path) -> bool:
    """Is this a file or folder, not a FIFO, a terminal or the hub?"""
    path = Path(path)
    return path.is_dir() or (path.is_file() and not str(path).startswith(("/dev/", "/proc/")))


def _nan_as_missing(row: dict[str, Any]) -> dict[str, Any]:
    """Columnar formats write NaN where a number is missing, as pandas does."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


# ---- one open file ----


def _rows_of(file: Any, path: Path) -> Numbered:
    """Rows of a buffered binary file, by its first bytes."""
    head = _peek(file)
    if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        if not file.seekable():
            file = io.BytesIO(file.read())
        table = _parquet(file) if head.startswith(_PARQUET) else _arrow(file, head.startswith(_ARROW_FILE))
        yield from enumerate(map(_nan_as_missing, table), 1)
        return
    for magic, what in _NO_DATA.items():
        if head.startswith(magic):
            raise PoiseError(f"cannot read {path}: it is {what}")
    for magic, name in _COMPRESSION.items():
        if head.startswith(magic):
            with io.BufferedReader(_decompressed(file, name)) as inside:
                yield from _rows_of(inside, path)
            return
    suffix = _inner_suffix(path)
    if suffix == ".parquet":
        raise PoiseError(f"cannot read {path}: it is not a Parquet file")
    encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")
    if b"\0" in head and encoding == "utf-8":
        raise PoiseError(
            f"cannot read {path}: it holds zero bytes: no text, or UTF-16 without a byte order mark; save it as UTF-8"
        )
    # Bytes that are not UTF-8 become lone surrogates, so that their rows can be named by line.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    if suffix in (".csv", ".tsv"):
        with io.TextIOWrapper(file, encoding, errors, newline="") as text:
            yield from csv_rows(text, path)
    else:
        with io.TextIOWrapper(file, encoding, errors) as text:
            yield from json_rows(text, path, suffix)


def _peek(file: io.BufferedReader) -> bytes:
    """The first bytes of a file that nobody has read yet; a FIFO gives them once there are any."""
    return file.peek(_HEAD)[:_HEAD]


def _inner_suffix(path: Path) -> str:
    """`.csv` of `x.csv` and of `x.csv.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED_NAMES else suffix


def _decompressed(file: Any, name: str) -> Any:
    if name == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=file, mode="rb")
    if name == "bz2":
        import bz2

        return bz2.BZ2File(file)
    if name == "xz":
        import lzma

        return lzma.LZMAFile(file)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), name)


def steady_pyarrow() -> Any:
    """pyarrow with the system's allocator. Its own keeps what was freed: memory grew with the rows of a file."""
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    return pyarrow


def _parquet(file: Any) -> Iterator[dict[str, Any]]:
    steady_pyarrow()
    import pyarrow.parquet

    # Without buffers of whole columns: a row group may be the whole file.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    schema = table.schema_arrow
    _named_once(schema.names)
    for batch in table.iter_batches(_ROWS_AT_ONCE):
        yield from with_class_names(batch.to_pylist(), schema.metadata)


def _arrow(file: Any, is_file: bool) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow IPC file (Feather 2) or stream, which `datasets` keeps."""
    pyarrow = steady_pyarrow()
    table = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
    _named_once(table.schema.names)
    batches = (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else table
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            yield from with_class_names(batch.slice(start, _ROWS_AT_ONCE).to_pylist(), table.schema.metadata)


def _named_once(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"it has the column {next(name for name in names if names.count(name) > 1)!r} twice")


def refuse_unsaved(folder: Path) -> None:
    """Raise PoiseError for a folder without the files that `datasets` leaves, before it is imported."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise PoiseError(f"{folder} is a folder that `datasets` did not save; name a file")


def _saved_data_set(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder saved by `datasets`."""
    refuse_unsaved(folder)
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise PoiseError(f"{folder} is not whole, as `datasets` saved it: {first_line(error)}") from None
    except IndexError:  # what `datasets` makes of a data set without a shard
        raise PoiseError(f"{folder} has no row, or a split without one; give the folder of a split with rows") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise PoiseError(
                f"{folder} has the splits {', '.join(loaded)} and no `train`; give the folder of one split"
            )
        loaded = loaded["train"]
    yield from _plain_rows(loaded)


def _plain_rows(loaded: Any) -> Iterable[dict[str, Any]]:
    """Rows of a data set as Python's own values, in whatever format it was saved, with the names of its classes."""
    return with_class_names(loaded.with_format(None), loaded.features.arrow_schema.metadata)


def _hub_data_set(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    from poise.runtime.quiet import quiet_loading

    with quiet_loading():
        try:
            loaded = datasets.load_dataset(name, split="train")
        except Exception as error:  # noqa: BLE001  the hub client raises a dozen kinds
            if isinstance(error, ValueError) and _OTHER_PARTS.match(str(error)):
                raise PoiseError(
                    f"the hub's {name} has no plain `train` split ({' '.join(str(error).split())[:300]}); save the "
                    f"part that is meant, with `datasets`, and give the folder"
                ) from None
            raise PoiseError(f"no such file, and no data set of the hub: {name} ({type(error).__name__})") from None
    yield from _plain_rows(loaded)
