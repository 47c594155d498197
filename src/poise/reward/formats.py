"""What the files of runs about reward models hold, as their readers need it. Nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from poise.errors import PoiseError
from poise.models.formats import ENSEMBLE_FILE, checkpoint_folder
from poise.models.run_heads import adapters_of
from poise.runtime.folders import is_leftover
from poise.runtime.records import read_object
from poise.runtime.settings import Count, NotNegative, WholeNumber


@dataclass(frozen=True)
class Learning:
    """What results.json of `poise train-reward` says of stage 2."""

    std_collapsed: bool = False
    stage2_history: list[dict[str, float | None]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trained(Learning):
    """results.json of `poise train-reward`."""

    num_preferences: Count
    num_train: WholeNumber
    num_validation: Count
    models: dict[str, dict[str, Any]]
    num_truncated: WholeNumber = 0
    split: dict[str, int | str] | None = None  # versions that split pairs at random wrote none
    validator: dict[str, Any] | None = None  # the same of it; absent without one


@dataclass(frozen=True)
class Evaluated:
    """reward-N.json of `poise evaluate-reward`: one reward model's results."""

    reward: str
    num_heads: Count
    kind: Literal["gaussian", "point"]
    reward_scale: NotNegative
    num_samples: Count
    num_truncated: WholeNumber
    pairs: dict[str, Any] | None = None
    sets: dict[str, Any] | None = None
    ood: dict[str, Any] | None = None
    ood_auroc: dict[str, Any] | None = None
    learning: dict[str, Any] | None = None


# ---- folders that may be written again ----

_LONGEST_ROW = 1 << 24  # bytes of a row of scores that are looked at
_SCORED = {"prompt", "completion", "reward", "mean_0"}  # columns of scores in Parquet
EXPORT_MARK = "poise_export"  # key of config.json by which an earlier export is known
WRITTEN_BY = "Written by Poise"  # in the card of each


def check_export(target: Path, source: Path) -> None:
    """Raise PoiseError unless `target` is missing, empty, or an earlier export. source: the reward model."""
    if not target.exists():
        return
    if not target.is_dir():
        raise PoiseError(f"--output {target} is a file; name a folder")
    if target.resolve() == source.resolve():
        raise PoiseError(f"--output {target} is the reward model itself; choose another folder")
    try:
        # A tool that trains an export on keeps the mark in config.json; the card is written by exports alone.
        card = (target / "README.md").read_text(encoding="utf-8")
        ours = EXPORT_MARK in read_object(target / "config.json", strict=False) and WRITTEN_BY in card
    except (PoiseError, OSError, UnicodeDecodeError):
        ours = False
    if any(target.iterdir()) and not ours:
        raise PoiseError(f"--output {target} exists and is no earlier export; choose another folder or delete it")


def check_exported(reward: str, head: int | None, *, adapter: bool) -> None:
    """Raise PoiseError for a reward model that has no heads to export, not the `head`, or no adapters to write."""
    if (Path(reward) / ENSEMBLE_FILE).exists():
        raise PoiseError(f"{reward} is an ensemble, whose members have features of their own; export one of them")
    folder = Path(checkpoint_folder(reward))
    if not (folder / "config.json").exists():
        return  # a name on the hub
    block = read_object(folder / "config.json", strict=False).get("poise")
    if block is None:
        raise PoiseError(f"{reward} has no `poise` block in its config.json: there are no heads to export")
    heads = block.get("num_heads") if isinstance(block, dict) else None
    if head is not None and isinstance(heads, int) and head >= heads:
        raise PoiseError(f"--head {head}: the reward model has heads 0 to {heads - 1}")
    if isinstance(block, dict) and block.get("adapters"):
        return  # each head has its own, which are exported in another way
    if adapter and not (adapters_of(folder.resolve()) / "adapter_config.json").exists():
        raise PoiseError(f"{reward} has no adapters beside it: train it with `--trunk lora`")


def check_ensemble(target: Path) -> None:
    """Raise PoiseError unless `target` is no folder yet, an empty one, or an earlier ensemble."""
    names = {path.name for path in target.iterdir() if not is_leftover(path.name)} if target.is_dir() else set()
    ours = not target.exists() or (target.is_dir() and names <= {ENSEMBLE_FILE})
    if ours and names and (target / ENSEMBLE_FILE).stat().st_size:
        try:
            ours = "members" in read_object(target / ENSEMBLE_FILE, strict=False)
        except PoiseError:
            ours = False
    if not ours:
        raise PoiseError(f"--output {target} exists and is no earlier ensemble; choose another folder or delete it")


def check_scores(target: Path) -> None:
    """Raise PoiseError unless `target` is no file yet, an empty one, or scores that `poise score` wrote earlier."""
    if target.is_dir():
        raise PoiseError(f"--output {target} is a folder; name a file")
    if not target.is_file() or not target.stat().st_size:
        return
    if target.suffix.lower() == ".parquet":
        ours = _columns(target) >= _SCORED
    else:
        with target.open("rb") as file:
            first = file.readline(_LONGEST_ROW)
        # A run's samples and a server's log have these, too, after a step or a time.
        ours = first.startswith(b'{"prompt": ') and b'"reward": ' in first and b'"mean": ' in first
    if not ours:
        raise PoiseError(f"--output {target} exists and holds no scores; choose another name")


def _columns(path: Path) -> set[str]:
    """Names of a Parquet file's columns; none of another file."""
    import pyarrow.parquet

    try:
        return set(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException):
        return set()
