"""Training of reward models: known answers, the posterior's exact covariance, and the facts the method rests on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from poise import train_reward
from poise.data import Sample
from poise.errors import PoiseError
from poise.objectives import disagreement
from poise.scorer import Scorer
from poise.train_reward import Config, Features, Heads, draw_posterior, fit_bradley_terry, shard_mask, std_collapsed


def synthetic(count: int, hidden: int = 6, seed: int = 0) -> tuple[Features, torch.Tensor]:
    """Pairs labelled by a known linear reward through the Bradley-Terry model."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linspace(-1, 1, hidden, dtype=torch.float64)
    first, second = torch.randn(2, count, hidden, generator=generator, dtype=torch.float64)
    keep = torch.rand(count, generator=generator) < torch.sigmoid((first - second) @ weight)
    chosen = torch.where(keep.unsqueeze(-1), first, second)
    rejected = torch.where(keep.unsqueeze(-1), second, first)
    return Features(chosen, rejected), weight


def test_bradley_terry_recovers_a_known_reward() -> None:
    features, weight = synthetic(20_000)
    fitted = fit_bradley_terry(features, precision=1e-6)
    assert torch.cosine_similarity(fitted, weight, dim=0) > 0.999  # centring shrinks it, but keeps the direction
    silent = Features(features.difference_NH / 2, -features.difference_NH / 2)  # r+ + r- = 0: no centring
    torch.testing.assert_close(fit_bradley_terry(silent, precision=1e-6), weight, rtol=0, atol=0.06)


def test_bradley_terry_matches_an_independent_solver() -> None:
    """Without centring it is logistic regression on differences."""
    from sklearn.linear_model import LogisticRegression

    features, _ = synthetic(300)
    difference = features.difference_NH.numpy()
    both = np.concatenate([difference, -difference])
    labels = np.array([1] * 300 + [0] * 300)
    # Each pair appears twice, so the prior must weigh twice as much.
    solver = LogisticRegression(C=1 / (2 * 5.0), fit_intercept=False, tol=1e-10, max_iter=1000).fit(both, labels)
    moved = Features(features.difference_NH / 2, -features.difference_NH / 2)  # r+ + r- = 0: centring is silent
    np.testing.assert_allclose(fit_bradley_terry(moved, 5.0).numpy(), solver.coef_[0], atol=1e-5)


def test_posterior_draws_have_the_laplace_covariance() -> None:
    features, _ = synthetic(400)
    weight = fit_bradley_terry(features, 2.0)
    draws = draw_posterior(features, weight, 2.0, 60_000, torch.Generator().manual_seed(0))
    d = features.difference_NH.numpy()
    p = 1 / (1 + np.exp(-d @ weight.numpy()))
    hessian = sum(p[i] * (1 - p[i]) * np.outer(d[i], d[i]) for i in range(len(d))) + 2.0 * np.eye(6)
    np.testing.assert_allclose(np.cov(draws.numpy().T), np.linalg.inv(hessian), atol=2e-4)
    torch.testing.assert_close(draws.mean(0), weight)


def test_posterior_spread_grows_away_from_the_data_and_not_along_it() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 500, 6, generator=generator, dtype=torch.float64)
    flat[..., 3:] = 0.0  # three of six directions never seen
    draws = draw_posterior(Features(*flat), torch.zeros(6, dtype=torch.float64), 1.0, 500, generator)
    spread = draws.std(0)
    assert spread[3:].min() > 5 * spread[:3].max()


def test_shards() -> None:
    features, _ = synthetic(50)
    generator = torch.Generator().manual_seed(0)
    for shards in ("disjoint", "cluster"):
        mask = shard_mask(features, 5, shards, generator)
        assert (mask.sum(1) == 1).all()  # every pair has one owner
        assert (mask.sum(0) > 0).all()  # every head has pairs
    assert shard_mask(features, 5, "same", generator).all()
    assert shard_mask(features, 200, "bootstrap", generator).double().mean().item() == pytest.approx(0.8, abs=0.02)


def test_clusters_follow_the_content() -> None:
    generator = torch.Generator().manual_seed(0)
    region = torch.arange(60) % 3
    centres = 10 * torch.eye(3, dtype=torch.float64)[region]
    noise = torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
    owner = shard_mask(Features(*(centres + noise)), 3, "cluster", generator).int().argmax(1)
    assert len({(int(r), int(o)) for r, o in zip(region, owner, strict=True)}) == 3


def single_head(weight: torch.Tensor) -> Heads:
    return Heads(weight.unsqueeze(0), torch.zeros(1, dtype=torch.float64), "point")


def trained_heads(steps: int, shards: str = "same") -> tuple[Heads, list]:
    features, weight = synthetic(400)
    held, _ = synthetic(200, seed=1)
    config = Config(preferences="", num_heads=3, head_steps=steps, head_lr=0.02, shards=shards)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    return train_reward.train_heads(features, held, single_head(weight), config, generator)


