"""What a file asks of a reward model: pairs, RM-Bench rows, or best-of-n sets, by what its rows look like.

    any form that `read_preferences` reads           pairs
    prompt, chosen, rejected: lists of three texts   RM-Bench: one content in the styles concise, detailed, markdown
    prompt, chosen, rejected: other lists of texts   sets: the best text should be a chosen one

Every form may carry `subset`, or `domain` as RM-Bench calls it.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from poise.data.conversations import check_text, prompt_of
from poise.data.files import RawRow, as_object, can_be_read_twice, parsed_json, raw_rows
from poise.data.preferences import preferences_of, read_preferences
from poise.data.rows import Check, OnBadRow, Understood, finish, parsed_rows
from poise.data.types import Prompt, Sample
from poise.runtime.run_folder import Json

NUM_STYLES = 3  # of RM-Bench


class Item(NamedTuple):
    """Every chosen text should beat every rejected one. A pair has one of each."""

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str = ""


class Questions(NamedTuple):
    """What a file asks."""

    kind: Literal["pairs", "rm_bench", "best_of_n"]
    items: list[Item]

    @property
    def samples(self) -> list[Sample]:
        """Every text: item by item, the chosen ones first."""
        return [Sample(item.prompt, text) for item in self.items for text in (*item.chosen, *item.rejected)]

    @property
    def unit(self) -> Int[ndarray, " items"]:
        """Items of the same two texts (votes, repeats) have the same number: they are not independent."""
        texts = [json.dumps([item.prompt, sorted((*item.chosen, *item.rejected))]) for item in self.items]
        # Not `np.unique`: an array of texts takes four bytes for every character of the longest one, in every row.
        numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
        return np.array([numbers[text] for text in texts], dtype=int)


def read_questions(
    path: str,
    on_bad_row: OnBadRow,
    check: Check | None = None,
    understood: Understood | None = None,
    *,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> Questions:
    """Pairs, RM-Bench rows or best-of-n sets, by what the rows look like. Pairs of a `subset` may repeat.

    check, understood, rows: as `read_preferences` takes them. A FIFO is read once, into memory.
    """
    understood = understood or Understood(str(path))
    twice = rows is None and can_be_read_twice(path)
    kept = None if twice else list(raw_rows(path) if rows is None else rows)

    def raw() -> Iterable[tuple[int, RawRow]]:
        return raw_rows(path) if kept is None else kept

    forms = {_form(row) for _, row in raw()}
    if "sets" in forms:
        items = _read(raw(), understood, _set, "prompt, chosen: lists, rejected: lists", on_bad_row, check)
        sizes = {(len(item.chosen), len(item.rejected)) for item in items}
        kind: Any = {frozenset({(1, 1)}): "pairs", frozenset({(NUM_STYLES, NUM_STYLES)}): "rm_bench"}
        return Questions(kind.get(frozenset(sizes), "best_of_n"), items)
    if "subset" in forms:
        return Questions("pairs", _read(raw(), understood, _pairs_of_subset, "pairs with subset", on_bad_row, check))
    preferences = read_preferences(path, on_bad_row, check, understood, rows=raw())
    return Questions("pairs", [Item(p.prompt, (p.chosen,), (p.rejected,)) for p in preferences])


def _form(raw: RawRow) -> str:
    try:
        row = as_object(raw)
    except ValueError:  # the reader says what is wrong with it
        return ""
    sides = [(row.get(key), _texts(row.get(key)) is not None) for key in ("chosen", "rejected")]
    # One list is enough; of lists written as text there must be two, since one may be an answer.
    if any(listed and isinstance(side, list) for side, listed in sides) or all(listed for _, listed in sides):
        return "sets"
    return "subset" if "subset" in row else "pairs"


def _read(
    raw: Iterable[tuple[int, RawRow]],
    understood: Understood,
    parse: Callable[[Json], list[Item]],
    form: str,
    on_bad_row: OnBadRow,
    check: Check | None,
) -> list[Item]:
    """The items of every row; a row of none is a tie."""

    def checked(row: Json) -> list[Item]:
        items = parse(row)
        for item in items:
            if check:
                check(item.prompt, (*item.chosen, *item.rejected))
        return items

    found: list[Item] = []
    for _, items in parsed_rows(understood, checked, on_bad_row, raw):
        understood.forms[form] += 1
        understood.used += bool(items)
        understood.ties += not items
        found += items
    finish(understood)
    return found


def _texts(value: Any) -> list[str] | None:
    """A list of texts, also as the JSON text that a table holds; None for anything else."""
    if isinstance(value, str) and value.startswith('["'):
        try:
            value = parsed_json(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


def _set(row: Json) -> list[Item]:
    texts = []
    for key in ("chosen", "rejected"):
        found = _texts(row.get(key))
        if not found:
            raise ValueError(f"{key!r} must be a list of texts, as in other rows of the file")
        if not all(text.strip() for text in found):
            raise ValueError(f"{key!r} has an empty text")
        for text in found:
            check_text(text, key)
        texts.append(tuple(found))
    if len(texts[0]) == len(texts[1]) == 1 and texts[0][0].strip() == texts[1][0].strip():
        raise ValueError("'chosen' and 'rejected' are the same text, but for white space at their ends")
    return [Item(prompt_of(row), texts[0], texts[1], _subset(row))]


def _pairs_of_subset(row: Json) -> list[Item]:
    pairs = preferences_of(row)
    if not isinstance(pairs, list):
        raise ValueError("'subset' goes with pairs, not with single rated texts")
    return [Item(pair.prompt, (pair.chosen,), (pair.rejected,), _subset(row)) for pair in pairs]


def _subset(row: Json) -> str:
    """RM-Bench calls it `domain`."""
    return str(row.get("subset") or row.get("domain") or "")
