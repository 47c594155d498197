"""Run folders: what every study reads and writes, and how it survives being stopped.

RUN/config.yaml        the config, enough to repeat the run: `poise <command> --config RUN/config.yaml`
RUN/environment.json   versions, device, command
RUN/inputs.json        digests of the files that the run was begun with
RUN/metrics.jsonl      one line per step
RUN/results.json       written last, atomically: its presence means the run is complete
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import yaml

from poise.errors import PoiseError
from poise.runtime import inputs as run_inputs
from poise.runtime.config_files import load_config_file
from poise.runtime.display import say
from poise.runtime.folders import (
    MARK,
    is_leftover,
    lock,
    own,
    refuse_deleted,
    refuse_foreign,
    unlock,
    write_file_atomic,
    write_folder_atomic,
)
from poise.runtime.inputs import Inputs
from poise.runtime.records import Json, as_lines, as_text, mend_last_line, read_object, read_rows
from poise.runtime.run_kinds import command_of, made_by
from poise.runtime.settings import at_least, same_value

__all__ = ["Inputs", "Json", "Run", "load_config_file", "write_folder_atomic"]


@dataclasses.dataclass(frozen=True)
class _Step:
    """What every row has that is dropped when a run goes on from an earlier step; -1: before the first."""

    step: Annotated[int, at_least(-1)]


_OF_JOBS = {MARK, ".lock", "error.txt", "error.txt.part", "log.txt", "cost.json"}  # see jobs.py
# What a run, or a job of a study, writes before there is a checkpoint or a result.
_BEFORE_ANY_WORK = _OF_JOBS | {
    "config.yaml", "environment.json", run_inputs.FILE, "report.html", "metrics.jsonl", "samples.jsonl", "scale.json",
    "baselines.jsonl", "benchmarks.jsonl",
}  # fmt: skip


class Run:
    """One run folder. `Run.open` starts it, or finds it as it was left."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: Any,
        inputs: Callable[[], Inputs] | None = None,
    ) -> "Run":
        """Open `folder` for `config` (a dataclass), creating it if need be, and be the one process that writes in it.

        inputs: called for the files and model folders that the run reads; of a finished run, only where a setting that
        names one has changed. What an input holds counts, and not where it lies.
        Of the settings that its class names in GROWS a run may take more than it was begun with. A finished run then
        goes on.
        A folder in which a run of another config left neither results nor checkpoints is taken over.
        A setting that the folder's config.yaml lacks, being of an earlier version, had the default it has now.
        Raises PoiseError if the folder holds something else, a run of another config or with other inputs, or if
        another process writes in it: results never mix.
        """
        run = cls(Path(folder))
        run.check_config(config, inputs)
        if run.results is None or run.differs(config, inputs):  # a finished run keeps the record of what made it
            own(run.folder)
            if is_main_process():
                lock(run.folder)
                run.check_config(config, inputs)
                if run._is_bare:
                    run._begin_anew()
                record_inputs(run.folder, inputs)
                if run.differs(config, inputs):  # it is extended
                    (run.folder / "results.json").unlink(missing_ok=True)
            run.write_config(config)
        return run

    def check_config(self, config: Any, inputs: Callable[[], Inputs] | None = None) -> None:
        """Raise PoiseError if the folder holds work of a run of another config, or something else than a run.

        inputs: as of `open`. Without them, settings that name inputs are left to whoever knows what these hold.
        """
        self.check_command(config)
        if not (self.folder / "config.yaml").exists():
            refuse_foreign(self.folder)
            return
        changed = self.differs(config, inputs) if inputs else self.differs_beside_inputs(config)
        if changed and not self._is_bare and not self._extends(config, changed):
            raise PoiseError(
                f"{self.folder} holds a run of another config (differs in {', '.join(changed)}); "
                f"choose another --output or delete the folder"
            )

    def check_command(self, config: Any) -> None:
        """Raise PoiseError if a run of another command is in the folder."""
        made = made_by(self.folder) if self.folder.is_dir() else ""
        if made and made != command_of(config_dict(config)) and not self._is_bare:
            raise PoiseError(f"--output {self.folder} is a run of `poise {made}`; choose another folder")

    def refuse_edited(self, inputs: Callable[[], Inputs]) -> None:
        """Raise PoiseError if an input of a finished run holds something else now; one that is gone is not missed."""
        if not (before := self._inputs_before()):
            return
        try:
            now = run_inputs.fingerprints(inputs(), before)
        except PoiseError:
            return  # a model that is gone
        if edited := run_inputs.edited(before, now):
            raise PoiseError(
                f"{self.folder} is finished, and of its inputs {', '.join(edited)} changed since; choose another "
                f"--output, or bring the old files back"
            )

    def differs_beside_inputs(self, config: Any) -> list[str]:
        """Names of the settings in which the run differs, but for those that name inputs."""
        changed = self.differs(config)
        kept = run_inputs.settings_of(self._inputs_before()) if changed else ()
        return [name for name in changed if name not in kept]

    def differs(self, config: Any, inputs: Callable[[], Inputs] | None = None) -> list[str]:
        """Names of the settings in which the run in the folder differs from `config`; [] if there is no run.

        inputs: as of `open`. A setting that names one does not differ where this holds what it held.
        """
        path = self.folder / "config.yaml"
        if not path.exists():
            return []
        now = config_dict(config)
        added = {name: now[name] for name in getattr(config, "ADDED", {})}
        changed = _changed_fields(_defaults(config) | added | load_config_file(path), now)
        before = self._inputs_before() if changed and inputs else {}
        if inputs and run_inputs.settings_of(before) & {*changed}:
            same = run_inputs.unchanged(before, run_inputs.fingerprints(inputs(), before))
            changed = [name for name in changed if name not in same]
        return changed

    def _inputs_before(self) -> Json:
        return run_inputs.read_fingerprints(self.folder / run_inputs.FILE) or {}

    @property
    def _is_bare(self) -> bool:
        """Holds the folder only what a run writes before its first checkpoint?"""
        paths = [path for path in self.folder.iterdir() if not is_leftover(path.name)]
        return all(path.name in _BEFORE_ANY_WORK and path.is_file() for path in paths)

    def _extends(self, config: Any, changed: list[str]) -> bool:
        grows = getattr(config, "GROWS", ())
        before, now = load_config_file(self.folder / "config.yaml"), config_dict(config)
        return set(changed) <= set(grows) and all(_is_more(now[name], before.get(name)) for name in changed)

    def _begin_anew(self) -> None:
        """Delete what a run without a checkpoint left. The caller holds the lock."""
        for name in _BEFORE_ANY_WORK - _OF_JOBS:
            (self.folder / name).unlink(missing_ok=True)

    def write_config(self, config: Any) -> None:
        """Write config.yaml, unless it is there, and environment.json."""
        path = self.folder / "config.yaml"
        if not path.exists() or self.differs(config):
            write_atomic(path, yaml.safe_dump(config_dict(config), sort_keys=False))
        write_atomic(self.folder / "environment.json", json.dumps(environment(), indent=2))

    @property
    def results(self) -> Json | None:
        """The finished run's results, or None while it is not complete. PoiseError for a damaged file."""
        path = self.folder / "results.json"
        return read_object(path) if path.exists() else None

    def finished(self, kind: type) -> Json | None:
        """`results` with the fields of the dataclass `kind`; PoiseError if any is missing or wrong."""
        path = self.folder / "results.json"
        return read_object(path, kind) if path.exists() else None

    def finish(self, results: Json) -> Json:
        """Mark the run complete. Raises PoiseError if its folder was deleted since it was opened."""
        refuse_deleted(self.folder)
        write_json(self.folder / "results.json", results)
        unlock(self.folder)
        return results

    def log(self, **metrics: Any) -> None:
        """Append one line to metrics.jsonl."""
        append_jsonl(self.folder / "metrics.jsonl", [metrics])

    def metrics(self, kind: type | None = None) -> list[Json]:
        """Every logged line, oldest first; kind: the fields that each must have, as `read_rows` takes it."""
        path = self.folder / "metrics.jsonl"
        return list(read_rows(path, kind)) if path.exists() else []


