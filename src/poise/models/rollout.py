"""Completions as a policy sampled them, and the rows in which they are read again.

Shapes: _P prompts, _M completions per prompt, _T tokens of a completion, _L row length (prompt + M * T), _H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poise.models.shared_prompt import PADDING, attends


@dataclass
class Rollout:
    """Completions as they were sampled. Prompts are padded on the left, completions on the right."""

    prompt_ids_PL: Tensor
    prompt_mask_PL: Tensor
    completion_ids_PMT: Tensor
    mask_PMT: Tensor  # 1.0 for sampled tokens, the end token included
    logprob_PMT: Tensor  # what PPO counts from: as sampling recorded it, or as `Policy.read_again` gave it
    value_PMT: Tensor
    hidden_PLH: Tensor | None  # input of the first adapted layer; None if the model cannot be split
    sampled_PMT: Tensor | None = None  # log-probabilities as sampling recorded them, where logprob_PMT was read again

    def rows(self, index: Tensor) -> "Rollout":
        """The prompts at `index`, with their completions."""
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen[field.name] = value if value is None else value[index]
        return Rollout(**chosen)

    def ended(self, end_ids: Sequence[int]) -> Tensor:
        """Which completions (P, M) wrote one of the end tokens; the others were cut at the longest length."""
        ends = torch.tensor(end_ids, dtype=torch.long, device=self.mask_PMT.device)
        return (torch.isin(self.completion_ids_PMT, ends) & self.mask_PMT.bool()).any(-1)


def packed_attention(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(who sees whom (P, L, L) as booleans, positions (P, L)) of rows [prompt | completion 1 | … | completion M]."""
    per_prompt, max_tokens = rollout.completion_ids_PMT.shape[1:]
    prompt_mask = rollout.prompt_mask_PL.bool()
    number = 1 + torch.arange(per_prompt, device=prompt_mask.device).repeat_interleave(max_tokens)
    part = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.long), number.expand(len(prompt_mask), -1)], 1)
    written = torch.cat([prompt_mask, rollout.mask_PMT.flatten(1).bool()], 1)
    group = torch.where(written, 0, PADDING)
    prompt_positions = (prompt_mask.long().cumsum(-1) - 1).clamp_min(0)
    after = prompt_mask.sum(-1, keepdim=True) + torch.arange(max_tokens, device=prompt_mask.device)
    return attends(group, part), torch.cat([prompt_positions, after.repeat(1, per_prompt)], 1)


def draw(logprobs: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]) -> Tensor:
    """Token ids (rows, 1): where the cumulated probabilities pass `uniform` of their sum, in float64."""
    cumulated = logprobs.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulated, uniform.unsqueeze(-1) * cumulated[:, -1:], right=True)
    return drawn.clamp_max(logprobs.shape[-1] - 1)
