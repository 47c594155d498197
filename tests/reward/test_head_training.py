"""The whole head stage, from features to four reward models, on data whose right answer is known."""

import math
from typing import Any

import pytest
import torch

from poise.data.types import Preference
from poise.models.scorer import FeatureExtractor
from poise.reward.config import Config
from poise.reward.head_training import HeadTraining, TrainedModel, train_on_features
from poise.reward.heads import choose_prior, draw_posterior, fit_bradley_terry, fit_reward_scale
from poise.reward.pairs import FeaturePairs, PreferenceSplit

HIDDEN = 5
NO_TRUNK = FeatureExtractor.__new__(FeatureExtractor)  # the head stage passes it through and never calls it


def make_pairs(count: int, seed: int = 0, noise: float = 1.0, margin: float = 0.0) -> FeaturePairs:
    """Raw features, neither centered nor scaled; humans choose by a linear reward and logistic noise of that size."""
    generator = torch.Generator().manual_seed(seed)
    spread, center = torch.tensor([0.5, 1.0, 3.0, 1.0, 2.0]).double(), torch.tensor([4.0, -2.0, 0.0, 1.0, 7.0]).double()
    first, second = center + spread * torch.randn(2, count, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.tensor([2.0, -1.0, 0.3, 0.0, 0.5], dtype=torch.float64)
    logistic = torch.logit(torch.rand(count, generator=generator, dtype=torch.float64))
    keep = ((first - second) @ weight + noise * logistic > 0).unsqueeze(-1)
    chosen, rejected = torch.where(keep, first, second), torch.where(keep, second, first)
    return FeaturePairs(chosen, rejected, torch.full((count,), margin, dtype=torch.float64))


def train(raw: FeaturePairs, **settings: Any) -> tuple[HeadTraining, PreferenceSplit]:
    count = len(raw.margin_N)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    rows = [Preference("p", f"a{i}", f"b{i}") for i in range(count)]
    split = PreferenceSplit(rows, order[count // 5 :], order[: count // 5], torch.Generator().manual_seed(2))
    config = Config("unread", **{"trunk": "frozen", "head_steps": 200, "shards": "bootstrap", **settings})
    return train_on_features(config, split, NO_TRUNK, raw), split


def rewards(model: TrainedModel, features: torch.Tensor) -> torch.Tensor:
    return model.layout.decode(features @ model.weight.double().T).mean


def margins(model: TrainedModel, pairs: FeaturePairs) -> torch.Tensor:
    return (rewards(model, pairs.chosen_NH) - rewards(model, pairs.rejected_NH)).mean(-1)


def nll(scale: float, margin: torch.Tensor) -> float:
    return torch.nn.functional.softplus(-scale * margin).mean().item()


# ---- the scale of preferences ----


def test_reward_scale_of_probit_rewards_is_that_of_the_derivation() -> None:
    """Preferences drawn from P = Phi(margin / sqrt(1 + 2 s^2)): c is 1.702 / sqrt(1 + 2 s^2)."""
    generator = torch.Generator().manual_seed(0)
    for std in (0.1, 1.0):
        width = (1 + 2 * std**2) ** 0.5
        margin, noise = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
        margin = torch.where(margin + width * noise > 0, margin, -margin)
        scale = fit_reward_scale(margin)
        assert scale == pytest.approx(1.702 / width, rel=0.06)
        assert nll(scale, margin) < min(nll(scale * 1.2, margin), nll(scale / 1.2, margin))


def test_reward_scale_stays_finite_and_positive() -> None:
    margin = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    assert 1 < fit_reward_scale(margin) < 20  # all right: one wrong in 22 is assumed
    assert 0 < fit_reward_scale(-margin) < 1e-2
    assert fit_reward_scale(1e6 * margin) == pytest.approx(1e-6 * fit_reward_scale(margin), rel=1e-3)


def test_reward_scale_of_equal_margins_is_known() -> None:
    """n pairs whose margin is m: sigmoid(c m) = (n + 1) / (n + 2), so c = log(n + 1) / m; the least is 1e-4 / m."""
    for count, margin in ((20, 1.0), (20, 4.0), (1, 1.0), (998, 0.5)):
        margins = torch.full((count,), margin, dtype=torch.float64)
        assert fit_reward_scale(margins) == pytest.approx(math.log(count + 1) / margin, rel=1e-3)
    assert fit_reward_scale(torch.full((20,), -2.0, dtype=torch.float64)) == pytest.approx(0.5e-4, rel=0.01)
    assert math.isfinite(fit_reward_scale(torch.zeros(20, dtype=torch.float64)))


@pytest.mark.slow
def test_probit_heads_have_the_scale_at_which_they_predict_best() -> None:
    """Of noisy preferences the stage-1 scale is .58 where 1.0 is best."""
    trained, _ = train(make_pairs(2400, noise=3.0), head_loss="probit_pairs", head_steps=400, head_lr=0.02)
    fresh, model = make_pairs(4000, seed=5, noise=3.0), trained.models["brme"]
    own, scale = margins(model, fresh), model.layout.reward_scale
    best = min((nll(c, own), c) for c in torch.logspace(-1, 1, 81).tolist())[1]
    stage1 = trained.models["single"].layout.reward_scale
    assert scale == pytest.approx(best, rel=0.2)
    assert abs(stage1 - best) > 0.3
    assert nll(scale, own) - nll(best, own) < 0.2 * (nll(stage1, own) - nll(best, own))
    others, _ = train(make_pairs(600), head_loss="crps")
    stage1 = others.models["single"].layout.reward_scale
    assert others.models["brme"].layout.reward_scale == stage1  # these imitate the stage-1 reward


def test_std_of_probit_heads_is_an_error_bar_in_their_own_unit() -> None:
    raw = make_pairs(600)
    trained, split = train(raw, head_loss="probit_pairs", head_steps=600, head_lr=0.02)
    held, model, single = raw.rows(split.validation), trained.models["brme"], trained.models["single"]
    heads = model.layout.calibrated(model.layout.decode(held.texts_NH @ model.weight.double().T))
    target = rewards(single, held.texts_NH) * single.layout.reward_scale / model.layout.reward_scale
    error = target - heads.mean
    error = error - error.median(0).values  # a head's constant has no meaning
    assert ((error.abs() < heads.std).double().mean(0) - 0.683).abs().max() < 0.02


# ---- stage 1, its ensemble and its posterior ----


def separable(count: int, margin: float = 0.0) -> FeaturePairs:
    """Every chosen text lies 2 units above its rejected one on the first axis; other axes hold nothing."""
    raw = make_pairs(count, margin=margin)
    chosen, rejected = torch.zeros(2, count, HIDDEN, dtype=torch.float64)
    chosen[:, 0], rejected[:, 0] = 1.0, -1.0
    return raw._replace(chosen_NH=chosen, rejected_NH=rejected)


def logit_of(model: TrainedModel, pairs: FeaturePairs) -> float:
    """Mean logit of the human choice, by the checkpoint's own scale."""
    return model.layout.reward_scale * margins(model, pairs).mean().item()


@pytest.mark.parametrize("name", ["single", "ensemble", "posterior"])
def test_label_smoothing_keeps_the_logit_at_its_bound(name: str) -> None:
    """All pairs alike: logit((1 - e) / e) but for the prior, which shrinks it a little."""
    pairs = separable(2000)
    smooth, _ = train(pairs, label_smoothing=0.2, head_steps=20)
    plain, _ = train(pairs, head_steps=20)
    assert logit_of(smooth.models[name], pairs) == pytest.approx(math.log(0.8 / 0.2), rel=0.03)
    assert logit_of(plain.models[name], pairs) > 3


@pytest.mark.parametrize("name", ["single", "ensemble", "posterior"])
def test_margins_push_rewards_apart(name: str) -> None:
    near, far = (train(separable(2000, margin), label_smoothing=0.2, head_steps=20)[0] for margin in (0.0, 1.0))
    moved = logit_of(far.models[name], separable(1)) - logit_of(near.models[name], separable(1))
    assert moved == pytest.approx(1.0, rel=0.05)


def test_rewards_of_raw_features_have_mean_0_and_std_1_over_training_texts() -> None:
    raw = make_pairs(300)
    trained, split = train(raw)
    texts = raw.rows(split.train).texts_NH
    single = rewards(trained.models["single"], texts)[:, 0]
    assert single.mean().item() == pytest.approx(0, abs=1e-5)
    assert single.std().item() == pytest.approx(1, abs=1e-5)
    ensemble = rewards(trained.models["ensemble"], texts)
    torch.testing.assert_close(ensemble.mean(0), torch.zeros(5).double(), atol=1e-5, rtol=0)
    brme = rewards(trained.models["brme"], texts)
    assert (brme.mean(0).abs() < 0.1).all()


def test_ensemble_heads_differ_as_a_bootstrap_does() -> None:
    """Without a bootstrap all heads would be one. With it their std is a little below that of the posterior, since the
    prior, which is the same for all, holds them together."""
    raw = make_pairs(600)
    trained, _ = train(raw, num_heads=40, posterior_heads=400, head_steps=20)
    texts = make_pairs(200, seed=3).texts_NH
    spread, expected = (rewards(trained.models[name], texts).std(-1) for name in ("ensemble", "posterior"))
    assert 0.5 < (spread / expected).median() < 1.1


def test_posterior_heads_average_to_the_single_head_and_spread_as_the_last_layer_says() -> None:
    trained, _ = train(make_pairs(300), posterior_heads=400, head_steps=20)
    texts, posterior = make_pairs(50, seed=3).texts_NH, trained.models["posterior"]
    heads = rewards(posterior, texts)
    torch.testing.assert_close(heads.mean(-1), rewards(trained.models["single"], texts)[:, 0], rtol=0, atol=1e-4)
    assert posterior.last_layer is not None
    torch.testing.assert_close(heads.std(-1), posterior.last_layer.std(texts), rtol=0.15, atol=0)


def test_few_posterior_draws_have_the_variance_of_many() -> None:
    """Moving the mean of three draws takes a third of their variance; rescaling gives it back."""
    generator, weight = torch.Generator().manual_seed(0), torch.tensor([1.0, -2.0], dtype=torch.float64)
    factor = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    apart = torch.stack([draw_posterior(weight, factor, 3, generator) - weight for _ in range(5000)])
    assert apart.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(apart.square().mean((0, 1)), torch.tensor([1.0, 9.0]).double(), rtol=0.05, atol=0)


def test_the_prior_is_the_one_that_predicts_held_out_pairs_best() -> None:
    """Thirty pairs of coin tosses in thirty dimensions: the training pairs alone would take the weakest prior."""
    generator = torch.Generator().manual_seed(0)

    def tosses(count: int) -> FeaturePairs:
        chosen, rejected = torch.randn(2, count, 30, generator=generator, dtype=torch.float64)
        return FeaturePairs(chosen, rejected, torch.zeros(count, dtype=torch.float64))

    fit, held = tosses(30), tosses(400)
    precision, weight = choose_prior(fit, held)

    def held_nll(candidate: float) -> float:
        return nll(1.0, held.difference_NH @ fit_bradley_terry(fit, candidate))

    candidates = [10.0 ** (power / 2) for power in range(9)]
    assert precision == min(candidates, key=held_nll) > 100
    torch.testing.assert_close(weight, fit_bradley_terry(fit, precision))


def test_the_prior_is_one_of_a_grid_from_1_to_10_000() -> None:
    """The weakest where held-out pairs are those of the fit, the strongest where they say the opposite."""
    fit = make_pairs(300)
    opposite = fit._replace(chosen_NH=fit.rejected_NH, rejected_NH=fit.chosen_NH)
    assert choose_prior(fit, fit)[0] == 1.0
    assert choose_prior(fit, opposite)[0] == pytest.approx(1e4)
