"""Controllers: coefficients that change while a policy is trained. Pure functions of numbers, one call per step.

kl_coef is beta, the price of a nat of KL to the initial policy; nominal_weight is lambda of `objectives.tradeoff`.
"""

import math

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


def nominal_weight(base: float, kl: float, scale: float) -> float:
    """base * exp(-kl / scale), in [0, base]: lambda falls, and the worst case gains weight, as the policy leaves home.

    base: lambda at the initial policy.
    kl: KL of the policy to the initial one, nats per completion; below 0, as estimates can be, counts as 0.
    scale: KL over which lambda falls by a factor of e.

    Ours; chosen without gold among rules on the KL, the gap, the routing std and the disagreement of the heads
    (benchmarks/adaptive_weight.py). None of them was better than the constant lambda it ended at.

    >>> round(nominal_weight(0.6, kl=2.0, scale=2.0), 4)
    0.2207
    """
    if not 0.0 <= base <= 1.0:
        raise PoiseError(f"the nominal weight must be in [0, 1], got {base}")
    if scale <= 0.0:
        raise PoiseError(f"a nominal weight that falls with the KL needs a scale > 0 nats, got {scale}")
    return base * math.exp(-max(kl, 0.0) / scale)
