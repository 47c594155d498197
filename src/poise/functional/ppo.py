"""PPO's equations (arXiv 1707.06347, as used for RLHF in arXiv 1909.08593 and 2203.02155), one pure function each.

Shapes: _N rows (completions), _T tokens of a completion. `mask` is 1 for the tokens the policy wrote, its end-of-turn
token included, and 0 for padding after them. Rewards and KL are in the units of the (normalized) reward; log
probabilities in nats.

Arrays whose shapes do not fit are a PoiseError. Masks and rewards may be whole numbers or booleans.

Means are over tokens. Where a batch is computed in parts, or by several processes, `count` is the number of tokens of
the whole: the parts' losses then add up to the loss of the whole, and so do their gradients.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from poise.functional.shapes import Finite, checked
from poise.runtime.settings import Share, at_least

Tokens = Float[Tensor, "rows tokens"]
Rows = Float[Tensor, " rows"]
Scalar = Float[Tensor, ""]
Clip = Annotated[float, at_least(0)]


@checked
def token_rewards(score: Rows, logprob: Tokens, reference_logprob: Tokens, mask: Tokens, kl_coef: Finite) -> Tokens:
    """-beta (log pi - log pi_ref) at every token, plus the sequence's score at its last one, where it has any."""
    rewards = -kl_coef * (logprob - reference_logprob) * mask
    last = (mask > 0).sum(-1) - 1
    paid = (score * (last >= 0)).to(rewards.dtype)
    return rewards.scatter_add(-1, last.clamp_min(0).unsqueeze(-1), paid.unsqueeze(-1))


@checked
def gae(rewards: Tokens, values: Tokens, mask: Tokens, discount: Share, trace: Share) -> tuple[Tokens, Tokens]:
    """(advantages, returns) by generalized advantage estimation (arXiv 1506.02438).

    A_t = sum_l (discount * trace)^l delta_{t+l},  delta_t = r_t + discount * V_{t+1} - V_t,  V = 0 past the end;
    return_t = A_t + V_t.
    """
    advantages = torch.zeros_like(values)
    following_advantage = following_value = torch.zeros_like(values[:, 0])
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + discount * following_value - values[:, step]
        following_advantage = (delta + discount * trace * following_advantage) * mask[:, step]
        following_value = values[:, step] * mask[:, step]
        advantages[:, step] = following_advantage
    return advantages, (advantages + values) * mask


@checked
def whiten(values: Tokens, mask: Tokens, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tokens:
    """Zero mean and unit variance over the unmasked entries; masked ones become 0.

    total: sums a tensor over all processes, for moments of the whole batch.
    """
    count = total(mask.sum()).clamp_min(1.0)
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean).square() * mask).sum()) / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


@checked
def masked_mean(values: Tokens, mask: Tokens, count: Scalar | None = None) -> Scalar:
    """Sum over unmasked tokens, divided by their number, or by `count`."""
    return (values * mask).sum() / (mask.sum() if count is None else count).clamp_min(1.0)


@checked
def policy_loss(
    logprob: Tokens,
    old_logprob: Tokens,
    advantages: Tokens,
    mask: Tokens,
    clip: Clip,
    count: Scalar | None = None,
) -> tuple[Scalar, Scalar]:
    """(loss, clipped share): mean of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) over tokens."""
    ratio = ((logprob - old_logprob) * mask).exp()  # of padding 1, whatever it is: infinity times 0 is no number
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    clipped = ((ratio - 1).abs() > clip).to(loss.dtype)
    return masked_mean(loss, mask, count), masked_mean(clipped, mask, count)


@checked
def value_loss(
    values: Tokens, old_values: Tokens, returns: Tokens, mask: Tokens, clip: Clip, count: Scalar | None = None
) -> Scalar:
    """Half the mean of the larger of the plain and the clipped squared error (values move by at most `clip`)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(worse, mask, count)


@checked
def token_entropy(logits: Float[Tensor, "*tokens vocabulary"]) -> Float[Tensor, "*tokens"]:
    """-sum_v p_v log p_v, in nats: log sum_v e^{l_v} - sum_v p_v l_v."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@checked
def step_kl(logprob: Tokens, old_logprob: Tokens, mask: Tokens, count: Scalar | None = None) -> Scalar:
    """KL(pi_old || pi) per token, in nats, from tokens that pi_old drew: mean of ratio - 1 - log ratio, never < 0."""
    difference = (logprob - old_logprob) * mask
    return masked_mean(difference.exp() - 1 - difference, mask, count)


@checked
def sequence_kl(logprob: Tokens, reference_logprob: Tokens, mask: Tokens) -> Rows:
    """Single-sample estimate of KL(pi || pi_ref) per completion, in nats: sum of log pi - log pi_ref ("k1")."""
    return ((logprob - reference_logprob) * mask).sum(-1)


@checked
def sequence_kl_k3(logprob: Tokens, reference_logprob: Tokens, mask: Tokens) -> Rows:
    """As `sequence_kl`, by e^-d - 1 + d per token ("k3"): never negative, unbiased too.

    Its variance is the smaller one while the two are close (for Gaussians, to a KL of .63 nats a token); far apart
    e^-d has few large values, and a sample's mean is mostly too low.
    """
    difference = (logprob - reference_logprob) * mask
    return (((-difference).exp() - 1 + difference) * mask).sum(-1)
