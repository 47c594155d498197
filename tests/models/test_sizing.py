"""What is found on the meta device is what tensors with memory take."""

import contextlib
from typing import Any

import pytest
import torch

from poise.models import sizing
from poise.models.drawing import cached_bytes
from poise.models.head_adapters import add_head_adapters, logits_of
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.rereading import Reading
from poise.models.reward_model import load_trunk, with_heads
from poise.models.rollout import Rollout
from poise.models.shared_prompt import Family, pack, packed_hidden
from poise.runtime.quiet import quiet_loading


def test_the_shape_is_that_of_the_model(any_model: str) -> None:
    model, _ = load_policy(any_model)
    shape = sizing.shape_of(sizing.config_of(any_model))
    assert shape.weights == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.num_layers, shape.hidden) == (3, 32)
    policy = Policy(*load_policy(any_model), adapted_layers=2, rank=4)
    adapted = sum(p.numel() for name, p in policy.trained_parameters().items() if "lora" in name)
    assert adapted == 2 * 4 * shape.linear_sizes
    cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert 5 * shape.cached == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cached_bytes(model) == 4 * shape.cached  # what sampling finds out for itself


@pytest.mark.parametrize(("tune", "checkpointing"), [("lora", False), ("full", False), ("lora", True)])
def test_a_part_of_an_update_is_counted_as_it_is_with_memory(tune: str, checkpointing: bool, tiny_model: str) -> None:
    """The policy's own forward and backward on real tensors; the three layers' sum is drawn from one and two."""
    size: dict[str, Any] = {"prompts": 2, "completions": 3, "prompt_tokens": 7, "max_tokens": 5}
    found = sizing.policy_measured(
        sizing.config_of(tiny_model), tune=tune, layers=2, rank=4, part=2, reading=2, dtype=torch.float32,  # type: ignore[arg-type]
        checkpointing=checkpointing, **size,
    )  # fmt: skip
    policy = Policy(
        *load_policy(tiny_model), adapted_layers=2, rank=4, tune=tune,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    mask = torch.ones(2, 3, 5)
    ids = torch.ones(2, 7, dtype=torch.long)
    rollout = Rollout(ids, ids, torch.ones(2, 3, 5, dtype=torch.long), mask, mask, mask, torch.randn(2, 7 + 15, 32))
    assert policy._reading == Reading(packed=True, first_layer=1, recompute=checkpointing)
    # The modes of functions do not reach what a backward pass computes again: there PyTorch's own kernel runs.
    with sizing.counted() as live, contextlib.nullcontext() if checkpointing else sizing._FusedAttention():
        policy._read(policy._base, rollout)[0].sum().backward()
    counted = found.update + found.update_logits
    if checkpointing:  # a bound: the output layer's table and a layer's activations do not exist together
        assert live.peak <= counted < 1.2 * live.peak
    else:
        assert counted == pytest.approx(live.peak, rel=0.03)  # the real one also picks the tokens that were sampled


def test_checkpointing_keeps_what_enters_a_layer(tiny_model: str) -> None:
    of: dict[str, Any] = {
        "tune": "full",
        "rank": 4,
        "pairs": 2,
        "prompt_tokens": 4,
        "tokens": 12,
        "dtype": torch.float32,
    }
    config = sizing.config_of(tiny_model)
    plain, kept = (sizing.reward_measured(config, checkpointing=on, **of).update for on in (False, True))
    tokens = 2 * (4 + 8 + 8)
    config.num_hidden_layers = 1
    assert kept == sizing.reward_measured(config, checkpointing=False, **of).update + 2 * tokens * 32 * 4
    assert kept < plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_heads_with_adapters_are_counted_as_they_are(tiny_model: str, checkpointing: bool) -> None:
    """Against a real update, whose layers below the adapters keep nothing."""
    classifier, _ = load_trunk(tiny_model, 0)
    with_heads(classifier, torch.ones(6, 32))
    add_head_adapters(classifier, 3, 4, 2)
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    if checkpointing:
        with quiet_loading():
            classifier.gradient_checkpointing_enable({"use_reentrant": False})
        classifier.train()
    rows = pack([Family([5] * 8, [[7] * 24, [8] * 24]) for _ in range(4)], 0)
    with sizing.counted() as live, contextlib.nullcontext() if checkpointing else sizing._FusedAttention():
        logits_of(classifier, packed_hidden(classifier, rows)).float().sum().backward()
    counted = sizing.reward_measured(
        sizing.config_of(tiny_model), tune="lora", rank=4, pairs=4, prompt_tokens=8, tokens=32, dtype=torch.float32,
        checkpointing=checkpointing, adapter_heads=3, head_layers=2,
    ).update  # fmt: skip
    if checkpointing:
        assert 0.8 * live.peak < counted < 1.4 * live.peak
    else:
        assert counted == pytest.approx(live.peak, rel=0.05)
