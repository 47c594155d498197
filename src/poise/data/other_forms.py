"""Forms of rows that say the same in other columns: turned into the columns that preferences.py reads.

prompt, response_a, response_b, winner     two answers and which is better, by any column of verdicts.py
prompt, responses, ratings                 lists: of answers (responses, completions, generations, answers) and of
                                           numbers (ratings, scores, ranks, rewards); or one list of both, as
                                           UltraFeedback and Nectar have it
prompt, completion, rating                 one answer (completion, response or the last turn of messages) with rating or
                                           score
prompt, completions                        several completions of one prompt, to be scored
chosen, rejected; messages with an answer  training files, read for their prompts

Rows that say one thing twice must say the same.
"""

from typing import Any

from poise.data.conversations import OTHER_PROMPTS, SYSTEM_COLUMNS, answered, prompt_key
from poise.data.nested_rows import after_history, unpacked
from poise.data.ratings import number_of
from poise.data.raw import parsed_json
from poise.data.verdicts import Compared, check_pair, compared

_TEXTS = ("responses", "completions", "generations", "answers")
_TEXT = ("response", "completion", "text", "answer", "content", "generation")
# Ranks count from the best, so their sign is turned.
_NUMBERS = {"ratings": 1, "scores": 1, "ranks": -1, "rewards": 1, "rating": 1, "score": 1, "rank": -1}
_NUMBER = {"rating": 1, "overall_score": 1, "pm_score": 1, "score": 1, "rank": -1}
_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # of HelpSteer

FORMS = (
    "a row of preferences has prompt, chosen, rejected; or prompt, response_a, response_b, winner; or prompt, "
    "responses, ratings; or one of the other forms in docs/data.md"
)


def in_our_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `chosen` and `rejected`, with `responses` and `ratings`, or with `completion` and `rating`; other rows
    as they are. A tie of two answers becomes a pair of equal scores.

    Raises ValueError for a verdict that cannot be read, and for parts that contradict each other.
    """
    return in_our_columns_with_verdict(row)[0]


def in_our_columns_with_verdict(row: dict[str, Any]) -> tuple[dict[str, Any], Compared | None]:
    """As `in_our_columns`, and what the row's columns say of its two answers, if they do."""
    row = with_prompt(row)
    if "chosen" not in row and "chosen_response" in row and "rejected_response" in row:
        row = {**row, "chosen": row["chosen_response"], "rejected": row["rejected_response"]}
    found = compared(row)
    if "chosen" in row:
        if found:
            check_pair(row, found)
        return _checked_against_ratings(row), found
    if "annotators" in row:
        return row, found
    if found:
        tie = {"score_chosen": 0, "score_rejected": 0} if not found.verdict else {}
        worse = found.second if found.verdict >= 0 else found.first
        return {**row, "chosen": found.better if found.verdict else found.first, "rejected": worse, **tie}, found
    if listed := _rated_answers(row):
        return {**row, "responses": listed[0], "ratings": listed[1]}, None
    return _one_answer(row), None


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a public form as one with `prompt`: there the prompt has a name of its own. Other rows as they are."""
    row = unpacked(row)
    if prompt_key(row) is not None:
        return after_history(row)
    if not _is_public(row):
        return row
    names = [name for name in OTHER_PROMPTS if row.get(name) and not (name == "history" and "instruction" in row)]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(map(repr, names))} may all be the prompt; join them in 'prompt'")
    return after_history({**row, "prompt": row[names[0]]}) if names else row


def one_by_one(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of several completions as rows of one each; other rows as they are. ValueError for an empty list."""
    row = with_prompt(row)
    listed = row["completions"] if "completions" in row and "completion" not in row else row.get("completion")
    if not isinstance(listed, list) or ("completions" not in row and any(isinstance(one, dict) for one in listed)):
        return [row]
    if not listed:
        raise ValueError("the list of completions is empty")
    if isinstance(listed[0], dict) and "role" not in listed[0]:
        listed = [_text_in(one, number) for number, one in enumerate(listed, 1)]
    return [{**row, "completion": one} for one in listed]


# ---- answers with numbers ----


def _is_public(row: dict[str, Any]) -> bool:
    """Is this a form by columns that only published data sets have? Elsewhere `input` may be anything."""
    if {"chosen_response", "rejected_response"} <= row.keys() or _listed_names(row) or "overall_preference" in row:
        return True
    if {"human_ref_A", "human_ref_B"} <= row.keys() or {"output_1", "output_2"} <= row.keys():
        return True
    return "chosen" in row and ({"instruction", "input"} <= row.keys() or not row.keys().isdisjoint(SYSTEM_COLUMNS))


