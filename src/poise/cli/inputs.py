"""What can be wrong with the files and models that settings name, before anything heavy is imported."""

from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from poise.data.files import is_hub_id, no_such_file, refuse_unsaved
from poise.data.preferences import iter_samples, read_preferences, read_prompts
from poise.data.rows import OnBadRow, Understood
from poise.errors import PoiseError, first_line
from poise.models.head_checks import check_heads
from poise.models.model_folder import check_language_model, check_model, check_policy, check_reward_model
from poise.models.run_heads import made_for, reward_folder
from poise.reward.config import EvaluateConfig
from poise.runtime.folders import refuse_device, refuse_foreign
from poise.runtime.hub import on_hub
from poise.runtime.progress import console
from poise.runtime.settings import ModelPath, Rows, marks, typed_fields
from poise.serve.config import ServeConfig
from poise.studies.config import REVIEWS

# Larger files are read once, by the command: there the import is the smaller part of the time.
_SMALL = 8 * 2**20


def _check_gold(name: str) -> None:
    if name != REVIEWS:
        check_reward_model(name)


_CHECKS: dict[str, Callable[[str], None]] = {
    "language model": check_language_model, "policy": check_policy, "trunk": check_model,
    "reward model": check_reward_model, "gold": _check_gold,
}  # fmt: skip


def check_inputs(config: Any) -> None:
    """Raise PoiseError for an output that cannot be, and for the first file or model that cannot be read."""
    output = getattr(config, "output", "")
    if isinstance(output, str) and output:
        refuse_device(Path(output))
        if getattr(config, "RUN_FOLDER", False):
            refuse_foreign(Path(output))
    files, models = list[tuple[str, str]](), list[tuple[str, str]]()
    for kind, value in typed_fields(config).values():
        if is_dataclass(value):
            check_inputs(value)
        named = [name for name in (value if isinstance(value, tuple) else (value,)) if isinstance(name, str) and name]
        for mark in marks(kind):
            files += [(mark.kind, name) for name in named if isinstance(mark, Rows)]
            models += [(mark.kind, name) for name in named if isinstance(mark, ModelPath)]
    for kind, name in files:
        _check_rows(kind, name, getattr(config, "on_bad_row", None))
    for kind, name in models:
        _CHECKS[kind](name)
    if objective := getattr(config, "objective", ""):
        for together in _heads_together(config):
            check_heads(together, objective)


def _heads_together(config: Any) -> list[list[str]]:
    """The reward models that settings with an `objective` name, those in one list whose heads it reads together."""
    if isinstance(config, EvaluateConfig):
        return [[made_for(name, config.objective)] for name in config.rewards]
    if isinstance(config, ServeConfig):
        return [[made_for(name, config.objective) for name in config.rewards]]
    reward = getattr(config, "reward", "")
    if not isinstance(reward, str) or not reward:
        return []
    if not hasattr(config, "heads"):
        return [[made_for(reward, config.objective)]]
    return [[reward_folder(reward, config.objective, config.heads)]]


def _check_rows(kind: str, name: str, on_bad_row: OnBadRow | None) -> None:
    """Read a small local text file as the command will; of others, make sure that they are there.

    on_bad_row: None for a command that has no such setting.
    """
    path = Path(name)
    try:
        exists, is_file = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise PoiseError(f"{name!r} cannot be the name of a file: {first_line(error)}") from None
    if not exists:
        if is_hub_id(path):
            on_hub(name, "dataset")
            return
        raise PoiseError(no_such_file(name))
    if path.is_dir():
        refuse_unsaved(path)
    if not is_file or on_bad_row == "skip" or path.suffix == ".parquet" or path.stat().st_size > _SMALL:
        return
    said = console.quiet
    console.quiet = True  # the command itself will say what there is to say
    try:
        _read(kind, name, Understood(name, can_skip=on_bad_row is not None))
    finally:
        console.quiet = said


def _read(kind: str, name: str, understood: Understood) -> None:
    if kind == "questions":
        from poise.data.evaluation_sets import read_questions  # imports NumPy

        read_questions(name, "error")
    elif kind == "preferences":
        read_preferences(name, understood=understood)
    elif kind == "prompts":
        read_prompts(name, understood=understood)
    else:
        for _ in iter_samples(name, understood=understood):
            pass
