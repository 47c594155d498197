"""Metrics: intervals, movement over steps, calibration, what an uncertainty knows. NumPy in, NumPy out; no models."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import entr
from scipy.stats import rankdata
from scipy.stats import t as t_distribution


def shared_by_ties(values: ndarray, key: ndarray) -> ndarray:
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


def movement(means: Float[ndarray, " checkpoints"]) -> dict[str, float]:
    """How much something moves over checkpoints: std (n - 1; NaN for one); range, highest less lowest; largest_drop,
    from a checkpoint to any later one, 0 if it never falls.

    >>> movement(np.array([0.25, 0.75, 0.5]))
    {'std': 0.25, 'range': 0.5, 'largest_drop': 0.25}
    """
    std = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    drop = float((np.maximum.accumulate(means) - means).max())
    return {"std": std, "range": float(np.ptp(means)), "largest_drop": drop}


def smoothed(values: Float[ndarray, " steps"], width: int = 3) -> Float[ndarray, " steps"]:
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


def bootstrap_interval(
    values: Float[ndarray, " samples"], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; each value is one independent unit (a prompt, a seed)."""
    generator = np.random.default_rng(seed)
    index = generator.integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[index].mean(-1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: Float[ndarray, "samples ..."]) -> Float[ndarray, "2 ..."]:
    """Student's 95 % interval of the mean over the first axis; NaN for a single value.

    For few units, such as seeds: where nothing differs, a bootstrap of three leaves out zero one time in five.

    >>> t_interval(np.array([1.0, 2.0, 3.0])).round(2).tolist()
    [-0.48, 4.48]
    """
    count, mean = len(values), values.mean(0)
    if count < 2:
        return np.full((2, *mean.shape), np.nan)
    reach = t_distribution.ppf(0.975, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
    return np.stack([mean - reach, mean + reach])


def resampled_counts(num_units: int, draws: int, seed: int) -> Float[ndarray, "draws {num_units}"]:
    """Bootstrap resamples of units as shares that sum to 1: `counts @ values` are their means."""
    drawn = np.random.default_rng(seed).integers(num_units, size=(draws, num_units))
    drawn += num_units * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * num_units).reshape(draws, num_units) / num_units


def auroc(positive: Float[ndarray, " n"], negative: Float[ndarray, " m"]) -> float:
    """P(a random positive scores above a random negative), ties counted half."""
    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


# ---- probabilities of pairs ----


def brier(probability: Float[ndarray, " n"]) -> float:
    """Mean of (1 - p)^2, p being the probability given to what came about; 1/4 for a coin (Brier 1950).

    >>> brier(np.array([0.5, 1.0]))
    0.125
    """
    return float(np.square(1 - probability).mean())


def log_loss(probability: Float[ndarray, " n"]) -> float:
    """Mean of -log p in nats, p being the probability given to what came about; log 2 for a coin.

    >>> round(log_loss(np.array([0.5, 0.25])), 4)
    1.0397
    """
    with np.errstate(divide="ignore"):
        return float(-np.log(probability).mean())


def constant_log_loss(accuracy: float) -> float:
    """Log loss of the best constant confidence: -a log a - (1 - a) log(1 - a) at confidence a, the accuracy itself.

    What a model reaches that orders pairs as well but says the same probability of each.

    >>> round(constant_log_loss(0.5), 4), constant_log_loss(1.0)
    (0.6931, 0.0)
    """
    return float(entr(accuracy) + entr(1 - accuracy))


def folded(probability: Float[ndarray, " n"]) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
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
    size: Int[ndarray, " bins"]


def reliability(confidence: Float[ndarray, " n"], correct: Float[ndarray, " n"], num_bins: int = 10) -> Reliability:
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


def expected_calibration_error(bins: Reliability) -> float:
    """Sum over bins of count/n * |accuracy - confidence| (arXiv 1706.04599), here with bins of equal count.

    Never negative, so a little above 0 even for perfect probabilities: about sqrt(num_bins / n) / 3.

    >>> expected_calibration_error(Reliability(np.array([0.5, 0.75]), np.array([0.5, 1.0]), np.array([1, 3])))
    0.1875
    """
    return float(np.average(np.abs(bins.accuracy - bins.confidence), weights=bins.size))


# ---- does an uncertainty tell wrong from right? ----

Counts = Float[
    ndarray, "draws n"
]  # how often each of n rows is in each of several resamples; ones: the rows themselves


