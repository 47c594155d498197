"""What can be asked of a reward model before any RL: transfer, agreement, and what twice the pairs would bring. NumPy.

Shapes: _P prompts, _N completions of each, _S numbers of pairs, _F folds.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import binomtest

from poise.functional.best_of_n import best_of_n, best_of_n_kl, sizes
from poise.functional.monitor import transfer_ratio
from poise.functional.statistics import bootstrap_intervals, t_interval
from poise.runtime.records import Json, undefined_as_none

DRAWS = 2000


def gains(
    proxy_PN: Float[ndarray, "prompts pool"], score_PN: Float[ndarray, "prompts pool"], n: Int[ndarray, " sizes"]
) -> Float[ndarray, "prompts sizes"]:
    """How much best-of-n by `proxy` raises `score` above its mean of the prompt, in stds of the whole pool's scores.

    >>> pool = np.array([[0.0, 2.0], [1.0, 3.0]])
    >>> gains(pool, pool, np.array([1, 2])).round(2).tolist()
    [[0.0, 0.89], [0.0, 0.89]]
    """
    std = score_PN.std()
    chosen = best_of_n(proxy_PN, score_PN, n) - score_PN.mean(-1, keepdims=True)
    return chosen / std if std > 0 else np.zeros_like(chosen)


def reach(per_prompt: int) -> float:
    """KL of the best of all completions of a prompt, in nats: nothing that a pool says goes further.

    >>> round(reach(32), 2)
    2.5
    """
    return float(best_of_n_kl(np.array([per_prompt]))[0])


def transfer(proxy_PN: Float[ndarray, "prompts pool"], validator_PN: Float[ndarray, "prompts pool"]) -> list[Json]:
    """For growing n: the KL of best-of-n, what the proxy gains, what the validator gains with it, and their ratio.

    `transfer` has a 95 % percentile interval over prompts. It is None where the proxy's gain is too small to divide by
    (`poise.functional.monitor.transfer_ratio`).
    """
    n = sizes(proxy_PN.shape[1])
    own, other = gains(proxy_PN, proxy_PN, n), gains(proxy_PN, validator_PN, n)
    drawn = np.random.default_rng(0).multinomial(len(own), np.full(len(own), 1 / len(own)), DRAWS) / len(own)
    rows = []
    for i, size in enumerate(n):
        ratio = transfer_ratio(own[:, i].mean(), other[:, i].mean(), len(own))
        low, high = t_interval(other[:, i])
        row: Json = {
            "n": int(size), "kl": float(best_of_n_kl(n)[i]), "proxy": float(own[:, i].mean()),
            "validator": float(other[:, i].mean()), "validator_interval": undefined_as_none((low, high)),
            "transfer": ratio, "transfer_interval": None,
        }  # fmt: skip
        if ratio is not None:
            draws = (drawn @ other[:, i]) / np.maximum(drawn @ own[:, i], 1e-12)
            row["transfer_interval"] = [float(end) for end in np.quantile(draws, (0.025, 0.975))]
        rows.append(row)
    return rows


def agreement(same: Bool[ndarray, " judged"]) -> Json:
    """Share of judged pairs that two judges order alike, with Wilson's 95 % interval.

    >>> found = agreement(np.array([True, True, True, False]))
    >>> found["share"], [round(end, 2) for end in found["interval"]]
    (0.75, [0.3, 0.95])
    """
    count, total = int(same.sum()), len(same)
    if not total:
        return {"share": None, "interval": None, "pairs": 0}
    interval = binomtest(count, total).proportion_ci(0.95, "wilson")
    return {"share": count / total, "interval": [float(interval.low), float(interval.high)], "pairs": total}


def doubling_of_accuracy(
    correct_SN: Float[ndarray, "sizes pairs"], groups: Int[ndarray, " pairs"]
) -> tuple[float, float, float]:
    """(difference, low, high) of held-out accuracy between the last number of pairs and the one before.

    Each pair was held out from the heads that judge it. groups: pairs of one number are drawn together; from 0 on.
    """
    gain = correct_SN[-1] - correct_SN[-2]
    interval = bootstrap_intervals(lambda counts: (counts @ gain / counts.sum(-1))[:, None], groups, draws=DRAWS)
    return float(gain.mean()), float(interval[0, 0]), float(interval[0, 1])


def doubling_of_selection(gain_SFP: Float[ndarray, "sizes folds prompts"]) -> tuple[float, float, float]:
    """(difference, low, high) of what best-of-n gains, between the last number of pairs and the one before.

    Student's interval over prompts, of each prompt's mean over folds. NaN bounds for a single prompt.
    """
    gain_P = (gain_SFP[-1] - gain_SFP[-2]).mean(0)
    low, high = t_interval(gain_P)
    return float(gain_P.mean()), float(low), float(high)
