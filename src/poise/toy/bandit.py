"""PPO on prompts whose responses are single tokens, few enough to list: the optimum is known, a run takes a second.

The equations are those of functional/ppo.py. Worlds are trained side by side, each with a policy, a critic and a reward
of its own. P prompts, A responses, M sampled responses of a prompt.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.functional import ppo
from poise.functional import schedules as controllers

EPOCHS, CLIP, TRACE = 2, 0.2, 0.95
TABLE_RATE, NETWORK_RATE, VALUE_RATE = 0.05, 0.02, 0.1  # of Adam, falling linearly to 0

Responses = Float[Tensor, "*worlds prompts responses"]
Drawn = Int[Tensor, "*worlds prompts samples"]
Prompts = Float[Tensor, "*worlds prompts"]
ToyPolicy = tuple[Float[Tensor, "_ _ _"], ...]  # layers, (worlds, inputs, outputs) each


def new_policy(sizes: Sequence[int], generator: torch.Generator) -> ToyPolicy:
    """A random policy of one world: sizes (P, A) for a table of logits, (P, hidden, ..., A) for a network.

    log pi varies by about 1 between responses, for a table as for a network.
    """
    layers = [torch.randn(1, *size, generator=generator) for size in pairwise(sizes)]
    # A prompt is one-hot, so the first layer's sums have one term; tanh makes the sums after it smaller.
    return (layers[0], *(1.5 * layer * layer.shape[1] ** -0.5 for layer in layers[1:]))


def stack(policies: Sequence[ToyPolicy]) -> ToyPolicy:
    """Policies of several worlds side by side."""
    return tuple(torch.cat(layers) for layers in zip(*policies, strict=True))


def log_probabilities(policy: ToyPolicy) -> Responses:
    """log pi of a network on one-hot prompts, tanh between its layers: log softmax(tanh(tanh(W_1) W_2) W_3).

    Of a single layer: of a table of logits.
    """
    hidden = policy[0]
    for layer in policy[1:]:
        hidden = torch.tanh(hidden) @ layer
    return hidden.log_softmax(-1)


def draw(logprob: Responses, count: int, generator: torch.Generator) -> Drawn:
    """`count` responses of every prompt."""
    flat = torch.multinomial(logprob.exp().flatten(0, -2), count, replacement=True, generator=generator)
    return flat.view(*logprob.shape[:-1], count)


def train(
    policy: ToyPolicy,
    reference: Responses,
    score: Callable[[Responses, Drawn], Float[Tensor, "worlds prompts samples"]],
    kl_coef: float,
    *,
    num_steps: int,
    num_samples: int,
    seed: int,
    advance: Callable[[int], None],
) -> Responses:
    """log pi after PPO with KL in the reward, GAE, whitened advantages and clipped losses, all worlds at once.

    score: rewards of the responses drawn, given log pi of the policy that drew them.
    The critic is a table, a value per prompt. Worlds share only the stream of random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    policy = tuple(layer.clone().requires_grad_() for layer in policy)
    values = torch.zeros(reference.shape[:2], requires_grad=True)
    optimizer = torch.optim.Adam([{"params": list(policy)}, {"params": [values]}])
    rates = (TABLE_RATE if len(policy) == 1 else NETWORK_RATE, VALUE_RATE)
    for step in range(num_steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = controllers.linear(rate, 0.0, step / num_steps)
        with torch.no_grad():
            before = log_probabilities(policy)
            drawn = draw(before, num_samples, generator)
            old = _rows(before, drawn), _value_rows(values, drawn)
            rewarded = score(before, drawn).flatten(1), _rows(reference, drawn)
            targets = torch.vmap(partial(_targets, kl_coef=kl_coef))(*rewarded, *old)
        for _ in range(EPOCHS):
            new = _rows(log_probabilities(policy), drawn), _value_rows(values, drawn)
            loss = torch.vmap(_loss)(*new, *old, *targets)
            optimizer.zero_grad()
            loss.sum().backward()  # worlds share no parameter: each gets the gradient of its own loss
            optimizer.step()
        advance(1)
    return log_probabilities(policy).detach()


# One world's completions as functional/ppo.py takes them: rows of one token.


def _rows(table: Tensor, drawn: Tensor) -> Tensor:
    return table.gather(-1, drawn).flatten(1).unsqueeze(-1)


def _value_rows(values: Tensor, drawn: Tensor) -> Tensor:
    return values.unsqueeze(-1).expand(drawn.shape).flatten(1).unsqueeze(-1)


def _targets(
    score: Tensor, reference: Tensor, logprob: Tensor, values: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(logprob)
    rewards = ppo.token_rewards(score, logprob, reference, mask, kl_coef)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, TRACE)
    return ppo.whiten(advantages, mask), returns


def _loss(
    logprob: Tensor, values: Tensor, old: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor
) -> Tensor:
    mask = torch.ones_like(logprob)
    loss, _ = ppo.policy_loss(logprob, old, advantages, mask, CLIP)
    return loss + ppo.value_loss(values, old_values, returns, mask, CLIP)


def policy_gradients(
    logits: Float[Tensor, "prompts responses"],
    drawn: Int[Tensor, "batches prompts samples"],
    score: Float[Tensor, "batches prompts samples"],
) -> Float[Tensor, "batches prompts responses"]:
    """Gradient of the policy loss in the logits that drew the responses, of several batches.

    No KL, no critic, no whitening: advantages are the scores.
    """
    leaf = logits.expand(len(drawn), -1, -1).clone().requires_grad_()
    logprob = _rows(leaf.log_softmax(-1), drawn)

    def loss(score: Tensor, new: Tensor, old: Tensor) -> Tensor:
        mask = torch.ones_like(old)
        rewards = ppo.token_rewards(score, old, old, mask, 0.0)
        advantages, _ = ppo.gae(rewards, torch.zeros_like(rewards), mask, 1.0, TRACE)
        return ppo.policy_loss(new, old, advantages, mask, CLIP)[0]

    total = torch.vmap(loss)(score.flatten(1), logprob, logprob.detach()).sum()
    return torch.autograd.grad(total, leaf)[0]


# ---- what is known ----


def exact_optimum(reference: Responses, reward: Responses, kl_coef: float) -> Responses:
    """log pi* of pi* ~ pi_ref exp(r / beta), what maximizes E[r] - beta KL(pi || pi_ref)."""
    return (reference + reward / kl_coef).log_softmax(-1)


def expected(logprob: Responses, values: Responses) -> Prompts:
    """E_pi[values] per prompt."""
    return (logprob.exp() * values).sum(-1)


def exact_kl(logprob: Responses, reference: Responses) -> Prompts:
    """KL(pi || pi_ref) per prompt, in nats."""
    return expected(logprob, logprob - reference)


def total_variation(one: Responses, other: Responses) -> Prompts:
    """Half the sum of |pi_1 - pi_2| per prompt: by how much they can differ on any set of responses."""
    return 0.5 * (one.exp() - other.exp()).abs().sum(-1)


def misscoring_loss(probability: float, gap: float, error: float, kl_coef: float) -> float:
    """Expected gold lost by pi ~ pi_ref exp(r / beta) when the reward of one response is wrong by `error`.

    (q - p) * gap,  q = sigmoid(logit(p) + error / beta);  p is the response's probability at the true optimum, gap by
    how much the expected gold of the other responses exceeds its own. The others keep their proportions, so only q
    matters. A bad response (gap > 0) scored too high costs up to (1 - p) * gap; a good one (gap < 0) scored too low at
    most p * |gap|. Gold alone is counted: of E[r] - beta KL, beta KL(pi || pi*) is lost.

    >>> round(misscoring_loss(0.5, gap=1.0, error=math.log(3), kl_coef=1.0), 6)
    0.25
    """
    logit = math.log(probability) - math.log1p(-probability)
    return (1 / (1 + math.exp(-logit - error / kl_coef)) - probability) * gap


def policy_gradient_moments(
    logprob: Responses, reward: Responses, num_samples: int, noise_std: float = 0.0
) -> tuple[Responses, Float[Tensor, "*worlds"]]:
    """(expectation, trace of the covariance) of `policy_gradients` of one batch.

    For prompt p of P and its M samples, g = -(1 / P) mean_m r_m (e_m - pi), e_m the unit vector of the response drawn:

        E g_a = -(1 / P) pi_a (r_a - E r),
        trace Cov g = sum over p of (E[r^2 |e - pi|^2] - |E[r (e - pi)]|^2 + s^2 (1 - sum_a pi_a^2)) / (P^2 M)

    noise_std: s of noise on the reward that does not depend on the response, the same for all samples of a prompt or
    drawn for each. It does not change the expectation.
    """
    pi, num_prompts = logprob.exp(), logprob.shape[-2]
    gradient = -pi * (reward - expected(logprob, reward).unsqueeze(-1)) / num_prompts
    collision = pi.square().sum(-1)
    square = reward.square() * (1 - 2 * pi + collision.unsqueeze(-1))
    trace = expected(logprob, square) + noise_std**2 * (1 - collision)
    return gradient, (trace / num_prompts**2 - gradient.square().sum(-1)).sum(-1) / num_samples
