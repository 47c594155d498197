"""Published rows whose prompt or answers lie inside other columns: turned into rows with a column for each.

input: {messages}, preferred_output, non_preferred_output     OpenAI's preference fine-tuning
info: {post or article, …}, summaries, choice                 OpenAI's comparisons of summaries
question: {full_text}, answer_0, answer_1, score_0, score_1   WebGPT's comparisons
question, response_j, response_k                              StackExchange, paired: j is better
prompt, response_a, response_b, winner_model_a                LMSYS arena of Kaggle: lists of turns as JSON text
messages, rejected_response or rejected_messages              ms-swift: messages end in the chosen answer
query, response, rejected_response                            ms-swift's older form
prompt, history: [[asked, answered], …]                       LLaMA-Factory, ms-swift: the turns before the prompt
"""

from typing import Any

from poise.data.conversations import split_answer, turns_of
from poise.data.raw import parsed_json

SUMMARIES = ("summary_0", "summary_1")
_ARENA = ("prompt", "response_a", "response_b")
_SWIFT = ("rejected_response", "rejected_messages")

Row = dict[str, Any]


def unpacked(row: Row) -> Row:
    """A row of one of these forms in columns of its own; other rows as they are. ValueError if a part is missing.

    >>> unpacked({"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "No."})["prompt"]
    'Why?'
    """
    if "preferred_output" in row and "non_preferred_output" in row:
        inside = row.get("input")
        messages = inside.get("messages") if isinstance(inside, dict) else inside
        others = {key: value for key, value in row.items() if key != "input"}
        return {
            **others,
            "prompt": messages,
            "chosen": row["preferred_output"],
            "rejected": row["non_preferred_output"],
        }
    if isinstance(row.get("info"), dict) and isinstance(row.get("summaries"), list):
        texts = [one.get("text") if isinstance(one, dict) else one for one in row["summaries"]]
        if len(texts) != len(SUMMARIES):
            raise ValueError(f"{len(texts)} 'summaries'; two were expected")
        return {**row, "prompt": _to_summarize(row["info"]), **dict(zip(SUMMARIES, texts, strict=True))}
    if isinstance(row.get("question"), dict) and "answer_0" in row:
        return {**row, "prompt": row["question"].get("full_text"), "question": None}
    if "response_j" in row and "response_k" in row and "chosen" not in row:
        asked = row.get("prompt") or row.get("question")
        return {**row, "prompt": asked, "question": None, "chosen": row["response_j"], "rejected": row["response_k"]}
    if "winner_model_a" in row and all(isinstance(row.get(name), str) for name in _ARENA):
        return _arena(row)
    if "chosen" not in row and any(row.get(name) is not None for name in _SWIFT):
        return _swift(row)
    return row


def after_history(row: Row) -> Row:
    """A row whose `history` is a list of earlier turns, or of pairs of them, with these in its prompt. Other rows stay.

    ValueError for a list of anything else, and where the prompt is no text that could follow.

    >>> after_history({"prompt": "And milk?", "history": [["Tea?", "Yes."]]})["prompt"][1:]
    [{'role': 'assistant', 'content': 'Yes.'}, {'role': 'user', 'content': 'And milk?'}]
    """
    earlier = row.get("history")
    if not isinstance(earlier, list) or not earlier:
        return row
    if not isinstance(row.get("prompt"), str) or turns_of(row["prompt"], "prompt") is not None:
        raise ValueError("'history' has earlier turns, and 'prompt' is not text to follow them; write one conversation")
    if all(isinstance(one, list) and len(one) == 2 for one in earlier):
        turns = _turns([one[0] for one in earlier], [one[1] for one in earlier])
    elif all(isinstance(one, dict) for one in earlier):
        turns = turns_of(earlier, "history") or []
    else:
        raise ValueError("'history' must be pairs of earlier turns; write one conversation in 'prompt'")
    others = {key: value for key, value in row.items() if key != "history"}
    return {**others, "prompt": [*turns, {"role": "user", "content": row["prompt"]}]}


def _to_summarize(info: Row) -> str:
    """The text of a post or an article, as the models that wrote the summaries were asked."""
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"), ("", "article")]
    said = [f"{mark}{info[name].strip()}" for mark, name in parts if isinstance(info.get(name), str) and info[name]]
    if not isinstance(info.get("post") or info.get("article"), str):
        raise ValueError("'info' has no 'post' and no 'article' to summarize")
    return "\n\n".join([*said, "TL;DR:"])


def _arena(row: Row) -> Row:
    """One turn as text; several as the two conversations."""
    lists = [_texts(row[name]) for name in _ARENA]
    if not all(lists):
        return row
    asked, first, second = lists
    if not len(asked) == len(first) == len(second):
        raise ValueError(f"{len(asked)} turns in 'prompt', {len(first)} in 'response_a', {len(second)} in 'response_b'")
    if len(asked) == 1:
        return {**row, **{name: texts[0] for name, texts in zip(_ARENA, lists, strict=True)}}
    others = {key: value for key, value in row.items() if key not in _ARENA}
    return {**others, "conversation_a": _turns(asked, first), "conversation_b": _turns(asked, second)}


def _swift(row: Row) -> Row:
    others = {key: value for key, value in row.items() if key not in ("messages", "query", "response", *_SWIFT)}
    if row.get("messages") is None:
        if "query" not in row or "response" not in row or "rejected_response" not in row:
            return row
        answers = {"chosen": row["response"], "rejected": row["rejected_response"]}
        return after_history({**others, "prompt": row["query"], **answers})
    turns = turns_of(row["messages"], "messages") or []
    before, chosen = split_answer(turns, "messages") if turns else ([], "")
    if not before:
        raise ValueError("'messages' must be a conversation that ends in the chosen answer")
    if row.get("rejected_messages") is not None:
        return {**others, "prompt": before, "chosen": turns, "rejected": row["rejected_messages"]}
    return {**others, "prompt": before, "chosen": chosen, "rejected": row["rejected_response"]}


def _texts(value: str) -> list[Any]:
    """The list that a text holds; an empty list for plain text."""
    try:
        found = parsed_json(value) if value.lstrip().startswith("[") else None
    except ValueError:
        return []
    return found if isinstance(found, list) and all(isinstance(one, str | None) for one in found) else []


def _turns(asked: list[Any], answers: list[Any]) -> list[Row]:
    both = zip(asked, answers, strict=True)
    return [
        {"role": role, "content": text} for pair in both for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
