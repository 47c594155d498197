"""Forms of rows that say the same in other columns: turned into the columns that preferences.py reads.

prompt, response_a, response_b, winner     of two responses, the one that a person preferred (arenas)
prompt, completions                        several completions of one prompt, to be scored
chosen, rejected; messages with an answer  training files, read for their prompts
"""

from typing import Any

_SIDES = (
    ("response_a", "response_b"), ("answer_a", "answer_b"), ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"), ("response_1", "response_2"),
)  # fmt: skip
_FIRST, _SECOND = {"a", "1", "model_a", "response_a", "left"}, {"b", "2", "model_b", "response_b", "right"}
_TIE = "tie"

FORMS = (
    "a row of preferences has prompt, chosen, rejected; or prompt, response_a, response_b, winner; or one of the other "
    "forms in docs/data.md"
)


def with_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a `winner` as one with chosen and rejected; a tie as two of equal score; other rows as they are.

    Raises ValueError for a winner that is neither of the two, nor a tie.
    """
    if "winner" not in row or "chosen" in row:
        return row
    names = next((pair for pair in _SIDES if pair[0] in row and pair[1] in row), None)
    if names is None:
        raise ValueError("'winner', but no two responses to choose from: response_a and response_b were expected")
    first, second = (row[name] for name in names)
    said = str(row["winner"]).strip().lower()
    if said == "0" and names[0].endswith("_a"):
        raise ValueError(f"'winner' is 0, which may be a tie or {names[0]}; write a, b or tie")
    if said in _FIRST | {names[0]}:
        chosen, rejected = first, second
    elif said in _SECOND | {names[1]}:
        chosen, rejected = second, first
    elif said.startswith(_TIE) or said in ("0", "none", "both", "neither"):
        return {**row, "chosen": first, "rejected": second, "score_chosen": 0, "score_rejected": 0}
    else:
        raise ValueError(f"'winner' is {repr(row['winner'])[:40]}; {names[0]}, {names[1]} or tie was expected")
    return {**row, "chosen": chosen, "rejected": rejected}


def one_by_one(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of several completions as rows of one each; other rows as they are. ValueError for an empty list."""
    listed = row["completions"] if "completions" in row and "completion" not in row else row.get("completion")
    if not isinstance(listed, list) or any(isinstance(one, dict) for one in listed):
        return [row]
    if not listed:
        raise ValueError("the list of completions is empty")
    return [{**row, "completion": one} for one in listed]
