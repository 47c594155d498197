"""Chat templates that end a conversation at the token where a reward model reads its score.

Many templates write a line break after the last end of turn (ChatML: `<|im_end|>` and a newline). Whoever renders a
conversation with them and reads the last token then reads the score one token too late. The template that is saved with
a reward model therefore leaves out the white space after the last assistant's turn, as `chat_format` does. Nothing else
that it writes changes.

Padding goes to the right, whatever side the language model's tokenizer names: models that learned a vector for each
position (GPT-2) and are given a padded batch by others, who pass no positions, would read shorter texts further on.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from poise.runtime.progress import console
from poise.runtime.run_folder import is_main_process

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfTokenizer = Any

UNCHANGED = (
    "writes white space after the last turn and cannot be changed; the score is read before it, so strip what the "
    "template renders"
)
_NAME = "poise_conversation"
_said: set[str] = set()  # in this process
_ROLES = ("user", "assistant")
_TEXTS = ("a", "Two\n\nlines. \n", "<think>\nc\n</think>\n\nd")


def ends_where_read(tokenizer: HfTokenizer) -> bool:
    """Does every conversation that ends in an assistant's turn end at the token where a reward model reads?

    Found by rendering a few of them. True without a template: then nothing is rendered.
    """
    if tokenizer.chat_template is None:
        return True
    return all(_ends(tokenizer, template) for template in _templates(tokenizer.chat_template).values())


def say_where_others_read(tokenizer: HfTokenizer, path: str) -> None:
    """A line, once for each, of a classifier that others trained and whose template goes on after the end of turn."""
    if path in _said or not is_main_process() or ends_where_read(tokenizer):
        return
    _said.add(path)
    console.print(
        f"{path}: its chat template writes white space after the end of turn. Its score is read before that; code that "
        f"tokenizes all that the template writes, as TRL and some model cards do, reads another one after it",
        markup=False, soft_wrap=True,
    )  # fmt: skip


@contextlib.contextmanager
def scoring_template(tokenizer: HfTokenizer) -> Iterator[None]:
    """Inside, the tokenizer is one to save with a reward model; afterwards it is as before.

    Its chat template ends where a reward model reads, and it pads on the right. A template that cannot be changed
    stays, and one line says so.
    """
    own, side, named = tokenizer.chat_template, tokenizer.padding_side, tokenizer.init_kwargs.get("padding_side")
    tokenizer.padding_side = "right"
    if named:  # what is saved
        tokenizer.init_kwargs["padding_side"] = "right"
    if own is not None:
        changed = {key: _changed(tokenizer, text) for key, text in _templates(own).items()}
        tokenizer.chat_template = changed if isinstance(own, dict) else changed[""]
    try:
        yield
    finally:
        tokenizer.chat_template, tokenizer.padding_side = own, side
        if named:
            tokenizer.init_kwargs["padding_side"] = named


def _templates(saved: str | dict[str, str]) -> dict[str, str]:
    """By name: a tokenizer may have several templates, such as one for tools."""
    return saved if isinstance(saved, dict) else {"": saved}


@functools.lru_cache(maxsize=16)
def _changed(tokenizer: HfTokenizer, template: str) -> str:
    """The template that ends where the score is read; the same one if it does already, or cannot be changed."""
    if _ends(tokenizer, template):
        return template
    # Jinja drops the line break at the end of a template and after a tag, and blanks before a tag without a `+`.
    body = template.removesuffix("\n")
    changed = (
        f"{{% set {_NAME} %}}\n{body}{{%+ endset %}}"
        f"{{{{ {_NAME}.rstrip() if messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt "
        f"else {_NAME} }}}}"
    )
    for turns in _conversations():
        for generation in (False, True):
            before = _rendered(tokenizer, template, turns, generation)
            expected = before.rstrip() if before and turns[-1]["role"] == "assistant" and not generation else before
            if _rendered(tokenizer, changed, turns, generation) != expected:
                console.print(f"the chat template of the reward model {UNCHANGED}", markup=False, soft_wrap=True)
                return template
    return changed


@functools.lru_cache(maxsize=64)
def _ends(tokenizer: HfTokenizer, template: str) -> bool:
    texts = [_rendered(tokenizer, template, turns, False) for turns in _conversations() if turns[-1]["role"] != "user"]
    return all(text is None or text == text.rstrip() for text in texts)


def _conversations() -> Iterator[list[dict[str, str]]]:
    for text in _TEXTS:
        for number in (1, 2, 3, 4):
            turns = [{"role": _ROLES[i % 2], "content": text} for i in range(number)]
            yield turns
            yield [{"role": "system", "content": text}, *turns]


def _rendered(tokenizer: HfTokenizer, template: str, turns: list[dict[str, str]], generation: bool) -> str | None:
    """None for a conversation that the template refuses."""
    try:
        text: str = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
    except Exception:  # noqa: BLE001  a template is a program of its own, which may raise anything
        return None
    return text
