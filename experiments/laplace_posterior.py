"""Is the posterior of the Bradley-Terry head, some thirty lines here, what laplace-torch makes of the same head?

    pip install laplace-torch==0.3      # in an environment of its own, beside this package
    OMP_NUM_THREADS=1 python experiments/laplace_posterior.py > results/laplace-DATE.json

Heads are fitted by `choose_prior`, a fifth of the pairs held out: on human preference pairs (features of the frozen
trunk's first layers) and on a synthetic problem of six features, with margins, with and without smoothed labels. At the
same weights and prior precision, three covariances:

    ours          F F^T with F = `posterior_factor`
    laplace_torch the full posterior of laplace-torch, likelihood `reward_modeling`: two logits a pair, its own loss,
                  derivatives and generalized Gauss-Newton matrix (exact here, for the head is linear)
    autograd      the inverse of torch.func.hessian of the loss that the head was fitted with, without its centering
                  term .01 (r+ + r-)^2, and with it

A difference is the largest of any entry, as a share of the largest entry of the reference. `variance_ratio` is the
variance of a held-out pair's reward difference, ours over the reference's: lowest, median, highest. `of_texts`: the
same for rewards of single texts. Draws: `draw_posterior` against the sampler of laplace-torch, as many of both, by the
variance that they give reward differences, over the exact one.
"""

import argparse
import json
from importlib import metadata
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from poise.data.human_ratings import human_ratings, is_held_out, preference_pairs
from poise.functional.reward_losses import bradley_terry
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.reward.heads import choose_prior, draw_posterior, posterior_factor
from poise.reward.pairs import FeaturePairs
from poise.reward.train import pair_features
from poise.runtime.run_folder import Json, environment
from poise.studies import quickstart as recipes

PAIRS, HELD, DRAWS = 400, 80, 20_000


class Reward(nn.Module):
    """Two texts with their margin, [features | margin], to two logits: reward less margin."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, texts: Tensor) -> Tensor:
        return texts[..., :-1] @ self.weight - texts[..., -1]


def peer(pairs: FeaturePairs, weight: Tensor, precision: float) -> Any:
    """The fitted posterior of laplace-torch."""
    chosen = torch.cat([pairs.chosen_NH, pairs.margin_N.unsqueeze(-1)], -1)
    rejected = torch.cat([pairs.rejected_NH, torch.zeros_like(pairs.margin_N).unsqueeze(-1)], -1)
    first_wins = torch.zeros(len(chosen), dtype=torch.long)
    posterior = Laplace(
        Reward(weight), "reward_modeling", subset_of_weights="all", hessian_structure="full", prior_precision=precision
    )
    posterior.fit(DataLoader(TensorDataset(torch.stack([chosen, rejected], 1), first_wins), batch_size=64))
    return posterior


def by_autograd(pairs: FeaturePairs, weight: Tensor, precision: float, smoothing: float, centering: float) -> Tensor:
    """Inverse Hessian of N * bradley_terry + precision/2 |w|^2 at the weights."""

    def loss(w: Tensor) -> Tensor:
        chosen, rejected = pairs.chosen_NH @ w, pairs.rejected_NH @ w
        mean = bradley_terry(chosen, rejected, pairs.margin_N, centering=centering, label_smoothing=smoothing)
        return len(chosen) * mean + precision / 2 * w.square().sum()

    return torch.linalg.inv(torch.func.hessian(loss)(weight))


def variances(rows: Tensor, covariance: Tensor) -> Tensor:
    return ((rows @ covariance) * rows).sum(-1)


def spread(ratio: Tensor) -> list[float]:
    return [round(value, 4) for value in (ratio.min().item(), ratio.median().item(), ratio.max().item())]


def compare(fit: FeaturePairs, held: FeaturePairs, smoothing: float) -> Json:
    precision, weight = choose_prior(fit, held, smoothing)
    factor = posterior_factor(fit, weight, precision)
    ours = factor @ factor.T
    posterior = peer(fit, weight, precision)
    references = {
        "laplace_torch": posterior.posterior_covariance.detach(),
        "autograd": by_autograd(fit, weight, precision, smoothing, centering=0.0),
        "autograd, centering term included": by_autograd(fit, weight, precision, smoothing, centering=0.01),
    }
    found: Json = {"pairs": len(fit.chosen_NH), "hidden": len(weight), "prior_precision": precision}
    for name, reference in references.items():
        found[name] = {
            "largest_relative_difference": ((ours - reference).abs().max() / reference.abs().max()).item(),
            "variance_ratio": spread(variances(held.difference_NH, ours) / variances(held.difference_NH, reference)),
            "of_texts": spread(variances(held.texts_NH, ours) / variances(held.texts_NH, reference)),
        }
    exact = variances(held.difference_NH, ours)
    generator = torch.Generator().manual_seed(0)
    samples = {
        "ours": draw_posterior(weight, factor, DRAWS, generator),
        "laplace_torch": posterior.sample(DRAWS, generator=torch.Generator().manual_seed(0)),
    }
    found["draws"] = {
        name: spread((draws @ held.difference_NH.T).var(0) / exact) for name, draws in samples.items()
    } | {"mean_less_weights": (samples["ours"].mean(0) - weight).abs().max().item()}
    return found


def synthetic(seed: int) -> tuple[FeaturePairs, FeaturePairs]:
    """Six features, a known linear reward, margins between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    first, second = torch.randn(2, PAIRS, 6, generator=generator, dtype=torch.float64)
    keep = (torch.rand(PAIRS, generator=generator) < torch.sigmoid((first - second) @ weight)).unsqueeze(-1)
    margin = torch.rand(PAIRS, generator=generator, dtype=torch.float64)
    pairs = FeaturePairs(torch.where(keep, first, second), torch.where(keep, second, first), margin)
    return pairs.rows(torch.arange(HELD, PAIRS)), pairs.rows(torch.arange(HELD))


def human(extract: FeatureExtractor, seed: int) -> tuple[FeaturePairs, FeaturePairs]:
    """What the quickstart's reward model is trained on, and a fifth of it held out."""
    rated = [text for text in human_ratings() if text.domain in recipes.RATED_DOMAINS and not is_held_out(text.text)]
    raw = pair_features(extract, preference_pairs(rated, recipes.RATED_DOMAINS.__getitem__, PAIRS, seed))
    texts = raw.rows(torch.arange(HELD, PAIRS)).texts_NH
    pairs = raw.standardized(texts.mean(0), texts.std(0).clamp_min(1e-6))
    return pairs.rows(torch.arange(HELD, PAIRS)), pairs.rows(torch.arange(HELD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--layers", type=int, default=recipes.LAPTOP_REWARD.num_layers)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    extract = FeatureExtractor(*load_trunk(options.model, options.layers))
    result: Json = {"peer": f"laplace-torch {metadata.version('laplace-torch')}", "layers": options.layers}
    result["synthetic, with margins"] = [compare(*synthetic(seed), smoothing=0.0) for seed in range(options.seeds)]
    result["synthetic, with margins, labels smoothed by .1"] = [
        compare(*synthetic(seed), smoothing=0.1) for seed in range(options.seeds)
    ]
    of_people = [human(extract, seed) for seed in range(options.seeds)]
    result["human pairs"] = [compare(*pairs, smoothing=0.0) for pairs in of_people]
    result["largest_relative_difference"] = {
        name: max(
            found[name]["largest_relative_difference"]
            for part in result.values()
            if isinstance(part, list)
            for found in part
        )
        for name in ("laplace_torch", "autograd", "autograd, centering term included")
    }
    print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
