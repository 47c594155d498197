"""What a row says about which of two answers is better: winners, strengths of preference, votes, scores of the two.

A verdict is 1 for the first answer, -1 for the second, 0 for a tie. Every column that gives one is read, and a row
whose columns contradict each other is refused: nobody knows which of them is wrong.

    winner, preference                        a, b, 1, 2, a tie, or the name in model_a or model_b (arenas, AlpacaFarm)
    preference_strength, overall_preference   below 0: the first is better (HelpSteer)
    better_response_id                        0 or 1, of response_0 and response_1 (PKU-SafeRLHF)
    labels, score_A and score_B               1: the first, 0: the second; the higher score (SHP)
    score_0 and score_1                       the higher score (WebGPT)
    choice                                    0 or 1, of two summaries (OpenAI)
    winner_model_a, …_b, winner_tie           1 in one of them, 0 in the others (LMSYS arena of Kaggle)
    annotators                                a vote each, 1 or 2
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from poise.data.nested_rows import SUMMARIES
from poise.data.ratings import number_of
from poise.data.raw import parsed_json

_SIDES = (
    ("response_a", "response_b"), ("answer_a", "answer_b"), ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"), ("response_1", "response_2"), ("response1", "response2"),
    ("response_0", "response_1"), ("response_A", "response_B"), ("human_ref_A", "human_ref_B"),
    ("answer_0", "answer_1"), ("output_1", "output_2"), SUMMARIES,
)  # fmt: skip
_SCORES_OF_PAIRS = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)  # fmt: skip
_FIRST, _SECOND = {"a", "1", "model_a", "response_a", "left"}, {"b", "2", "model_b", "response_b", "right"}
_TIE = ("tie", "both")  # both_bad, tie (bothbad)
_ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")


class Compared(NamedTuple):
    """Two answers, in whatever form they are, and the column that says which is better.

    verdict: 1 first, -1 second, 0 tie.
    """

    first: Any
    second: Any
    verdict: int
    column: str

    @property
    def better(self) -> Any:
        return self.first if self.verdict > 0 else self.second


def compared(row: dict[str, Any]) -> Compared | None:
    """The two answers of a row whose columns say which is better, but for votes; None for a row without such columns.

    Raises ValueError for a verdict that cannot be read, and for two that differ.
    """
    found = [
        Compared(row[sides[0]], row[sides[1]], verdict, column)
        for column, (read, sides_of) in _VERDICTS.items()
        if (column in row if column == "winner" else row.get(column) is not None) and (sides := sides_of(row))
        for verdict in [read(row, column, sides)]
    ]
    for one, other in itertools.pairwise(found):
        if (one.verdict, one.verdict and one.better) != (other.verdict, other.verdict and other.better):
            raise ValueError(f"{one.column!r} and {other.column!r} do not call the same answer better")
    if not found and "winner" in row and "chosen" not in row:
        raise ValueError("'winner', but no two responses to choose from: response_a and response_b were expected")
    return found[0] if found else None


def two_answers(row: dict[str, Any]) -> bool:
    """Has a row two answers side by side, in columns by whose names they are known?"""
    return any(one in row and other in row for one, other in _SIDES)


def check_pair(row: dict[str, Any], found: Compared) -> None:
    """ValueError if `chosen` of a row is the answer that the row's verdict calls the worse one."""
    sides = [found.first, found.second]
    if row["chosen"] in sides and row["rejected"] in sides and found.verdict and row["chosen"] != found.better:
        raise ValueError(f"'chosen' and {found.column!r} do not call the same answer better")


def check_votes(votes: list[int], found: Compared | None) -> None:
    """ValueError if the majority of votes is against what the row's other columns say."""
    majority = votes.count(1) - votes.count(2)
    if found and found.verdict * majority < 0:
        raise ValueError(f"'annotators' and {found.column!r} do not call the same answer better")


def scored_equal(row: dict[str, Any]) -> bool:
    """Do all scores beside a pair call it a tie? ValueError if any of them contradicts it."""
    ties = []
    for better, worse in _SCORES_OF_PAIRS:
        chosen, rejected = optional_number(row, better), optional_number(row, worse)
        if chosen is not None and rejected is not None:
            if chosen < rejected:
                raise ValueError(f"'chosen' has the lower score: {better} {chosen:g} against {rejected:g}")
            ties.append(chosen == rejected)
    return bool(ties) and all(ties)


def optional_number(row: dict[str, Any], key: str) -> float | None:
    """None where the number is missing: no column, null, or a blank cell of a table."""
    value = row.get(key)
    return None if value is None or (isinstance(value, str) and not value.strip()) else number_of(row, key)


