"""Objectives against hand values, an independent NumPy version, their laws, and Monte Carlo."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from poise.errors import PoiseError
from poise.functional.objective_names import check_parameter
from poise.functional.objectives import (
    OBJECTIVES,
    HeadRewards,
    RewardScale,
    disagreement,
    expected_tradeoff,
    expected_worst_case,
    lower_confidence,
    mean,
    more_pessimistic,
    nominal,
    parameter,
    parse_objective,
    reliable,
    routing_std,
    soft_min,
    total_std,
    tradeoff,
    uncertainty_weighted,
    worst_case,
)
from poise.functional.shaping import contrastive, preference_as_reward

HEADS = HeadRewards(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[0.5, 0.2, 0.9]]), torch.tensor([[2.0]]))

HAND_VALUES = {
    "nominal": 2.0,
    "worst_case": 1.0,
    "tradeoff": 1.4,  # .4 * 2 + .6 * 1
    "tradeoff(0.75)": 1.75,
    "tradeoff(0)": 1.0,
    "mean": 3.0,
    "uncertainty_weighted": 3.0 - 0.5 * 14 / 3,  # population variance (4 + 1 + 9) / 3
    "uncertainty_weighted(0.1)": 3.0 - 0.1 * 14 / 3,
    "lower_confidence": 3.0 - math.sqrt(14 / 3),
    "lower_confidence(2)": 3.0 - 2 * math.sqrt(14 / 3),
    "typical": 3.0 - 2.0,
    "typical(0.25)": 3.0 - 0.25 * 2.0,
    "reliable": 3.0 / (1 + 14 / 3),
    "reliable(0.3)": 3.0 / (1 + 0.3 * 14 / 3),
    "soft_min": -math.log((math.exp(-1) + math.exp(-2) + math.exp(-6)) / 3),
    "soft_min(2)": -2 * math.log((math.exp(-0.5) + math.exp(-1) + math.exp(-3)) / 3),
    "median": 2.0,
    "quantile": 1.5,  # a quarter of the way through three: half-way from the first to the second
    "quantile(0)": 1.0,
    "expected_worst_case": 1.0,  # a batch of one
    "expected_tradeoff": 1.4,
    "random_head": 1.0,  # 9000 modulo 3
    "constant": 0.0,
    "constant(-1.5)": -1.5,
}


@pytest.mark.parametrize("spec", HAND_VALUES)
def test_objectives_equal_values_worked_out_by_hand(spec: str) -> None:
    assert parse_objective(spec)(HEADS).item() == pytest.approx(HAND_VALUES[spec], abs=1e-6)


def test_every_objective_has_a_hand_value() -> None:
    assert {spec.split("(")[0] for spec in HAND_VALUES} == set(OBJECTIVES)


def numpy_objectives(mu: np.ndarray, sd: np.ndarray) -> dict[str, float]:
    """One row of heads, written anew with loops and the definitions."""
    best = min(range(len(mu)), key=lambda k: (sd[k], k))
    average = sum(mu) / len(mu)
    variance = sum((m - average) ** 2 for m in mu) / len(mu)
    return {
        "nominal": mu[best],
        "worst_case": min(mu),
        "tradeoff(0.3)": 0.3 * mu[best] + 0.7 * min(mu),
        "mean": average,
        "uncertainty_weighted(0.7)": average - 0.7 * variance,
        "lower_confidence(1.3)": average - 1.3 * variance**0.5,
        "soft_min(0.8)": -0.8 * (np.logaddexp.reduce(-mu / 0.8) - np.log(len(mu))),
        "median": float(np.median(mu)),
        "quantile(0.3)": float(np.quantile(mu, 0.3)),
        "random_head": mu[int(1000 * mu.sum() % len(mu)) % len(mu)],
        "constant(2)": 2.0,
    }


arrays = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 7)), elements=st.floats(-20, 20))


def make_heads(values: np.ndarray) -> HeadRewards:
    std = np.abs(np.sin(values * 7 + np.arange(values.shape[-1]))) + 0.01
    return HeadRewards(torch.from_numpy(values), torch.from_numpy(std))


@given(arrays)
def test_objectives_equal_those_of_numpy(values: np.ndarray) -> None:
    heads = make_heads(values)
    for row in range(len(values)):
        for spec, expected in numpy_objectives(values[row], heads.std[row].numpy()).items():
            assert parse_objective(spec)(heads)[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-9), spec


SPECS = ("nominal", "worst_case", "tradeoff(0.3)", "mean", "uncertainty_weighted", "lower_confidence(2)", "soft_min")


@given(arrays, st.integers(0, 10_000))
def test_heads_may_be_permuted(values: np.ndarray, seed: int) -> None:
    heads = make_heads(values)
    order = torch.randperm(values.shape[-1], generator=torch.Generator().manual_seed(seed))
    permuted = HeadRewards(heads.mean[:, order], heads.std[:, order])
    # Equal stds would let the tie decide; make_heads gives distinct ones unless two columns coincide by chance.
    distinct = all(len(set(row.tolist())) == len(row) for row in heads.std)
    for spec in SPECS:
        if distinct or not spec.startswith(("nominal", "tradeoff")):
            torch.testing.assert_close(parse_objective(spec)(permuted), parse_objective(spec)(heads))


@given(arrays, st.floats(-10, 10))
def test_objectives_follow_a_shift(values: np.ndarray, shift: float) -> None:
    heads = make_heads(values)
    for spec in SPECS:
        shifted = parse_objective(spec)(HeadRewards(heads.mean + shift, heads.std))
        torch.testing.assert_close(shifted, parse_objective(spec)(heads) + shift, rtol=1e-9, atol=1e-8)


def test_random_head_takes_every_head_as_often() -> None:
    mean = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0))
    picked = (parse_objective("random_head")(HeadRewards(mean, torch.zeros_like(mean))).unsqueeze(-1) == mean).int()
    shares = torch.bincount(picked.argmax(-1), minlength=5) / len(mean)
    assert (shares - 0.2).abs().max() < 0.012  # four standard errors
    # and which one it takes has nothing to do with what it says
    assert abs(mean.gather(-1, picked.argmax(-1, keepdim=True)).mean().item()) < 0.03


@given(arrays)
def test_pessimism_has_its_order(values: np.ndarray) -> None:
    heads, slack = make_heads(values), 1e-9
    assert (worst_case(heads) <= soft_min(heads, 0.5) + slack).all()
    assert (soft_min(heads, 0.5) <= soft_min(heads, 2.0) + slack).all()
    assert (soft_min(heads, 2.0) <= mean(heads) + slack).all()
    assert (worst_case(heads) <= nominal(heads)).all()
    assert (tradeoff(heads, 0.4) <= nominal(heads) + slack).all()
    assert (uncertainty_weighted(heads) <= mean(heads)).all()
    assert (lower_confidence(heads) <= mean(heads)).all()


@given(arrays)
def test_ends(values: np.ndarray) -> None:
    heads = make_heads(values)
    torch.testing.assert_close(tradeoff(heads, 1.0), nominal(heads))
    torch.testing.assert_close(tradeoff(heads, 0.0), worst_case(heads))
    torch.testing.assert_close(soft_min(heads, 1e7), mean(heads), rtol=0, atol=1e-4)
    torch.testing.assert_close(soft_min(heads, 1e-6), worst_case(heads), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e5, 1e7, 1e9])
def test_soft_min_is_the_mean_at_any_large_temperature(temperature: float, dtype: torch.dtype) -> None:
    """Log of mean of e^(-r / t): in float32 that mean is 1, and times t the rounding of its log is tens or hundreds."""
    means = torch.tensor([[0.3, -1.2, 2.5], [7.0, 7.1, 6.9]], dtype=dtype)
    heads = HeadRewards(means, torch.zeros_like(means))
    torch.testing.assert_close(soft_min(heads, temperature), mean(heads), rtol=0, atol=1e-4)


def test_soft_min_of_many_gaussian_heads_is_mean_minus_half_variance() -> None:
    draws = 0.3 + 0.8 * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = soft_min(HeadRewards(draws, torch.zeros_like(draws)), 1.7).item()
    assert value == pytest.approx(0.3 - 0.8**2 / (2 * 1.7), abs=5e-3)


def test_total_std_is_that_of_the_mixture() -> None:
    heads = HeadRewards(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.3, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(3, (400_000,), generator=generator)
    draws = heads.mean[which] + heads.std[which] * torch.randn(400_000, generator=generator)
    assert total_std(heads).item() == pytest.approx(draws.std().item(), rel=5e-3)


def test_uncertainties_equal_values_worked_out_by_hand() -> None:
    assert disagreement(HEADS).item() == pytest.approx(math.sqrt(14 / 3))
    assert routing_std(HEADS).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "spec", ["best", "tradeoff(1.5)", "tradeoff(-0.1)", "tradeoff(x)", "mean(2)", "soft_min(0)", ""]
)
def test_bad_specs_are_refused_before_anything_runs(spec: str) -> None:
    with pytest.raises(PoiseError):
        parse_objective(spec)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("name", ["lower_confidence", "uncertainty_weighted", "soft_min", "tradeoff", "constant"])
def test_parameters_that_are_not_finite_are_refused(name: str, value: str) -> None:
    with pytest.raises(PoiseError, match=f"{name} takes no parameter '{value}'"):
        parse_objective(f"{name}({value})")


@pytest.mark.parametrize(
    ("floor", "ceiling"), [(2.0, 1.0), (1.0, 1.0), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf)]
)
def test_a_floor_that_is_not_below_the_ceiling_is_refused(floor: float, ceiling: float) -> None:
    with pytest.raises(PoiseError, match="the reward's floor must be below its ceiling"):
        RewardScale((0.0,), 0.0, 1.0, floor, ceiling)
    with pytest.raises(PoiseError, match="the reward's floor must be below its ceiling"):
        RewardScale.fit(HEADS, mean, floor, ceiling)


@pytest.mark.parametrize(("center", "std"), [(math.nan, 1.0), (0.0, math.nan), (math.inf, 1.0), (0.0, 0.0)])
def test_a_scale_without_numbers_is_refused(center: float, std: float) -> None:
    with pytest.raises(PoiseError, match="the reward's scale needs a finite mean and a std > 0"):
        RewardScale((0.0,), center, std)


def test_objectives_survive_pickling() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(parse_objective("tradeoff(0.2)")))(HEADS).item() == pytest.approx(1.2)


@given(arrays, st.floats(0, 1))
def test_expected_tradeoff_is_the_equation_and_bounds_the_per_sample_form(values: np.ndarray, weight: float) -> None:
    """Its mean over a batch is lambda E[nominal] + (1 - lambda) min_k E[mean_k] >= the mean of the per-sample form."""
    heads = make_heads(values)
    equation = weight * nominal(heads).mean() + (1 - weight) * heads.mean.mean(0).min()
    found = expected_tradeoff(heads, weight).mean()
    assert found.item() == pytest.approx(equation.item(), abs=1e-4)
    assert found >= tradeoff(heads, weight).mean() - 1e-4


def test_ties_of_the_expected_worst_case_go_to_the_first_head() -> None:
    """Heads centered on a batch are equal there but for rounding, which must not decide which head is the unit."""
    means = torch.tensor([[1.0, -3.0], [-1.0, 3.0]])
    for rounding in (-1e-6, 1e-6):
        heads = HeadRewards(means + torch.tensor([0.0, rounding]), torch.ones(2, 2))
        assert expected_worst_case(heads).tolist() == [1.0, -1.0]


def test_gradient_of_the_expected_worst_case_is_that_of_one_head() -> None:
    """In a bandit, d/dlogits min_k E[r_k] is the policy gradient with the rewards this objective gives (exactly)."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(6, 3, dtype=torch.float64)  # responses, heads
    policy = logits.softmax(0)
    (exact,) = torch.autograd.grad((policy @ rewards).min(), logits)
    # every response as often as the policy draws it, so that the batch mean is the expectation
    counts = (policy.detach() * 100_000).round().long()
    drawn = torch.arange(6).repeat_interleave(counts)
    policy = logits.softmax(0)
    given_rewards = expected_worst_case(HeadRewards(rewards[drawn], torch.zeros(len(drawn), 3)))
    (estimate,) = torch.autograd.grad((policy[drawn].log() * given_rewards).mean(), logits)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-4)


