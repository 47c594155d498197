"""Linear heads: known answers, the posterior's exact covariance, and the facts the method rests on."""

import math

import numpy as np
import pytest
import torch

from conftest import rest_slow
from poise.models.reward_model import LastLayer
from poise.reward.heads import (
    Heads,
    Targets,
    draw_posterior,
    fit_bradley_terry,
    fit_std_scale,
    penalized_loss,
    posterior_factor,
    std_collapsed,
    train_heads,
)
from poise.reward.pairs import FeaturePairs
from poise.reward.shards import Shards, make_shards


def pairs(chosen: torch.Tensor, rejected: torch.Tensor, margin: float = 0.0) -> FeaturePairs:
    return FeaturePairs(chosen, rejected, torch.full((len(chosen),), margin, dtype=torch.float64))


def synthetic(count: int, hidden: int = 6, seed: int = 0) -> tuple[FeaturePairs, torch.Tensor]:
    """Pairs labeled by a known linear reward through the Bradley-Terry model."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linspace(-1, 1, hidden, dtype=torch.float64)
    first, second = torch.randn(2, count, hidden, generator=generator, dtype=torch.float64)
    keep = torch.rand(count, generator=generator) < torch.sigmoid((first - second) @ weight)
    chosen = torch.where(keep.unsqueeze(-1), first, second)
    rejected = torch.where(keep.unsqueeze(-1), second, first)
    return pairs(chosen, rejected), weight


def test_bradley_terry_recovers_a_known_reward() -> None:
    features, weight = synthetic(20_000)
    fitted = fit_bradley_terry(features, precision=1e-6)
    assert torch.cosine_similarity(fitted, weight, dim=0) > 0.999  # centering shrinks it, but keeps the direction
    silent = pairs(features.difference_NH / 2, -features.difference_NH / 2)  # r+ + r- = 0: no centering
    torch.testing.assert_close(fit_bradley_terry(silent, precision=1e-6), weight, rtol=0, atol=0.06)


def test_the_loss_of_stage_one_equals_values_worked_out_by_hand() -> None:
    """Two pairs of one feature: margins of 1 and -1 under w = 2, and a prior of precision 3."""
    features = FeaturePairs(
        *(torch.tensor(rows, dtype=torch.float64) for rows in ([[1.0], [0.0]], [[0.5], [0.5]])),
        torch.zeros(2, dtype=torch.float64),
    )
    weight = torch.tensor([2.0], dtype=torch.float64)
    losses = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0))]
    centering = 0.01 * ((2.0 + 1.0) ** 2 + (0.0 + 1.0) ** 2)
    assert penalized_loss(features, weight, 3.0).item() == pytest.approx(sum(losses) + centering + 3.0 / 2 * 4.0)
    smooth = [0.9 * losses[0] + 0.1 * losses[1], 0.9 * losses[1] + 0.1 * losses[0]]
    assert penalized_loss(features, weight, 0.0, 0.1).item() == pytest.approx(sum(smooth) + centering)


def test_heads_read_raw_features_as_they_read_scaled_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    center, scale = torch.tensor([3.0, -1.0]).double(), torch.tensor([2.0, 0.5]).double()
    raw = torch.randn(5, 2, generator=generator, dtype=torch.float64) * scale + center
    for kind, labels in (("gaussian", 4), ("point", 3)):
        heads = Heads(torch.randn(labels, 2, generator=generator).double(), torch.arange(labels).double(), kind)  # type: ignore[arg-type]
        weight, layout = heads.on_raw_features(center, scale, 1.7)
        assert (layout.num_heads, layout.kind, layout.reward_scale) == (2 if kind == "gaussian" else 3, kind, 1.7)
        assert weight.dtype == torch.float32
        logits = (raw - center) / scale @ heads.weight_LH.T - heads.offset_L
        expected = logits if kind == "point" else logits[:, :2]
        found = layout.decode(raw @ weight.double().T)
        torch.testing.assert_close(found.mean, expected, rtol=0, atol=1e-5)


def test_bradley_terry_matches_an_independent_solver() -> None:
    """Without centering it is logistic regression on differences."""
    from sklearn.linear_model import LogisticRegression

    features, _ = synthetic(300)
    difference = features.difference_NH.numpy()
    both = np.concatenate([difference, -difference])
    labels = np.array([1] * 300 + [0] * 300)
    # Each pair appears twice, so the prior must weigh twice as much.
    solver = LogisticRegression(C=1 / (2 * 5.0), fit_intercept=False, tol=1e-10, max_iter=1000).fit(both, labels)
    moved = pairs(features.difference_NH / 2, -features.difference_NH / 2)  # r+ + r- = 0: centering is silent
    np.testing.assert_allclose(fit_bradley_terry(moved, 5.0).numpy(), solver.coef_[0], atol=1e-5)


def test_posterior_draws_have_the_laplace_covariance() -> None:
    features, _ = synthetic(400)
    weight = fit_bradley_terry(features, 2.0)
    draws = draw_posterior(weight, posterior_factor(features, weight, 2.0), 60_000, torch.Generator().manual_seed(0))
    d = features.difference_NH.numpy()
    p = 1 / (1 + np.exp(-d @ weight.numpy()))
    t = (features.chosen_NH + features.rejected_NH).numpy()
    hessian = sum(p[i] * (1 - p[i]) * np.outer(d[i], d[i]) + 0.02 * np.outer(t[i], t[i]) for i in range(len(d)))
    hessian = hessian + 2.0 * np.eye(6)
    np.testing.assert_allclose(np.cov(draws.numpy().T), np.linalg.inv(hessian), atol=2e-4)
    torch.testing.assert_close(draws.mean(0), weight)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_posterior_covariance_is_the_inverse_hessian_of_the_fitted_loss(label_smoothing: float) -> None:
    features = synthetic(60)[0]._replace(margin_N=torch.linspace(0, 1, 60, dtype=torch.float64))
    weight = fit_bradley_terry(features, 0.5, label_smoothing)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return penalized_loss(features, w, 0.5, label_smoothing)

    assert torch.autograd.functional.jacobian(loss, weight).abs().max() < 1e-4  # what is minimized is this loss
    hessian = torch.autograd.functional.hessian(loss, weight)
    factor = posterior_factor(features, weight, 0.5)
    torch.testing.assert_close(factor @ factor.T @ hessian, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)


def test_posterior_spread_grows_away_from_the_data_and_not_along_it() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 500, 6, generator=generator, dtype=torch.float64)
    flat[..., 3:] = 0.0  # three of six directions never seen
    nothing = torch.zeros(6, dtype=torch.float64)
    draws = draw_posterior(nothing, posterior_factor(pairs(*flat), nothing, 1.0), 500, generator)
    spread = draws.std(0)
    assert spread[3:].min() > 5 * spread[:3].max()


def test_shards_give_each_head_the_pairs_they_promise() -> None:
    features, _ = synthetic(50)
    generator = torch.Generator().manual_seed(0)
    for shards in ("disjoint", "cluster"):
        mask = make_shards(shards, features, features, 5, generator).fit_NK
        assert (mask.sum(1) == 1).all()  # every pair has one owner
        assert (mask.sum(0) > 0).all()  # every head has pairs
    assert make_shards("same", features, features, 5, generator).fit_NK.all()
    assert make_shards("bootstrap", features, features, 200, generator).fit_NK.double().mean().item() == pytest.approx(
        0.8, abs=0.02
    )


def test_clusters_follow_the_content() -> None:
    generator = torch.Generator().manual_seed(0)
    region = torch.arange(60) % 3
    centers = 10 * torch.eye(3, dtype=torch.float64)[region]
    noise = torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
    data = pairs(*(centers + noise))
    shards = make_shards("cluster", data, data.rows(torch.arange(30)), 3, generator)
    owner = shards.fit_NK.int().argmax(1)
    assert torch.equal(shards.held_NK, shards.fit_NK[:30])  # held-out pairs go to the head of their cluster
    assert len({(int(r), int(o)) for r, o in zip(region, owner, strict=True)}) == 3


def single_head(weight: torch.Tensor) -> Heads:
    return Heads(weight.unsqueeze(0), torch.zeros(1, dtype=torch.float64), "point")


def trained_heads(steps: int) -> tuple[Heads, list]:
    features, weight = synthetic(400)
    held, _ = synthetic(200, seed=1)
    generator = torch.Generator().manual_seed(0)
    everything = Shards(torch.ones(400, 3, dtype=torch.bool), torch.ones(200, 3, dtype=torch.bool))
    targets = Targets.of(single_head(weight), features, held)
    return train_heads(
        features, held, targets, everything, generator, loss_name="sampled_mse", num_steps=steps, learning_rate=0.02,
        initial_std=0.6,
    )  # fmt: skip


def test_heads_learn_the_stage_one_reward_and_std_shrinks_where_there_is_data() -> None:
    heads, history = trained_heads(1500)
    for head in heads.weight_LH[:3]:
        torch.testing.assert_close(head, torch.linspace(-1, 1, 6, dtype=torch.float64), rtol=0, atol=0.1)
    assert history[-1]["std"] < history[0]["std"] / 5
    assert history[-1]["mse"] < 0.01


def contrary(steps: int) -> tuple[Heads, list]:
    """Held-out texts are paid the opposite of the others: after a few steps every step makes their error larger."""
    features, weight = synthetic(100)
    targets = Targets(features.texts_NH @ weight, -features.texts_NH @ weight)
    everything = Shards(torch.ones(100, 3, dtype=torch.bool), torch.ones(100, 3, dtype=torch.bool))
    return train_heads(
        features, features, targets, everything, torch.Generator().manual_seed(0), loss_name="gaussian_nll",
        num_steps=steps, learning_rate=0.02, initial_std=0.0,
    )  # fmt: skip


def test_training_stops_after_ten_evaluations_in_which_no_head_improved() -> None:
    heads, history = contrary(1000)
    losses = [entry["loss"] for entry in history]
    best = losses.index(min(losses))
    assert [entry["step"] for entry in history] == [20 * (i + 1) for i in range(best + 11)]
    at_best, _ = contrary(20 * (best + 1))
    torch.testing.assert_close(heads.weight_LH, at_best.weight_LH)
    torch.testing.assert_close(heads.offset_L, at_best.offset_L)


def test_the_last_step_is_evaluated_too() -> None:
    assert [entry["step"] for entry in contrary(45)[1]] == [20, 40, 45]
    assert [entry["step"] for entry in contrary(40)[1]] == [20, 40]


def test_history_holds_the_validation_error_of_the_heads_as_they_were() -> None:
    """Before the second evaluation the kept heads are those of the first."""
    features, weight = synthetic(60)
    held, _ = synthetic(40, seed=1)
    mask = torch.ones(60, 2, dtype=torch.bool), torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    targets = Targets.of(single_head(weight), features, held)
    heads, (entry,) = train_heads(
        features, held, targets, Shards(*mask), torch.Generator().manual_seed(0), loss_name="gaussian_nll",
        num_steps=20, learning_rate=3e-3, initial_std=0.3,
    )  # fmt: skip
    said = held.texts_NH @ heads.weight_LH.T - heads.offset_L
    mean, std = said[:, :2], 1e-3 + torch.nn.functional.softplus(said[:, 2:])
    error, owned = (mean - targets.held_T.unsqueeze(-1)).square(), mask[1].repeat(2, 1)
    assert entry["mse"] == pytest.approx(error[owned].mean().item())
    assert entry["std"] == pytest.approx(std.median().item())
    nll = std.log() + error / (2 * std.square())
    expected = sum(nll[owned[:, k], k].mean().item() for k in range(2))
    constant = entry["loss"] - expected  # of the Gaussian, the same for each head
    assert constant == pytest.approx(0.0, abs=1e-9) or constant == pytest.approx(math.log(2 * math.pi), abs=1e-9)


@pytest.mark.slow
def test_heads_of_regions_are_stopped_by_their_own_region() -> None:
    """Two regions with opposite rewards: judged on both, a head could only get worse by learning its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def draw(count: int) -> tuple[FeaturePairs, torch.Tensor]:
        region = torch.arange(count) % 2
        center = torch.zeros(count, 6, dtype=torch.float64)
        center[:, 0] = 20.0 * region
        texts = center + torch.randn(2, count, 6, generator=generator, dtype=torch.float64)
        sign = (1 - 2 * region).double()
        reward = torch.cat([(text - center) @ weight * sign for text in texts])
        return pairs(texts[0], texts[1]), reward

    (fit, fit_reward), (held, held_reward) = draw(400), draw(200)
    targets = Targets(fit_reward, held_reward)
    own = make_shards("cluster", fit, held, 2, generator)
    assert torch.equal(own.held_NK.int().argmax(1), own.fit_NK.int().argmax(1)[:200])
    wrong = Shards(own.fit_NK, torch.ones_like(own.held_NK))

    def error_at_home(shards: Shards) -> float:
        heads, _ = train_heads(
            fit, held, targets, shards, torch.Generator().manual_seed(1), loss_name="sampled_mse", num_steps=3000,
            learning_rate=0.02, initial_std=0.1,
        )  # fmt: skip
        said = held.texts_NH @ heads.weight_LH[:2].T - heads.offset_L[:2]
        return (said - held_reward.unsqueeze(-1)).square()[own.held_NK.repeat(2, 1)].mean().item()

    assert error_at_home(own) < 0.05 < 0.5 < error_at_home(wrong)


