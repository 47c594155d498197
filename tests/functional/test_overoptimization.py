"""Curves over a pool against loops and definitions, their intervals against what they must cover, and kept heads."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from poise.errors import PoiseError
from poise.functional.best_of_n import KL_COEFS, best_of_n, fit_best_of_n, fit_rl, sizes, tilted
from poise.functional.objectives import HeadRewards
from poise.functional.overoptimization import (
    Choice,
    Curves,
    CurveSummary,
    Resamples,
    differences_from,
    pair_accuracy,
    stacked,
    summarize,
)
from poise.functional.statistics import resampled_counts, t_interval
from poise.studies.pool import PoolHeads

PROMPTS, PER_PROMPT, HEADS = 6, 16, 3


def make_heads(seed: int, rows: int = PROMPTS * PER_PROMPT) -> HeadRewards:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(rows, HEADS, generator=generator)
    return HeadRewards(mean, torch.rand(rows, HEADS, generator=generator) + 0.1)


def make_gold(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(PROMPTS, PER_PROMPT))


def test_curves_are_the_metrics_of_every_reward_model() -> None:
    gold, choice = make_gold(), Choice.parse("brme:tradeoff(0.4)")
    proxy = stacked(choice, [(make_heads(1), 1.0), (make_heads(2), 1.0)], PER_PROMPT)
    curves = Curves.of(proxy, gold)
    for s in range(2):
        np.testing.assert_allclose(curves.best_of_n_gold_SPM[s], best_of_n(proxy[s], gold, sizes(PER_PROMPT)))
        np.testing.assert_allclose(curves.best_of_n_proxy_SPM[s], best_of_n(proxy[s], proxy[s], sizes(PER_PROMPT)))
        for i, kl_coef in enumerate(KL_COEFS):
            value, kl = tilted(proxy[s], gold, kl_coef)
            np.testing.assert_allclose(curves.tilted_gold_SPM[s, :, i], value)
            np.testing.assert_allclose(curves.tilted_kl_SPM[s, :, i], kl)
            np.testing.assert_allclose(curves.tilted_proxy_SPM[s, :, i], tilted(proxy[s], proxy[s], kl_coef)[0])
            weight = np.exp(proxy[s] / kl_coef)
            share = weight / weight.sum(-1, keepdims=True)
            np.testing.assert_allclose(curves.tilted_samples_SPM[s, :, i], 1 / (share * share).sum(-1))
    assert curves.n.tolist() == sizes(PER_PROMPT).tolist()
    np.testing.assert_allclose(curves.accuracy_SP, pair_accuracy(proxy, gold))


def test_a_proxy_is_centered_combined_and_scaled_by_hand() -> None:
    heads = make_heads(0)
    mean, std = heads.mean.double().numpy(), heads.std.double().numpy()
    mean = mean - mean.mean(0)
    best = std.argmin(-1)
    combined = 0.4 * mean[np.arange(len(mean)), best] + 0.6 * mean.min(-1)
    expected = (combined - combined.mean()) / combined.std(ddof=1)
    found = Choice("brme", "tradeoff(0.4)").proxy(heads, PER_PROMPT)
    np.testing.assert_allclose(found.ravel(), expected, atol=2e-6)
    ceiling = Choice("brme", "tradeoff(0.4)", ceiling=0.5).proxy(heads, PER_PROMPT)
    np.testing.assert_allclose(ceiling.ravel(), np.minimum(expected, 0.5), atol=2e-6)


def test_par_is_the_chance_of_beating_the_prompts_own_completions() -> None:
    heads, unit = HeadRewards(make_heads(3).mean[:, :1], torch.zeros(PROMPTS * PER_PROMPT, 1)), 1.7
    reward = unit * heads.mean.double().numpy().reshape(PROMPTS, PER_PROMPT)
    chance = np.array([[np.mean(1 / (1 + np.exp(other - one))) for one in row] for row in reward for other in [row]])
    expected = (chance - chance.mean()) / chance.std(ddof=1)
    np.testing.assert_allclose(Choice("single", "nominal", "par").proxy(heads, PER_PROMPT, unit), expected, atol=2e-5)
    # Less the mean of the prompt: no completion of a prompt overtakes another.
    plain = Choice("single", "nominal").proxy(heads, PER_PROMPT)
    less = Choice("single", "nominal", "contrastive").proxy(heads, PER_PROMPT, unit)
    assert (plain.argsort(-1) == less.argsort(-1)).all()


def test_measures_equal_values_worked_out_by_hand() -> None:
    gold = make_gold()
    proxy = stacked(Choice("brme", "mean"), [(make_heads(1), 1.0), (make_heads(2), 1.0), (make_heads(3), 1.0)], 16)
    curves = Curves.of(proxy, gold)
    judged = summarize(curves, Resamples.draw(PROMPTS, 3))
    by_seed = curves.best_of_n_gold_SPM.mean(1)
    assert judged.means["final_gold"] == pytest.approx(by_seed[:, -1].mean())
    mean = by_seed.mean(0)
    assert judged.means["peak_gold"] == pytest.approx(mean.max())
    assert judged.means["drawdown"] == pytest.approx(mean.max() - mean[-1])
    assert judged.means["gain"] == pytest.approx((by_seed[:, -1] - gold.mean()).mean())
    right = (proxy[..., 1::2] > proxy[..., ::2]) == (gold[..., 1::2] > gold[..., ::2])
    assert judged.means["accuracy"] == pytest.approx(right.mean())
    for name, entry in judged.json["measures"].items():
        at_the_end = name == "drawdown" and entry["mean"] == 0  # there is no fall from a peak at the end
        assert entry["interval"][0] < entry["interval"][1] or at_the_end
    assert judged.json["best_of_n"][0]["gold"] == pytest.approx(gold.mean())


def test_a_fall_is_not_made_of_noise() -> None:
    """Gold that does not depend on n but for noise: the intervals of most falls from the peak hold zero."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(40):
        proxy, gold = generator.normal(size=(6, 20, 8)), generator.normal(size=(20, 8))
        found.append(
            summarize(Curves.of(proxy, gold), Resamples.draw(20, 6, 200)).json["measures"]["drawdown"]["interval"]
        )
    assert sum(low > 0 for low, _ in found) <= 8  # it is the worst of nine, so more than one in forty