@given(arrays, st.integers(1, 4), st.integers(0, 1000))
def test_shaping_equals_that_of_numpy(values: np.ndarray, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    baseline = generator.normal(size=(len(values), count, values.shape[1]))
    heads = HeadRewards(torch.from_numpy(values), torch.ones(values.shape, dtype=torch.float64))
    others = HeadRewards(torch.from_numpy(baseline), torch.ones(baseline.shape, dtype=torch.float64))
    for row in range(len(values)):
        for head in range(values.shape[1]):
            differences = [values[row, head] - baseline[row, m, head] for m in range(count)]
            won = sum(1 / (1 + math.exp(-d)) for d in differences) / count
            assert contrastive(heads, others).mean[row, head].item() == pytest.approx(sum(differences) / count)
            assert preference_as_reward(heads, others).mean[row, head].item() == pytest.approx(won)
    assert torch.equal(contrastive(heads, others).std, heads.std)


def test_a_ceiling_and_a_floor_bound_the_scaled_reward() -> None:
    heads = HeadRewards(torch.arange(10.0).unsqueeze(-1), torch.zeros(10, 1))
    scale = RewardScale.fit(heads, mean, floor=-0.5, ceiling=1.0)
    free = RewardScale.fit(heads, mean)
    assert (scale.mean, scale.std) == (free.mean, free.std)  # the unit does not depend on the bounds
    assert scale.combine(heads, mean).tolist() == pytest.approx(free.combine(heads, mean).clamp(-0.5, 1.0).tolist())
    assert RewardScale.from_json(json.loads(json.dumps(scale.to_json()))) == scale
    assert RewardScale.from_json(json.loads(json.dumps(free.to_json()))) == free


@pytest.mark.parametrize(
    ("spec", "more"),
    [
        ("tradeoff(0.4)", 0.2),
        ("lower_confidence(1)", 2.0),
        ("typical(0.5)", 1.0),
        ("soft_min(2)", 1.0),
        ("quantile(0.5)", 0.25),
        ("mean", None),
        ("reliable(0.5)", 0.5),  # it has no pessimistic side
    ],
)
def test_more_pessimistic_never_raises_a_reward(spec: str, more: float | None) -> None:
    torch.manual_seed(0)
    heads = HeadRewards(torch.randn(50, 5), torch.rand(50, 5), torch.rand(50, 1))
    objective = parse_objective(spec)
    lower = more_pessimistic(objective)
    assert parameter(lower) == more
    assert (lower(heads) <= objective(heads) + 1e-6).all()


def test_every_objective_has_the_parameter_that_its_name_says() -> None:
    from poise.functional.objective_names import PARAMETERS

    assert PARAMETERS.keys() == OBJECTIVES.keys()
    for name, function in OBJECTIVES.items():
        default = parameter(function)
        allowed = PARAMETERS[name]
        assert (default is None) == (allowed is None), name
        assert allowed is None or default is None or default in allowed.allowed, name


@pytest.mark.parametrize(
    ("name", "least", "most", "words"),
    [
        ("tradeoff", 0, 1, "nominal weight must be in [0, 1]"),
        ("expected_tradeoff", 0, 1, "nominal weight must be in [0, 1]"),
        ("quantile", 0, 1, "level must be in [0, 1]"),
        ("uncertainty_weighted", 0, 1e6, "coefficient must be at least 0"),
        ("lower_confidence", 0, 1e6, "coefficient must be at least 0"),
        ("typical", 0, 1e6, "coefficient must be at least 0"),
        ("reliable", 0, 1e6, "coefficient must be at least 0"),
        ("soft_min", 1e-9, 1e9, "temperature must be at least 1e-09"),
        ("constant", -1e6, 1e6, "value must be at least -1e+06"),
    ],
)
def test_the_range_of_each_parameter(name: str, least: float, most: float, words: str) -> None:
    for value in (least, most):
        check_parameter(name, value)
    for value in (np.nextafter(least, -np.inf), np.nextafter(most, np.inf)):
        with pytest.raises(PoiseError, match=f"^{name}'s "):
            check_parameter(name, float(value))
    with pytest.raises(PoiseError) as refused:
        check_parameter(name, least - 1)
    hint = "; worst_case is its limit at 0" if name == "soft_min" else ""
    assert str(refused.value) == f"{name}'s {words}, got {least - 1:g}{hint}"


@pytest.mark.parametrize(
    "name", ["tradeoff", "quantile", "soft_min", "uncertainty_weighted", "lower_confidence", "typical", "reliable"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_parameter_out_of_range_is_refused_by_the_function_itself(name: str, value: float) -> None:
    with pytest.raises(PoiseError, match=f"{name}'s .* must be"):
        OBJECTIVES[name](HeadRewards(torch.zeros(3), torch.zeros(3)), value)


def test_reliable_is_the_expected_reward_after_a_noisy_measurement() -> None:
    """Rewards of N(0, 1/c), measured with noise of the heads' variance: regressed on what was measured."""
    generator = torch.Generator().manual_seed(0)
    coefficient, spread = 0.5, 1.5
    rewards = torch.randn(400_000, generator=generator, dtype=torch.float64) / math.sqrt(coefficient)
    measured = rewards + spread * torch.randn(400_000, generator=generator, dtype=torch.float64)
    near = (measured - 2.0).abs() < 0.05
    heads = HeadRewards(torch.tensor([2.0 - spread, 2.0 + spread]), torch.zeros(2))
    assert rewards[near].mean().item() == pytest.approx(reliable(heads, coefficient).item(), abs=0.03)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 10), st.floats(0, 10))
def test_reliable_lies_between_nothing_and_the_mean(means: list[float], one: float, other: float) -> None:
    heads = HeadRewards(torch.tensor(means, dtype=torch.float64), torch.zeros(len(means)))
    less, more = reliable(heads, min(one, other)).abs().item(), reliable(heads, max(one, other)).abs().item()
    assert more <= less <= mean(heads).abs().item()
    assert reliable(heads, 0.0).item() == mean(heads).item()


# ---- the scale, against NumPy ----


def test_a_scale_that_is_updated_is_that_of_all_completions_so_far() -> None:
    """Batches of unequal size and level, two of them: the second starts from a count that is not zero."""
    generator = torch.Generator().manual_seed(0)
    heads = [
        HeadRewards(shift + 2 * torch.randn(size, 3, generator=generator, dtype=torch.float64), torch.ones(size, 3))
        for size, shift in ((5, 0.0), (8, 3.0), (3, -1.0))
    ]
    scale = RewardScale.fit(heads[0], worst_case)
    baseline = heads[0].mean.mean(0)
    assert scale.head_baseline == pytest.approx(baseline.tolist())
    seen = []
    for i, batch in enumerate(heads):
        seen += (batch.mean - baseline).amin(-1).tolist()
        scale = scale.updated(batch, worst_case) if i else scale
        assert scale.count == len(seen)
        assert scale.mean == pytest.approx(np.mean(seen))
        assert scale.std == pytest.approx(np.std(seen, ddof=1))
        assert scale.head_baseline == pytest.approx(baseline.tolist())  # of the first batch, always
    alone = scale.refitted(heads[1], worst_case)
    own = (heads[1].mean - baseline).amin(-1)
    assert (alone.mean, alone.std, alone.count) == (
        pytest.approx(own.mean().item()), pytest.approx(own.std().item()), 8,
    )  # fmt: skip


def test_equal_rewards_add_no_variance_to_a_scale() -> None:
    """A policy that writes one text only: its rewards' own unit is 1, which is no variance of theirs."""
    first = torch.tensor([[0.1], [0.2], [0.4], [0.3]], dtype=torch.float64)
    scale = RewardScale.fit(HeadRewards(first, torch.ones(4, 1)), mean)
    equal = torch.full((6, 1), 0.4, dtype=torch.float64)
    scale = scale.updated(HeadRewards(equal, torch.ones(6, 1)), mean)
    assert scale.std == pytest.approx(torch.cat([first, equal]).std().item())


def test_a_scale_without_a_count_starts_with_its_first_batch() -> None:
    heads = HeadRewards(torch.tensor([[1.0], [2.0], [4.0]]), torch.ones(3, 1))
    scale = RewardScale((0.0,), 50.0, 7.0).updated(heads, mean)
    assert (scale.mean, scale.std, scale.count) == (
        pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)), 3,
    )  # fmt: skip


