"""How far to train, from few labels: side-by-side comparisons along a ladder of KL. NumPy in, NumPy out.

    rate at which rung i's completion is preferred to j's  =  Phi(q_i - q_j)
    q  =  d (a - b d),   d = sqrt(KL) / sqrt(largest KL);   the start has KL 0 and q 0

Gao et al. (arXiv 2210.10760) fit gold of best-of-n by d (a - b d). Here it is the mean difference in quality to the
start, in stds of one judgment. For b > 0 it rises and then falls. The likelihood is binomial, the prior of a and b
normal with mean 0 and std PRIOR_STD. Two numbers for all rungs: what one rung's labels say of its neighbors is used.

A judgment tells most where the two sides are alike: where a rung beats the start nine times in ten, the rungs beside it
do, too, and 40 labels cannot tell which is best. So a rung is compared with the one below it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr
from scipy.stats import chi2, norm

from poise.errors import PoiseError
from poise.functional.shapes import checked

PRIOR_STD = 3.0
LEVEL = 0.9  # of the one-sided bounds
_GRID = 61  # points an axis of the posterior, over 5 of its stds to either side
_MOST = 64  # times as many labels are tried before "more labels will not decide"


class Ladder(NamedTuple):
    """What was judged: rungs, and kinds of comparisons between two of them or of one and the start.

    kl_R: KL of each rung in nats. rung_C: number of a kind's rung, from 1. beside_C: number of the lower one that it
    stood beside, 0 for the start. wins_C: comparisons won by the rung (a tie is half a win). labels_C: all of them.
    """

    kl_R: Float[ndarray, " rungs"]
    rung_C: Integer[ndarray, " comparisons"]
    beside_C: Integer[ndarray, " comparisons"]
    wins_C: Float[ndarray, " comparisons"]
    labels_C: Float[ndarray, " comparisons"]


def beside_below(kl_R: ndarray, wins_R: ndarray, labels_R: ndarray) -> Ladder:
    """A ladder whose rungs were each compared with the one below, the first with the start."""
    rung_C = np.arange(1, len(kl_R) + 1)
    return Ladder(kl_R, rung_C, rung_C - 1, wins_R, labels_R)


def beside_start(kl_R: ndarray, wins_R: ndarray, labels_R: ndarray) -> Ladder:
    """A ladder whose rungs were all compared with the start."""
    rung_C = np.arange(1, len(kl_R) + 1)
    return Ladder(kl_R, rung_C, np.zeros_like(rung_C), wins_R, labels_R)


class Decision(NamedTuple):
    """Which rung to take. Arrays have the start first, as rung 0 with KL 0 and win rate one half.

    chosen: its number. decided: beside it the best one wins at most 1/2 + delta, with probability LEVEL.
    win_rate, low, high: posterior mean and one-sided bounds of each rung's win rate against the start. Where nearly all
    comparisons are won or lost the posterior is so skewed that a bound may lie beyond its mean, by 2e-4 at 40 labels a
    rung: it is then the mean.
    loss_bound: upper bound of how far above one half the best rung wins against this one.
    more_labels: labels more, spread as these are, that would decide if the rates are what they seem; None if decided
    already, or if _MOST times as many would not do.
    misfit: p-value of the law against a free rate for each kind of comparison; None for fewer than three. Small: do not
    trust the law.
    """

    chosen: int
    decided: bool
    win_rate: Float[ndarray, " points"]
    low: Float[ndarray, " points"]
    high: Float[ndarray, " points"]
    loss_bound: Float[ndarray, " points"]
    more_labels: int | None
    misfit: float | None


@checked
def choose(ladder: Ladder, delta: float = 0.05) -> Decision:
    """The rung of the largest KL against which the best one wins at most 1/2 + `delta`, at level LEVEL.

    Where no rung is that certain: the one with the smallest expected loss, not `decided`. The start is a rung, too.
    Raises PoiseError for a ladder that cannot be one.

    >>> ladder = beside_below(np.array([5.0, 10, 20, 40]), np.array([700.0, 530, 490, 300]), np.full(4, 1000.0))
    >>> choose(ladder).chosen, choose(ladder).decided  # the start, 5, 10, 20 or 40 nats
    (3, True)
    """
    _check(ladder, delta)
    quality_GP, weight_G = _posterior(ladder)
    loss_GP, rate_GP = _loss(quality_GP), ndtr(quality_GP)
    expected, bounds, win_rate = weight_G @ loss_GP, _quantile(loss_GP, weight_G, LEVEL), weight_G @ rate_GP
    within = np.flatnonzero(bounds <= delta)
    decided = len(within) > 0
    return Decision(
        chosen=int(within[-1] if decided else expected.argmin()),
        decided=decided,
        win_rate=win_rate,
        low=np.minimum(_quantile(rate_GP, weight_G, 1 - LEVEL), win_rate),
        high=np.maximum(_quantile(rate_GP, weight_G, LEVEL), win_rate),
        loss_bound=bounds,
        more_labels=None if decided else _labels_that_decide(ladder, delta),
        misfit=misfit(ladder),
    )


@checked
def log_posterior(ladder: Ladder, ab: Float[ndarray, "*batch 2"]) -> Float[ndarray, "*batch"]:
    """Of the law's two numbers, up to a constant: binomial likelihood times the prior."""
    eta = ab @ _slopes(ladder).T
    likelihood = ladder.wins_C * log_ndtr(eta) + (ladder.labels_C - ladder.wins_C) * log_ndtr(-eta)
    return np.asarray(likelihood.sum(-1) - (ab**2).sum(-1) / (2 * PRIOR_STD**2))


