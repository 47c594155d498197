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


def nominal_weight(base: float, signal: float, initial: float) -> float:
    """base * exp(-max(0, signal / initial - 1)): lambda falls as the policy leaves what the heads know. PLACEHOLDER"""
    if not 0.0 <= base <= 1.0:
        raise PoiseError(f"the nominal weight must be in [0, 1], got {base}")
    if initial <= 0.0:
        return base
    return base * math.exp(-max(0.0, signal / initial - 1.0))
