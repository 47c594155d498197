"""The tokens at which a completion ends: a model may have several, and its tokenizer names at most one of them.

Gemma, for instance, ends its turns with <end_of_turn>, and its tokenizer's eos is <eos>.
"""

from typing import Any

import transformers

from poise.errors import PoiseError
from poise.models.chat_format import completion_text

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfModel = Any
HfTokenizer = Any

_ANSWER = "Certainly, here it is"  # plain text, which no template has a reason to change


def end_token_ids(model: HfModel, tokenizer: HfTokenizer) -> list[int]:
    """Every token at which generation stops, in ascending order; none for a model that never ends by itself.

    They are `eos_token_id` of the generation config (a number or a list), the token that the chat template writes after
    an answer, and the tokenizer's eos token.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = listed if isinstance(listed, list | tuple) else [listed]
    found = {*several, tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(token for token in found if token is not None)


def plain_generation(model: HfModel, tokenizer: HfTokenizer) -> Any:
    """A generation config by which `generate` samples from the model's own distribution, to its end tokens.

    What a call leaves open, `generate` takes from the model's generation config: tokens that are suppressed or forced,
    penalties, a shortest length, n-grams that may not repeat. None of it is in the log-probabilities that are trained.
    """
    return transformers.GenerationConfig(
        eos_token_id=end_token_ids(model, tokenizer) or None, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip


def end_of_turn(tokenizer: HfTokenizer) -> int | None:
    """The added token that the chat template writes right after an assistant's answer; None if there is none.

    Text after an answer that is no single token, such as a line break, is not looked for in what a policy writes.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        whole = completion_text(tokenizer, "Please.", _ANSWER)
    except PoiseError:  # a template that wants turns of another form; it will refuse the user's prompts, too
        return None
    _, found, after = whole.rpartition(_ANSWER)
    ids = tokenizer(after.lstrip(), add_special_tokens=False).input_ids if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def agree_on_ends(model: HfModel, tokenizer: HfTokenizer) -> None:
    """Write the end tokens where others look for them: the generation config, and the tokenizer's special tokens.

    `generate` and TRL stop at what the generation config lists. Decoding leaves out special tokens alone, so that an
    end token that is not one would be scored as text.
    """
    ends = end_token_ids(model, tokenizer)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    for token, added in list(tokenizer.added_tokens_decoder.items()):
        if token in ends and not added.special:
            added.special = True
            tokenizer.add_tokens([added], special_tokens=True)
