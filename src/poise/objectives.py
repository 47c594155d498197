"""Objectives: how the K heads of a reward model become one reward.

Every function reduces the last axis (heads, K) of a `HeadRewards` and leaves the others alone, so the same
code serves one text, a batch, a pool of completions or a whole study. Training, best-of-n, the command line and
the report all call these functions; none has a second copy of a formula.

Variance is always the population variance (divided by K).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.errors import PoiseError


class HeadRewards(NamedTuple):
    """What K heads say of some texts, in units of the standardised training reward.

    mean: (..., K) each head's reward.
    std:  (..., K) each head's own std, >= 0 (all zero for point heads).
    """

    mean: Float[Tensor, "*batch heads"]
    std: Float[Tensor, "*batch heads"]


def nominal(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Mean of the head with the lowest std, chosen per sample (arXiv 2409.15360). Ties: the first head.

    >>> nominal(HeadRewards(torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.1]))).item()
    4.0
    """
    return heads.mean.gather(-1, nominal_head(heads).unsqueeze(-1)).squeeze(-1)


def nominal_head(heads: HeadRewards) -> Tensor:
    """Index of the head `nominal` reads, (...) integers."""
    return heads.std.argmin(-1)


def worst_case(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """min_k mean_k; "worst-case optimisation" of arXiv 2310.02743.

    >>> worst_case(HeadRewards(torch.tensor([1.0, 4.0]), torch.zeros(2))).item()
    1.0
    """
    return heads.mean.amin(-1)


def tradeoff(heads: HeadRewards, nominal_weight: float = 0.4) -> Float[Tensor, "*batch"]:
    """lambda * nominal + (1 - lambda) * worst case, per sample (arXiv 2409.15360).

    nominal_weight: lambda in [0, 1]; 1 is `nominal`, 0 is `worst_case`.
    Equal to nominal - (1 - lambda) * gap with gap = nominal - worst_case >= 0: it only ever under-scores.

    >>> tradeoff(HeadRewards(torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.1])), 0.5).item()
    2.5
    """
    if not 0.0 <= nominal_weight <= 1.0:
        raise PoiseError(f"tradeoff's nominal weight must be in [0, 1], got {nominal_weight}")
    return nominal_weight * nominal(heads) + (1.0 - nominal_weight) * worst_case(heads)


def mean(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Plain average of the heads.

    >>> mean(HeadRewards(torch.tensor([1.0, 4.0]), torch.zeros(2))).item()
    2.5
    """
    return heads.mean.mean(-1)


def uncertainty_weighted(heads: HeadRewards, coefficient: float = 0.5) -> Float[Tensor, "*batch"]:
    """mean - c * Var_k mean_k; "uncertainty-weighted optimisation" of arXiv 2310.02743.

    coefficient: c >= 0, in 1/reward; that paper's .5 for best-of-n and .1 for PPO.

    >>> uncertainty_weighted(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 0.5).item()
    1.5
    """
    return mean(heads) - coefficient * disagreement(heads).square()


def lower_confidence(heads: HeadRewards, coefficient: float = 1.0) -> Float[Tensor, "*batch"]:
    """mean - c * Std_k mean_k: a lower confidence bound if the heads are posterior draws.

    >>> lower_confidence(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 1.0).item()
    1.0
    """
    return mean(heads) - coefficient * disagreement(heads)


def soft_min(heads: HeadRewards, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """-t log mean_k exp(-mean_k / t): `mean` as t -> infinity, `worst_case` as t -> 0 (arXiv 2606.09073).

    temperature: t > 0, in reward units.

    >>> round(soft_min(HeadRewards(torch.tensor([0.0, 1.0]), torch.zeros(2)), 1.0).item(), 4)
    0.3799
    """
    if temperature <= 0.0:
        raise PoiseError(f"soft_min's temperature must be > 0, got {temperature}; worst_case is its limit at 0")
    num_heads = heads.mean.shape[-1]
    return -temperature * (torch.logsumexp(-heads.mean / temperature, dim=-1) - math.log(num_heads))


def constant(heads: HeadRewards, value: float = 0.0) -> Float[Tensor, "*batch"]:
    """The control: the same reward for everything. Its expected policy gradient is zero.

    >>> constant(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 2.0).item()
    2.0
    """
    return torch.full_like(heads.mean[..., 0], value)


def disagreement(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Std_k mean_k, population: how far apart the heads are. Zero for a single head."""
    return heads.mean.std(-1, correction=0)


def routing_std(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """min_k std_k: the std of the head `nominal` reads. Under the MSE loss it counts coverage; it is no error bar."""
    return heads.std.amin(-1)


def total_std(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """sqrt(mean_k std_k^2 + Var_k mean_k): the std of the equal mixture of the K Gaussians."""
    return (heads.std.square().mean(-1) + disagreement(heads).square()).sqrt()


Objective = Callable[[HeadRewards], Tensor]


@dataclass(frozen=True)
class RewardScale:
    """Fixed before step 0, on completions of the initial policy, and recorded with the run."""

    head_baseline: tuple[float, ...]
    mean: float
    std: float

    def combine(self, heads: HeadRewards, objective: Objective) -> Tensor:
        """The reward PPO maximises, of any shape of heads (…, K)."""
        return (objective(self.centred(heads)) - self.mean) / self.std

    def centred(self, heads: HeadRewards) -> HeadRewards:
        """Each head less its own mean on the initial policy: the heads then agree where training starts.

        Preferences identify differences of rewards only; a head's constant says nothing, yet would decide which head
        is the worst case.
        """
        return HeadRewards(heads.mean - torch.tensor(self.head_baseline, dtype=heads.mean.dtype), heads.std)

    @classmethod
    def fit(cls, heads: HeadRewards, objective: Objective) -> "RewardScale":
        """From heads (N, K). A constant reward keeps scale 1."""
        unscaled = cls(tuple(heads.mean.mean(0).tolist()), 0.0, 1.0)
        combined = unscaled.combine(heads, objective)
        std = combined.std().item()
        return cls(unscaled.head_baseline, combined.mean().item(), std if std > 1e-6 else 1.0)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        nominal, worst_case, tradeoff, mean, uncertainty_weighted, lower_confidence, soft_min, constant,
    )
}  # fmt: skip

_SPEC = re.compile(r"^\s*(\w+)\s*(?:\(\s*([^()\s]*)\s*\))?\s*$")


def parse_objective(spec: str) -> Objective:
    """The picklable objective a config names: `worst_case`, `tradeoff(0.4)`, `lower_confidence(2)`.

    Raises PoiseError for an unknown name, a parameter that is no number or out of range, or one too many.

    >>> parse_objective("lower_confidence(2)")(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2))).item()
    0.0
    """
    match = _SPEC.match(spec)
    if match is None or match[1] not in OBJECTIVES:
        raise PoiseError(f"unknown objective {spec!r}; choose from {', '.join(OBJECTIVES)}, e.g. tradeoff(0.4)")
    function, argument = OBJECTIVES[match[1]], match[2]
    if argument:
        try:
            function = partial(function, **{_parameter_name(function): float(argument)})
        except (ValueError, StopIteration):
            raise PoiseError(f"objective {spec!r}: {match[1]} takes no parameter {argument!r}") from None
    function(HeadRewards(torch.zeros(1), torch.zeros(1)))  # a parameter out of range is said now, not an hour in
    return function


def _parameter_name(function: Callable[..., Tensor]) -> str:
    return next(name for name in function.__annotations__ if name not in ("heads", "return"))
