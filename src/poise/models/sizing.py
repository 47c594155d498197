"""What a model's layers take, found without its weights: its config.json alone is read.

The model is built on PyTorch's meta device, where tensors have shapes and no memory. The code that trains is run on it
while every tensor that it makes and frees is counted. Layers are alike, so two depths give all others.

Attention is counted as a fused kernel keeps it: queries, keys, values, mask, result, and one number for each query.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poise.errors import PoiseError, first_line
from poise.functional.memory import Measured, ModelShape, Tune
from poise.models.adapted_maps import decoder_layers, linear_maps
from poise.models.choices import DEFAULT_MODEL
from poise.models.families import attention_masks
from poise.models.fused_ops import ChosenLogprob
from poise.models.head_adapters import add_head_adapters, logits_of
from poise.models.loading import HfModel, keep_layers, resolve_model
from poise.models.model_config import load_config
from poise.models.rereading import Reading, predict
from poise.models.reward_model import with_heads
from poise.models.rollout import Rollout
from poise.models.shared_prompt import Family, PackedRows, pack, packed_hidden
from poise.models.trained_parts import with_adapters, without_adapters

META = torch.device("meta")


def config_of(model: str) -> Any:
    """The config of a folder or a hub id, without weights but for the default model. PoiseError if there is none."""
    known = model == DEFAULT_MODEL or Path(model).exists()
    return load_config(resolve_model(model) if known else model)


def shape_of(config: Any) -> ModelShape:
    """Counts of the language model that a config describes."""
    text = config.get_text_config()
    if min(text.hidden_size, text.vocab_size, text.num_hidden_layers) < 1:
        raise PoiseError(f"no memory can be planned for a {config.model_type}: its config.json has sizes below 1")
    base = _built(config, transformers.AutoModelForCausalLM, text.num_hidden_layers)
    stack, layers = decoder_layers(base)
    count = sum(parameter.numel() for parameter in base.parameters())
    layer = sum(parameter.numel() for parameter in layers.parameters())
    maps = [base.get_submodule(name) for name in linear_maps(base) if name.startswith(f"{stack}.")]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    depth = len(layers)
    return ModelShape(
        num_layers=depth, layer=layer // depth, outside=count - layer // depth * depth,
        linear_sizes=sum(sum(one.weight.shape) for one in maps) // depth,
        linear=sum(one.weight.numel() for one in maps) // depth,
        hidden=text.hidden_size, vocabulary=text.vocab_size, cached=2 * depth * heads * size,
    )  # fmt: skip


def policy_measured(
    config: Any,
    *,
    tune: Tune,
    layers: int,
    rank: int,
    part: int,
    reading: int,
    prompts: int,
    completions: int,
    prompt_tokens: int,
    max_tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
) -> Measured:
    """What the layers of a policy take in PPO.

    part, reading, prompts: prompts that are updated on, read again, and sampled from at once on one GPU.
    completions: of a prompt in a part.   layers: how many are trained.
    """
    depth = config.get_text_config().num_hidden_layers
    split = layers < depth

    def read_by(trained: int, count: int, *, logits: bool) -> Callable[[], Tensor]:
        """What reads a rollout of so many prompts, by a model of so many trained layers."""
        base = without_adapters(_trainable(config, tune, trained, split=split, rank=rank, dtype=dtype))
        rollout = _rollout(base, count, completions, prompt_tokens, max_tokens, split=split, dtype=dtype)
        how = Reading(packed=True, first_layer=int(split))
        return lambda: _loss(base, rollout, how, head_trained=tune == "full" and not split, logits=logits)

    def update(trained: int, *, logits: bool) -> int:
        loss = read_by(trained, part, logits=logits)
        return _peak(lambda: loss().backward())

    def read(trained: int) -> int:
        loss = read_by(trained, reading, logits=True)
        with torch.no_grad():
            return _peak(loss)

    def prefill(depth: int) -> int:
        base = _built(config, transformers.AutoModelForCausalLM, depth, dtype)
        with torch.no_grad():
            return _peak(_plainly(base, prompts, prompt_tokens, dtype))

    tokens = part * (prompt_tokens + completions * max_tokens)
    kept = tokens * config.get_text_config().hidden_size * dtype.itemsize if checkpointing else None
    plain = _at_depth(lambda depth: update(depth, logits=False), layers, kept)
    whole = _at_depth(lambda depth: update(depth, logits=True), layers, kept)
    return Measured(plain, max(whole - plain, 0), _at_depth(read, layers), _at_depth(prefill, depth))


def trl_measured(
    config: Any, *, layers: int, rank: int, part: int, sampled: int, prompt_tokens: int, max_tokens: int,
    dtype: torch.dtype, checkpointing: bool,
) -> Measured:  # fmt: skip
    """What the layers of a policy take in RLOO and GRPO, whose reading TRL does: rows, padded, each with its prompt.

    part, sampled: completions that are updated on and sampled at once on one GPU.   layers: how many are trained.
    With checkpointing what enters each layer is kept, also of those that are not trained.
    """
    depth, tokens = config.get_text_config().num_hidden_layers, prompt_tokens + max_tokens
    split = layers < depth and not checkpointing

    def update(trained: int) -> int:
        base = without_adapters(_trainable(config, "lora", trained, split=split, rank=rank, dtype=dtype))
        read = _plainly(base, part, tokens, dtype)
        return _peak(lambda: read().float().sum().backward())

    def read(rows: int, length: int) -> Callable[[int], int]:
        def reading(depth: int) -> int:
            base = _built(config, transformers.AutoModelForCausalLM, depth, dtype)
            with torch.no_grad():
                return _peak(_plainly(base, rows, length, dtype))

        return reading

    kept = part * tokens * config.get_text_config().hidden_size * dtype.itemsize if checkpointing else None
    return Measured(
        _at_depth(update, depth if checkpointing else layers, kept), 0, _at_depth(read(part, tokens), depth),
        _at_depth(read(sampled, prompt_tokens), depth),
    )  # fmt: skip


def _plainly(base: HfModel, rows: int, length: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What reads so many rows of so many tokens, and gives their last hidden states."""
    ids = torch.zeros(rows, length, dtype=torch.long, device=META)
    sees = torch.ones(rows, length, length, dtype=torch.bool, device=META)

    def read() -> Tensor:
        masks = attention_masks(base, sees, ids, ids, dtype)
        found = base.base_model(input_ids=ids, position_ids=ids, attention_mask=masks, use_cache=False)
        return found.last_hidden_state

    return read


