"""Calibration of probabilities, and whether an uncertainty tells wrong from right. NumPy in, NumPy out; no models."""

from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import entr

from poise.functional.shapes import FINITE, checked
from poise.functional.statistics import Counts, shared_by_ties
from poise.runtime.settings import Count, Share, at_least, between

# ---- probabilities of pairs ----

Probability = Annotated[Float[ndarray, " n"], between(0, 1)]


@checked
def brier(probability: Probability) -> float:
    """Mean of (1 - p)^2, p being the probability given to what came about; 1/4 for a coin (Brier 1950).

    >>> brier(np.array([0.5, 1.0]))
    0.125
    """
    return float(np.square(1 - probability).mean())


@checked
def log_loss(probability: Probability) -> float:
    """Mean of -log p in nats, p being the probability given to what came about; log 2 for a coin.

    >>> round(log_loss(np.array([0.5, 0.25])), 4)
    1.0397
    """
    with np.errstate(divide="ignore"):
        return float(-np.log(probability).mean())


@checked
def constant_log_loss(accuracy: Share) -> float:
    """Log loss of the best constant confidence: -a log a - (1 - a) log(1 - a) at confidence a, the accuracy itself.

    What a model reaches that orders pairs as well but says the same probability of each.

    >>> round(constant_log_loss(0.5), 4), constant_log_loss(1.0)
    (0.6931, 0.0)
    """
    return float(entr(accuracy) + entr(1 - accuracy))


@checked
def folded(probability: Probability) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """(confidence, correct) of pairs: max(p, 1 - p), and 1 where p > 1/2, p being that of what came about. Ties 1/2.

    Which text of a pair comes first is arbitrary, so a pair says nothing about calibration below 1/2.

    >>> [part.tolist() for part in folded(np.array([0.75, 0.25, 0.5]))]
    [[0.75, 0.75, 0.5], [1.0, 0.0, 0.5]]
    """
    return np.maximum(probability, 1 - probability), (np.sign(probability - 0.5) + 1) / 2


class Reliability(NamedTuple):
    """Bins of rising confidence: mean confidence, accuracy, and how many fell in."""

    confidence: Float[ndarray, " bins"]
    accuracy: Float[ndarray, " bins"]
    size: Annotated[Int[ndarray, " bins"], at_least(1)]


@checked
def reliability(confidence: Probability, correct: Probability, num_bins: Count = 10) -> Reliability:
    """Bins of equal count (within one), fewer than `num_bins` if there are fewer values.

    Equal confidences that a bin's edge parts share their mean accuracy, so the order of rows does not matter.
    """
    order = np.argsort(confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    correct = shared_by_ties(correct, confidence)
    bins = np.array_split(np.arange(len(order)), min(num_bins, len(order)))
    return Reliability(
        np.array([confidence[rows].mean() for rows in bins]),
        np.array([correct[rows].mean() for rows in bins]),
        np.array([len(rows) for rows in bins]),
    )


@checked
def expected_calibration_error(bins: Reliability) -> float:
    """Sum over bins of count/n * |accuracy - confidence| (arXiv 1706.04599), here with bins of equal count.

    Never negative, so a little above 0 even for perfect probabilities: about sqrt(num_bins / n) / 3.

    >>> expected_calibration_error(Reliability(np.array([0.5, 0.75]), np.array([0.5, 1.0]), np.array([1, 3])))
    0.1875
    """
    return float(np.average(np.abs(bins.accuracy - bins.confidence), weights=bins.size))


# ---- does an uncertainty tell wrong from right? ----


@checked
def risk_coverage(
    correct: Probability, uncertainty: Annotated[Float[ndarray, " n"], FINITE]
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """(coverage k/n, error rate among the k least uncertain) for k = 1..n; ties in expectation (arXiv 1705.08500).

    >>> risk_coverage(np.array([1.0, 0.0]), np.array([0.1, 0.2]))[1].tolist()
    [0.0, 0.5]
    """
    order = np.argsort(uncertainty, kind="stable")
    wrong = shared_by_ties((1 - correct)[order], uncertainty[order])
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(wrong) / kept


@checked
def aurc(
    correct: Probability, uncertainty: Annotated[Float[ndarray, " n"], FINITE], counts: Counts
) -> Float[ndarray, " draws"]:
    """Area under risk–coverage, the mean of its n risks, of every resample; ties in expectation.

    An uncertainty that knows nothing has the error rate as its area; what it gains is that less the area. Of m
    tied rows with e errors, after N rows with E errors, the risks are (E + j e/m) / (N + j), j = 1..m; they sum to
    e + (E - N e/m) (H(N + m) - H(N)), H being the harmonic numbers.
    """
    rows, errors = _in_tie_groups(uncertainty, counts, counts * (1 - correct))
    rows_before, errors_before = rows.cumsum(-1) - rows, errors.cumsum(-1) - errors
    total = rows.sum(-1)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(total.max()) + 1))])
    stretch = harmonic[(rows_before + rows).astype(int)] - harmonic[rows_before.astype(int)]
    rate = errors / np.maximum(rows, 1)
    return (errors + (errors_before - rows_before * rate) * stretch).sum(-1) / total


@checked
def weighted_auroc(
    positive: Probability, score: Annotated[Float[ndarray, " n"], FINITE], counts: Counts
) -> Float[ndarray, " draws"]:
    """`auroc` of every resample; positive: 1 for a positive row, 0 for a negative one, 1/2 for half of each.

    NaN where a resample has no positive row, or nothing else.
    """
    above, below = _in_tie_groups(score, counts * positive, counts * (1 - positive))
    wins = (above * (below.cumsum(-1) - below / 2)).sum(-1)
    pairs = above.sum(-1) * below.sum(-1)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1e-300), np.nan)


def _in_tie_groups(key: ndarray, *weights: ndarray) -> list[ndarray]:
    """Weights (draws, n) summed over rows of equal key, in rising order of key: (draws, groups)."""
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-np.inf))
    return [np.add.reduceat(weight[:, order], starts, axis=-1) for weight in weights]
