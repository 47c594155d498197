"""LoRA as it is used here: on all linear maps of a decoder's upper layers that PEFT leaves where they are."""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from poise.errors import PoiseError
from poise.models.loading import HfModel

if TYPE_CHECKING:
    import peft

LORA_SCALE = 2  # of a delta: lora_alpha / r

_OTHER_TOWERS = re.compile(r"vision|visual|audio")
# For these PEFT raises an error.
_REFUSED = re.compile(r"^(mamba\w*|falcon_mamba|falcon_h1) .*out_proj$")
# These PEFT takes for the names of experts: it would adapt the experts of all layers instead, lower ones too.
_TAKEN_FOR_EXPERTS = re.compile(r"(^|\.)(gate|gate_proj|up_proj|down_proj|w[123])$")


def decoder_layers(model: HfModel) -> tuple[str, nn.ModuleList]:
    """(full name, layers) of the stack of decoder layers; of a model with images or sound, of the one for text."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not _OTHER_TOWERS.search(name):
            return name, module
    raise PoiseError(f"{type(model).__name__} has no stack of {count} decoder layers to adapt")


def linear_maps(model: HfModel, first_layer: int = 0) -> list[str]:
    """Full names of the linear maps in the decoder layers from `first_layer` on.

    Of a mixture of experts, those of attention and of whatever else has no counterpart among the experts.
    """
    stack, layers = decoder_layers(model)
    mixture = any("experts" in name.split(".") for name, _ in layers.named_modules())
    return [
        f"{stack}.{index}.{name}"
        for index in range(first_layer, len(layers))
        for name, module in layers[index].named_modules()
        if _is_map(module)
        and not _REFUSED.search(f"{model.config.model_type} {name}")
        and not (mixture and _TAKEN_FOR_EXPERTS.search(name))
    ]


@torch.no_grad()
def _is_map(module: nn.Module) -> bool:
    """Does it map a vector to a vector? Some routers return a choice of experts, grouped maps take several vectors."""
    if type(module) in (nn.Linear, Conv1D) or not isinstance(module, nn.Linear):
        return isinstance(module, (nn.Linear, Conv1D))
    try:
        found = module(torch.zeros_like(module.weight[:1]))
    except RuntimeError:
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)


def has_conv1d(model: HfModel) -> bool:
    """Does it keep its linear maps transposed, as GPT-2 does? LoRA must be told."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def lora_config(
    model: HfModel, rank: int, task_type: str | None, maps: list[str] | None = None, **settings: Any
) -> "peft.LoraConfig":
    """LoRA of this rank in PEFT's terms. maps: full names; by default all that `linear_maps` finds."""
    import peft  # takes a second

    return peft.LoraConfig(
        r=rank, lora_alpha=LORA_SCALE * rank, task_type=task_type,
        target_modules=linear_maps(model) if maps is None else maps, fan_in_fan_out=has_conv1d(model), **settings,
    )  # fmt: skip
