"""Objectives: how the K heads of a reward model become one reward.

Every function reduces the last axis (heads, K) of a `HeadRewards` and keeps the others. Training, best-of-n, the
command line and the report call these functions; none has a second copy of a formula.

Variance is always the population variance (divided by K).
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from poise.errors import PoiseError
from poise.functional.head_rewards import HeadRewards as HeadRewards
from poise.functional.head_rewards import Objective as Objective
from poise.functional.head_rewards import joined as joined
from poise.functional.objective_names import PARAMETERS, check_parameter, read_objective
from poise.functional.reward_scale import RewardScale as RewardScale
from poise.functional.shapes import checked


@checked
def nominal(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Mean of the head with the lowest std, chosen per sample (arXiv 2409.15360). Ties: the first head.

    >>> nominal(HeadRewards(torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.1]))).item()
    4.0
    """
    return _known(heads.std, heads.mean.gather(-1, nominal_head(heads).unsqueeze(-1)).squeeze(-1))


@checked
def nominal_head(heads: HeadRewards) -> Tensor:
    """Index of the head `nominal` reads, (...) integers."""
    return heads.std.argmin(-1)


@checked
def worst_case(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """min_k mean_k; "worst-case optimization" of arXiv 2310.02743.

    >>> worst_case(HeadRewards(torch.tensor([1.0, 4.0]), torch.zeros(2))).item()
    1.0
    """
    return heads.mean.amin(-1)


@checked
def tradeoff(heads: HeadRewards, nominal_weight: float = 0.4) -> Float[Tensor, "*batch"]:
    """lambda * nominal + (1 - lambda) * worst case, per sample (arXiv 2409.15360).

    nominal_weight: lambda in [0, 1]; 1 is `nominal`, 0 is `worst_case`.
    Equal to nominal - (1 - lambda) * gap with gap = nominal - worst_case >= 0: it only ever under-scores.

    >>> tradeoff(HeadRewards(torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.1])), 0.5).item()
    2.5
    """
    check_parameter("tradeoff", nominal_weight)
    return nominal_weight * nominal(heads) + (1.0 - nominal_weight) * worst_case(heads)


@checked
def mean(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Plain average of the heads.

    >>> mean(HeadRewards(torch.tensor([1.0, 4.0]), torch.zeros(2))).item()
    2.5
    """
    return heads.mean.mean(-1)


@checked
def random_head(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Mean of one head, picked per sample as if at random: the control for `nominal`, which picks by the lowest std.

    The head is the one that 1000 times the sum of the means, modulo K, falls on: a completion keeps its head whatever
    it is scored with.

    >>> random_head(HeadRewards(torch.tensor([0.0, 1.0015]), torch.zeros(2))).item()
    1.0015000104904175
    """
    num_heads = heads.mean.shape[-1]
    # The remainder of a float can round up to K itself.
    picked = (1000.0 * heads.mean.double().sum(-1)).remainder(num_heads).floor().long().clamp(0, num_heads - 1)
    return _known(heads.mean, heads.mean.gather(-1, picked.unsqueeze(-1)).squeeze(-1))


@checked
def uncertainty_weighted(heads: HeadRewards, coefficient: float = 0.5) -> Float[Tensor, "*batch"]:
    """mean - c * Var_k mean_k; "uncertainty-weighted optimization" of arXiv 2310.02743.

    coefficient: c >= 0, in 1/reward; that paper's .5 for best-of-n and .1 for PPO.

    >>> uncertainty_weighted(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 0.5).item()
    1.5
    """
    check_parameter("uncertainty_weighted", coefficient)
    return mean(heads) - coefficient * disagreement(heads).square()


@checked
def lower_confidence(heads: HeadRewards, coefficient: float = 1.0) -> Float[Tensor, "*batch"]:
    """mean - c * Std_k mean_k: a lower confidence bound if the heads are posterior draws.

    >>> lower_confidence(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 1.0).item()
    1.0
    """
    check_parameter("lower_confidence", coefficient)
    return mean(heads) - coefficient * disagreement(heads)


@checked
def typical(heads: HeadRewards, coefficient: float = 1.0) -> Float[Tensor, "*batch"]:
    """mean - c * d: less for a text, the further it lies from the reference texts (`poise.functional.typicality`).

    coefficient: c >= 0, in reward per unit of distance; d has mean 1 over the reference texts. d is quadratic in the
    features and the heads are linear in them, so the optimum is a text like those. A reward floor bounds the penalty.
    Raises PoiseError for heads without a distance.

    >>> typical(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([1.5])), 0.5).item()
    1.25
    """
    check_parameter("typical", coefficient)
    if heads.distance is None:
        raise PoiseError("objective typical needs the distance to reference texts, which this reward model has none of")
    return mean(heads) - coefficient * heads.distance.squeeze(-1).to(heads.mean.dtype)


@checked
def reliable(heads: HeadRewards, coefficient: float = 1.0) -> Float[Tensor, "*batch"]:
    """mean / (1 + c * Var_k mean_k): an uncertain reward counts for less, whether it is high or low.

    coefficient: c >= 0, in 1/reward². If the heads are posterior draws, their mean is a measurement with that variance;
    this is the expected reward after it, where rewards had mean 0 and variance 1/c before. Heads are centered, so 0 is
    the initial policy's mean. arXiv 2606.19818 weighs the advantages of a group in this way.

    >>> reliable(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 1.0).item()
    1.0
    """
    check_parameter("reliable", coefficient)
    return mean(heads) / (1.0 + coefficient * disagreement(heads).square())


@checked
def soft_min(heads: HeadRewards, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """-t log mean_k exp(-mean_k / t): `mean` as t -> infinity, `worst_case` as t -> 0 (arXiv 2606.09073).

    temperature: t > 0, in reward units.

    >>> round(soft_min(HeadRewards(torch.tensor([0.0, 1.0]), torch.zeros(2)), 1.0).item(), 4)
    0.3799
    """
    check_parameter("soft_min", temperature)
    # From the minimum up, and by expm1: at a large t the log of a mean of numbers next to 1 would be one of rounding.
    least = heads.mean.amin(-1, keepdim=True)
    return least.squeeze(-1) - temperature * torch.log1p(torch.expm1((least - heads.mean) / temperature).mean(-1))


@checked
def quantile(heads: HeadRewards, level: float = 0.25) -> Float[Tensor, "*batch"]:
    """The `level` quantile of the head means, linear between them: 0 is `worst_case`, .5 is `median`.

    >>> quantile(HeadRewards(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3)), 0.25).item()
    1.5
    """
    check_parameter("quantile", level)
    if not heads.mean.numel():
        return heads.mean[..., 0]
    least = torch.promote_types(heads.mean.dtype, torch.float32)  # torch has no quantiles of halves
    return heads.mean.to(least).quantile(level, dim=-1).to(heads.mean.dtype)


@checked
def median(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Middle head; the mean of the middle two if their number is even.

    >>> median(HeadRewards(torch.tensor([1.0, 2.0, 9.0, 4.0]), torch.zeros(4))).item()
    3.0
    """
    return quantile(heads, 0.5)


@checked
def expected_tradeoff(heads: HeadRewards, nominal_weight: float = 0.4) -> Float[Tensor, "*batch"]:
    """As `tradeoff`, the worst case being one head for the whole batch: the one whose *mean over the batch* is lowest.

    Its batch mean is lambda E[nominal] + (1 - lambda) min_k E[mean_k], the objective of arXiv 2409.15360 as written;
    the per-sample form is a lower bound, E[min_k] <= min_k E. It couples what is in one call: give it whole batches.

    >>> heads = HeadRewards(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.tensor([[0.1, 0.2], [0.1, 0.2]]))
    >>> expected_tradeoff(heads, 0.0).tolist()  # head 1 has the lower mean, 1.5 against 2
    [3.0, 0.0]
    """
    check_parameter("expected_tradeoff", nominal_weight)
    expected = heads.mean.flatten(0, -2).mean(0) if heads.mean.dim() > 1 else heads.mean
    # Centered heads are equal on the batch they were centered on, but for rounding: ties go to the first head.
    least_favorable = (expected <= expected.min() + 1e-5).int().argmax()
    worst = _known(heads.mean, heads.mean[..., least_favorable])
    return nominal_weight * nominal(heads) + (1.0 - nominal_weight) * worst


@checked
def expected_worst_case(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """`expected_tradeoff` with lambda = 0: the head whose mean over the batch is lowest, min_k E[mean_k].

    >>> expected_worst_case(HeadRewards(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.zeros(2, 2))).tolist()
    [3.0, 0.0]
    """
    return expected_tradeoff(heads, 0.0)


@checked
def constant(heads: HeadRewards, value: float = 0.0) -> Float[Tensor, "*batch"]:
    """The control: the same reward for everything. Its expected policy gradient is zero.

    >>> constant(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)), 2.0).item()
    2.0
    """
    check_parameter("constant", value)
    return torch.full_like(heads.mean[..., 0], value)


@checked
def disagreement(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """Std_k mean_k, population: how far apart the heads are. Zero for a single head."""
    return heads.mean.std(-1, correction=0)


@checked
def routing_std(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """min_k std_k: the std of the head `nominal` reads. Under the MSE loss it counts coverage; it is no error bar."""
    return heads.std.amin(-1)


@checked
def total_std(heads: HeadRewards) -> Float[Tensor, "*batch"]:
    """sqrt(mean_k std_k^2 + Var_k mean_k): the std of the equal mixture of the K Gaussians."""
    return (heads.std.square().mean(-1) + disagreement(heads).square()).sqrt()


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        nominal, worst_case, tradeoff, mean, median, random_head, quantile, uncertainty_weighted, lower_confidence,
        typical, reliable, soft_min, expected_worst_case, expected_tradeoff, constant,
    )
}  # fmt: skip


def parse_objective(spec: str) -> Objective:
    """The picklable objective a config names: `worst_case`, `tradeoff(0.4)`, `lower_confidence(2)`.

    Raises PoiseError for an unknown name, a parameter that is no finite number or out of range, or one too many.

    >>> parse_objective("lower_confidence(2)")(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2))).item()
    0.0
    """
    name, value = read_objective(spec)
    function = OBJECTIVES[name]
    return function if value is None else partial(function, **{_parameter_name(function): value})


@checked
def with_parameter(objective: Objective, value: float) -> Objective:
    """The same objective with another parameter: tradeoff(0.4) -> tradeoff(0.2).

    >>> with_parameter(parse_objective("lower_confidence"), 2.0)(HeadRewards(torch.tensor([1.0, 3.0]), torch.zeros(2)))
    tensor(0.)
    """
    function = objective.func if isinstance(objective, partial) else objective
    return partial(function, **{_parameter_name(function): value})


def more_pessimistic(objective: Objective) -> Objective:
    """The same objective with more weight on the worst case: c doubled; lambda, level and temperature halved.

    Without a parameter it stays as it is, and so does `reliable`, which lowers good rewards and raises bad ones.
    """
    function = objective.func if isinstance(objective, partial) else objective
    value = parameter(objective)
    if value is None or function in (constant, reliable):
        return objective
    value *= 2.0 if function in (uncertainty_weighted, lower_confidence, typical) else 0.5
    allowed = PARAMETERS[function.__name__]
    bounds = (-math.inf, math.inf) if allowed is None else (allowed.allowed.low, allowed.allowed.high)
    return with_parameter(objective, float(min(max(value, bounds[0]), bounds[1])))  # alarms may go on for ever


def parameter(objective: Objective) -> float | None:
    """The value of an objective's parameter; None if it has none.

    >>> parameter(parse_objective("tradeoff(0.4)"))
    0.4
    """
    function = objective.func if isinstance(objective, partial) else objective
    names = [name for name in getattr(function, "__annotations__", ()) if name not in ("heads", "return")]
    if not names or function not in OBJECTIVES.values():  # a function of the user's own has none that we know
        return None
    given = objective.keywords if isinstance(objective, partial) else {}
    return float(given.get(names[0], inspect.signature(function).parameters[names[0]].default))


def _known(heads: Tensor, reward: Tensor) -> Tensor:
    """The reward (...) that was chosen by comparing heads (..., K); NaN where one of them is NaN, as minima are."""
    return torch.where(heads.isnan().any(-1), math.nan, reward)


def _parameter_name(function: Callable[..., Tensor]) -> str:
    return next(name for name in function.__annotations__ if name not in ("heads", "return"))
