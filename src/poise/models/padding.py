"""The padding token of a tokenizer and its model: one that says nothing else."""

from typing import Any

from poise.errors import PoiseError
from poise.models.end_tokens import end_of_turn
from poise.runtime.quiet import quiet_loading

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfModel = Any
HfTokenizer = Any


def pad_apart(tokenizer: HfTokenizer, model: HfModel) -> None:
    """Give tokenizer and model one padding token that is neither the end-of-sequence token nor the end of a turn.

    Padding that equals an end moves the position a classifier reads its score from, and hides the end of a completion.
    One that the model does not embed, such as a [PAD] added to the tokenizer alone, cannot be read.

    Where there is no token to spare (GPT-2, Llama 3), the model gets a row for it; see `with_rows`.
    Raises PoiseError for a tokenizer that is of another model.
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
        elif pad != rows:  # otherwise the one token without a row of its own is the padding
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if tokenizer.pad_token_id >= rows:
            with_rows(model, tokenizer.pad_token_id + 1)
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def with_rows(model: HfModel, count: int) -> None:
    """Give the embeddings `count` rows; new ones are the mean of the others, the same whoever adds them.

    Drawn at random, as transformers has it, they would be others in training, at the merge and in each classifier of a
    trunk. A language model may write the new token: its logit is the mean of the others, so that its probability is at
    most that of a token under the uniform distribution, 1 / count.
    """
    rows = model.get_input_embeddings().num_embeddings
    with quiet_loading():
        model.resize_token_embeddings(count, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for part in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if part is not None:
                part.data[rows:] = part.data[:rows].float().mean(0).to(part.dtype)
