"""Linear heads on trunk features: the Bradley-Terry head, its Laplace posterior, and the K Gaussian heads.

Everything here works on features computed once, in float64, centered and scaled per dimension on the training part.

Shapes: _N pairs, _H hidden, _K heads, _L labels.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from poise.functional.objectives import HeadRewards
from poise.functional.reward_losses import CENTERING, HEAD_LOSSES, HeadLoss, bradley_terry, probit_pairs
from poise.models.reward_model import HeadLayout
from poise.reward.config import HeadLossName
from poise.reward.pairs import FeaturePairs
from poise.reward.shards import Shards
from poise.runtime.progress import progress
from poise.runtime.run_folder import Json

STD_COLLAPSE = 10.0  # warn if the median std falls by this factor while validation MSE is flat

PRIORS = [10.0 ** (power / 2) for power in range(9)]  # precisions that stage 1 chooses from

WITHIN_ONE_STD = math.erf(0.5**0.5)  # probability of |z| < 1 for a standard Gaussian, 0.6827


class Heads(NamedTuple):
    """Linear heads on centered and scaled features: rewards are features @ weight.T - offset."""

    weight_LH: Float[Tensor, "labels hidden"]
    offset_L: Float[Tensor, " labels"]
    kind: Literal["gaussian", "point"]

    def on_raw_features(
        self, center: Float[Tensor, " hidden"], scale: Float[Tensor, " hidden"], reward_scale: float
    ) -> tuple[Float[Tensor, "labels hidden"], HeadLayout]:
        """The same heads for features as the trunk gives them, float32: w.(x - c)/s - o = (w/s).x - (o + (w/s).c)."""
        weight = self.weight_LH / scale
        num_heads = len(weight) // (2 if self.kind == "gaussian" else 1)
        offset = tuple((self.offset_L + weight @ center).tolist())
        return weight.float(), HeadLayout(num_heads, self.kind, offset, reward_scale=reward_scale)


# ---- stage 1 and its posterior ----


def penalized_loss(
    pairs: FeaturePairs, weight: Float[Tensor, " hidden"], precision: float, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """N * bradley_terry(w) + precision/2 |w|^2: the loss of stage 1, whose Hessian `posterior_factor` inverts."""
    chosen, rejected = pairs.chosen_NH @ weight, pairs.rejected_NH @ weight
    loss = len(chosen) * bradley_terry(chosen, rejected, pairs.margin_N, label_smoothing=label_smoothing)
    return loss + precision / 2 * weight.square().sum()


def fit_bradley_terry(pairs: FeaturePairs, precision: float, label_smoothing: float = 0.0) -> Float[Tensor, " hidden"]:
    """argmin_w `penalized_loss`, to convergence: the MAP under w ~ N(0, I/precision)."""
    weight = torch.zeros(pairs.chosen_NH.shape[1], dtype=pairs.chosen_NH.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalized_loss(pairs, weight, precision, label_smoothing)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def fit_ensemble(
    pairs: FeaturePairs, precision: float, num_heads: int, generator: torch.Generator, label_smoothing: float
) -> Float[Tensor, "heads hidden"]:
    """K Bradley-Terry heads, each on a bootstrap of the pairs (as many, drawn with replacement).

    The ensemble of arXiv 2310.02743 for linear heads, whose loss has one minimum: other seeds on the same pairs would
    be the same head.
    """
    count = len(pairs.chosen_NH)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(num_heads)]
    return torch.stack([fit_bradley_terry(pairs.rows(rows), precision, label_smoothing) for rows in drawn])


def choose_prior(
    fit: FeaturePairs, held: FeaturePairs, label_smoothing: float = 0.0
) -> tuple[float, Float[Tensor, " hidden"]]:
    """`best_prior`, with a bar."""
    with progress("reward model: Bradley-Terry head", len(PRIORS)) as advance:
        return best_prior(fit, held, label_smoothing, advance)


def best_prior(
    fit: FeaturePairs,
    held: FeaturePairs,
    label_smoothing: float = 0.0,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[float, Float[Tensor, " hidden"]]:
    """(precision, weights): of a grid of priors, the one with the lowest validation loss on preferences.

    advance: told after each prior.
    """
    fitted = []
    for precision in PRIORS:
        weight = fit_bradley_terry(fit, precision, label_smoothing)
        # Margins and smoothing shape the fit; the prior is chosen by how well the fit predicts preferences.
        loss = bradley_terry(held.chosen_NH @ weight, held.rejected_NH @ weight, centering=0.0)
        fitted.append((loss.item(), precision, weight))
        advance(1)
    _, precision, weight = min(fitted, key=lambda entry: entry[0])
    return precision, weight


def posterior_factor(
    pairs: FeaturePairs, weight: Float[Tensor, " hidden"], precision: float
) -> Float[Tensor, "hidden hidden"]:
    """F with F F^T = H^-1, the covariance of the Laplace posterior N(w, H^-1) of the Bradley-Terry head at its MAP.

    H = sum_i [p_i (1 - p_i) d_i d_i^T + 2 c t_i t_i^T] + precision I is the Hessian of `penalized_loss`, with d and t
    the difference and the sum of a pair's features, p = sigmoid(w.d - margin) and c = CENTERING.
    Label smoothing does not change H: log sigmoid(x) and log sigmoid(-x) have the same second derivative.
    """
    difference = pairs.difference_NH
    probability = torch.sigmoid(difference @ weight - pairs.margin_N)
    hessian = difference.T @ (difference * (probability * (1 - probability)).unsqueeze(-1))
    together = pairs.chosen_NH + pairs.rejected_NH
    hessian = hessian + 2 * CENTERING * together.T @ together + precision * torch.eye(len(weight), dtype=weight.dtype)
    # For H = L L^T, F = L^-T.
    identity = torch.eye(len(weight), dtype=weight.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(hessian).T, identity, upper=True)


def draw_posterior(
    weight: Float[Tensor, " hidden"], factor: Float[Tensor, "hidden hidden"], num_draws: int, generator: torch.Generator
) -> Float[Tensor, "draws hidden"]:
    """Draws w + F z of the posterior, as K heads.

    They are shifted and rescaled: their mean is exactly w, so on average they order texts as the single head does, and
    their expected covariance stays F F^T.
    """
    noise = torch.randn(num_draws, len(weight), generator=generator, dtype=weight.dtype)
    draws = noise @ factor.T
    return weight + (draws - draws.mean(0)) * (num_draws / (num_draws - 1)) ** 0.5


# ---- stage 2: the BRME heads ----


class Targets(NamedTuple):
    """What Gaussian heads are fitted to: a reward for each text, in the order of `FeaturePairs.texts_NH`. _T texts."""

    fit_T: Float[Tensor, " fit"]
    held_T: Float[Tensor, " held"]

    @classmethod
    def of(cls, single: Heads, fit: FeaturePairs, held: FeaturePairs) -> "Targets":
        """The standardized stage-1 reward."""
        weight = single.weight_LH[0]
        return cls(*(part.texts_NH @ weight - single.offset_L for part in (fit, held)))


def train_heads(
    fit: FeaturePairs,
    held: FeaturePairs,
    targets: Targets,
    shards: Shards,
    generator: torch.Generator,
    *,
    loss_name: HeadLossName,
    num_steps: int,
    learning_rate: float,
    initial_std: float,
) -> tuple[Heads, list[Json]]:
    """(K Gaussian heads, history of validation error), all K in one product and one optimizer.

    initial_std: of the first weights of the means. At the scale of the stage-1 weights, directions that a head's shard
    does not determine keep their random first values, so heads agree only where they have data.
    Each head keeps the weights of its lowest validation loss; training stops when no head has improved for ten
    evaluations.
    """
    num_heads, hidden = shards.fit_NK.shape[1], fit.chosen_NH.shape[1]
    mask_TK, held_mask_TK = (mask.repeat(2, 1).double() for mask in shards)
    texts, held_texts = fit.texts_NH, held.texts_NH
    target, held_target = targets
    loss_of = head_loss(loss_name)
    weight = torch.randn(2 * num_heads, hidden, generator=generator, dtype=texts.dtype) * initial_std
    weight[num_heads:] = 0.0  # stds start equal everywhere
    weight.requires_grad_()
    bias = torch.zeros(2 * num_heads, dtype=texts.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    layout = HeadLayout(num_heads, "gaussian", (0.0,) * (2 * num_heads))
    history: list[Json] = []
    best = _BestHeads(weight, bias)
    with progress("reward model: BRME heads", num_steps) as advance:
        for step in range(num_steps):
            heads = layout.decode(texts @ weight.T + bias)
            noise = torch.randn(heads.mean.shape, generator=generator, dtype=texts.dtype)
            loss = loss_of(heads.mean, heads.std, noise, target, mask_TK)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(1)
            if step % 20 == 19 or step + 1 == num_steps:
                with torch.no_grad():
                    heads = layout.decode(held_texts @ weight.T + bias)
                value_K = _loss_of_each(loss_of, heads, held_target, held_mask_TK)
                error = ((heads.mean - held_target.unsqueeze(-1)).square() * held_mask_TK).sum() / held_mask_TK.sum()
                history.append(
                    {"step": step + 1, "loss": value_K.sum().item(), "mse": error.item(),
                     "std": heads.std.median().item()}
                )  # fmt: skip
                best.keep(value_K, weight, bias)
                if best.evaluations_without_gain == 10:
                    break
    return Heads(best.weight, -best.bias, "gaussian"), history


class _BestHeads:
    """Each head's weights and bias at its lowest validation loss so far."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight, self.bias = weight.detach().clone(), bias.detach().clone()
        self.loss_K = torch.full((len(bias) // 2,), float("inf"), dtype=bias.dtype)
        self.evaluations_without_gain = 0

    def keep(self, loss_K: Tensor, weight: Tensor, bias: Tensor) -> None:
        better = loss_K < self.loss_K
        self.loss_K = torch.where(better, loss_K, self.loss_K)
        labels = better.repeat(2)
        self.weight[labels], self.bias[labels] = weight.detach()[labels], bias.detach()[labels]
        self.evaluations_without_gain = 0 if better.any() else self.evaluations_without_gain + 1


def _loss_of_each(loss_of: HeadLoss, heads: HeadRewards, target: Tensor, mask_TK: Tensor) -> Float[Tensor, " heads"]:
    """The loss of every head alone, without noise."""
    alone = zip(heads.mean.split(1, -1), heads.std.split(1, -1), mask_TK.split(1, -1), strict=True)
    return torch.stack([loss_of(mean, std, torch.zeros_like(mean), target, mask) for mean, std, mask in alone])


def head_loss(name: HeadLossName) -> HeadLoss:
    """The loss of that name; for `probit_pairs` the first half of the rows must be chosen, the second rejected."""
    return _pair_loss if name == "probit_pairs" else HEAD_LOSSES[name]


def _pair_loss(mean: Tensor, std: Tensor, _noise: Tensor, _target: Tensor, mask: Tensor) -> Tensor:
    """`probit_pairs` in the form of the other losses."""
    (chosen_mean, rejected_mean), (chosen_std, rejected_std) = mean.chunk(2), std.chunk(2)
    return probit_pairs(chosen_mean, chosen_std, rejected_mean, rejected_std, mask.chunk(2)[0])


def fit_std_scale(
    mean: Float[Tensor, "texts heads"], std: Float[Tensor, "texts heads"], target: Float[Tensor, " texts"]
) -> Float[Tensor, " heads"]:
    """Per head, the factor s for which mean ± s std covers 68.3 % of held-out targets, as one std of a Gaussian does.

    s is the 68.3 % quantile of |z|, z = (target - mean) / std: 1 for Gaussian errors of the std that the head reports.
    The most likely s, the root of the mean z^2, would be set by the few texts whose std is far too small.

    >>> round(fit_std_scale(torch.zeros(3, 1), torch.ones(3, 1), torch.tensor([-1.0, 2.0, 3.0])).item(), 4)
    2.3654
    """
    z = ((target.unsqueeze(-1) - mean) / std).abs()
    return torch.stack([own.quantile(WITHIN_ONE_STD) for own in z.unbind(-1)])


def fit_reward_scale(margin: Float[Tensor, " pairs"]) -> float:
    """The c > 0 for which sigmoid(c * margin) best predicts held-out preferences, as `HeadLayout.reward_scale`.

    margin: reward of the chosen text minus that of the rejected one, mean over heads.
    For heads of `probit_pairs`, P = Phi(margin / sqrt(1 + std+^2 + std-^2)). Phi(x) is within .01 of sigmoid(1.702 x),
    so c is about 1.702 / sqrt(1 + std+^2 + std-^2) where they are right. Fitting c also corrects heads that overfit.
    A human choice counts as (n + 1) / (n + 2) instead of 1 (Platt 1999): c is finite if all margins are positive.
    """
    wrong = 1 / (len(margin) + 2)

    def loss(log_scale: float) -> float:
        logit = math.exp(log_scale) * margin
        return ((1 - wrong) * F.softplus(-logit) + wrong * F.softplus(logit)).mean().item()

    reach = math.log(1e4 / margin.abs().mean().clamp_min(1e-12).item())
    return math.exp(minimize_scalar(loss, bounds=(reach - 2 * math.log(1e4), reach), method="bounded").x)


def std_collapsed(history: list[Json]) -> bool:
    """True if the std fell by more than STD_COLLAPSE between two evaluations whose MSE differs by less than 5 %."""
    return any(
        early["std"] > STD_COLLAPSE * late["std"] and abs(late["mse"] - early["mse"]) < 0.05 * early["mse"]
        for i, early in enumerate(history)
        for late in history[i + 1 :]
    )
