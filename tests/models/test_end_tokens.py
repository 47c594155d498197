"""A completion ends at any of a model's end tokens, wherever they are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken

from conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from poise.models.end_tokens import agree_on_ends, end_of_turn, end_token_ids
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.rollout import Rollout, uniforms

TURN_END = CHAT_TEMPLATE.replace("<|im_end|>", "<turn_end>")


def other_ends(folder: Path, *, listed: Any, eos: str | None = "<|im_end|>", special: bool = True) -> str:
    """A model whose turns end with <turn_end>, and whose generation config lists `listed`."""
    make_model(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = eos, "<|endoftext|>"
    tokenizer.add_tokens([AddedToken("<turn_end>", special=special)], special_tokens=special)
    tokenizer.chat_template = TURN_END
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = model.config.eos_token_id = listed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("listed", "eos", "ends"),
    [
        (None, None, ["<turn_end>"]),
        (2, None, ["<|im_end|>", "<turn_end>"]),
        ([0, 2], None, ["<|endoftext|>", "<|im_end|>", "<turn_end>"]),
        (None, "<|im_end|>", ["<|im_end|>", "<turn_end>"]),
        ([0], "<|im_end|>", ["<|endoftext|>", "<|im_end|>", "<turn_end>"]),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_ends_of_a_model(tmp_path: Path, listed: Any, eos: str | None, ends: list[str], special: bool) -> None:
    model, tokenizer = load_policy(other_ends(tmp_path, listed=listed, eos=eos, special=special))
    found = end_token_ids(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(found) == ends
    # and whoever else generates with this model, or decodes what it wrote, knows them
    kept = model.generation_config.eos_token_id
    assert ([kept] if isinstance(kept, int) else kept) == found
    assert tokenizer.decode(tokenizer("Yes.<turn_end>").input_ids, skip_special_tokens=True) == "Yes."


def test_a_template_may_end_its_turns_with_text_or_refuse_or_be_none() -> None:
    tokenizer = make_tokenizer()
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", " END")
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "")
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_one_end_token_stays_a_number(tiny_model: str) -> None:
    model, tokenizer = load_policy(tiny_model)
    agree_on_ends(model, tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_nothing_follows_any_end_token(tmp_path: Path) -> None:
    policy = Policy(*load_policy(other_ends(tmp_path, listed=[2, 50])), adapted_layers=1, rank=4)
    rollout = policy.sample(["Hi"] * 2, uniforms(2, 64, 24, torch.Generator().manual_seed(0)))
    ids, lengths = rollout.completion_ids_PMT.flatten(0, 1), rollout.mask_PMT.sum(-1).flatten().int().tolist()
    ended = rollout.ended(policy.end_ids).flatten().tolist()
    seen = set()
    for row, length, end in zip(ids.tolist(), lengths, ended, strict=True):
        at = [token in policy.end_ids for token in row[:length]]
        assert sum(at) == at[-1] == end
        assert length == 24 or end
        assert set(row[length:]) <= {policy.tokenizer.pad_token_id}
        seen |= {row[length - 1]} & set(policy.end_ids)
    assert len(seen) > 1
    recomputed = policy.evaluate(rollout).logprob * rollout.mask_PMT
    torch.testing.assert_close(recomputed, rollout.logprob_PMT, rtol=0, atol=2e-5)


def test_padding_is_no_end_even_where_the_padding_token_is_one() -> None:
    """Qwen's generation config lists its padding token among its ends."""
    ids = torch.tensor([[[7, 0, 0], [7, 2, 0], [7, 7, 7]]])
    mask = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]])
    prompt = torch.ones(1, 1, dtype=torch.long)
    rollout = Rollout(prompt, prompt, ids, mask, mask, mask, None)
    assert rollout.ended([2]).tolist() == [[False, True, False]]
    assert rollout.ended([0, 2]).tolist() == [[True, True, False]]
    assert rollout.ended([]).tolist() == [[False, False, False]]


def test_a_model_that_never_ends_writes_to_the_longest_length(tmp_path: Path) -> None:
    model, tokenizer = load_policy(other_ends(tmp_path, listed=None, eos=None))
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = None
    policy = Policy(model, tokenizer, adapted_layers=1, rank=4)
    rollout = policy.sample(["Hi"], uniforms(1, 64, 12, torch.Generator().manual_seed(0)))
    assert policy.end_ids == []
    assert rollout.mask_PMT.all()
    assert not rollout.ended(policy.end_ids).any()
