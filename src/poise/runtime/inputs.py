"""What a run was begun with: digests of its input files, so that it never goes on with others.

RUN/inputs.json   per input (prompts, model, …) and file: SHA-256, and the size and times it had; no paths
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poise.errors import PoiseError
from poise.runtime.records import read_object

Inputs = Mapping[str, Sequence[Path]]  # files and model folders, by the name that the user knows them by

FILE = "inputs.json"
# What of a folder decides what a model says, or which rows a data set has.
_SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".jinja", ".arrow", ".parquet"}


def fingerprints(inputs: Inputs, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """{input: {file: {"sha256", "stat"}}} of the inputs that exist.

    known: earlier fingerprints. A file with the size, times and inode of then is not read again: a file of many
    gigabytes costs time.
    """
    found: dict[str, Any] = {}
    for name, paths in inputs.items():
        before = (known or {}).get(name)
        files = {label: file for number, path in enumerate(paths) for label, file in _files(number, path)}
        old = before if isinstance(before, dict) else {}
        found[name] = {label: _fingerprint(file, old.get(label)) for label, file in files.items()}
    return found


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Inputs whose content is another than before; inputs that only one side has are not compared."""
    return [name for name, files in now.items() if name in before and _digests(before[name]) != _digests(files)]


def edited(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Inputs of which a file that both sides have holds something else than before."""
    pairs = [(name, _digests(before[name]), _digests(files)) for name, files in now.items() if name in before]
    return [name for name, old, new in pairs if any(old[label] != new[label] for label in old.keys() & new.keys())]


def unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Settings whose inputs are there and hold what they held, wherever they lie now."""
    named = {setting: [name for name in {**before, **now} if _setting(name) == setting] for setting in settings_of(now)}
    return {
        setting
        for setting, names in named.items()
        if all(_digests(before.get(name)) and _digests(before.get(name)) == _digests(now.get(name)) for name in names)
    }


def settings_of(found: Mapping[str, Any]) -> set[str]:
    """The settings, by their names in Python, that name these inputs.

    >>> sorted(settings_of({"--eval-prompts": {}, "--rewards 1": {}, "--rewards 2": {}}))
    ['eval_prompts', 'rewards']
    """
    return {_setting(name) for name in found}


def read_fingerprints(path: Path) -> dict[str, Any] | None:
    """What inputs.json holds; None if there is none. Raises PoiseError for a damaged one."""
    if not path.exists():
        return None
    try:
        return read_object(path)
    except PoiseError as error:
        raise PoiseError(f"{error}; choose another --output, or delete it to go on unchecked") from None


def _files(number: int, path: Path) -> list[tuple[str, Path]]:
    """(label, file) of an input: of a folder its model files, by their names; of a file itself, by its position."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        inside = ("poise/*.safetensors", "adapters/*/*.safetensors")
        if (path / "dataset_dict.json").exists():  # `datasets` keeps each split in a folder of its own
            inside = ("*/*.arrow", "*/*.json")
        files += sorted(file for pattern in inside for file in path.glob(pattern))
        return [(f"{number}/{file.relative_to(path).as_posix()}", file) for file in files]
    return [(str(number), path)] if path.is_file() else []


def sizes_and_times(path: str | Path) -> list[tuple[str, int, int]]:
    """Of a file, or of those of a folder that decide what is in it: label, size, time of the last change in ns.

    Raises OSError if there is no such file.
    """
    place = Path(path)
    found = _files(0, place) if place.is_dir() else [("0", place)]
    return [(label, about.st_size, about.st_mtime_ns) for label, about in ((name, file.stat()) for name, file in found)]


def _fingerprint(file: Path, known: Any) -> dict[str, Any]:
    about = file.stat()
    stat = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    if isinstance(known, dict) and known.get("stat") == stat and isinstance(known.get("sha256"), str):
        return {"sha256": known["sha256"], "stat": stat}
    with file.open("rb") as content:
        return {"sha256": hashlib.file_digest(content, "sha256").hexdigest(), "stat": stat}


def _setting(name: str) -> str:
    """The setting of an input: several of one setting are counted."""
    return name.removeprefix("--").split(" ")[0].replace("-", "_")


def _digests(files: Any) -> dict[str, Any]:
    if not isinstance(files, dict):
        return {}
    return {label: about.get("sha256") if isinstance(about, dict) else None for label, about in files.items()}
