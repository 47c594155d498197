"""The choice of a rung: the posterior by brute force, its laws, and how often it is right where the truth is known."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import ndtr
from scipy.stats import binom, chi2

from poise.errors import PoiseError
from poise.functional.choice import LEVEL, PRIOR_STD, Ladder, beside_below, beside_start, choose, misfit

KL = np.array([5.0, 10.0, 20.0, 40.0])


def ladder_of(wins: list[float], labels: float = 40.0, kl: np.ndarray = KL) -> Ladder:
    """Every rung beside the start."""
    return beside_start(kl, np.array(wins, dtype=float), np.full(len(wins), labels))


def quality(a: float, b: float) -> np.ndarray:
    """Of the law at the rungs, the start first."""
    d = np.sqrt(np.concatenate([[0.0], KL]) / 40)
    return np.asarray(a * d - b * d * d)


def curve(a: float, b: float) -> np.ndarray:
    """Win rates of the law against the start."""
    return np.asarray(ndtr(quality(a, b)))


def lost(truth: np.ndarray, chosen: int) -> float:
    """How far above one half the best point wins against the chosen one."""
    return float(ndtr(truth.max() - truth[chosen]) - 0.5)


def judged(truth: np.ndarray, labels: int, rng: np.random.Generator) -> Ladder:
    """Every rung beside the one below, as often as `labels` says, by judges of this quality."""
    wins = rng.binomial(labels, ndtr(np.diff(truth)))
    return beside_below(KL, wins.astype(float), np.full(len(wins), float(labels)))


def by_brute_force(ladder: Ladder) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(win rates: mean, lower, upper bound; losses: mean, upper bound) from a plain grid and SciPy's binomial."""
    axis = np.linspace(-9, 9, 361)
    weights, rates, losses = [], [], []
    d = np.concatenate([[0.0], np.sqrt(ladder.kl_R / ladder.kl_R[-1])])[None]
    for a in axis:
        of_point = a * d - axis[:, None] * d * d
        rate = ndtr(of_point[:, ladder.rung_C] - of_point[:, ladder.beside_C])
        fits = binom.pmf(ladder.wins_C, ladder.labels_C, rate).prod(-1)
        weights.append(fits * np.exp(-(a * a + axis**2) / (2 * PRIOR_STD**2)))
        rates.append(ndtr(of_point))
        losses.append(ndtr(of_point.max(1, keepdims=True) - of_point) - 0.5)
    weight, rate, loss = np.concatenate(weights), np.concatenate(rates), np.concatenate(losses)
    weight /= weight.sum()

    def bound(values: np.ndarray, level: float) -> np.ndarray:
        orders = [column.argsort() for column in values.T]
        found = [
            column[order][np.searchsorted(weight[order].cumsum(), level)]
            for column, order in zip(values.T, orders, strict=True)
        ]
        return np.array(found)

    return weight @ rate, bound(rate, 1 - LEVEL), bound(rate, LEVEL), weight @ loss, bound(loss, LEVEL)


@pytest.mark.parametrize(("make", "width"), [(beside_start, 1e-2), (beside_below, 1.5e-2)])  # of the grids
@pytest.mark.parametrize(
    "wins", [[24, 30, 27, 16], [20, 20, 20, 20], [33, 36, 38, 40], [10, 6, 3, 0], [26, 21, 30, 24]]
)
def test_choice_equals_brute_force(wins: list[float], make: Callable[..., Ladder], width: float) -> None:
    ladder = make(KL, np.array(wins, dtype=float), np.full(4, 40.0))
    found, (rate, low, high, loss, bounds) = choose(ladder), by_brute_force(ladder)
    assert found.win_rate == pytest.approx(rate, abs=2e-3)
    assert found.low == pytest.approx(low, abs=width)
    assert found.high == pytest.approx(high, abs=width)
    assert found.loss_bound == pytest.approx(bounds, abs=width)
    within = np.flatnonzero(found.loss_bound <= 0.05)
    assert found.chosen == (within[-1] if len(within) else loss.argmin())


def test_kinds_of_comparisons_may_be_mixed() -> None:
    """A kind given in two parts says what it says in one; a rung beside the start says what the law says of both."""
    whole = choose(ladder_of([30.0, 28.0], kl=KL[:2]))
    parts = Ladder(KL[:2], np.array([1, 2, 2]), np.zeros(3, int), np.array([30.0, 20, 8]), np.array([40.0, 30, 10]))
    assert choose(parts).win_rate == pytest.approx(whole.win_rate, abs=1e-6)
    assert choose(parts).loss_bound == pytest.approx(whole.loss_bound, abs=1e-6)
    chain = choose(beside_below(KL[:2], np.array([30_000.0, 20_000.0]), np.full(2, 40_000.0)))
    assert chain.win_rate[1:] == pytest.approx([0.75, 0.75], abs=5e-3)  # the second is as good as the first


