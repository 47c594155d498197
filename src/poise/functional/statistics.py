"""Intervals, resamples, ranks and movement over steps. NumPy in, NumPy out; no models."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import ndtri
from scipy.stats import mannwhitneyu, sem, spearmanr
from scipy.stats import t as t_distribution

from poise.errors import PoiseError
from poise.functional.shapes import FINITE, Finite, checked
from poise.runtime.settings import Count, Seed, Share, at_least, between

Level = Annotated[float, between(0, 1, open_low=True, open_high=True)]
FEW = 20  # a bootstrap of fewer units is too narrow: of two, its interval is that between them


@checked
def shared_by_ties(values: Float[ndarray, "*batch n"], key: Float[ndarray, "*batch n"]) -> Float[ndarray, "*batch n"]:
    """Each value replaced by the mean of those of equal key: the expectation over a random order of ties.

    Along the last axis, in which `key` must rise.

    >>> shared_by_ties(np.array([1.0, 2.0, 6.0]), np.array([0.0, 3.0, 3.0])).tolist()
    [1.0, 4.0, 4.0]
    """
    first = np.ones(key.shape, dtype=bool)  # of its group
    first[..., 1:] = key[..., 1:] != key[..., :-1]
    if first.all():
        return values
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=first.size)
    return np.repeat(np.add.reduceat(values.ravel(), starts) / counts, counts).reshape(values.shape)


# ---- steps ----


@checked
def movement(means: Float[ndarray, " checkpoints"]) -> dict[str, float]:
    """How much something moves over checkpoints: std (n - 1; NaN for one); range, highest less lowest; largest_drop,
    from a checkpoint to any later one, 0 if it never falls.

    >>> movement(np.array([0.25, 0.75, 0.5]))
    {'std': 0.25, 'range': 0.5, 'largest_drop': 0.25}
    """
    std = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    drop = float((np.maximum.accumulate(means) - means).max())
    return {"std": std, "range": float(np.ptp(means)), "largest_drop": drop}


@checked
def smoothed(values: Float[ndarray, " steps"], width: Count = 3) -> Float[ndarray, " steps"]:
    """Centered moving average of the values that are there (not NaN); over fewer at the ends and beside gaps.

    >>> smoothed(np.array([0.0, 3.0, np.nan, 1.0])).tolist()
    [1.5, 1.5, 2.0, 1.0]
    """
    known, kernel = ~np.isnan(values), np.ones(width)
    reach = slice(width // 2, width // 2 + len(values))
    total = np.convolve(np.where(known, values, 0.0), kernel)[reach]
    count = np.convolve(known.astype(float), kernel)[reach]
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


# ---- intervals ----


@checked
def bootstrap_interval(
    values: Float[ndarray, " samples"], level: Level = 0.95, draws: Count = 10_000, seed: Seed = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; each value is one independent unit (a prompt, a seed)."""
    generator = np.random.default_rng(seed)
    index = generator.integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[index].mean(-1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@checked
def t_interval(values: Float[ndarray, "samples ..."], level: Level = 0.95) -> Float[ndarray, "2 ..."]:
    """Student's interval of the mean over the first axis; NaN for a single value.

    For few units, such as seeds: where nothing differs, a bootstrap of three leaves out zero one time in five.

    >>> t_interval(np.array([1.0, 2.0, 3.0])).round(2).tolist()
    [-0.48, 4.48]
    """
    count, mean = len(values), values.mean(0)
    if count < 2:
        return np.full((2, *mean.shape), np.nan)
    # Not by `loc` and `scale`: scipy gives NaN for equal values, whose interval is their mean.
    return np.stack([mean + end * sem(values) for end in t_distribution.interval(level, count - 1)])


@checked
def mean_interval(values: Float[ndarray, " samples"]) -> tuple[float, float]:
    """95 % interval of the mean of independent units: Student's of few, a bootstrap of many; NaN for a single one."""
    low, high = t_interval(values) if len(values) < FEW else bootstrap_interval(values)
    return float(low), float(high)


@checked
def ratio_interval(over: Float[ndarray, " units"], under: Float[ndarray, " units"]) -> tuple[float, float]:
    """Student's 95 % interval of mean(over) / mean(under), both of the same independent units (Fieller 1954).

    It holds every r for which the mean of over - r under may be 0 by its own interval. NaN where the mean of `under`
    may be 0 itself, and for a single unit: then the interval has no end.

    >>> [round(end, 3) for end in ratio_interval(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))]
    [-0.242, 2.242]
    """
    count = len(over)
    if count < 2:
        return math.nan, math.nan
    covariance = np.cov(over, under) * float(t_distribution.ppf(0.975, count - 1)) ** 2 / count
    squared = under.mean() ** 2 - covariance[1, 1]
    if squared <= 0:
        return math.nan, math.nan
    middle = over.mean() * under.mean() - covariance[0, 1]
    reach = math.sqrt(max(middle**2 - squared * (over.mean() ** 2 - covariance[0, 0]), 0.0))
    return float((middle - reach) / squared), float((middle + reach) / squared)


@checked
def share_interval(
    right: Annotated[Float[ndarray, " rows"], between(0, 1)], unit: Annotated[Int[ndarray, " rows"], at_least(0)]
) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of `right`, for as many rows as are independent.

    Rows of equal `unit` depend on each other, e.g. pairs of one prompt. n rows of m units are worth n / d: d is by how
    much the variance of the mean, taken over units, exceeds that of n independent rows (the design effect; Kish 1965),
    and no less than 1. Where all rows are alike they are worth m. With units of several rows Student's quantile, of
    m - 1 degrees of freedom, stands for the normal one; of a single such unit the interval is all of [0, 1].

    >>> [round(end, 2) for end in share_interval(np.array([1.0, 1, 1, 0]), np.arange(4))]
    [0.3, 0.95]
    """
    places = np.unique(unit, return_inverse=True)[1]
    share, rows, units = float(right.mean()), len(right), int(places.max()) + 1
    if units == 1 < rows:
        return 0.0, 1.0
    if units == rows:
        effect, quantile = 1.0, float(ndtri(0.975))
    else:
        alone, together = share * (1 - share) * rows, np.square(np.bincount(places, right - share)).sum()
        effect = max(together * units / (units - 1) / alone, 1.0) if alone > 0 else rows / units
        quantile = float(t_distribution.ppf(0.975, units - 1))
    each = quantile**2 * effect / rows
    middle, reach = share + each / 2, math.sqrt(each * share * (1 - share) + each**2 / 4)
    return float((middle - reach) / (1 + each)), float((middle + reach) / (1 + each))


@checked
def resampled_counts(num_units: Count, draws: Count, seed: Seed) -> Float[ndarray, "draws {num_units}"]:
    """Bootstrap resamples of units as shares that sum to 1: `counts @ values` are their means."""
    drawn = np.random.default_rng(seed).integers(num_units, size=(draws, num_units))
    drawn += num_units * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * num_units).reshape(draws, num_units) / num_units


@checked
def student_shares(num_units: Count, draws: Count, seed: Seed) -> Float[ndarray, "draws {num_units}"]:
    """Random shares that sum to 1, some of them negative: `shares @ values` are draws of the mean of few units.

    For every `values` they are distributed as mean + t * std / sqrt(n), with t of n - 1 degrees of freedom and std of
    divisor n - 1. Their quantiles are therefore Student's intervals, and those of differences are paired. One unit has
    share 1.
    """
    if num_units == 1:
        return np.ones((draws, 1))
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=(draws, num_units))
    normal -= normal.mean(-1, keepdims=True)
    width = np.sqrt(generator.chisquare(num_units - 1, size=(draws, 1)) * num_units)
    return 1 / num_units + normal / width


@checked
def auroc(positive: Float[ndarray, " n"], negative: Float[ndarray, " m"]) -> float:
    """P(a random positive scores above a random negative), ties counted half."""
    wins = mannwhitneyu(positive, negative, method="asymptotic").statistic  # the p-value is not used
    return float(wins / (len(positive) * len(negative)))


# ---- resamples of rows ----

# how often each of n rows is in each of several resamples; ones: the rows themselves
Counts = Annotated[Float[ndarray, "draws n"], at_least(0, sys.float_info.max)]


@checked
def spearman(one: Float[ndarray, " n"], other: Float[ndarray, " n"]) -> float:
    """Rank correlation, in [-1, 1]; NaN if either is constant.

    >>> spearman(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0]))
    -1.0
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:  # scipy warns
        return math.nan
    return float(spearmanr(one, other).statistic)