def votes_of(value: Any) -> list[int]:
    """Votes of any writing: 1, 2, or 0 for a tie. Tables write the list as text: "[1, 1, 2]", "1 2", "1"."""
    if isinstance(value, str):
        text = value.strip()
        value = parsed_json(text) if text.startswith("[") else text.replace(",", " ").replace(";", " ").split()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"'annotators' must be a list of votes, not {type(value).__name__}")
    return [_vote(vote) for vote in value]


def _vote(vote: Any) -> int:
    if vote is None or (isinstance(vote, str) and vote.strip().lower() in ("", "tie", "none", "null")):
        return 0
    try:
        if isinstance(vote, bool):
            raise TypeError
        number = float(vote)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a vote in 'annotators' must be 1, 2 or a tie, not {repr(vote)[:60]}") from None
    return int(number) if number in (1, 2) else 0


# ---- columns that give a verdict ----

_Sides = tuple[str, str]


def _any_sides(row: dict[str, Any]) -> _Sides | None:
    """The two columns of answers; ValueError if more than two could be meant."""
    found = [pair for pair in _SIDES if pair[0] in row and pair[1] in row]
    if len(found) > 1:
        names = dict.fromkeys(name for pair in found for name in pair)
        raise ValueError(f"the better one may be any of {', '.join(map(repr, names))}; leave two of them in")
    return found[0] if found else None


def _sides(*known: _Sides) -> Callable[[dict[str, Any]], _Sides | None]:
    return lambda row: next((pair for pair in known if pair[0] in row and pair[1] in row), None)


def _winner(row: dict[str, Any], column: str, sides: _Sides) -> int:
    value = row[column]
    # A table with a blank cell has decimal numbers in the others.
    said = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    models = [row.get(name) for name in ("model_a", "model_b")]
    if isinstance(value, str) and value in models and models[0] != models[1]:
        return 1 if value == models[0] else -1
    if said == "0" and sides[0].endswith(("_a", "_A")):
        raise ValueError(f"{column!r} is 0, which may be a tie or {sides[0]}; write a, b or tie")
    if sides == ("response_0", "response_1") and said in ("0", "1"):
        return 1 if said == "0" else -1
    if said in _FIRST | {sides[0].lower()} and said != sides[1].lower():
        return 1
    if said in _SECOND | {sides[1].lower()}:
        return -1
    if said.startswith(_TIE) or said in ("0", "none", "neither"):
        return 0
    raise ValueError(f"{column!r} is {repr(row[column])[:40]}; {sides[0]}, {sides[1]} or tie was expected")


def _strength(row: dict[str, Any], column: str, _: _Sides) -> int:
    number = number_of(row, column)
    return (number < 0) - (number > 0)


def _index(row: dict[str, Any], column: str, _: _Sides) -> int:
    number = number_of(row, column)
    if number not in (0, 1):
        raise ValueError(f"{column!r} is {number:g}; 0 or 1 was expected")
    return 1 if number == 0 else -1


def _label(row: dict[str, Any], column: str, sides: _Sides) -> int:
    return -_index(row, column, sides)


def _scores(other: str) -> Callable[[dict[str, Any], str, _Sides], int]:
    def read(row: dict[str, Any], column: str, _: _Sides) -> int:
        first, second = number_of(row, column), number_of({other: row.get(other)}, other)
        return (first > second) - (first < second)

    return read


def _one_hot(row: dict[str, Any], _: str, __: _Sides) -> int:
    said = [number_of({name: row.get(name)}, name) for name in _ONE_HOT]
    if sorted(said) != [0, 0, 1]:
        raise ValueError(f"one of {', '.join(map(repr, _ONE_HOT))} must be 1 and the others 0, not {said}")
    return (1, -1, 0)[said.index(1)]


_VERDICTS: dict[str, tuple[Callable[[dict[str, Any], str, _Sides], int], Callable[..., _Sides | None]]] = {
    "winner": (_winner, _any_sides),
    "preference_strength": (_strength, _sides(("response_1", "response_2"))),
    "overall_preference": (_strength, _sides(("response1", "response2"))),
    "better_response_id": (_index, _sides(("response_0", "response_1"))),
    "labels": (_label, _sides(("human_ref_A", "human_ref_B"))),
    "score_A": (_scores("score_B"), _sides(("human_ref_A", "human_ref_B"))),
    "score_0": (_scores("score_1"), _sides(("answer_0", "answer_1"))),
    "choice": (_index, _sides(SUMMARIES)),
    "winner_model_a": (_one_hot, _any_sides),
    "preference": (_winner, _any_sides),
}
