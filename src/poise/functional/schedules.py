"""Schedules: coefficients that change while a policy is trained. Pure functions of numbers, one call per step.

kl_coef is beta, the reward units that one nat of KL to the initial policy costs. No rule here adapts the lambda of
`objectives.tradeoff` to the policy: of 44 rules tried, none beat a constant (experiments/adaptive_weight.py, LOG.md).
"""

from typing import Annotated

from poise.errors import PoiseError
from poise.functional.shapes import Finite, checked
from poise.runtime.settings import WholeNumber, above


@checked
def linear(start: Finite, end: Finite, progress: Finite) -> float:
    """start + (end - start) * progress, progress being the share of training done, clipped to [0, 1].

    >>> linear(1.0, 0.4, 0.5)
    0.7
    """
    return start + (end - start) * min(max(progress, 0.0), 1.0)


@checked
def headroom(reward: Finite, ceiling: Annotated[float, above(0)]) -> float:
    """(ceiling - reward) / ceiling, clipped to [0, 1]: the share of the reachable reward that is still to be gained.

    reward: mean of a step's completions, on the scale on which the initial policy has 0.
    ceiling: upper bound of rewards, > 0.

    Scales the learning rate by the remaining headroom; otherwise a policy at the ceiling drifts on noise
    (LOG.md, 2026-11-24). Not from the literature.

    >>> headroom(1.5, ceiling=2.0)
    0.25
    """
    return min(max((ceiling - reward) / ceiling, 0.0), 1.0)


@checked
def adaptive_kl_coef(
    kl_coef: Finite,
    kl: Finite,
    target: Annotated[float, above(0)],
    horizon: Annotated[float, above(0)],
    num_samples: WholeNumber,
) -> float:
    """beta * (1 + clip(kl / target - 1, -.2, .2) * num_samples / horizon) (arXiv 1909.08593, section 2.2).

    kl, target: KL of the policy to the reference now and as wanted, nats per completion.
    horizon: completions over which beta can grow by a factor of about e^.2, or fall by one.
    num_samples: completions that `kl` was measured on.

    >>> round(adaptive_kl_coef(0.1, kl=9.0, target=6.0, horizon=1000.0, num_samples=100), 6)
    0.102
    """
    if not horizon >= max(num_samples, 1):
        raise PoiseError(f"the horizon of the KL coefficient, {horizon}, must hold a step's {num_samples} completions")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
