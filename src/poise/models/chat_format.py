"""How a prompt and a completion become the text and the tokens that a model reads."""

from typing import Any

from poise.data.types import Prompt

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfTokenizer = Any


def prompt_text(tokenizer: HfTokenizer, prompt: Prompt) -> str:
    """The prompt as the model sees it: through the chat template where there is one, up to the assistant's turn."""
    if tokenizer.chat_template is None:
        return prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt) + "\n\n"
    return tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True)


def completion_text(tokenizer: HfTokenizer, prompt: Prompt, completion: str) -> str:
    """The completion as a reward model sees it after `prompt_text`: with the template's end of turn."""
    if tokenizer.chat_template is None:
        return completion
    turns = [*_turns(prompt), {"role": "assistant", "content": completion}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    start = whole.rfind(completion.strip())
    return completion.strip() + whole[start + len(completion.strip()) :].rstrip()


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode(tokenizer: HfTokenizer, text: str, *, begin: bool = True) -> list[int]:
    """Token ids of a prompt, or of what follows one (begin=False).

    A chat template writes its special tokens itself; without one the tokenizer adds its own, at the beginning only.
    """
    return tokenizer(text, add_special_tokens=begin and tokenizer.chat_template is None).input_ids
