"""What can be asked of a reward model before any RL: transfer, agreement, and what twice the pairs would bring. NumPy.

Shapes: _P prompts, _N completions of each, _F folds.
"""

import math
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import t as t_distribution

from poise.errors import PoiseError
from poise.functional.best_of_n import best_of_n, best_of_n_kl, sizes
from poise.functional.monitor import transfer_ratio
from poise.functional.shapes import FINITE, checked
from poise.functional.statistics import ratio_interval, share_interval, t_interval
from poise.runtime.records import Json, undefined_as_none
from poise.runtime.settings import at_least, between

Pool = Annotated[Float[ndarray, "prompts pool"], FINITE]


@checked
def gains(proxy_PN: Pool, score_PN: Pool, n: Int[ndarray, " sizes"]) -> Float[ndarray, "prompts sizes"]:
    """How much best-of-n by `proxy` raises `score` above its mean of the prompt, in stds of the whole pool's scores.

    >>> pool = np.array([[0.0, 2.0], [1.0, 3.0]])
    >>> gains(pool, pool, np.array([1, 2])).round(2).tolist()
    [[0.0, 0.89], [0.0, 0.89]]
    """
    std = score_PN.std()
    chosen = best_of_n(proxy_PN, score_PN, n) - score_PN.mean(-1, keepdims=True)
    return chosen / std if std > 0 else np.zeros_like(chosen)


@checked
def reach(per_prompt: int) -> float:
    """KL of the best of all completions of a prompt, in nats: nothing that a pool says goes further.

    >>> round(reach(32), 2)
    2.5
    """
    return float(best_of_n_kl(np.array([per_prompt]))[0])


@checked
def transfer(proxy_PN: Pool, validator_PN: Pool) -> list[Json]:
    """For growing n: the KL of best-of-n, what the proxy gains, what the validator gains with it, and their ratio.

    Intervals are Student's, 95 %, over prompts; stds are those of this pool. `transfer` is None where the proxy's gain
    is too small to divide by (`poise.functional.monitor.transfer_ratio`). Its interval, Fieller's, is None where the
    prompts are too few to tell the proxy's gain from 0.
    """
    n = sizes(proxy_PN.shape[1])
    own, other = gains(proxy_PN, proxy_PN, n), gains(proxy_PN, validator_PN, n)
    rows = []
    for i, size in enumerate(n):
        ratio = transfer_ratio(own[:, i].mean(), other[:, i].mean(), len(own))
        interval = undefined_as_none(ratio_interval(other[:, i], own[:, i]))
        row: Json = {
            "n": int(size), "kl": float(best_of_n_kl(n)[i]), "proxy": float(own[:, i].mean()),
            "validator": float(other[:, i].mean()),
            "validator_interval": undefined_as_none(tuple(t_interval(other[:, i]).tolist())),
            "transfer": ratio, "transfer_interval": None if ratio is None or None in interval else list(interval),
        }  # fmt: skip
        rows.append(row)
    return rows


@checked
def agreement(
    right: Annotated[Float[ndarray, " judged"], between(0, 1)], unit: Annotated[Int[ndarray, " judged"], at_least(0)]
) -> Json:
    """Share of judged pairs that two judges order alike, with Wilson's 95 % interval (`share_interval`).

    right: 1 for a pair that both order alike, 0 for another, 1/2 where one of them has a tie. unit: pairs of one
    number, such as those of a prompt, depend on each other.

    >>> found = agreement(np.array([1.0, 1, 1, 0]), np.arange(4))
    >>> found["share"], [round(end, 2) for end in found["interval"]]
    (0.75, [0.3, 0.95])
    """
    return {"share": float(right.mean()), "interval": list(share_interval(right, unit)), "pairs": len(right)}


@checked
def fewer_than(own: Json, share: float, interval: tuple[float, float]) -> bool:
    """Is the share of an `agreement` below another one, of other pairs, with its own 95 % interval?

    By Newcombe's interval of a difference (1998, method 10): its upper end, own - share +
    sqrt((own's upper end - own)^2 + (share - its lower end)^2), is below 0.

    >>> own = {"share": 0.5, "interval": [0.4, 0.6]}
    >>> fewer_than(own, 0.61, (0.61, 0.61)), fewer_than(own, 0.61, (0.5, 0.7))
    (True, False)
    """
    reach = math.hypot(own["interval"][1] - own["share"], share - interval[0])
    return bool(own["share"] - share + reach < 0)


@checked
def doubling(
    gain_F: Float[ndarray, " folds"], gain_P: Float[ndarray, " prompts"] | None = None
) -> tuple[float, float, float]:
    """(mean, low, high) of what twice the pairs bring, with a 95 % interval that knows that folds share their pairs.

    gain_F: the gain in each fold of a cross-validation. gain_P: the same gain by prompt, where all folds are judged on
    the same prompts.

    var = s_F^2 (1 / F + 1 / (F - 1)) + s_P^2 / P, and Student's t of F - 1 degrees of freedom. The second term of the
    bracket, test over training size, is the correction of Nadeau and Bengio (2003, doi:10.1023/A:1024068626366): fits
    that share most of their pairs are alike, so that their variance alone is too small.

    >>> [round(value, 2) for value in doubling(np.array([0.0, 1.0, 2.0]))]
    [1.0, -2.93, 4.93]
    """
    folds = len(gain_F)
    if folds < 2:
        raise PoiseError("doubling: gain_F must be of at least two folds; one says nothing of its own error")
    variance = gain_F.var(ddof=1) * (1 / folds + 1 / (folds - 1))
    if gain_P is not None and len(gain_P) > 1:
        variance += gain_P.var(ddof=1) / len(gain_P)
    mean, half = float(gain_F.mean()), float(t_distribution.ppf(0.975, folds - 1) * variance**0.5)
    return mean, mean - half, mean + half
