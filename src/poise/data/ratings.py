"""Ratings of responses as preferences: of each two responses of a prompt, the higher rated one is chosen."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

from poise.data.conversations import prompt_of, text_of
from poise.data.files import parsed_json
from poise.data.rows import Understood
from poise.data.types import Preference, Prompt

_MOST_RATED = 1000  # responses of one row: their pairs are half the square


@dataclass(frozen=True)
class Rated:
    """One rated response of a prompt, to be compared with the prompt's others."""

    prompt: Prompt
    response: str
    rating: float
    source: str


def number_of(row: dict[str, Any], key: str) -> float:
    """A finite number of a row; ValueError says what it is instead."""
    value = row[key]
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except OverflowError:
        raise ValueError(f"{key!r} is too large a number") from None
    except (TypeError, ValueError):
        raise ValueError(f"{key!r} must be a number, not {repr(value)[:60]}") from None
    if not math.isfinite(number):
        raise ValueError(f"{key!r} is {number}")
    return number


def rated_list(row: dict[str, Any], source: str) -> list[Rated]:
    """The responses of a row with their ratings; ValueError for lists that do not fit."""
    listed = {}
    for key in ("responses", "ratings"):
        value = row[key]
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parsed_json(value)
        if not isinstance(value, list):
            raise ValueError("'responses' and 'ratings' must be lists")
        listed[key] = value
    if len(listed["ratings"]) != len(listed["responses"]):
        raise ValueError(f"{len(listed['responses'])} responses but {len(listed['ratings'])} ratings")
    if len(listed["ratings"]) > _MOST_RATED:
        raise ValueError(f"{len(listed['ratings'])} responses; at most {_MOST_RATED} are compared with one another")
    prompt = prompt_of(row)
    return [
        Rated(prompt, text_of({"responses": text}, "responses"), number_of({"ratings": rating}, "ratings"), source)
        for text, rating in zip(listed["responses"], listed["ratings"], strict=True)
    ]


def ranked(rated: list[Rated]) -> list[Preference]:
    """Of each two responses the higher rated one is chosen; equal ratings and equal texts say nothing."""
    return [
        Preference(better.prompt, better.response, worse.response, better.source)
        for one, other in itertools.combinations(rated, 2)
        if one.rating != other.rating and one.response.strip() != other.response.strip()
        for better, worse in [(one, other) if one.rating > other.rating else (other, one)]
    ]


def by_prompt(rated: list[Rated], understood: Understood) -> list[list[Preference]]:
    """Ranked responses of each prompt. A response rated twice counts with its mean rating.

    A row counts as used if its response is in a pair, and as a tie otherwise.
    """
    prompts: dict[str, dict[str, list[Rated]]] = {}
    for row in rated:
        prompts.setdefault(json.dumps(row.prompt), {}).setdefault(row.response, []).append(row)
    found = []
    for responses in prompts.values():
        pairs = ranked(
            [replace(rows[0], rating=sum(row.rating for row in rows) / len(rows)) for rows in responses.values()]
        )
        in_pairs = {text for pair in pairs for text in (pair.chosen, pair.rejected)}
        used = sum(len(rows) for text, rows in responses.items() if text in in_pairs)
        understood.used += used
        understood.ties += sum(map(len, responses.values())) - used
        found.append(pairs)
    return found
