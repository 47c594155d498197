"""What a file asks of a reward model: pairs, RM-Bench rows, or best-of-n sets, by what its rows look like.

    any form that `read_preferences` reads           pairs
    prompt, chosen, rejected: lists of three texts   RM-Bench: one content in the styles concise, detailed, markdown
    prompt, chosen, rejected: other lists of texts   sets: the best text should be a chosen one

Every form may carry `subset`, or `domain` as RM-Bench calls it.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from poise.data.conversations import check_text, prompt_of
from poise.data.files import RawRow, as_object, can_be_read_twice, parsed_json, raw_rows
from poise.data.groups import components
from poise.data.nested_rows import after_history
from poise.data.preferences import iter_preferences, preferences_of
from poise.data.rows import Check, OnBadRow, Understood, finish, parsed_rows
from poise.data.types import Prompt, Sample
from poise.runtime.run_folder import Json

NUM_STYLES = 3  # of RM-Bench
LEAST_UNITS = 20  # functional.statistics.FEW, whose module imports scipy
_LISTS = "prompt, chosen: lists, rejected: lists"


class Item(NamedTuple):
    """Every chosen text should beat every rejected one. A pair has one of each."""

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str = ""


Kind = Literal["pairs", "rm_bench", "best_of_n"]


@dataclass(frozen=True)
class Questions:
    """What a file asks, without its texts: these are read again by whoever iterates over `items`.

    sizes: how many chosen and how many rejected texts an item has.
    lengths: characters of every text, item by item, the chosen ones first.   subset: of each item.
    unit: items of one prompt (votes on one pair, pairs of a ranking) have the same number: they are not independent.
    With fewer than LEAST_UNITS prompts, or where a few have nearly all items, only those that share a text of one
    prompt have; and where chains of texts link all to fewer, only those of equal texts. linked: is that so?
    """

    kind: Kind
    items: Iterable[Item]
    sizes: Int[ndarray, "items 2"]
    lengths: Int[ndarray, " texts"]
    subset: list[str]
    unit: Int[ndarray, " items"]
    linked: bool = False

    @classmethod
    def of(cls, kind: Kind | None, items: Iterable[Item], first: Iterable[Item] | None = None) -> "Questions":
        """Of items that may be iterated over several times.

        kind: None for lists of texts, whose lengths decide.   first: the items, where their first reading is another.
        """
        sizes, lengths, same, starts, asked = (array("q") for _ in range(5))
        links: list[tuple[int, int]] = []
        subset: list[str] = []
        numbers: dict[bytes, int] = {}
        texts: dict[bytes, int] = {}
        prompts: dict[bytes, int] = {}
        names: dict[str, str] = {}
        for item in items if first is None else first:
            sizes.extend((len(item.chosen), len(item.rejected)))
            lengths.extend(len(text) for text in (*item.chosen, *item.rejected))
            subset.append(names.setdefault(item.subset, item.subset))
            own = sorted((*item.chosen, *item.rejected))
            same.append(numbers.setdefault(_digest([item.prompt, own]), len(numbers)))
            asked.append(prompts.setdefault(_digest(item.prompt), len(prompts)))
            first_text, *others = (texts.setdefault(_digest([item.prompt, text]), len(texts)) for text in own)
            starts.append(first_text)
            links += [(first_text, other) for other in others]
        counts = np.array(sizes, dtype=int).reshape(-1, 2)
        if kind is None:
            found = {(int(chosen), int(rejected)) for chosen, rejected in np.unique(counts, axis=0)}
            alike: dict[frozenset[tuple[int, int]], Kind] = {
                frozenset({(1, 1)}): "pairs", frozenset({(NUM_STYLES, NUM_STYLES)}): "rm_bench"
            }  # fmt: skip
            kind = alike.get(frozenset(found), "best_of_n")
        unit, linked = np.array(asked, dtype=int), False
        # Prompts of n_p items each are worth (sum n_p)^2 / sum n_p^2 of one size (Kish 1965).
        if len(unit) ** 2 < LEAST_UNITS * np.square(np.bincount(unit)).sum():
            unit = components(links, len(texts))[np.array(starts, dtype=int)]
            if linked := len(np.unique(unit)) < min(LEAST_UNITS, len(numbers)):
                unit = np.array(same, dtype=int)
        unit = np.unique(unit, return_inverse=True)[1]  # without gaps
        return cls(kind, items, counts, np.array(lengths, dtype=int), subset, unit, linked)

    def __len__(self) -> int:
        return len(self.subset)

    def samples(self) -> Iterator[Sample]:
        """Every text: item by item, the chosen ones first."""
        for item in self.items:
            for text in (*item.chosen, *item.rejected):
                yield Sample(item.prompt, text)

    def some(self, numbers: Collection[int]) -> dict[int, Item]:
        """The items of these numbers, counted from 0."""
        wanted = set(numbers)
        return {number: item for number, item in enumerate(self.items) if number in wanted} if wanted else {}


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class _Reread:
    """The items of a file, read whenever they are iterated over."""

    read: Callable[[Understood, Check | None], Iterator[Item]]
    path: str
    check: Check | None

    def __iter__(self) -> Iterator[Item]:
        yield from self.read(Understood(self.path, silent=True), self.check)


def read_questions(
    path: str,
    on_bad_row: OnBadRow,
    check: Check | None = None,
    understood: Understood | None = None,
    *,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> Questions:
    """Pairs, RM-Bench rows or best-of-n sets, by what the rows look like. Pairs of a `subset` may repeat.

    check, understood, rows: as `read_preferences` takes them. The rows of a FIFO are kept in memory.
    """
    twice = rows is None and can_be_read_twice(path)
    kept = None if twice else list(raw_rows(path) if rows is None else rows)

    def raw() -> Iterable[tuple[int, RawRow]]:
        return raw_rows(path) if kept is None else kept

    forms = {_form(row) for _, row in raw()}
    parse, form = (_set, _LISTS) if "sets" in forms else (_pairs_of_subset, "pairs with subset")

    def read(understood: Understood, check: Check | None) -> Iterator[Item]:
        if forms & {"sets", "subset"}:
            yield from _read(raw(), understood, parse, form, on_bad_row, check)
        else:
            for pair in iter_preferences(path, on_bad_row, check, understood, rows=raw()):
                yield Item(pair.prompt, (pair.chosen,), (pair.rejected,))

    # With "error" the first reading has found every row that a check refuses.
    again = _Reread(read, path, None if on_bad_row == "error" else check)
    kind: Kind | None = None if "sets" in forms else "pairs"
    return Questions.of(kind, again, read(understood or Understood(str(path)), check))


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
) -> Iterator[Item]:
    """The items of every row; a row of none is a tie."""

    def checked(row: Json) -> list[Item]:
        items = parse(row)
        for item in items:
            if check:
                check(item.prompt, (*item.chosen, *item.rejected))
        return items

    for _, items in parsed_rows(understood, checked, on_bad_row, raw):
        understood.forms[form] += 1
        understood.used += bool(items)
        understood.ties += not items
        yield from items
    finish(understood)


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
    return [Item(prompt_of(after_history(row)), texts[0], texts[1], _subset(row))]


def _pairs_of_subset(row: Json) -> list[Item]:
    pairs = preferences_of(row)
    if not isinstance(pairs, list):
        raise ValueError("'subset' goes with pairs, not with single rated texts")
    return [Item(pair.prompt, (pair.chosen,), (pair.rejected,), _subset(row)) for pair in pairs]


def _subset(row: Json) -> str:
    """RM-Bench calls it `domain`."""
    return str(row.get("subset") or row.get("domain") or "")
