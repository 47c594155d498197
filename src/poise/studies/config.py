"""Settings of a study, what may be wrong with them, and the cells that they come to."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from poise.errors import PoiseError
from poise.models.loading import DEFAULT_MODEL
from poise.policy import train as train_policy
from poise.reward import train as train_reward
from poise.runtime.jobs import Cell
from poise.studies.arms import ARMS

GROWS = {
    "output", "arms", "reward_seeds", "policy_seeds", "pool_seeds", "pool_size", "label_noise", "policy_noise", "jobs",
    "eval_every", "eval_data", "eval_tasks", "eval_rows",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Arms × seeds × label noise, side by side: does a robust reward help, and by how much?"""

    output: str = "runs/study"
    """Folder to write; start again with the same one to go on, or with more arms, seeds or noise to extend it."""
    preferences: str = ""
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id. Default, for all
    files: the standard study, on 4,000 pairs of reviews that people rated."""
    raters: str = ""
    """The same pairs with the labels of single raters, for the noise level `raters`."""
    prompts: str = ""
    """JSON lines with `prompt`, to train the policies on."""
    eval_prompts: str = ""
    """Other prompts, to judge them on."""
    num_preferences: int = 400
    """Preferences each reward model is trained on, drawn from the file by its seed; 0 takes all."""
    model: str = DEFAULT_MODEL
    """Language model: local folder or hub id."""
    arms: tuple[str, ...] = (
        "single", "single_large_kl", "mean", "worst_case", "uncertainty_weighted", "brme_0.4", "brme_1",
        "brme_large_kl",
    )  # fmt: skip
    """Differences are taken against the first. Also: lower_confidence, soft_min, contrastive, par, bayesian, settle,
    brme_0, brme_0.2, brme_0.6, brme_0.8, brme_mean, brme_random, brme_adaptive, constant."""
    label_noise: tuple[str, ...] = ("0", "0.25")
    """Shares of the preferences to flip; 0 leaves them as they are; `raters` takes those of --raters."""
    pool_seeds: int = 20
    """Reward models of each noise for best-of-n, each of a seed of its own, which also decides whose labels are
    flipped; all objectives are tried on them."""
    pool_size: int = 64
    """Completions of each evaluation prompt to choose from; 0 leaves best-of-n out."""
    policy_noise: tuple[str, ...] = ("0",)
    """Of the label noise, what policies are trained on."""
    reward_seeds: int = 3
    """Reward models, of the first seeds, that policies are trained on."""
    policy_seeds: int = 1
    """Policies of every arm trained on each; 0 trains none."""
    num_layers: int = 8
    """Layers of the model that the reward models read; 0 keeps all."""
    num_steps: int = 40
    """PPO steps of every policy."""
    kl_coef: float = 0.01
    """β; the arms called `large_kl` have twenty times as much."""
    max_tokens: int = 20
    """Longest completion, in tokens."""
    gold: str = ""
    """Reward model that plays the human, trained on data none of these preferences are from; default: a reader of
    short reviews."""
    eval_every: int = 0
    """PPO steps between benchmarks asked during training, for how much they move over checkpoints; 0 asks none."""
    eval_data: str = ""
    """Folder of their rows; default: the harness's own tasks, from the model hub."""
    eval_tasks: tuple[str, ...] = train_policy.Config.eval_tasks
    """Which benchmarks."""
    eval_rows: int = train_policy.Config.eval_rows
    """Rows of each, the same ones every time."""
    jobs: int = 1
    """Cells at a time; the processor's cores are shared out among them."""


def completed(config: Config) -> Config:
    """The config with label noise as folders write it, and the files of the standard study if it names none."""
    label_noise, policy_noise = (tuple(map(_canonical, noise)) for noise in (config.label_noise, config.policy_noise))
    config = replace(config, label_noise=label_noise, policy_noise=policy_noise)
    if not is_standard(config):
        return config
    folder = Path(config.output) / "data"
    return replace(
        config, preferences=str(folder / "preferences.jsonl"), raters=str(folder / "raters.jsonl"),
        prompts=str(folder / "prompts.jsonl"), eval_prompts=str(folder / "eval_prompts.jsonl"),
    )  # fmt: skip