@checked
def bootstrap_intervals(
    statistics: Callable[[Counts], Float[ndarray, "draws statistics"]],
    unit: Annotated[Int[ndarray, " n"], at_least(0)],
    level: Level = 0.95,
    draws: Count = 1000,
    seed: Seed = 0,
) -> Float[ndarray, "statistics 2"]:
    """Percentile intervals of statistics of resampled rows; of few units Student's, by the jackknife (Tukey 1958).

    unit: rows of equal number are not independent and are drawn together, e.g. votes on one pair; 0..units-1.
    The same seed draws the same resamples, so differences within `statistics` are paired. NaN draws are left out.
    A statistic that some unit alone makes possible, such as an AUROC by a single error, has percentiles in any case.
    """
    num_units = int(unit.max()) + 1
    if not 1 < num_units < FEW:
        return _percentiles(statistics, unit, level, draws, seed)
    # Pseudo-values: units times the statistic of all rows, less units - 1 times that of the rows without one unit.
    without = statistics(1.0 - (np.arange(num_units)[:, None] == unit))
    pseudo = num_units * statistics(np.ones((1, len(unit)))) - (num_units - 1) * without
    found, missing = t_interval(pseudo, level).T, np.isnan(pseudo).any(0)
    return (
        np.where(missing[:, None], _percentiles(statistics, unit, level, draws, seed), found)
        if missing.any()
        else found
    )


