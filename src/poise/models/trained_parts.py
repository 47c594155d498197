"""Which parameters of a language model a policy trains: adapters, or upper layers; and copies that share the others."""

import copy

import peft
import torch
from torch import nn

from poise.models.adapted_maps import decoder_layers, linear_maps, lora_config
from poise.models.fused_ops import AdaptedLinear
from poise.models.loading import HfModel, device
from poise.models.rereading import Passing
from poise.runtime.quiet import quiet_loading
from poise.runtime.sharding import shard


def with_adapters(model: HfModel, first: int, rank: int, *, task: str = "CAUSAL_LM") -> HfModel:
    """A PEFT model: LoRA in float32 on all linear maps of the layers from `first` on; nothing else asks for gradients.

    task: what kind of model peft is told it is; the adapters of a causal one are run by `AdaptedLinear` where they can.
    """
    model.requires_grad_(False)
    config = lora_config(model, rank, task, linear_maps(model, first))
    if task == "CAUSAL_LM":
        config._register_custom_module({nn.Linear: AdaptedLinear})
    with quiet_loading():
        adapted: HfModel = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def upper_parameters(model: HfModel, first: int) -> list[nn.Parameter]:
    """Of the decoder layers from `first` on; all parameters, embeddings too, if `first` is 0."""
    if first == 0:
        return list(model.parameters())
    _, layers = decoder_layers(model)
    return [parameter for layer in layers[first:] for parameter in layer.parameters()]


def twin(model: HfModel, trained: list[nn.Parameter]) -> HfModel:
    """A copy of a model with its own copies of the parameters to be trained; all others are the same tensors."""
    kept = {id(parameter) for parameter in trained}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in kept})


def without_adapters(model: HfModel) -> HfModel:
    """The model that PEFT's adapters are on; a model without them as it is."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def spread_layers(base: HfModel, lowest: int) -> None:
    """Spread the layers from `lowest` on over the processes; those below are taken out. Other weights stay whole."""
    layers = decoder_layers(base)[1]
    for index in range(lowest):
        layers[index] = Passing()
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = [parameter for parameter in base.parameters() if id(parameter) not in inside]
    shard(layers[lowest:], base.base_model, outside, add_up=True)
    for parameter in outside:
        parameter.data = parameter.data.to(device())
    with torch.no_grad():  # from its first call on the decoder knows all of its layers
        base.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device()), use_cache=False)