@checked
def misfit(ladder: Ladder) -> float | None:
    """p-value of the likelihood ratio between the law, at its best, and a free rate for each kind of comparison."""
    _check(ladder)
    if len(ladder.labels_C) < 3:
        return None
    best = minimize(lambda ab: -_likelihood(ladder, ab), _mode(ladder), method="Nelder-Mead").fun
    rate = ladder.wins_C / ladder.labels_C
    lost = ladder.labels_C - ladder.wins_C
    free = np.where(ladder.wins_C > 0, ladder.wins_C * np.log(np.maximum(rate, 1e-300)), 0.0)
    free = free + np.where(lost > 0, lost * np.log(np.maximum(1 - rate, 1e-300)), 0.0)
    return float(chi2.sf(max(2 * (free.sum() + best), 0.0), len(rate) - 2))


def _likelihood(ladder: Ladder, ab: ndarray) -> float:
    return float(log_posterior(ladder, ab) + (ab**2).sum() / (2 * PRIOR_STD**2))


def _check(ladder: Ladder, delta: float = 0.05) -> None:
    kl, rung, beside, wins, labels = ladder
    if not (len(kl) >= 1 and (kl > 0).all() and (np.diff(kl) > 0).all() and kl[-1] < np.inf):
        raise PoiseError("a ladder needs at least one rung, each of a larger KL than the one before, above 0")
    if not (len(rung) == len(beside) == len(wins) == len(labels) >= 1):
        raise PoiseError("a ladder needs comparisons, each kind with its rung, what it stood beside, wins and labels")
    if not ((beside >= 0).all() and (beside < rung).all() and (rung <= len(kl)).all()):
        raise PoiseError("every comparison must be of a rung of the ladder and of a lower one, or the start")
    if not ((labels > 0).all() and (labels < np.inf).all() and (wins >= 0).all() and (wins <= labels).all()):
        raise PoiseError("every comparison of the ladder needs labels, and from 0 to that many wins")
    if not 0 < delta < 0.5:
        raise PoiseError(f"delta is a win rate above one half, between 0 and 0.5, got {delta:g}")


def _terms(ladder: Ladder) -> ndarray:
    """(points, 2), the start first: q of a point is its row times (a, b)."""
    d = np.sqrt(np.concatenate([[0.0], ladder.kl_R]) / ladder.kl_R[-1])
    return np.stack([d, -(d**2)], -1)


def _slopes(ladder: Ladder) -> ndarray:
    """(comparisons, 2): the probit of a comparison's rate is its row times (a, b)."""
    terms = _terms(ladder)
    return np.asarray(terms[ladder.rung_C] - terms[ladder.beside_C])


def _mode(ladder: Ladder) -> ndarray:
    """Of the posterior, which is concave in the log."""
    return np.asarray(minimize(lambda ab: -float(log_posterior(ladder, ab)), np.zeros(2), method="BFGS").x)


def _posterior(ladder: Ladder) -> tuple[ndarray, ndarray]:
    """(qualities of all points, weights) on a grid: exact up to its width, which follows the curvature."""
    mode, slopes = _mode(ladder), _slopes(ladder)
    eta = slopes @ mode
    density = norm.pdf(eta) ** 2 / np.clip(ndtr(eta) * ndtr(-eta), 1e-12, None)
    information = (slopes.T * (density * ladder.labels_C)) @ slopes + np.eye(2) / PRIOR_STD**2
    axis = np.linspace(-5, 5, _GRID)
    steps = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    ab = mode + steps @ np.linalg.cholesky(np.linalg.inv(information)).T
    logs = log_posterior(ladder, ab)
    weight = np.exp(logs - logs.max())
    return ab @ _terms(ladder).T, weight / weight.sum()


def _loss(quality_GP: ndarray) -> ndarray:
    """How far above one half the best point wins against each."""
    return np.asarray(ndtr(quality_GP.max(-1, keepdims=True) - quality_GP) - 0.5)


def _quantile(values_GP: ndarray, weight_G: ndarray, level: float) -> ndarray:
    """The weighted quantile of each column."""
    order = values_GP.argsort(0)
    reached = weight_G[order].cumsum(0) >= level - 1e-12
    return np.take_along_axis(np.take_along_axis(values_GP, order, 0), reached.argmax(0)[None], 0)[0]


def _labels_that_decide(ladder: Ladder, delta: float) -> int | None:
    """Labels more after which some rung would be decided, were the rates those of the posterior mean."""
    quality_GP, weight_G = _posterior(ladder)
    rate, times = weight_G @ ndtr(quality_GP[:, ladder.rung_C] - quality_GP[:, ladder.beside_C]), 1.5
    while times <= _MOST:
        labels = times * ladder.labels_C
        quality, weight = _posterior(ladder._replace(wins_C=rate * labels, labels_C=labels))
        if (_quantile(_loss(quality), weight, LEVEL) <= delta).any():
            return int(np.ceil((times - 1) * ladder.labels_C.sum()))
        times *= 1.5
    return None
