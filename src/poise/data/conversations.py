"""Conversations in the forms that people have them in: as role/content turns, which is what Poise reads.

[{"role": "user", "content": "Hi"}, …]     turns; also one turn alone; content may be a list of text parts
[{"from": "human", "value": "Hi"}, …]      ShareGPT
'[{"role": "user", …}]'                    either of these as JSON text, or as Python writes lists (CSV by pandas)
"\\n\\nHuman: Hi\\n\\nAssistant: …"            a transcript (HH-RLHF); line ends may be those of Windows
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from poise.data.files import parsed_json
from poise.data.types import Prompt

Turns = list[dict[str, Any]]

# Roles by the names that they have elsewhere, in lower case. Other roles are left to the chat template.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bot": "assistant", "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "observation": "tool", "function": "function", "ipython": "ipython",
}  # fmt: skip
_SAID = {"role", "from"}
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_PROMPT_KEYS = ("prompt", "messages", "conversations")
_NAMES_OF_PROMPTS = ("instruction", "question", "query", "input")
# Names that published data sets have for it; `context` and `history` are no prompts elsewhere.
OTHER_PROMPTS = (*_NAMES_OF_PROMPTS, "context", "history", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")  # a system turn beside the prompt
_CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
_PARTS_OF_ANSWERS = (*_CALLS, *REASONING)
_OF_TOOLS = ("tool", "function", "ipython")
_NAMES_OF_COMPLETIONS = ("response", "answer", "output", "generated_text", "responses", "text")
_LIKE_TURNS = re.compile(r"(?:^|\n)[ \t]{0,8}(?:(?:Human|User|Assistant|Q|A|### ?\w+):|<\|\w+\|>|\[INST\])")


def turns_of(value: Any, key: str) -> Turns | None:
    """The turns of a conversation in any form; None for plain text and for what is no conversation at all.

    Raises ValueError for a conversation that has something wrong.
    """
    if isinstance(value, str):
        value = _from_text(value, key)
        if value is None:
            return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return None
    if not value:
        raise ValueError(f"{key!r} is an empty conversation")
    turns = [_turn(turn, key, number) for number, turn in enumerate(value, 1)]
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise ValueError(f"{key!r} is empty: no turn has text")
    return turns


def looks_like_turns(text: str) -> bool:
    """Does plain text hold what may be marks of speakers?

    >>> looks_like_turns("User: hi"), looks_like_turns("<|im_start|>user"), looks_like_turns("Ann said: hi")
    (True, True, False)
    """
    return _LIKE_TURNS.search(text) is not None


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of a row, after the turn in its column `system`: text, or turns.

    ValueError if there is none, or if it has something wrong.
    """
    return after_system(row, prompt_alone(row))


def prompt_alone(row: dict[str, Any]) -> Prompt:
    """As `prompt_of`, without the column `system`."""
    key = prompt_key(row)
    if key is None:
        there = "; the row has " + ", ".join(repr(name)[:40] for name in list(row)[:6]) if row else "; the row is empty"
        raise ValueError("no 'prompt'" + (but_other_names(row, OTHER_PROMPTS) or there))
    prompt = turns_of(row[key], key) or text_of(row, key)
    for name in _PROMPT_KEYS:
        if name != key and row.get(name) is not None:
            _refuse_another(prompt, key, row[name], name)
    return prompt


def _refuse_another(prompt: Prompt, key: str, value: Any, name: str) -> None:
    """ValueError if a second column of a conversation, with or without an answer to the prompt, is another one."""
    try:
        turns = turns_of(value, name)
    except ValueError:  # a column that nobody reads
        return
    if not turns:
        return
    for said in (prompt, prompt[:-1] if isinstance(prompt, list) and prompt[-1]["role"] == "assistant" else prompt):
        for others in (turns, turns[:-1] if turns[-1]["role"] == "assistant" else turns):
            try:
                joined(said, others, name)
            except ValueError:
                continue
            return
    raise ValueError(f"{key!r} and {name!r} are different conversations; leave one in")


def system_of(row: dict[str, Any]) -> str | None:
    """The text of a row's system turn that has a column of its own; None if it has none, or a blank one."""
    if wrong := next((name for name in SYSTEM_COLUMNS if row.get(name) and not isinstance(row[name], str)), None):
        raise ValueError(f"{wrong!r} must be text, not {type(row[wrong]).__name__}")
    found = {name: row[name] for name in SYSTEM_COLUMNS if row.get(name) and row[name].strip()}
    if len({text.strip() for text in found.values()}) > 1:
        raise ValueError(f"{' and '.join(map(repr, found))} are different system turns; leave one in")
    name, text = next(iter(found.items()), ("", None))
    if text is not None:
        check_text(text, name)
    return text


