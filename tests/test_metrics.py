"""Metrics against brute force and closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.metrics import auroc, best_of_n, best_of_n_kl, bootstrap_interval, tilted


@given(st.integers(2, 7), st.integers(0, 1000))
def test_best_of_n_equals_the_average_over_all_subsets(size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    proxy, gold = generator.normal(size=(2, 1, size))
    sizes = np.arange(1, size + 1)
    expected = [
        np.mean([gold[0, max(subset, key=lambda i: proxy[0, i])] for subset in itertools.combinations(range(size), n)])
        for n in sizes
    ]
    np.testing.assert_allclose(best_of_n(proxy, gold, sizes)[0], expected, atol=1e-9)


def test_best_of_n_kl_by_hand() -> None:
    np.testing.assert_allclose(best_of_n_kl(np.array([1, 2, 16])), [0.0, np.log(2) - 0.5, np.log(16) - 15 / 16])


def test_tilted_against_definition() -> None:
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


def test_tilted_limits() -> None:
    proxy, gold = np.array([[0.0, 3.0]]), np.array([[1.0, 5.0]])
    assert tilted(proxy, gold, 1e6)[0][0] == pytest.approx(3.0, abs=1e-4)
    value, kl = tilted(proxy, gold, 1e-3)
    assert value[0] == pytest.approx(5.0)
    assert kl[0] == pytest.approx(np.log(2))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(generator.normal(size=40), draws=500)
        covered += low <= 0.0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_auroc_by_hand() -> None:
    assert auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
