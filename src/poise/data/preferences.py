"""Preferences, prompts and samples as people have them: reading, checking, and saying what is wrong.

Files: JSON lines (also .gz), Parquet, CSV; a folder saved by `datasets`; or a data set's hub id (its `train` split).

A preference row is any of
    prompt, chosen, rejected            text, or conversations (lists of {"role", "content"})
    chosen, rejected                    the prompt is what the two share: an implicit prompt
    prompt, response_1, response_2, annotators
                                        one vote per annotator: 1, 2, or anything else for a tie
    prompt, responses, ratings          lists: of each two responses, the higher rated one is chosen
    prompt, completion, rating          the same, one response a row; rows of one prompt are taken together
The first two may carry `margin` (by how much the rewards should differ, >= 0) and `score_chosen`, `score_rejected`
(equal scores are a tie); any may carry `source`.
Transcripts of the form "\\n\\nHuman: … \\n\\nAssistant: …" (HH-RLHF) become conversations wherever text may stand.
"""

import csv
import gzip
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from poise.data.types import Preference, Prompt, Sample
from poise.errors import PoiseError, first_line
from poise.runtime.progress import console
from poise.runtime.quiet import quiet_loading
from poise.runtime.run_folder import write_jsonl

Row = TypeVar("Row")
Turns = list[dict[str, str]]
OnBadRow = Literal["error", "skip"]


def read_preferences(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Preference]:
    """Every preference of a file, folder or hub id; ties and repeated rows are left out and counted aloud."""
    read = read_rows(path, preferences_of, on_bad_row)
    rows = [row for row in read if not isinstance(row, _Rated)]
    rows += _by_prompt([row for row in read if isinstance(row, _Rated)])
    decided = [row for row in rows if row]
    # Votes repeat a pair on purpose; the same row twice is an accident that would leak from training to validation.
    distinct = {json.dumps([asdict(vote) for vote in row], sort_keys=True): row for row in decided}
    ties, repeats = len(rows) - len(decided), len(decided) - len(distinct)
    if ties or repeats:
        console.print(f"{path}: {ties} rows in which nobody preferred either and {repeats} repeated ones left out")
    if not distinct:
        raise PoiseError(f"{path} has no usable row")
    return [vote for row in distinct.values() for vote in row]


def read_prompts(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Prompt]:
    """Rows with a `prompt`: text or a conversation."""
    return read_rows(path, prompt_of, on_bad_row)


def read_samples(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Sample]:
    """Rows of `prompt`, `completion`."""
    return read_rows(path, lambda row: Sample(prompt_of(row), _text(row, "completion")), on_bad_row)


def write_preferences(path: Path, preferences: list[Preference]) -> None:
    """As `read_preferences` reads them."""
    write_jsonl(path, [asdict(preference) for preference in preferences])


# ---- rows from anywhere ----


def read_rows(path: str | Path, parse: Callable[[dict[str, Any]], Row], on_bad_row: OnBadRow) -> list[Row]:
    """Every row, parsed.

    A bad row raises PoiseError with file:line and the reason; with on_bad_row="skip" it is set aside, with its
    reason, in FILE.bad.jsonl, and counted aloud.
    """
    rows: list[Row] = []
    bad: list[dict[str, Any]] = []
    for number, raw in raw_rows(Path(path)):
        try:
            rows.append(parse(as_object(raw)))
        except ValueError as error:
            if on_bad_row == "error":
                raise PoiseError(f"{path}:{number}: {error} (--on-bad-row skip sets bad rows aside)") from None
            bad.append({"line": number, "reason": str(error), "row": str(raw)})
    if bad:
        beside = Path(path) if Path(path).is_file() else Path(Path(path).name)
        aside = beside.with_suffix(".bad.jsonl")
        write_jsonl(aside, bad)
        console.print(f"{path}: {len(bad)} bad rows of {len(bad) + len(rows)} set aside in {aside}")
    if not rows:
        raise PoiseError(f"{path} has no usable row")
    return rows


def raw_rows(path: Path) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """(line number in the file, JSON text or ready row); blank lines are passed over."""
    try:
        if path.is_dir():
            yield from enumerate(_data_set(path), 1)
        elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix:
            yield from enumerate(_hub_data_set(str(path)), 1)
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                yield from enumerate(csv.DictReader(file), 2)  # line 1 is the header
        else:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8") as lines:
                yield from ((number, line.rstrip("\n")) for number, line in enumerate(lines, 1) if line.strip())
    except FileNotFoundError:
        raise PoiseError(f"no such file: {path}") from None
    except PoiseError:
        raise
    except (OSError, ValueError, EOFError, csv.Error) as error:  # Arrow's errors are ValueErrors
        raise PoiseError(f"cannot read {path}: {first_line(error)}") from None


def _data_set(folder: Path) -> Iterator[dict[str, Any]]:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise PoiseError(
                f"{folder} has the splits {', '.join(loaded)} and no `train`; give the folder of one split"
            )
        loaded = loaded["train"]
    yield from loaded


def _hub_data_set(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    with quiet_loading():
        try:
            loaded = datasets.load_dataset(name, split="train")
        except Exception as error:  # noqa: BLE001  the hub client raises a dozen kinds
            raise PoiseError(f"no such file, and no data set of the hub: {name} ({type(error).__name__})") from None
    yield from loaded


def as_object(raw: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    try:
        row = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    return row


# ---- what a row may look like ----


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key!r}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} must be text, not {type(row[key]).__name__}")
    if not row[key].strip():
        raise ValueError(f"{key!r} is empty")
    return row[key]


