"""Losses for reward models: pure functions of rewards, no models inside.

The losses of Gaussian heads share one signature, `loss(mean, std, noise, target, mask)`:

    mean, std  (batch, heads)  rewards and stds of the heads, std > 0
    noise      (batch, heads)  one independent N(0, 1) draw per sample *and* head; only `sampled_mse` uses it
    target     (batch,)        the standardized stage-1 reward
    mask       (batch, heads)  1 where a head is trained on a sample, else 0

and all return the sum over heads of the mean over each head's own samples. Other shapes are a PoiseError.
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from poise.errors import PoiseError
from poise.functional.shapes import Finite, checked
from poise.runtime.settings import between

CENTERING = 0.01  # weight of (r+ + r-)^2, arXiv 2312.09244


@checked
def bradley_terry(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    margin: Float[Tensor, " pairs"] | float = 0.0,
    *,
    centering: Finite = CENTERING,
    label_smoothing: Annotated[float, between(0, 0.5, open_high=True)] = 0.0,
) -> Float[Tensor, ""]:
    """Mean of -(1 - e) log sigmoid(x) - e log sigmoid(-x) + centering * (r+ + r-)^2,  x = r+ - r- - margin.

    margin: by how much r+ should exceed r-, in reward units (Llama 2, arXiv 2307.09288).
    label_smoothing: e in [0, .5), the assumed share of preferences whose texts are swapped.
    The likelihood depends on differences only; the centering term (arXiv 2312.09244) keeps the free constant near zero.

    >>> round(bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]), centering=0.0).item(), 4)
    0.3133
    """
    return _bradley_terry(chosen, rejected, margin, centering, label_smoothing).mean()


def _bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float, centering: float, label_smoothing: float
) -> Tensor:
    lead = chosen - rejected - margin
    loss = -(1 - label_smoothing) * F.logsigmoid(lead) - label_smoothing * F.logsigmoid(-lead)
    return loss + centering * (chosen + rejected).square()


BatchHeads = Float[Tensor, "batch heads"]
Batch = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


@checked
def sampled_mse(mean: BatchHeads, std: BatchHeads, noise: BatchHeads, target: Batch, mask: BatchHeads) -> Scalar:
    """(mean + std * noise - target)^2, the squared error of the sampled reward (arXiv 2409.15360, stage 2).

    Its expectation is (mean - target)^2 + std^2, so std shrinks wherever there is data. The std measures coverage by
    training data; it is not an error bar.
    """
    return _over_heads((mean + std * noise - target.unsqueeze(-1)).square(), mask)


@checked
def gaussian_nll(mean: BatchHeads, std: BatchHeads, noise: BatchHeads, target: Batch, mask: BatchHeads) -> Scalar:
    """-log N(target; mean, std^2): a proper score, minimal at the true mean and std."""
    return _over_heads(_nll(mean, std, target), mask)


@checked
def beta_nll(
    mean: BatchHeads, std: BatchHeads, noise: BatchHeads, target: Batch, mask: BatchHeads, beta: Finite = 0.5
) -> Scalar:
    """Negative log-likelihood weighted by std^(2 beta), held constant (arXiv 2203.09168).

    beta: 0 is `gaussian_nll`, 1 gives the mean the gradient of plain squared error. Same minimum for constant noise.
    """
    return _over_heads(std.detach() ** (2 * beta) * _nll(mean, std, target), mask)


@checked
def crps(mean: BatchHeads, std: BatchHeads, noise: BatchHeads, target: Batch, mask: BatchHeads) -> Scalar:
    """Continuous ranked probability score of a Gaussian (Gneiting et al. 2005): proper, in units of the reward.

    std * (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)),  z = (target - mean) / std
    """
    z = (target.unsqueeze(-1) - mean) / std
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return _over_heads(std * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi)), mask)


HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

HEAD_LOSSES: dict[str, HeadLoss] = {
    function.__name__: function for function in (sampled_mse, gaussian_nll, beta_nll, crps)
}


@checked
def probit_pairs(
    chosen_mean: BatchHeads,
    chosen_std: BatchHeads,
    rejected_mean: BatchHeads,
    rejected_std: BatchHeads,
    mask: BatchHeads,
) -> Scalar:
    """-log Phi((mu+ - mu-) / sqrt(1 + std+^2 + std-^2)), on preferences directly, no stage-1 reward.

    Pairs identify only this ratio, not its numerator and denominator (arXiv 2605.11865). The learned std measures how
    decided a preference is, not the error of a reward.
    """
    ratio = (chosen_mean - rejected_mean) / (1 + chosen_std.square() + rejected_std.square()).sqrt()
    return _over_heads(-torch.special.log_ndtr(ratio), mask)


@checked
def bradley_terry_heads(
    chosen: BatchHeads,
    rejected: BatchHeads,
    margin: Batch,
    mask: BatchHeads,
    *,
    centering: Finite = CENTERING,
    label_smoothing: Annotated[float, between(0, 0.5, open_high=True)] = 0.0,
) -> Scalar:
    """`bradley_terry` of every head alone, on the pairs of its mask; heads without a std.

    >>> one = torch.tensor([[1.0, 5.0]])
    >>> mask = torch.tensor([[1.0, 0.0]])
    >>> round(bradley_terry_heads(one, 0 * one, torch.zeros(1), mask, centering=0.0).item(), 4)
    0.3133
    """
    loss = _bradley_terry(chosen, rejected, margin.unsqueeze(-1), centering, label_smoothing)
    return _over_heads(loss, mask)


@checked
def adapter_diversity(down: Float[Tensor, "heads rank inputs"]) -> Scalar:
    """|A|_* / |A|_F of the heads' LoRA matrices A_k (rank, inputs), one below the other: A is (heads rank, inputs).

    The diversity term of UP-RLHF (arXiv 2401.00243, equation 12), to be maximized: the nuclear norm, the sum of the
    singular values, stands for the rank of A, and the Frobenius norm takes the scale out. It is 1 for a matrix of rank
    one, and at most sqrt(min(heads rank, inputs)), where all rows are orthogonal and of one length; heads with one and
    the same A have the value of one of them.

    >>> round(adapter_diversity(torch.eye(4).unflatten(0, (2, 2))).item(), 4)
    2.0
    """
    if not down.isfinite().all():
        raise PoiseError("adapter_diversity: the adapters hold what is no number; lower the learning rate")
    values = torch.linalg.svdvals(down.flatten(0, 1).to(torch.promote_types(down.dtype, torch.float32)))
    return values.sum() / values.square().sum().sqrt()


def _nll(mean: Tensor, std: Tensor, target: Tensor) -> Tensor:
    z = (target.unsqueeze(-1) - mean) / std
    return 0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)


def _over_heads(loss: Tensor, mask: Tensor) -> Tensor:
    return ((loss * mask).sum(0) / mask.sum(0).clamp_min(1.0)).sum()