@pytest.mark.parametrize("loss", rest_slow(["gaussian_nll", "beta_nll", "crps", "probit_pairs"]))
def test_other_losses_learn_the_order_too(loss: str) -> None:
    features, weight = synthetic(400)
    held, true = synthetic(200, seed=1)
    everything = Shards(torch.ones(400, 2, dtype=torch.bool), torch.ones(200, 2, dtype=torch.bool))
    heads, _ = train_heads(
        features, held, Targets.of(single_head(weight), features, held), everything, torch.Generator().manual_seed(0),
        loss_name=loss, num_steps=400, learning_rate=0.02, initial_std=0.6,  # type: ignore[arg-type]
    )  # fmt: skip
    for head in heads.weight_LH[:2]:
        assert torch.cosine_similarity(head, true, dim=0) > 0.9


def test_alarm_when_std_collapses_while_error_stands_still() -> None:
    flat = [{"mse": 0.3, "std": 1.0}, {"mse": 0.299, "std": 0.3}, {"mse": 0.298, "std": 0.09}]
    falling = [{"mse": 0.3, "std": 1.0}, {"mse": 0.1, "std": 0.3}, {"mse": 0.03, "std": 0.09}]
    assert std_collapsed(flat)
    assert not std_collapsed(falling)
    assert not std_collapsed(flat[:2])

    def pair(std: float, mse: float) -> bool:
        return std_collapsed([{"mse": 1.0, "std": 1.0}, {"mse": 2.0, "std": 0.5}, {"mse": mse, "std": std}])

    assert pair(0.099, 1.0)
    assert not pair(0.1, 1.0)  # a tenth is not below a tenth
    assert pair(0.01, 0.96)
    assert pair(0.01, 1.04)  # worse by less than 5 % stands still, too
    assert not pair(0.01, 0.94)
    assert not pair(0.01, 1.06)
    assert not std_collapsed([{"mse": 1.0, "std": 0.01}, {"mse": 1.0, "std": 1.0}])  # a rise is no fall