@dataclasses.dataclass(frozen=True)
class _Environment:
    """environment.json, as far as cards read it."""

    versions: dict[str, str]


def versions_of(run: Run) -> dict[str, str]:
    """Versions of the packages that made a run; none if it has no record of them."""
    path = run.folder / "environment.json"
    return dict(read_object(path, _Environment)["versions"]) if path.exists() else {}


def config_dict(config: Any) -> Json:
    """A dataclass config as plain YAML/JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _defaults(config: Any) -> Json:
    """Settings of the config's class that have a default, with it, as plain values."""
    defaults = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    as_default = config_dict(dataclasses.replace(config, **defaults))
    return {name: as_default[name] for name in defaults}


def _changed_fields(old: Json, new: Json) -> list[str]:
    # Where a run lives is not what it computes: a moved folder is still the same run.
    return sorted(
        key for key in old.keys() | new.keys() if key != "output" and not same_value(old.get(key), new.get(key))
    )


def environment() -> Json:
    """Versions and machine, for the record; no paths of this machine."""
    versions = {}
    for package in ("poise-rlhf", "torch", "transformers", "peft", "accelerate", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = "cpu"
    if torch := sys.modules.get("torch"):
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
        )
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "versions": versions,
        "command": _without_paths(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """A command line with the last part only of each absolute or home path; config.yaml keeps the settings."""
    program = Path(arguments[0]).name
    plain = re.compile(r"(?<![\w.:~/])(?:~[^/\s]*)?/[^\s,=]*/")
    return ["poise" if program == "__main__.py" else program, *(plain.sub("", word) for word in arguments[1:])]


def record_inputs(folder: Path, inputs: Callable[[], Inputs] | None) -> None:
    """Write inputs.json, or raise PoiseError if the run was begun with other inputs."""
    if inputs is None:
        return
    path = folder / run_inputs.FILE
    before = run_inputs.read_fingerprints(path)
    now = run_inputs.fingerprints(inputs(), before)
    if before is None and (folder / "config.yaml").exists():
        print(
            f"{folder} was begun by a version that kept no digests of its inputs; it goes on with the present ones",
            file=sys.stderr,
        )
    if before and (changed := run_inputs.changed(before, now)):
        raise PoiseError(
            f"{folder} was begun with other inputs: {', '.join(changed)} changed since; "
            f"choose another --output, or bring the old files back"
        )
    if now != before:
        write_json(path, {**(before or {}), **now})


def is_main_process() -> bool:
    """Is this the process that writes, of those that `accelerate launch` or `torchrun` started?"""
    return os.environ.get("RANK", "0") == "0"


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Write a file whole or not at all, even if killed half-way. text: also in parts."""
    with write_file_atomic(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Atomic JSON. Raises PoiseError for NaN and infinities: a statistic that may be undefined is None on purpose."""
    write_atomic(path, as_text(value, str(path), indent=1))


def append_jsonl(path: Path, rows: list[Json]) -> None:
    """Append rows to a JSON-lines file. Raises PoiseError, and nothing is appended, for NaN and infinities."""
    text = "".join(as_lines(rows, str(path)))
    mend_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_jsonl(path: Path, rows: Iterable[Json]) -> None:
    """Atomic JSON lines, written as the rows come. Raises PoiseError for NaN and infinities."""
    write_atomic(path, as_lines(rows, str(path)))


def _is_more(now: Any, before: Any) -> bool:
    """Is a number larger, or a list the same one and longer?"""
    if isinstance(now, list):
        return isinstance(before, list) and now[: len(before)] == before and len(now) > len(before)
    return type(before) in (int, float) and bool(now > before)


def keep_rows_before(path: Path, step: int, first: int | None = None) -> None:
    """Drop rows logged at or after `step`: the part of a killed run that its last checkpoint does not know.

    first: of a file with rows of every step, the number of its first; where rows are gone, a line says so.
    Raises PoiseError for rows that are out of order, as a run never leaves them.
    """
    kept = [row for row in _in_order(path) if row["step"] < step] if path.exists() else []
    if path.exists():
        write_jsonl(path, kept)
    if first is not None and (gone := step - first - len({row["step"] for row in kept})) > 0:
        say(
            f"warning: {path} lacks {gone} of the {step - first} steps that were made, and so will the page; bring the "
            f"file back to have them"
        )


def _in_order(path: Path) -> Iterator[Json]:
    before = -1
    for number, row in enumerate(read_rows(path, _Step), 1):
        if row["step"] < before:
            raise PoiseError(
                f"{path}:{number}: a row of step {row['step']} after one of step {before}; bring the file back as the "
                f"run left it, or delete the folder to begin anew"
            )
        before = row["step"]
        yield row
