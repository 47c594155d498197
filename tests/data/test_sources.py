"""Rows that come from no file of the user's: in memory, from a folder that `datasets` saved, from the hub."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from poise.data.files import as_object, can_be_read_twice, is_hub_id, num_rows, raw_rows
from poise.data.in_memory import as_file, as_row
from poise.data.preferences import read_row
from poise.data.ratings import number_of
from poise.errors import PoiseError

ROWS = [{"prompt": "a", "score": 1.0}, {"prompt": "b", "score": math.nan}]
READ = [(1, {"prompt": "a", "score": 1.0}), (2, {"prompt": "b", "score": None})]  # NaN is how a table says "missing"


# ---- how many ----


def test_rows_are_counted_without_being_read_where_that_is_cheap(tmp_path: Path) -> None:
    lines, array, table = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.parquet"
    lines.write_text("\n".join(["", '{"prompt": "a"}', "", '{"prompt": "b"}', ""]))
    array.write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS * 50).to_parquet(table)
    assert [num_rows(path) for path in (lines, array, table, tmp_path, "owner/name", "/dev/stdin")] == [
        4, None, 100, None, None, None
    ]  # fmt: skip
    assert max(number for number, _ in raw_rows(lines)) == num_rows(lines)


# ---- in memory ----


@pytest.mark.parametrize("data", [ROWS, datasets.Dataset.from_list(ROWS), (row for row in ROWS)])
def test_rows_in_memory_become_the_file_that_readers_know(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "run" / "train.jsonl"
    assert as_file(data, path) == str(path)
    assert [(number, as_object(raw)) for number, raw in raw_rows(path)] == READ


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("rows.jsonl", Path("rows.jsonl")):
        assert as_file(name, tmp_path / "train.jsonl") == "rows.jsonl"
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_may_come_again_and_others_may_not(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    as_file(ROWS, path)
    as_file(ROWS, path)
    before = path.read_bytes()
    with pytest.raises(PoiseError, match="was begun with another train; choose another output"):
        as_file(ROWS[:1], path)
    assert path.read_bytes() == before


def test_a_prompt_stands_for_its_row_where_prompts_are_asked_for(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    path = tmp_path / "prompts.jsonl"
    as_file(["Hi", turns], path, "prompt")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"prompt": "Hi"}, {"prompt": turns}]
    for row, column in (("Hi", ""), (3, "prompt"), (None, "prompt")):
        with pytest.raises(PoiseError, match=rf"row 7 of rows is of type {type(row).__name__}; a mapping of columns"):
            as_row(row, 7, "rows", column)
    assert as_row({1: "x"}, 1, "rows") == {"1": "x"}


# ---- folders of `datasets`, and the hub ----


def test_a_saved_data_set_is_read_and_of_several_splits_the_training_one(tmp_path: Path) -> None:
    rows, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list([{"prompt": "c", "score": 0.0}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": other, "train": rows}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"dev": rows, "test": other}).save_to_disk(tmp_path / "neither")
    assert list(raw_rows(tmp_path / "one")) == READ
    assert list(raw_rows(tmp_path / "both")) == READ
    with pytest.raises(PoiseError, match="has the splits dev, test and no `train`; give the folder of one split"):
        list(raw_rows(tmp_path / "neither"))
    datasets.DatasetDict({"train": rows.select([]), "test": rows}).save_to_disk(tmp_path / "empty")
    with pytest.raises(PoiseError, match="has no row, or a split without one"):
        list(raw_rows(tmp_path / "empty"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(PoiseError, match="is a folder that `datasets` did not save; name a file"):
        list(raw_rows(tmp_path / "mine"))


CLASSES = [
    {"prompt": "p", "response_a": "A", "response_b": "B", "winner": "model_b", "votes": [{"by": "x"}]},
    {"prompt": "q", "response_a": "A", "response_b": "B", "winner": None, "votes": [{"by": "y"}]},
]


@pytest.mark.parametrize("form", ["folder", "formatted", "parquet", "arrow", "memory"])
def test_a_class_is_read_by_its_name(form: str, tmp_path: Path) -> None:
    """Its number is the place of the name in a list: 1 is no answer A here."""
    kinds = {name: datasets.Value("string") for name in ("prompt", "response_a", "response_b")}
    kinds["winner"] = datasets.ClassLabel(names=["tie", "model_b", "model_a"])
    kinds["votes"] = datasets.List({"by": datasets.ClassLabel(names=["y", "x"])})
    rows = datasets.Dataset.from_list(CLASSES, features=datasets.Features(kinds))
    path = tmp_path / "rows"
    if form == "parquet":
        rows.to_parquet(path)
    elif form == "memory":
        as_file(rows, tmp_path / "out" / "rows.jsonl")
        path = tmp_path / "out" / "rows.jsonl"
    else:
        (rows.with_format("numpy") if form == "formatted" else rows).save_to_disk(path)
        path = next(path.glob("*.arrow")) if form == "arrow" else path
    found = [as_object(row) for _, row in raw_rows(path)]
    assert found == CLASSES
    assert type(found[0]["prompt"]) is str
    assert read_row(found[0]).found[0].chosen == "B"  # type: ignore[index]


def test_a_saved_data_set_that_lost_a_part_says_which(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(PoiseError, match=r"one is not whole, as `datasets` saved it: .*data-00001-of-00002"):
        list(raw_rows(tmp_path / "one"))


def test_a_name_on_the_hub_is_loaded_and_what_goes_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name.startswith("nobody"):
            raise ConnectionError("two\nlines")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(raw_rows("somebody/pairs")) == READ
    with pytest.raises(
        PoiseError, match=r"^no such file, and no data set of the hub: nobody/pairs \(ConnectionError\)$"
    ):
        list(raw_rows("nobody/pairs"))
    assert asked == [("somebody/pairs", "train"), ("nobody/pairs", "train")]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "Unknown split \"train\". Should be one of ['train_prefs', 'test_prefs'].",
            r"\(Unknown split \"train\". Should be one of \['train_prefs', 'test_prefs'\].\); save the part",
        ),
        (
            "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']",
            r"\(Config name is missing. Please pick one among the available configs: \['a', 'b'\]\); save",
        ),
    ],
)
def test_a_data_set_on_the_hub_without_a_split_to_train_on_names_those_it_has(
    monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    def load(name: str, split: str) -> None:  # noqa: ARG001
        raise ValueError(error)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(PoiseError, match=f"^the hub's somebody/pairs has no plain `train` split {said}"):
        list(raw_rows("somebody/pairs"))


def test_only_owner_and_name_without_a_suffix_mean_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pairs").write_text("")
    found = {name: is_hub_id(Path(name)) for name in ("a/b", "a/b.jsonl", "a/b/c", "pairs", "mine/pairs", "a b/c")}
    assert [name for name, hub in found.items() if hub] == ["a/b"]


def test_what_flows_by_cannot_be_read_twice(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    assert can_be_read_twice(file)
    assert can_be_read_twice(tmp_path)
    assert not can_be_read_twice("/dev/stdin")
    assert not can_be_read_twice("somebody/pairs")


# ---- numbers ----


@pytest.mark.parametrize(("value", "number"), [(2, 2.0), ("3.5", 3.5), (" 1 ", 1.0), (-1e300, -1e300)])
def test_a_rating_may_be_a_number_or_its_text(value: object, number: float) -> None:
    assert number_of({"rating": value}, "rating") == number


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "must be a number, not True"), ("good", "must be a number, not 'good'"),
        (None, "must be a number, not None"),
        ([1], r"must be a number, not \[1\]"), (10**400, "is too large a number"), ("inf", "is inf"), ("nan", "is nan"),
    ],
)  # fmt: skip
def test_a_rating_that_is_no_finite_number_is_named(value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"'rating' {said}"):
        number_of({"rating": value}, "rating")
