"""A LoRA adapter for each head: K heads that read one trunk differently, all of them in one pass.

The layers that carry adapters read every text once for each head: where the first of them begins, its B rows become
K B rows, head after head, and each head's low-rank delta is added to its own rows by one batched product. The layers
below are run once for all heads. A text's features are then the K last hidden states side by side, and the `score`
layer reads from each only the labels of its head.

    CHECKPOINT/                    a stock classifier: the shared trunk, and a `score` layer of all heads' labels
    CHECKPOINT/adapters/head_k/    head k's adapter in PEFT's format, without `score`

PEFT, or an engine that serves several adapters of one model, gives with `head_k` the labels of head k: k and, for
Gaussian heads, K + k. Without its adapter a label means nothing.

Shapes: _K heads, _R rank, _I inputs, _O outputs, _S labels of a head.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from poise.errors import PoiseError
from poise.models.adapted_maps import LORA_SCALE, decoder_layers, linear_maps, lora_config
from poise.models.families import REFUSALS, alike, probe_tokens
from poise.models.loading import HfModel, read_adapter
from poise.models.shared_prompt import Family, pack, separate_hidden
from poise.runtime.records import read_object
from poise.runtime.settings import between, read_fields

FOLDER = "adapters"

_PROBED = [Family([1, 2, 3], [[4, 5]]), Family([6], [[7]]), Family([8, 9, 1, 2, 3, 4], [[5, 6, 7]])]


class HeadLinear(nn.Module):
    """A frozen linear map with an adapter for each head: W x + 2 B_k A_k x, for rows that are head k's.

    As in PEFT, A_k is drawn from U(-1/sqrt(in), 1/sqrt(in)) and B_k is zero at first.
    """

    def __init__(self, base: Any, num_heads: int, rank: int):
        super().__init__()
        outputs, inputs = base.weight.shape[::-1] if isinstance(base, Conv1D) else base.weight.shape
        device = base.weight.device
        self.base = base
        self.down_KRI = nn.Parameter(torch.empty(num_heads, rank, inputs, device=device, dtype=torch.float32))
        self.up_KOR = nn.Parameter(torch.zeros(num_heads, outputs, rank, device=device, dtype=torch.float32))
        nn.init.uniform_(self.down_KRI, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """The first axis holds the rows of all heads, head after head."""
        out: Tensor = self.base(x)
        low = torch.bmm(x.reshape(len(self.down_KRI), -1, x.shape[-1]), self.down_KRI.mT.to(x.dtype))
        delta = torch.bmm(low, self.up_KOR.mT.to(low.dtype))
        return out + LORA_SCALE * delta.view(out.shape)

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some families read its dtype."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        bias: Tensor | None = self.base.bias
        return bias

    def fold(self, head: int) -> nn.Module:
        """The map with one head's delta added to its weight."""
        base: Any = self.base
        delta = LORA_SCALE * self.up_KOR[head] @ self.down_KRI[head]
        base.weight.data += (delta.mT if isinstance(base, Conv1D) else delta).to(base.weight.dtype)
        folded: nn.Module = base
        return folded


class _Adapters(NamedTuple):
    """What a classifier with adapters knows of them."""

    rank: int
    names: list[str]
    handles: list[RemovableHandle]


def add_head_adapters(classifier: HfModel, num_heads: int, rank: int, head_layers: int = 0) -> None:
    """Put new adapters for each head on all linear maps of the upper `head_layers` layers (0: all), in place.

    Only they and `score` ask for gradients then; at first they change nothing. Draws from torch's generator. Raises
    PoiseError for a model whose layers cannot read several copies of a row: tried on short texts.
    """
    depth = len(decoder_layers(classifier)[1])
    first = max(depth - head_layers, 0) if head_layers else 0
    _add(classifier, num_heads, rank, linear_maps(classifier, first))


