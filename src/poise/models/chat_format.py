"""How a prompt and a completion become the text and the tokens that a model reads.

A policy is given its prompt with the template's generation prompt (`generation_prompt`). A reward model reads what the
template writes for the whole conversation, in two parts (`prompt_text` and `completion_text`), so that completions of
one prompt can share its part. The two differ for templates that write or remove think blocks. Where the parts meet is
found by comparing renderings: a search for the answer's text would also find it in other places, such as the "d" of
`<|im_end|>`, and a template may rewrite the answer.
"""

import contextlib
import functools
import json
import re
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from poise.data.types import Prompt
from poise.errors import PoiseError, first_line
from poise.models.markers import Markers, tokens_of_answers
from poise.runtime.progress import console

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfTokenizer = Any

# Two answers that begin differently; and answers with a think block, which some templates move, add to or remove.
_PLAIN = ("a", "b")
_THINKING = ("<think>\nc\n</think>\n\nd", "e\n</think>\n\nf")

# The date that templates write is that of the process's beginning.
_BEGAN, _YEARS = datetime.now(), timedelta(days=1000)
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_MARK, _LONGEST_DATE = "qdateq", 40

# Longer prompts, in characters, are not kept in memory.
_LONGEST_KEPT = 2**15


def generation_prompt(tokenizer: HfTokenizer, prompt: Prompt) -> str:
    """What a policy continues: the prompt through the chat template, if there is one, up to the assistant's answer.

    Raises PoiseError for a template that refuses the prompt, or that writes nothing of plain text.
    """
    if tokenizer.chat_template is None:
        return prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] or "" for turn in prompt) + "\n\n"
    _check_plain_text(tokenizer, _template_key(tokenizer))
    return _render(tokenizer, _turns(prompt), add_generation_prompt=True)


def prompt_text(tokenizer: HfTokenizer, prompt: Prompt) -> str:
    """The part of a conversation that a reward model reads before the answer, whatever the answer is.

    It is `generation_prompt`, less what the template does not write before every answer: `<think>` of DeepSeek R1, for
    instance. Raises PoiseError as `generation_prompt` does.
    """
    if tokenizer.chat_template is None:
        return generation_prompt(tokenizer, prompt)
    asked = json.dumps(prompt)
    found = _shared_text if len(asked) <= _LONGEST_KEPT else _shared_text.__wrapped__
    return found(tokenizer, _template_key(tokenizer), asked)


def completion_text(tokenizer: HfTokenizer, prompt: Prompt, completion: str) -> str:
    """What a reward model reads after `prompt_text`: the rest of the whole conversation, up to the end of turn.

    The completion is rendered without white space at its two ends. White space after the end of turn is left out, since
    a reward model reads its score at the end of turn.
    Raises PoiseError for a template that refuses the conversation, or that writes another prompt for this completion.
    """
    if tokenizer.chat_template is None:
        return completion
    before = prompt_text(tokenizer, prompt)
    whole = _render(tokenizer, [*_turns(prompt), _answer(completion.strip())])
    if not whole.startswith(before):
        raise PoiseError(
            f"the chat template writes the prompt {_shown(prompt)} differently before the completion "
            f"{completion.strip()[:40]!r}; a reward model needs one text of the prompt"
        )
    return whole[len(before) :].rstrip()