@pytest.mark.parametrize("make", [beside_start, beside_below])
def test_choice_equals_values_worked_out_by_hand(make: Callable[..., Ladder]) -> None:
    """Half of all comparisons won at every rung: no better than the start, whose rate is known."""
    found = choose(make(KL, np.full(4, 20_000.0), np.full(4, 40_000.0)))
    assert found.win_rate == pytest.approx([0.5] * 5, abs=2e-3)
    assert (found.chosen, found.decided, found.more_labels) == (4, True, None)  # all are within delta: the largest KL
    worse = choose(make(KL, np.array([8.0, 6, 3, 1]), np.full(4, 40.0)))
    assert (worse.chosen, worse.decided) == (0, True)  # the start: training made it worse from the first rung on


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
    times = 1 + few.more_labels / 160  # beside the start a win rate is a comparison's own rate
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
        return -float(binom.logpmf(ladder.wins_C, 40, ndtr(ab[0] * d - ab[1] * d * d)).sum())

    law = min(minimize(loss, start, method="Nelder-Mead").fun for start in ([0, 0], [3, 3], [3, 0]))
    free = binom.logpmf(ladder.wins_C, 40, ladder.wins_C / 40).sum()
    assert misfit(ladder) == pytest.approx(chi2.sf(max(2 * (free + law), 0.0), len(wins) - 2), rel=1e-3, abs=1e-6)


def test_where_64_times_as_many_labels_would_not_decide_that_is_said() -> None:
    undecided = choose(ladder_of([1, 0, 1, 0], 1.0), delta=1e-4)
    assert (undecided.decided, undecided.more_labels) == (False, None)


@pytest.mark.parametrize(
    ("a", "b"), [(2.2, 2.6), (1.0, 0.2), (1.5, 1.5), (-0.5, 0.5), (3.0, 4.5), (0.4, 1.2), (6.0, 3.6), (5.0, 2.5)]
)
def test_160_labels_find_a_rung_near_the_best(a: float, b: float) -> None:
    """Peaks at the start, in the middle and at the end, also two stds above the start; ten fresh seeds each."""
    truth = quality(a, b)
    losses = [lost(truth, choose(judged(truth, 40, np.random.default_rng(seed))).chosen) for seed in range(10)]
    assert sum(loss <= 0.05 for loss in losses) >= 8, losses


def test_a_rung_beside_the_one_below_tells_more_than_beside_the_start() -> None:
    """The best rung of policies that beat the start in 98 of 100 comparisons."""
    truth, found = quality(8.0, 5.6), {}
    for make in (beside_start, beside_below):
        below = np.zeros(4) if make is beside_start else truth[:-1]
        found[make] = [
            lost(
                truth,
                choose(make(KL, rng.binomial(40, ndtr(truth[1:] - below)).astype(float), np.full(4, 40.0))).chosen,
            )
            for rng in map(np.random.default_rng, range(40))
        ]
    assert np.mean(found[beside_below]) < 0.7 * np.mean(found[beside_start])


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Where a choice is called decided, its loss is within delta in at least LEVEL of cases; truths from the prior."""
    rng, kept = np.random.default_rng(0), []
    for _ in range(60):
        truth = quality(*rng.normal(0, PRIOR_STD, 2))
        found = choose(judged(truth, 150, rng))
        if found.decided:
            kept.append(lost(truth, found.chosen) <= 0.05)
    assert len(kept) > 40
    assert np.mean(kept) > LEVEL - 0.08  # two standard errors


def test_a_ladder_may_lie_below_one_nat() -> None:
    assert choose(ladder_of([30, 30], kl=np.array([0.01, 0.5]))).win_rate.shape == (3,)


@pytest.mark.parametrize(
    ("ladder", "said"),
    [
        (ladder_of([], kl=np.array([])), "give at least one of rungs"),
        (Ladder(KL[:1], np.array([1]), np.array([1]), np.ones(1), np.ones(1)), "of a lower one"),
        (Ladder(KL[:1], np.array([2]), np.array([0]), np.ones(1), np.ones(1)), "of a lower one"),
        (Ladder(KL[:1], *(np.array([], dtype=int),) * 2, *(np.array([]),) * 2), "give at least one of comparisons"),
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
