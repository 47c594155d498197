"""A language model as a policy: sampling, log-probabilities and values, with nothing computed twice.

The lower layers are frozen and shared by the policy, its reference and its values. What enters the first trained layer
is kept while sampling, so that neither the reference nor any PPO epoch runs the lower layers again; nor are
log-probabilities and values of the sampled tokens computed a second time. That holds in float32.

In bfloat16 two ways of computing one log-probability differ by hundredths of a nat, which PPO would take for a change
of the policy and for KL. So there the old log-probabilities, the new ones and the reference's all come from reading the
rollout again. Sampling runs the adapters beside the weights: folded in, small ones would be rounded away.

A prompt's M completions lie in one row with it, [prompt | completion 1 | … | completion M]: each completion attends
to the prompt and to itself, at positions that continue the prompt's. So a prompt is encoded once, however many
completions it has.

Shapes: _P prompts, _M completions per prompt, _T tokens of a completion, _L row length (prompt + M * T), _H hidden.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional import ppo
from poise.functional.memory import sampled_at_once
from poise.models.chat_format import decode_completions, encode_prompt
from poise.models.choices import Tune, ValueTrunk
from poise.models.context import room_or_raise
from poise.models.drawing import cached_bytes, draw_completions
from poise.models.end_tokens import end_token_ids
from poise.models.families import feature_size, is_low
from poise.models.fused_ops import ChosenLogprob, folded_in
from poise.models.loading import HfModel, HfTokenizer, device, embedded_or_raise, load_into_adapters
from poise.models.model_config import name_rope_for_version_4
from poise.models.rereading import (
    Predictions,
    Reading,
    check_rereading,
    choose,
    has_plain_head,
    predict,
)
from poise.models.rollout import Part, Rollout, joined, passes, turns_of
from poise.models.trained_on import write_base
from poise.models.trained_parts import spread_layers, twin, upper_parameters, with_adapters, without_adapters
from poise.runtime.processes import several
from poise.runtime.quiet import quiet_loading
from poise.runtime.sharding import is_spread, whole_on_main, whole_weights


class Evaluation(NamedTuple):
    """What a policy says of the sampled tokens of a rollout, each (P, M, T)."""

    logprob: Tensor
    value: Tensor
    entropy: Tensor | None  # of the whole distribution at each token, in nats; if asked for


class Policy(nn.Module):
    """A causal language model whose upper layers are trained, its frozen reference, and a value head.

    tune: `lora` (the reference is the model with its adapters off) or `full` (the reference keeps copies of the trained
    weights, and of those alone).
    adapted_layers: how many of the top layers are trained; 0 trains all, with `full` the embeddings too.
    value_trunk: `shared` (a linear function of the policy's last hidden states, whose fit does not move the policy) or
    `own` (trained layers of its own over the same frozen ones).
    gradient_checkpointing: compute what a layer made again in the backward pass, which then need not be kept.
    """

    def __init__(
        self,
        model: HfModel,
        tokenizer: HfTokenizer,
        *,
        adapted_layers: int,
        rank: int,
        tune: Tune = "lora",
        value_trunk: ValueTrunk = "shared",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.tokenizer, self.tune = tokenizer, tune
        self.end_ids = end_token_ids(model, tokenizer)
        num_layers = model.config.get_text_config().num_hidden_layers
        self._first_adapted = max(num_layers - adapted_layers, 0) if adapted_layers else 0
        self._lowest_trained = self._first_adapted
        device, self.dtype = next(model.parameters()).device, model.dtype
        self.low_precision, self._token_bytes = is_low(model.dtype), 0
        reading = choose(model, self._first_adapted)
        self._plain_head, self._reading = has_plain_head(model), reading._replace(recompute=gradient_checkpointing)
        trained = upper_parameters(model, self._first_adapted)
        if tune == "full":  # before the copies are made: the reference computes as the policy does
            for parameter in trained:
                parameter.data = parameter.data.float()
        twins = [twin(model, trained) for _ in range((tune == "full") + (value_trunk == "own"))]
        self.model = self._trainable(model, trained, rank)
        self._trains_head = self._base.get_output_embeddings().weight.requires_grad
        self.value_model = self._trainable(twins.pop(), None, rank) if value_trunk == "own" else None
        # In a list, so that it is not registered: it is neither trained nor saved.
        self._reference = [twins.pop().requires_grad_(False)] if twins else []
        # From here on: the layer whose inputs are kept while sampling; 0 if they cannot enter it again.
        self._first_adapted = self._reading.first_layer
        self.value_head = nn.Linear(feature_size(model), 1, device=device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _trainable(self, model: HfModel, trained: list[nn.Parameter] | None, rank: int) -> HfModel:
        """The model with what is to be trained, in float32, and nothing else asking for gradients.

        trained: with `full` in float32 already; None: of a copy.
        """
        if trained is None:
            trained = upper_parameters(model, self._first_adapted)
        model.requires_grad_(False)
        if self.tune == "full":
            for parameter in trained:
                parameter.requires_grad_(True)
            return model
        return with_adapters(model, self._first_adapted, rank)

    def spread(self) -> None:
        """Spread the weights of the layers over the processes; embeddings and output layer stay whole on each.

        Called by all processes, before anything is trained. Copies that are read from a trained layer on lose the
        layers below it. Raises PoiseError for a model whose copies need those.
        """
        if not several():
            return
        for number, model in enumerate(self._models()):
            lowest = self._first_adapted if number else 0
            if number and self._lowest_trained and not lowest:
                raise PoiseError("--shard: this model's own values and its reference need --adapted-layers 0")
            with self.rounding():
                spread_layers(without_adapters(model), lowest)
        self.value_head.to(device())

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within it, every process has all weights, and computes for itself. Entered by all together."""
        with contextlib.ExitStack() as stack:
            for model in self._models():
                stack.enter_context(whole_weights(model))
            yield

    @property
    def is_spread(self) -> bool:
        """Must all processes call it together?"""
        return any(map(is_spread, self._models()))

    def _models(self) -> list[HfModel]:
        """The policy, and its copies."""
        return [self.model, *(one for one in (self.value_model, *self._reference) if one is not None)]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """All that training changes and a checkpoint must hold: adapters or upper layers, and the values' own."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def sample(
        self, prompts: list[Prompt], uniform: Float[Tensor, "prompts completions tokens"], *, read_again: bool = True
    ) -> Rollout:
        """Sample at temperature 1 from the full distribution, so that the kept log-probabilities are exact.

        uniform: numbers in [0, 1), one for each token that may be drawn: how many completions of each prompt, how long
        at most, and which. A completion depends on its own numbers only, not on what it is sampled together with (up to
        rounding), so that one process and several draw the same; see `uniforms`. Nor does it on the turns in which all
        are sampled, so that the keys and values of each turn take at most `memory.SAMPLED_AT_ONCE` bytes.

        It ends at any of the model's end tokens (`end_token_ids`), or after the longest length.

        read_again: give log-probabilities and values as `Policy.read_again` does; False where texts alone are wanted.

        Raises PoiseError if a prompt leaves no room for the completion in the model's context.
        """
        prompt_ids, prompt_mask = self._encode(prompts, uniform.shape[-1])
        # In low precision not folded in: a sum W + B A in bfloat16 loses what is below 2^-9 of W.
        with (
            whole_weights(self.model),
            self.rounding(),
            contextlib.nullcontext() if self.low_precision else folded_in(self.model),
        ):
            rollout = joined(
                [
                    draw_completions(
                        self._base, prompt_ids[some], prompt_mask[some], uniform[some, completions],
                        end_ids=self.end_ids, pad_id=self.tokenizer.pad_token_id, first_layer=self._first_adapted,
                        value_of=self._value_of,
                    )
                    for some, completions in self._turns(prompt_ids.shape[1], uniform.shape)
                ],
                uniform.shape[1],
            )  # fmt: skip
        if self.low_precision:
            return self.read_again(rollout) if read_again else rollout
        if self.value_model is not None:
            for part in self._passes(rollout):
                rollout.value_PMT[part] = self._own_values(rollout.part(part))
            rollout.value_PMT *= rollout.mask_PMT
        return rollout

    @torch.no_grad()
    def read_again(self, rollout: Rollout, parts: Sequence[Part] = (), *, entropy: bool = False) -> Rollout:
        """The rollout with the log-probabilities and values that `evaluate` gives now; in float32 as it is.

        parts: what is read together, by default `_passes`; entropy: as for `evaluate`. Rows are read to the same bit
        only beside as many rows, and in the same way.
        """
        if not self.low_precision:
            return rollout
        mask, kept = rollout.mask_PMT, rollout.sampled_PMT
        logprob, value = torch.zeros_like(mask), torch.zeros_like(mask)
        for part in parts or self._passes(rollout):
            logprob[part], value[part], _ = self.evaluate(rollout.part(part), entropy=entropy)
        return replace(
            rollout, logprob_PMT=logprob * mask, value_PMT=value * mask,
            sampled_PMT=rollout.logprob_PMT if kept is None else kept,
        )  # fmt: skip

    @torch.no_grad()
    def check_rereading(self, rollout: Rollout) -> None:
        """Raise PoiseError unless this policy reads its own fresh rollout as it sampled it, up to rounding."""
        if not self.low_precision:
            check_rereading(rollout, self._logprobs(rollout, self._passes(rollout)), self._base)
            return
        rollout = rollout if rollout.sampled_PMT is not None else self.read_again(rollout)
        each = torch.arange(len(rollout.mask_PMT), device=rollout.mask_PMT.device).split(1)
        apart = [self._read(self._base, rollout.part(Part(one)), reading=Reading(packed=False))[0] for one in each]
        check_rereading(rollout, rollout.logprob_PMT, self._base, torch.cat(apart))

    def evaluate(self, rollout: Rollout, *, entropy: bool = False) -> Evaluation:
        """Log-probabilities, values and, if asked for, entropies at the sampled tokens, under the present policy."""
        logprob, hidden, spread = self._read(self._base, rollout, entropy=entropy)
        value = self._own_values(rollout) if self.value_model is not None else self._value_of(hidden.detach())
        return Evaluation(logprob, value, spread)

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout, parts: Sequence[Part] = (), *, entropy: bool = False) -> Tensor:
        """Log-probabilities (P, M, T) under the initial policy; parts, entropy: as for `read_again`."""
        with self.as_reference():
            return self._logprobs(rollout, parts or self._passes(rollout), entropy=entropy)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Be the initial policy for a while."""
        if self.tune == "lora":
            with self.model.disable_adapter():
                yield
            return
        trained, self.model = self.model, self._reference[0]
        try:
            yield
        finally:
            self.model = trained

    def weights(self) -> dict[str, Tensor]:
        """What `save` writes, on the main process; gathered by all together."""
        named = self.trained_parameters() if self.tune == "lora" else {}
        kept = {name.removeprefix("model."): tensor for name, tensor in named.items() if name.startswith("model.")}
        return {name: whole_on_main(tensor) for name, tensor in (kept or self.model.state_dict()).items()}

    def save(self, folder: str, weights: dict[str, Tensor] | None = None) -> None:
        """PEFT adapters, or with `full` the whole model; the tokenizer too. weights: as `weights` gave them."""
        # Embeddings are never adapted: peft need not ask the hub whether the vocabulary has grown.
        about: dict[str, Any] = {"save_embedding_layers": False} if self.tune == "lora" else {}
        with quiet_loading():
            self.model.save_pretrained(folder, state_dict=self.weights() if weights is None else weights, **about)
            self.tokenizer.save_pretrained(folder)
        if self.tune == "lora":
            write_base(self._base, Path(folder))
        else:
            name_rope_for_version_4(Path(folder))

    def load_adapters(self, folder: str) -> None:
        """Take the adapters that `save` (or another trainer of the same layers) wrote.

        Raises PoiseError unless the folder holds adapters of these layers, rank, scale and weights, as safetensors.
        """
        load_into_adapters(self.model, folder)

    def texts(self, rollout: Rollout) -> list[list[str]]:
        """Decoded completions, per prompt, without special tokens."""
        prompts = zip(rollout.prompt_ids_PL, rollout.prompt_mask_PL.bool(), strict=True)
        return [
            decode_completions(self.tokenizer, ids[seen].tolist(), completions)
            for (ids, seen), completions in zip(prompts, rollout.completion_ids_PMT.tolist(), strict=True)
        ]

    # ---- inside ----

    def _turns(self, prompt_tokens: int, shape: Sequence[int]) -> list[tuple[slice, slice]]:
        """What is sampled at a time, of prompts of so many tokens and `shape` (P, M, T)."""
        num_prompts, per_prompt, max_tokens = shape
        self._token_bytes = self._token_bytes or max(cached_bytes(self._base), 1)
        row = (prompt_tokens + max_tokens) * self._token_bytes
        return turns_of(num_prompts, per_prompt, *sampled_at_once(num_prompts, per_prompt, row))

    def _passes(self, rollout: Rollout) -> list[Part]:
        return passes(rollout, packed=self._reading.packed, together=self.is_spread)

    def _logprobs(self, rollout: Rollout, parts: Sequence[Part], *, entropy: bool = False) -> Tensor:
        """(P, M, T), as `_read` gives them part by part."""
        found = torch.zeros_like(rollout.mask_PMT)
        for part in parts:
            found[part] = self._read(self._base, rollout.part(part), entropy=entropy)[0]
        return found

    def _read(
        self, base: HfModel, rollout: Rollout, *, entropy: bool = False, reading: Reading | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log-probabilities, last hidden states, entropies if asked for) at the sampled tokens."""
        head = base.get_output_embeddings()
        # In low precision the reference's head, which is never trained, is read as the policy's is.
        trained = self._trains_head if self.low_precision else head.weight.requires_grad
        if self._plain_head and not entropy and not trained:
            hidden = self._predict(base, rollout, logits=False, reading=reading).hidden
            sampled = rollout.mask_PMT.bool()
            logprob = hidden.new_zeros(sampled.shape, dtype=torch.float32)
            entering = hidden[sampled].to(head.weight.dtype)
            logprob[sampled] = ChosenLogprob.apply(entering, head.weight, rollout.completion_ids_PMT[sampled])
            return logprob, hidden, None
        logits, hidden = self._predict(base, rollout, logits=True, reading=reading)
        assert logits is not None  # asked for
        logits = logits.float()
        chosen = logits.gather(-1, rollout.completion_ids_PMT.unsqueeze(-1)).squeeze(-1)
        return chosen - logits.logsumexp(-1), hidden, ppo.token_entropy(logits) if entropy else None

    def _predict(self, base: HfModel, rollout: Rollout, *, logits: bool, reading: Reading | None = None) -> Predictions:
        # A rollout without kept hidden states, of another policy, can be read from its tokens.
        own = self._reading if rollout.hidden_PLH is not None else self._reading._replace(first_layer=0)
        with self.rounding():
            return predict(base, rollout, reading or own, logits=logits)

    def rounding(self) -> contextlib.AbstractContextManager[Any]:
        """Within it the model can be called: with `full` in low precision, its float32 weights are rounded as used."""
        if self.tune == "full" and self.low_precision:
            return torch.autocast(self.value_head.weight.device.type, self.dtype)
        return contextlib.nullcontext()

    @property
    def _base(self) -> HfModel:
        return without_adapters(self.model)

    def _value_of(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden.float()).squeeze(-1).float()  # `rounding` may be on

    def _own_values(self, rollout: Rollout) -> Tensor:
        return self._value_of(self._predict(without_adapters(self.value_model), rollout, logits=False).hidden)

    def _encode(self, prompts: list[Prompt], max_tokens: int) -> tuple[Tensor, Tensor]:
        rows = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        for row in rows:
            embedded_or_raise(row, self._base.get_input_embeddings().num_embeddings, self.tokenizer)
        longest = max(map(len, rows))
        room_or_raise(longest, max_tokens, self._base.base_model.config.get_text_config())
        device = next(self.model.parameters()).device
        ids = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
