"""What TRL passes to a reward function, checked: prompts and completions, each as text or as turns. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

from poise.data.conversations import REASONING, check_text, ends_in_a_call, text_of_parts, usual_role
from poise.data.types import Prompt
from poise.errors import PoiseError

Completion = str | list[dict[str, Any]]  # text, or the turns that answered a conversation


def as_lists(prompts: Any, completions: Any) -> tuple[list[Prompt], list[Completion]]:
    """The prompts and as many completions. PoiseError where one of them is missing, or is a single text."""
    found = []
    for what, given in (("prompts", prompts), ("completions", completions)):
        if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
            raise PoiseError(f"a reward takes a list of {what}, not {type(given).__name__}")
        found.append(list(given))
    if len(found[0]) != len(found[1]):
        raise PoiseError(f"{len(found[0])} prompts and {len(found[1])} completions; there must be one for each")
    return found[0], found[1]


def as_pair(prompt: Any, completion: Any) -> tuple[Prompt, str]:
    """A prompt with the text to be scored: of an answer in several turns (tools), its last, after the others.

    Raises PoiseError, one line, for what is neither text nor turns, turns with something other than text, an answer
    that does not end in the assistant's. Reasoning beside an answer's text is not scored; see `lines_to_say`.
    """
    asked = as_prompt(prompt)
    if isinstance(completion, str):
        _check_text(completion, "completion")
        return asked, completion
    *before, last = _turns(completion, "completion")
    if last["role"] != "assistant":
        raise PoiseError(f"a completion must end in text by the assistant, not in a turn of {last['role']}")
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    return ([*turns, *before] if before else asked), last.get("content") or ""


def is_finished(completion: Any) -> bool:
    """Does an answer end in the assistant's own words? One that was cut among the calls of tools does not."""
    return not ends_in_a_call(_last_turn(completion))


def lines_to_say(completions: Sequence[Any]) -> dict[str, str]:
    """What a user should know of completions, by what it is about, so that each is said once."""
    found, total = {}, len(completions)
    if num := sum(not is_finished(completion) for completion in completions):
        found["unfinished"] = (
            f"reward: {num} of {total} completions end in a tool's call or result, not in text; they get no reward "
            f"(None), and TRL does not learn from them; poise/unfinished is their share"
        )
    if num := sum(map(_has_reasoning, completions)):
        found["reasoning"] = (
            f"reward: {num} of {total} completions have reasoning beside their text, which the reward model does not "
            f"read; the text alone is scored"
        )
    return found


def _has_reasoning(completion: Any) -> bool:
    return any(_last_turn(completion).get(name) for name in REASONING)


def _last_turn(completion: Any) -> Mapping[str, Any]:
    """Empty for a completion that is no list of turns."""
    last = completion[-1] if isinstance(completion, (list, tuple)) and completion else None
    return last if isinstance(last, Mapping) else {}


def as_prompt(prompt: Any) -> Prompt:
    """A prompt as text or turns; PoiseError as of `as_pair`."""
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
        return prompt
    return _turns(prompt, "prompt")


def _check_text(text: str, what: str) -> None:
    try:
        check_text(text, what)
    except ValueError as error:
        raise PoiseError(str(error)) from None


def _turns(value: Any, what: str) -> list[dict[str, Any]]:
    """A conversation as turns with a role and text, which may be missing beside the calls of tools."""
    if isinstance(value, (str, bytes, Mapping)) or (not isinstance(value, Sequence) and not hasattr(value, "tolist")):
        raise PoiseError(f"a {what} must be text or a list of turns, not {type(value).__name__}")
    turns = list(value)
    if not turns or not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns):
        raise PoiseError(f"a {what} that is a list must hold turns, {{'role': …, 'content': text}}, at least one")
    named = [{**turn, "role": usual_role(turn["role"])} for turn in turns]
    return [_turn(turn, number, what) for number, turn in enumerate(named, 1)]


def _turn(turn: Mapping[str, Any], number: int, what: str) -> dict[str, Any]:
    if "content" not in turn:
        return dict(turn)
    content = turn["content"]
    try:
        if isinstance(content, (list, tuple)):
            content = text_of_parts(list(content), what, number)
        if content is not None and not isinstance(content, str):
            raise ValueError(f"turn {number} of {what!r} must have text, not {type(content).__name__}")
    except ValueError as error:
        raise PoiseError(str(error)) from None
    _check_text(content or "", what)
    return {**turn, "content": content}
