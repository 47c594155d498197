"""`poise train-reward`: preferences in; a conventional reward model and two multi-head ones out.

    RUN/single      stage 1: one point head, Bradley-Terry: the conventional reward model
    RUN/brme        stage 2: K Gaussian heads fitted to the standardised stage-1 reward (arXiv 2409.15360)
    RUN/posterior   K point heads drawn from the Laplace posterior of stage 1: their spread grows with the distance
                    from the preference data, which that of the BRME heads hardly does

All three share one trunk, the first layers of the model, frozen; its features are computed once.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from poise.data import OnBadRow, Preference, Sample, read_preferences
from poise.errors import PoiseError
from poise.losses import HEAD_LOSSES, bradley_terry, probit_pairs
from poise.metrics import auroc
from poise.models import DEFAULT_MODEL
from poise.objectives import HeadRewards, disagreement, routing_std
from poise.progress import console, progress
from poise.reward_model import HeadLayout, load_trunk, save_reward_model
from poise.runs import Json, Run
from poise.scorer import FeatureExtractor, Scorer

STD_COLLAPSE = 10.0  # a fall of the median std by this factor while validation MSE is flat is said aloud


@dataclass(frozen=True)
class Config:
    """Train a conventional reward model and a multi-head one from preferences."""

    preferences: str
    """JSON lines with `prompt`, `chosen`, `rejected`."""
    output: str = "runs/reward"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the language model whose first layers become the trunk."""
    num_layers: int = 8
    """Layers of the model to keep as trunk; 0 keeps all."""
    max_length: int = 1024
    """Longest sample in tokens; longer ones lose their oldest tokens, which is reported."""
    validation_share: float = 0.2
    """Share of the preferences held out to choose the prior and to report accuracy."""
    num_heads: int = 5
    """K of the BRME."""
    shards: Literal["disjoint", "cluster", "bootstrap", "same"] = "cluster"
    """Which pairs each BRME head is trained on: its own part (`disjoint` at random, `cluster` by content), a random
    80 % of all (`bootstrap`), or all (`same`)."""
    head_loss: Literal["sampled_mse", "gaussian_nll", "beta_nll", "crps", "probit_pairs"] = "sampled_mse"
    """Loss of stage 2. `sampled_mse` is the paper's: its std counts coverage. The next three are proper scores: their
    std is an error bar, but the head with the lowest is then the least noisy one, not the most knowing. The last
    fits the preferences themselves."""
    head_steps: int = 600
    """Most optimiser steps of stage 2; it stops early when validation error rises."""
    head_lr: float = 3e-3
    """Learning rate of stage 2 (Adam)."""
    posterior_heads: int = 64
    """Heads to draw from the posterior; few leave directions in which they agree by chance, and many cost little."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Of the validation split, the shards and the heads."""


class Features(NamedTuple):
    """Trunk features of N pairs, centred and scaled per dimension on the training part. _H hidden."""

    chosen_NH: Float[Tensor, "pairs hidden"]
    rejected_NH: Float[Tensor, "pairs hidden"]

    def rows(self, index: Tensor) -> "Features":
        return Features(self.chosen_NH[index], self.rejected_NH[index])

    @property
    def difference_NH(self) -> Tensor:
        return self.chosen_NH - self.rejected_NH

    @property
    def texts_NH(self) -> Tensor:
        return torch.cat(self)


class Heads(NamedTuple):
    """Linear heads on centred and scaled features: rewards are features @ weight.T - offset. _L labels."""

    weight_LH: Float[Tensor, "labels hidden"]
    offset_L: Float[Tensor, " labels"]
    kind: Literal["gaussian", "point"]

    def on_raw_features(
        self, centre: Float[Tensor, " hidden"], scale: Float[Tensor, " hidden"]
    ) -> tuple[Float[Tensor, "labels hidden"], HeadLayout]:
        """The same heads for features as the trunk gives them, float32: w.(x - c)/s - o = (w/s).x - (o + (w/s).c)."""
        weight = self.weight_LH / scale
        num_heads = len(weight) // (2 if self.kind == "gaussian" else 1)
        return weight.float(), HeadLayout(num_heads, self.kind, tuple((self.offset_L + weight @ centre).tolist()))


