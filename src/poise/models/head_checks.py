"""Whether an objective means something for the heads of reward models, from their JSON files alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from poise.errors import PoiseError
from poise.models.formats import (
    ENSEMBLE_FILE,
    HeadBlock,
    check_objective,
    checkpoint_folder,
    num_labels_of,
    read_ensemble,
    read_head_block,
)
from poise.models.model_folder import check_reward_model, config_of
from poise.models.run_heads import refuse_itself
from poise.runtime.run_kinds import told_of


def check_heads(paths: Sequence[str], objective: str) -> None:
    """Raise PoiseError for an objective that means nothing for the heads of reward models, together those of one.

    Of a model of which nothing is known here nothing is said.
    """
    blocks = [_block(member) for path in paths for member in _members(path)]
    if all(blocks):
        one, heads = blocks[0], sum(block.num_heads for block in blocks if block)
        assert one is not None
        check_objective(objective, one.kind, heads, one.reference_texts if len(blocks) == 1 else 0)


def _members(path: str) -> Sequence[str]:
    return read_ensemble(path).members if (Path(path) / ENSEMBLE_FILE).exists() else (path,)


def _block(path: str) -> HeadBlock | None:
    checkpoint = checkpoint_folder(path)
    config = config_of(checkpoint)
    return read_head_block(config.get("poise"), num_labels_of(config, path), path) if config else None


def check_reward_run(run: str, names: Mapping[str, Sequence[str]], gold: str = "") -> None:
    """Raise PoiseError, one line, unless a `poise train-reward` run holds reward models of these names.

    names: with the objectives that each is to be read by. gold: what judges them, which must be none of them.
    """
    for name, objectives in sorted(names.items()):
        folder = str(Path(run) / name)
        if not Path(folder).is_dir():
            told = told_of(run)
            why = f"is {told}, and " if told and "train-reward" not in told else ""
            missing = "" if Path(run).exists() else " (there is no such folder)"
            raise PoiseError(
                f"--reward {run} {why}holds no reward model {name!r}; name `poise train-reward` runs{missing}"
            )
        check_reward_model(folder)
        refuse_itself(gold, folder, option="--gold")
        for objective in objectives:
            check_heads([folder], objective)