def _listed_names(row: dict[str, Any]) -> list[str]:
    """Columns of answers, if they are lists of objects or have numbers beside them."""
    texts = [name for name in _TEXTS if _list(row, name) is not None]
    numbers = any(_list(row, name) is not None for name in _NUMBERS)
    return [name for name in texts if numbers or _objects(_list(row, name) or [])]


def _rated_answers(row: dict[str, Any]) -> tuple[list[Any], list[float]] | None:
    """(answers, ratings) of a row of several rated answers; None for other rows."""
    names = _listed_names(row)
    if not names:
        if "responses" in row and "ratings" in row:
            raise ValueError("'responses' and 'ratings' must be lists")
        return None
    if len(names) > 1:
        raise ValueError(f"{' and '.join(map(repr, names))} are both lists of answers; leave one in")
    answers = _list(row, names[0]) or []
    if _objects(answers):
        texts = [_text_in(one, number) for number, one in enumerate(answers, 1)]
        known = [name for name in _NUMBER if any(isinstance(one, dict) and name in one for one in answers)]
        if not known:
            raise ValueError(f"{names[0]!r} have no {', '.join(map(repr, _NUMBER))}; give each its 'rating'")
        columns = {name: _numbers([one.get(name) for one in answers], name, _NUMBER[name]) for name in known}
    else:
        texts = answers
        listed = {name: _list(row, name) for name in _NUMBERS}
        columns = {
            name: _numbers(values, name, _NUMBERS[name]) for name, values in listed.items() if values is not None
        }
    for name, values in columns.items():
        if len(values) != len(texts):
            raise ValueError(f"{len(texts)} responses but {len(values)} {name}")
    (first, ratings), *others = columns.items()
    for name, values in others:
        if _contradict(ratings, values):
            raise ValueError(f"{first!r} and {name!r} do not order the answers alike")
    return texts, ratings


def _one_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row with one answer and its number, as `completion` and `rating`; other rows as they are."""
    number = next((name for name in ("rating", "score") if row.get(name) is not None), None)
    text = next((name for name in ("completion", "response") if name in row), None)
    if number is None and text is not None:
        if own := [name for name in _ATTRIBUTES if row.get(name) is not None]:
            raise ValueError(f"no 'rating', but {', '.join(map(repr, own))}; name the one that decides 'rating'")
        if isinstance(row.get("label"), bool):
            raise ValueError(
                "'label' says good or bad of one answer; give a 'rating', such as 1 and 0, to compare them"
            )
        return row
    if number is None or _list(row, number) is not None:
        return row
    if text is None:
        if (found := answered(row)) is None:
            return row
        return {**row, "prompt": found[0], "completion": found[1], "rating": row[number]}
    return {**row, "rating": row[number]}


def _checked_against_ratings(row: dict[str, Any]) -> dict[str, Any]:
    """A pair beside the list that it was made from; ValueError if it is rated the other way round, and equal ratings
    make it a tie."""
    if "chosen" not in row or not _listed_names(row) or not isinstance(row["chosen"], (str, list)):
        return row
    try:
        found = _rated_answers(row)
    except ValueError:  # the pair says enough
        return row
    sides = [_last_text(row.get(key)) for key in ("chosen", "rejected")]
    if found is None or not all(side in found[0] for side in sides):
        return row
    chosen, rejected = (found[1][found[0].index(side)] for side in sides)
    if chosen < rejected:
        raise ValueError("'chosen' is rated lower than 'rejected' in the row's list of answers")
    return {"score_chosen": 0, "score_rejected": 0, **row} if chosen == rejected else row


def _last_text(side: Any) -> Any:
    last = side[-1] if isinstance(side, list) and side else side
    return last.get("content") if isinstance(last, dict) else last


def _list(row: dict[str, Any], name: str) -> list[Any] | None:
    """A list, also as the JSON text that a table holds; None for anything else."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parsed_json(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _objects(answers: list[Any]) -> bool:
    """Are these objects that hold an answer each, and not turns of a conversation?"""
    return any(isinstance(one, dict) and "role" not in one and "from" not in one for one in answers)


def _text_in(one: Any, number: int) -> Any:
    names = [name for name in _TEXT if name in one] if isinstance(one, dict) else []
    if len(names) != 1:
        raise ValueError(f"answer {number} of the list must have one text, such as 'response'")
    return one[names[0]]


def _numbers(values: list[Any], name: str, sign: int) -> list[float]:
    return [sign * number_of({name: value}, name) for value in values]


def _contradict(one: list[float], other: list[float]) -> bool:
    """Does any pair of answers have the opposite order?"""
    order = sorted(range(len(one)), key=lambda i: (one[i], other[i]))
    highest, last = float("-inf"), None  # of `other`, among answers that `one` puts strictly lower
    best = float("-inf")
    for i in order:
        if one[i] != last:
            highest, last = best, one[i]
        if other[i] < highest:
            return True
        best = max(best, other[i])
    return False
