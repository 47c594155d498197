"""The file of `poise score`, written in parts: what a stopped command has done is kept, and the file appears whole.

FILE.partial        rows so far, as JSON lines; the process that writes holds a lock on it
FILE.partial.json   what they were made of
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from poise.data.files import steady_pyarrow
from poise.data.rows import in_parts
from poise.errors import PoiseError
from poise.models.score_columns import PER_HEAD
from poise.runtime.folders import refuse_device, write_file_atomic
from poise.runtime.records import read_object, read_rows
from poise.runtime.run_folder import Json, write_json

_ROWS_PER_GROUP = 8192  # of Parquet
_ROWS_AT_ONCE = 1024  # as Python objects


class ScoreFile:
    """Rows on their way into `path`; the suffix decides whether they end as JSON lines or as Parquet."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.record = path.with_name(f"{path.name}.partial.json")

    @contextlib.contextmanager
    def open(self, settings: Json | None, part: int) -> Iterator[tuple[int, IO[bytes]]]:
        """Yield (number of rows that a stopped command left, the file to append to).

        settings: what the rows are made of; rows of other settings are not kept, nor are any for None.
        part: rows are kept in multiples of it. PoiseError if another process writes the file, and for rows in
        FILE.partial that no record says to be ours.
        """
        refuse_device(self.path)
        with self.partial.open("ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise PoiseError(f"another process is writing {self.path}; choose another --output") from None
            if not self.record.exists() and os.fstat(file.fileno()).st_size:
                raise PoiseError(
                    f"{self.partial} was not begun by `poise score`; delete it, or choose another --output"
                )
            done = _whole_parts(file, part) if settings is not None and self._is_of(settings) else 0
            if not done:
                file.truncate(0)
                self.record.unlink(missing_ok=True)
                if settings is not None:
                    write_json(self.record, settings)
            try:
                yield done, file
            except BaseException:
                if settings is None:  # nothing can go on after these rows
                    self.partial.unlink(missing_ok=True)
                raise
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Make `path` of all rows."""
        if self.path.suffix.lower() == ".parquet":
            with write_file_atomic(self.path) as scratch:
                _write_parquet(scratch, self.partial)
            self.partial.unlink()
        else:
            self.partial.replace(self.path)
        self.record.unlink(missing_ok=True)

    def _is_of(self, settings: Json) -> bool:
        try:
            return read_object(self.record) == settings
        except PoiseError:
            return False


def append(file: IO[bytes], rows: Sequence[Json]) -> None:
    """Write rows, so that they are there if this process is killed."""
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    file.flush()


def _whole_parts(file: IO[bytes], part: int) -> int:
    """How many rows a stopped command left in whole parts; the rest of them is cut off."""
    whole = kept = end = 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        end += len(line)
        if number % part == 0 and line.endswith(b"\n"):
            whole, kept = number, end
    file.truncate(kept)
    return whole


def _write_parquet(path: Path, rows: Path) -> None:
    """Rows of a JSON-lines file as Parquet: a column per head (`mean_0`, …), a conversation as its JSON text."""
    steady_pyarrow()
    import pyarrow
    import pyarrow.parquet

    names = list(_flat(next(read_rows(rows))))
    schema = pyarrow.schema([(name, _TYPES.get(name, pyarrow.float64())) for name in names])
    # Rows as objects take many times the memory of their columns: a group is gathered as columns.
    parts = in_parts(map(_flat, read_rows(rows)), min(_ROWS_AT_ONCE, _ROWS_PER_GROUP))
    columns = (pyarrow.RecordBatch.from_pylist(part, schema) for part in parts)
    with path.open("wb") as file:
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for group in in_parts(columns, max(_ROWS_PER_GROUP // _ROWS_AT_ONCE, 1)):
                writer.write_table(pyarrow.Table.from_batches(group))
        file.flush()
        os.fsync(file.fileno())


_TYPES = {"prompt": "string", "completion": "string", "nominal_head": "int64"}


def _flat(row: Json) -> dict[str, Any]:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
    plain = {name: value for name, value in row.items() if name not in PER_HEAD}
    heads = {f"{name}_{k}": value for name in PER_HEAD for k, value in enumerate(row[name])}
    return {**plain, "prompt": prompt, **heads}
