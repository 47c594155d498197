"""What Poise must know about a model family: its attention windows, its steady context, the width of its features.

Attention masks. A 4-D mask given to a model of transformers replaces the mask that the model would make. So the mask
must include the sliding window, and a model with layers of several kinds needs one mask for each kind:

    Llama, GPT-2, OPT, …            one mask
    Mistral, Phi-3, Mixtral, …      one mask, with the window of `config.sliding_window`
    Gemma 2 and 3, Qwen 2 and 3, …  a dictionary of masks, if `config.layer_types` names several kinds

A window limits the distance of two tokens in their text. Where several texts lie in one row, that distance is the
difference of positions, not of columns.

Shapes: _B rows, _L tokens that attend, _S tokens that may be attended to.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from poise.models.context import context_length, steady_context_length
from poise.models.loading import HfModel
from poise.runtime.progress import console

FULL, SLIDING = "full_attention", "sliding_attention"
# What a model may raise if it cannot read what it is given.
REFUSALS = (
    TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, NotImplementedError, AssertionError,
)  # fmt: skip
_PROBE_WINDOW = 4  # tokens; a probe of a dozen tokens reaches beyond it
_CACHES = ("past_key_values", "cache")  # what a model calls it: transformers 5.24 renamed it
_SPARSE = ("index_topk", "keep_window_size")
_OPERATIONS_PER_LAYER = 10  # whose results are rounded: two norms, seven linear maps, attention
_said: set[str] = set()


def windows(model: HfModel) -> dict[str, int | None] | None:
    """Per kind of attention layer, its window: a token sees itself and window - 1 tokens before it; None for all.

    None instead of the dictionary: no mask from outside is right for every layer. That holds for chunked and linear
    attention, state spaces, layer kinds unknown here, and the local layers of GPT-Neo.
    """
    config = model.base_model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) or None
    if not kinds:
        kinds = {SLIDING if window else FULL}
    if not kinds <= {FULL, SLIDING} or (SLIDING in kinds and not isinstance(window, int)):
        return None
    if "local" in (getattr(config, "attention_layers", None) or ()) or getattr(config, "attention_chunk_size", None):
        return None
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


def attention_masks(
    model: HfModel,
    sees: Bool[Tensor, "rows tokens keys"],
    query_position: Int[Tensor, "rows tokens"],
    key_position: Int[Tensor, "rows keys"],
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """`attention_mask` for a model: who sees whom, cut to the window of each kind of layer.

    sees: who would see whom without a window; positions: of the tokens in their own texts; dtype: of the activations.
    Raises ValueError for a model that `windows` gives None for.
    """
    limits = windows(model)
    if limits is None:
        raise ValueError("the model has layers that take no mask from outside")
    masks: dict[str, Tensor] = {}
    for kind, window in limits.items():
        near = sees
        if window is not None:
            near = sees & (query_position.unsqueeze(-1) - key_position.unsqueeze(-2) < window)
        masks[kind] = additive(near, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def additive(sees: Bool[Tensor, "rows tokens keys"], dtype: torch.dtype) -> Float[Tensor, "rows 1 tokens keys"]:
    """The mask as attention layers add it to their scores."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min).unsqueeze(1)


def steady_context(model: HfModel) -> int:
    """`steady_context_length` of a model that may have adapters."""
    return steady_context_length(model.base_model.config.get_text_config())


def has_longrope(model: HfModel) -> bool:
    """Do hidden states depend on whether the longest text of the batch exceeds `steady_context`?"""
    return steady_context(model) < context_length(model.base_model.config.get_text_config())


def feature_size(model: HfModel) -> int:
    """Width of what enters the output layer: `hidden_size`, but `word_embed_proj_dim` in OPT-350m.

    With adapters for each head (models/head_adapters.py), of all heads together.
    """
    head = getattr(model, "score", None) or model.get_output_embeddings()
    size: int = head.in_features if isinstance(head, nn.Linear) else model.config.hidden_size
    return size * getattr(model, "heads_apart", 1)


# ---- training a model that computes as it does when it scores or samples ----


@contextlib.contextmanager
def without_noise(model: HfModel) -> Iterator[None]:
    """Within it, a model in training mode drops nothing out and adds no noise to its router.

    Some families train with dropout unless told otherwise: GPT-2, OPT, BLOOM. Then the features that are trained are
    not those that are scored, and a policy's log-probabilities are not those that it samples with. Rates are found in
    modules of dropout, in attributes of other modules, and in the config, which some models read as they go. Routers
    of experts compute as they do in evaluation: that of PhiMoE draws its experts while it is trained, and its jitter
    is not only a rate of noise.
    """
    places: list[object] = [*model.modules(), model.config.get_text_config()]
    rates = [
        (place, name, value)
        for place in places
        for name, value in vars(place).items()
        if isinstance(value, float) and value and (isinstance(place, nn.Dropout) or "drop" in name)
    ]
    routers = [module for module in model.modules() if any("jitter" in name for name in vars(module))]
    hooks = [hook for router in routers for hook in _evaluated(router)]
    for place, name, _ in rates:
        setattr(place, name, 0.0)
    try:
        yield
    finally:
        for place, name, value in rates:
            setattr(place, name, value)
        for hook in hooks:
            hook.remove()


