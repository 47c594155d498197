"""What the files of runs about reward models hold, as their readers need it. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from poise.runtime.settings import Count, NotNegative, WholeNumber


@dataclass(frozen=True)
class Learning:
    """What results.json of `poise train-reward` says of stage 2."""

    std_collapsed: bool = False
    stage2_history: list[dict[str, float | None]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trained(Learning):
    """results.json of `poise train-reward`."""

    num_preferences: Count
    num_train: WholeNumber
    num_validation: Count
    models: dict[str, dict[str, Any]]
    num_truncated: WholeNumber = 0
    split: dict[str, int | str] | None = None  # versions that split pairs at random wrote none


@dataclass(frozen=True)
class Evaluated:
    """reward-N.json of `poise evaluate-reward`: one reward model's results."""

    reward: str
    num_heads: Count
    kind: Literal["gaussian", "point"]
    reward_scale: NotNegative
    num_samples: Count
    num_truncated: WholeNumber
    pairs: dict[str, Any] | None = None
    sets: dict[str, Any] | None = None
    ood: dict[str, Any] | None = None
    ood_auroc: dict[str, Any] | None = None
    learning: dict[str, Any] | None = None