def test_margins_push_the_rewards_apart() -> None:
    """Pairs that are exactly 2 apart in truth, fitted with margin 2: p = sigmoid(w.d - 2), by an independent solver."""
    features, _ = synthetic(300)
    weight = fit_bradley_terry(FeaturePairs(*features[:2], torch.full((300,), 2.0, dtype=torch.float64)), 5.0)
    d, together = features.difference_NH.numpy(), (features.chosen_NH + features.rejected_NH).numpy()

    def gradient(w: np.ndarray) -> np.ndarray:
        return -d.T @ (1 / (1 + np.exp(d @ w - 2.0))) + 5.0 * w + 0.02 * together.T @ (together @ w)

    assert np.abs(gradient(weight.numpy())).max() < 1e-4
    assert weight.norm() > fit_bradley_terry(features, 5.0).norm()


def test_label_smoothing_bounds_the_margin_of_separable_pairs() -> None:
    """One direction, every pair alike: the optimum is logit(1 - e) in closed form."""
    difference = torch.ones(50, 1, dtype=torch.float64)
    weight = fit_bradley_terry(pairs(difference / 2, -difference / 2), 1e-9, label_smoothing=0.1)
    assert weight.item() == pytest.approx(math.log(0.9 / 0.1), abs=1e-4)