def _evaluated(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """From now on, a module computes in evaluation mode, whatever mode it is in before and after."""
    before: list[bool] = []

    def enter(_: nn.Module, __: object) -> None:
        before.append(module.training)
        module.training = False

    def leave(*_: object) -> None:
        module.training = before.pop()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def going_on(model: HfModel, cache: Any) -> dict[str, Any]:
    """The arguments by which a model reads what is in a cache before its tokens, and adds them to it."""
    old, new = _CACHES
    return {new if new in inspect.signature(type(model).forward).parameters else old: cache, "use_cache": True}


def positions_without_padding(model: HfModel) -> RemovableHandle | None:
    """From now on, rows padded on the left that come without positions get those of their texts.

    GPT-2 and GPT-Neo count columns where no positions are given. None for a model that takes no positions: it finds
    them in the mask, or has none.
    """
    decoder = model.base_model
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return None

    def add_positions(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = kwargs.get("attention_mask")
        given = any(kwargs.get(name) is not None for name in ("position_ids", *_CACHES))
        if isinstance(mask, Tensor) and mask.dim() == 2 and not given:
            kwargs = kwargs | {"position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)}
        return args, kwargs

    return decoder.register_forward_pre_hook(add_positions, with_kwargs=True)


# ---- trying a model before it is relied on ----


@contextlib.contextmanager
def narrow_windows(model: HfModel) -> Iterator[None]:
    """Within it, the model's sliding window is 4 tokens, so that probes of a dozen tokens reach beyond it.

    So is the number of tokens that sparse attention chooses (DeepSeek V3.2, Doge), which its layers keep themselves.
    """
    config = model.base_model.config.get_text_config()
    places = [(config, name) for name in ("sliding_window", "attention_chunk_size")]
    places += [(place, name) for place in (config, *model.modules()) for name in _SPARSE if hasattr(place, name)]
    kept = [(place, name, getattr(place, name, None)) for place, name in places]
    for place, name, size in kept:
        if isinstance(size, int) and size > _PROBE_WINDOW:
            setattr(place, name, _PROBE_WINDOW)
    try:
        yield
    finally:
        for place, name, size in kept:
            if size is not None:
                setattr(place, name, size)


def rounding(model: HfModel) -> float:
    """Expected relative rounding error of a model's hidden states, as a share of their norm.

    Each operation rounds its result by up to half an eps of its dtype. The errors of different operations are
    independent, so they add up like a random walk: eps / 2 times the square root of the number of operations.
    """
    operations = _OPERATIONS_PER_LAYER * model.config.get_text_config().num_hidden_layers
    return 0.5 * float(torch.finfo(model.dtype).eps) * float(operations) ** 0.5


def is_low(dtype: torch.dtype) -> bool:
    """Does it round so coarsely that two ways of computing one log-probability differ by more than PPO may ignore?"""
    return torch.finfo(dtype).bits < 32


def tolerance(model: HfModel) -> float:
    """Largest difference, as a share of the whole, that two right ways of reading one text may have.

    The geometric mean of the expected rounding error and of 1, which is how far a wrong reading may be off: 1e-3 for 30
    layers in float32 (measured on SmolLM2: 2e-6, and 4e-4 at single tokens), .26 in bfloat16 (measured: .01 to .05).
    """
    return rounding(model) ** 0.5


def alike(model: HfModel, one: Tensor, other: Tensor, *, only_way: bool = False) -> bool:
    """Are two readings of the same texts the same hidden states up to rounding?

    Allowed is `tolerance` in float32. In bfloat16 that would hide positions that are off by one: in SmolLM2 they differ
    by .14 and cost .1 nats of KL. There, the errors of two readings are at most independent, each of them the expected
    rounding, so that they differ by the square root of 2 of it: .096 for 30 layers. Measured on nine models
    (results/bfloat16-guard-2026-11-28.json): right readings differ by up to .53 of that; every wrong one that costs
    .06 nats a token is found.

    only_way: `tolerance` in any dtype, for a reading in whose place there is no other: a false alarm would refuse the
    model. What is then overlooked, `check_rereading` finds.
    """
    allowed = 2**0.5 * rounding(model) if is_low(model.dtype) and not only_way else tolerance(model)
    return one.shape == other.shape and bool((one - other).norm() <= allowed * other.norm())


def probe_tokens(model: HfModel, numbers: Iterable[int]) -> list[int]:
    """Tokens for the numbers 0 to 9, from the middle of the vocabulary.

    The first ids of a vocabulary are special tokens. Texts of nothing else magnify rounding a thousandfold in SmolLM2.
    """
    size = model.get_input_embeddings().num_embeddings
    return [size // 3 + number * size // 20 for number in numbers]


def say_once(model: HfModel, what: str) -> None:
    """Print, once per process and family, what costs more time with this family."""
    line = f"{model.config.model_type}: {what}"
    if line not in _said:
        _said.add(line)
        console.print(line, markup=False, soft_wrap=True)
