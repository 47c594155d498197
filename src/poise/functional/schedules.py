"""Controllers: coefficients that change while a policy is trained. Pure functions of numbers, one call per step.

kl_coef is beta, the price of a nat of KL to the initial policy. There is no rule here by which lambda of
`objectives.tradeoff` follows the policy: of 44 tried none beat a constant (experiments/adaptive_weight.py, LOG.md).
"""

from poise.errors import PoiseError


def linear(start: float, end: float, progress: float) -> float:
    """start + (end - start) * progress, progress being the share of training done, held to [0, 1].

    >>> linear(1.0, 0.4, 0.5)
    0.7
    """
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def headroom(reward: float, ceiling: float) -> float:
    """(ceiling - reward) / ceiling, held to [0, 1]: what is left of the way from the initial policy's reward, 0.

    reward: mean of a step's completions, on the scale on which the initial policy has 0.
    ceiling: what rewards are bounded by, > 0.

    Ours: a learning rate in proportion to it lets a policy rest that has all the reward there is to get; at full rate
    it walks on among texts of equal reward, driven by nothing but noise (LOG.md, 2026-11-24).

    >>> headroom(1.5, ceiling=2.0)
    0.25
    """
    return min(max((ceiling - reward) / ceiling, 0.0), 1.0)


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, num_samples: int) -> float:
    """beta * (1 + clip(kl / target - 1, -.2, .2) * num_samples / horizon) (arXiv 1909.08593, section 2.2).

    kl, target: KL of the policy to the reference now and as wanted, nats per completion.
    horizon: completions over which beta can grow by a factor of about e^.2, or fall by one.
    num_samples: completions that `kl` was measured on.

    >>> round(adaptive_kl_coef(0.1, kl=9.0, target=6.0, horizon=1000.0, num_samples=100), 6)
    0.102
    """
    if target <= 0.0:
        raise PoiseError(f"an adaptive KL coefficient needs a target KL > 0, got {target}")
    if horizon < num_samples:
        raise PoiseError(f"the horizon of the KL coefficient, {horizon}, must hold a step's {num_samples} completions")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