def _percentiles(
    statistics: Callable[[Counts], ndarray], unit: ndarray, level: float, draws: int, seed: int
) -> Float[ndarray, "statistics 2"]:
    generator = np.random.default_rng(seed)
    num_units = int(unit.max()) + 1
    chunk = max(1, 2_000_000 // len(unit))
    values = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = generator.integers(num_units, size=(size, num_units)) + num_units * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * num_units).reshape(size, num_units)
        values.append(statistics(times[:, unit].astype(float)))
    stacked = np.concatenate(values)
    unknown = np.isnan(stacked).all(0)
    stacked[:, unknown] = 0.0
    low, high = np.nanquantile(stacked, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(unknown[:, None], np.nan, np.stack([low, high], -1))


@checked
def intervals_of_means(
    values: Float[ndarray, "rows columns"], unit: Annotated[Int[ndarray, " rows"], at_least(0)], seed: Seed
) -> list[list[float]]:
    """95 % bootstrap intervals of each column's mean; rows of equal `unit` are drawn together."""

    def means(counts: Counts) -> ndarray:
        return counts @ values / counts.sum(-1, keepdims=True)

    return bootstrap_intervals(means, unit, seed=seed).tolist()


@checked
def exact_at_ends(interval: Sequence[float], share: Share, units: Count) -> list[float]:
    """The interval of a share, exact (Clopper–Pearson, 95 %) where it is 0 or 1: there a bootstrap has no width.

    With all of n right, shares below p are refuted once pⁿ < 2.5 %.

    >>> [round(end, 3) for end in exact_at_ends([1.0, 1.0], 1.0, 60)]
    [0.94, 1.0]
    """
    room = 1 - 0.025 ** (1 / units)
    if share == 1.0:
        return [1 - room, 1.0]
    return [0.0, room] if share == 0.0 else list(interval)


@checked
def interval_of_share(
    drawn: Sequence[float],
    right: Annotated[Float[ndarray, " rows"], between(0, 1)],
    unit: Annotated[Int[ndarray, " rows"], at_least(0)],
) -> list[float]:
    """95 % interval of the mean of `right`: Wilson's of few units (`share_interval`), else `drawn`, the bootstrap, or
    at 0 and 1 the exact one."""
    units = len(np.unique(unit))
    if units < FEW:
        return list(share_interval(right, unit))
    return exact_at_ends(drawn, float(right.mean()), units)


@checked
def mean_between(
    x: Annotated[Float[ndarray, " steps"], FINITE], y: Float[ndarray, " steps"], low: Finite, high: Finite
) -> float:
    """Mean over x in [low, high] of the line through the points (x, y), in order of x: gold at equal KL, for instance.

    Points of equal x are averaged. Beyond the points the line is flat. Raises PoiseError unless low < high.

    >>> mean_between(np.array([0.0, 2.0]), np.array([0.0, 4.0]), 1.0, 2.0)
    3.0
    """
    if not low < high:
        raise PoiseError(f"a mean between {low:g} and {high:g} needs a range from low to high")
    places, at = np.unique(x, return_inverse=True)
    values = np.bincount(at, y) / np.bincount(at)
    inside = np.concatenate([[low], places[(places > low) & (places < high)], [high]])
    return float(np.trapezoid(np.interp(inside, places, values), inside) / (high - low))


@checked
def holm(p_values: Sequence[Share]) -> list[float]:
    """p-values corrected for there being several (Holm 1979): the k-th smallest of m times m - k + 1, never decreasing.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()
