"""Best-of-n and tilted policies against their definitions; laws of over-optimization are recovered."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.functional.best_of_n import (
    KL_COEFS,
    best_of_n,
    best_of_n_kl,
    fit_best_of_n,
    fit_rl,
    rank_weights,
    sizes,
    tilted,
)


@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 1000))
def test_best_of_n_equals_the_average_over_all_subsets(size: int, levels: int, seed: int) -> None:
    """Among those of equal proxy, which there are many of, each is as likely to be picked."""
    generator = np.random.default_rng(seed)
    proxy, gold = generator.integers(levels * size, size=(1, size)) / 7, generator.normal(size=(1, size))
    sizes = np.arange(1, size + 1)

    def picked(subset: tuple[int, ...]) -> float:
        best = max(proxy[0, i] for i in subset)
        return float(np.mean([gold[0, i] for i in subset if proxy[0, i] == best]))

    expected = [np.mean([picked(subset) for subset in itertools.combinations(range(size), n)]) for n in sizes]
    np.testing.assert_allclose(best_of_n(proxy, gold, sizes)[0], expected, atol=1e-9)


def test_a_constant_reward_selects_nothing() -> None:
    gold = np.random.default_rng(0).normal(size=(5, 16))
    found = best_of_n(np.zeros((5, 16)), gold, np.array([1, 4, 16]))
    np.testing.assert_allclose(found, np.repeat(gold.mean(-1, keepdims=True), 3, -1), atol=1e-12)


def test_best_of_n_kl_equals_values_worked_out_by_hand() -> None:
    np.testing.assert_allclose(best_of_n_kl(np.array([1, 2, 16])), [0.0, np.log(2) - 0.5, np.log(16) - 15 / 16])


def test_tilted_equals_its_definition() -> None:
    proxy, gold = np.array([[0.0, 1.0, 2.0]]), np.array([[3.0, 5.0, -1.0]])
    weight = np.exp(proxy[0] / 0.7)
    weight /= weight.sum()
    value, kl = tilted(proxy, gold, 0.7)
    assert value[0] == pytest.approx(weight @ gold[0])
    assert kl[0] == pytest.approx(sum(w * np.log(w * 3) for w in weight))


@given(st.floats(0.05, 5), st.floats(0.05, 5), st.integers(0, 1000))
def test_smaller_kl_coef_means_more_proxy_and_more_kl(one: float, other: float, seed: int) -> None:
    proxy = np.random.default_rng(seed).normal(size=(3, 20))
    small, large = min(one, other), max(one, other)
    (reward_small, kl_small), (reward_large, kl_large) = tilted(proxy, proxy, small), tilted(proxy, proxy, large)
    assert (reward_small >= reward_large - 1e-9).all()
    assert (kl_small >= kl_large - 1e-9).all()
    assert (kl_small <= np.log(20) + 1e-9).all()


def test_tilting_reaches_its_limits() -> None:
    proxy, gold = np.array([[0.0, 3.0]]), np.array([[1.0, 5.0]])
    assert tilted(proxy, gold, 1e6)[0][0] == pytest.approx(3.0, abs=1e-4)
    value, kl = tilted(proxy, gold, 1e-3)
    assert value[0] == pytest.approx(5.0)
    assert kl[0] == pytest.approx(np.log(2))


def test_rank_weights_are_probabilities_of_the_best() -> None:
    weights = rank_weights(5, np.array([1, 3, 5]))
    np.testing.assert_allclose(weights.sum(0), 1.0)
    np.testing.assert_allclose(weights[:, 0], 0.2)
    np.testing.assert_allclose(weights[:, 1], np.array([0, 0, 1, 3, 6]) / 10)
    np.testing.assert_allclose(weights[:, 2], [0, 0, 0, 0, 1])


def test_laws_are_recovered() -> None:
    d = np.sqrt(np.linspace(0.0, 6.0, 9))
    law = fit_best_of_n(d, d * (0.8 - 0.2 * d))
    assert (law.alpha, law.beta, law.r2) == pytest.approx((0.8, 0.2, 1.0))
    law = fit_rl(d, np.where(d > 0, d * (0.5 - 0.3 * np.log(np.maximum(d, 1e-12))), 0.0))
    assert (law.alpha, law.beta, law.r2) == pytest.approx((0.5, 0.3, 1.0))
    noisy = fit_best_of_n(d, np.random.default_rng(0).normal(size=9))
    assert noisy.r2 < 0.9


def test_a_law_of_nothing_explains_nothing() -> None:
    """Gold that never changes has no variance to explain; a law explains 1 minus the share that it misses."""
    d = np.array([0.0, 1.0, 2.0])
    flat = fit_best_of_n(d, np.zeros(3))
    assert (flat.alpha, flat.beta) == (0.0, 0.0)
    assert np.isnan(flat.r2)
    # Of 1 and 0 at d = 0 and 1 the law, which starts at 0, can only meet the second.
    missed = fit_best_of_n(np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0, 2.0]))
    assert missed.r2 == pytest.approx(1 - 3 / 2)


def test_curves_show_every_size_of_a_small_pool_and_nine_of_a_large_one() -> None:
    assert sizes(1).tolist() == [1]
    assert sizes(4).tolist() == [1, 2, 3, 4]
    assert sizes(256).tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_tilted_points_are_those_of_the_recorded_study() -> None:
    """Curves of today and of results/study-2026-11-25 can be laid over each other."""
    recorded = json.loads((Path(__file__).parents[2] / "results/study-2026-11-25/results.json").read_text())
    arm = next(iter(next(iter(recorded["best_of_n"].values())).values()))
    assert tuple(point["kl_coef"] for point in arm["tilted"]) == KL_COEFS
