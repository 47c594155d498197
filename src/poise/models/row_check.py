"""Rows that a model cannot be given, found while a file is read, so that they are named by line."""

from collections.abc import Sequence

from poise.data.rows import Check
from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.models.chat_format import HfTokenizer, completion_text, encode_prompt, generation_prompt, prompt_text
from poise.models.context import room_or_raise
from poise.models.formats import checkpoint_folder
from poise.models.loading import embedded_or_raise, load_tokenizer, resolve_model
from poise.models.model_config import load_config
from poise.models.reward_model import members_of

_SOME_ANSWER = ("Yes.",)


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


def row_check_of(model: str, max_tokens: int = 0, readers: Sequence[HfTokenizer] = ()) -> Check:
    """The same by the name of a language model, of which no weights are read.

    max_tokens: where it is given, a prompt without answers must also leave room for a completion of so many tokens.
    readers: of the reward models that will read the completions; a prompt that one of them refuses is refused here, not
    in the step that draws it.
    """
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    check, read = row_check(tokenizer), row_check(*readers)
    if not max_tokens:
        return check
    config = load_config(folder)

    def check_with_room(prompt: Prompt, answers: Sequence[str]) -> None:
        try:
            read(prompt, answers or _SOME_ANSWER)
        except PoiseError as error:
            raise PoiseError(f"for the reward model {error}") from None
        if answers:
            check(prompt, answers)
            return
        ids = encode_prompt(tokenizer, prompt)
        embedded_or_raise(ids, config.get_text_config().vocab_size, tokenizer)
        room_or_raise(len(ids), max_tokens, config)

    return check_with_room


def row_check_of_rewards(paths: Sequence[str]) -> Check:
    """The same by the names of reward models; of an ensemble, its members' tokenizers."""
    return row_check(*tokenizers_of(paths))


def tokenizers_of(paths: Sequence[str]) -> list[HfTokenizer]:
    """The tokenizers of reward models by their names; of an ensemble, its members'."""
    folders = (resolve_model(checkpoint_folder(member)) for path in paths for member in members_of(path))
    return [load_tokenizer(folder) for folder in dict.fromkeys(folders)]