def run(config: Config) -> Run:
    """Train, evaluate and save; a finished run is returned as it is."""
    _check(config)
    out = Run.open(config.output, config)
    if out.results is not None:
        return out
    preferences = read_preferences(config.preferences, config.on_bad_row)
    generator = torch.Generator().manual_seed(config.seed)
    train, validation = _split(len(preferences), config.validation_share, generator)

    classifier, tokenizer, num_layers = load_trunk(config.model, config.num_layers)
    extract = FeatureExtractor(classifier, tokenizer, config.max_length)
    raw = _pair_features(extract, preferences)
    centre, scale = raw.rows(train).texts_NH.mean(0), raw.rows(train).texts_NH.std(0).clamp_min(1e-6)
    features = Features(*((part - centre) / scale for part in raw))
    fit, held = features.rows(train), features.rows(validation)

    precision, weight_H = choose_prior(fit, held)
    rewards = fit.texts_NH @ weight_H
    mean, std = rewards.mean(), rewards.std().clamp_min(1e-12)
    # From here on the stage-1 reward is standardised: mean 0, std 1 over the training texts.
    single = Heads((weight_H / std).unsqueeze(0), (mean / std).unsqueeze(0), "point")
    brme, history = train_heads(fit, held, single, config, generator)
    draws = draw_posterior(fit, weight_H, precision, config.posterior_heads, generator) / std
    posterior = Heads(draws, single.offset_L.expand(len(draws)), "point")

    models: Json = {}
    for name, heads in {"single": single, "posterior": posterior, "brme": brme}.items():
        weight, layout = heads.on_raw_features(centre, scale)
        save_reward_model(out.folder / name, classifier, tokenizer, weight, layout)
        scorer = Scorer(extract, weight, layout)
        models[name] = {"num_heads": layout.num_heads, **_evaluate(scorer, raw.rows(validation))}
    collapsed = std_collapsed(history)
    if extract.num_truncated:
        console.print(f"{extract.num_truncated} samples lost their oldest tokens (longer than {extract.max_length})")
    if collapsed:
        console.print(
            "[bold red]std collapse:[/] the heads' std fell more than 10x while validation error stood still; "
            "do not read it as an error bar"
        )
    out.finish(
        {
            "num_preferences": len(preferences), "num_train": len(train), "num_validation": len(validation),
            "num_truncated": extract.num_truncated, "num_layers": num_layers, "prior_precision": precision,
            "stage1_reward_mean": mean.item(), "stage1_reward_std": std.item(), "stage2_history": history,
            "std_collapsed": collapsed, "models": models,
        }
    )  # fmt: skip
    return out


def _check(config: Config) -> None:
    if config.num_heads < 1 or config.posterior_heads < 2:
        raise PoiseError("--num-heads must be at least 1 and --posterior-heads at least 2")
    if not 0.0 < config.validation_share < 1.0:
        raise PoiseError("--validation-share must be between 0 and 1")


