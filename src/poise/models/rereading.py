"""Reading a rollout again: log-probabilities and hidden states of sampled tokens under weights that have changed.

`choose` tries three ways on a short rollout and takes the fastest that is right for the model:

    packed   a prompt's completions lie in one row with it, [prompt | completion 1 | … | completion M]: each completion
             attends to the prompt and to itself, at positions that continue the prompt's
    split    packed, and the hidden states that entered the first trained layer while sampling enters there again: the
             frozen layers below do not run
    apart    each completion lies in a row of its own with a copy of its prompt, under the model's own mask

Shapes: _P prompts, _M completions per prompt, _T tokens of a completion, _L row length, _H hidden.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from poise.errors import PoiseError, first_line
from poise.models.adapted_maps import decoder_layers
from poise.models.families import (
    REFUSALS,
    alike,
    attention_masks,
    going_on,
    narrow_windows,
    probe_tokens,
    say_once,
    tolerance,
    windows,
)
from poise.models.loading import HfModel
from poise.models.rollout import Rollout, packed_attention
from poise.models.shared_prompt import equal_completions, positions_of
from poise.runtime import distributed as processes


class Reading(NamedTuple):
    """How a model reads rollouts again.

    first_layer: where kept hidden states enter; 0: token ids enter below it. recompute: of a layer only what enters it
    is kept for the backward pass, which computes the rest again.
    """

    packed: bool
    first_layer: int = 0
    recompute: bool = False


class Predictions(NamedTuple):
    """At the position that predicts each token."""

    logits: Tensor | None  # (P, M, T, vocabulary); None if not asked for
    hidden: Tensor  # (P, M, T, H): what enters the output layer


class _Rows(NamedTuple):
    """A rollout as a model's arguments."""

    inputs: dict[str, Any]
    predicts: Tensor  # the columns that predict a token


def predict(base: HfModel, rollout: Rollout, reading: Reading, *, logits: bool) -> Predictions:
    """What `base`, a causal language model, predicts at each token of a rollout."""
    shape = (*rollout.completion_ids_PMT.shape, -1)
    per_prompt, max_tokens = shape[1:3]
    rows = _packed_rows(base, rollout, reading) if reading.packed else _rows_apart(rollout)

    def together() -> contextlib.AbstractContextManager[None]:
        return equal_completions(base, per_prompt, max_tokens) if reading.packed else contextlib.nullcontext()

    again = _recomputed(base, together) if reading.recompute else contextlib.nullcontext()
    with together(), _upper_layers(base, reading.first_layer), again:
        if not logits:
            hidden = base.base_model(**rows.inputs, use_cache=False).last_hidden_state[:, rows.predicts]
            return Predictions(None, hidden.reshape(shape))
        with entering_the_head(base) as entered:
            out = base(**rows.inputs, use_cache=False, logits_to_keep=rows.predicts)
    return Predictions(out.logits.reshape(shape), entered[-1].reshape(shape))


def _packed_rows(base: HfModel, rollout: Rollout, reading: Reading) -> _Rows:
    per_prompt, max_tokens = rollout.completion_ids_PMT.shape[1:]
    prompt_length = rollout.prompt_ids_PL.shape[1]
    sees, positions = packed_attention(rollout)
    # Token t of a completion is predicted at its token t-1; every first token at the prompt's last position.
    start = prompt_length + torch.arange(per_prompt, device=sees.device) * max_tokens
    predicts = start[:, None] + torch.arange(max_tokens, device=sees.device) - 1
    predicts[:, 0] = prompt_length - 1
    if reading.first_layer:
        assert rollout.hidden_PLH is not None
        entering = rollout.hidden_PLH
    else:
        ids = torch.cat([rollout.prompt_ids_PL, rollout.completion_ids_PMT.flatten(1)], 1)
        entering = base.get_input_embeddings()(ids)
    masks = attention_masks(base, sees, positions, positions, entering.dtype)
    inputs = {"inputs_embeds": entering, "attention_mask": masks, "position_ids": positions}
    return _Rows(inputs, predicts.flatten())


