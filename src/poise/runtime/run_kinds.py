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
    "study": {"reward_seeds", "policy_seeds", "label_noise"},
    "toy": {"num_seeds", "heads_kl_coef"},
}
_WITHOUT_PAGE = {"toy"}
_OTHERS = {
    "ensemble.json": "an ensemble of reward models", "adapter_config.json": "a folder of adapters",
    "config.json": "the folder of one model",
}  # fmt: skip


def command_of(settings: Collection[str]) -> str:
    """The command whose config.yaml names these settings; an empty text for one that is not known by them."""
    return next((command for command, names in _SETTINGS.items() if names <= set(settings)), "")


def made_by(folder: str | Path) -> str:
    """The command that made a run folder; an empty text for other folders. PoiseError for a damaged config.yaml."""
    folder = Path(folder)
    if (folder / "study.json").exists():
        return "study"
    settings = load_config_file(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    whole = all((folder / name).exists() for name in ("results.json", "comparison/results.json"))
    return command_of(settings) or ("quickstart" if whole else "")


def kind_of(folder: str | Path) -> str:
    """The command that made a run folder. PoiseError if it is no run folder, or one that has no page."""
    folder = Path(folder)
    if not folder.is_dir():
        why = "it is a file" if folder.exists() else "there is no such folder"
        raise PoiseError(f"{folder} is not a run folder: {why}")
    kind = made_by(folder)
    if kind and kind not in _WITHOUT_PAGE:
        return kind
    if not (folder / "config.yaml").exists():
        inner = folder.parent / "config.yaml"
        hint = f"; its run is {folder.parent}" if inner.exists() else ""
        raise PoiseError(f"{folder} is not a run folder: it has no config.yaml{hint}")
    have = ", ".join(command for command in _SETTINGS if command not in _WITHOUT_PAGE)
    raise PoiseError(f"{folder} is a run of a command that has no page ({have} have one)")


def why_without(run: Path, name: str) -> str:
    """Why a run lacks a folder that it ends with, and what to do: it is not finished, or the folder was deleted."""
    if not (run / "results.json").exists():
        return "the run is not finished"
    return f"{name} was deleted since it finished; delete {run}/results.json and start its command again to have it"


def told_of(folder: str | Path) -> str:
    """The same in words, to tell somebody who took it for something else; also of a file, a model and adapters.

    An empty text for other folders.
    """
    folder = Path(folder)
    try:
        if kind := made_by(folder):
            return f"a run of `poise {kind}`"
        found = next((words for name, words in _OTHERS.items() if (folder / name).exists()), "")
        return "a file" if folder.is_file() else found
    except (PoiseError, OSError, ValueError):
        return ""
