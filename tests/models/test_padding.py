"""The padding token says nothing else: it is kept, taken from what is spare, or added with a row of its own."""

from typing import Any

import pytest
import torch
import transformers

from conftest import make_tokenizer
from poise.errors import PoiseError
from poise.models.padding import pad_apart, with_rows


def model_of(rows: int, kind: str = "llama") -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, vocab_size=rows, bos_token_id=1, eos_token_id=2, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def tokenizer_without_spare() -> Any:
    """Every special token is taken: bos, eos and the end of a turn."""
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize(("pad", "unknown", "expected"), [
    ("a", "<|endoftext|>", "a"),
    (None, "<|endoftext|>", "<|endoftext|>"),
    ("<|im_end|>", None, "<|endoftext|>"),
    ("<|im_end|>", "b", "b"),
])  # fmt: skip
def test_a_token_that_says_nothing_is_kept_or_taken(pad: str | None, unknown: str | None, expected: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = pad, unknown
    model = model_of(len(tokenizer))
    pad_apart(tokenizer, model)
    number = tokenizer.convert_tokens_to_ids(expected)
    assert (tokenizer.pad_token, model.config.pad_token_id, model.generation_config.pad_token_id) == (
        expected, number, number,
    )  # fmt: skip
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_without_one_to_spare_the_model_gets_a_row_for_it() -> None:
    tokenizer = tokenizer_without_spare()
    rows = len(tokenizer)
    model = model_of(rows)
    pad_apart(tokenizer, model)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", rows)
    assert model.get_input_embeddings().num_embeddings == rows + 1


def test_a_token_that_the_model_does_not_embed_is_none_to_take() -> None:
    tokenizer = tokenizer_without_spare()
    model = model_of(len(tokenizer))
    tokenizer.add_tokens("<pad>")
    with pytest.raises(PoiseError, match="of different models"):
        pad_apart(tokenizer, model)


def test_new_rows_are_the_mean_of_the_others_also_of_a_bias() -> None:
    model = model_of(6, "phi")
    bias = model.get_output_embeddings().bias
    bias.data = torch.arange(6.0)
    expected = model.get_input_embeddings().weight.data.mean(0)
    with_rows(model, 8)
    assert model.get_output_embeddings().bias.data.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 2.5]
    torch.testing.assert_close(model.get_input_embeddings().weight.data[6:], expected.expand(2, -1))