def encode(tokenizer: HfTokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on: a prompt, or the beginning of a conversation.

    A chat template writes its special tokens itself; without one the tokenizer adds its own, at the beginning only: an
    end token that it would add, too, would end the text before its answer.
    """
    return _encode_all(tokenizer, [text])[0]


def _encode_all(tokenizer: HfTokenizer, texts: list[str]) -> list[list[int]]:
    """`encode` of each."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    added = [] if tokenizer.chat_template is not None else added_tokens(tokenizer)[0]
    return [[*added, *ids] for ids in found]


def added_tokens(tokenizer: HfTokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds to a text by itself, (before it, after it)."""
    alone: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    first = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
    return whole[:first], whole[first + len(alone) :]


def encode_prompt(tokenizer: HfTokenizer, prompt: Prompt) -> list[int]:
    """Token ids of `generation_prompt`. Markers of the template that the prompt's own texts spell are text.

    Raises PoiseError as `generation_prompt` does, and for a marker that cannot be told from the template's own.
    """
    text = generation_prompt(tokenizer, prompt)
    if tokenizer.chat_template is None:
        return encode(tokenizer, text)
    markers, turns = _markers_of(tokenizer), _turns(prompt)
    if markers.first_in(turns) is None:
        return encode(tokenizer, text)
    return markers.encode(_hidden_rendering(tokenizer, turns, text, add_generation_prompt=True))


def encode_conversation(tokenizer: HfTokenizer, prompt: Prompt, completion: str) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the completion): together the ids of the whole conversation's text.

    The whole text is encoded at once, as a stock classifier's user would encode it: a completion encoded alone would
    begin with a space that nobody wrote, as many tokenizers begin a text, and lack the tokens that lie over the
    boundary. Such a token belongs to the completion. Without a chat template the special tokens are the tokenizer's
    own, at the end, too. Markers of the template that the texts of the turns spell are text.
    """
    return encode_conversations(tokenizer, [(prompt, completion)])[0]


def encode_conversations(
    tokenizer: HfTokenizer, conversations: Sequence[tuple[Prompt, str]]
) -> list[tuple[list[int], list[int]]]:
    """`encode_conversation` of each (prompt, completion). The tokenizer reads all texts in one call, on all cores, and
    the prompt of several completions once."""
    texts = [(prompt_text(tokenizer, p), completion_text(tokenizer, p, answer)) for p, answer in conversations]
    templated = tokenizer.chat_template is not None
    marked = _with_markers(tokenizer, conversations, texts) if templated else {}
    plain = [(before, before + after) for i, (before, after) in enumerate(texts) if i not in marked]
    befores = list(dict.fromkeys(before for before, _ in plain))
    firsts = dict(zip(befores, _encode_all(tokenizer, befores), strict=True))
    wholes = tokenizer([whole for _, whole in plain], add_special_tokens=not templated).input_ids if plain else []
    rest = (_divided(whole, firsts[before]) for (before, _), whole in zip(plain, wholes, strict=True))
    return [marked[i] if i in marked else next(rest) for i in range(len(texts))]


def _with_markers(
    tokenizer: HfTokenizer, conversations: Sequence[tuple[Prompt, str]], texts: Sequence[tuple[str, str]]
) -> dict[int, tuple[list[int], list[int]]]:
    """By number, the ids of the conversations whose texts spell a marker of the template."""
    markers, found = _markers_of(tokenizer), {}
    for i, ((prompt, completion), (before, after)) in enumerate(zip(conversations, texts, strict=True)):
        turns = [*_turns(prompt), _answer(completion.strip())]
        if markers.first_in(turns) is not None:
            hidden = _hidden_rendering(tokenizer, turns, before + after)
            cut = next((at for at in range(len(hidden), 0, -1) if len(markers.show(hidden[:at])) <= len(before)), 0)
            found[i] = _divided(markers.encode(hidden), markers.encode(hidden[:cut]))
    return found


def decode_completions(
    tokenizer: HfTokenizer, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]
) -> list[str]:
    """The text that each completion's tokens add to the prompt's, without special tokens.

    Think and tool blocks stay, also where their tokens are special: a reward model that was trained on such texts reads
    them as tokens. Decoded alone, a completion would lose the space that it begins with where the tokenizer begins
    every text so.
    """
    special, inside = tokens_of_answers(tokenizer)
    prompt, kept = _without(special, prompt_ids), [_without(special, ids, inside) for ids in completions]
    before: str = tokenizer.decode(prompt)
    wholes = tokenizer.batch_decode([[*prompt, *ids] for ids in kept])
    return [
        whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)
        for ids, whole in zip(kept, wholes, strict=True)
    ]


def _without(special: set[int], ids: Sequence[int], inside: Collection[int] = ()) -> list[int]:
    """Ids less special tokens; those `inside` an answer stay, but for the ones that end it."""
    length = next((i for i in range(len(ids), 0, -1) if ids[i - 1] not in special), 0)
    return [token for token in ids[:length] if token not in special or token in inside]


def _divided(whole: list[int], prompt: list[int]) -> tuple[list[int], list[int]]:
    """A text's ids at the end of what they share with those of its prompt; the second part is never empty."""
    length = _num_shared(prompt, whole[:-1])
    return whole[:length], whole[length:]


# ---- rendering ----


def _markers_of(tokenizer: HfTokenizer) -> Markers:
    return _markers(tokenizer, _template_key(tokenizer))


@functools.lru_cache(maxsize=16)
def _markers(tokenizer: HfTokenizer, template: str) -> Markers:  # noqa: ARG001  template: a key
    rendered = ""
    plain = [*_turns("a"), _answer("b"), *_turns("c")]
    for turns in ([{"role": "system", "content": "d"}, *plain], plain, plain[:1]):
        with contextlib.suppress(PoiseError):
            rendered += _render(tokenizer, turns, add_generation_prompt=True)
    with contextlib.suppress(PoiseError):
        rendered += _render(tokenizer, plain[:2])
    return Markers(tokenizer, rendered)


