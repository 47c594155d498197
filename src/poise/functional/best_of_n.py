"""Selection from a pool: best-of-n, exactly tilted policies, and the laws of over-optimization. NumPy only.

A *pool* is N completions sampled independently from one policy for each of P prompts; `proxy` and `gold` are its
scores, shape (P, N).
"""

import sys
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import gammaln, xlogy

from poise.errors import PoiseError
from poise.functional.shapes import FINITE, checked
from poise.functional.statistics import shared_by_ties
from poise.runtime.settings import Count, above, at_least

# Of the tilted policies that curves show: from next to no KL to where a pool of a hundred ends.
KL_COEFS = (2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12)
# With fewer effective samples a prompt, a tilted policy's KL and gold are those of the pool's few best completions.
MIN_SAMPLES = 10.0


@checked
def sizes(per_prompt: int) -> Int[ndarray, " sizes"]:
    """The n of best-of-n that curves show, 1 to all.

    >>> sizes(24).tolist()
    [1, 2, 3, 5, 7, 11, 16, 24]
    """
    if per_prompt < 1:
        raise PoiseError(f"a pool has at least 1 completion of each prompt, not {per_prompt}")
    return np.unique(np.geomspace(1, per_prompt, 9).round().astype(int))


@checked
def best_of_n_kl(n: Int[ndarray, " sizes"]) -> Float[ndarray, " sizes"]:
    """KL(best-of-n || initial policy) = log n - (n - 1) / n, in nats (arXiv 2210.10760). PoiseError for n below 1.

    >>> best_of_n_kl(np.array([1, 4])).round(4).tolist()
    [0.0, 0.6363]
    """
    if not (np.asarray(n) >= 1).all():
        raise PoiseError("the n of best-of-n must be at least 1")
    return np.log(n) - (n - 1) / n


@checked
def best_of_n(
    proxy: Float[ndarray, "prompts pool"], score: Float[ndarray, "prompts pool"], n: Int[ndarray, " sizes"]
) -> Float[ndarray, "prompts sizes"]:
    """Expected `score` of the completion of highest `proxy` among n drawn without replacement, per prompt.

    Unbiased over the pool, no resampling: the completion of (ascending) rank i of N wins with probability
    C(i-1, n-1) / C(N, n); ties in `proxy` are broken at random, in expectation. Raises
    PoiseError unless every n is in 1..N, and for a `proxy` that is NaN, which would rank above all others.

    >>> best_of_n(np.array([[0.0, 1.0, 1.0]]), np.array([[0.0, 0.0, 1.0]]), np.array([3])).tolist()
    [[0.5]]
    """
    if np.isnan(proxy).any():
        raise PoiseError("best_of_n: a proxy score is NaN, so there is no best")
    order = np.argsort(proxy, axis=-1, kind="stable")
    proxy, score = (np.take_along_axis(values, order, -1) for values in (proxy, score))
    return shared_by_ties(score, proxy) @ rank_weights(proxy.shape[-1], n)


@checked
def rank_weights(size: Count, n: Int[ndarray, " sizes"]) -> Float[ndarray, "{size} sizes"]:
    """[i - 1, j]: probability that the completion of rank i among `size` is the best of n_j drawn without replacement.

    >>> rank_weights(3, np.array([1, 2])).round(3).tolist()
    [[0.333, 0.0], [0.333, 0.333], [0.333, 0.667]]
    """
    n = np.asarray(n)
    if not np.issubdtype(n.dtype, np.integer) or not ((n >= 1) & (n <= size)).all():
        raise PoiseError(f"the n of best-of-n must be whole numbers in 1..{size}, the completions of a prompt")
    rank = np.arange(1, size + 1)[:, None]
    with np.errstate(invalid="ignore"):
        log_weight = _log_binomial(rank - 1, n[None] - 1) - _log_binomial(np.array(size), n[None])
    return np.where(rank >= n[None], np.exp(log_weight), 0.0)