def _add(classifier: HfModel, num_heads: int, rank: int, names: list[str]) -> None:
    stack, layers = decoder_layers(classifier)
    first = min(int(name.removeprefix(f"{stack}.").split(".")[0]) for name in names)
    before = _probe(classifier)
    classifier.requires_grad_(False)
    for name in names:
        _put(classifier, name, HeadLinear(classifier.get_submodule(name), num_heads, rank))
    handles = [
        layer.register_forward_pre_hook(functools.partial(_spread, num_heads, index == 0), with_kwargs=True)
        for index, layer in enumerate(layers[first:])
    ]
    classifier.score.requires_grad_(True)
    classifier.head_adapters = _Adapters(rank, names, handles)
    classifier.heads_apart = num_heads  # read by `feature_size`, too
    if before is not None and not _kept_apart(classifier, before):
        raise PoiseError(
            f"a {classifier.config.model_type} cannot carry an adapter for each head: its layers do not read several "
            f"copies of a text as they read one; train several reward models and combine them with `poise ensemble`"
        )


def num_adapted_heads(classifier: HfModel) -> int:
    """How many heads read the trunk through adapters of their own; 0 if all read the same features."""
    return int(getattr(classifier, "heads_apart", 0))


@contextlib.contextmanager
def bare(classifier: HfModel) -> Iterator[None]:
    """Within it, the classifier's modules are those of the stock class, to be saved; it must not be called."""
    kept = {name: classifier.get_submodule(name) for name in _names(classifier)}
    for name, module in kept.items():
        _put(classifier, name, module.base)
    try:
        yield
    finally:
        for name, module in kept.items():
            _put(classifier, name, module)


@torch.no_grad()
def fold_head(classifier: HfModel, head: int) -> None:
    """Make it the stock classifier of one head, in place: that head's adapter goes into the weights."""
    adapters: _Adapters = classifier.head_adapters
    for name in adapters.names:
        _put(classifier, name, classifier.get_submodule(name).fold(head))
    for handle in adapters.handles:
        handle.remove()
    del classifier.head_adapters, classifier.heads_apart


# ---- the score layer ----


def logits_of(classifier: HfModel, hidden: Float[Tensor, "texts features"]) -> Float[Tensor, "texts labels"]:
    """The `score` layer on features as the trunk gives them: those of one trunk, or of all heads side by side."""
    num_heads = num_adapted_heads(classifier)
    if not num_heads:
        logits: Tensor = classifier.score(hidden)
        return logits
    own = classifier.score.weight.unflatten(0, (-1, num_heads))  # (S, K, hidden)
    return torch.einsum("nkh,skh->nsk", hidden.unflatten(-1, (num_heads, -1)), own).flatten(1)


def apart(weight: Float[Tensor, "labels hidden"], num_heads: int) -> Float[Tensor, "labels features"]:
    """`score` weights for all heads' features side by side: each label reads those of its head, and zero elsewhere.

    >>> apart(torch.tensor([[1.0], [2.0]]), 2).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    out = weight.new_zeros(len(weight), num_heads, weight.shape[1])
    label = torch.arange(len(weight), device=weight.device)
    out[label, label % num_heads] = weight
    return out.flatten(1)


def together(weight: Float[Tensor, "labels features"], num_heads: int) -> Float[Tensor, "labels hidden"]:
    """The inverse of `apart`."""
    label = torch.arange(len(weight), device=weight.device)
    return weight.unflatten(1, (num_heads, -1))[label, label % num_heads]


# ---- files ----


@dataclass(frozen=True)
class _Settings:
    """adapter_config.json, as far as it is read here."""

    peft_type: Literal["LORA"]
    r: Annotated[int, between(1, 2**16)]
    lora_alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False


def save_head_adapters(folder: Path, classifier: HfModel) -> None:
    """Write FOLDER/head_k for each head, in PEFT's format."""
    adapters: _Adapters = classifier.head_adapters
    config = lora_config(classifier, adapters.rank, None, sorted(adapters.names), inference_mode=True)
    for head in range(num_adapted_heads(classifier)):
        place = folder / f"head_{head}"
        place.mkdir(parents=True)
        config.save_pretrained(str(place))
        path = place / "adapter_config.json"  # PEFT writes the names as a set, in any order
        saved = json.loads(path.read_text(encoding="utf-8")) | {"target_modules": sorted(adapters.names)}
        path.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")
        tensors = {
            name: tensor[head].detach().float().cpu().contiguous() for name, tensor in _tensors(classifier).items()
        }
        save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})


