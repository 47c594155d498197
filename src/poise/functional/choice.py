"""How far to train, from few labels: side-by-side comparisons with the start at a ladder of KL. NumPy in, NumPy out.

    win rate at KL  =  Phi(d (a - b d)),   d = sqrt(KL) / sqrt(largest KL)

Gao et al. (arXiv 2210.10760) fit gold of best-of-n by d (a - b d). Here it is the mean difference in quality, in stds
of one judgment, so the probit of it is the rate at which the policy's completion is preferred to the start's. For
b > 0 it rises and then falls, and at KL 0 it is one half. The likelihood is binomial, the prior of a and b normal with
mean 0 and std PRIOR_STD. Two numbers for all rungs: what one rung's labels say of its neighbors is used.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr
from scipy.stats import chi2, norm

from poise.errors import PoiseError

PRIOR_STD = 3.0
LEVEL = 0.9  # of the one-sided bounds
_GRID = 61  # points an axis of the posterior, over 5 of its stds to either side
_MOST = 64  # times as many labels are tried before "more labels will not decide"


class Ladder(NamedTuple):
    """What was judged: per rung, its KL in nats, comparisons won by the policy (a tie is half a win), and all."""

    kl_R: Float[ndarray, " rungs"]
    wins_R: Float[ndarray, " rungs"]
    labels_R: Float[ndarray, " rungs"]


class Decision(NamedTuple):
    """Which rung to take. Arrays have the start first, as rung 0 with KL 0 and win rate one half.

    chosen: its number. decided: its win rate is within delta of the best one's, with probability LEVEL.
    win_rate, low, high: posterior mean and one-sided bounds of each rung. Where nearly all comparisons are won or lost
    the posterior is so skewed that a bound may lie beyond its mean, by 2e-4 at 40 labels a rung: it is then the mean.
    loss_bound: upper bound of how much a rung's win rate is below that of the best rung.
    more_labels: labels more, spread as these are, that would decide if the rates are what they seem; None if decided
    already, or if _MOST times as many would not do.
    misfit: p-value of the law against free win rates; None for fewer than three rungs. Small: do not trust the law.
    """

    chosen: int
    decided: bool
    win_rate: Float[ndarray, " points"]
    low: Float[ndarray, " points"]
    high: Float[ndarray, " points"]
    loss_bound: Float[ndarray, " points"]
    more_labels: int | None
    misfit: float | None


def choose(ladder: Ladder, delta: float = 0.05) -> Decision:
    """The rung of the largest KL whose win rate is at most `delta` below the best one's, at level LEVEL.

    Where no rung is that certain: the one with the smallest expected loss, not `decided`. The start is a rung, too.
    Raises PoiseError for a ladder that cannot be one.

    >>> ladder = Ladder(np.array([5.0, 10, 20, 40]), np.array([700.0, 740, 720, 500]), np.full(4, 1000.0))
    >>> choose(ladder).chosen, choose(ladder).decided  # the start, 5, 10, 20 or 40 nats
    (3, True)
    """
    _check(ladder, delta)
    loss_GP, rate_GP, weight_G = _posterior(ladder)
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


def log_posterior(ladder: Ladder, ab: Float[ndarray, "*batch 2"]) -> Float[ndarray, "*batch"]:
    """Of the law's two numbers, up to a constant: binomial likelihood times the prior."""
    eta = _probit(ladder, ab)
    likelihood = ladder.wins_R * log_ndtr(eta) + (ladder.labels_R - ladder.wins_R) * log_ndtr(-eta)
    return np.asarray(likelihood.sum(-1) - (ab**2).sum(-1) / (2 * PRIOR_STD**2))


