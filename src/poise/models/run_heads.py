"""What of a `poise train-reward` run is the reward, and what its validator. Does not import torch."""

from pathlib import Path

from poise.errors import PoiseError
from poise.functional.objective_names import read_objective
from poise.models.choices import HEAD_KINDS, HeadKind
from poise.models.formats import checkpoint_folder
from poise.runtime.progress import console
from poise.runtime.run_folder import is_main_process

VALIDATOR = "validator"  # its folder in a run
VALIDATOR_TRAINING = "validator-training"  # what its trunk is trained in, beside that


def kind_for(objective: str) -> HeadKind:
    """The kind of heads that an objective, as a config names it, was made for.

    `lower_confidence` needs heads that differ where data are missing: those drawn from the posterior (docs/study.md).
    All others read the BRME, some of them its stds.

    >>> kind_for("lower_confidence(1)"), kind_for("tradeoff(0.4)")
    ('posterior', 'brme')
    """
    return "posterior" if read_objective(objective)[0] == "lower_confidence" else "brme"


def kinds_in(folder: Path) -> list[HeadKind]:
    """Kinds that a run folder holds as checkpoints of their own."""
    return [kind for kind in HEAD_KINDS if (folder / kind / "config.json").exists()]


def is_run(path: str) -> bool:
    """Is this the folder of a `poise train-reward` run, not a checkpoint?"""
    return bool(path) and not (Path(path) / "config.json").exists() and bool(kinds_in(Path(path)))


def reward_folder(path: str, objective: str, heads: HeadKind | None = None) -> str:
    """The checkpoint that `path` means as a reward: itself, or one kind of heads of a `poise train-reward` run.

    heads: which; default `kind_for(objective)`. Raises PoiseError for a run without them, and for a kind of what is
    no run.
    """
    if not is_run(path):
        if heads:
            raise PoiseError(f"--heads {heads} chooses among those of a run; {path} is no `poise train-reward` run")
        return path
    kind = heads or kind_for(objective)
    if kind not in kinds_in(Path(path)):
        raise PoiseError(f"{path} has no {kind} heads; --heads takes one of {', '.join(kinds_in(Path(path)))}")
    return str(Path(path) / kind)


def made_for(path: str, objective: str) -> str:
    """As `reward_folder`, where no setting chooses the heads: those for which the objective was made.

    The name of a run stays as it is where these are the BRME's, which it means everywhere.
    """
    kind = kind_for(objective)
    if is_run(path) and kind not in kinds_in(Path(path)):
        have = ", ".join(f"{path}/{other}" for other in kinds_in(Path(path)))
        raise PoiseError(f"{path} has no {kind} heads, for which {objective} was made; name one of {have}")
    return path if kind == "brme" else reward_folder(path, objective)


def taken_heads(path: str, objective: str) -> str:
    """The same; a line says which heads of a run these are, if not the BRME's."""
    folder = made_for(path, objective)
    if folder != path:
        say_heads(path, objective, folder, f"name {path}/KIND for others")
    return folder


def say_heads(run: str, objective: str, folder: str, how: str) -> None:
    """Say which heads of a run are the reward. folder: theirs. how: others are taken."""
    if is_main_process():
        taken = Path(folder).name
        others = ", ".join(kind for kind in kinds_in(Path(run)) if kind != taken)
        also = f"; {how}: {others}" if others else ""
        console.print(f"reward: {objective} of the {taken} heads of {run}{also}", markup=False, soft_wrap=True)


def adapters_of(checkpoint: Path) -> Path:
    """Where the run of a checkpoint keeps the adapters that its trunk was trained with, if it was by LoRA."""
    run = checkpoint.parent
    return (run / VALIDATOR_TRAINING if checkpoint.name == VALIDATOR else run) / "adapter"


def validator_of(reward: str) -> str:
    """The validator that the run of a reward trained (--validator-share); "" if there is none.

    reward: a `poise train-reward` run, or the checkpoint of one kind of heads in it.
    """
    folder = Path(reward)
    run = folder.parent if folder.name in HEAD_KINDS else folder
    try:
        found = bool(reward) and is_run(str(run)) and (run / VALIDATOR / "config.json").exists()
    except (OSError, ValueError):
        return ""  # no name of a folder
    return str(run / VALIDATOR) if found else ""


def refuse_itself(judge: str, reward: str, taken: str = "", option: str = "--validator") -> None:
    """Raise PoiseError for a judge that is the reward model: a validator's transfer would be 1 at every step.

    taken: the checkpoint that the reward means, where an objective chooses among those of a run. option: the judge's.
    """
    try:
        same = Path(judge).resolve() == Path(reward).resolve()
        same |= Path(checkpoint_folder(judge)).resolve() == Path(taken or checkpoint_folder(reward)).resolve()
    except (OSError, ValueError):
        return  # no name of a folder, which whoever reads it says
    if judge and reward and same:
        raise PoiseError(f"{option} is the reward model itself, which agrees with itself; name another one")
