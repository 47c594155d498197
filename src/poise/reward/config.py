"""The settings of all commands about reward models; torch is not imported to read them."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import tyro

from poise.data.preferences import OnBadRow
from poise.errors import PoiseError
from poise.functional.objective_names import read_objective
from poise.models.choices import DEFAULT_MODEL
from poise.models.formats import checkpoint_folder, local_checkpoint, refuse_nested
from poise.models.model_folder import check_layers
from poise.reward.formats import check_ensemble, check_export, check_exported, check_scores
from poise.runtime.settings import (
    Count,
    EachOnce,
    LearningRate,
    Length,
    LengthOrAll,
    Positive,
    Preferences,
    Reward,
    Rows,
    Seed,
    Settings,
    TrunkModel,
    WholeNumber,
    at_least,
    between,
    same_value,
)

Trunk = Literal["frozen", "lora", "full"]
Stage2Trunk = Literal["frozen", "lora", "full", "lora_per_head"]
HeadLossName = Literal["sampled_mse", "gaussian_nll", "beta_nll", "crps", "probit_pairs", "bradley_terry"]
PAIR_LOSSES = ("probit_pairs", "bradley_terry")  # on the preferences themselves
_OF_A_TRAINED_TRUNK = (
    "epochs", "learning_rate", "batch_size", "device_batch_size", "gradient_checkpointing", "save_steps",
)  # fmt: skip
_TRAINED = "a trunk that is trained: --trunk lora or full, or a --stage2-trunk"
_NOT_WRITTEN = {".csv", ".tsv", ".xlsx", ".arrow", ".feather", ".gz", ".bz2", ".xz", ".zst", ".zip"}
ShardKind = Literal["disjoint", "cluster", "source", "bootstrap", "same"]


@dataclass(frozen=True)
class Config(Settings):
    """Train a conventional reward model and multi-head ones from preferences."""

    RUN_FOLDER = True

    preferences: Preferences = ""
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id. A command needs them;
    `RewardTrainer` takes them as `train_dataset`, too."""
    output: str = ""
    """Run folder to write. Default: runs/reward; of a `RewardTrainer` none is kept."""
    model: TrunkModel = DEFAULT_MODEL
    """Local folder or hub id of the language model whose first layers become the trunk."""
    num_layers: WholeNumber = 0
    """Layers of the model to keep as trunk; 0 keeps all."""
    max_length: Length = 1024
    """Longest sample in tokens; longer ones lose their oldest tokens. Their number is reported."""
    validation_share: Annotated[float, between(0, 1, open_low=True, open_high=True)] = 0.2
    """Share of the preferences held out to choose the prior and to report accuracy: whole prompts, or whole texts where
    there are few prompts."""
    validator_share: Annotated[float, between(0, 1, open_high=True)] = 0.0
    """Share of the preferences held back, as --validation-share is, to train a validator: one Bradley-Terry head on
    another depth of the model, in RUN/validator, which policy training watches by itself. 0: none."""
    label_smoothing: Annotated[float, between(0, 0.5, open_high=True)] = 0.0
    """Assumed share of preferences whose chosen and rejected texts are swapped, in [0, 0.5)."""
    trunk: Trunk = "lora"
    """Trunk weights that stage 1 trains together with the head: LoRA adapters (merged afterwards), all (`full`), or
    none (`frozen`). Frozen is the fast way where the model is a reward model already; on a language model's own
    features heads may stay at chance (docs/defaults.md)."""
    stage2_trunk: Stage2Trunk = "frozen"
    """The same for stage 2, which starts from the heads on the frozen trunk. The BRME then gets its own trunk.
    `lora_per_head` gives each head LoRA adapters of its own, so that heads can disagree about what the trunk sees. They
    start as copies of the single head, are trained together on the preferences, each on its shard, and need
    `--head-loss probit_pairs` or `bradley_terry`."""
    head_layers: WholeNumber = 0
    """Upper layers of the trunk that `lora_per_head` puts adapters on; 0: all. The layers below are run once for all
    heads, those above once for each head."""
    adapter_diversity: Annotated[float, at_least(0)] = 0.0
    """Weight of a term that keeps the adapters of `lora_per_head` apart: the nuclear norm of all heads' LoRA matrices
    together (arXiv 2401.00243). Adapters start nearly as far apart as they can be."""
    epochs: Positive = 1.0
    """Passes over the preferences, if the trunk is trained."""
    learning_rate: Annotated[float, between(0, 10)] = 0.0
    """Learning rate of the trunk; 0 means 2e-4 for LoRA and 1e-5 for all weights."""
    batch_size: Count = 16
    """Preferences per optimizer step, if the trunk is trained."""
    device_batch_size: Count = 8
    """Preferences per forward pass and device; memory grows with it."""
    lora_rank: Count = 16
    """Rank of the adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time, much less memory."""
    shard: bool = False
    """Spread weights, gradients and optimizer states of the trained trunk over the processes of `torchrun` or
    `accelerate launch`, by torch's fully_shard (FSDP2); the result is the same."""
    save_steps: Count = 25
    """Optimizer steps between the checkpoints of the trunk."""
    num_heads: Count = 5
    """Number of heads of the BRME (Bayesian Reward Model Ensemble) and of the bootstrap ensemble."""
    shards: ShardKind = "cluster"
    """Pairs that each BRME head is trained on: a part of its own (`disjoint`: random, `cluster`: by content, `source`:
    by the rows' `source`), a random 80 % of all pairs (`bootstrap`), or all pairs (`same`)."""
    head_loss: HeadLossName = "sampled_mse"
    """Loss of stage 2. `sampled_mse` is the paper's: its std measures coverage by training data. `gaussian_nll`,
    `beta_nll` and `crps` are proper scores: their std is an error bar, and the lowest-std head has the least label
    noise, not the best coverage. `probit_pairs` fits the preferences themselves, and so does `bradley_terry`, whose
    heads have no std: it is for `--stage2-trunk lora_per_head`, and objectives that read a std are refused."""
    head_steps: Count = 600
    """Maximum number of optimizer steps of stage 2; it stops early when validation error rises."""
    head_lr: LearningRate = 3e-3
    """Learning rate of stage 2 (Adam)."""
    posterior_heads: Annotated[int, at_least(2)] = 64
    """Heads to draw from the posterior. Too few draws underestimate disagreement; extra draws are cheap."""
    feature_cache: bool = True
    """Keep trunk features in the user's cache folder, for other heads, seeds and losses on the same texts."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: Seed = 0
    """Seed of the validation split, the training of the trunk, the shards and the heads."""

    READ_WITH = MappingProxyType(
        {name: (lambda one: one.trains_trunk, _TRAINED) for name in _OF_A_TRAINED_TRUNK}
        | {
            "lora_rank": (
                lambda one: "lora" in f"{one.trunk} {one.stage2_trunk}",
                "--trunk lora or --stage2-trunk lora",
            ),
            "head_layers": (lambda one: one.stage2_trunk == "lora_per_head", "--stage2-trunk lora_per_head"),
        }
    )

    @property
    def trains_trunk(self) -> bool:
        """Does stage 1 or stage 2 train the trunk?"""
        return (self.trunk, self.stage2_trunk) != ("frozen", "frozen")

    def check(self) -> None:
        """As `Settings.check`, and what adapters of single heads need."""
        super().check()
        if self.trains_trunk and self.batch_size % self.device_batch_size:
            raise PoiseError(
                f"--batch-size {self.batch_size} is no multiple of --device-batch-size {self.device_batch_size}; "
                f"choose another of the two"
            )
        if self.stage2_trunk != "lora_per_head":
            if self.adapter_diversity:
                raise PoiseError(
                    "--adapter-diversity needs --stage2-trunk lora_per_head, whose adapters it keeps apart"
                )
            if self.head_loss == "bradley_terry":
                raise PoiseError(
                    "--head-loss bradley_terry needs --stage2-trunk lora_per_head; heads of it on shared features are "
                    "the run's `ensemble`"
                )
            return
        if self.head_loss not in PAIR_LOSSES:
            raise PoiseError(
                f"--stage2-trunk lora_per_head with --head-loss {self.head_loss} would make every head the single one; "
                f"choose --head-loss probit_pairs or bradley_terry"
            )
        if self.shard:
            raise PoiseError("--stage2-trunk lora_per_head does not go with --shard: leave one of them out")

    def for_command(self) -> "Config":
        """As `Settings.for_command`."""
        if not self.preferences:
            raise PoiseError("--preferences is missing: name a file, a folder saved by `datasets`, or a hub id")
        self.check()
        if self.num_layers and self.head_layers > self.num_layers:
            raise PoiseError(f"--head-layers {self.head_layers} are more than --num-layers {self.num_layers} keeps")
        check_layers(self.model, "--num-layers", self.num_layers)
        check_layers(self.model, "--head-layers", self.head_layers)
        return replace(self, output=self.output or "runs/reward")


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Judge reward models by human labels: accuracy, calibration, and the quality of their uncertainties."""

    RUN_FOLDER = True

    rewards: Annotated[tuple[Reward, ...], EachOnce(checkpoint_folder)]
    """Reward models, e.g. one training from several seeds: checkpoint folders, hub ids of one-label classifiers,
    ensembles, or `poise train-reward` runs."""
    file: Annotated[str, Rows("questions")]
    """`prompt`, `chosen`, `rejected`: texts (pairs) or lists of texts (three each: RM-Bench; else best-of-n sets);
    `subset` if there is one."""
    ood: Annotated[str, Rows("questions")] = ""
    """Pairs of another kind of data, to measure whether the uncertainties are larger there."""
    objective: str = "mean"
    """How the heads become the reward that orders texts, e.g. nominal, worst_case, tradeoff(0.4)."""
    output: str = "runs/evaluation"
    """Run folder to write."""
    max_length: LengthOrAll = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""
    feature_cache: bool = True
    """Keep trunk features in the user's cache folder, for other heads on the same trunk and texts."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: Seed = 0
    """Of the random uncertainty and the bootstrap."""

    def check(self) -> None:
        """As `Settings.check`, and the number of reward models and the objective."""
        super().check()
        if not self.rewards:
            raise PoiseError("--rewards needs at least one reward model")
        read_objective(self.objective)


@dataclass(frozen=True)
class ScoreConfig(Settings):
    """Score completions: per-head mean and std, uncertainties, and one objective.

    Rows are read, scored and written in parts, in constant memory; a stopped command goes on after its last part. Under
    `torchrun` or `accelerate launch` the processes share the rows.

    `std` and `routing_std` are the stds as the heads report them. `total_std` is an error bar: it takes each head's std
    times its `std_scale`, which was fitted on validation pairs, as `poise evaluate-reward` does.
    """

    reward: Annotated[tyro.conf.Positional[Reward], tyro.conf.arg(metavar="REWARD")]
    """Reward model: a checkpoint folder, a hub id of a one-label classifier, or a `poise train-reward` run."""
    file: Annotated[tyro.conf.Positional[Annotated[str, Rows("samples")]], tyro.conf.arg(metavar="FILE")]
    """`prompt`, `completion`: JSON lines, Parquet, CSV, a folder saved by `datasets`, or a hub id."""
    objective: str = "tradeoff(0.4)"
    """How the heads become the column `reward`, e.g. nominal, worst_case, tradeoff(0.4), lower_confidence(1). Of a
    `poise train-reward` run lower_confidence reads the posterior heads, as in training; others read the BRME's."""
    output: str = ""
    """File to write: JSON lines, or Parquet if its name ends in .parquet. Default: FILE with .scored.jsonl."""
    max_length: LengthOrAll = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""

    def check(self) -> None:
        """As `Settings.check`, and the objective and the output's form."""
        super().check()
        read_objective(self.objective)
        suffix = Path(self.output).suffix.lower()
        if suffix in _NOT_WRITTEN:
            raise PoiseError(f"--output {self.output}: scores are written as .jsonl or .parquet, not as {suffix}")
        if self.output:
            if same_value(self.output, self.file):
                raise PoiseError(f"--output {self.output} is the file that is scored; choose another name")
            check_scores(Path(self.output))