def _rows_apart(rollout: Rollout) -> _Rows:
    """Rows are completions, prompt after prompt."""
    per_prompt, max_tokens = rollout.completion_ids_PMT.shape[1:]
    ids, mask = (
        torch.cat([prompt.repeat_interleave(per_prompt, 0), completion.flatten(0, 1).to(prompt)], 1)
        for prompt, completion in (
            (rollout.prompt_ids_PL, rollout.completion_ids_PMT), (rollout.prompt_mask_PL, rollout.mask_PMT),
        )
    )  # fmt: skip
    predicts = rollout.prompt_ids_PL.shape[1] - 1 + torch.arange(max_tokens, device=ids.device)
    return _Rows({"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}, predicts)


class Passing(nn.Module):
    """In place of a decoder layer: what enters leaves."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        return hidden_states


@contextlib.contextmanager
def _upper_layers(base: HfModel, first_layer: int) -> Iterator[None]:
    """Within it, hidden states that enter the decoder enter its layer `first_layer`; layers keep their numbers."""
    decoder = base.base_model
    layers = decoder.layers if first_layer else None
    if layers is not None:
        decoder.layers = nn.ModuleList([*(Passing() for _ in range(first_layer)), *layers[first_layer:]])
    try:
        yield
    finally:
        if layers is not None:
            decoder.layers = layers


@contextlib.contextmanager
def _recomputed(base: HfModel, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Within it, layers keep what enters them; the backward pass computes the rest again, within `around`."""
    layers: Any = decoder_layers(base)[1] if torch.is_grad_enabled() else ()
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,  # nothing is drawn
            context_fn=lambda: (contextlib.nullcontext(), around()),
        )  # fmt: skip
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def entering_the_head(base: HfModel) -> Iterator[list[Tensor]]:
    """Collect, forward after forward, what enters the output layer."""
    entered: list[Tensor] = []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    try:
        yield entered
    finally:
        hook.remove()


@contextlib.contextmanager
def entering_layer(base: HfModel, first_layer: int) -> Iterator[list[Tensor]]:
    """Collect, forward after forward, what enters a decoder layer; nothing for layer 0."""
    entered: list[Tensor] = []
    if not first_layer:
        yield entered
        return

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    hook = base.base_model.layers[first_layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield entered
    finally:
        hook.remove()


@torch.no_grad()
def check_rereading(rollout: Rollout, logprob_PMT: Tensor, base: HfModel, apart_PMT: Tensor | None = None) -> None:
    """Raise PoiseError if a fresh rollout, read again, has other log-probabilities than sampling recorded.

    PPO would train on the difference. logprob_PMT: as read again, by the weights that sampled, at temperature 1;
    apart_PMT: in low precision, the same in rows of their own under the model's own mask.

    Allowed is in float32 an rms difference of `families.tolerance` nats per token, 1e-3 for 30 layers. In bfloat16 that
    would be .26, far above the rounding. There the rounding of this very rollout is measured: the rms difference r
    between sampling and reading apart, both of them the model's own ways. A right reading errs about as much. Over n
    tokens the ratio of two such rms has a relative error of n^-1/2. Allowed is twice r, plus five of these errors; at
    least one eps, the rounding of a logit of 2; and no more than `families.tolerance`.

    The worst of all processes counts, so that all of them stop.
    """
    recorded = rollout.logprob_PMT if rollout.sampled_PMT is None else rollout.sampled_PMT
    sampled = rollout.mask_PMT.bool()

    def rms(logprob: Tensor) -> Tensor:
        return (logprob.float() - recorded.float())[sampled].square().mean().sqrt()

    found, allowed = rms(logprob_PMT), sampled.new_tensor(tolerance(base), dtype=torch.float32)
    if apart_PMT is not None:
        wide = 2 * (1 + 5 * sampled.sum() ** -0.5)
        allowed = (wide * rms(apart_PMT)).clamp_min(torch.finfo(base.dtype).eps).minimum(allowed)
    pairs = processes.gathered(torch.stack([found, allowed]).unsqueeze(0))
    found, allowed = pairs[(pairs[:, 0] / pairs[:, 1]).nan_to_num(torch.inf).argmax()]
    if not found <= allowed:  # NaN neither
        raise PoiseError(
            f"{base.config.model_type}: log-probabilities of the sampled tokens, read again before the first update, "
            f"differ by {found:.2g} nats (rounding: up to {allowed:.2g}); PPO would train on that difference, "
            f"use --algorithm rloo or grpo"
        )


# ---- tried, not guessed ----


@torch.no_grad()
def has_plain_head(base: HfModel) -> bool:
    """Are the logits nothing but head @ last hidden state? Some models cap or scale either."""
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    ids = torch.tensor([probe_tokens(base, range(4))], device=head.weight.device)
    with _tried(base, "be read"):
        logits, last = base(input_ids=ids).logits, base.base_model(input_ids=ids).last_hidden_state
    return torch.equal(logits, head(last))  # bitwise: it would be the same operation


@contextlib.contextmanager
def _tried(base: HfModel, what: str) -> Iterator[None]:
    """Within it, what a model raises becomes the one line that it cannot do `what`."""
    try:
        yield
    except PoiseError:
        raise
    except REFUSALS as error:
        raise PoiseError(f"{base.config.model_type}: this kind of model cannot {what}: {first_line(error)}") from None


def _sampled_or_raise(base: HfModel, rollout: Rollout) -> Tensor:
    """The states of each text alone. Raises PoiseError unless they are those of sampling, too."""
    with _tried(base, "be read"):
        wanted = _states_alone(base, rollout)
    with _tried(base, "be sampled from: several completions go on from one prompt's keys and values"):
        sampled = _states_at_sampling(base, rollout)
    if not alike(base, sampled, wanted, only_way=True):
        raise PoiseError(
            f"{base.config.model_type}: the hidden states of a text that is written token by token are not those of "
            f"the whole text; such a policy cannot be trained, choose another model"
        )
    return wanted


@torch.no_grad()
def padding_or_raise(base: HfModel) -> None:
    """Raise PoiseError for a model that cannot be sampled from or read again as TRL does it.

    Its hidden states must not change with the padding of a batch, nor with later tokens. Otherwise log-probabilities of
    a sampled text, read again in a batch of padded texts, are not those of sampling.
    """
    with narrow_windows(base), _tried(base, "be read in a batch"):
        rollout = _probe(base)
        _sampled_or_raise(base, rollout)
        inputs = {name: value for name, value in _rows_apart(rollout).inputs.items() if name != "position_ids"}
        with entering_the_head(base) as entered:
            base(**inputs, use_cache=False)
        sampled, start = rollout.mask_PMT.bool(), rollout.prompt_ids_PL.shape[1] - 1
        found = entered[-1][:, start:-1].reshape(*sampled.shape, -1)
        wanted = torch.zeros_like(found)
        wanted[sampled] = _states_alone(base, rollout)
        first = torch.zeros_like(rollout.mask_PMT)
        first[..., 0] = 1  # texts of one token more than the prompt
        alone = _states_alone(base, replace(rollout, mask_PMT=first))
        fine = alike(base, found[sampled], wanted[sampled], only_way=True)
        fine = fine and alike(base, alone, wanted[:, :, 0].flatten(0, 1), only_way=True)
    if not fine:
        raise PoiseError(
            f"{base.config.model_type}: the hidden states of a text change with the padding of its batch or with later "
            f"tokens; such a policy cannot be trained, choose another model"
        )


@torch.no_grad()
def choose(base: HfModel, first_layer: int) -> Reading:
    """The fastest reading that gives a model its own hidden states, on a rollout beyond its narrowed window.

    first_layer: the first layer that is trained.
    Says once if completions cannot be packed. Raises PoiseError for a model that no reading is right for.
    """
    with narrow_windows(base):
        rollout = _probe(base)
        wanted = _sampled_or_raise(base, rollout)
        if windows(base) is None or not _gives(base, rollout, Reading(packed=True), wanted):
            if not _gives(base, rollout, Reading(packed=False), wanted, only_way=True):
                raise PoiseError(
                    f"{base.config.model_type}: the hidden states of a text change with the padding of its batch; "
                    f"such a policy cannot be trained, choose another model"
                )
            say_once(base, "each completion is read with a copy of its prompt; updates of the policy take longer")
            return Reading(packed=False)
        if 0 < first_layer < len(getattr(base.base_model, "layers", ())):
            with entering_layer(base, first_layer) as entered:
                _states(base, rollout, Reading(packed=True))
            split = Reading(packed=True, first_layer=first_layer)
            if _gives(base, replace(rollout, hidden_PLH=entered[-1]), split, wanted):
                return split
        return Reading(packed=True)


def _gives(base: HfModel, rollout: Rollout, reading: Reading, wanted: Tensor, *, only_way: bool = False) -> bool:
    try:
        return alike(base, _states(base, rollout, reading), wanted, only_way=only_way)
    except REFUSALS:
        return False


def _states(base: HfModel, rollout: Rollout, reading: Reading) -> Tensor:
    """What enters the output layer at the sampled tokens (N, H)."""
    return predict(base, rollout, reading, logits=True).hidden[rollout.mask_PMT.bool()]


def _states_alone(base: HfModel, rollout: Rollout) -> Tensor:
    """What `_states` should give: each text is read alone, without padding, and without positions from outside."""
    found: list[Tensor] = []
    with entering_the_head(base) as entered:
        for p, m in itertools.product(*map(range, rollout.mask_PMT.shape[:2])):
            prompt = rollout.prompt_ids_PL[p][rollout.prompt_mask_PL[p].bool()]
            completion = rollout.completion_ids_PMT[p, m][rollout.mask_PMT[p, m].bool()]
            base(input_ids=torch.cat([prompt, completion]).unsqueeze(0), use_cache=False)
            found.append(entered[-1][0, len(prompt) - 1 : -1])
    return torch.cat(found)


def _states_at_sampling(base: HfModel, rollout: Rollout) -> Tensor:
    """The same, as a policy samples: keys and values of prompts, repeated; then token by token, without what ended."""
    per_prompt, max_tokens = rollout.completion_ids_PMT.shape[1:]
    ids, mask = rollout.completion_ids_PMT.flatten(0, 1), rollout.mask_PMT.flatten(0, 1).bool()
    seen = rollout.prompt_mask_PL
    cache = DynamicCache(config=base.config)
    cached = going_on(base, cache)
    found: list[list[Tensor]] = [[] for _ in ids]
    with entering_the_head(base) as entered:
        base(
            input_ids=rollout.prompt_ids_PL, attention_mask=seen, position_ids=positions_of(seen),
            **cached,
        )  # fmt: skip
        cache.batch_repeat_interleave(per_prompt)
        seen = seen.repeat_interleave(per_prompt, 0)
        alive = torch.arange(len(ids), device=ids.device)
        states = entered[-1][:, -1].repeat_interleave(per_prompt, 0)
        for step in range(max_tokens):
            going = mask[alive, step]
            if not going.all():
                cache.batch_select_indices(going.nonzero()[:, 0])
                alive, seen, states = alive[going], seen[going], states[going]
            for row, state in zip(alive.tolist(), states, strict=True):
                found[row].append(state)
            if step + 1 == max_tokens:
                break
            seen = torch.cat([seen, seen.new_ones(len(alive), 1)], -1)
            base(
                input_ids=ids[alive, step, None], attention_mask=seen, position_ids=positions_of(seen)[:, -1:],
                **cached,
            )  # fmt: skip
            states = entered[-1][:, -1]
    return torch.stack([state for row in found for state in row])


def _probe(base: HfModel) -> Rollout:
    """Two prompts, one padded, with two completions each, of which two are padded."""
    device = base.device
    ids = torch.tensor(probe_tokens(base, range(1, 10)), device=device)
    prompt_ids = torch.stack([ids[:7], ids[:7].flip(0)])
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[1, :4] = 0
    completion_ids = torch.stack([ids[2:8], ids[3:9].flip(0), ids[:6].flip(0), ids[1:7]]).view(2, 2, 6)
    mask = torch.ones(2, 2, 6, device=device)
    mask[0, 1, 3:] = mask[1, 0, 1:] = 0
    return Rollout(prompt_ids, prompt_mask, completion_ids, mask, torch.zeros_like(mask), torch.zeros_like(mask), None)
