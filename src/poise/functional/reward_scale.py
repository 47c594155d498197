"""From heads to the number that PPO maximizes: centered, combined by an objective, on a fixed scale, within bounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from poise.errors import PoiseError
from poise.functional.head_rewards import HeadRewards, Objective
from poise.functional.shapes import checked
from poise.functional.shaping import rows_by_prompt
from poise.functional.statistics import t_interval
from poise.runtime.settings import above, at_least, read_fields

POORLY = 3.0  # an interval whose ends differ by more than this factor says little
_LEAST_STD = 1e-6  # below it rewards are equal, but for rounding


@dataclass(frozen=True)
class RewardScale:
    """Constants that put the combined reward on a scale, recorded with the run.

    By default fixed on completions of the initial policy, so that the KL coefficient keeps its meaning over a run.
    `mean` and `std` are those of the combined reward before the bounds apply.

    floor, ceiling: bounds that the scaled reward is clipped to. A ceiling of 2 is reached by about the best fortieth of
    the initial policy's completions.
    count: completions that `mean` and `std` come from.

    Raises PoiseError for NaN bounds, and where the floor is not below the ceiling: every reward would be equal.
    """

    head_baseline: tuple[float, ...]
    mean: float
    std: Annotated[float, above(0)]
    floor: float = -math.inf
    ceiling: float = math.inf
    count: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        if not self.floor < self.ceiling:  # also where one of them is NaN
            raise PoiseError(f"the reward's floor must be below its ceiling, got {self.floor:g} and {self.ceiling:g}")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise PoiseError(f"the reward's scale needs a finite mean and a std > 0, got {self.mean} and {self.std}")

    def combine(self, heads: HeadRewards, objective: Objective) -> Tensor:
        """The reward PPO maximizes, of any shape of heads (…, K)."""
        return self._scaled(self.combined(heads, objective))

    @checked
    def combined(self, heads: HeadRewards, objective: Objective) -> Tensor:
        """What the objective makes of centered heads (…, K), a copy: (…), before it is scaled.

        Raises PoiseError for an objective that does not return one real number for each; others would be broadcast.
        """
        found, wanted = objective(self.centered(heads.each(torch.clone))), heads.mean.shape[:-1]
        if not isinstance(found, Tensor) or found.shape != wanted or found.is_complex():
            got = f"one of {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            got = "complex numbers" if isinstance(found, Tensor) and found.is_complex() else got
            raise PoiseError(
                f"an objective must return one number per completion, a tensor of shape {tuple(wanted)}; it gave {got}"
            )
        return found if found.is_floating_point() else found.to(heads.mean.dtype)

    def _scaled(self, combined: Tensor) -> Tensor:
        return ((combined - self.mean) / self.std).clamp(self.floor, self.ceiling)

    @checked
    def centered(self, heads: HeadRewards) -> HeadRewards:
        """Each head less its own mean on the initial policy: the heads then agree where training starts.

        Preferences identify differences of rewards only: a head's constant must not decide which is the worst case.
        Raises PoiseError for another number of heads.
        """
        if len(self.head_baseline) != heads.mean.shape[-1]:
            raise PoiseError(f"{heads.mean.shape[-1]} heads on a scale of {len(self.head_baseline)}")
        return heads._replace(mean=heads.mean - torch.tensor(self.head_baseline).to(heads.mean))

    @classmethod
    def fit(
        cls, heads: HeadRewards, objective: Objective, floor: float = -math.inf, ceiling: float = math.inf
    ) -> "RewardScale":
        """From heads (N, K). A constant reward keeps scale 1."""
        return cls.fit_and_combine(heads, objective, floor, ceiling)[0]

    @classmethod
    @checked
    def fit_and_combine(
        cls, heads: HeadRewards, objective: Objective, floor: float = -math.inf, ceiling: float = math.inf
    ) -> "tuple[RewardScale, Tensor]":
        """The scale of heads (N, K), and their rewards (N,) on it. PoiseError for no completion at all."""
        if heads.mean.dim() != 2 or not len(heads.mean):
            raise PoiseError(f"a scale is fitted to heads (N, K) of some completions, not to {tuple(heads.mean.shape)}")
        start = cls(tuple(heads.mean.mean(0).tolist()), 0.0, 1.0, floor, ceiling)
        combined = start.combined(heads, objective)
        scale = start._of(combined)
        return scale, scale._scaled(combined)

    def refitted(self, heads: HeadRewards, objective: Objective) -> "RewardScale":
        """Mean and std of this batch of heads (N, K) alone; the heads' baselines stay."""
        return self._of(self.combined(heads, objective))

    def _of(self, combined: Tensor) -> "RewardScale":
        std = combined.std().item()
        std = std if std > _LEAST_STD else 1.0
        return replace(self, mean=combined.mean().item(), std=std, count=combined.numel())

    def updated(self, heads: HeadRewards, objective: Objective) -> "RewardScale":
        """Mean and std of every completion so far, this batch of heads (N, K) included."""
        new = self.combined(heads, objective)
        count, shift = self.count + new.numel(), new.mean().item() - self.mean
        # Not by the new std: that of equal rewards is 1, as a unit, and would count as a variance of 1.
        squares = self.std**2 * max(self.count - 1, 0) + (new - new.mean()).square().sum().item()
        squares += shift**2 * self.count * new.numel() / count
        std = math.sqrt(squares / max(count - 1, 1))
        return replace(
            self, mean=self.mean + shift * new.numel() / count, std=std if std > _LEAST_STD else 1.0, count=count
        )

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON cannot hold."""
        return {name: value for name, value in vars(self).items() if value not in (math.inf, -math.inf)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "RewardScale":
        """Inverse of `to_json`. Raises PoiseError, one line, for a field that is missing or cannot be."""
        return read_fields(saved, cls, "the saved scale of the reward")


@checked
def std_interval(rewards: Float[Tensor, " completions"], prompts: Sequence[Any]) -> tuple[float, float]:
    """Student's 95 % interval of the std of rewards, by the jackknife over prompts on the log std.

    prompts: of each reward. A prompt's completions resemble one another, so prompts are the independent units. NaN for
    fewer than three prompts, and where the rewards do not differ.
    """
    if len(prompts) != len(rewards):
        raise PoiseError(f"{len(rewards)} rewards of {len(prompts)} prompts; give one of each")
    groups = rows_by_prompt(prompts)
    count = len(groups)
    if count < 3:
        return math.nan, math.nan
    others = torch.ones(count, len(rewards), dtype=torch.bool)
    for group, rows in enumerate(groups):
        others[group, rows] = False
    logs = np.array([part.double().std().log().item() for part in (rewards, *(rewards[kept] for kept in others))])
    if not np.isfinite(logs).all():
        return math.nan, math.nan
    low, high = np.exp(t_interval(count * logs[0] - (count - 1) * logs[1:]))
    return float(low), float(high)


def said_of_unit(std: float, interval: tuple[float, float]) -> str:
    """A line on the reward's unit, and how well it is known.

    >>> said_of_unit(1.25, (1.0, 1.5))
    'unit of the reward: 1.25, 95 % interval 1 to 1.5'
    """
    low, high = interval
    known = f"95 % interval {low:.3g} to {high:.3g}" if math.isfinite(low) else "of too few prompts for an interval"
    line = f"unit of the reward: {std:.3g}, {known}"
    if low * POORLY >= high:
        return line
    return f"{line}; the KL coefficient means as little as this is known: more prompts at the start tell it better"