def _hidden_rendering(
    tokenizer: HfTokenizer, turns: list[dict[str, Any]], text: str, *, add_generation_prompt: bool = False
) -> str:
    """The rendering of turns with their markers hidden; `text` is the rendering with the markers spelled.

    Raises PoiseError where they differ by more: a template that reads the marker and acts on it.
    """
    markers = _markers_of(tokenizer)
    hidden = _render(tokenizer, markers.hide(turns), add_generation_prompt=add_generation_prompt)
    hidden = hidden if add_generation_prompt else hidden.rstrip()
    if markers.show(hidden) != text:
        raise PoiseError(
            f"a text spells the chat template's marker {markers.first_in(turns)!r}, and the template changes what it "
            f"writes because of it; take the marker out of the conversation that begins with {_shown(turns)}"
        )
    return hidden


def _turns(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _template_key(tokenizer: HfTokenizer) -> str:
    """Caches are asked by it: a tokenizer may be given another template."""
    return str(tokenizer.chat_template)


def on_our_day(tokenizer: HfTokenizer, text: str) -> str:
    """A text that the chat template wrote on another day, in another process, with the date that it writes here."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else ""
    if (form := _DATE.search(template)) is None:
        return text
    try:
        before, date, _ = _render(tokenizer, _turns("a"), template=_DATE.sub(f"'{_MARK}'", template)).partition(_MARK)
    except PoiseError:
        return text
    rest = text.removeprefix(before)
    if not date or rest == text:
        return text
    for length in range(1, _LONGEST_DATE):
        with contextlib.suppress(ValueError):
            if datetime.strptime(rest[:length], form[2]).strftime(form[2]) == rest[:length]:
                return before + _BEGAN.strftime(form[2]) + rest[length:]
    return text


@functools.lru_cache(maxsize=16)
def _dated(template: str, day: datetime) -> str:
    """A template that writes one date whenever it is rendered: midnight must not divide a run or a conversation."""
    return _DATE.sub(lambda found: json.dumps(day.strftime(found[2])), template)


def _render(
    tokenizer: HfTokenizer, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False, day: datetime = _BEGAN,
    template: str = "",
) -> str:  # fmt: skip
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template or _dated(tokenizer.get_chat_template(), day), tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  a template is a program of its own, which may raise anything
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise PoiseError(
            f"the chat template refuses a conversation of the turns {roles} that begins with "
            f"{_shown(turns)}: {first_line(error)}"
        ) from None


def _shown(prompt: Prompt) -> str:
    content = _turns(prompt)[0].get("content")
    return repr((content if isinstance(content, str) else "")[:40])  # turns of tool calls have none


@functools.lru_cache(maxsize=4096)
def _shared_text(tokenizer: HfTokenizer, template: str, prompt_json: str) -> str:  # noqa: ARG001  template: a key
    """The longest text that begins the generation prompt and the rendering of every answer of a prompt."""
    prompt: Prompt = json.loads(prompt_json)
    turns, generation = _turns(prompt), generation_prompt(tokenizer, prompt)
    plain = [_render(tokenizer, [*turns, _answer(text)]) for text in _PLAIN]
    if plain[0] == plain[1]:
        raise PoiseError("the chat template writes nothing of an answer that is plain text; use another tokenizer")
    thinking = []
    for text in _THINKING:
        try:
            thinking.append(_render(tokenizer, [*turns, _answer(text)]))
        except PoiseError:  # then no such answer will be scored either
            continue
    cut = min(_num_shared(generation, whole) for whole in (*plain, *thinking))
    return _outside_tokens(tokenizer, generation, cut)


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences have in common at their beginnings."""
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)


def _outside_tokens(tokenizer: HfTokenizer, text: str, cut: int) -> str:
    """`text` up to `cut`, or up to the added token, such as `<think>`, that `cut` would divide."""
    for token in tokenizer.get_added_vocab():
        start = text.rfind(token, 0, cut + len(token) - 1)
        if 0 <= start < cut < start + len(token):
            return text[:start]
    return text[:cut]


@functools.lru_cache(maxsize=64)
def _check_plain_text(tokenizer: HfTokenizer, template: str) -> None:
    """Raise PoiseError for a template that wants lists of parts, as those of image models do, and drops plain text.

    Says so if the template writes the date.
    """
    try:
        first, second = (_render(tokenizer, _turns(text), add_generation_prompt=True) for text in _PLAIN)
        later = _render(tokenizer, _turns(_PLAIN[0]), add_generation_prompt=True, day=_BEGAN + _YEARS)
    except PoiseError:  # it refuses this conversation; the prompt's own rendering will tell
        return
    if first != later:
        _say_dated(template)
    if first == second:
        raise PoiseError("the chat template writes nothing of a turn that is plain text; use another tokenizer")


@functools.lru_cache(maxsize=64)  # once, however many tokenizers have the template
def _say_dated(template: str) -> None:  # noqa: ARG001  template: a key
    console.print(
        "the chat template writes the date: other days give other scores and samples, so set a date in the template "
        "to compare or continue runs", soft_wrap=True,
    )  # fmt: skip
