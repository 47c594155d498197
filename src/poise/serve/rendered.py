"""Back from a rendered conversation to its turns.

OpenRLHF and slime send what their own chat template made of a prompt. A reward model must read the conversation as its
own template writes it, so the turns are found again, and taken only if the reward model's template writes exactly the
same text for them. Any other text with markers in it is refused: read as plain text it would get a wrong reward.
"""

import functools
import re
from typing import NamedTuple

from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.models.chat_format import HfTokenizer, completion_text, generation_prompt, on_our_day, prompt_text
from poise.models.scorer import generated

# What chat templates write around turns: <|im_start|>, <start_of_turn>, [INST], <s>, <｜User｜>.
_MARKER = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|<(start|end)_of_turn>|\[/?INST\]|<<SYS>>|</?s>|<(bos|eos)>")
_S, _U, _A, _V = "qsysq", "quserq", "qanswerq", "qnextq"


class _Seams(NamedTuple):
    """The texts that a template writes between the turns' own."""

    starts: tuple[tuple[str, str], ...]  # (before the system text, after it), or (before the first user text, "")
    answer: str  # from a user's text to the assistant's
    user: str  # from an assistant's text to the next user's
    generation: str  # from a user's text to the end of the generation prompt
    shared: str  # how `generation` begins, and what is written before every answer
    end: str  # after the last answer


def sample_of_query(tokenizer: HfTokenizer, prompt: str, query: str) -> Sample:
    """The sample of a rendered prompt and the text of prompt and answer (OpenRLHF's `query`).

    The query may lack the beginning of a prompt that was too long, and its prompt may have other white space. Raises
    PoiseError for a query that does not go on from the prompt, and as `sample_of_answer` does.
    """
    start = _overlap(prompt, query) or _overlap_but_for_spaces(prompt, query)
    if not start:
        raise PoiseError("a query must begin with its prompt, or with the prompt's last part")
    return sample_of_answer(tokenizer, prompt, query[start:])


def sample_of_answer(tokenizer: HfTokenizer, prompt: Prompt, answer: str) -> Sample:
    """The sample of a prompt, rendered or not, and an answer that may end in end-of-turn or padding tokens.

    Raises PoiseError for a prompt that another chat template has rendered.
    """
    completion = without_end(tokenizer, answer)
    if not isinstance(prompt, str):
        return generated(prompt, completion)
    prompt = on_our_day(tokenizer, prompt)
    turns = turns_of(tokenizer, prompt) or _turns_before_more(tokenizer, prompt)
    if turns is None and _MARKER.search(prompt):
        raise PoiseError(
            "the prompt was rendered with another chat template than the reward model's, which would be read as plain "
            "text; send turns (role, content), or the prompt without a template"
        )
    return generated(turns or prompt, completion)


def sample_of_text(tokenizer: HfTokenizer, text: str) -> Sample:
    """The sample of a whole rendered conversation. Raises PoiseError unless the reward model's template writes it."""
    seams = _seams(tokenizer, str(tokenizer.chat_template))
    whole = on_our_day(tokenizer, text).rstrip()
    if seams and seams.end and not whole.endswith(seams.end):
        whole += seams.end  # an answer that was cut off
    body = whole.removesuffix(seams.end) if seams else ""
    at = body.rfind(seams.answer) if seams else -1
    if seams and at > 0:
        turns = turns_of(tokenizer, body[:at] + seams.generation)
        answer = body[at + len(seams.answer) :]
        if turns and answer and prompt_text(tokenizer, turns) + completion_text(tokenizer, turns, answer) == whole:
            return generated(turns, answer)
    raise PoiseError(
        "the reward model's chat template does not write this text for any conversation; send messages, or prompt and "
        "completion"
    )


