"""What is asked of a reward model before any RL: by hand, and by laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from poise.functional import trust


def pool(seed: int, shape: tuple[int, int] = (40, 16)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_gains_by_hand() -> None:
    proxy, score = np.array([[0.0, 1.0, 2.0]]), np.array([[5.0, 3.0, 7.0]])
    std = math.sqrt((0 + 4 + 4) / 3)
    # best of 2 of 3: the second wins one pair of three, the third wins two
    expected = [0.0, ((3 + 2 * 7) / 3 - 5) / std, (7 - 5) / std]
    assert trust.gains(proxy, score, np.array([1, 2, 3]))[0].tolist() == pytest.approx(expected)
    assert trust.gains(proxy, np.ones((1, 3)), np.array([3])).tolist() == [[0.0]]


@settings(max_examples=25)
@given(st.integers(0, 50), st.floats(0.1, 5.0), st.floats(-3.0, 3.0))
def test_transfer_does_not_read_units(seed: int, unit: float, zero: float) -> None:
    proxy, other = pool(seed), pool(seed + 100)
    one = trust.transfer(proxy, proxy + other)
    two = trust.transfer(unit * proxy + zero, unit * (proxy + other) - zero)
    for a, b in zip(one, two, strict=True):
        assert a["transfer"] == (None if b["transfer"] is None else pytest.approx(b["transfer"]))
        assert a["validator"] == pytest.approx(b["validator"], abs=1e-9)
        interval = b["transfer_interval"]
        assert a["transfer_interval"] == (None if interval is None else pytest.approx(interval))
    assert any(row["transfer_interval"] for row in one)


def test_transfer_of_noise_is_zero_and_of_itself_one() -> None:
    proxy, noise = pool(0, (400, 32)), pool(1, (400, 32))
    own, none = trust.transfer(proxy, proxy)[-1], trust.transfer(proxy, noise)[-1]
    assert own["transfer"] == pytest.approx(1)
    assert own["transfer_interval"] == pytest.approx([1, 1])
    low, high = none["transfer_interval"]
    assert low < 0 < high
    assert abs(none["transfer"]) < 0.1
    # half of the validator's variance is the proxy's: 1/sqrt(2) of each std is seen
    half = trust.transfer(proxy, proxy + noise)[-1]
    assert half["transfer"] == pytest.approx(2**-0.5, abs=0.05)
    assert half["kl"] == pytest.approx(math.log(32) - 31 / 32)
    # the best of 32 normal draws, by quadrature
    x = np.linspace(-9, 9, 20001)
    expected = np.trapezoid(x * 32 * norm.pdf(x) * norm.cdf(x) ** 31, x)
    assert own["proxy"] == pytest.approx(expected, abs=0.07)  # three standard errors over 400 prompts


def test_a_gain_too_small_to_divide_by_has_no_ratio() -> None:
    first = trust.transfer(pool(0), pool(1))[0]
    assert (first["n"], first["kl"], first["transfer"], first["transfer_interval"]) == (1, 0.0, None, None)


def test_an_interval_may_be_of_small_gains() -> None:
    """Selection by a reward of next to no room gains little; its ratio is that of the same gains anyway."""
    proxy, other = pool(0, (400, 2)), pool(1, (400, 2))
    row = trust.transfer(proxy, proxy + other)[-1]
    assert row["proxy"] < 1
    low, high = row["transfer_interval"]
    assert low < row["transfer"] < high


@pytest.mark.parametrize("prompts", [4, 6])
def test_the_interval_of_transfer_covers_it_as_often_as_it_says_also_of_few_prompts(prompts: int) -> None:
    """A bootstrap of three prompts covers it in 80 % of cases, of five in 86 %."""
    rng, hits = np.random.default_rng(prompts), []
    true = 0.5 / (0.25 + 0.0625 + 0.75) ** 0.5  # the mean slope, in stds of the validator
    for _ in range(150):
        proxy = rng.normal(size=(prompts, 8))
        slope = 0.5 + 0.25 * rng.normal(size=(prompts, 1))  # some prompts' gains transfer better
        row = trust.transfer(proxy, slope * proxy + 0.75**0.5 * rng.normal(size=(prompts, 8)))[-1]
        if row["transfer_interval"]:
            low, high = row["transfer_interval"]
            hits.append(low <= true <= high)
    assert len(hits) >= 110
    assert np.mean(hits) >= 0.91


def test_two_prompts_say_nothing_of_how_transfer_varies() -> None:
    """Student's quantile of one degree of freedom is 12.7: gains of 1 and of 3 may be those of no gain at all."""
    proxy = pool(0, (2, 32)) * [[1.0], [3.0]]
    row = trust.transfer(proxy, proxy + pool(1, (2, 32)))[-1]
    assert row["transfer"] is not None
    assert row["transfer_interval"] is None


def test_agreement_by_hand() -> None:
    found = trust.agreement(np.array([1.0] * 8 + [0.0] * 2), np.arange(10))
    assert found.keys() == {"share", "interval", "pairs"}
    z, p, n = norm.ppf(0.975), 0.8, 10  # Wilson's formula
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["share"] == 0.8
    assert found["interval"] == pytest.approx([middle - half, middle + half])
    low, high = trust.agreement(np.repeat([1.0] * 8 + [0.0] * 2, 6), np.repeat(np.arange(10), 6))["interval"]
    assert high - low >= 2 * half  # six pairs of a prompt that are all alike are one


def test_a_share_is_below_another_only_where_both_are_known_well_enough() -> None:
    """Two samples of 50 with one and the same share: "below" by chance no oftener than an interval of 95 % allows."""
    rng = np.random.default_rng(0)
    said = []
    for own, other in rng.random((800, 2, 50)) < 0.7:
        one, two = (trust.agreement(part.astype(float), np.arange(50)) for part in (own, other))
        said.append(trust.fewer_than(one, two["share"], tuple(two["interval"])))
    assert np.mean(said) <= 0.04
    sure = trust.agreement(np.repeat([1.0, 0.0], [40, 60]), np.arange(100))
    assert trust.fewer_than(sure, 0.7, (0.6, 0.79))


def test_doubling_by_hand() -> None:
    mean, low, high = trust.doubling(np.array([0.0, 0.1, 0.2, 0.1]), np.array([0.0, 0.2]))
    variance = 0.02 / 3 * (1 / 4 + 1 / 3) + 0.02 / 2
    assert mean == pytest.approx(0.1)
    assert [low, high] == pytest.approx([0.1 - 3.18245 * variance**0.5, 0.1 + 3.18245 * variance**0.5], abs=1e-5)
    alone = trust.doubling(np.array([0.0, 0.1, 0.2, 0.1]), np.array([0.5]))  # one prompt does not say how others vary
    assert alone == trust.doubling(np.array([0.0, 0.1, 0.2, 0.1]))