def is_standard(config: Config) -> bool:
    """Does it name no files?"""
    return not any((config.preferences, config.raters, config.prompts, config.eval_prompts))


def _canonical(noise: str) -> str:
    """`0.25` for `.25` and `0.250`, `0` for `-0`."""
    try:
        return f"{float(noise) + 0.0:g}"
    except ValueError:
        return noise


def check(config: Config) -> None:
    """Raises PoiseError, one line, for settings that no study can have."""
    if not all((config.preferences, config.prompts, config.eval_prompts)):
        raise PoiseError(
            "--preferences, --prompts and --eval-prompts belong together; leave out all for the standard study"
        )
    for name in ("reward_seeds", "pool_seeds", "jobs"):
        if getattr(config, name) < 1:
            raise PoiseError(f"--{name.replace('_', '-')} must be at least 1")
    if config.pool_size == 1 or min(config.pool_size, config.policy_seeds) < 0:
        raise PoiseError("--pool-size must be at least 2, or 0 for no best-of-n; --policy-seeds at least 0")
    if not config.pool_size and not config.policy_seeds:
        raise PoiseError("--pool-size 0 and --policy-seeds 0 leave nothing to study")
    if unknown := [arm for arm in config.arms if arm not in ARMS]:
        raise PoiseError(f"no arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    if len(set(config.arms)) < max(len(config.arms), 2):
        raise PoiseError("--arms needs at least two, each once")
    if len(set(config.label_noise)) < len(config.label_noise) or not all(map(_is_noise, config.label_noise)):
        raise PoiseError("--label-noise takes shares in [0, 0.5] or `raters`, each once")
    if unknown := [noise for noise in config.policy_noise if noise not in config.label_noise]:
        raise PoiseError(f"--policy-noise {unknown[0]} is not among --label-noise {' '.join(config.label_noise)}")
    if "raters" in config.label_noise and not config.raters:
        raise PoiseError("--label-noise raters needs --raters: the same pairs with the labels of single raters")
    for arm in config.arms:  # what a policy's config refuses is said before anything is trained
        policy_cell(config, arm, 0, "0", 0).config.check()


def _is_noise(label: str) -> bool:
    try:
        return label == "raters" or 0 <= float(label) <= 0.5
    except ValueError:
        return False


# ---- cells ----


def worlds(config: Config) -> Iterator[tuple[str, int]]:
    """(label noise, reward seed) that policies are trained on."""
    return itertools.product(config.policy_noise, range(config.reward_seeds))


def world_folder(config: Config, noise: str, seed: int) -> Path:
    """Of one label noise and reward seed: its preferences, reward models and policies."""
    return Path(config.output) / f"noise-{noise}" / f"reward-{seed}"


def reward_cell(config: Config, noise: str, seed: int) -> Cell:
    """The reward models of one world, trained in a run folder."""
    return Cell("train-reward", reward_config(config, noise, seed))


def reward_config(config: Config, noise: str, seed: int) -> train_reward.Config:
    """Their settings, which those in memory have too."""
    world = world_folder(config, noise, seed)
    return train_reward.Config(
        preferences=str(world / "preferences.jsonl"), output=str(world / "reward"), model=config.model,
        num_layers=config.num_layers, seed=seed,
    )  # fmt: skip


def policy_cell(config: Config, name: str, policy_seed: int, noise: str, seed: int) -> Cell:
    """One policy of an arm."""
    arm, world = ARMS[name], world_folder(config, noise, seed)
    return Cell(
        "train-policy",
        train_policy.Config(
            prompts=config.prompts, eval_prompts=config.eval_prompts, reward=str(world / "reward" / arm.reward),
            output=str(world / f"policy-{policy_seed}" / name), model=config.model, objective=arm.objective,
            kl_coef=config.kl_coef * arm.kl_factor, num_steps=config.num_steps, max_tokens=config.max_tokens,
            seed=1000 * seed + policy_seed, eval_every=config.eval_every, eval_data=config.eval_data,
            eval_tasks=config.eval_tasks, eval_rows=config.eval_rows, **arm.changes,
        ),
    )  # fmt: skip