def _log_binomial(total: ndarray, chosen: ndarray) -> ndarray:
    return gammaln(total + 1.0) - gammaln(chosen + 1.0) - gammaln(np.maximum(total - chosen, 0) + 1.0)


@checked
def tilted(
    proxy: Annotated[Float[ndarray, "prompts pool"], FINITE],
    score: Float[ndarray, "prompts pool"],
    kl_coef: Annotated[float, above(0)],
) -> tuple[Float[ndarray, " prompts"], Float[ndarray, " prompts"]]:
    """(expected `score`, KL in nats) per prompt of the optimum pi ~ pi_0 exp(proxy / kl_coef) of the RLHF objective.

    Self-normalized over the pool, so the KL cannot exceed log N; read it as exact well below that.
    Raises PoiseError unless kl_coef is above 0 and every `proxy` finite.
    """
    weight, kl = tilted_weights(proxy, kl_coef)
    return (weight * score).sum(-1), kl


@checked
def tilted_weights(
    proxy: Annotated[Float[ndarray, "prompts pool"], FINITE], kl_coef: Annotated[float, above(0)]
) -> tuple[Float[ndarray, "prompts pool"], Float[ndarray, " prompts"]]:
    """(weights, KL in nats) of `tilted`: w = exp(proxy / kl_coef) / sum, KL = sum w log(N w).

    >>> [part.round(3).tolist() for part in tilted_weights(np.array([[0.0, 0.0]]), 1.0)]
    [[[0.5, 0.5]], [0.0]]
    """
    logits = proxy / kl_coef
    logits = logits - logits.max(-1, keepdims=True)
    weight = np.exp(logits)
    total = weight.sum(-1, keepdims=True)
    weight /= total
    return weight, (weight * logits).sum(-1) - np.log(total[..., 0]) + np.log(proxy.shape[-1])


# ---- laws of over-optimization ----


# sqrt(KL) of the points of a curve
RootKl = Annotated[Float[ndarray, " n"], at_least(0, sys.float_info.max)]


class Law(NamedTuple):
    """A fitted law of the gain in gold over d = sqrt(KL), and the share of its variance it explains."""

    alpha: float
    beta: float
    r2: float


@checked
def fit_best_of_n(root_kl: RootKl, gain: Annotated[Float[ndarray, " n"], FINITE]) -> Law:
    """gain = d (alpha - beta d), by least squares (arXiv 2210.10760, for best-of-n).

    >>> fit_best_of_n(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.5, 2.0]))
    Law(alpha=2.0, beta=0.5, r2=1.0)
    """
    return _fit_law(best_of_n_terms(root_kl), gain)


@checked
def fit_rl(root_kl: RootKl, gain: Annotated[Float[ndarray, " n"], FINITE]) -> Law:
    """gain = d (alpha - beta log d), by least squares (arXiv 2210.10760, for reinforcement learning); 0 at d = 0.

    >>> fit_rl(np.array([0.0, 1.0, np.e]), np.array([0.0, 2.0, np.e]))
    Law(alpha=2.0, beta=1.0, r2=1.0)
    """
    return _fit_law(rl_terms(root_kl), gain)


@checked
def best_of_n_terms(root_kl: Float[ndarray, " n"]) -> Float[ndarray, "n 2"]:
    """What alpha and beta of the law of best-of-n multiply: `terms @ [alpha, beta]` is its gain."""
    return np.stack([root_kl, -np.square(root_kl)], -1)


@checked
def rl_terms(root_kl: Float[ndarray, " n"]) -> Float[ndarray, "n 2"]:
    """The same of the law of reinforcement learning."""
    return np.stack([root_kl, -xlogy(root_kl, root_kl)], -1)


def _fit_law(terms: ndarray, gain: ndarray) -> Law:
    (alpha, beta), *_ = np.linalg.lstsq(terms, gain)
    spread = np.square(gain - gain.mean()).sum()
    missed = np.square(gain - terms @ [alpha, beta]).sum()
    return Law(*(float(round(value, 12)) for value in (alpha, beta, 1 - missed / spread if spread > 0 else np.nan)))