def _split(count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    num_validation = max(1, round(count * share))
    if count - num_validation < 2:
        raise PoiseError(f"{count} preferences are too few to train on")
    order = torch.randperm(count, generator=generator)
    return order[num_validation:], order[:num_validation]


def _pair_features(extract: FeatureExtractor, preferences: list[Preference]) -> Features:
    samples = [Sample(p.prompt, p.chosen) for p in preferences] + [Sample(p.prompt, p.rejected) for p in preferences]
    with progress("reward model: trunk features", len(samples)) as advance:
        features = extract(samples, advance).cpu().double()
    return Features(*features.split(len(preferences)))


# ---- stage 1 and its posterior ----


def fit_bradley_terry(features: Features, precision: float) -> Float[Tensor, " hidden"]:
    """argmin_w N * bradley_terry(w) + precision/2 |w|^2, to convergence: the MAP under w ~ N(0, I/precision)."""
    weight = torch.zeros(features.chosen_NH.shape[1], dtype=features.chosen_NH.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = len(features.chosen_NH) * bradley_terry(features.chosen_NH @ weight, features.rejected_NH @ weight)
        loss = loss + precision / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach()


def choose_prior(fit: Features, held: Features) -> tuple[float, Float[Tensor, " hidden"]]:
    """(precision, weights): of a grid of priors, the one with the lowest validation loss on preferences."""
    candidates = [10.0 ** (power / 2) for power in range(9)]
    with progress("reward model: Bradley-Terry head", len(candidates)) as advance:
        fitted = []
        for precision in candidates:
            weight = fit_bradley_terry(fit, precision)
            loss = bradley_terry(held.chosen_NH @ weight, held.rejected_NH @ weight, centring=0.0)
            fitted.append((loss.item(), precision, weight))
            advance(1)
    _, precision, weight = min(fitted, key=lambda entry: entry[0])
    return precision, weight


def draw_posterior(
    features: Features, weight: Float[Tensor, " hidden"], precision: float, num_draws: int, generator: torch.Generator
) -> Float[Tensor, "draws hidden"]:
    """Draws from the Laplace posterior N(w, H^-1) of the Bradley-Terry head at its MAP.

    H = sum_i p_i (1 - p_i) d_i d_i^T + precision I,  d = feature difference of a pair, p = sigmoid(w.d). The mean of
    the draws is moved to w exactly, so that K heads lose nothing against the single one on average.
    """
    difference = features.difference_NH
    probability = torch.sigmoid(difference @ weight)
    hessian = difference.T @ (difference * (probability * (1 - probability)).unsqueeze(-1))
    hessian = hessian + precision * torch.eye(len(weight), dtype=weight.dtype)
    noise = torch.randn(num_draws, len(weight), generator=generator, dtype=weight.dtype)
    factor = torch.linalg.cholesky(hessian)
    # For H = L L^T, L^-T z has covariance H^-1.
    draws = torch.linalg.solve_triangular(factor.T, noise.T, upper=True).T
    draws = (draws - draws.mean(0)) * (num_draws / (num_draws - 1)) ** 0.5
    return weight + draws


# ---- stage 2: the BRME heads ----


def shard_mask(
    features: Features, num_heads: int, shards: str, generator: torch.Generator
) -> Bool[Tensor, "pairs heads"]:
    """Which head is trained on which pair. Every head gets at least one pair if there are as many pairs as heads."""
    count = len(features.chosen_NH)
    if shards == "same":
        return torch.ones(count, num_heads, dtype=torch.bool)
    if shards == "bootstrap":
        return torch.rand(count, num_heads, generator=generator) < 0.8
    if shards == "cluster":
        from sklearn.cluster import KMeans

        seed = int(torch.randint(2**31, (1,), generator=generator))
        centres = (features.chosen_NH + features.rejected_NH).numpy() / 2
        owner = torch.tensor(KMeans(min(num_heads, count), n_init=4, random_state=seed).fit_predict(centres))
    else:
        owner = torch.randperm(count, generator=generator) % num_heads
    return F.one_hot(owner.long(), num_heads).bool()


def train_heads(
    fit: Features, held: Features, single: Heads, config: Config, generator: torch.Generator
) -> tuple[Heads, list[Json]]:
    """(K Gaussian heads, history): fitted to the standardised stage-1 reward, that of `single`.

    Means start at the prior's own scale, so that what a head's shard does not determine stays as it was drawn: the
    heads agree where they have data. Stops when validation error has not improved for ten evaluations.
    """
    num_heads, hidden = config.num_heads, fit.chosen_NH.shape[1]
    mask = shard_mask(fit, num_heads, config.shards, generator).repeat(2, 1).double()
    single_H = single.weight_LH[0]
    texts, target = fit.texts_NH, fit.texts_NH @ single_H - single.offset_L
    held_texts, held_target = held.texts_NH, held.texts_NH @ single_H - single.offset_L
    head_loss = _pair_loss if config.head_loss == "probit_pairs" else HEAD_LOSSES[config.head_loss]
    weight = torch.randn(2 * num_heads, hidden, generator=generator, dtype=texts.dtype) * single_H.std()
    weight[num_heads:] = 0.0  # stds start equal everywhere
    weight.requires_grad_()
    bias = torch.zeros(2 * num_heads, dtype=texts.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=config.head_lr)
    layout = HeadLayout(num_heads, "gaussian", (0.0,) * (2 * num_heads))
    history: list[Json] = []
    best = (float("inf"), weight.detach().clone(), bias.detach().clone())
    stale = 0
    with progress("reward model: BRME heads", config.head_steps) as advance:
        for step in range(config.head_steps):
            heads = layout.decode(texts @ weight.T + bias)
            noise = torch.randn(heads.mean.shape, generator=generator, dtype=texts.dtype)
            loss = head_loss(heads.mean, heads.std, noise, target, mask)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            advance(1)
            if step % 20 == 19 or step + 1 == config.head_steps:
                with torch.no_grad():
                    heads = layout.decode(held_texts @ weight.T + bias)
                nothing, everything = torch.zeros_like(heads.mean), torch.ones_like(heads.mean)
                value = head_loss(heads.mean, heads.std, nothing, held_target, everything).item()
                error = (heads.mean - held_target.unsqueeze(-1)).square().mean().item()
                history.append({"step": step + 1, "loss": value, "mse": error, "std": heads.std.median().item()})
                stale = 0 if value < best[0] else stale + 1
                if value < best[0]:
                    best = (value, weight.detach().clone(), bias.detach().clone())
                if stale == 10:
                    break
    return Heads(best[1], -best[2], "gaussian"), history


def _pair_loss(mean: Tensor, std: Tensor, _noise: Tensor, _target: Tensor, mask: Tensor) -> Tensor:
    """`probit_pairs` in the form of the other losses: the first half of the rows are chosen, the second rejected."""
    (chosen_mean, rejected_mean), (chosen_std, rejected_std) = mean.chunk(2), std.chunk(2)
    return probit_pairs(chosen_mean, chosen_std, rejected_mean, rejected_std, mask.chunk(2)[0])


def std_collapsed(history: list[Json]) -> bool:
    """Did the std fall by more than STD_COLLAPSE over a stretch in which validation MSE moved by less than 5 %?"""
    return any(
        early["std"] > STD_COLLAPSE * late["std"] and abs(late["mse"] - early["mse"]) < 0.05 * early["mse"]
        for i, early in enumerate(history)
        for late in history[i + 1 :]
    )


# ---- evaluation on held-out preferences ----


def _evaluate(scorer: Scorer, held: Features) -> Json:
    chosen, rejected = scorer.decode(held.chosen_NH.float()), scorer.decode(held.rejected_NH.float())
    margin = (chosen.mean - rejected.mean).mean(-1)
    difference = HeadRewards(chosen.mean - rejected.mean, torch.maximum(chosen.std, rejected.std))
    results: Json = {"validation_accuracy": _accuracy(margin)}
    wrong = (margin < 0).numpy()
    uncertainties = {"disagreement": disagreement(difference), "routing_std": routing_std(difference)}
    if scorer.layout.num_heads > 1 and wrong.any() and not wrong.all():
        results["auroc_wrong_order"] = {
            name: auroc(value.numpy()[wrong], value.numpy()[~wrong])
            for name, value in uncertainties.items()
            if value.std() > 0
        }
    return results


def _accuracy(margin: Tensor) -> float:
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item()
