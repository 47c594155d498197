"""The settings of policy optimization and of the commands about policies: defaults, help texts, what may be wrong.

Torch is not imported to read them.
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import tyro

from poise.data.preferences import OnBadRow
from poise.errors import PoiseError
from poise.functional.monitor import MonitorConfig
from poise.functional.objective_names import PARAMETERS, Shaping, check_parameter, read_objective
from poise.integrations.lm_eval_tasks import DEFAULT_TASKS, MAX_TOKENS, check_tasks
from poise.integrations.trl_needs import check_trl
from poise.models.choices import DEFAULT_MODEL, HeadKind, Tune, ValueTrunk
from poise.models.model_folder import check_layers
from poise.models.run_heads import refuse_itself, reward_folder, validator_of
from poise.policy.formats import policy_folder, policy_in
from poise.runtime.settings import (
    Bounded,
    Count,
    EachOnce,
    Language,
    LearningRate,
    NotNegative,
    PolicyModel,
    Positive,
    Prompts,
    Reward,
    Rows,
    Seed,
    Settings,
    Share,
    WholeNumber,
    bounds,
)
from poise.runtime.trackers import check_trackers

PPO_ONLY = {
    "value_learning_rate", "accumulation", "value_clip", "discount", "trace", "whiten_advantages", "entropy_coef",
    "gradient_regularization", "max_step_kl", "tune", "value_trunk", "final_parameter", "reward_norm", "shaping",
    "baselines", "kl_target", "kl_horizon", "missing_eos_penalty", "settle",
    "eval_every", "eval_tasks", "eval_data", "eval_rows", "gradient_checkpointing",
}  # fmt: skip


# Values that turn such a setting off, where the default does not: runs of earlier versions have them in their files.
_OFF = {"accumulation": 1, "kl_target": None, "kl_horizon": 10_000.0, "settle": False}


def unread_settings(algorithm: str) -> set[str]:
    """Names of the settings that an algorithm does not read."""
    return set() if algorithm == "ppo" else PPO_ONLY


def _num_processes() -> int:
    """Processes of this run. Before torch is imported none has met the others, and there is one."""
    if "torch" not in sys.modules:
        return 1
    from poise.runtime import distributed

    return distributed.num_processes()


@dataclass(frozen=True, kw_only=True)
class PpoConfig(Settings):
    """The settings of PPO itself."""

    learning_rate: LearningRate = 1e-4
    """Learning rate of the policy (Adam). Models of less than 200M parameters take 1e-3; for --tune full choose 1e-6 to
    1e-5."""
    value_learning_rate: LearningRate = 1e-3
    """Learning rate of the value head, and of its trunk with --value-trunk own (Adam)."""
    num_epochs: Count = 2
    """Passes over each step's completions."""
    num_minibatches: Count = 2
    """Minibatches per pass; they and the processes must divide the prompts per step."""
    accumulation: Count = 4
    """Parts in which a minibatch is computed, to save memory; the result is the same. More parts than prompts divide a
    prompt's completions, too; each part then reads the prompt again."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: an update takes about a third more time and much less memory; the
    result is the same."""
    clip: Positive = 0.2
    """Clip range of the probability ratio."""
    value_clip: Positive = 0.2
    """Clip range of the values."""
    discount: Share = 1.0
    """γ of the advantage estimate."""
    trace: Share = 0.95
    """λ of the advantage estimate."""
    whiten_advantages: bool = True
    """Give each step's advantages mean 0 and variance 1."""
    entropy_coef: NotNegative = 0.0
    """Weight of an entropy bonus per token; above 0 an update takes about 1.5 times as long."""
    max_step_kl: Positive | None = None
    """Leave the remaining minibatches of a step once KL(old policy || new) exceeds this, in nats per token."""
    max_grad_norm: Positive = 1.0
    """The gradients of the policy and of the values are each scaled down to this norm."""
    gradient_regularization: NotNegative = 0.0
    """γ: add γ/2 times the squared norm of the policy's gradient to its loss, so that training prefers places where the
    reward is flat (arXiv 2602.18037). Above 0 an update takes twice as long."""
    tune: Tune = "lora"
    """`lora` adapters, or all weights of the layers (`full`)."""
    adapted_layers: WholeNumber = 10
    """Upper layers that are trained; 0 trains all. The frozen ones below are computed once."""
    lora_rank: Count = 16
    """Rank of the LoRA, on all linear maps of a layer."""
    value_trunk: ValueTrunk = "shared"
    """Values from the policy's own last hidden states, or from trained layers of their `own`."""