def test_shards_are_made_by_source() -> None:
    features, _ = synthetic(60)
    generator = torch.Generator().manual_seed(0)
    sources = ["web"] * 30 + ["books"] * 20 + ["forum"] * 10

    def heads_of(num_heads: int) -> list[set[int]]:
        mask, held = make_shards("source", features, features, num_heads, generator, sources, sources)
        for name in set(sources):  # judged by every head that is trained on the source
            mine = torch.tensor([source == name for source in sources])
            assert (held[mine] == mask[mine].any(0)).all()
        assert (mask.sum(1) == 1).all()
        assert (mask.sum(0) > 0).all()
        owner = mask.int().argmax(1)
        return [set(owner[:30].tolist()), set(owner[30:50].tolist()), set(owner[50:].tolist())]

    web, books, forum = heads_of(3)
    assert len(web | books | forum) == 3  # a head each
    web, books, forum = heads_of(2)
    assert books == forum != web  # the two smaller ones together
    web, books, forum = heads_of(4)
    assert len(web) == 2  # the largest is split
    assert len(web | books | forum) == 4


def test_last_layer_std_is_what_many_draws_say() -> None:
    features, _ = synthetic(400)
    weight = fit_bradley_terry(features, 2.0)
    factor = posterior_factor(features, weight, 2.0)
    draws = draw_posterior(weight, factor, 60_000, torch.Generator().manual_seed(0))
    x, y = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    center = torch.full((6,), 0.3, dtype=torch.float64)
    layer = LastLayer(factor, center)
    torch.testing.assert_close(layer.std(x), ((x - center) @ draws.T).std(-1), rtol=0.02, atol=0)
    torch.testing.assert_close(layer.difference_std(x - y), ((x - y) @ draws.T).std(-1), rtol=0.02, atol=0)


