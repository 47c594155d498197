"""The padding token of a tokenizer and its model: one that says nothing else."""

from typing import Any

from poise.errors import PoiseError
from poise.models.end_tokens import end_of_turn
from poise.runtime.quiet import quiet_loading

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfModel = Any
HfTokenizer = Any


def pad_apart(tokenizer: HfTokenizer, model: HfModel, *, grows: bool = True) -> None:
    """Give tokenizer and model one padding token that is neither the end-of-sequence token nor the end of a turn.

    Padding that equals an end moves the position a classifier reads its score from, and hides the end of a completion.
    One that the model does not embed, such as a [PAD] added to the tokenizer alone, cannot be read.

    grows: the model may get a row of zeros for it. A language model must not: it could write that token, and would be
    another model than the one that was loaded. Without a token to spare it is padded with its end (GPT-2, Llama 3), or
    with what begins its texts; masks tell which is meant.
    Raises PoiseError for a tokenizer that has no such token, or that is of another model.
    """
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    if pad is None or pad in ends or pad >= rows:
        taken = {*ends, tokenizer.bos_token_id}
        spare = [token for token in (tokenizer.unk_token, "<|endoftext|>", "<pad>") if token in tokenizer.get_vocab()]
        numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in spare}
        spare = [token for token in spare if numbers[token] not in taken and numbers[token] < rows]
        if not spare and pad != rows and len(tokenizer) > rows:
            raise PoiseError(
                f"the tokenizer has no padding token that the model embeds, and its {len(tokenizer)} tokens are "
                f"more than the {rows} of the model; tokenizer and model are of different models"
            )
        if spare:
            tokenizer.pad_token = spare[0]
        elif not grows and len(tokenizer) >= rows:
            named = (tokenizer.eos_token, tokenizer.bos_token)
            found = [token for token in named if token and tokenizer.convert_tokens_to_ids(token) < rows]
            if not found:
                raise PoiseError("the tokenizer has no pad_token, nor another special token that the model embeds")
            tokenizer.pad_token = found[0]
        elif pad != rows:  # otherwise the one token without a row of its own is the padding
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if tokenizer.pad_token_id >= rows:
            with_rows(model, tokenizer.pad_token_id + 1)
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def with_rows(model: HfModel, count: int) -> None:
    """Give the embeddings `count` rows. New ones are zeros: classifiers of one trunk share it, whoever adds them."""
    rows = model.get_input_embeddings().num_embeddings
    with quiet_loading():
        model.resize_token_embeddings(count, mean_resizing=False)
    model.get_input_embeddings().weight.data[rows:] = 0.0
