"""The choice of a rung: the posterior by brute force, its laws, and how often it is right where the truth is known."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import ndtr
from scipy.stats import binom, chi2

from poise.errors import PoiseError
from poise.functional.choice import LEVEL, PRIOR_STD, Ladder, choose, misfit

KL = np.array([5.0, 10.0, 20.0, 40.0])


def ladder_of(wins: list[float], labels: float = 40.0, kl: np.ndarray = KL) -> Ladder:
    return Ladder(kl, np.array(wins, dtype=float), np.full(len(wins), labels))


def curve(a: float, b: float) -> np.ndarray:
    """Win rates of the law at the rungs, the start first."""
    d = np.sqrt(KL / 40)
    return np.concatenate([[0.5], ndtr(a * d - b * d * d)])


def by_brute_force(ladder: Ladder) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(win rates: mean, lower, upper bound; losses: mean, upper bound) from a plain grid and SciPy's binomial."""
    axis = np.linspace(-9, 9, 361)
    weights, rates = [], []
    for a in axis:
        d = np.sqrt(ladder.kl_R / ladder.kl_R[-1])[None]
        rate = ndtr(a * d - axis[:, None] * d * d)
        fits = binom.pmf(ladder.wins_R, ladder.labels_R, rate).prod(-1)
        weights.append(fits * np.exp(-(a * a + axis**2) / (2 * PRIOR_STD**2)))
        rates.append(np.concatenate([np.full((len(axis), 1), 0.5), rate], 1))
    weight, rate = np.concatenate(weights), np.concatenate(rates)
    weight /= weight.sum()
    loss = rate.max(1, keepdims=True) - rate

    def bound(values: np.ndarray, level: float) -> np.ndarray:
        orders = [column.argsort() for column in values.T]
        found = [
            column[order][np.searchsorted(weight[order].cumsum(), level)]
            for column, order in zip(values.T, orders, strict=True)
        ]
        return np.array(found)

    return weight @ rate, bound(rate, 1 - LEVEL), bound(rate, LEVEL), weight @ loss, bound(loss, LEVEL)


@pytest.mark.parametrize(
    "wins", [[24, 30, 27, 16], [20, 20, 20, 20], [33, 36, 38, 40], [10, 6, 3, 0], [26, 21, 30, 24]]
)
def test_choice_equals_brute_force(wins: list[float]) -> None:
    ladder = ladder_of(wins)
    found, (rate, low, high, loss, bounds) = choose(ladder), by_brute_force(ladder)
    assert found.win_rate == pytest.approx(rate, abs=2e-3)
    assert found.low == pytest.approx(low, abs=1e-2)
    assert found.high == pytest.approx(high, abs=1e-2)
    assert found.loss_bound == pytest.approx(bounds, abs=6e-3)
    within = np.flatnonzero(bounds <= 0.05)
    assert found.chosen == (within[-1] if len(within) else loss.argmin())


def test_choice_equals_values_worked_out_by_hand() -> None:
    """Half of all comparisons won at every rung: no better than the start, whose rate is known."""
    found = choose(ladder_of([20_000] * 4, 40_000))
    assert found.win_rate == pytest.approx([0.5] * 5, abs=2e-3)
    assert (found.chosen, found.decided, found.more_labels) == (4, True, None)  # all are within delta: the largest KL
    lost = choose(ladder_of([8, 6, 3, 1]))
    assert (lost.chosen, lost.decided) == (0, True)  # the start: training made it worse from the first rung on


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5))
@example([40, 40, 40])
@example([0, 0, 0])
@example([0, 0, 0, 0, 0])
def test_choice_obeys_its_laws(wins: list[int]) -> None:
    kl = np.array([3.0, 5.0, 10.0, 20.0, 40.0])[: len(wins)]
    found = choose(ladder_of(list(map(float, wins)), 40.0, kl))
    assert [found.win_rate[0], found.low[0], found.high[0]] == pytest.approx([0.5] * 3)
    assert (found.low <= found.win_rate + 1e-9).all()
    assert (found.win_rate <= found.high + 1e-9).all()
    assert (found.loss_bound >= 0).all()
    assert found.decided == bool((found.loss_bound <= 0.05).any())
    assert found.more_labels is None or found.more_labels > 0
    # KL is only known through its ratios: another unit of it changes nothing
    again = choose(ladder_of(list(map(float, wins)), 40.0, 7 * kl))
    assert again.chosen == found.chosen


