"""Linear heads on trunk features: the Bradley-Terry head, its Laplace posterior, and the K Gaussian heads.

Everything here works on features computed once, in float64, centered and scaled per dimension on the training part.

Shapes: _N pairs, _H hidden, _K heads, _L labels.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from poise.functional.objectives import HeadRewards
from poise.functional.reward_losses import HEAD_LOSSES, HeadLoss, bradley_terry, probit_pairs
from poise.models.reward_model import HeadLayout
from poise.runtime.progress import progress
from poise.runtime.run_folder import Json

STD_COLLAPSE = 10.0  # a fall of the median std by this factor while validation MSE is flat is said aloud

ShardKind = Literal["disjoint", "cluster", "source", "bootstrap", "same"]
HeadLossName = Literal["sampled_mse", "gaussian_nll", "beta_nll", "crps", "probit_pairs"]


class Pairs(NamedTuple):
    """Trunk features of N pairs, and by how much the reward of the chosen text must exceed the other's."""

    chosen_NH: Float[Tensor, "pairs hidden"]
    rejected_NH: Float[Tensor, "pairs hidden"]
    margin_N: Float[Tensor, " pairs"]

    def rows(self, index: Tensor) -> "Pairs":
        return Pairs(*(part[index] for part in self))

    def standardized(self, center: Float[Tensor, " hidden"], scale: Float[Tensor, " hidden"]) -> "Pairs":
        return Pairs((self.chosen_NH - center) / scale, (self.rejected_NH - center) / scale, self.margin_N)

    @property
    def difference_NH(self) -> Tensor:
        return self.chosen_NH - self.rejected_NH

    @property
    def texts_NH(self) -> Tensor:
        return torch.cat([self.chosen_NH, self.rejected_NH])


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


def fit_bradley_terry(pairs: Pairs, precision: float, label_smoothing: float = 0.0) -> Float[Tensor, " hidden"]:
    """argmin_w N * bradley_terry(w) + precision/2 |w|^2, to convergence: the MAP under w ~ N(0, I/precision)."""
    weight = torch.zeros(pairs.chosen_NH.shape[1], dtype=pairs.chosen_NH.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = len(pairs.chosen_NH) * _bradley_terry(pairs, weight, label_smoothing=label_smoothing)
        loss = loss + precision / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def fit_ensemble(
    pairs: Pairs, precision: float, num_heads: int, generator: torch.Generator, label_smoothing: float = 0.0
) -> Float[Tensor, "heads hidden"]:
    """K Bradley-Terry heads, each on a bootstrap of the pairs (as many, drawn with replacement).

    The ensemble of arXiv 2310.02743 for linear heads, whose loss has one minimum: other seeds on the same pairs would
    be the same head.
    """
    count = len(pairs.chosen_NH)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(num_heads)]
    return torch.stack([fit_bradley_terry(pairs.rows(rows), precision, label_smoothing) for rows in drawn])


def choose_prior(fit: Pairs, held: Pairs, label_smoothing: float = 0.0) -> tuple[float, Float[Tensor, " hidden"]]:
    """(precision, weights): of a grid of priors, the one with the lowest validation loss on preferences."""
    candidates = [10.0 ** (power / 2) for power in range(9)]
    with progress("reward model: Bradley-Terry head", len(candidates)) as advance:
        fitted = []
        for precision in candidates:
            weight = fit_bradley_terry(fit, precision, label_smoothing)
            # Margins and smoothing shape the fit; what is judged is how well it predicts preferences.
            loss = bradley_terry(held.chosen_NH @ weight, held.rejected_NH @ weight, centering=0.0)
            fitted.append((loss.item(), precision, weight))
            advance(1)
    _, precision, weight = min(fitted, key=lambda entry: entry[0])
    return precision, weight


def _bradley_terry(pairs: Pairs, weight: Tensor, label_smoothing: float) -> Tensor:
    chosen, rejected = pairs.chosen_NH @ weight, pairs.rejected_NH @ weight
    return bradley_terry(chosen, rejected, pairs.margin_N, label_smoothing=label_smoothing)


def posterior_factor(
    pairs: Pairs, weight: Float[Tensor, " hidden"], precision: float
) -> Float[Tensor, "hidden hidden"]:
    """F with F F^T = H^-1, the covariance of the Laplace posterior N(w, H^-1) of the Bradley-Terry head at its MAP.

    H = sum_i p_i (1 - p_i) d_i d_i^T + precision I,  d = feature difference of a pair, p = sigmoid(w.d - margin).
    Label smoothing mixes log sigmoid(x) and log sigmoid(-x), whose second derivatives are the same: H does not see it.
    """
    difference = pairs.difference_NH
    probability = torch.sigmoid(difference @ weight - pairs.margin_N)
    hessian = difference.T @ (difference * (probability * (1 - probability)).unsqueeze(-1))
    hessian = hessian + precision * torch.eye(len(weight), dtype=weight.dtype)
    # For H = L L^T, F = L^-T.
    identity = torch.eye(len(weight), dtype=weight.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(hessian).T, identity, upper=True)


def draw_posterior(
    weight: Float[Tensor, " hidden"], factor: Float[Tensor, "hidden hidden"], num_draws: int, generator: torch.Generator
) -> Float[Tensor, "draws hidden"]:
    """Draws w + F z of the posterior, as K heads. Their mean is moved to w exactly, so that K heads lose nothing
    against the single one on average."""
    noise = torch.randn(num_draws, len(weight), generator=generator, dtype=weight.dtype)
    draws = noise @ factor.T
    return weight + (draws - draws.mean(0)) * (num_draws / (num_draws - 1)) ** 0.5


# ---- stage 2: the BRME heads ----