def test_pairs_that_gold_ties_do_not_count() -> None:
    proxy = np.array([[[0.0, 1.0, 2.0, 1.0], [0.0, 1.0, 0.0, 1.0]]])
    gold = np.array([[1.0, 1.0, 0.0, 5.0], [2.0, 2.0, 3.0, 3.0]])
    found = pair_accuracy(proxy, gold)
    assert found[0, 0] == 0.0
    assert math.isnan(found[0, 1])
    judged = summarize(Curves.of(proxy, gold), Resamples.draw(2, 1, 50))
    assert judged.means["accuracy"] == 0.0
    # Resamples without the first prompt know nothing of accuracy; in the others it is 0.
    assert judged.json["measures"]["accuracy"]["interval"] == (0.0, 0.0)
    right = summarize(Curves.of(-proxy, gold), Resamples.draw(2, 1, 50))
    assert right.json["measures"]["accuracy"]["interval"] == (right.means["accuracy"],) * 2
    assert "accuracy" not in summarize(Curves.of(proxy, np.zeros((2, 4))), Resamples.draw(2, 1, 50)).means


def test_differences_are_paired() -> None:
    gold = make_gold()
    models = [(make_heads(s), 1.0) for s in range(4)]
    resamples = Resamples.draw(PROMPTS, 4)
    one = summarize(Curves.of(stacked(Choice("brme", "nominal"), models, PER_PROMPT), gold), resamples)
    same = differences_from(one, one)
    assert same["final_gold"]["vs_baseline"] == 0
    assert tuple(same["final_gold"]["vs_baseline_interval"]) == (0.0, 0.0)


def test_a_gain_is_compared_with_the_baselines_draw_by_draw() -> None:
    def summary(mean: float, draws: list[float]) -> CurveSummary:
        measures = {"gain": {"mean": mean, "interval": (mean - 1, mean + 1)}}
        return CurveSummary({"measures": measures}, {"gain": mean}, {"gain": np.array(draws)})

    own, first = summary(3.0, [2.0, 3.0, 4.0, 5.0]), summary(2.0, [1.0, -1.0, 4.0, 0.0])
    found = differences_from(own, first)
    assert found["gain"] == {
        "mean": 3.0, "interval": (2.0, 4.0), "vs_baseline": 1.0,
        "vs_baseline_interval": pytest.approx((0.075, 4.925)),  # of 1, 4, 0 and 5
    }  # fmt: skip
    # Of draws in which the baseline gained nothing there is no share: 2 / 1 - 1 and 4 / 4 - 1 are left.
    assert found["relative_gain"] == {"mean": 0.5, "interval": pytest.approx((0.025, 0.975))}
    assert set(differences_from(own, summary(0.0, [1.0, 1.0, 1.0, 1.0]))) == {"gain"}
    assert set(differences_from(own, summary(-2.0, [1.0, 1.0, 1.0, 1.0]))) == {"gain"}


