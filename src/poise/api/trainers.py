"""`RewardTrainer` and `PolicyTrainer`: `poise train-reward` and `poise train-policy` on data and models in memory.

What a command reads from files, a trainer is given, and writes as files into its run folder; from there on the two are
one. The folder is that of `args.output`; without one it is temporary and removed, and only what `train` returns stays.
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import torch

from poise.api.reward_model import RewardModel
from poise.data.in_memory import Data, as_file, to_read_again
from poise.errors import PoiseError
from poise.integrations.trl_reward import IN_MEMORY, RobustReward
from poise.models.head_kinds import read_head_set
from poise.models.loading import HfModel, HfTokenizer, load_adapters, load_policy
from poise.models.scorer import Scorer
from poise.models.trained_on import write_base
from poise.policy import train as policy_training
from poise.policy.config import Config as PolicyConfig
from poise.policy.config import unread_settings
from poise.reports import policy_card, reward_card
from poise.reward import train as reward_training
from poise.reward.config import Config as RewardConfig
from poise.runtime.distributed import launched_processes
from poise.runtime.folders import own
from poise.runtime.quiet import quiet_loading
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, config_dict, is_main_process
from poise.runtime.run_kinds import told_of

Args = TypeVar("Args", RewardConfig, PolicyConfig)

# Settings that a trainer takes by themselves: what they are called there.
_GIVEN_TO_TRAINERS = {"preferences": "train_dataset", "prompts": "prompts", "reward": "reward", "model": "model"}

# What no folder of a policy alone holds: that of a run, of a reward model, of an ensemble.
_NO_POLICY = ("config.yaml", "poise", "ensemble.json")


class RewardTrainer:
    """Trains reward models from preferences: one trunk, and every kind of heads on it.

    results: what the training found, after `train`: accuracies on the validation pairs, by kind of heads.
    bad_rows: rows that were left out, with line and reason (`args.on_bad_row="skip"`).
    """

    def __init__(self, model: str | Path = "", train_dataset: Data | None = None, args: RewardConfig | None = None):
        """model: folder or hub id of the language model; default `args.model`.

        train_dataset: preferences in any form that files have: a `datasets.Dataset`, a list of rows, a file or hub id;
        default `args.preferences`.
        """
        self.args = _settings(RewardConfig, args, model)
        self.train_dataset = self.args.preferences if train_dataset is None else to_read_again(train_dataset)
        self.results: Json = {}
        self.bad_rows: list[Json] = []

    def train(self) -> RewardModel:
        """Train, or go on from `args.output`; the same as the command does, and the same numbers.

        Raises PoiseError as the command does: a bad row is named by its number, starting from 1.
        """
        if self.args.validator_share and not self.args.output:
            raise PoiseError("a validator is kept in the run folder: give args an output, or no validator_share")
        with _own_names(self.args), _usual_torch(), _run_folder(self.args.output) as folder:
            preferences = as_file(self.train_dataset, folder / "train_dataset.jsonl")
            config = replace(self.args, preferences=preferences, output=str(folder))
            try:
                out = reward_training.run(config)
            finally:
                self.bad_rows = _rows(folder / "train_dataset.bad.jsonl")
            reward_card.write_cards(out, config_dict(config))
            self.results = out.results or {}
            model = RewardModel.from_pretrained(folder, config.max_length)
        return model if self.args.output else model.in_memory()


@dataclass(repr=False)
class TrainedPolicy:
    """A trained policy, as transformers and PEFT know it: `model.generate`, `model.merge_and_unload`, ….

    model: a `peft.PeftModel` in eval mode; with `tune="full"` a transformers model.
    metrics: one entry per step. results: of the whole run. completions: of the evaluation prompts, with every head.
    """

    model: HfModel
    tokenizer: HfTokenizer
    metrics: list[Json]
    results: Json
    completions: list[Json]

    def __repr__(self) -> str:
        """What a notebook shows: the model's class and what the run came to, not its hundreds of modules."""
        reward, kl = self.results.get("reward"), self.results.get("kl")
        came_to = f", reward {reward:+z.2f}, KL {kl:z.1f}" if reward is not None and kl is not None else ""
        return f"TrainedPolicy: {type(self.model).__name__}, {len(self.metrics)} steps{came_to}"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters, or the whole model with `tune="full"`, and the tokenizer.

        A folder in which `save_pretrained` wrote the like is overwritten; one that holds something else is refused.
        """
        # Embeddings are never adapted: peft need not ask the hub whether the vocabulary has grown.
        about: dict[str, Any] = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
        others = {*_NO_POLICY, "config.json" if about else "adapter_config.json"}
        if Path(folder).is_file() or any((Path(folder) / name).exists() for name in others):
            raise PoiseError(f"{folder} is {told_of(folder) or 'something else'}; choose another folder")
        with quiet_loading():
            self.model.save_pretrained(str(folder), **about)
            self.tokenizer.save_pretrained(str(folder))
        if about:
            write_base(self.model.get_base_model(), Path(folder))


class PolicyTrainer:
    """Trains a policy against a reward: PPO, or GRPO and RLOO through TRL (`args.algorithm`)."""

    def __init__(
        self,
        model: str | Path = "",
        reward: RobustReward | RewardModel | str | Path = "",
        prompts: Data | None = None,
        args: PolicyConfig | None = None,
    ):
        """model: folder or hub id of the language model; default `args.model`.

        reward: `RewardModel.reward(…)` or `RobustReward.load(…)`, whose objective replaces that of `args`, and whose
        bounds do where it has any, its validator unless `args` has one (None: there is none); or a reward model, which
        is read by `args.objective`; default `args.reward`.
        prompts: a list of texts or conversations, rows with a `prompt`, a `datasets.Dataset`, a file; default
        `args.prompts`.
        """
        self.args = _settings(PolicyConfig, args, model)
        if not isinstance(reward, (RobustReward, RewardModel, str, Path, NoneType)):
            what = f"a RewardModel, its .reward(…), or the name of one, not {type(reward).__name__}"
            raise PoiseError(f"reward must be {what}")
        self.reward = reward or self.args.reward
        self.prompts = self.args.prompts if prompts is None else to_read_again(prompts)

    def train(self) -> TrainedPolicy:
        """Train, or go on from `args.output`. Raises PoiseError as `poise train-policy` does."""
        given = self._given()
        with _own_names(self.args), _usual_torch(), _run_folder(self.args.output) as folder:
            config = replace(
                self.args, output=str(folder), prompts=as_file(self.prompts, folder / "prompts.jsonl", "prompt")
            )
            if given is None:
                config = replace(config, reward=str(self.reward))
            else:
                config = _with_reward(config, given, self._place(given, folder))
            out = policy_training.run(config, given)
            if is_main_process():
                policy_card.write_card(out, config_dict(config), unread_settings(config.algorithm))
            model, tokenizer = _trained(config, folder / "policy")
            return TrainedPolicy(
                model, tokenizer, out.metrics(), out.results or {}, list(read_rows(folder / "final.jsonl"))
            )

    def _given(self) -> RobustReward | None:
        """The reward in memory; None for the name of a reward model, which is loaded as a command loads it."""
        if isinstance(self.reward, RobustReward):
            return self.reward
        if not isinstance(self.reward, RewardModel):
            return None
        return self.reward.reward(self.args.objective, validator=self.args.validator)

    def _place(self, given: RobustReward, folder: Path) -> str:
        """Where the reward model can be found again: a run that is kept gets a copy of one that is in memory only."""
        if given.path or not self.args.output:
            return given.path or IN_MEMORY
        copy = folder / "reward-model"
        own(folder)
        if not copy.exists():
            RewardModel({"": given.scorer}, "").save_pretrained(copy)
        elif not _holds(copy, given.scorer):
            raise PoiseError(f"{folder} was begun with another reward model; choose another output")
        return str(copy)


def _with_reward(config: PolicyConfig, given: RobustReward, place: str) -> PolicyConfig:
    """The config with what the reward says of itself."""
    bounds: dict[str, Any] = {}
    if math.isfinite(given.ceiling):
        bounds["reward_ceiling"] = given.ceiling
    if math.isfinite(given.floor):
        bounds["reward_floor"] = given.floor
    if given.regret_bonus:
        bounds["regret_bonus"] = given.regret_bonus
    if config.validator == "":
        bounds["validator"] = given.validator
    return replace(config, reward=place, objective=given.objective, **bounds)


def _holds(checkpoint: Path, scorer: Scorer) -> bool:
    """Are a checkpoint's heads those of a model in memory, as saving it would round them?"""
    kept, classifier = read_head_set(checkpoint), scorer.extract.classifier
    weight = scorer.weight.to(classifier.dtype).float().cpu()
    return kept.layout == scorer.layout and torch.equal(kept.weight.to(classifier.dtype).float(), weight)