class Shards(NamedTuple):
    """Which head is trained on which pair, and on which held-out pairs it is judged to stop its training."""

    fit_NK: Bool[Tensor, "fit heads"]
    held_NK: Bool[Tensor, "held heads"]


def make_shards(
    kind: ShardKind,
    fit: Pairs,
    held: Pairs,
    num_heads: int,
    generator: torch.Generator,
    sources: Sequence[str] = (),
    held_sources: Sequence[str] = (),
) -> Shards:
    """Every head gets at least one pair if there are as many pairs as heads.

    A head that owns a cluster or a source is judged on held-out pairs of its own kind, where there are any: judged on
    all, it would be stopped as soon as it knows its own part better than the rest.
    sources, held_sources: one name per pair, for `source`; the sources share the heads out among them.
    """
    count = len(fit.chosen_NH)
    all_held = torch.ones(len(held.chosen_NH), num_heads, dtype=torch.bool)
    if kind == "same":
        return Shards(torch.ones(count, num_heads, dtype=torch.bool), all_held)
    if kind == "bootstrap":
        return Shards(torch.rand(count, num_heads, generator=generator) < 0.8, all_held)
    if kind == "disjoint":
        return Shards(F.one_hot(torch.randperm(count, generator=generator) % num_heads, num_heads).bool(), all_held)
    if kind == "cluster":
        from sklearn.cluster import KMeans

        seed = int(torch.randint(2**31, (1,), generator=generator))
        kmeans = KMeans(min(num_heads, count), n_init=4, random_state=seed)
        fit_owner = kmeans.fit_predict(((fit.chosen_NH + fit.rejected_NH) / 2).numpy())
        held_owner = kmeans.predict(((held.chosen_NH + held.rejected_NH) / 2).numpy())
        fit_mask, held_mask = (
            F.one_hot(torch.tensor(owner).long(), num_heads).bool() for owner in (fit_owner, held_owner)
        )
    else:
        fit_mask = F.one_hot(_owner_by_source(sources, num_heads, generator), num_heads).bool()
        held_mask = torch.zeros_like(all_held)
        for i, source in enumerate(held_sources):
            mine = torch.tensor([other == source for other in sources])
            held_mask[i] = fit_mask[mine].any(0)
    return Shards(fit_mask, held_mask | ~held_mask.any(0))


def _owner_by_source(sources: Sequence[str], num_heads: int, generator: torch.Generator) -> Tensor:
    """Each pair's head. More sources than heads: the next largest joins the head with fewest pairs. Fewer: the
    largest share per head is split further, at random."""
    owner = torch.zeros(len(sources), dtype=torch.long)
    members = {name: [i for i, source in enumerate(sources) if source == name] for name in dict.fromkeys(sources)}
    load = [0] * num_heads
    parts = sorted(members.values(), key=len, reverse=True)
    while len(parts) < num_heads and len(parts[0]) > 1:
        largest = parts.pop(0)
        order = torch.randperm(len(largest), generator=generator).tolist()
        half = len(largest) // 2
        parts += [[largest[i] for i in order[:half]], [largest[i] for i in order[half:]]]
        parts.sort(key=len, reverse=True)
    for part in parts:
        head = load.index(min(load))
        owner[torch.tensor(part)] = head
        load[head] += len(part)
    return owner


class Targets(NamedTuple):
    """What Gaussian heads are fitted to: a reward for each text, in the order of `Pairs.texts_NH`. _T texts."""

    fit_T: Float[Tensor, " fit"]
    held_T: Float[Tensor, " held"]

    @classmethod
    def of(cls, single: Heads, fit: Pairs, held: Pairs) -> "Targets":
        """The standardized stage-1 reward."""
        weight = single.weight_LH[0]
        return cls(*(part.texts_NH @ weight - single.offset_L for part in (fit, held)))


def train_heads(
    fit: Pairs,
    held: Pairs,
    targets: Targets,
    shards: Shards,
    generator: torch.Generator,
    *,
    loss_name: HeadLossName = "sampled_mse",
    num_steps: int = 600,
    learning_rate: float = 3e-3,
    initial_std: float = 0.1,
) -> tuple[Heads, list[Json]]:
    """(K Gaussian heads, history of validation error), all K in one product and one optimizer.

    initial_std: of the first weights of the means. At the scale of the stage-1 weights, what a head's shard does not
    determine stays as it was drawn: the heads agree only where they have data.
    Each head is left where its own validation loss was lowest; training stops when none has improved for ten
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
    best_weight, best_bias = weight.detach().clone(), bias.detach().clone()
    best_K = torch.full((num_heads,), float("inf"), dtype=texts.dtype)
    stale = 0
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
                better = value_K < best_K
                best_K = torch.where(better, value_K, best_K)
                labels = better.repeat(2)
                best_weight[labels], best_bias[labels] = weight.detach()[labels], bias.detach()[labels]
                stale = 0 if better.any() else stale + 1
                if stale == 10:
                    break
    return Heads(best_weight, -best_bias, "gaussian"), history


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
    """Per head, the factor s on its std that maximizes the likelihood N(target; mean, (s std)^2) of held-out texts.

    s^2 = mean(((target - mean) / std)^2), in closed form.
    """
    return ((target.unsqueeze(-1) - mean) / std).square().mean(0).sqrt()


def std_collapsed(history: list[Json]) -> bool:
    """Did the std fall by more than STD_COLLAPSE over a stretch in which validation MSE moved by less than 5 %?"""
    return any(
        early["std"] > STD_COLLAPSE * late["std"] and abs(late["mse"] - early["mse"]) < 0.05 * early["mse"]
        for i, early in enumerate(history)
        for late in history[i + 1 :]
    )
