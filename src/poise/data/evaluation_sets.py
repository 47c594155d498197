"""What a file asks of a reward model: pairs, RM-Bench rows, or best-of-n sets, by what its rows look like.

    any form that `read_preferences` reads           pairs
    prompt, chosen, rejected: lists of three texts   RM-Bench: one content in the styles concise, detailed, markdown
    prompt, chosen, rejected: other lists of texts   sets: the best text should be a chosen one

Every form may carry `subset`, or `domain` as RM-Bench calls it.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from poise.data.preferences import OnBadRow, as_object, preferences_of, prompt_of, raw_rows, read_preferences, read_rows
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
        return np.unique(np.array(texts), return_inverse=True)[1].astype(int)


def read_questions(path: str, on_bad_row: OnBadRow) -> Questions:
    """Pairs, RM-Bench rows or best-of-n sets, by what the rows look like. Pairs of a `subset` may repeat."""
    raw = _whole_rows(path)
    if any(_is_texts(row.get("chosen")) or _is_texts(row.get("rejected")) for row in raw):
        items = read_rows(path, _set, on_bad_row)
        sizes = {(len(item.chosen), len(item.rejected)) for item in items}
        kind: Any = {frozenset({(1, 1)}): "pairs", frozenset({(NUM_STYLES, NUM_STYLES)}): "rm_bench"}
        return Questions(kind.get(frozenset(sizes), "best_of_n"), items)
    if any("subset" in row for row in raw):
        return Questions("pairs", [item for items in read_rows(path, _pairs_of_subset, on_bad_row) for item in items])
    preferences = read_preferences(path, on_bad_row)
    return Questions("pairs", [Item(p.prompt, (p.chosen,), (p.rejected,)) for p in preferences])


def _whole_rows(path: str) -> list[Json]:
    """Every row that can be read at all; `read_rows` says what is wrong with the others."""
    rows = []
    for _, raw in raw_rows(Path(path)):
        try:
            rows.append(as_object(raw))
        except ValueError:
            continue
    return rows


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _set(row: Json) -> Item:
    texts = []
    for key in ("chosen", "rejected"):
        if not _is_texts(row.get(key)) or not row[key]:
            raise ValueError(f"{key!r} must be a list of texts, as in other rows of the file")
        if not all(text.strip() for text in row[key]):
            raise ValueError(f"{key!r} has an empty text")
        texts.append(tuple(row[key]))
    return Item(prompt_of(row), texts[0], texts[1], _subset(row))


def _pairs_of_subset(row: Json) -> list[Item]:
    pairs = preferences_of(row)
    if not isinstance(pairs, list):
        raise ValueError("'subset' goes with pairs, not with single rated texts")
    return [Item(pair.prompt, (pair.chosen,), (pair.rejected,), _subset(row)) for pair in pairs]


def _subset(row: Json) -> str:
    """RM-Bench calls it `domain`."""
    return str(row.get("subset") or row.get("domain") or "")
