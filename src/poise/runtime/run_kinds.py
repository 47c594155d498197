"""Which command made a run folder, told from its files alone."""

from collections.abc import Collection
from pathlib import Path

from poise.errors import PoiseError
from poise.runtime.config_files import load_config_file

# What a run of each command has among its settings, in the order in which they are looked for.
_SETTINGS = {
    "train-policy": {"prompts", "reward", "objective", "kl_coef"},
    "train-reward": {"preferences", "head_loss", "num_heads"},
    "best-of-n": {"objectives", "per_prompt"},
    "compare": {"arms", "labels", "pool"},
    "evaluate-reward": {"rewards", "file"},
    "evaluate-policy": {"policies", "tasks"},
    "trust": {"validator", "judged", "per_prompt"},
    "quickstart": {"num_preferences", "num_steps", "kl_coef"},
}


def command_of(settings: Collection[str]) -> str:
    """The command whose config.yaml names these settings; an empty text for one that is not known by them."""
    return next((command for command, names in _SETTINGS.items() if names <= set(settings)), "")


def kind_of(folder: str | Path) -> str:
    """The command that made a run folder. PoiseError if it is no run folder, or one that has no page."""
    folder = Path(folder)
    if (folder / "study.json").exists():
        return "study"
    if (folder / "comparison" / "results.json").exists():
        return "quickstart"
    if not (folder / "config.yaml").exists():
        if not folder.exists():
            raise PoiseError(f"{folder} is not a run folder: there is no such folder")
        inner = folder.parent / "config.yaml"
        hint = f"; its run is {folder.parent}" if inner.exists() else ""
        raise PoiseError(f"{folder} is not a run folder: it has no config.yaml{hint}")
    if kind := command_of(load_config_file(folder / "config.yaml")):
        return kind
    raise PoiseError(f"{folder} is a run of a command that has no page ({', '.join(_SETTINGS)} and study have one)")


def told_of(folder: str | Path) -> str:
    """The same in words, to tell somebody who took the folder for something else; an empty text for other folders."""
    try:
        kind = kind_of(folder)
    except PoiseError:
        return ""
    return f"a run of `poise {kind}`"