def after_system(row: dict[str, Any], prompt: Prompt) -> Prompt:
    """A prompt after the system turn that the row has in a column; ValueError if its own system turn is another."""
    system = system_of(row)
    if system is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own, _ = _system_and_rest(turns)
    if own and [turn["content"].strip() for turn in own] != [system.strip()]:
        raise ValueError("the column 'system' and the conversation have different system turns")
    return turns if own else [{"role": "system", "content": system}, *turns]


def prompt_key(row: dict[str, Any]) -> str | None:
    """The column that holds the prompt; None if the row has none."""
    found = next((key for key in _PROMPT_KEYS if row.get(key) is not None), None)
    return "prompt" if found is None and "prompt" in row and "chosen" not in row else found


def but_other_names(row: dict[str, Any], known: tuple[str, ...] = _NAMES_OF_PROMPTS) -> str:
    """What to do about columns that may hold the prompt under names that are not read; "" if there are none.

    >>> but_other_names({"Prompt": "Tea?"})
    ", but 'Prompt'; rename it to 'prompt'"
    """
    names = [name for name in row if row[name] and name.strip().lower() in (*_PROMPT_KEYS, *known)]
    if not names:
        return ""
    what = "rename it to 'prompt'" if len(names) == 1 else "join in 'prompt' what is asked"
    return f", but {' and '.join(map(repr, names))}; {what}"


def holds_turns(row: dict[str, Any]) -> str | None:
    """A column that is a list of turns; None if there is none."""
    return next(
        (
            name
            for name, value in row.items()
            if isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and not value[0].keys().isdisjoint(_SAID)
        ),
        None,
    )


def answered(row: dict[str, Any]) -> tuple[Prompt, str] | None:
    """(prompt, answer) of a row without `completion` that holds a whole conversation; None for other rows.

    ValueError if the conversation ends in another's turn.
    """
    key = prompt_key(row)
    if key not in ("messages", "conversations") or row.get("completion") is not None:
        return None
    turns = turns_of(row[key], key)
    if turns is None:
        return None
    before, answer = split_answer(turns, key)
    if not before:
        raise ValueError(f"{key!r} holds an answer to nothing")
    return after_system(row, before), answer


def other_completion_name(row: dict[str, Any]) -> str | None:
    """A column that may hold the completion under a name that is not read, such as `response`."""
    return next((name for name in _NAMES_OF_COMPLETIONS if row.get(name)), None)


def text_of(row: dict[str, Any], key: str) -> str:
    """A text that is not empty."""
    if key not in row:
        raise ValueError(f"no {key!r}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} must be text, not {type(row[key]).__name__}")
    if not row[key].strip():
        raise ValueError(f"{key!r} is empty")
    check_text(row[key], key)
    return row[key]


