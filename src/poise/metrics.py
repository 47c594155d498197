"""Metrics: best-of-n, exactly tilted policies, intervals. NumPy in, NumPy out; no models.

A *pool* is N completions sampled independently from one policy for each of P prompts; `proxy` and `gold` are its
scores, shape (P, N).
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import gammaln, xlogy
from scipy.stats import rankdata


def best_of_n_kl(n: Int[ndarray, " sizes"]) -> Float[ndarray, " sizes"]:
    """KL(best-of-n || initial policy) = log n - (n - 1) / n, in nats (arXiv 2210.10760).

    >>> best_of_n_kl(np.array([1, 4])).round(4).tolist()
    [0.0, 0.6363]
    """
    return np.log(n) - (n - 1) / n


def best_of_n(
    proxy: Float[ndarray, "prompts pool"], score: Float[ndarray, "prompts pool"], n: Int[ndarray, " sizes"]
) -> Float[ndarray, "prompts sizes"]:
    """Expected `score` of the completion of highest `proxy` among n drawn without replacement, per prompt.

    Unbiased over the pool, no resampling: the completion of (ascending) rank i of N wins with probability
    C(i-1, n-1) / C(N, n). Ties in `proxy` are ordered by position. Every n must be in 1..N.
    """
    size = proxy.shape[-1]
    rank = np.arange(1, size + 1)[:, None]
    with np.errstate(invalid="ignore"):
        log_weight = _log_binomial(rank - 1, n[None] - 1) - _log_binomial(np.array(size), n[None])
    weight = np.where(rank >= n[None], np.exp(log_weight), 0.0)
    order = np.argsort(proxy, axis=-1, kind="stable")
    return np.take_along_axis(score, order, -1) @ weight


def _log_binomial(total: ndarray, chosen: ndarray) -> ndarray:
    return gammaln(total + 1.0) - gammaln(chosen + 1.0) - gammaln(np.maximum(total - chosen, 0) + 1.0)


def tilted(
    proxy: Float[ndarray, "prompts pool"], score: Float[ndarray, "prompts pool"], kl_coef: float
) -> tuple[Float[ndarray, " prompts"], Float[ndarray, " prompts"]]:
    """(expected `score`, KL in nats) per prompt of the optimum pi ~ pi_0 exp(proxy / kl_coef) of the RLHF objective.

    Self-normalised over the pool, so the KL cannot exceed log N; read it as exact well below that.
    """
    logits = proxy / kl_coef
    logits = logits - logits.max(-1, keepdims=True)
    weight = np.exp(logits)
    weight = weight / weight.sum(-1, keepdims=True)
    kl = xlogy(weight, weight * proxy.shape[-1]).sum(-1)
    return (weight * score).sum(-1), kl


def bootstrap_interval(
    values: Float[ndarray, " samples"], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; each value is one independent unit (a prompt, a seed)."""
    generator = np.random.default_rng(seed)
    index = generator.integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[index].mean(-1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auroc(positive: Float[ndarray, " n"], negative: Float[ndarray, " m"]) -> float:
    """P(a random positive scores above a random negative), ties counted half."""
    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
