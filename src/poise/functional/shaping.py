"""Completions of one prompt against one another, before and after an objective makes one reward of the heads.

`contrastive` and `par` compare heads with completions of the initial policy. The regret bonus compares rewards within
the group that is trained on.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from poise.errors import PoiseError
from poise.functional.head_rewards import HeadRewards
from poise.functional.objective_names import Shaping as Shaping
from poise.functional.shapes import checked
from poise.runtime.settings import at_least


@checked
def contrastive(heads: HeadRewards, baseline: HeadRewards) -> HeadRewards:
    """Each head less its mean over baseline completions of the same prompt (arXiv 2403.07708).

    heads: (..., K); baseline: (..., baselines, K), of the initial policy, say. Takes away what a head thinks of the
    prompt. Stds stay.

    >>> one = HeadRewards(torch.tensor([3.0]), torch.zeros(1))
    >>> contrastive(one, HeadRewards(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))).mean.item()
    1.5
    """
    _check(heads, baseline)
    return heads._replace(mean=heads.mean - baseline.mean.mean(-2))


@checked
def preference_as_reward(heads: HeadRewards, baseline: HeadRewards) -> HeadRewards:
    """mean over baselines m of sigmoid(r - r_m), per head: the probability of being preferred (arXiv 2502.18770).

    Shapes as in `contrastive`. Bounded by 0 and 1: what already beats the baselines has little left to gain. Heads in
    Bradley-Terry units. Stds stay.

    >>> one = HeadRewards(torch.tensor([2.0]), torch.zeros(1))
    >>> preference_as_reward(one, HeadRewards(torch.tensor([[2.0]]), torch.zeros(1, 1))).mean.item()
    0.5
    """
    _check(heads, baseline)
    return heads._replace(mean=torch.sigmoid(heads.mean.unsqueeze(-2) - baseline.mean).mean(-2))


def _check(heads: HeadRewards, baseline: HeadRewards) -> None:
    """PoiseError unless the baselines have an axis of their own, and the same heads."""
    mine, theirs = tuple(heads.mean.shape), tuple(baseline.mean.shape)
    fit = len(theirs) == len(mine) + 1 and theirs[-1] == mine[-1] and theirs[-2] > 0
    if not fit or any(size not in (1, own) for size, own in zip(theirs[:-2], mine[:-1], strict=True)):
        raise PoiseError(f"heads {mine} are compared with baselines (…, baselines, {mine[-1]}), not with {theirs}")


SHAPINGS: dict[str, Callable[[HeadRewards, HeadRewards], HeadRewards]] = {
    "contrastive": contrastive, "par": preference_as_reward,
}  # fmt: skip


# ---- worst-case regret ----


@checked
def worst_case_regret(
    reward: Float[Tensor, " choices"], policy: Float[Tensor, " choices"], radius: Annotated[float, at_least(0)]
) -> Float[Tensor, ""]:
    """The most that a policy over few choices can fall short of the best policy if its reward is wrong (2605.00155).

        max over r' with sum_j |r'_j - r_j| <= radius of  (max_j r'_j - policy . r')
            =  max_j [r_j + radius * (1 - policy_j)]  -  policy . r

    policy: probabilities. The maximum is linear in r' for each j, so it lies where one reward takes all of the error.

    >>> worst_case_regret(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), 1.0).item()
    1.0
    """
    return (reward + radius * (1.0 - policy)).amax() - (policy * reward).sum()


@checked
def regret_bonus(
    reward: Float[Tensor, "prompts completions"],
    share: Float[Tensor, "prompts completions"],
    radius: Annotated[float, at_least(0)],
) -> Float[Tensor, "prompts completions"]:
    """What to add to each reward so that a policy gradient lowers `worst_case_regret`, prompt by prompt.

    Its derivative to policy_j is -(reward_j + radius * [j is the choice that attains the maximum]). So the completion
    with the highest reward_j - radius * share_j gets `radius`, and others nothing. share: of the prompt's completions
    that are the same text, an estimate of policy_j; all of the same text get the bonus.

    >>> regret_bonus(torch.tensor([[1.0, 0.4]]), torch.tensor([[0.9, 0.1]]), 1.0)
    tensor([[0., 1.]])
    """
    water = reward - radius * share
    return radius * (water == water.amax(-1, keepdim=True)).to(reward.dtype)


def rows_by_prompt(prompts: Sequence[Any]) -> list[list[int]]:
    """The numbers of the rows of each prompt, which is text, or turns.

    >>> rows_by_prompt(["p", "q", "p"])
    [[0, 2], [1]]
    """
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt, default=repr), []).append(number)
    return list(groups.values())


@checked
def with_regret_bonus(
    reward: Float[Tensor, " samples"],
    prompts: Sequence[Any],
    texts: Sequence[str],
    radius: Annotated[float, at_least(0)],
) -> Float[Tensor, " samples"]:
    """Rewards with `regret_bonus`, of all completions of a prompt together; radius 0: as they are.

    prompts, texts: of each reward; a prompt is text, or turns. A policy's probability of a completion is estimated by
    the share of the prompt's completions that are the same text.

    >>> with_regret_bonus(torch.tensor([1.0, 1.0, 0.8, 0.0]), ["p"] * 4, ["a", "a", "b", "c"], 1.0)
    tensor([1.0000, 1.0000, 1.8000, 0.0000])
    """
    if radius == 0.0:
        return reward
    if not len(reward) == len(prompts) == len(texts):
        raise PoiseError(f"{len(reward)} rewards of {len(prompts)} prompts and {len(texts)} texts; give one of each")
    paid = reward.clone()
    for rows in rows_by_prompt(prompts):
        count = Counter(texts[row] for row in rows)
        share = torch.tensor([[count[texts[row]] / len(rows) for row in rows]]).to(reward)
        paid[rows] += regret_bonus(reward[None, rows], share, radius)[0]
    return paid