def check_text(text: str, key: str) -> None:
    """ValueError for half a UTF-16 pair, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{key!r} holds the lone surrogate U+{code:04X} at character {error.start + 1}: half a character"
        ) from None


def same_turns(one: Turns, other: Turns) -> bool:
    """Do two lists of turns say the same, but for white space at the ends of their texts?"""
    return len(one) == len(other) and all(_said(a) == _said(b) for a, b in zip(one, other, strict=True))


def joined(prompt: Prompt, shared: Turns, key: str) -> Prompt:
    """The one conversation of an explicit prompt and the turns that come before the answer in another column.

    Every turn is in it once. ValueError if the two contradict each other.
    """
    if not shared:
        return prompt
    if isinstance(prompt, str):
        asked = [turn["content"].strip() for turn in shared if turn["role"] == "user"]
        if prompt.strip() in asked:
            return shared
        if not asked and all(turn["role"] == "system" for turn in shared):
            return [*shared, {"role": "user", "content": prompt}]
        if shared[0]["role"] == "assistant":
            return [{"role": "user", "content": prompt}, *shared]
        raise ValueError(f"'prompt' is none of the user's turns of {key!r}")
    system, rest = _system_and_rest(prompt)
    other_system, other_rest = _system_and_rest(shared)
    if system and other_system and not same_turns(system, other_system):
        raise ValueError(f"'prompt' and {key!r} have different system turns")
    lead = other_system or system
    if same_turns(rest, other_rest[: len(rest)]):  # the whole conversation, or more of it
        return [*lead, *other_rest]
    if not other_system and same_turns(rest[len(rest) - len(other_rest) :], other_rest):  # its last turns again
        return prompt
    if not other_rest:
        return [*lead, *rest]
    if rest and rest[-1]["role"] == "user" and other_rest[0]["role"] == "assistant" and not other_system:
        return [*prompt, *shared]  # it goes on where the prompt ends
    raise ValueError(f"'prompt' and {key!r} are different conversations")


def split_answer(turns: Turns, key: str) -> tuple[Turns, str]:
    """(the turns before the answer, the answer): the last turn, which must be the assistant's."""
    last = turns[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{key!r} ends in a turn of the {last['role']}, not of the assistant")
    check_answer(last, key)
    return turns[:-1], last["content"]


def check_answer(turn: Mapping[str, Any], key: str) -> None:
    """ValueError for an answer that has more than its text: reasoning or calls in fields of their own."""
    if lost := [name for name in _PARTS_OF_ANSWERS if turn.get(name)]:
        raise ValueError(
            f"the answer in {key!r} has {', '.join(map(repr, lost))} beside its text, which no model would read; write "
            f"what counts into the text"
        )


def usual_role(name: str) -> str:
    """A role by its usual name; one that has none stays.

    >>> usual_role("Human"), usual_role("gpt"), usual_role("critic")
    ('user', 'assistant', 'critic')
    """
    return _ROLES.get(name.strip().lower(), name)


def ends_in_a_call(turn: Mapping[str, Any]) -> bool:
    """Does a conversation whose last turn this is end in the call of a tool, or in what a tool gave?

    >>> ends_in_a_call({"role": "tool", "content": "4"}), ends_in_a_call({"role": "assistant", "content": "4"})
    (True, False)
    """
    return turn.get("role") in _OF_TOOLS or any(turn.get(name) for name in _CALLS)


# ---- one turn, one text ----


def _said(turn: dict[str, Any]) -> tuple[str, str]:
    return turn["role"], turn["content"].strip()


def _system_and_rest(turns: Turns) -> tuple[Turns, Turns]:
    count = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[:count], turns[count:]


def _turn(turn: Any, key: str, number: int) -> dict[str, Any]:
    """One turn with `role` and `content`, and what else a template may read, such as a tool's name."""
    if not isinstance(turn, dict):
        raise ValueError("a conversation is a list of {'role': …, 'content': text}")
    if "role" not in turn and "content" not in turn and "from" in turn and "value" in turn:
        role = _ROLES.get(turn["from"].strip().lower()) if isinstance(turn["from"], str) else None
        if role is None:
            raise ValueError(f"turn {number} of {key!r} is from {turn['from']!r}; human, gpt, system, tool are known")
        turn = {"role": role, "content": turn["value"]}
    if "role" not in turn or "content" not in turn:
        raise ValueError(f"turn {number} of {key!r}: a conversation is a list of {{'role': …, 'content': text}}")
    role, content = turn["role"], turn["content"]
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"turn {number} of {key!r} has no role")
    role = usual_role(role)
    if isinstance(content, list):
        content = text_of_parts(content, key, number)
    if not isinstance(content, str):
        calls = " beside its tool calls" if turn.get("tool_calls") else ""
        raise ValueError(f"turn {number} of {key!r} must have text{calls}, not {type(content).__name__}")
    check_text(content, key)
    check_text(role, key)
    others = {name: value for name, value in turn.items() if value is not None and name not in ("role", "content")}
    if others:
        try:
            check_text(json.dumps(others, ensure_ascii=False), key)
        except (TypeError, RecursionError):
            raise ValueError(f"turn {number} of {key!r} holds what is no JSON: {', '.join(map(str, others))}") from None
    return {"role": role, "content": content, **others}


def text_of_parts(parts: list[Any], key: str, number: int) -> str:
    """The text of a turn that is a list of parts."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"turn {number} of {key!r} holds something other than text")
    return "".join(str(text) for text in texts)


def _from_text(text: str, key: str) -> list[Any] | None:
    """The turns that a text holds: a transcript, or a list as JSON or as Python writes it. None for plain text."""
    text = text.replace("\r\n", "\n") if "\r" in text else text
    start = text.lstrip()
    if start.startswith("Human:") and (text.startswith("\n\nHuman:") or "\n\nAssistant:" in text):
        parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + start)[1:]
        turns = [
            {"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    stripped = start.rstrip()
    begins = re.match(r"[\[{]\s*[{]?\s*['\"](?:role|content|from|value)['\"]\s*:", stripped[:100])
    if not begins or stripped[-1] not in "]}":
        return None
    try:
        value = parsed_json(stripped)
    except ValueError:
        try:
            value = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError(f"{key!r} begins like a conversation written as text, and cannot be read as one") from None
    return [value] if isinstance(value, dict) else value
