"""Completions of a policy with their rewards, as rows of samples.jsonl and final.jsonl."""

import torch
from torch import Tensor

from poise.data.types import Prompt
from poise.functional import ppo
from poise.functional.objectives import HeadRewards
from poise.models.policy import Policy
from poise.models.rollout import uniforms
from poise.policy.reward import PolicyReward
from poise.runtime import distributed as processes
from poise.runtime.progress import progress
from poise.runtime.run_folder import Json

PROMPTS_AT_ONCE = 16


def sample_policy(
    policy: Policy, reward: PolicyReward, prompts: list[Prompt], per_prompt: int, max_tokens: int, seed: int, step: int
) -> list[Json]:
    """Completions of a policy, with rewards and KL; policies sampled with one seed share their random numbers.

    Every process takes its share of the prompts and returns all rows.
    """
    numbers = uniforms(len(prompts), per_prompt, max_tokens, torch.Generator().manual_seed(seed))
    rows: list[Json] = []
    mine = range(0, len(prompts), PROMPTS_AT_ONCE)[processes.process_index() :: processes.num_processes()]
    # Processes have different numbers of batches: each needs all weights.
    with policy.whole(), progress("sampling the trained policy", len(mine)) as advance:
        for start in mine:
            batch = prompts[start : start + PROMPTS_AT_ONCE]
            rollout = policy.sample(batch, numbers[start : start + PROMPTS_AT_ONCE])
            texts = policy.texts(rollout)
            heads = reward.heads(policy, batch, texts, step)
            kl = ppo.sequence_kl(
                rollout.logprob_PMT.flatten(0, 1), policy.reference_logprobs(rollout).flatten(0, 1),
                rollout.mask_PMT.flatten(0, 1),
            )  # fmt: skip
            rows += sample_rows(start, batch, texts, heads, reward.combine(heads), kl)
            advance()
    rows = sorted(processes.gathered_rows(rows), key=lambda row: row["step"])
    return [row | {"step": step} for row in rows]


def sample_rows(
    step: int, prompts: list[Prompt], texts: list[list[str]], heads: HeadRewards, score: Tensor, kl: Tensor
) -> list[Json]:
    """One row per completion. texts: of each prompt, M; heads, score and kl: of all N = P * M, prompt by prompt."""
    pairs = [(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    return [
        {
            "step": step, "prompt": prompt, "completion": text, "reward": score[i].item(), "kl": kl[i].item(),
            "mean": heads.mean[i].tolist(), "std": heads.std[i].tolist(),
            **({} if heads.distance is None else {"distance": heads.distance[i].item()}),
        }
        for i, (prompt, text) in enumerate(pairs)
    ]  # fmt: skip