def test_heads_learn_the_stage_one_reward_and_std_shrinks_where_there_is_data() -> None:
    heads, history = trained_heads(1500)
    for head in heads.weight_LH[:3]:
        torch.testing.assert_close(head, torch.linspace(-1, 1, 6, dtype=torch.float64), rtol=0, atol=0.1)
    assert history[-1]["std"] < history[0]["std"] / 5
    assert history[-1]["mse"] < 0.01


@pytest.mark.parametrize("loss", ["gaussian_nll", "beta_nll", "crps", "probit_pairs"])
def test_other_losses_learn_the_order_too(loss: str) -> None:
    features, weight = synthetic(400)
    held, true = synthetic(200, seed=1)
    config = Config(preferences="", num_heads=2, head_steps=400, head_lr=0.02, head_loss=loss)  # type: ignore[arg-type]
    heads, _ = train_reward.train_heads(features, held, single_head(weight), config, torch.Generator().manual_seed(0))
    for head in heads.weight_LH[:2]:
        assert torch.cosine_similarity(head, true, dim=0) > 0.9


def test_alarm_when_std_collapses_while_error_stands_still() -> None:
    flat = [{"mse": 0.3, "std": 1.0}, {"mse": 0.299, "std": 0.3}, {"mse": 0.298, "std": 0.09}]
    falling = [{"mse": 0.3, "std": 1.0}, {"mse": 0.1, "std": 0.3}, {"mse": 0.03, "std": 0.09}]
    assert std_collapsed(flat)
    assert not std_collapsed(falling)
    assert not std_collapsed(flat[:2])


@pytest.fixture(scope="module")
def finished(tiny_model: str, preferences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> train_reward.Run:
    output = tmp_path_factory.mktemp("runs") / "reward"
    config = Config(preferences=str(preferences_file), output=str(output), model=tiny_model, num_layers=3)
    return train_reward.run(config)


def test_the_whole_run_learns_good_from_bad(finished: train_reward.Run) -> None:
    results = finished.results
    assert results is not None
    assert set(results["models"]) == {"single", "brme", "posterior"}
    assert results["num_train"] + results["num_validation"] == 40
    scorer = Scorer.load(str(finished.folder))  # a run folder stands for its BRME
    assert scorer.layout.kind == "gaussian"
    assert scorer.layout.num_heads == 5
    single = scorer.with_heads_of(str(finished.folder / "single"))
    good = single(
        [Sample("Review a film.", f"the film was {word} {i}") for i in range(20) for word in ("good", "great")]
    )
    bad = single([Sample("Review a film.", f"the film was {word} {i}") for i in range(20) for word in ("bad", "awful")])
    assert (good.mean > bad.mean.median()).float().mean() > 0.7


def test_rewards_are_standardised_on_the_training_texts(finished: train_reward.Run, preferences_file: Path) -> None:
    from poise.data import read_preferences

    preferences = read_preferences(preferences_file)
    samples = [Sample(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    rewards = Scorer.load(str(finished.folder / "single"))(samples).mean
    assert rewards.mean().item() == pytest.approx(0, abs=0.3)  # all texts, of which a fifth is validation
    assert rewards.std().item() == pytest.approx(1, abs=0.2)


def test_posterior_heads_average_to_the_single_one(finished: train_reward.Run) -> None:
    samples = [Sample("Review a film.", text) for text in ("good", "bad", "it was really not great")]
    posterior = Scorer.load(str(finished.folder / "posterior"))
    single = posterior.with_heads_of(str(finished.folder / "single"))
    torch.testing.assert_close(posterior(samples).mean.mean(-1), single(samples).mean[:, 0], rtol=0, atol=1e-3)
    assert (disagreement(posterior(samples)) > 0).all()


def test_a_finished_run_is_not_run_again(finished: train_reward.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.delattr(train_reward, "load_trunk")
    config = Config(**yaml.safe_load((finished.folder / "config.yaml").read_text()))
    assert train_reward.run(config).results == finished.results


def test_too_little_data_and_bad_settings(tmp_path: Path, tiny_model: str) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 2)
    with pytest.raises(PoiseError, match="too few"):
        train_reward.run(Config(preferences=str(path), output=str(tmp_path / "x"), model=tiny_model))
    path.write_text("".join(f'{{"prompt": "p", "chosen": "a{i}", "rejected": "b"}}\n' for i in range(9)))
    with pytest.raises(PoiseError, match="has 3 layers"):
        train_reward.run(Config(str(path), str(tmp_path / "y"), model=tiny_model, num_layers=9))
    with pytest.raises(PoiseError, match="num-heads"):
        train_reward.run(Config(preferences="", num_heads=0))