def test_a_constant_reward_keeps_scale_one() -> None:
    heads = HeadRewards(torch.ones(4, 2), torch.ones(4, 2))
    scale, rewards = RewardScale.fit_and_combine(heads, mean)
    assert (scale.std, scale.mean) == (1.0, 0.0)
    assert rewards.tolist() == [0.0] * 4
    scale = RewardScale.fit(HeadRewards(torch.tensor([[1.0, 2.0], [3.0, 8.0]]), torch.ones(2, 2)), mean)
    assert scale.head_baseline == (2.0, 5.0)
    assert scale.combine(HeadRewards(torch.tensor([2.0, 5.0]), torch.ones(2)), mean).item() == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("spec", "legal", "illegal"),
    [
        ("tradeoff", (0.0, 1.0), (-0.01, 1.01, 1.5)),
        ("expected_tradeoff", (0.0, 1.0), (-0.01, 1.01, 1.5)),
        ("quantile", (0.0, 1.0), (-0.01, 1.01, 1.5)),
        ("soft_min", (0.01, 5.0), (0.0, -1.0)),
    ],
)
def test_parameters_are_refused_at_their_bounds(
    spec: str, legal: tuple[float, ...], illegal: tuple[float, ...]
) -> None:
    for value in legal:
        parse_objective(f"{spec}({value})")
    for value in illegal:
        with pytest.raises(PoiseError, match="must be"):
            parse_objective(f"{spec}({value})")


