"""The files of reward models, read with their types and ranges: the `poise` block of config.json, and ensemble.json.

Nothing here imports torch, so that a wrong file is one line at once. A number in a file is finite, or it is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from poise.errors import PoiseError, first_line
from poise.runtime.records import read_object
from poise.runtime.run_kinds import told_of
from poise.runtime.settings import HUGE, Bounded, above, at_least, between, read_fields, sized

ENSEMBLE_FILE = "ensemble.json"
Std = Annotated[float, above(0, HUGE)]


@dataclass(frozen=True)
class HeadBlock:
    """The `poise` block, as `poise.models.reward_model.HeadLayout` describes it."""

    num_heads: Annotated[int, between(1, 1_000_000)]
    kind: Literal["gaussian", "point"]
    offset: tuple[Bounded, ...]
    floor: Annotated[float, at_least(0, HUGE)] = 1e-3
    reward_scale: Annotated[float, at_least(0, HUGE)] = 1.0
    std_scale: tuple[Std, ...] = ()
    reference_texts: Annotated[int, between(0, 2**40)] = 0
    reference_shrinkage: Annotated[float, between(0, 1)] = 0.0
    adapters: bool = False

    @property
    def num_labels(self) -> int:
        return self.num_heads * (2 if self.kind == "gaussian" else 1)


@dataclass(frozen=True)
class EnsembleFile:
    """ensemble.json: folders of reward models, seen from its own, and each one's normalization (mean, std)."""

    members: Annotated[tuple[Annotated[str, sized(1)], ...], sized(1)]
    means: tuple[Bounded, ...]
    stds: tuple[Std, ...]


_READ_NOMINAL = {"nominal", "tradeoff", "expected_tradeoff"}


def check_objective(objective: str, kind: str, num_heads: int, reference_texts: int) -> None:
    """Raise PoiseError for an objective, as a config names it, that means nothing for such heads.

    `nominal`, and what contains it, reads the head with the lowest std. Several point heads all have std 0.
    `typical` reads the distance to reference texts.
    """
    name = objective.split("(")[0].strip()
    if name == "typical" and not reference_texts:
        raise PoiseError(
            f"objective {objective} needs reference texts, which this reward model does not have; "
            f"`poise reference CHECKPOINT --preferences FILE` adds them (an ensemble takes none)"
        )
    if kind == "point" and num_heads > 1 and name in _READ_NOMINAL:
        raise PoiseError(
            f"objective {objective} reads the head with the lowest std, but all {num_heads} heads of this "
            f"reward model are point heads of std 0; choose mean, worst_case, quantile(0.25) or lower_confidence(1)"
        )


def read_head_block(block: Any, num_labels: int, path: str) -> HeadBlock:
    """The `poise` block of a config.json with `num_labels` labels; without one, that of any one-label classifier.

    path: the checkpoint, for messages. Raises PoiseError, one line, for a block that is wrong or fits other labels.
    """
    if block is None:
        if num_labels != 1:
            raise PoiseError(
                f"{path} has {num_labels} labels and no `poise` block in its config.json: not a reward model of ours"
            )
        return HeadBlock(1, "point", (0.0,))
    found = read_fields(block, HeadBlock, f"{path}: the `poise` block of config.json")
    if not found.num_labels == num_labels == len(found.offset):
        raise PoiseError(
            f"{path}: config.json has {num_labels} labels but its poise block says {found.num_heads} "
            f"{found.kind} heads, which need {found.num_labels}, each with an offset; there are {len(found.offset)}"
        )
    if found.std_scale and len(found.std_scale) != found.num_heads:
        raise PoiseError(f"{path}: the poise block has {len(found.std_scale)} std scales for {found.num_heads} heads")
    return found


def num_labels_of(config: dict[str, Any], path: str) -> int:
    """The number of labels that a config.json means: those it names, else transformers' default of two."""
    named = config.get("id2label")
    if named is not None and not isinstance(named, dict):
        raise PoiseError(f"{path}: id2label of config.json must be an object")
    return len(named) if named is not None else int(config.get("num_labels") or 2)


def read_ensemble(folder: str) -> EnsembleFile:
    """The ensemble.json of a folder, `members` as paths from here.

    Raises PoiseError, one line, for a file that is wrong, and for a member that is an ensemble: itself, for one.
    """
    path = Path(folder) / ENSEMBLE_FILE
    found = read_fields(read_object(path, strict=False), EnsembleFile, f"{path} is not one this version reads: it")
    if not len(found.members) == len(found.means) == len(found.stds):
        raise PoiseError(
            f"{path} is not one this version reads: it has {len(found.members)} members, {len(found.means)} means and "
            f"{len(found.stds)} stds"
        )
    members = tuple(str(Path(folder) / name) for name in found.members)
    for member in members:
        refuse_nested(member)
    return EnsembleFile(members, found.means, found.stds)


def checkpoint_folder(path: str) -> str:
    """A checkpoint as given, or the BRME inside a `poise train-reward` run folder."""
    inside = Path(path) / "brme"
    return str(inside) if not (Path(path) / "config.json").exists() and (inside / "config.json").exists() else path


def local_checkpoint(path: str) -> Path:
    """The folder of one reward model on this machine, to be written into; PoiseError for an ensemble or a hub id."""
    folder = Path(checkpoint_folder(path))
    if (folder / ENSEMBLE_FILE).exists():
        raise PoiseError(f"{path} is an ensemble, whose members have features of their own; it takes no reference")
    if not folder.is_dir():
        what = told_of(folder) or "no folder of this machine"
        raise PoiseError(f"{path} is {what}; a reference is written into a reward model's folder, so copy it first")
    if not (folder / "config.json").exists():
        why = told_of(folder) or "a folder without config.json"
        raise PoiseError(f"{path} is {why}, not a reward model; a reference is written into a reward model's folder")
    return folder


def refuse_nested(member: str) -> None:
    """Raise PoiseError for a member of an ensemble that is an ensemble."""
    try:
        nested = (Path(member) / ENSEMBLE_FILE).exists()
    except (OSError, ValueError) as error:
        raise PoiseError(f"{member!r} cannot be the name of a reward model: {first_line(error)}") from None
    if nested:
        raise PoiseError(f"{member} is itself an ensemble; name its members")
