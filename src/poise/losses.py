"""Losses for reward models: pure functions of rewards, no models inside."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bradley_terry(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], centring: float = 0.01
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(r+ - r-) + centring * (r+ + r-)^2.

    The likelihood sees differences only; the centring term (arXiv 2312.09244) pins the free constant near zero.

    >>> round(bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]), centring=0.0).item(), 4)
    0.3133
    """
    return (-F.logsigmoid(chosen - rejected) + centring * (chosen + rejected).square()).mean()


def sampled_mse(
    mean: Float[Tensor, "batch heads"],
    std: Float[Tensor, "batch heads"],
    noise: Float[Tensor, "batch heads"],
    target: Float[Tensor, " batch"],
    mask: Float[Tensor, "batch heads"],
) -> Float[Tensor, ""]:
    """Sum over heads of the mean squared error of the sampled reward mean + std * noise (arXiv 2409.15360, stage 2).

    noise: one independent N(0, 1) draw per sample *and* head.
    mask:  1 where a head is trained on a sample, else 0; each head's error is averaged over its own samples.

    Its expectation is (mean - target)^2 + std^2: std only ever shrinks where there is data. It counts coverage;
    it is not an error bar.
    """
    error = (mean + std * noise - target.unsqueeze(-1)).square() * mask
    return (error.sum(0) / mask.sum(0).clamp_min(1.0)).sum()
