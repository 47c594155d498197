"""Rows that a model cannot be given, found while a file is read, so that they are named by line."""

from collections.abc import Sequence

from poise.data.rows import Check
from poise.data.types import Prompt
from poise.models.chat_format import HfTokenizer, completion_text, encode_prompt, generation_prompt, prompt_text
from poise.models.context import room_or_raise
from poise.models.formats import checkpoint_folder
from poise.models.loading import embedded_or_raise, load_tokenizer, resolve_model
from poise.models.model_config import load_config
from poise.models.reward_model import members_of


def row_check(*tokenizers: HfTokenizer) -> Check:
    """A check that raises PoiseError for a prompt with answers that one of the tokenizers' templates cannot write.

    Of a row without answers, only the prompt is rendered, as a policy is given it.
    """

    def check(prompt: Prompt, answers: Sequence[str]) -> None:
        for tokenizer in tokenizers:
            if not answers:
                generation_prompt(tokenizer, prompt)
                continue
            prompt_text(tokenizer, prompt)
            for answer in answers:
                completion_text(tokenizer, prompt, answer)

    return check


def row_check_of(model: str, max_tokens: int = 0) -> Check:
    """The same by the name of a language model, of which no weights are read.

    max_tokens: where it is given, a prompt without answers must also leave room for a completion of so many tokens.
    """
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    check = row_check(tokenizer)
    if not max_tokens:
        return check
    config = load_config(folder)

    def check_with_room(prompt: Prompt, answers: Sequence[str]) -> None:
        if answers:
            check(prompt, answers)
            return
        ids = encode_prompt(tokenizer, prompt)
        embedded_or_raise(ids, config.get_text_config().vocab_size, tokenizer)
        room_or_raise(len(ids), max_tokens, config)

    return check_with_room


def row_check_of_rewards(paths: Sequence[str]) -> Check:
    """The same by the names of reward models; of an ensemble, its members' tokenizers."""
    folders = (resolve_model(checkpoint_folder(member)) for path in paths for member in members_of(path))
    return row_check(*(load_tokenizer(folder) for folder in dict.fromkeys(folders)))
