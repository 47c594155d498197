"""The settings of policy optimization: the one place for their defaults, their help texts and what may be wrong."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from poise.data.preferences import OnBadRow
from poise.errors import PoiseError
from poise.functional.monitor import MonitorConfig
from poise.functional.objectives import Shaping, parameter, parse_objective
from poise.models.loading import DEFAULT_MODEL
from poise.models.policy import Tune, ValueTrunk
from poise.runtime import distributed as processes
from poise.runtime.trackers import check_trackers

PPO_ONLY = {
    "value_learning_rate", "accumulation", "value_clip", "discount", "trace", "whiten_advantages", "entropy_coef",
    "max_step_kl", "tune", "value_trunk", "final_parameter", "reward_norm", "shaping", "baselines", "kl_target",
    "missing_eos_penalty", "settle", "eval_every", "eval_tasks", "eval_data", "eval_rows",
}  # fmt: skip


def unread_settings(algorithm: str) -> set[str]:
    """Names of the settings that an algorithm does not read."""
    return set() if algorithm == "ppo" else PPO_ONLY


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """The settings of PPO itself."""

    learning_rate: float = 1e-3
    """Learning rate of the policy (Adam). For --tune full choose 1e-6 to 1e-5."""
    value_learning_rate: float = 1e-3
    """Learning rate of the value head, and of its trunk with --value-trunk own (Adam)."""
    num_epochs: int = 2
    """Passes over each step's completions."""
    num_minibatches: int = 2
    """Minibatches per pass; they and the processes must divide the prompts per step."""
    accumulation: int = 1
    """Parts in which a minibatch is computed, to save memory; the result is the same."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float = 0.2
    """Clip range of the values."""
    discount: float = 1.0
    """γ of the advantage estimate."""
    trace: float = 0.95
    """λ of the advantage estimate."""
    whiten_advantages: bool = True
    """Give each step's advantages mean 0 and variance 1."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per token; above 0 an update takes about 1.5 times as long."""
    max_step_kl: float | None = None
    """Leave the remaining minibatches of a step once KL(old policy || new) exceeds this, in nats per token."""
    max_grad_norm: float = 1.0
    """The gradients of the policy and of the values are each scaled down to this norm."""
    tune: Tune = "lora"
    """`lora` adapters, or all weights of the layers (`full`)."""
    adapted_layers: int = 10
    """Upper layers that are trained; 0 trains all. The frozen ones below are computed once."""
    lora_rank: int = 16
    """Rank of the LoRA, on all linear maps of a layer."""
    value_trunk: ValueTrunk = "shared"
    """Values from the policy's own last hidden states, or from trained layers of their `own`."""

    def check(self) -> None:
        """Raise PoiseError for settings out of range."""
        for name in ("num_epochs", "num_minibatches", "accumulation", "lora_rank"):
            if getattr(self, name) < 1:
                raise PoiseError(f"--{name.replace('_', '-')} must be at least 1")
        for name in ("learning_rate", "value_learning_rate", "clip", "value_clip", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise PoiseError(f"--{name.replace('_', '-')} must be above 0")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise PoiseError(f"--{name} must be in [0, 1], got {getattr(self, name)}")
        if self.entropy_coef < 0:
            raise PoiseError(f"--entropy-coef must be at least 0, got {self.entropy_coef}")
        if self.max_step_kl is not None and self.max_step_kl <= 0:
            raise PoiseError(f"--max-step-kl must be above 0, got {self.max_step_kl}; leave it out for no limit")


@dataclass(frozen=True, kw_only=True)
class Config(PpoConfig):
    """Train a policy by PPO against a reward model, with the objective of your choice."""

    prompts: str
    """JSON lines with `prompt`: text, or a conversation."""
    reward: str
    """Reward model: checkpoint folder, hub id, `poise train-reward` run, or an ensemble."""
    output: str = "runs/policy"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the language model to train."""
    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    """`ppo` is our own; `rloo` and `grpo` (no values) are TRL's, with this reward: pip install 'poise-rlhf[trl]'."""
    objective: str = "tradeoff(0.4)"
    """How the heads become one reward: nominal, worst_case, tradeoff(λ), mean, median, random_head, quantile(q),
    uncertainty_weighted(c), lower_confidence(c), soft_min(t), expected_worst_case, expected_tradeoff(λ),
    constant(v)."""
    final_parameter: float | None = None
    """Move the objective's parameter linearly from its own value to this one by the last step."""
    reward_norm: Literal["initial", "running", "batch"] = "initial"
    """Completions whose mean and std scale the reward: the initial policy's, all so far (running), or the batch's."""
    reward_ceiling: float | None = None
    """Upper bound of the reward, in stds of its scale. One in forty of the initial policy's completions exceeds 2."""
    settle: bool = False
    """Scale the policy's learning rate by the distance of the step's mean reward to --reward-ceiling: training slows to
    zero as the mean reward reaches the ceiling."""
    reward_floor: float | None = None
    """Lower bound of the reward, in stds of its scale."""
    shaping: Shaping = "none"
    """Compare each head's score of a completion with its scores of other completions of the prompt: `contrastive`
    (minus their mean) or `par` (probability of being preferred to them)."""
    baselines: str = ""
    """File of `prompt`, `completion` rows for --shaping; default: completions of the initial policy."""
    baselines_per_prompt: int = 4
    """Completions of the initial policy per prompt for --shaping, if --baselines names no file."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a completion that was cut off at --max-tokens."""
    kl_coef: float = 0.05
    """β: weight of the KL to the initial policy, per nat, against a reward of std 1."""
    kl_target: float | None = None
    """Adapt β to hold the KL of a completion at this many nats."""
    kl_horizon: float = 10_000.0
    """Completions over which β adapts."""
    num_steps: int = 40
    """PPO steps."""
    prompts_per_step: int = 4
    """Prompts of each step, over all processes."""
    completions_per_prompt: int = 8
    """Completions sampled of each prompt."""
    max_tokens: int = 20
    """Longest completion, in tokens."""
    baseline_completions: int = 64
    """Completions of the initial policy on which the reward's zero and unit are fitted."""
    eval_prompts: str = ""
    """Prompts for the completions in final.jsonl; default: the training prompts."""
    eval_completions: int = 4
    """Completions of each evaluation prompt."""
    eval_every: int = 0
    """Steps between evaluations on benchmarks (benchmarks.jsonl), which also run at step 0 and at the end; 0: none.
    Needs pip install 'poise-rlhf[eval]'."""
    eval_tasks: tuple[str, ...] = ("lambada",)
    """Benchmarks to evaluate on, of those that `poise evaluate-policy` offers."""
    eval_data: str = ""
    """Folder of the benchmarks' rows (NAME.jsonl or .jsonl.gz); default: the model hub."""
    eval_rows: int = 100
    """Rows of each benchmark; a benchmark of several parts from the hub takes a few more."""
    on_alarm: Literal["log", "stop", "rollback", "pessimism"] = "log"
    """What to do at signs of over-optimization: `log` them; `stop` the run; `rollback`: stop and return to the last
    policy that looked safe; `pessimism`: go on with a doubled β and a more pessimistic objective."""
    alarm_threshold: float = MonitorConfig.threshold
    """The monitor raises an alarm above this score."""
    trackers: tuple[str, ...] = ()
    """Trackers to log to as well, through accelerate: tensorboard, wandb, trackio, … (if installed)."""
    save_every: int = 5
    """Steps between checkpoints."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Seed of the prompts' order, the sampling and the minibatches."""

    def check(self) -> None:
        """Raise PoiseError for bad settings, before a model is loaded."""
        super().check()
        objective = parse_objective(self.objective)
        counts = ("num_steps", "prompts_per_step", "completions_per_prompt", "max_tokens", "baseline_completions")
        for name in (*counts, "eval_completions", "eval_rows", "save_every", "baselines_per_prompt"):
            if getattr(self, name) < 1:
                raise PoiseError(f"--{name.replace('_', '-')} must be at least 1")
        shares = self.num_minibatches * processes.num_processes()
        if self.prompts_per_step % shares:
            over = f" × {processes.num_processes()} processes" if processes.num_processes() > 1 else ""
            raise PoiseError(
                f"--num-minibatches {self.num_minibatches}{over} does not divide "
                f"--prompts-per-step {self.prompts_per_step}"
            )
        for name in ("kl_coef", "missing_eos_penalty"):
            if getattr(self, name) < 0:
                raise PoiseError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if self.eval_every < 0 or (self.eval_every and not self.eval_tasks):
            raise PoiseError("--eval-every must be at least 0, and needs --eval-tasks")
        if self.kl_target is not None and (self.kl_target <= 0 or self.kl_horizon <= 0 or self.kl_coef <= 0):
            raise PoiseError("--kl-target needs --kl-target, --kl-horizon and --kl-coef above 0")
        if self.kl_target is not None and self.kl_horizon < self.prompts_per_step * self.completions_per_prompt:
            raise PoiseError(f"--kl-horizon {self.kl_horizon:g} must hold the completions of a step")
        if (self.reward_floor or -math.inf) >= (math.inf if self.reward_ceiling is None else self.reward_ceiling):
            raise PoiseError("--reward-floor must be below --reward-ceiling")
        if self.settle and (self.reward_ceiling is None or self.reward_ceiling <= 0):
            raise PoiseError("--settle needs a --reward-ceiling above 0, the initial policy's mean reward")
        if self.final_parameter is not None:
            if parameter(objective) is None:
                raise PoiseError(f"--final-parameter: {self.objective} has no parameter to move")
            parse_objective(f"{self.objective.partition('(')[0]}({self.final_parameter})")
        if self.baselines and self.shaping == "none":
            raise PoiseError("--baselines is only read with --shaping contrastive or par")
        if self.algorithm != "ppo":
            self._check_without_ppo()
        check_trackers(self.trackers)

    def _check_without_ppo(self) -> None:
        """Raise PoiseError for settings that TRL's trainers would silently ignore."""
        for field in fields(self):
            if field.name in PPO_ONLY and getattr(self, field.name) != field.default:
                raise PoiseError(f"--{field.name.replace('_', '-')} is for --algorithm ppo, not {self.algorithm}")
        if self.on_alarm in ("rollback", "pessimism"):
            raise PoiseError(f"--on-alarm {self.on_alarm} is for --algorithm ppo; {self.algorithm} takes log or stop")