def risk_coverage(
    correct: Float[ndarray, " n"], uncertainty: Float[ndarray, " n"]
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """(coverage k/n, error rate among the k least uncertain) for k = 1..n; ties in expectation (arXiv 1705.08500).

    >>> risk_coverage(np.array([1.0, 0.0]), np.array([0.1, 0.2]))[1].tolist()
    [0.0, 0.5]
    """
    order = np.argsort(uncertainty, kind="stable")
    wrong = shared_by_ties((1 - correct)[order], uncertainty[order])
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(wrong) / kept


def aurc(correct: Float[ndarray, " n"], uncertainty: Float[ndarray, " n"], counts: Counts) -> Float[ndarray, " draws"]:
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


def weighted_auroc(
    positive: Float[ndarray, " n"], score: Float[ndarray, " n"], counts: Counts
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


def spearman(one: Float[ndarray, " n"], other: Float[ndarray, " n"]) -> float:
    """Rank correlation, in [-1, 1]; NaN if either is constant.

    >>> spearman(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0]))
    -1.0
    """
    ranks = np.stack([rankdata(one), rankdata(other)])
    ranks -= ranks.mean(-1, keepdims=True)
    scale = np.sqrt(np.square(ranks).sum(-1).prod())
    return float(ranks.prod(0).sum() / scale) if scale > 0 else float("nan")


def bootstrap_intervals(
    statistics: Callable[[Counts], Float[ndarray, "draws statistics"]],
    unit: Int[ndarray, " n"],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Float[ndarray, "statistics 2"]:
    """Percentile intervals of statistics of resampled rows.

    unit: rows of equal number are not independent and are drawn together, e.g. votes on one pair; 0..units-1.
    The same seed draws the same resamples, so differences within `statistics` are paired. NaN draws are left out.
    """
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


# ---- benchmarks of reward models ----

_CODE = ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")

REWARD_BENCH = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", *_CODE),
}  # fmt: skip


def reward_bench(accuracy: Mapping[str, float], count: Mapping[str, int]) -> dict[str, float]:
    """Score of every section of RewardBench (arXiv 2403.13787) that is present, from its subsets.

    The mean over a section's pairs, but in Reasoning math-prm counts half and the code subsets together the other
    half. The benchmark's own score is the mean of the four sections.
    """
    scores = {}
    for section, members in REWARD_BENCH.items():
        parts = [("math-prm",), _CODE] if section == "Reasoning" else [members]
        present = [[name for name in part if name in accuracy] for part in parts]
        means = [
            np.average([accuracy[name] for name in part], weights=[count[name] for name in part])
            for part in present
            if part
        ]
        if means:
            scores[section] = float(np.mean(means))
    return scores


def style_matrix(
    chosen: Float[ndarray, "sets styles"], rejected: Float[ndarray, "sets styles"]
) -> Float[ndarray, "styles styles"]:
    """[i, j]: how often the chosen text in style i beats the rejected one in style j (RM-Bench, arXiv 2410.16184).

    Ties count half; the benchmark's own script counts them as lost.
    """
    return ((np.sign(chosen[:, :, None] - rejected[:, None, :]) + 1) / 2).mean(0)


def style_scores(matrix: Float[ndarray, "styles styles"]) -> dict[str, float]:
    """Easy, normal, hard and their mean over a style matrix whose styles go from plain to fancy.

    easy: the chosen text is the fancier one (below the diagonal); normal: both in one style; hard: the rejected one
    is the fancier (above the diagonal), e.g. a concise chosen text against a detailed rejected one.

    >>> style_scores(np.array([[0.5, 0.25, 0.5], [0.75, 0.5, 0.75], [1.0, 0.5, 0.5]]))["hard"]
    0.5
    """
    size = len(matrix)
    return {
        "easy": float(matrix[np.tril_indices(size, -1)].mean()),
        "normal": float(np.diag(matrix).mean()),
        "hard": float(matrix[np.triu_indices(size, 1)].mean()),
        "mean": float(matrix.mean()),
    }


def picks_chosen(chosen: Float[ndarray, " m"], rejected: Float[ndarray, " n"]) -> float:
    """1 if the best of a set is a chosen text; where several are best, the share of chosen ones among them.

    By chance: m / (m + n).

    >>> picks_chosen(np.array([1.0, 3.0]), np.array([2.0])), picks_chosen(np.array([3.0]), np.array([3.0, 3.0]))
    (1.0, 0.3333333333333333)
    """
    best = max(chosen.max(), rejected.max())
    wins, losses = (chosen == best).sum(), (rejected == best).sum()
    return float(wins / (wins + losses))