def test_std_scale_equals_values_worked_out_by_hand() -> None:
    """Quantile .6827 of |z| = 1, ..., 101 lies at 1 + .6827 * 100."""
    target = torch.arange(1, 102, dtype=torch.float64) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(51)[:101]
    mean, std = torch.zeros(101, 2, dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64).expand(101, 2)
    scale = fit_std_scale(mean, std, target)
    np.testing.assert_allclose(scale, [69.268949, 6.9268949], rtol=1e-6)


def test_std_scale_recovers_gaussian_errors_of_any_std() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, std = torch.randn(2, 40_000, 3, generator=generator, dtype=torch.float64)
    std, truth = std.abs() + 0.1, torch.tensor([0.25, 1.0, 8.0], dtype=torch.float64)
    target = torch.randn(40_000, generator=generator, dtype=torch.float64)
    mean = target.unsqueeze(-1) + truth * std * noise
    np.testing.assert_allclose(fit_std_scale(mean, std, target), truth, rtol=0.02)


def test_std_scale_is_not_set_by_a_few_texts() -> None:
    """One text in twenty with an error of 100 std: the root of the mean square would be 22."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2000, generator=generator, dtype=torch.float64)
    target[::20] = 100.0
    scale = fit_std_scale(torch.zeros(2000, 1).double(), torch.ones(2000, 1).double(), target).item()
    assert target.square().mean().sqrt() > 20
    assert 0.9 < scale < 1.2
