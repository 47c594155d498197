"""Drawing completions token by token: each prompt is encoded once, and its completions go on from its keys and values.

Shapes: _P prompts, _M completions per prompt, _T tokens of a completion, _L row length (prompt + M * T), _H hidden.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from poise.models.families import going_on
from poise.models.loading import HfModel
from poise.models.rereading import entering_layer, entering_the_head
from poise.models.rollout import Rollout


def draw(logprobs: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]) -> Tensor:
    """Token ids (rows, 1): where the cumulated probabilities pass `uniform` of their sum, in float64."""
    cumulated = logprobs.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulated, uniform.unsqueeze(-1) * cumulated[:, -1:], right=True)
    return drawn.clamp_max(logprobs.shape[-1] - 1)


@torch.no_grad()
def cached_bytes(base: HfModel) -> int:
    """Bytes of a token's keys and values, in all layers: those of one token, which it reads."""
    cache, one = DynamicCache(config=base.config), torch.ones(1, 1, dtype=torch.long, device=base.device)
    base(input_ids=one, attention_mask=one, position_ids=one - 1, logits_to_keep=1, **going_on(base, cache))
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))


@torch.no_grad()
def draw_completions(
    base: HfModel,
    prompt_ids_PL: Tensor,
    prompt_mask_PL: Tensor,
    uniform: Float[Tensor, "prompts completions tokens"],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    first_layer: int,
    value_of: Callable[[Tensor], Tensor],
) -> Rollout:
    """Completions of prompts (P, prompt) padded on the left, as `base`, a causal language model, draws them.

    uniform: numbers in [0, 1), one for each token that may be drawn.
    end_ids: a completion ends at any of them, or after T tokens; what stands behind its end is `pad_id`.
    first_layer: the layer whose inputs are kept; 0: none are.
    value_of: from what enters the output layer (rows, H) to values (rows,).
    """
    shape = num_prompts, per_prompt, max_tokens = uniform.shape
    num_rows = num_prompts * per_prompt
    device = prompt_ids_PL.device
    ends = torch.tensor(end_ids, dtype=torch.long, device=device)
    ids = torch.full((num_rows, max_tokens), pad_id, device=device)
    logprob = torch.zeros(num_rows, max_tokens, device=device)
    mask = torch.zeros(num_rows, max_tokens, device=device)
    value = torch.zeros(num_rows, max_tokens, device=device)
    drawn_at = uniform.flatten(0, 1).to(device)
    position = prompt_mask_PL.sum(-1).repeat_interleave(per_prompt)
    row_mask = prompt_mask_PL.repeat_interleave(per_prompt, 0)

    with entering_layer(base, first_layer) as captured, entering_the_head(base) as last_hidden:
        cache = DynamicCache(config=base.config)
        cached = going_on(base, cache)
        positions = (prompt_mask_PL.cumsum(-1) - 1).clamp_min(0)
        out = base(
            input_ids=prompt_ids_PL, attention_mask=prompt_mask_PL, position_ids=positions, logits_to_keep=1, **cached
        )
        prompt_hidden = captured.pop() if captured else None
        hidden = None
        if prompt_hidden is not None:
            hidden = prompt_hidden.new_zeros(num_rows, max_tokens, prompt_hidden.shape[-1])
        cache.batch_repeat_interleave(per_prompt)
        logits = out.logits[:, -1].repeat_interleave(per_prompt, 0)
        predicting = last_hidden.pop()[:, -1].repeat_interleave(per_prompt, 0)
        alive = torch.arange(num_rows, device=device)  # rows still in the batch
        for step in range(max_tokens):
            logprobs = torch.log_softmax(logits.float(), -1)
            drawn = draw(logprobs, drawn_at[alive, step])
            ids[alive, step] = drawn[:, 0]
            logprob[alive, step] = logprobs.gather(-1, drawn)[:, 0]
            mask[alive, step] = 1.0
            value[alive, step] = value_of(predicting)
            going = ~torch.isin(drawn[:, 0], ends)
            if step + 1 == max_tokens or not going.any():
                break
            if not going.all():  # finished rows leave the batch
                cache.batch_select_indices(going.nonzero()[:, 0])
                alive = alive[going]
            seen = torch.cat([row_mask[alive], row_mask.new_ones(len(alive), step + 1)], -1)
            out = base(
                input_ids=ids[alive, step, None], attention_mask=seen, position_ids=position[alive, None] + step,
                **cached,
            )  # fmt: skip
            logits, predicting = out.logits[:, -1], last_hidden.pop()[:, -1]
            if hidden is not None:
                hidden[alive, step] = captured.pop()[:, 0]

    packed = None
    if hidden is not None and prompt_hidden is not None:
        packed = torch.cat([prompt_hidden, hidden.view(num_prompts, -1, hidden.shape[-1])], 1)
    return Rollout(
        prompt_ids_PL, prompt_mask_PL, ids.view(shape), mask.view(shape), logprob.view(shape), value.view(shape), packed
    )
