"""`poise data`: what a file was understood to hold, before anything is trained on it."""

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import tyro

from poise.data.evaluation_sets import read_questions
from poise.data.files import RawRow, as_object, is_hub_id, raw_rows
from poise.data.other_forms import in_our_columns
from poise.data.preferences import iter_samples, read_preferences, read_prompts
from poise.data.rows import Check, Understood
from poise.data.types import Prompt
from poise.data.verdicts import two_answers
from poise.errors import PoiseError
from poise.models.model_folder import check_tokenizer
from poise.runtime.hub import on_hub
from poise.runtime.settings import Count, Settings, WholeNumber

Kind = Literal["preferences", "questions", "samples", "prompts"]
Shown = tuple[Prompt, dict[str, str]]  # a prompt, and its answers by name

_BAD_ROWS_SHOWN = 5


@dataclass(frozen=True)
class Config(Settings):
    """Print what a file of preferences, prompts, completions or evaluation sets was understood to hold.

    Every form that is read is in docs/data.md. Nothing is written, and without --model nothing heavy is loaded.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """JSON lines, a JSON array, CSV or Parquet (also compressed), a folder saved by `datasets`, or a hub id."""
    kind: Literal["auto", "preferences", "questions", "samples", "prompts"] = "auto"
    """What to read the file as; auto: by the columns of its first row. `questions` is what `evaluate-reward` reads."""
    model: str = ""
    """Model whose chat template and tokenizer the rows are shown through: a language model or a reward model."""
    max_length: Count = 1024
    """Longest sample in tokens, with --model; longer ones lose their oldest tokens."""
    show: WholeNumber = 3
    """Rows to show as the model reads them."""
    json: bool = False
    """Print one JSON object instead of text."""

    READ_WITH = MappingProxyType({"max_length": (lambda one: one.model, "--model")})

    def check(self) -> None:
        """As for every command; and the model is there."""
        super().check()
        if is_hub_id(Path(self.file)):
            on_hub(self.file, "dataset")
        if self.model:
            check_tokenizer(self.model)


def run(config: Config) -> None:
    """Print the report. Bad rows are part of it; PoiseError if no row can be used."""
    config.check()
    reader = _ModelReader(config.model, config.max_length) if config.model else None
    report = read_report(config, reader)
    print(json.dumps(report, indent=1) if config.json else as_text(report))
    if not report["rows"]["used"]:
        raise PoiseError(f"{config.file} has no usable row")
    if not config.json:
        refused = report["rows"]["refused"]
        skip = ["--on-bad-row", "skip"] if refused else []
        print(f"\nnext:   {shlex.join([*_following(report['kind'], config), *skip])}")
        if refused:
            print(f"        (without the {refused} refused rows; or correct them first)")


def _following(kind: str, config: Config) -> list[str]:
    """The command that reads such a file."""
    model = config.model or "MODEL"
    return {
        "preferences": ["poise", "train-reward", "--preferences", config.file, "--model", model],
        "questions": ["poise", "evaluate-reward", "--rewards", "RUN/single", "--file", config.file],
        "samples": ["poise", "score", "RUN", config.file],
    }.get(kind, ["poise", "train-policy", "--prompts", config.file, "--reward", "RUN", "--model", model])


def read_report(config: Config, reader: "_ModelReader | None" = None) -> dict[str, Any]:
    """What the file holds, as plain values."""
    understood = Understood(config.file, silent=True, bar=True)
    rows = raw_rows(config.file)
    kind, rows = (config.kind, rows) if config.kind != "auto" else _kind_of(rows)
    shown: list[Shown] = []
    try:
        for row in _read(kind, config.file, understood, rows, reader.check if reader else None):
            if reader:
                reader.count(row)
            if len(shown) < config.show:
                shown.append(row)
    except PoiseError:
        if understood.used or not understood.num_rows:
            raise
    report: dict[str, Any] = {
        "file": config.file,
        "kind": kind,
        "forms": dict(understood.forms),
        "rows": {
            "read": understood.num_rows, "used": understood.used, "ties": understood.ties,
            "repeated": understood.repeats, "refused": understood.refused,
        },
        "assumed": [{"what": what, "rows": n, "example": example} for what, (n, example) in understood.notes.items()],
        "bad_rows": [{"line": row["line"], "reason": row["reason"]} for row in understood.bad],
        "examples": [reader.shown(row) if reader else {"prompt": row[0], **row[1]} for row in shown],
    }  # fmt: skip
    if reader:
        report["truncated"] = {"max_length": reader.max_length, "texts": reader.texts, "truncated": reader.truncated}
        report["truncated"]["same"] = reader.alike if kind == "preferences" else 0
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal; texts are shown as Python writes them, so that white space is seen."""
    rows = report["rows"]
    forms = "; ".join(f"{name} ({count})" for name, count in report["forms"].items()) or "none"
    lines = [
        f"{report['file']}: {report['kind']}",
        f"  form      {forms}",
        f"  rows      {rows['read']} read: {rows['used']} used, {rows['ties']} ties, {rows['repeated']} repeated, "
        f"{rows['refused']} refused",
    ]
    lines += [f"  assumed   {note['rows']} rows {note['what']}, e.g. {note['example']}" for note in report["assumed"]]
    for row in report["bad_rows"][:_BAD_ROWS_SHOWN]:
        lines.append(f"  refused   line {row['line']}: {row['reason']}")
    if rows["refused"] > _BAD_ROWS_SHOWN:
        lines.append(f"  refused   … and {rows['refused'] - _BAD_ROWS_SHOWN} more")
    if cut := report.get("truncated"):
        lines.append(f"  tokens    {cut['truncated']} of {cut['texts']} texts are longer than {cut['max_length']}")
        if cut["same"]:
            lines.append(f"  tokens    {cut['same']} rows are left out in training: their texts are then the same")
    for number, example in enumerate(report["examples"], 1):
        lines += ["", f"row {number}"]
        for name, value in example.items():
            lines += [f"  {name:<9} {line}" for line in _shown_value(value)]
    return "\n".join(lines)


