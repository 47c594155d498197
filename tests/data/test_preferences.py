"""Reading what users have, and saying clearly what is wrong with it."""

import json
from pathlib import Path

import pytest

from poise.data import preferences as data
from poise.data.preferences import read_preferences, read_prompts
from poise.data.types import Preference, Sample
from poise.errors import PoiseError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b", "other": 3}'


def test_rows_as_they_come(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    path = write(tmp_path, GOOD, "", json.dumps({"prompt": turns, "chosen": "c", "rejected": "d", "source": "s"}))
    assert read_preferences(path) == [Preference("p", "a", "b"), Preference(turns, "c", "d", "s")]
    assert read_prompts(path) == ["p", turns]


def test_samples_are_read(tmp_path: Path) -> None:
    assert data.read_samples(write(tmp_path, '{"prompt": "p", "completion": "c"}')) == [Sample("p", "c")]


BAD = {
    "{oops": "not JSON: Expecting property name enclosed in double quotes at column 2",
    "[1]": "a JSON object was expected, not list",
    '{"prompt": "p", "chosen": "a"}': "no 'rejected'",
    '{"prompt": "p", "chosen": "a", "rejected": 3}': "'rejected' must be text, not int",
    '{"prompt": "p", "chosen": " ", "rejected": "b"}': "'chosen' is empty",
    '{"prompt": "p", "chosen": "a", "rejected": "a"}': "the same text",
    '{"prompt": [], "chosen": "a", "rejected": "b"}': "empty conversation",
    '{"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}': "a conversation is a list of",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_row_names_file_line_and_reason(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(PoiseError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert BAD[line] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_rows_can_be_set_aside_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD, *BAD)
    assert read_preferences(path, "skip") == [Preference("p", "a", "b")]
    aside = [json.loads(line) for line in (tmp_path / "rows.bad.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == list(range(2, 2 + len(BAD)))
    assert [row["row"] for row in aside] == list(BAD)
    assert f"{len(BAD)} bad rows of {len(BAD) + 1}" in " ".join(capsys.readouterr().err.split())


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="no such file"):
        read_preferences(tmp_path / "nothing.jsonl")
    with pytest.raises(PoiseError, match="no usable row"):
        read_preferences(write(tmp_path, ""))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PoiseError, match="cannot read"):
        read_preferences(tmp_path / "binary")


CONVERSATION = [{"role": "user", "content": "hi"}]


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVENTIONS = {
    "transcripts": (
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"},
        [Preference(CONVERSATION, " yes", " no")],
    ),
    "implicit transcripts": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        [Preference(CONVERSATION, "yes", "no")],
    ),
    "conversations": (
        {"prompt": CONVERSATION, "chosen": [reply("yes")], "rejected": [reply("no")]},
        [Preference(CONVERSATION, "yes", "no")],
    ),
    "implicit conversations": (
        {"chosen": [*CONVERSATION, reply("yes")], "rejected": [*CONVERSATION, reply("no")]},
        [Preference(CONVERSATION, "yes", "no")],
    ),
    "implicit text": (
        {"chosen": "the film was good", "rejected": "the film was gory"},
        [Preference("the film was ", "good", "gory")],
    ),
    "votes": (
        {"prompt": "p", "response_1": "a", "response_2": "b", "annotators": [1, 2, 0, 1]},
        [Preference("p", "a", "b"), Preference("p", "b", "a"), Preference("p", "a", "b")],
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_is_recognized(tmp_path: Path, name: str) -> None:
    row, expected = CONVENTIONS[name]
    assert read_preferences(write(tmp_path, json.dumps(row))) == expected


def test_conversations_that_part_before_the_last_turn_are_refused(tmp_path: Path) -> None:
    one, other = [*CONVERSATION, reply("a"), reply("b")], [*CONVERSATION, reply("c"), reply("d")]
    with pytest.raises(PoiseError, match="last turn only"):
        read_preferences(write(tmp_path, json.dumps({"chosen": one, "rejected": other})))


def test_ties_and_repeats_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tie = json.dumps({"prompt": "p", "response_1": "a", "response_2": "b", "annotators": [0, 0]})
    assert len(read_preferences(write(tmp_path, GOOD, tie, GOOD))) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 rows in which nobody preferred either and 1 repeated ones left out" in said


def test_other_formats_hold_the_same_rows(tmp_path: Path) -> None:
    import csv
    import gzip

    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"p{i}", "chosen": f"a, {i}", "rejected": "b"} for i in range(3)]
    expected = [Preference(**row) for row in rows]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    for name in ("x.csv", "x.jsonl.gz", "x.parquet", "folder", "splits"):
        assert read_preferences(tmp_path / name) == expected, name


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(PoiseError) as caught:
            read_preferences(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not (SHARED / "preferences").exists(), reason="the development data are not on this machine")
@pytest.mark.parametrize(
    ("name", "count"), [("hh_rlhf", 3737), ("pandalm_annotators", 999), ("ultrafeedback_sample", 1000)]
)
def test_real_preference_data_are_read_whole(name: str, count: int) -> None:
    preferences = read_preferences(SHARED / "preferences" / f"{name}.jsonl.gz", "skip")
    assert len(preferences) > 0.95 * count
    if name == "hh_rlhf":
        assert all(isinstance(p.prompt, list) and p.prompt[-1]["role"] == "user" for p in preferences)


# ---- margins, scores, ratings ----


def test_margins_are_kept(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5}
    assert read_preferences(write(tmp_path, json.dumps(row))) == [Preference("p", "a", "b", margin=1.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": -1}, "'margin' must be at least 0"),
        ({"margin": "far"}, "'margin' must be a number, not 'far'"),
        ({"margin": float("nan")}, "'margin' is nan"),
        ({"score_chosen": 3, "score_rejected": 4}, "'chosen' has the lower score: score_chosen 3 against 4"),
        ({"score_chosen": float("nan"), "score_rejected": 4}, "'score_chosen' is nan"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path: Path, changes: dict, message: str) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", **changes}
    with pytest.raises(PoiseError, match=message):
        read_preferences(write(tmp_path, json.dumps(row)))


def test_equal_scores_are_a_tie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 4}
    assert read_preferences(write(tmp_path, json.dumps(row), GOOD)) == read_preferences(write(tmp_path, GOOD))
    assert "1 rows in which nobody preferred either" in " ".join(capsys.readouterr().err.split())


def test_ratings_become_pairs_of_different_ratings(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": ["low", "high", "mid", "mid too"], "ratings": [1, 5, 3.0, 3]}
    pairs = {(p.chosen, p.rejected) for p in read_preferences(write(tmp_path, json.dumps(row)))}
    assert pairs == {("high", "low"), ("mid", "low"), ("mid too", "low"), ("high", "mid"), ("high", "mid too")}


def test_ratings_one_a_row_are_compared_within_their_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "good", "rating": 4},
        {"prompt": "q", "response": "alone", "rating": 5},
        {"prompt": "p", "completion": "bad", "rating": 1},
        {"prompt": "p", "completion": "twice", "rating": 1},
        {"prompt": "p", "completion": "twice", "rating": 4},  # two raters: 2.5 on average
    ]
    found = {(p.prompt, p.chosen, p.rejected) for p in read_preferences(write(tmp_path, *map(json.dumps, rows)))}
    assert found == {("p", "good", "bad"), ("p", "good", "twice"), ("p", "twice", "bad")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "responses": ["a", "b"], "ratings": [1]}, "2 responses but 1 ratings"),
        ({"prompt": "p", "responses": ["a", "b"], "ratings": [1, float("nan")]}, "'ratings' is nan"),
        ({"prompt": "p", "responses": "ab", "ratings": [1, 2]}, "must be lists"),
        ({"prompt": "p", "completion": "a", "rating": None}, "'rating' must be a number"),
    ],
)
def test_bad_ratings_are_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(PoiseError, match=message):
        read_preferences(write(tmp_path, json.dumps(row)))


def test_data_of_one_class_have_no_preference(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "p", "completion": f"c{i}", "rating": 3}) for i in range(4)]
    with pytest.raises(PoiseError, match="no usable row"):
        read_preferences(write(tmp_path, *rows))
