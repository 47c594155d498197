"""Typicality: how far a text's features lie from those of reference texts. Pure functions of features; no models.

Shapes: _T texts, _H hidden.

    z    = (x - center) / spread                    mean 0 and std 1 over the reference texts, feature by feature
    S    = (1 - a) Z'Z / T + a m I                  covariance, shrunk; m = tr(Z'Z / T) / H
    d(x) = z' S^-1 z / unit                         unit: so that d has mean 1 over the reference texts

The shrinkage a is that of Ledoit and Wolf (2004, doi:10.1016/S0047-259X(03)00096-4), at least LEAST_SHRINKAGE. Without
it S is singular wherever there are fewer texts than features, or two features say the same.

A linear reward w.x has no maximum; the policy is paid for ever stranger texts. Less c d(x) it has one, at
center + unit / (2 c) * spread S spread w: close to the reference texts.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from poise.errors import PoiseError
from poise.functional.shapes import checked

LEAST_SHRINKAGE = 1e-4


class Reference(NamedTuple):
    """What `distance` needs to know of the reference texts: d(x) = |factor' (x - center)|^2.

    factor factor' = spread^-1 S^-1 spread^-1 / unit, in features as the trunk gives them.
    """

    center_H: Float[Tensor, " hidden"]
    factor_HH: Float[Tensor, "hidden hidden"]
    num_texts: int
    shrinkage: float


@checked
def fit_reference(features_TH: Float[Tensor, "texts hidden"]) -> Reference:
    """Fit the reference to texts' features, in float64 on the CPU.

    Features that do not vary over the texts keep their own unit. Over other texts of the same kind d has a mean above
    1, since the center and the covariance are fitted to these: with 640 texts of 576 features, of 2.
    Raises PoiseError for fewer than two texts, features that are not finite, and texts that are all alike.

    >>> reference = fit_reference(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]))
    >>> distance(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 2.0]]), reference).float().tolist()
    [0.0, 1.0, 2.0]
    """
    x = features_TH.detach().cpu().double()
    if len(x) < 2 or not x.isfinite().all():
        raise PoiseError(f"a reference needs at least two texts with finite features, got {len(x)}")
    center, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 1e-6, spread, 1.0)
    z = (x - center) / spread
    if not z.square().sum() > 1e-12:
        raise PoiseError("the reference texts are all alike; give different ones")
    shrinkage = max(float(ledoit_wolf_shrinkage(z.numpy(), assume_centered=True)), LEAST_SHRINKAGE)
    raw, identity = z.T @ z / len(z), torch.eye(z.shape[1], dtype=torch.float64)
    root = torch.linalg.cholesky((1 - shrinkage) * raw + shrinkage * raw.trace() / len(raw) * identity)
    factor = torch.linalg.solve_triangular(root, identity, upper=False).T / spread.unsqueeze(-1)
    unit = ((x - center) @ factor).square().sum(-1).mean()
    return Reference(center, factor / unit.sqrt(), len(x), shrinkage)


@checked
def distance(features: Float[Tensor, "*batch hidden"], reference: Reference) -> Float[Tensor, "*batch"]:
    """d(x) >= 0 of each text, float64 on the CPU; 1 on average over the reference texts, 0 at their mean."""
    if features.shape[-1] != len(reference.center_H):
        raise PoiseError(f"distance: {features.shape[-1]} features, but the reference has {len(reference.center_H)}")
    centered = features.detach().cpu().double() - reference.center_H.double()
    return (centered @ reference.factor_HH.double()).square().sum(-1)
