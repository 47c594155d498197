"""Files as people have them: read right, or refused in one line that says what to do. No wrong reading goes unsaid."""

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from poise.data.evaluation_sets import read_questions
from poise.data.preferences import read_preferences, read_prompts, read_samples
from poise.data.types import Sample
from poise.errors import PoiseError

ROW = {"prompt": "Is tea hot?", "chosen": "Mostly.", "rejected": "Blue."}
TABLE = pyarrow.table({name: [text] for name, text in ROW.items()})
LINE = json.dumps(ROW)


def user(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def answer(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def as_stream(path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)


READ: dict[str, str | bytes | Callable[[Path], object]] = {
    "twice compressed.jsonl": gzip.compress(gzip.compress(LINE.encode())),
    "over several lines.jsonl": json.dumps(ROW, indent=1),
    "a mark at the beginning.jsonl": b"\xef\xbb\xbf" + LINE.encode(),
    "a feather.file": lambda path: pyarrow.feather.write_feather(TABLE, str(path)),
    "a stream.arrow": as_stream,
    "bars.csv": "prompt|chosen|rejected\nIs tea hot?|Mostly.|Blue.\n",
    "of Excel.csv": "sep=;\r\nprompt;chosen;rejected\r\nIs tea hot?;Mostly.;Blue.\r\n",
    "spaces.csv": 'prompt, chosen, rejected\n"Is tea hot?", "Mostly.", Blue.\n',
    "blank lines first.csv": "\n\nprompt,chosen,rejected\n\nIs tea hot?,Mostly.,Blue.\n",
    "the same twice.jsonl": LINE.replace("{", '{"prompt": "Is tea hot?", '),
}


def written(folder: Path, name: str, content: str | bytes | Callable[[Path], object]) -> str:
    path = folder / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", READ)
def test_it_is_read(tmp_path: Path, name: str) -> None:
    [found] = read_preferences(written(tmp_path, name, READ[name]))
    assert (found.prompt, found.chosen, found.rejected) == tuple(ROW.values())


def test_files_with_marks_one_after_another(tmp_path: Path) -> None:
    other = json.dumps({**ROW, "prompt": "Is ice hot?"})
    assert len(read_preferences(written(tmp_path, "both.jsonl", f"{LINE}\n\ufeff{other}\n"))) == 2


def two_columns_of_one_name(path: Path) -> None:
    columns = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 4, ["prompt", "chosen", "chosen", "rejected"])
    pyarrow.parquet.write_table(columns, path)


def archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as file:
        file.add(__file__, "inside")


REFUSED: dict[str, tuple[str | bytes | Callable[[Path], object], str]] = {
    "twice.jsonl": ('{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n', ":1: 'chosen' is there twice"),
    "twice.json": ('[{"prompt": "a",\n"chosen": "b", "chosen": "c", "rejected": "d"}]', "'chosen' is there twice"),
    "twice.parquet": (two_columns_of_one_name, "column 'chosen' twice"),
    "two.jsonl": (f"{LINE}{LINE}", ":1: not JSON: Extra data at column 68; a line holds one object"),
    "archive.tar.gz": (archive, "zero bytes"),
    "utf16.jsonl": (LINE.encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "old.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file; save the table as CSV"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull` fetches it"),
    "page.jsonl": ("<!DOCTYPE html><html>", "it is a web page"),
    "code.pkl": (b"\x80\x04]\x94.", "a pickle, which is never loaded"),
    "table.jsonl": ("prompt,chosen,rejected\na,b,c\n", ":1: a table, by its first line; name it .csv or .tsv"),
    "header.csv": ("\n\nprompt,chosen,chosen\na,b,c\n", ":3: the header names 'chosen' twice"),
    "cells.csv": ("sep=;\nprompt;chosen;rejected\na;b\n", ":3: 2 cells, and the header has 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    with pytest.raises(PoiseError) as caught:
        read_preferences(written(tmp_path, name, content))
    assert reason in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_standard_input_by_its_name() -> None:
    with pytest.raises(PoiseError, match=r"no such file: - \(standard input is /dev/stdin\)"):
        read_prompts("-")


@pytest.mark.parametrize(
    ("asks", "answers"), [("User", "ASSISTANT"), ("human", "gpt"), ("USER ", "model"), ("Human", "Bot")]
)
def test_roles_have_many_names(tmp_path: Path, asks: str, answers: str) -> None:
    """A template writes any role into its markers: a turn of the "User" would be one of a stranger."""
    row = {"prompt": [user("Hi", asks)], "chosen": [answer("a", answers)], "rejected": [answer("b", answers)]}
    [found] = read_preferences(written(tmp_path, "roles.jsonl", json.dumps(row)))
    assert found.prompt == [user("Hi")]
    others = {"prompt": [user("Be kind.", "developer"), user("Hi", "narrator")]}
    [prompt] = read_prompts(written(tmp_path, "others.jsonl", json.dumps(others)))
    assert [turn["role"] for turn in prompt if isinstance(turn, dict)] == ["developer", "narrator"]


def refused(tmp_path: Path, read: Callable[[str], Any], row: dict[str, Any], reason: str) -> None:
    with pytest.raises(PoiseError, match=reason):
        read(written(tmp_path, "row.jsonl", json.dumps(row)))


def test_what_is_empty_or_ambiguous_is_refused(tmp_path: Path) -> None:
    for prompt in ([user("")], [user(" "), answer("")], [{"role": "user", "content": []}]):
        refused(tmp_path, read_prompts, {"prompt": prompt}, ":1: 'prompt' is empty: no turn has text")
    votes = {"prompt": "a", "response_a": "x", "response_b": "y", "winner": 0}
    refused(tmp_path, read_preferences, votes, "'winner' is 0, which may be a tie or response_a")
    same = {"prompt": "a", "chosen": ["x"], "rejected": ["x "]}
    refused(tmp_path, lambda path: read_questions(path, "error"), same, "are the same text")


def test_samples_under_other_names(tmp_path: Path) -> None:
    whole = {"messages": [user("Hi"), answer("Hello.")]}
    [sample] = read_samples(written(tmp_path, "whole.jsonl", json.dumps(whole)))
    assert sample == Sample([user("Hi")], "Hello.")
    refused(tmp_path, read_samples, {"messages": [user("Hi")]}, "'messages' ends in a turn of the user")
    refused(tmp_path, read_samples, {"messages": [answer("Hi")]}, "an answer to nothing")
    refused(tmp_path, read_samples, {"prompt": "a", "response": "b"}, "but 'response'; rename it to 'completion'")


def test_a_prompt_that_was_answered_already_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": [user("Hi"), answer("Hello.")]}
    read_prompts(written(tmp_path, "answered.jsonl", json.dumps(row)))
    said = " ".join(capsys.readouterr().err.split())
    assert "1 rows have a prompt that ends in a turn of the assistant; the answer comes after it, e.g. line 1:" in said
