"""Folders that Poise writes name their rotary positions for transformers 4, too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import make_tokenizer, save_model
from poise.models.model_config import name_rope_for_version_4
from poise.models.reward_model import HeadLayout, save_reward_model

BASE = {"rope_type": "default", "rope_theta": 500_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=4, rope_parameters=YARN),
    "phi": lambda: transformers.PhiConfig(**SMALL, rope_parameters=BASE | {"partial_rotary_factor": 0.5}),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, rope_parameters=BASE | {"partial_rotary_factor": 0.5}),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": LINEAR, "sliding_attention": BASE | {"rope_theta": 2000.0}},
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 41)[None]).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_both_versions_read_the_same_positions(name: str, tmp_path: Path) -> None:
    """Version 5 reads the old names as version 4 did: given a file with these alone, it stands for it here."""
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]())
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    name_rope_for_version_4(tmp_path)
    both = json.loads((tmp_path / "config.json").read_text())
    assert json.loads(before).items() <= both.items()
    expected = logits(model)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in both.items() if k != "rope_parameters"}))
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_the_text_part_of_a_model_with_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"rope_parameters": LINEAR}, "limit": float("inf")})
    )
    name_rope_for_version_4(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["text_config"]["rope_theta"] == 500_000.0
    assert found["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert found["limit"] == float("inf")
    assert "rope_theta" not in found


def test_a_reward_model_is_saved_with_both_names(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)}, rope_parameters=LINEAR, num_labels=1)
    base = save_model(transformers.AutoModelForSequenceClassification.from_config(config), tokenizer, tmp_path / "base")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    save_reward_model(tmp_path / "ours", classifier, tokenizer, classifier.score.weight, HeadLayout(1, "point", (0.0,)))
    found = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (found["rope_theta"], found["rope_scaling"]["factor"]) == (500_000.0, 2.0)