@dataclass(frozen=True)
class EnsembleConfig(Settings):
    """Combine reward models, the members, into a folder that every command reads as one with all their heads."""

    members: Annotated[
        tyro.conf.Positional[tuple[Reward, ...]], EachOnce(checkpoint_folder),
        tyro.conf.arg(metavar="REWARD [REWARD …]"),
    ]  # fmt: skip
    """Reward models: checkpoint folders, hub ids or `poise train-reward` runs."""
    reference: Preferences
    """Preferences. Each member's reward is scaled to mean 0 and std 1 over their texts, so that none dominates."""
    output: str = "runs/ensemble"
    """Folder to write."""
    max_length: LengthOrAll = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""

    def check(self) -> None:
        """As `Settings.check`, and the number of members."""
        super().check()
        if len(self.members) < 2:
            raise PoiseError("an ensemble needs at least two reward models")
        for member in self.members:
            refuse_nested(member)
        check_ensemble(Path(self.output))


@dataclass(frozen=True)
class ReferenceConfig(Settings):
    """Give a reward model reference texts, for the objective `typical`; `poise train-reward` does so by itself.

    Writes poise/reference.safetensors into the checkpoint, and their number into its config.json.
    """

    reward: Annotated[tyro.conf.Positional[Reward], tyro.conf.arg(metavar="REWARD")]
    """Checkpoint folder of a reward model, or a `poise train-reward` run (its BRME)."""
    preferences: Preferences = ""
    """Preferences, whose texts become the reference. Either these or --completions."""
    completions: Annotated[str, Rows("samples")] = ""
    """JSON lines with `prompt`, `completion`: the initial policy's, for instance."""
    max_length: LengthOrAll = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""
    feature_cache: bool = True
    """Keep trunk features in the user's cache folder."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""

    def check(self) -> None:
        """As `Settings.check`, and that there is one file of texts."""
        super().check()
        if bool(self.preferences) == bool(self.completions):
            raise PoiseError("give the reference texts: either --preferences FILE or --completions FILE")
        if not os.access(folder := local_checkpoint(self.reward), os.W_OK):
            raise PoiseError(f"the reference is written into {folder}, which may not be written to; copy the folder")


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Write a reward model for tools that take one scalar, or for an engine that needs a bias."""

    reward: Annotated[tyro.conf.Positional[Reward], tyro.conf.arg(metavar="REWARD")]
    """Reward model: a checkpoint folder, a hub id, or a `poise train-reward` run (its BRME)."""
    output: str
    """Folder to write; one that exists is replaced only if it is an earlier export."""
    scalar: str = ""
    """`mean` of the heads, or one `head`: one label instead of all. Empty keeps every label."""
    head: WholeNumber | None = None
    """Which head `--scalar head` keeps, counted from 0."""
    adapter: bool = False
    """Write the LoRA adapters with the heads, in PEFT's format, instead of the merged weights: a few MB that need the
    language model they were trained on. For a run of `poise train-reward --trunk lora`."""
    engine: Literal["vllm", "sglang"] = "vllm"
    """`sglang` adds a zero `score.bias`, which its Qwen classifiers would otherwise leave random. vLLM, TRL and
    transformers need nothing."""

    def check(self) -> None:
        """As `Settings.check`, what fits one label, and that the folder may be written."""
        super().check()
        if self.scalar and self.scalar not in ("mean", "head"):
            raise PoiseError(
                f"--scalar {self.scalar}: only mean and head are linear in the features and fit one label; objectives "
                f"that choose a head per text, such as nominal and worst_case, need all heads"
            )
        if (self.scalar == "head") != (self.head is not None):
            raise PoiseError("--scalar head and --head NUMBER go together")
        if self.adapter and self.engine == "sglang":
            raise PoiseError("--adapter and --engine sglang do not go together: export the merged weights")
        if not self.scalar and self.engine == "vllm" and not self.adapter:
            raise PoiseError(
                "vLLM serves the checkpoint as it is; choose --scalar mean, --scalar head or --engine sglang"
            )
        check_export(Path(self.output), Path(checkpoint_folder(self.reward)))
        check_exported(self.reward, self.head, adapter=self.adapter)


@dataclass(frozen=True)
class PushConfig(Settings):
    """Upload a reward model to the model hub; nothing but the checkpoint's own files leaves this machine."""

    reward: Annotated[tyro.conf.Positional[Reward], tyro.conf.arg(metavar="REWARD")]
    """Reward model: a checkpoint folder or a `poise train-reward` run (its BRME)."""
    repo: str
    """Where to: `user/name`; made if it does not exist."""
    private: bool = True
    """Make the new repository readable by its owners only; --no-private: by everybody."""
    existing: bool = False
    """Upload into a repository that exists already: files of the same names are replaced."""

    def check(self) -> None:
        """As `Settings.check`, and the form of the repository's name."""
        super().check()
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repo, re.ASCII):
            raise PoiseError(f"--repo {self.repo} is not of the form user/name")
