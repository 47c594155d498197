"""PPO's equations (arXiv 1707.06347, as used for RLHF in arXiv 1909.08593 and 2203.02155), one pure function each.

Shapes: _N rows (completions), _T tokens of a completion. `mask` is 1 for the tokens the policy wrote, its end-of-turn
token included, and 0 for padding after them. Rewards and KL are in the units of the (normalised) reward; log
probabilities in nats.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "rows tokens"]
Rows = Float[Tensor, " rows"]


def token_rewards(score: Rows, logprob: Tokens, reference_logprob: Tokens, mask: Tokens, kl_coef: float) -> Tokens:
    """-beta (log pi - log pi_ref) at every token, plus the sequence's score at its last one."""
    rewards = -kl_coef * (logprob - reference_logprob) * mask
    last = mask.sum(-1).long() - 1
    return rewards.scatter_add(-1, last.unsqueeze(-1), score.unsqueeze(-1))


def gae(rewards: Tokens, values: Tokens, mask: Tokens, discount: float, trace: float) -> tuple[Tokens, Tokens]:
    """(advantages, returns) by generalised advantage estimation (arXiv 1506.02438).

    A_t = sum_l (discount * trace)^l delta_{t+l},  delta_t = r_t + discount * V_{t+1} - V_t,  V = 0 past the end;
    return_t = A_t + V_t.
    """
    advantages = torch.zeros_like(rewards)
    following_advantage = following_value = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + discount * following_value - values[:, step]
        following_advantage = (delta + discount * trace * following_advantage) * mask[:, step]
        following_value = values[:, step] * mask[:, step]
        advantages[:, step] = following_advantage
    return advantages, (advantages + values) * mask


def whiten(values: Tokens, mask: Tokens) -> Tokens:
    """Zero mean and unit variance over the unmasked entries; masked ones become 0."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def masked_mean(values: Tokens, mask: Tokens) -> Float[Tensor, ""]:
    """Mean over unmasked tokens."""
    return (values * mask).sum() / mask.sum().clamp_min(1.0)


def policy_loss(
    logprob: Tokens, old_logprob: Tokens, advantages: Tokens, mask: Tokens, clip: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(loss, clipped share): mean of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) over tokens."""
    ratio = (logprob - old_logprob).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return masked_mean(loss, mask), masked_mean(((ratio - 1).abs() > clip).to(loss.dtype), mask)


def value_loss(values: Tokens, old_values: Tokens, returns: Tokens, mask: Tokens, clip: float) -> Float[Tensor, ""]:
    """Half the mean of the larger of the plain and the clipped squared error (values move by at most `clip`)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def sequence_kl(logprob: Tokens, reference_logprob: Tokens, mask: Tokens) -> Rows:
    """Single-sample estimate of KL(pi || pi_ref) per completion, in nats: sum of log pi - log pi_ref ("k1")."""
    return ((logprob - reference_logprob) * mask).sum(-1)


def sequence_kl_k3(logprob: Tokens, reference_logprob: Tokens, mask: Tokens) -> Rows:
    """As `sequence_kl`, by e^-d - 1 + d per token ("k3"): never negative, less variance, unbiased too."""
    difference = logprob - reference_logprob
    return (((-difference).exp() - 1 + difference) * mask).sum(-1)