def _shown_value(value: Any) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [f"{turn['role']}: {turn['content']!r}" for turn in value]
    return [value if isinstance(value, str) and value.startswith("«") else repr(value)]


# ---- reading ----


def _kind_of(rows: Iterator[tuple[int, RawRow]]) -> tuple[Kind, Iterator[tuple[int, RawRow]]]:
    """What a file holds by its first row that is an object, and all of its rows."""
    seen = []
    for number, raw in rows:
        seen.append((number, raw))
        try:
            row = as_object(raw)
        except ValueError:
            continue
        try:
            row = in_our_columns(row)
        except ValueError:  # the reader says what is wrong with it
            return "preferences", itertools.chain(seen, rows)
        lists = isinstance(row.get("chosen"), list) and all(isinstance(text, str) for text in row["chosen"])
        kind: Kind = "prompts"
        if lists or ("subset" in row and "chosen" in row):
            kind = "questions"
        elif row.keys() & {"chosen", "rejected", "annotators", "responses", "rating"} or two_answers(row):
            kind = "preferences"
        elif row.keys() & {"completion", "completions"}:
            kind = "samples"
        return kind, itertools.chain(seen, rows)
    return "preferences", iter(seen)


def _read(
    kind: str, file: str, understood: Understood, rows: Iterator[tuple[int, RawRow]], check: Check | None
) -> Iterator[Shown]:
    if kind == "preferences":
        for pair in read_preferences(file, "skip", check, understood, rows=rows):
            yield pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected}
    elif kind == "questions":
        for item in read_questions(file, "skip", check, understood, rows=rows).items:
            sides = (("chosen", item.chosen), ("rejected", item.rejected))
            yield item.prompt, {f"{name} {i}": text for name, side in sides for i, text in enumerate(side, 1)}
    elif kind == "samples":
        for sample in iter_samples(file, "skip", check, understood, rows=rows):
            yield sample.prompt, {"completion": sample.completion}
    else:
        for prompt in read_prompts(file, "skip", check, understood, rows=rows):
            yield prompt, {}


class _ModelReader:
    """Rows as a model's template and tokenizer make them."""

    def __init__(self, model: str, max_length: int):
        from poise.models.formats import checkpoint_folder
        from poise.models.loading import load_tokenizer, resolve_model  # imports torch
        from poise.models.row_check import row_check

        self.tokenizer = load_tokenizer(resolve_model(checkpoint_folder(model)))
        self.check = row_check(self.tokenizer)
        self.max_length = max_length
        self.texts = self.truncated = self.alike = 0

    def count(self, row: Shown) -> None:
        """Count the row's texts, those that are too long, and rows of several texts that are then the same."""
        encoded = [ids for _, ids in self._encoded(row)]
        self.texts += len(encoded)
        self.truncated += sum(len(ids) > self.max_length for ids in encoded)
        read = {tuple(self._cut(ids)) for ids in encoded}
        self.alike += len(row[1]) > 1 and len(read) == 1

    def shown(self, row: Shown) -> dict[str, Any]:
        """{name of a text: what the model reads of it}: the decoded tokens after truncation."""
        found = {}
        for name, ids in self._encoded(row):
            read = self._cut(ids)
            cut = f", the oldest {len(ids) - len(read)} left out" if len(read) < len(ids) else ""
            found[name] = f"«{len(ids)} tokens{cut}» {self.tokenizer.decode(read)!r}"
        return found

    def _cut(self, ids: list[int]) -> list[int]:
        from poise.models.encoding import cut_from_the_left

        first, last = cut_from_the_left(self.tokenizer, ids, self.max_length)
        return [*first, *last]

    def _encoded(self, row: Shown) -> list[tuple[str, list[int]]]:
        from poise.models.chat_format import encode_conversation, encode_prompt

        prompt, answers = row
        if not answers:
            return [("prompt", encode_prompt(self.tokenizer, prompt))]
        encoded = ((name, encode_conversation(self.tokenizer, prompt, text)) for name, text in answers.items())
        return [(name, [*before, *after]) for name, (before, after) in encoded]