def test_lower_confidence_and_uncertainty_weighted_go_down_with_disagreement() -> None:
    apart = HeadRewards(torch.tensor([0.0, 4.0]), torch.zeros(2))  # mean 2, std 2, variance 4
    assert parse_objective("lower_confidence(0.5)")(apart).item() == 1.0
    assert parse_objective("uncertainty_weighted(0.25)")(apart).item() == 1.0
    assert parse_objective("lower_confidence")(apart).item() == 0.0  # c = 1
    assert parse_objective("uncertainty_weighted")(apart).item() == 0.0  # c = .5


def test_a_scale_is_of_some_completions() -> None:
    for shape in ((2, 3, 5), (0, 5), (5,)):
        heads = HeadRewards(torch.zeros(shape), torch.ones(shape))
        with pytest.raises(PoiseError, match=rf"fitted to heads \(N, K\) of some completions, not to \({shape[0]},"):
            RewardScale.fit(heads, mean)


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda heads: heads.mean, r"one of \(4, 5\)"),
        (lambda heads: heads.mean.sum(), r"one of \(\)"),
        (lambda heads: heads.mean.mean(-1).tolist(), "list"),
        (lambda heads: heads.mean.mean(-1).to(torch.complex64), "complex numbers"),
    ],
)
def test_an_objective_of_another_form_is_refused(objective: Callable[[HeadRewards], Any], got: str) -> None:
    heads = HeadRewards(torch.randn(4, 5), torch.ones(4, 5))
    with pytest.raises(PoiseError, match=rf"one number per completion, a tensor of shape \(4,\); it gave {got}$"):
        RewardScale.fit(heads, objective)


def test_whole_numbers_of_an_objective_are_a_reward() -> None:
    heads = HeadRewards(torch.randn(4, 5), torch.ones(4, 5))
    scale = RewardScale.fit(heads, lambda heads: heads.mean.argmax(-1))
    assert scale.combine(heads, lambda heads: heads.mean.argmax(-1)).dtype == torch.float32