def test_more_labels_bring_the_decision_they_promise() -> None:
    few = choose(ladder_of([22, 28, 29, 27]))
    assert not few.decided
    assert few.more_labels is not None
    times = 1 + few.more_labels / 160
    assert choose(ladder_of([times * 40 * rate for rate in few.win_rate[1:]], times * 40)).decided
    nearly = 1 + (times - 1) / 3
    assert not choose(ladder_of([nearly * 40 * rate for rate in few.win_rate[1:]], nearly * 40)).decided


def test_a_law_that_does_not_fit_is_said() -> None:
    zigzag = misfit(ladder_of([36, 8, 36, 8]))
    smooth = misfit(ladder_of((40 * curve(2.0, 2.0)[1:]).tolist()))
    assert zigzag is not None
    assert smooth is not None
    assert zigzag < 1e-6 < 0.9 < smooth
    assert misfit(ladder_of([30, 20], kl=KL[:2])) is None


@pytest.mark.parametrize("wins", [[24, 30, 27, 16], [0, 13, 40, 20], [40, 38, 40, 39], [36, 8, 36]])
def test_the_misfit_is_the_likelihood_ratio_test_against_free_win_rates(wins: list[float]) -> None:
    """Also where a rung won nothing or everything. Twice the log ratio has rungs minus 2 degrees of freedom."""
    ladder = ladder_of(wins, kl=KL[: len(wins)])
    d = np.sqrt(ladder.kl_R / ladder.kl_R[-1])

    def loss(ab: np.ndarray) -> float:
        return -float(binom.logpmf(ladder.wins_R, 40, ndtr(ab[0] * d - ab[1] * d * d)).sum())

    law = min(minimize(loss, start, method="Nelder-Mead").fun for start in ([0, 0], [3, 3], [3, 0]))
    free = binom.logpmf(ladder.wins_R, 40, ladder.wins_R / 40).sum()
    assert misfit(ladder) == pytest.approx(chi2.sf(max(2 * (free + law), 0.0), len(wins) - 2), rel=1e-3, abs=1e-6)


def test_where_64_times_as_many_labels_would_not_decide_that_is_said() -> None:
    undecided = choose(ladder_of([1, 0, 1, 0], 1.0), delta=1e-4)
    assert (undecided.decided, undecided.more_labels) == (False, None)


@pytest.mark.parametrize(
    "truth", [curve(2.2, 2.6), curve(1.0, 0.2), curve(1.5, 1.5), curve(-0.5, 0.5), curve(3.0, 4.5), curve(0.4, 1.2)]
)
def test_160_labels_find_a_rung_near_the_best(truth: np.ndarray) -> None:
    """Peaks at the start, in the middle and at the end; ten fresh seeds each, at least eight within delta."""
    losses = []
    for seed in range(10):
        wins = np.random.default_rng(seed).binomial(40, truth[1:]).astype(float)
        losses.append(truth.max() - truth[choose(Ladder(KL, wins, np.full(4, 40.0))).chosen])
    assert sum(loss <= 0.05 for loss in losses) >= 8, losses


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Where a choice is called decided, its loss is within delta in at least LEVEL of cases; truths from the prior."""
    rng, kept = np.random.default_rng(0), []
    for _ in range(60):
        truth = curve(*rng.normal(0, PRIOR_STD, 2))
        found = choose(Ladder(KL, rng.binomial(150, truth[1:]).astype(float), np.full(4, 150.0)))
        if found.decided:
            kept.append(truth.max() - truth[found.chosen] <= 0.05)
    assert len(kept) > 40
    assert np.mean(kept) > LEVEL - 0.08  # two standard errors


def test_a_ladder_may_lie_below_one_nat() -> None:
    assert choose(ladder_of([30, 30], kl=np.array([0.01, 0.5]))).win_rate.shape == (3,)


@pytest.mark.parametrize(
    ("ladder", "said"),
    [
        (Ladder(np.array([]), np.array([]), np.array([])), "at least one rung"),
        (ladder_of([1, 2], kl=np.array([5.0, 5.0])), "larger KL"),
        (ladder_of([1, 2], kl=np.array([0.0, 5.0])), "above 0"),
        (ladder_of([41], kl=KL[:1]), "that many wins"),
        (ladder_of([0], 0, kl=KL[:1]), "needs labels"),
        (ladder_of([1, 41], kl=KL[:2]), "that many wins"),
        (ladder_of([-1, 1], kl=KL[:2]), "that many wins"),
    ],
)
def test_what_is_no_ladder_is_refused(ladder: Ladder, said: str) -> None:
    with pytest.raises(PoiseError, match=said):
        choose(ladder)
    with pytest.raises(PoiseError, match=r"between 0 and 0\.5"):
        choose(ladder_of([1], kl=KL[:1]), delta=0.5)
