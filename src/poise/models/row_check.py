"""Rows that a model's chat template refuses, found while a file is read, so that they are named by line."""

from collections.abc import Sequence

from poise.data.rows import Check
from poise.data.types import Prompt
from poise.models.chat_format import HfTokenizer, completion_text, generation_prompt, prompt_text
from poise.models.formats import checkpoint_folder
from poise.models.loading import load_tokenizer, resolve_model
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


def row_check_of(model: str) -> Check:
    """The same by the name of a language model; only its tokenizer is loaded."""
    return row_check(load_tokenizer(resolve_model(model)))


def row_check_of_rewards(paths: Sequence[str]) -> Check:
    """The same by the names of reward models; of an ensemble, its members' tokenizers."""
    folders = (resolve_model(checkpoint_folder(member)) for path in paths for member in members_of(path))
    return row_check(*(load_tokenizer(folder) for folder in dict.fromkeys(folders)))