def misfit(ladder: Ladder) -> float | None:
    """p-value of the likelihood ratio between the law, at its best, and a win rate of its own for each rung."""
    if len(ladder.kl_R) < 3:
        return None
    best = minimize(lambda ab: -_likelihood(ladder, ab), _mode(ladder), method="Nelder-Mead").fun
    rate = ladder.wins_R / ladder.labels_R
    lost = ladder.labels_R - ladder.wins_R
    free = np.where(ladder.wins_R > 0, ladder.wins_R * np.log(np.maximum(rate, 1e-300)), 0.0)
    free = free + np.where(lost > 0, lost * np.log(np.maximum(1 - rate, 1e-300)), 0.0)
    return float(chi2.sf(max(2 * (free.sum() + best), 0.0), len(rate) - 2))


def _likelihood(ladder: Ladder, ab: ndarray) -> float:
    return float(log_posterior(ladder, ab) + (ab**2).sum() / (2 * PRIOR_STD**2))


def _check(ladder: Ladder, delta: float) -> None:
    kl, wins, labels = ladder
    if not (len(kl) == len(wins) == len(labels) >= 1 and (kl > 0).all() and (np.diff(kl) > 0).all()):
        raise PoiseError("a ladder needs at least one rung, each of a larger KL than the one before, above 0")
    if not ((labels > 0).all() and (wins >= 0).all() and (wins <= labels).all()):
        raise PoiseError("every rung of the ladder needs labels, and from 0 to that many wins")
    if not 0 < delta < 0.5:
        raise PoiseError(f"delta is a difference of win rates between 0 and 0.5, got {delta:g}")


def _probit(ladder: Ladder, ab: ndarray) -> ndarray:
    d = np.sqrt(ladder.kl_R / ladder.kl_R[-1])
    return ab[..., :1] * d - ab[..., 1:] * d**2


def _mode(ladder: Ladder) -> ndarray:
    """Of the posterior, which is concave in the log."""
    return np.asarray(minimize(lambda ab: -float(log_posterior(ladder, ab)), np.zeros(2), method="BFGS").x)


def _posterior(ladder: Ladder) -> tuple[ndarray, ndarray, ndarray]:
    """(losses, win rates, weights) at the points of a grid: exact up to its width, which follows the curvature."""
    mode, d = _mode(ladder), np.sqrt(ladder.kl_R / ladder.kl_R[-1])
    slope = np.stack([d, -(d**2)], -1)
    density = norm.pdf(_probit(ladder, mode)) ** 2 / np.clip(
        ndtr(_probit(ladder, mode)) * ndtr(-_probit(ladder, mode)), 1e-12, None
    )
    information = (slope.T * (density * ladder.labels_R)) @ slope + np.eye(2) / PRIOR_STD**2
    axis = np.linspace(-5, 5, _GRID)
    steps = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    ab = mode + steps @ np.linalg.cholesky(np.linalg.inv(information)).T
    logs = log_posterior(ladder, ab)
    weight = np.exp(logs - logs.max())
    rate = np.concatenate([np.full((len(ab), 1), 0.5), ndtr(_probit(ladder, ab))], -1)
    return rate.max(-1, keepdims=True) - rate, rate, weight / weight.sum()


def _quantile(values_GP: ndarray, weight_G: ndarray, level: float) -> ndarray:
    """The weighted quantile of each column."""
    order = values_GP.argsort(0)
    reached = weight_G[order].cumsum(0) >= level - 1e-12
    return np.take_along_axis(np.take_along_axis(values_GP, order, 0), reached.argmax(0)[None], 0)[0]


def _labels_that_decide(ladder: Ladder, delta: float) -> int | None:
    """Labels more after which some rung would be decided, were the win rates those of the posterior mean."""
    _, rate_GP, weight_G = _posterior(ladder)
    rate, times = (weight_G @ rate_GP)[1:], 1.5
    while times <= _MOST:
        labels = times * ladder.labels_R
        loss_GP, _, weight = _posterior(Ladder(ladder.kl_R, rate * labels, labels))
        if (_quantile(loss_GP, weight, LEVEL) <= delta).any():
            return int(np.ceil((times - 1) * ladder.labels_R.sum()))
        times *= 1.5
    return None