def turns_of(tokenizer: HfTokenizer, prompt: str) -> list[dict[str, str]] | None:
    """The turns whose generation prompt is this text; None if none are found."""
    seams = _seams(tokenizer, str(tokenizer.chat_template))
    if seams is None or not prompt.endswith(seams.generation):
        return None
    body = prompt[: len(prompt) - len(seams.generation)] if seams.generation else prompt
    for before, after in seams.starts:
        if not body.startswith(before):
            continue
        rest, turns = body[len(before) :], []
        if after:
            system, found, rest = rest.partition(after)
            if not found:
                continue
            turns.append({"role": "system", "content": system})
        separators, roles = (seams.answer, seams.user), ("user", "assistant")
        number = 0
        while True:
            content, found, rest = rest.partition(separators[number % 2])
            turns.append({"role": roles[number % 2], "content": content})
            if not found:
                break
            number += 1
        try:
            if turns[-1]["role"] == "user" and generation_prompt(tokenizer, turns) == prompt:
                return turns
        except PoiseError:
            continue
    return None


def _turns_before_more(tokenizer: HfTokenizer, prompt: str) -> list[dict[str, str]] | None:
    """The turns of a prompt that ends otherwise than the generation prompt, in what the reward model reads before a
    plain answer anyway: the empty think block of `enable_thinking=False`. None if it does not."""
    seams = _seams(tokenizer, str(tokenizer.chat_template))
    if seams is None or not seams.shared or (at := prompt.rfind(seams.shared)) < 0:
        return None
    turns = turns_of(tokenizer, prompt[:at] + seams.generation)
    if turns and (prompt_text(tokenizer, turns) + completion_text(tokenizer, turns, _A)).startswith(prompt):
        return turns
    return None


def without_end(tokenizer: HfTokenizer, answer: str) -> str:
    """An answer without the tokens that end a turn or pad a row, and the white space between them.

    White space before them is the answer's own: without a chat template it is read.
    """
    seams = _seams(tokenizer, str(tokenizer.chat_template))
    ends = {tokenizer.eos_token, tokenizer.pad_token, seams.end.strip() if seams else ""} - {None, ""}
    while True:
        written = answer.rstrip()
        shorter = next((written[: -len(end)] for end in ends if written.endswith(end)), None)
        if shorter is None:
            return answer
        answer = shorter


def _overlap(prompt: str, query: str) -> int:
    """Length of the longest end of `prompt` that `query` begins with."""
    if query.startswith(prompt):
        return len(prompt)
    first = query[:64]
    at = prompt.find(first) if first else -1
    while at >= 0:
        if query.startswith(prompt[at:]):
            return len(prompt) - at
        at = prompt.find(first, at + 1)
    return 0


def _overlap_but_for_spaces(prompt: str, query: str) -> int:
    """Length of the part of `query` that is the prompt, or its end, in other white space.

    A query is decoded from tokens: Llama 2's decoder writes a space after special tokens, that of transformers 4 takes
    those before full stops away. Where a prompt was cut, half a character may stand first.
    """
    at = [i for i, letter in enumerate(query) if not letter.isspace()]
    halves = len(query) - len(query.lstrip("\ufffd"))
    length = _overlap("".join(prompt.split()), "".join(query[halves:].split()))
    if not length:
        return 0
    end, tail = at[halves + length - 1] + 1, prompt[len(prompt.rstrip()) :]
    return end + len(tail) * query.startswith(tail, end)


@functools.lru_cache(maxsize=8)
def _seams(tokenizer: HfTokenizer, template: str) -> _Seams | None:  # noqa: ARG001  template: a key
    """None without a template, or for one that refuses a plain conversation."""
    if tokenizer.chat_template is None:
        return None

    def turns(*texts: tuple[str, str]) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in texts]

    plain = turns(("user", _U), ("assistant", _A), ("user", _V))
    try:
        text = generation_prompt(tokenizer, plain)
        before, rest = text.split(_U)
        answer, rest = rest.split(_A)
        user, generation = rest.split(_V)
        shared = prompt_text(tokenizer, _V).partition(_V)[2]
        whole = completion_text(tokenizer, _U, _A)
    except (PoiseError, ValueError):
        return None
    starts = [(before, "")]
    try:
        told = generation_prompt(tokenizer, [*turns(("system", _S)), *plain])
        first, rest = told.split(_S)
        starts.insert(0, (first, rest.split(_U)[0]))
    except (PoiseError, ValueError):
        pass  # a template without system turns
    return _Seams(tuple(starts), answer, user, generation, shared, whole.rpartition(_A)[2])
