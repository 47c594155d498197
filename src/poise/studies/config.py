"""Settings of a study and of its parts: help texts, the checks before anything is trained, the jobs they come to.

A study holds the whole config of `poise train-reward` (`reward`) and of `poise train-policy` (`policy`). Every job gets
that config, and the study sets the fields in SET_BY_STUDY.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from poise.data.preferences import OnBadRow
from poise.errors import PoiseError
from poise.functional.objective_names import in_one_spelling, read_objective
from poise.models.choices import DEFAULT_MODEL
from poise.models.head_checks import check_reward_run
from poise.models.model_folder import check_layers
from poise.policy.config import Config as PolicySettings
from poise.policy.formats import refuse_unfinished
from poise.reward.config import Config as RewardSettings
from poise.runtime.jobs import Job
from poise.runtime.run_folder import Json, config_dict
from poise.runtime.run_kinds import told_of
from poise.runtime.settings import (
    Count,
    EachOnce,
    Gold,
    Language,
    NotNegative,
    Preferences,
    Prompts,
    Reward,
    Seed,
    Settings,
    WholeNumber,
    at_least,
    check_settings,
    sized,
)
from poise.studies.arms import ARMS

REVIEWS = "reviews"  # as a --gold: the rules of gold.py

# Settings that may change when a study goes on: what they already made is kept.
GROWS = {
    "output", "arms", "reward_seeds", "policy_seeds", "pool_seeds", "pool_size", "label_noise", "policy_noise", "jobs",
    "policy.eval_every", "policy.eval_data", "policy.eval_tasks", "policy.eval_rows",
}  # fmt: skip
# Settings of the nested configs that the study chooses for every job, each with the study's own option for it.
SET_BY_STUDY = {
    "reward.preferences": "--preferences", "reward.output": "--output", "reward.seed": "--reward-seeds",
    "policy.prompts": "--prompts", "policy.eval_prompts": "--eval-prompts", "policy.output": "--output",
    "policy.reward": "--arms", "policy.objective": "--arms", "policy.seed": "--policy-seeds",
}  # fmt: skip
# Names of settings in study folders written before a study held whole configs.
RENAMED = {"num_layers": "reward.num_layers"} | {
    name: f"policy.{name}"
    for name in ("num_steps", "kl_coef", "max_tokens", "eval_every", "eval_data", "eval_tasks", "eval_rows")
}
# The recipe of a laptop: a model of 135M parameters, completions of one sentence. All figures in results/ are of these
# settings; `poise train-reward` and `train-policy` have others by default, for larger models (docs/defaults.md).
# Eight of the model's 30 layers: fast, and as good on generated text as more (LOG.md).
LAPTOP_REWARD = RewardSettings(num_layers=8, trunk="frozen")
LAPTOP_POLICY = PolicySettings(
    learning_rate=1e-3, accumulation=1, objective="tradeoff(0.4)", reward_ceiling=None, settle=False, kl_coef=0.05,
    kl_target=None, kl_horizon=10_000.0, prompts_per_step=4, max_tokens=20,
)  # fmt: skip
# What the study sets is empty here, and so is the model: --model stands for both.
REWARD = replace(LAPTOP_REWARD, model="")
POLICY = replace(LAPTOP_POLICY, model="", objective="", kl_coef=0.01)


@dataclass(frozen=True)
class Config(Settings):
    """Does a robust reward help, and by how much? Trains every arm on several seeds and levels of label noise, and
    compares them by gold. Gold stands for human judgment: a reference score that no training reads."""

    RUN_FOLDER = True

    output: str = "runs/study"
    """Folder to write; start again with the same one to go on, or with more arms, seeds or noise to extend it."""
    preferences: Preferences = ""
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id. Default, for all
    files: the standard study, on 4,000 pairs of reviews that people rated."""
    raters: Preferences = ""
    """The same pairs with the labels of single raters, for the noise level `raters`."""
    prompts: Prompts = ""
    """JSON lines with `prompt`, to train the policies on."""
    eval_prompts: Prompts = ""
    """Other prompts, to evaluate the policies on."""
    num_preferences: WholeNumber = 400
    """Preferences that each reward model is trained on, drawn from the file by its seed; 0 takes all."""
    model: Language = DEFAULT_MODEL
    """Language model of the reward models and the policies: local folder or hub id."""
    arms: tuple[str, ...] = (
        "single", "single_large_kl", "mean", "worst_case", "uncertainty_weighted", "brme_0.4", "brme_1",
        "brme_large_kl",
    )  # fmt: skip
    """Differences are taken against the first. Also: lower_confidence, soft_min, contrastive, par, bayesian, settle,
    brme_0, brme_0.2, brme_0.6, brme_0.8, brme_mean, brme_random, brme_adaptive, constant. BRME is the Bayesian reward
    model ensemble, with its nominal weight λ."""
    label_noise: tuple[str, ...] = ("0", "0.25")
    """Shares of the preferences to flip. 0 leaves the preferences as they are; `raters` takes those of --raters."""
    pool_seeds: Count = 20
    """Reward models of each label noise for best-of-n. The seed of each also decides which labels are flipped."""
    pool_size: WholeNumber = 64
    """Completions of each evaluation prompt to choose from; 0 leaves best-of-n out. Best-of-n needs a frozen trunk."""
    policy_noise: Annotated[tuple[str, ...], EachOnce()] = ("0",)
    """Levels of --label-noise on which policies are trained."""
    reward_seeds: Count = 3
    """Number of reward-model seeds on which policies are trained: 0, 1, …"""
    policy_seeds: WholeNumber = 1
    """Policies of every arm for each reward-model seed; 0 trains none."""
    gold: Reward = ""
    """Reward model that serves as gold, trained on data that none of these preferences are from. Default: rules that
    score short reviews."""
    jobs: Count = 1
    """Jobs at a time; they share the processor's cores, and where there are several GPUs each has its own."""
    reward: RewardSettings = REWARD
    """Settings of all reward models, those of `poise train-reward`. An empty model means --model. The study sets
    preferences, output and seed."""
    policy: PolicySettings = POLICY
    """Settings of all policies, those of `poise train-policy`. An arm may change some: the arms called `large_kl`
    multiply kl_coef by twenty. An empty model means --model. The study sets prompts, eval-prompts, reward, objective,
    output and seed."""

    READ_WITH = MappingProxyType({
        "raters": (lambda one: "raters" in one.label_noise, "--label-noise raters"),
        "pool_seeds": (lambda one: one.pool_size, "--pool-size"),
    } | dict.fromkeys(("policy_noise", "reward_seeds"), (lambda one: one.policy_seeds, "--policy-seeds")))  # fmt: skip

    def check(self) -> None:
        """Raise PoiseError, one line, for settings that no study can have."""
        check(completed(self))


