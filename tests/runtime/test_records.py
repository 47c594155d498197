"""Our own JSON files, read again: strict, typed, and one line for what is wrong; NaN is never written."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from poise.errors import PoiseError
from poise.runtime import records
from poise.runtime.run_folder import append_jsonl, keep_rows_before, write_json, write_jsonl
from poise.runtime.settings import WholeNumber, read_fields


@dataclass(frozen=True)
class Row:
    step: WholeNumber
    reward: float
    heads: tuple[float, ...] = ()
    kl: float | None = None


GOOD: dict[str, Any] = {"step": 1, "reward": 0.5, "heads": [1, 2.5], "kl": None, "more": {"of": "no matter"}}
WRONG: dict[str, Any] = {
    '{"step": 1': "not JSON",
    "[1]": "not a JSON object",
    '{"step": 1, "reward": NaN}': "NaN is no number",
    '{"step": 1, "reward": 1, "more": -Infinity}': "-Infinity is no number",
    '{"reward": 1}': "lacks 'step'",
    '{"step": 1.5, "reward": 1}': "step must be a whole number, got 1.5",
    '{"step": -1, "reward": 1}': "step must be at least 0, got -1",
    '{"step": true, "reward": 1}': "step must be a whole number",
    '{"step": 1, "reward": null}': "reward must be a finite number, got None",
    '{"step": 1, "reward": "1"}': "reward must be a finite number, got '1'",
    '{"step": 1, "reward": 1e999}': "reward must be a finite number, got inf",
    '{"step": 1, "reward": 1, "heads": [null]}': "heads must be a list whose items are a finite number",
    '{"step": 1, "reward": 1, "kl": "x"}': "kl must be a finite number",
    '{"a": ' * 100_000: "not JSON",
    "\udcff": "not JSON",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40].encode("ascii", "replace").decode())
def test_a_wrong_row_is_named_by_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + text + "\n" + json.dumps(GOOD) + "\n", errors="surrogateescape")
    rows = records.read_rows(path, Row)
    assert next(rows) == GOOD
    with pytest.raises(PoiseError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{path}:2")
    assert WRONG[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40].encode("ascii", "replace").decode())
def test_a_wrong_object_is_named_by_its_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(PoiseError) as caught:
        records.read_object(path, Row)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(GOOD))
    assert records.read_object(path, Row) == GOOD


def test_of_other_projects_files_infinities_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert records.read_object(path, strict=False) == {"time_step_limit": [0.0, math.inf]}


@pytest.mark.parametrize("cut", range(1, len(json.dumps(GOOD)) + 2))
def test_a_last_line_cut_anywhere_is_left_out_or_whole(cut: int, tmp_path: Path) -> None:
    path, line = tmp_path / "metrics.jsonl", json.dumps(GOOD) + "\n"
    path.write_text(line + line[:cut])
    whole = cut >= len(line) - 1
    assert list(records.read_rows(path, Row)) == [GOOD] * (1 + whole)
    append_jsonl(path, [GOOD])  # what is left of the line is cut off, so the next one begins where it began
    assert list(records.read_rows(path, Row)) == [GOOD] * (2 + (cut == len(line)))
    assert path.read_text() == line * (2 + (cut == len(line)))


def test_a_long_part_of_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "text": "' + "x" * 200_000)
    append_jsonl(path, [{"step": 1}])
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    path.write_text("x" * 200_000)
    append_jsonl(path, [{"step": 1}])
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_written(value: float, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [{"step": 0}, {"step": 1, "heads": [1.0, value]}]
    for write in (write_jsonl, append_jsonl):
        with pytest.raises(PoiseError, match=r"results.json, row 2: heads, number 2 is .*nothing is written"):
            write(path, rows)
    with pytest.raises(PoiseError, match=r"results.json: models: brme: nll is .*nothing is written"):
        write_json(path, {"models": {"brme": {"nll": value}}})
    assert not path.exists()


def test_an_undefined_statistic_is_null_on_purpose(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, records.undefined_as_none({"std": math.nan, "interval": (0.5, math.nan), "name": "a", "n": 3}))
    assert json.loads(path.read_text()) == {"std": None, "interval": [0.5, None], "name": "a", "n": 3}
    with pytest.raises(PoiseError, match="is inf"):  # an infinity is no undefined statistic
        write_json(path, records.undefined_as_none({"std": math.inf}))


def test_rows_without_a_step_cannot_be_dropped_by_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"reward": 1}\n')
    with pytest.raises(PoiseError, match=r"metrics.jsonl:2 lacks 'step'"):
        keep_rows_before(path, 1)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with path.open("wb") as file:
        file.truncate(2**30)  # takes no space
    with pytest.raises(PoiseError, match=r"^cannot read .*results.json: it is larger than such a file can be$"):
        records.read_object(path)


@pytest.mark.parametrize("saved", [None, [1], "text"])
def test_a_part_of_a_file_that_is_no_object_is_one_line(saved: object) -> None:
    with pytest.raises(PoiseError, match=r"^the state must be an object, got "):
        records.checked(saved, Row, "the state")
    with pytest.raises(PoiseError, match=r"^the state must be an object, got "):
        read_fields(saved, Row, "the state")


def test_rows_are_appended_to_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    append_jsonl(path, [GOOD])
    assert list(records.read_rows(path, Row)) == [GOOD]