@dataclass(frozen=True, kw_only=True)
class Config(PpoConfig):
    """Train a policy by PPO against a reward model, with the objective of your choice."""

    RUN_FOLDER = True

    prompts: Prompts = ""
    """JSON lines with `prompt`: text, or a conversation. A command needs them; `PolicyTrainer` is given them."""
    reward: Reward = ""
    """Reward model: checkpoint folder, hub id, `poise train-reward` run, or an ensemble. Needed as the prompts are."""
    heads: HeadKind | None = None
    """Which heads of a `poise train-reward` run to take; default: `posterior` for lower_confidence, `brme` for other
    objectives."""
    validator: Reward | None = ""
    """Another reward model, of other pairs or other features, that is only watched: `validator` in metrics.jsonl is its
    gain since the start, and `transfer` that gain over the reward's own, both in stds of the initial completions. PPO
    keeps the policy that it likes best in RUN/best. Default: the one that the reward's run trained (`poise train-reward
    --validator-share`), if it did; None: none."""
    output: str = ""
    """Run folder to write. Default: runs/policy; of a `PolicyTrainer` none is kept."""
    model: Language = DEFAULT_MODEL
    """Local folder or hub id of the language model to train."""
    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    """`ppo` is our own; `rloo` and `grpo` (no values) are TRL's, with this reward: pip install 'poise-rlhf[trl]'."""
    objective: str = "lower_confidence(1)"
    """How the heads become one reward; `tradeoff(0.4)` is the paper's. All of them: nominal, worst_case, tradeoff(λ),
    mean, median, random_head, quantile(q), uncertainty_weighted(c), lower_confidence(c), typical(c), reliable(c),
    soft_min(t), expected_worst_case, expected_tradeoff(λ), constant(v)."""
    final_parameter: Bounded | None = None
    """Move the objective's parameter linearly from its own value to this one by the last step."""
    reward_norm: Literal["initial", "running", "batch"] = "initial"
    """Completions whose mean and std scale the reward: the initial policy's, all so far (running), or the batch's."""
    reward_ceiling: Bounded | None = 2.0
    """Upper bound of the reward, in stds of its scale; None for no bound. One in forty of the initial policy's
    completions exceeds 2."""
    settle: bool = True
    """Scale the policy's learning rate by the distance of the step's mean reward to --reward-ceiling: training slows to
    zero as the mean reward reaches the ceiling."""
    reward_floor: Bounded | None = None
    """Lower bound of the reward, in stds of its scale."""
    shaping: Shaping = "none"
    """Compare each head's score of a completion with its scores of other completions of the prompt: `contrastive`
    (minus their mean) or `par` (probability of being preferred to them)."""
    baselines: Annotated[str, Rows("samples")] = ""
    """File of `prompt`, `completion` rows for --shaping; default: completions of the initial policy."""
    baselines_per_prompt: Count = 4
    """Completions of the initial policy per prompt for --shaping, if --baselines names no file."""
    regret_bonus: NotNegative = 0.0
    """δ: added to the reward of one completion of each prompt, that whose reward is highest after δ times its share of
    the prompt's completions is taken off. The policy then has a small worst-case regret where rewards may be wrong by δ
    stds (arXiv 2605.00155; docs/concepts/objectives.md)."""
    missing_eos_penalty: NotNegative = 0.0
    """Subtracted from the reward of a completion that was cut off at --max-tokens."""
    kl_coef: NotNegative = 0.05
    """β: weight of the KL to the initial policy, per nat, against a reward of std 1."""
    kl_target: NotNegative | None = 10.0
    """Adapt β to hold the KL of a completion at this many nats; None keeps β as it is."""
    kl_horizon: NotNegative = 1000.0
    """Completions over which β adapts: by a factor of about e^.2, if the KL stays far from the target."""
    max_kl: Positive | None = None
    """Stop once the KL of a step's completions exceeds this many nats, and go back to the last checkpoint that did
    not."""
    keep_at_kl: tuple[Positive, ...] = (5.0, 10.0, 20.0, 40.0)
    """Keep the first policy whose KL reaches each of these, in nats, in RUN/ladder: `poise choose` finds out which to
    take. With --tune full each is a whole model."""
    num_steps: Count = 40
    """PPO steps."""
    prompts_per_step: Count = 32
    """Prompts of each step, over all processes."""
    completions_per_prompt: Count = 8
    """Completions sampled of each prompt."""
    max_tokens: Count = 256
    """Longest completion, in tokens."""
    baseline_completions: Count = 64
    """Completions of the initial policy on which the reward's zero and unit are fitted. RLOO and GRPO fit them to their
    first step instead."""
    eval_prompts: Prompts = ""
    """Prompts for the completions in final.jsonl; default: the training prompts."""
    eval_completions: Count = 4
    """Completions of each evaluation prompt."""
    eval_every: WholeNumber = 0
    """Steps between evaluations on benchmarks (benchmarks.jsonl), which also run at step 0 and at the end; 0: none.
    Needs pip install 'poise-rlhf[eval]'."""
    eval_tasks: Annotated[tuple[str, ...], EachOnce()] = ("lambada",)
    """Benchmarks to evaluate on, of those that `poise evaluate-policy` offers."""
    eval_data: str = ""
    """Folder of the benchmarks' rows (NAME.jsonl or .jsonl.gz); default: the model hub."""
    eval_rows: Count = 100
    """Rows of each benchmark; a benchmark of several parts from the hub takes a few more."""
    on_alarm: Literal["log", "stop", "rollback", "pessimism"] = "log"
    """What to do at signs of over-optimization: `log` them; `stop` the run; `rollback`: stop and return to the last
    policy that looked safe; `pessimism`: go on with a doubled β and a more pessimistic objective."""
    alarm_threshold: Positive = MonitorConfig.threshold
    """The monitor raises an alarm above this score."""
    trackers: Annotated[tuple[str, ...], EachOnce()] = ()
    """Trackers to log to as well, through accelerate: tensorboard, wandb, trackio, … (if installed)."""
    shard: bool = False
    """Spread the weights of the layers, their gradients and optimizer states over the processes of `torchrun` or
    `accelerate launch`, by torch's fully_shard (FSDP2); the result is the same. Layers are whole while completions are
    sampled."""
    save_every: Count = 5
    """Steps between checkpoints."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: Seed = 0
    """Seed of the prompts' order, the sampling and the minibatches."""

    READ_WITH = MappingProxyType(
        {
            "lora_rank": (lambda one: one.tune == "lora", "--tune lora"),
            "kl_horizon": (lambda one: one.kl_target is not None, "a --kl-target"),
            "baselines_per_prompt": (
                lambda one: one.shaping != "none" and not one.baselines,
                "--shaping contrastive or par, and no --baselines",
            ),
            "regret_bonus": (lambda one: one.completions_per_prompt > 1, "at least two --completions-per-prompt"),
            "eval_tasks": (lambda one: one.eval_every, "--eval-every"),
            "eval_data": (lambda one: one.eval_every, "--eval-every"),
            "eval_rows": (lambda one: one.eval_every, "--eval-every"),
        }
    )
    GROWS = ("num_steps",)  # a finished run of fewer steps goes on
    # What a run without a setting, written by an earlier version, did: its config.yaml names every other one.
    ADDED = MappingProxyType(
        {
            "heads": "brme", "max_kl": None, "validator": "", "keep_at_kl": [], "shard": False,
            "gradient_checkpointing": False, "gradient_regularization": 0.0, "regret_bonus": 0.0,
        }
    )  # fmt: skip

    def for_command(self) -> "Config":
        """As `Settings.for_command`."""
        if missing := [name for name in ("prompts", "reward") if not getattr(self, name)]:
            what = {"prompts": "name a file of prompts", "reward": "name a reward model"}[missing[0]]
            raise PoiseError(f"--{missing[0]} is missing: {what}")
        # More than a small model has are asked for by default. A finished run needs no model, so the hub is not asked.
        if self.adapted_layers != Config.adapted_layers and Path(self.model).is_dir():
            check_layers(self.model, "--adapted-layers", self.adapted_layers)
        validator = validator_of(self.reward) if self.validator == "" else self.validator
        return replace(self, output=self.output or "runs/policy", validator=validator)

    def check(self) -> None:
        """Raise PoiseError for bad settings, before a model is loaded."""
        super().check()
        name, _ = read_objective(self.objective)
        num_processes = _num_processes()
        shares = self.num_minibatches * num_processes
        if self.prompts_per_step % shares:
            over = f" × {num_processes} processes" if num_processes > 1 else ""
            raise PoiseError(
                f"--num-minibatches {self.num_minibatches}{over} does not divide "
                f"--prompts-per-step {self.prompts_per_step}"
            )
        if self.eval_every:
            if not self.eval_tasks:
                raise PoiseError("--eval-every needs --eval-tasks")
            check_tasks(self.eval_tasks, self.eval_data)
        adapts = self.kl_target is not None and self.algorithm == "ppo"
        if adapts and not (self.kl_target and self.kl_horizon and self.kl_coef):
            raise PoiseError(
                "--kl-target, --kl-horizon and --kl-coef must be above 0 for β to adapt; --kl-target None keeps it"
            )
        if adapts and self.kl_horizon < self.prompts_per_step * self.completions_per_prompt:
            raise PoiseError(f"--kl-horizon {self.kl_horizon:g} must hold the completions of a step")
        bounds(self.reward_floor, self.reward_ceiling)
        if self.settle and (self.reward_ceiling is None or self.reward_ceiling <= 0):
            raise PoiseError("--settle needs a --reward-ceiling above 0, the initial policy's mean reward")
        if self.final_parameter is not None:
            if PARAMETERS[name] is None:
                raise PoiseError(f"--final-parameter: {self.objective} has no parameter to move")
            check_parameter(name, self.final_parameter)
        if self.validator and self.reward:
            refuse_itself(self.validator, self.reward, reward_folder(self.reward, self.objective, self.heads))
        if self.baselines and self.shaping == "none":
            raise PoiseError("--baselines is only read with --shaping contrastive or par")
        if self.shard and self.tune == "full" and self.shaping != "none" and not self.baselines:
            raise PoiseError("--shard with --tune full needs --baselines: its reference does not sample")
        if self.algorithm != "ppo":
            self._check_without_ppo()
        check_trackers(self.trackers)

    def _check_without_ppo(self) -> None:
        """Raise PoiseError for settings that TRL's trainers would silently ignore."""
        if self.on_alarm in ("rollback", "pessimism"):
            raise PoiseError(f"--on-alarm {self.on_alarm} is for --algorithm ppo; {self.algorithm} takes log or stop")
        check_trl(self.algorithm, self.completions_per_prompt)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in PPO_ONLY and value not in (field.default, _OFF.get(field.name, field.default)):
                raise PoiseError(f"--{field.name.replace('_', '-')} is for --algorithm ppo, not {self.algorithm}")


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Evaluate policies on the benchmarks of the paper, and compare them with the model that training started from."""

    RUN_FOLDER = True

    policies: Annotated[tuple[PolicyModel, ...], EachOnce(policy_in)] = ()
    """`poise train-policy` runs, model folders or hub ids."""
    model: PolicyModel = DEFAULT_MODEL
    """The model before training, folder or hub id: differences are taken against it."""
    data: str = ""
    """Folder of the benchmarks' rows, NAME.jsonl or NAME.jsonl.gz, evaluated zero-shot and without a network; default:
    the harness's own tasks, from the model hub."""
    tasks: Annotated[tuple[str, ...], EachOnce()] = DEFAULT_TASKS
    """Benchmarks to evaluate on; bbh is a 17th."""
    rows: WholeNumber = 100
    """Rows of each benchmark, at most, from the beginning; 0: all. Without --data each part of a benchmark takes the
    same number, rounded up: 100 become 114 of mmlu, which has 57 parts, and 108 of bbh, which has 27."""
    batch_size: Count = 8
    """Requests at a time; fewer where they are long."""
    max_tokens: Count = MAX_TOKENS
    """Longest completion of the generative benchmarks (gsm8k, bbh), in tokens."""
    output: str = "runs/benchmarks"
    """Run folder to write."""

    def check(self) -> None:
        """As `Settings.check`, and that there are such benchmarks."""
        super().check()
        check_tasks(self.tasks, self.data)
        start = os.path.realpath(policy_in(self.model))
        if again := [policy for policy in self.policies if os.path.realpath(policy_in(policy)) == start]:
            raise PoiseError(f"--policies {again[0]} is --model, which every policy is compared with")


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Fold a policy's LoRA adapters into its language model, for tools that know no adapters."""

    policy: Annotated[tyro.conf.Positional[PolicyModel], tyro.conf.arg(metavar="POLICY")]
    """Policy: a `poise train-policy` run, or the `policy` folder in it."""
    output: str
    """Folder to write; it must not exist, or be empty."""

    def check(self) -> None:
        """As for every command; there is a policy, and no output yet."""
        super().check()
        policy_folder(self.policy)
        target = Path(self.output)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise PoiseError(f"--output {target} exists; choose another folder or delete it")