def _turns(value: Any, key: str) -> Turns | None:
    """The turns of a conversation or a transcript; None for plain text."""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        spoken = zip(parts[::2], parts[1::2], strict=True)
        turns = [{"role": roles[who], "content": said.strip()} for who, said in spoken]
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    if not isinstance(value, list):
        return None
    for turn in value:
        if not isinstance(turn, dict) or set(turn) < {"role", "content"} or not isinstance(turn["content"], str):
            raise ValueError("a conversation is a list of {'role': …, 'content': text}")
    if not value:
        raise ValueError(f"{key!r} is an empty conversation")
    return value


def prompt_of(row: dict[str, Any]) -> Prompt:
    return _turns(row.get("prompt"), "prompt") or _text(row, "prompt")


@dataclass(frozen=True)
class _Rated:
    """One rated response of a prompt, to be compared with the prompt's others."""

    prompt: Prompt
    response: str
    rating: float
    source: str


def preferences_of(row: dict[str, Any]) -> list[Preference] | _Rated:
    """The preferences of a row: one, one per vote, one per two ratings; or a rating that waits for others."""
    source = str(row.get("source") or "")
    margin = _number(row, "margin") if row.get("margin") is not None else 0.0
    if margin < 0:
        raise ValueError(f"'margin' must be at least 0, not {margin}")
    if "rating" in row and "chosen" not in row:
        key = "completion" if "completion" in row else "response"
        return _Rated(prompt_of(row), _text(row, key), _number(row, "rating"), source)
    if "ratings" in row and "responses" in row:
        if not isinstance(row["ratings"], list) or not isinstance(row["responses"], list):
            raise ValueError("'responses' and 'ratings' must be lists")
        if len(row["ratings"]) != len(row["responses"]):
            raise ValueError(f"{len(row['responses'])} responses but {len(row['ratings'])} ratings")
        return _ranked(
            [
                _Rated(
                    prompt_of(row),
                    _text({"responses": text}, "responses"),
                    _number({"ratings": rating}, "ratings"),
                    source,
                )
                for text, rating in zip(row["responses"], row["ratings"], strict=True)
            ]
        )
    if "annotators" in row:
        first, second = (_text(row, key) for key in ("response_1", "response_2"))
        order = {1: (first, second), 2: (second, first)}
        votes = [order[vote] for vote in row["annotators"] if vote in order]
        pairs = [(prompt_of(row), chosen, rejected) for chosen, rejected in votes]
    else:
        pairs = [] if _scored_equal(row) else [_pair(row)]
    for _, chosen, rejected in pairs:
        if chosen == rejected:
            raise ValueError("'chosen' and 'rejected' are the same text")
        if not chosen.strip() or not rejected.strip():
            raise ValueError(f"{'rejected' if chosen.strip() else 'chosen'!r} is empty")
    return [Preference(prompt, chosen, rejected, source, margin) for prompt, chosen, rejected in pairs]


def _number(row: dict[str, Any], key: str) -> float:
    try:
        number = float(row[key])
    except (TypeError, ValueError):
        raise ValueError(f"{key!r} must be a number, not {row[key]!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{key!r} is {number}")
    return number


def _scored_equal(row: dict[str, Any]) -> bool:
    """Do the scores beside a pair call it a tie? ValueError if they contradict it."""
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return False
    chosen, rejected = _number(row, "score_chosen"), _number(row, "score_rejected")
    if chosen < rejected:
        raise ValueError(f"'chosen' has the lower score: {chosen} against {rejected}")
    return chosen == rejected


def _ranked(rated: list[_Rated]) -> list[Preference]:
    """Of each two responses the higher rated one is chosen; equal ratings and equal texts say nothing."""
    return [
        Preference(better.prompt, better.response, worse.response, better.source)
        for one, other in itertools.combinations(rated, 2)
        if one.rating != other.rating and one.response != other.response
        for better, worse in [(one, other) if one.rating > other.rating else (other, one)]
    ]


def _by_prompt(rated: list[_Rated]) -> list[list[Preference]]:
    """Ranked responses of each prompt that has several. A response rated twice counts with its mean rating."""
    prompts: dict[str, dict[str, list[_Rated]]] = {}
    for row in rated:
        prompts.setdefault(json.dumps(row.prompt), {}).setdefault(row.response, []).append(row)
    return [
        _ranked([replace(rows[0], rating=sum(row.rating for row in rows) / len(rows)) for rows in responses.values()])
        for responses in prompts.values()
    ]


def _pair(row: dict[str, Any]) -> tuple[Prompt, str, str]:
    prompt: Prompt | None = prompt_of(row) if row.get("prompt") is not None else None
    one, other = (_turns(row.get(key), key) for key in ("chosen", "rejected"))
    if one is None or other is None:
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if prompt is None:
            # Not in the middle of a word: "a good film" and "a gory one" share "a ", not "a g".
            cut = chosen.rfind(" ", 0, _shared(chosen, rejected)) + 1
            if not cut:
                raise ValueError("no 'prompt', and 'chosen' and 'rejected' share no beginning")
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        return prompt, chosen, rejected
    shared = _shared(one, other)
    if prompt is None:
        prompt = one[:shared]
    if len(one) != shared + 1 or len(other) != shared + 1 or not prompt:
        raise ValueError("'chosen' and 'rejected' must be one conversation that differs in its last turn only")
    return prompt, one[-1]["content"], other[-1]["content"]


def _shared(one: Any, other: Any) -> int:
    """Length of the common beginning of two texts or lists."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