@dataclass(frozen=True)
class QuickstartConfig(Settings):
    """All steps on a laptop: human ratings, reward models, PPO against each, and a page that compares them."""

    RUN_FOLDER = True
    GROWS = ("arms",)  # a finished quickstart of fewer arms goes on

    output: str = "runs/quickstart"
    """Folder to write; start again with the same one to go on after a stop."""
    model: Language = DEFAULT_MODEL
    """Language model: local folder or hub id."""
    num_preferences: Annotated[int, at_least(2)] = 400
    """Human preference pairs to train the reward models on."""
    arms: Annotated[tuple[Literal["conventional", "robust", "brme"], ...], sized(2), EachOnce()] = (
        "conventional", "robust",
    )  # fmt: skip
    """Policies to train: one head without a bound, the bounded lower confidence bound, and the paper's trade-off of
    BRME heads. A finished quickstart takes more of them: `--arms conventional robust brme`."""
    num_steps: Count = 28
    """PPO steps of each arm."""
    kl_coef: NotNegative = 0.01
    """β, the same for every arm: next to no KL penalty, so that the reward model itself has to hold."""
    seed: Seed = 0
    """Of everything: pairs, heads, prompts, sampling."""


@dataclass(frozen=True)
class BestOfNConfig(Settings):
    """Best-of-n and exactly tilted policies, for every objective, from one pool of completions."""

    RUN_FOLDER = True

    prompts: Prompts
    """JSON lines with `prompt`."""
    reward: Annotated[tuple[str, ...], sized(1), EachOnce()]
    """`poise train-reward` run folders: several, of other seeds, for intervals."""
    output: str = "runs/best-of-n"
    """Run folder to write."""
    model: Language = DEFAULT_MODEL
    """Local folder or hub id of the policy to sample."""
    objectives: Annotated[tuple[str, ...], sized(1), EachOnce(in_one_spelling)] = (
        "single:nominal", "brme:tradeoff(0.4)", "brme:worst_case", "posterior:lower_confidence(1)",
    )  # fmt: skip
    """What to select by: REWARD:OBJECTIVE, the reward model being a folder of the reward runs. Differences are taken
    against the first."""
    per_prompt: Annotated[int, at_least(2)] = 24
    """Completions per prompt."""
    max_tokens: Count = 20
    """Longest completion, in tokens."""
    gold: Gold = ""
    """Gold, the reference score that stands for human judgment: a reward model trained on other data, or `reviews`, for
    rules that score short film and product reviews and nothing else. Default: no gold."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: Seed = 0
    """Of the sampling."""

    def check(self) -> None:
        """As `Settings.check`, and the form of each objective."""
        super().check()
        for text in self.objectives:
            reward, colon, objective = text.partition(":")
            if not colon:
                raise PoiseError(f"{text!r}: REWARD:OBJECTIVE was expected, e.g. brme:tradeoff(0.4)")
            if not reward or Path(reward).name != reward or reward == "..":
                raise PoiseError(f"--objectives {text!r}: {reward!r} is not a folder of a reward run")
            read_objective(objective)

    def for_command(self) -> "BestOfNConfig":
        """As `Settings.for_command`: the reward models are there."""
        self.check()
        by_folder: dict[str, list[str]] = {}
        for reward, _, objective in (text.partition(":") for text in self.objectives):
            by_folder.setdefault(reward, []).append(objective)
        for run in self.reward:
            check_reward_run(run, by_folder, self.gold)
        return self


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Finished policies side by side, scored by gold if there is one: a reference that stands for human judgment."""

    RUN_FOLDER = True
    GROWS = ("arms", "labels")

    arms: Annotated[tuple[str, ...], EachOnce()]
    """`poise train-policy` run folders of the same evaluation prompts; differences are taken against the first."""
    labels: Annotated[tuple[str, ...], EachOnce()] = ()
    """What to call each arm; default: its folder's name."""
    pool: str = ""
    """A `poise best-of-n` run on the evaluation prompts: what the initial policy wrote, and its gold."""
    gold: Gold = ""
    """Gold: a reward model trained on data that no arm has seen, or `reviews`, rules that score short film and product
    reviews and nothing else. Default: no gold; the policies are compared by their own rewards, KL and texts."""
    output: str = "runs/comparison"
    """Run folder to write."""

    def check(self) -> None:
        """As `Settings.check`, and the number of arms and labels."""
        super().check()
        if len(self.arms) < 2:
            raise PoiseError("a comparison needs at least two arms")
        if self.labels and len(self.labels) != len(self.arms):
            raise PoiseError(f"{len(self.labels)} labels for {len(self.arms)} arms")

    def for_command(self) -> "CompareConfig":
        """As `Settings.for_command`: the arms are there."""
        self.check()
        for arm in self.arms:
            refuse_unfinished(Path(arm), self.gold)
        if self.pool and not (Path(self.pool) / "pool.jsonl").exists():
            told = told_of(self.pool)
            why = f"it is {told}" if told and "best-of-n" not in told else "it has no pool.jsonl"
            raise PoiseError(f"--pool {self.pool} is no `poise best-of-n` run: {why}")
        return self


