"""The settings of `poise trust`; torch is not imported to read them."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from poise.data.preferences import OnBadRow
from poise.functional.objective_names import read_objective
from poise.models.choices import DEFAULT_MODEL
from poise.models.run_heads import refuse_itself, validator_of
from poise.runtime.settings import Count, Language, Positive, Preferences, Prompts, Reward, Seed, at_least
from poise.studies.judge_settings import JudgeSettings


@dataclass(frozen=True)
class TrustConfig(JudgeSettings):
    """What a reward model is worth as something to optimize, before any RL: three questions on one page.

    Room: would more pairs help?  Transfer: does another reward model see what selecting by this one gains?  Labels:
    does a judge whom you trust order the policy's own completions as the reward does? For the last one the first call
    writes OUTPUT/comparisons.jsonl (`id`, `prompt`, `a`, `b`); judge them into OUTPUT/judgments.jsonl, a row each of
    `id` and `better` (a, b or tie), and start the same command again; or name a judge by --page or --judge.
    """

    RUN_FOLDER = True

    reward: Annotated[tyro.conf.Positional[Reward], tyro.conf.arg(metavar="REWARD")]
    """Reward model: checkpoint folder, hub id or `poise train-reward` run."""
    prompts: Prompts
    """JSON lines with `prompt`, on which the policy is going to be trained."""
    model: Language = DEFAULT_MODEL
    """Local folder or hub id of the policy before training."""
    preferences: Preferences = ""
    """Pairs of the kind that the reward model was trained on, for the first question. If its trunk was trained, take
    pairs that it has not seen."""
    validator: Reward | None = ""
    """Another reward model, of other pairs or other features, for the second question. Default: the one that the
    reward's run trained (`poise train-reward --validator-share`), if it did; None: none."""
    objective: str = "mean"
    """How the heads become one reward."""
    kl: Positive = 10.0
    """KL to which you mean to train, in nats: the page says how far what was measured reaches."""
    per_prompt: Annotated[int, at_least(2)] = 32
    """Completions of each prompt."""
    max_tokens: Count = 256
    """Longest completion, in tokens."""
    judged: Count = 50
    """Pairs of the policy's own completions to be judged."""
    output: str = "runs/trust"
    """Run folder to write."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: Seed = 0
    """Of the sampling, the folds and the pairs to judge."""

    def for_command(self) -> "TrustConfig":
        """As `Settings.for_command`."""
        return replace(self, validator=validator_of(self.reward) if self.validator == "" else self.validator)

    def check(self) -> None:
        """As `Settings.check`, the objective, and that the validator is another reward model."""
        super().check()
        read_objective(self.objective)
        if self.validator:
            refuse_itself(self.validator, self.reward)