def _trained(config: PolicyConfig, folder: Path) -> tuple[HfModel, HfTokenizer]:
    if (folder / "adapter_config.json").exists():
        model, tokenizer = load_policy(config.model)
        return load_adapters(model, str(folder)).eval(), tokenizer
    return load_policy(str(folder))


def _settings(kind: type[Args], args: Any, model: Any) -> Args:
    """The settings with the model that a trainer was given, and names of files as text.

    Raises PoiseError for others than a trainer's own, a model that is no name, and two different names.
    """
    names = {RewardConfig: "RewardConfig", PolicyConfig: "PolicyConfig"}
    given = kind() if args is None else args
    if not isinstance(given, kind):
        raise PoiseError(f"args must be a {names[kind]}, not {names.get(type(given), type(given).__name__)}")
    if not isinstance(model, (str, Path, NoneType)):
        raise PoiseError(f"model must be the folder or hub id of a language model, not {type(model).__name__}")
    paths: dict[str, Any] = {name: str(value) for name, value in vars(given).items() if isinstance(value, Path)}
    given, name = replace(given, **paths), str(model or "")
    if name and given.model not in (name, kind.model):
        raise PoiseError(f"two models: {name} and args.model {given.model}; give one")
    return replace(given, model=name or given.model)


@contextlib.contextmanager
def _own_names(args: RewardConfig | PolicyConfig) -> Iterator[None]:
    """Errors name settings as the program does: `args.batch_size`, where a command says `--batch-size`."""
    known = {name: f"args.{name}" for name in vars(args)} | _GIVEN_TO_TRAINERS

    def as_argument(option: re.Match[str]) -> str:
        return known.get(option[1].replace("-", "_"), option[0])

    try:
        yield
    except PoiseError as error:
        error.args = (re.sub(r"--([a-z][a-z-]*[a-z])", as_argument, str(error)),)
        raise


@contextlib.contextmanager
def _usual_torch() -> Iterator[None]:
    """Torch as a command finds it, whatever the program around has set: gradients, float32, the CPU, no autocast."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with contextlib.ExitStack() as modes:
        modes.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            modes.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def _run_folder(output: str) -> Iterator[Path]:
    """The run folder that was asked for, or a temporary one."""
    if output:
        yield Path(output)
        return
    if launched_processes() > 1:
        raise PoiseError("several processes need one run folder: give args an output")
    with tempfile.TemporaryDirectory(prefix="poise-") as scratch:
        yield Path(scratch) / "run"


def _rows(path: Path) -> list[Json]:
    return list(read_rows(path)) if path.exists() else []