def test_points_have_the_quantiles_of_their_own_draws() -> None:
    """Two prompts, of which draws take the first, the second, or both; two reward models that differ by 1."""
    resamples = Resamples(
        np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    )
    gold = np.array([[0.0, 1.0], [4.0, 7.0]])
    proxy = np.stack([gold, gold + 1.0])
    judged = summarize(Curves.of(proxy, gold), resamples).json
    assert judged["seeds"] == 2
    start, end = judged["best_of_n"]
    assert (start["n"], start["kl"]) == (1, 0.0)
    assert (end["n"], end["kl"]) == (2, pytest.approx(math.log(2) - 0.5))
    for point, first, second in ((start, 0.5, 5.5), (end, 1.0, 7.0)):
        drawn = [first, second, (first + second) / 2]
        assert point["gold"] == pytest.approx(drawn[2])
        assert [point["gold_low"], point["gold_high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
        drawn = [first + 0.5, second + 0.5, drawn[2]]  # the last draw takes the first reward model alone
        assert point["proxy"] == pytest.approx((first + second) / 2 + 0.5)
        assert [point["proxy_low"], point["proxy_high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    measures = judged["measures"]
    assert measures["gain"]["mean"] == pytest.approx(1.0)
    assert measures["gain"]["interval"] == pytest.approx(tuple(np.quantile([0.5, 1.5, 1.0], [0.025, 0.975])))
    assert measures["final_gold"]["interval"] == pytest.approx(tuple(np.quantile([1.0, 7.0, 4.0], [0.025, 0.975])))
    assert measures["drawdown"] == {"mean": 0.0, "interval": (0.0, 0.0)}
    assert judged["fits"]["best_of_n"].keys() == {"alpha", "beta", "r2"}


def test_a_law_is_fitted_to_the_gain_over_the_start() -> None:
    """Gold that is the proxy: what best-of-n gains is known, and the fit is that of `fit_best_of_n`."""
    proxy = np.random.default_rng(0).normal(size=(2, 8, 32))
    judged = summarize(Curves.of(proxy, proxy.mean(0) + 5), Resamples.draw(8, 2, 20)).json
    gains = np.array([point["gold"] for point in judged["best_of_n"]]) - judged["best_of_n"][0]["gold"]
    root = np.sqrt([point["kl"] for point in judged["best_of_n"]])
    assert judged["fits"]["best_of_n"] == pytest.approx(fit_best_of_n(root, gains)._asdict())
    assert judged["initial_gold"] == pytest.approx(judged["best_of_n"][0]["gold"])


def test_the_last_completion_of_an_odd_number_has_no_pair() -> None:
    assert pair_accuracy(np.array([[[0.0, 1.0, 9.0]]]), np.array([[1.0, 2.0, 0.0]])).tolist() == [[1.0]]
    assert pair_accuracy(np.array([[[1.0, 0.0, 9.0, 3.0]]]), np.array([[1.0, 2.0, 0.0, 4.0]])).tolist() == [[0.0]]


def test_intervals_over_prompts_and_reward_models_cover_as_often_as_they_say() -> None:
    """Crossed effects: prompts, reward models and their noise; the mean over both populations is 0."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        prompts, seeds = generator.normal(size=(1, 30, 1)), generator.normal(size=(20, 1, 1))
        values = prompts + seeds + generator.normal(size=(20, 30, 1))
        resamples = Resamples.draw(30, 20, 300)
        low, high = np.quantile(resamples.over_seeds(resamples.by_seed(values)), [0.025, 0.975])
        hits += low <= 0 <= high
    assert 175 <= hits <= 198  # 95 % of 200, a little less for 20 units; one way alone would cover 160


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_intervals_over_few_reward_models_are_students(num_seeds: int) -> None:
    values = np.random.default_rng(2).normal(size=(num_seeds, 1, 2)) * np.ones((1, 30, 1))  # prompts are all alike
    resamples = Resamples.draw(30, num_seeds, 40_000)
    drawn = resamples.over_seeds(resamples.by_seed(values))
    low, high = t_interval(values[:, 0])
    found = np.quantile(drawn, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found - values[:, 0].mean(0), np.stack([low, high]) - values[:, 0].mean(0), rtol=0.05)


@pytest.mark.parametrize("num_prompts", [2, 4, 10])
def test_intervals_over_few_prompts_cover_as_often_as_they_say(num_prompts: int) -> None:
    generator, hits = np.random.default_rng(num_prompts), 0
    resamples = Resamples.draw(num_prompts, 1, 1000)
    for _ in range(200):
        values = generator.normal(size=(1, num_prompts, 1))
        low, high = np.quantile(resamples.over_seeds(resamples.by_seed(values)), [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits >= 182


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_where_nothing_differs_few_reward_models_seldom_leave_out_zero(num_seeds: int) -> None:
    """A bootstrap of two, three and five left it out in 51, 22 and 17 % of studies."""
    generator, missed = np.random.default_rng(num_seeds), 0
    resamples = Resamples.draw(20, num_seeds, 400)
    for _ in range(300):
        values = generator.normal(size=(num_seeds, 1, 1)) + 0.3 * generator.normal(size=(num_seeds, 20, 1))
        low, high = np.quantile(resamples.over_seeds(resamples.by_seed(values)), [0.025, 0.975])
        missed += not low <= 0 <= high
    assert missed <= 24  # 5 % of 300, and 2.4 stds


def test_tilted_curves_stop_where_the_pool_has_too_few_samples() -> None:
    """A standard normal reward tilted by 1 / beta has KL 1 / (2 beta^2); the pool of 100 gives no more than 4.6."""
    generator = np.random.default_rng(0)
    proxy = generator.normal(size=(2, 10, 100))
    judged = summarize(Curves.of(proxy, proxy[0]), Resamples.draw(10, 2, 50)).json
    sizes_of = []
    for coef in KL_COEFS:
        weights = [np.exp(row / coef) / np.exp(row / coef).sum() for row in proxy.reshape(20, 100)]
        sizes_of.append(20 / sum(np.square(weight).sum() for weight in weights))
    kept = sum(size >= 10 for size in sizes_of)
    assert 2 < kept < len(KL_COEFS) - 2
    assert [point["kl_coef"] for point in judged["tilted"]] == list(KL_COEFS[:kept])
    for point, size in zip(judged["tilted"], sizes_of, strict=False):
        assert point["effective_samples"] == pytest.approx(size)
        assert point["kl"] == pytest.approx(0.5 / point["kl_coef"] ** 2, rel=0.3)
    assert judged["tilted_stopped"] == (
        f"at β = {KL_COEFS[kept]:g} the pool is worth {sizes_of[kept]:.1f} samples a prompt, fewer than 10"
    )
    law = fit_rl(
        np.sqrt([point["kl"] for point in judged["tilted"]]),
        np.array([point["gold"] for point in judged["tilted"]]) - judged["initial_gold"],
    )
    assert judged["fits"]["tilted"] == law._asdict()


def test_one_bad_prompt_stops_a_tilted_curve() -> None:
    """The mean size of nine flat prompts and a steep one is large; the error of the steep one's KL is in the mean."""
    proxy = np.zeros((1, 10, 64))
    proxy[0, 0, 0] = 100.0
    stopped = summarize(Curves.of(proxy, proxy[0]), Resamples.draw(10, 1, 20)).json
    assert stopped["tilted"] == []
    assert stopped["tilted_stopped"].startswith("at β = 2 the pool is worth 8.8 samples")  # 1 / (.1 + .9 / 64)
    assert set(stopped["fits"]) == {"best_of_n"}
    flat = summarize(Curves.of(np.zeros((1, 2, 64)), proxy[0, :2]), Resamples.draw(2, 1, 20)).json
    assert len(flat["tilted"]) == len(KL_COEFS)
    assert flat["tilted_stopped"] == ""


def test_resampled_counts_are_a_bootstrap() -> None:
    counts = resampled_counts(10, 4000, 3)
    np.testing.assert_allclose(counts.sum(1), 1.0)
    values = np.random.default_rng(1).normal(size=10)
    assert (counts @ values).std() == pytest.approx(values.std() / np.sqrt(10), rel=0.05)


def test_choices_that_cannot_be_read_are_one_line() -> None:
    with pytest.raises(PoiseError, match="REWARD:OBJECTIVE was expected"):
        Choice.parse("tradeoff(0.4)")
    with pytest.raises(PoiseError, match="unknown objective 'nonsense'"):
        Choice.parse("brme:nonsense")


@pytest.mark.parametrize("objective", ["expected_worst_case", "expected_tradeoff", "expected_tradeoff(0.2)"])
def test_objectives_that_couple_prompts_are_refused(objective: str) -> None:
    """What is best for one prompt must not depend on the other prompts of the pool."""
    message = f"use {objective.removeprefix('expected_')}"
    with pytest.raises(PoiseError, match="whole pool") as refused:
        Choice.parse(f"brme:{objective}")
    assert str(refused.value).endswith(message)
    with pytest.raises(PoiseError, match="whole pool"):
        Choice("brme", objective).proxy(make_heads(0), PER_PROMPT)


def test_kept_heads_are_those_of_their_checkpoint(tmp_path: Path) -> None:
    heads, path = make_heads(0), tmp_path / "heads" / "one.safetensors"
    PoolHeads(heads, 1.5, "abc").save(path)
    again = PoolHeads.load(path, "abc", len(heads.mean))
    assert torch.equal(again.heads.mean, heads.mean)
    assert again.unit == 1.5
    with pytest.raises(PoiseError, match="another reward model; delete it"):
        PoolHeads.load(path, "abd", len(heads.mean))
    with pytest.raises(PoiseError, match="the pool has 5; delete it"):
        PoolHeads.load(path, "abc", 5)
    path.write_bytes(b"half a file")
    with pytest.raises(PoiseError, match=r"cannot read .*delete it"):
        PoolHeads.load(path, "abc", 5)