@torch.no_grad()
def load_head_adapters(classifier: HfModel, folder: Path, num_heads: int) -> None:
    """Put the adapters FOLDER/head_k on a classifier, in its dtype, in place.

    Raises PoiseError, one line, for adapters that are missing, of other layers, shapes or kinds, or not finite.
    """
    settings = [_read_settings(folder / f"head_{head}") for head in range(num_heads)]
    names = list(settings[0].target_modules)
    if any(one != settings[0] for one in settings) or not names or set(names) - set(linear_maps(classifier)):
        raise PoiseError(f"cannot load the adapters in {folder}: not all are of the same maps of this model")
    _add(classifier, num_heads, settings[0].r, names)
    expected = _tensors(classifier)
    for head in range(num_heads):
        shapes = {name: tensor[head] for name, tensor in expected.items()}
        for name, tensor in read_adapter(str(folder / f"head_{head}"), shapes).items():
            expected[name][head] = tensor
    classifier.to(classifier.score.weight.dtype).requires_grad_(False)


def _read_settings(folder: Path) -> _Settings:
    path = folder / "adapter_config.json"
    found = read_object(path, strict=False)
    kept = {name: found[name] for name in _Settings.__dataclass_fields__ if name in found}
    kept["target_modules"] = sorted(kept.get("target_modules") or [])
    settings = read_fields(kept, _Settings, str(path))
    if settings.lora_alpha != LORA_SCALE * settings.r or settings.use_rslora or settings.use_dora:
        raise PoiseError(f"{path} is not of plain LoRA with lora_alpha twice r, which is all that is read here")
    return settings


def _tensors(classifier: HfModel) -> dict[str, Tensor]:
    """The adapters of all heads, (K, …), by the names that PEFT gives to one head's."""
    found: dict[str, Tensor] = {}
    for name in _names(classifier):
        module = classifier.get_submodule(name)
        found[f"base_model.model.{name}.lora_A.weight"] = module.down_KRI
        found[f"base_model.model.{name}.lora_B.weight"] = module.up_KOR
    return found


# ---- rows ----


def _spread(num_heads: int, first: bool, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What enters a layer, with the rows of all heads: the hidden states in the first one, all else in each."""
    hidden = args[0] if args else kwargs["hidden_states"]
    rows = len(hidden) if first else len(hidden) // num_heads

    def more(value: Any) -> Any:
        if value is hidden and not first:
            return value
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows:
            return value.repeat(num_heads, *[1] * (value.dim() - 1))
        return tuple(map(more, value)) if type(value) is tuple else value

    return tuple(map(more, args)), {name: more(value) for name, value in kwargs.items()}


@torch.no_grad()
def _probe(classifier: HfModel) -> Float[Tensor, "texts features"] | None:
    """Features of short texts; None on the meta device, or if the model cannot read them."""
    device = next(classifier.parameters()).device
    if device.type == "meta":
        return None
    texts = [
        Family(probe_tokens(classifier, prompt), [probe_tokens(classifier, texts[0])]) for prompt, texts in _PROBED
    ]
    try:
        return separate_hidden(classifier, pack(texts, 0, one_per_row=True).to(device))
    except REFUSALS:
        return None


@torch.no_grad()
def _kept_apart(classifier: HfModel, before: Float[Tensor, "texts hidden"]) -> bool:
    """Does an adapter of the last head leave all other heads' features as they were without any? Tried, then undone.

    before: features of the short texts without adapters. New adapters change nothing; the last head's are set for a
    moment. Layers that cannot read copies of a row fail, and layers that do not keep rows on the first axis.
    """
    maps = [classifier.get_submodule(name) for name in _names(classifier)]
    for one in maps:
        one.up_KOR[-1] = 0.01
    after = _probe(classifier)
    for one in maps:
        one.up_KOR[-1] = 0.0
    others = num_adapted_heads(classifier) - 1
    return after is not None and alike(classifier, after[:, : others * before.shape[1]], before.repeat(1, others))


def _names(classifier: HfModel) -> list[str]:
    adapters: _Adapters | None = getattr(classifier, "head_adapters", None)
    return adapters.names if adapters else []


def _put(classifier: HfModel, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(classifier.get_submodule(parent), last, module)