def completed(config: Config) -> Config:
    """The config with label noise as in folder names, and with the files of the standard study if it names none."""
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
    """Does the config name no files, and so ask for the standard study?"""
    return not any((config.preferences, config.raters, config.prompts, config.eval_prompts))


def _canonical(noise: str) -> str:
    """`0.25` for `.25` and `0.250`, `0` for `-0`."""
    try:
        return f"{float(noise) + 0.0:g}"
    except ValueError:
        return noise


def settings(config: Config) -> Json:
    """Every setting by its dotted name, as plain values, without the nested ones that the study sets itself."""
    found: Json = {}
    for name, value in config_dict(config).items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in found.items() if name not in SET_BY_STUDY}


# ---- checks ----


def check(config: Config) -> None:
    """Raise PoiseError, one line, for settings that no study can have. Those of a policy are checked with each arm."""
    check_settings(replace(config, policy=POLICY))
    if not all((config.preferences, config.prompts, config.eval_prompts)):
        raise PoiseError(
            "--preferences, --prompts and --eval-prompts belong together; leave out all for the standard study"
        )
    if config.pool_size == 1:
        raise PoiseError("--pool-size must be at least 2, or 0 for no best-of-n")
    if not config.pool_size and not config.policy_seeds:
        raise PoiseError("--pool-size 0 and --policy-seeds 0 leave nothing to study")
    _check_arms_and_noise(config)
    _check_nested(config)


