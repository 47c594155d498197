"""A reward model in miniature, with blind spots: preferences never show some of the responses.

Heads learn from what the preferences do show, by the losses that train real ones.

Shapes: _W worlds (one per seed), _P prompts, _A responses, _N preference pairs of a prompt, _K heads, _D features.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poise.functional.objectives import HeadRewards, Objective, RewardScale
from poise.functional.reward_losses import bradley_terry, sampled_mse
from poise.toy.bandit import Drawn, Responses

PROMPTS, RESPONSES, FEATURES = 8, 8, 6
SHARD = 0.8  # of the pairs, for each head


class Worlds(NamedTuple):
    """Reference policies, true rewards linear in features of the responses, preferences, and the heads' first weights.

    Every prompt has its own direction of reward, and 2 to 4 responses that no pair shows.
    """

    reference_WPA: Float[Tensor, "*worlds prompts responses"]
    features_WPAD: Float[Tensor, "*worlds prompts responses features"]
    gold_WPA: Float[Tensor, "*worlds prompts responses"]
    seen_WPA: Bool[Tensor, "*worlds prompts responses"]
    chosen_WPN: Int[Tensor, "*worlds prompts pairs"]
    rejected_WPN: Int[Tensor, "*worlds prompts pairs"]
    first_single_WPD: Float[Tensor, "*worlds prompts features"]
    first_heads_WPDK: Float[Tensor, "*worlds prompts features heads"]
    shards_WPNK: Bool[Tensor, "*worlds prompts pairs heads"]


def make_worlds(generators: Sequence[torch.Generator], num_pairs: int, num_heads: int, label_noise: float) -> Worlds:
    """A world from each generator. num_pairs: per prompt; label_noise: share of the preferences that are flipped."""
    worlds = [_make_world(generator, num_pairs, num_heads, label_noise) for generator in generators]
    return Worlds(*(torch.stack(part) for part in zip(*worlds, strict=True)))


def _make_world(generator: torch.Generator, num_pairs: int, num_heads: int, label_noise: float) -> Worlds:
    table, pairs = (PROMPTS, RESPONSES), (PROMPTS, num_pairs)
    reference = torch.randn(table, generator=generator).log_softmax(-1)
    features = torch.randn(*table, FEATURES, generator=generator) * FEATURES**-0.5
    gold = (features @ torch.randn(PROMPTS, FEATURES, 1, generator=generator)).squeeze(-1)
    missing = torch.randint(2, 5, (PROMPTS, 1), generator=generator)
    seen = torch.rand(table, generator=generator).argsort(-1).argsort(-1) >= missing
    # Two different responses of those seen: the two largest of random numbers, for each pair.
    keys = torch.rand(*pairs, RESPONSES, generator=generator).masked_fill(~seen.unsqueeze(1), -1.0)
    one, other = keys.topk(2).indices.unbind(-1)
    lead = gold.gather(-1, one) - gold.gather(-1, other)
    wins = torch.rand(pairs, generator=generator) < torch.sigmoid(lead)
    wins = wins ^ (torch.rand(pairs, generator=generator) < label_noise)
    chosen, rejected = torch.where(wins, one, other), torch.where(wins, other, one)
    first_single = torch.randn(PROMPTS, FEATURES, generator=generator)
    first_heads = torch.randn(PROMPTS, FEATURES, num_heads, generator=generator)
    shards = torch.rand(*pairs, num_heads, generator=generator) < SHARD
    return Worlds(reference, features, gold, seen, chosen, rejected, first_single, first_heads, shards)


def fit_single(worlds: Worlds, num_steps: int = 200) -> Responses:
    """Stage 1: rewards of a Bradley-Terry head, its weights drawn toward where they began.

    Loss of a world: mean pair loss + |w - w_0|^2 / (2 * pairs), the MAP under a prior N(w_0, I). What the pairs leave
    open stays as it was drawn at random, as in a network; w_0 has the true weights' distribution.
    """
    weight = worlds.first_single_WPD.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    loss_of = torch.vmap(partial(bradley_terry, centering=0.0))
    for _ in range(num_steps):
        reward = (worlds.features_WPAD @ weight.unsqueeze(-1)).squeeze(-1)
        sides = [reward.gather(-1, shown).flatten(1) for shown in (worlds.chosen_WPN, worlds.rejected_WPN)]
        prior = (weight - worlds.first_single_WPD).square().sum((1, 2)) / (2 * sides[0].shape[1])
        optimizer.zero_grad()
        (loss_of(*sides) + prior).sum().backward()
        optimizer.step()
    return (worlds.features_WPAD @ weight.detach().unsqueeze(-1)).squeeze(-1)


def fit_heads(worlds: Worlds, target_WPA: Responses, num_steps: int = 400) -> HeadRewards:
    """Stage 2: K Gaussian heads (W, P, A, K) fitted by `sampled_mse` to the stage-1 reward of the texts in their pairs.

    Means begin at random weights, so heads differ on what no pair shows; stds begin equal and count coverage.
    """
    num_heads = worlds.first_heads_WPDK.shape[-1]
    weight = torch.cat([worlds.first_heads_WPDK, torch.zeros_like(worlds.first_heads_WPDK)], -1).requires_grad_()
    bias = torch.zeros(len(weight), 1, 1, 2 * num_heads, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.03)
    generator = torch.Generator().manual_seed(0)
    texts = torch.cat([worlds.chosen_WPN, worlds.rejected_WPN], -1)
    target, mask = target_WPA.gather(-1, texts).flatten(1), worlds.shards_WPNK.repeat(1, 1, 2, 1).flatten(1, 2).float()

    def heads() -> HeadRewards:
        mean, raw = (worlds.features_WPAD @ weight + bias).split(num_heads, -1)
        return HeadRewards(mean, 1e-3 + F.softplus(raw))

    for _ in range(num_steps):
        shown = of_responses(heads(), texts)
        noise = torch.randn(shown.mean.shape, generator=generator)
        loss = torch.vmap(sampled_mse)(shown.mean, shown.std, noise, target, mask)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return heads().each(torch.Tensor.detach)


def of_responses(heads: HeadRewards, drawn: Drawn) -> HeadRewards:
    """Heads (W, P, A, K) of the responses (W, P, M), a batch of texts per world: (W, P * M, K)."""
    index = drawn.unsqueeze(-1).expand(*drawn.shape, heads.mean.shape[-1])
    return heads.each(lambda part: part.gather(2, index).flatten(1, 2))


def fit_scales(heads: HeadRewards, objective: Objective, drawn: Drawn) -> list[RewardScale]:
    """The constants of every world's reward, from responses of the reference policy, as in training."""
    shown = of_responses(heads, drawn)
    worlds = zip(shown.mean, shown.std, strict=True)
    return [RewardScale.fit(HeadRewards(*world), objective) for world in worlds]


def combine(heads: HeadRewards, scales: Sequence[RewardScale], objective: Objective) -> Responses:
    """What PPO maximizes: every response's reward, on the scale of its world."""
    worlds = zip(scales, heads.mean, heads.std, strict=True)
    return torch.stack([scale.combine(HeadRewards(*world), objective) for scale, *world in worlds])
