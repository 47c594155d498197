"""Completions as a policy sampled them, and the rows in which they are read again.

Shapes: _P prompts, _M completions per prompt, _T tokens of a completion, _L row length (prompt + M * T), _H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.models.shared_prompt import PADDING, attends
from poise.runtime.distributed import gathered

# Without gradients a rollout is read so many tokens at a time: enough to keep a GPU busy, however large the rollout.
TOKENS_PER_PASS = 16_384


class Part(NamedTuple):
    """Some prompts of a rollout, by their indices, and which completions of each."""

    prompts: Tensor
    completions: slice = slice(None)


def parts_of(prompts: Tensor, per_prompt: int, number: int) -> list[Part]:
    """Up to `number` parts of about equal size, or a few more: of whole prompts; if the prompts are fewer, of some of
    a prompt's completions.

    >>> [part.completions for part in parts_of(torch.tensor([5, 7]), 6, 4)]
    [slice(0, 3, None), slice(3, 6, None), slice(0, 3, None), slice(3, 6, None)]
    """
    if number <= len(prompts):
        return [Part(some) for some in prompts.chunk(number)]
    size = -(-per_prompt // -(-number // len(prompts)))
    return [Part(one, slice(at, at + size)) for one in prompts.split(1) for at in range(0, per_prompt, size)]


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

    def part(self, part: Part) -> "Rollout":
        """Some of the prompts, with some or all of their completions."""
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                chosen[field.name] = None
            elif field.name in ("prompt_ids_PL", "prompt_mask_PL"):
                chosen[field.name] = value[part.prompts]
            elif field.name == "hidden_PLH":
                before, of_completions = value[part.prompts].split(
                    [self.prompt_ids_PL.shape[1], self.mask_PMT[0].numel()], 1
                )
                some = of_completions.unflatten(1, self.mask_PMT.shape[1:])[:, part.completions]
                chosen[field.name] = torch.cat([before, some.flatten(1, 2)], 1)
            else:
                chosen[field.name] = value[part.prompts, part.completions]
        return Rollout(**chosen)

    def ended(self, end_ids: Sequence[int]) -> Tensor:
        """Which completions (P, M) wrote one of the end tokens; the others were cut at the longest length."""
        ends = torch.tensor(end_ids, dtype=torch.long, device=self.mask_PMT.device)
        return (torch.isin(self.completion_ids_PMT, ends) & self.mask_PMT.bool()).any(-1)


def turns_of(num_prompts: int, per_prompt: int, prompts: int, completions: int) -> list[tuple[slice, slice]]:
    """What is sampled in each turn: so many prompts with all of their completions, or some completions of one prompt.

    >>> turns_of(2, 3, 1, 2)
    [(slice(0, 1, None), slice(0, 2, None)), (slice(0, 1, None), slice(2, 4, None)), \
(slice(1, 2, None), slice(0, 2, None)), (slice(1, 2, None), slice(2, 4, None))]
    """
    return [
        (slice(at, at + prompts), slice(first, first + completions))
        for at in range(0, num_prompts, prompts)
        for first in range(0, per_prompt, completions)
    ]


def joined(turns: Sequence[Rollout], per_prompt: int) -> Rollout:
    """The rollout that was sampled in turns, as `turns_of` orders them."""
    if len(turns) == 1:
        return turns[0]
    count = -(-per_prompt // turns[0].mask_PMT.shape[1])  # turns of a prompt
    of_prompts = [_of_one(turns[at : at + count]) for at in range(0, len(turns), count)]
    found: dict[str, Any] = {}
    for field in fields(Rollout):
        values = [getattr(one, field.name) for one in of_prompts]
        found[field.name] = None if values[0] is None else torch.cat(values)
    return Rollout(**found)


def _of_one(turns: Sequence[Rollout]) -> Rollout:
    """Turns of the same prompts as one."""
    first = turns[0]
    if len(turns) == 1:
        return first
    found: dict[str, Any] = {"prompt_ids_PL": first.prompt_ids_PL, "prompt_mask_PL": first.prompt_mask_PL}
    width = first.prompt_ids_PL.shape[1]
    for field in fields(Rollout)[2:]:
        values = [getattr(turn, field.name) for turn in turns]
        if field.name == "hidden_PLH" and values[0] is not None:
            values = [values[0], *(value[:, width:] for value in values[1:])]
        found[field.name] = None if values[0] is None else torch.cat(values, 1)
    return Rollout(**found)


def passes(rollout: Rollout, *, packed: bool, together: bool) -> list[Part]:
    """Parts of up to TOKENS_PER_PASS tokens each, for reading without gradients.

    packed: a prompt is read once for its completions. together: equally many parts on all processes, which hold shares
    of a model.
    """
    num_prompts, per_prompt, max_tokens = rollout.mask_PMT.shape
    prompt_tokens = rollout.prompt_ids_PL.shape[1] * (1 if packed else per_prompt)
    number = torch.tensor([-(-num_prompts * (prompt_tokens + per_prompt * max_tokens) // TOKENS_PER_PASS)])
    number = gathered(number).amax() if together else number
    return parts_of(torch.arange(num_prompts, device=rollout.mask_PMT.device), per_prompt, int(number))


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


def uniforms(
    num_prompts: int, per_prompt: int, max_tokens: int, generator: torch.Generator
) -> Float[Tensor, "prompts completions tokens"]:
    """Numbers for `Policy.sample`, float64, made where the generator lives."""
    return torch.rand(num_prompts, per_prompt, max_tokens, generator=generator, dtype=torch.float64)