def reward_measured(
    config: Any, *, tune: Tune, rank: int, pairs: int, prompt_tokens: int, tokens: int, dtype: torch.dtype,
    checkpointing: bool, adapter_heads: int = 0, head_layers: int = 0,
) -> Measured:  # fmt: skip
    """What the layers of a reward model take in an update on some pairs, whose texts have all `tokens` tokens.

    adapter_heads, head_layers: as of `poise.functional.memory.RewardRun`; layers below keep nothing.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    prompt_tokens = min(prompt_tokens, tokens - 1)
    texts = [[0] * (tokens - prompt_tokens)] * 2
    rows = pack([Family([0] * prompt_tokens, texts) for _ in range(pairs)], 0)
    packed = PackedRows(*(tensor.to(META) for tensor in rows))

    def update(depth: int) -> int:
        classifier = _built(config, transformers.AutoModelForSequenceClassification, depth, dtype)
        if not hasattr(classifier, "score"):
            raise PoiseError(
                f"no memory can be planned for a {config.model_type}: it reads no reward from a last token"
            )
        if adapter_heads:
            with_heads(classifier, classifier.score.weight.detach().expand(2 * adapter_heads, -1))
            add_head_adapters(classifier, adapter_heads, rank)
        elif tune == "lora":
            classifier = with_adapters(classifier, 0, rank, task="SEQ_CLS").get_base_model()
        return _peak(lambda: logits_of(classifier, packed_hidden(classifier, packed)).float().sum().backward())

    text = config.get_text_config()
    depth = min(head_layers or text.num_hidden_layers, text.num_hidden_layers)
    kept = packed.ids_BL.numel() * max(adapter_heads, 1) * text.hidden_size * dtype.itemsize if checkpointing else None
    return Measured(_at_depth(update, depth if adapter_heads else text.num_hidden_layers, kept))


def _at_depth(measure: Callable[[int], int], depth: int, kept: int | None = None) -> int:
    """A number at a depth, from its values at one and two layers, between which it is a line.

    kept: what every further layer adds, where it is known: with gradient checkpointing only what enters it is kept. The
    sum is then a bound, since the tables of the output layer are gone before a layer computes again.
    """
    one = measure(1)
    return one + (depth - 1) * (measure(2) - one if kept is None else kept)


def _built(config: Any, auto: Any, num_layers: int, dtype: torch.dtype = torch.float32) -> HfModel:
    """A model of so many layers on the meta device."""
    config = copy.deepcopy(config)
    keep_layers(config, num_layers)
    try:
        with META:
            return auto.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise PoiseError(f"no memory can be planned for a {config.model_type}: {first_line(error)}") from None


def _trainable(config: Any, tune: Tune, trained: int, *, split: bool, rank: int, dtype: torch.dtype) -> HfModel:
    """A model whose upper layers are trained, over a frozen one if it is `split`, with gradients that exist already."""
    base = _built(config, transformers.AutoModelForCausalLM, trained + split, dtype)
    model = base
    if tune == "lora":
        model = with_adapters(base, int(split), rank)
    elif split:
        base.requires_grad_(False)
        for layer in decoder_layers(base)[1][1:]:
            layer.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


def _rollout(
    base: HfModel, prompts: int, completions: int, prompt_tokens: int, max_tokens: int, *, split: bool,
    dtype: torch.dtype,
) -> Rollout:  # fmt: skip
    with META:
        ids = torch.zeros(prompts, prompt_tokens, dtype=torch.long)
        completion = torch.zeros(prompts, completions, max_tokens, dtype=torch.long)
        mask = torch.ones(prompts, completions, max_tokens)
        length = prompt_tokens + completions * max_tokens
        hidden = torch.zeros(prompts, length, base.config.get_text_config().hidden_size, dtype=dtype) if split else None
        return Rollout(ids, torch.ones_like(ids), completion, mask, mask, mask, hidden)


def _loss(base: HfModel, rollout: Rollout, how: Reading, *, head_trained: bool, logits: bool) -> Tensor:
    """The sum of the log-probabilities as `Policy` reads them, or of the hidden states."""
    if not logits or not head_trained:
        hidden = predict(base, rollout, how, logits=False).hidden
        if not logits:
            return hidden.float().sum()
        weight = base.get_output_embeddings().weight
        chosen = rollout.completion_ids_PMT.flatten()
        return ChosenLogprob.apply(hidden.flatten(0, 2), weight.detach(), chosen).sum()
    table = predict(base, rollout, how, logits=True).logits
    assert table is not None  # asked for
    table = table.float()
    chosen = table.gather(-1, rollout.completion_ids_PMT.unsqueeze(-1)).squeeze(-1)
    return (chosen - table.logsumexp(-1)).sum()


# ---- counting ----


def _peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` take at one time."""
    with counted() as live, _FusedAttention():
        work()
    return live.peak


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in before:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextlib.contextmanager
def counted() -> Iterator[Live]:
    """Within it, tensors are counted."""
    with Live() as live:
        yield live


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch would take attention apart, and keep a table of all scores that no kernel keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return _Attention.apply(query, key, value, mask)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Has the shapes of attention, and keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ARG004
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