def _check_arms_and_noise(config: Config) -> None:
    if unknown := [arm for arm in config.arms if arm not in ARMS]:
        raise PoiseError(f"no arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    if len(set(config.arms)) < max(len(config.arms), 2):
        raise PoiseError("--arms needs at least two, each once")
    if len(set(config.label_noise)) < len(config.label_noise) or not all(map(_is_noise, config.label_noise)):
        raise PoiseError("--label-noise takes shares in [0, 0.5] or `raters`, each once")
    if unknown := [noise for noise in config.policy_noise if config.policy_seeds and noise not in config.label_noise]:
        raise PoiseError(f"--policy-noise {unknown[0]} is not among --label-noise {' '.join(config.label_noise)}")
    if "raters" in config.label_noise and not config.raters:
        raise PoiseError("--label-noise raters needs --raters: the same pairs with the labels of single raters")


def _check_nested(config: Config) -> None:
    """Refuse what the study sets itself, and what the trainings would refuse later."""
    given, default = config_dict(config), config_dict(Config())
    for name, own in SET_BY_STUDY.items():
        group, key = name.split(".")
        if given[group][key] != default[group][key]:
            raise PoiseError(f"--{name.replace('_', '-')} is set by the study; leave it out and see {own}")
    if config.pool_size and (tuned := [one for one in ("trunk", "stage2_trunk") if given["reward"][one] != "frozen"]):
        raise PoiseError(
            f"--reward.{tuned[0].replace('_', '-')} {given['reward'][tuned[0]]} needs --pool-size 0: "
            "best-of-n trains its reward models on one frozen trunk"
        )
    with _options_of("reward"):
        (reward := reward_config(config, "0", 0)).check()
        if Path(reward.model).is_dir():  # before a pool is sampled; the hub is not asked
            check_layers(reward.model, "--num-layers", reward.num_layers)
    for arm in config.arms:
        with _options_of("policy", f"arm {arm}: "):
            policy_job(config, arm, 0, "0", 0).config.check()


@contextlib.contextmanager
def _options_of(group: str, before: str = "") -> Iterator[None]:
    """Errors of a nested config name its options as the study has them, such as --policy.num-steps."""
    try:
        yield
    except PoiseError as error:
        raise PoiseError(before + re.sub(r"--(?=[a-z])", f"--{group}.", str(error))) from None


def _is_noise(label: str) -> bool:
    with contextlib.suppress(ValueError):
        return label == "raters" or 0 <= float(label) <= 0.5
    return False


# ---- jobs ----


def worlds(config: Config) -> Iterator[tuple[str, int]]:
    """(label noise, reward seed) that policies are trained on."""
    return itertools.product(config.policy_noise, range(config.reward_seeds))


def world_folder(config: Config, noise: str, seed: int) -> Path:
    """The folder of one label noise and reward seed: its preferences, reward models and policies."""
    return Path(config.output) / f"noise-{noise}" / f"reward-{seed}"


def reward_job(config: Config, noise: str, seed: int) -> Job:
    """Trains the reward models of one label noise and seed, in a run folder."""
    return Job("train-reward", reward_config(config, noise, seed))


def reward_config(config: Config, noise: str, seed: int) -> RewardSettings:
    """Settings of the reward models of one label noise and seed; best-of-n trains the same ones in memory."""
    world = world_folder(config, noise, seed)
    return replace(
        config.reward, preferences=str(world / "preferences.jsonl"), output=str(world / "reward"),
        model=config.reward.model or config.model, seed=seed,
    )  # fmt: skip


def policy_model(config: Config) -> str:
    """The language model that the policies start from."""
    return config.policy.model or config.model


def policy_job(config: Config, name: str, policy_seed: int, noise: str, seed: int) -> Job:
    """Trains one policy of the arm `name`."""
    arm, world = ARMS[name], world_folder(config, noise, seed)
    settings = replace(
        arm.applied(config.policy), prompts=config.prompts, eval_prompts=config.eval_prompts,
        reward=str(world / "reward" / arm.reward), output=str(world / f"policy-{policy_seed}" / name),
        model=policy_model(config), seed=1000 * seed + policy_seed,
    )  # fmt: skip
    return Job("train-policy", settings)
