"""Readers are total: whatever a file holds, each row is used, counted or named; and every format numbers its lines."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.data.evaluation_sets import read_questions
from poise.data.files import raw_rows
from poise.data.preferences import preferences_of, read_preferences, read_prompts, read_samples
from poise.data.rows import Understood
from poise.data.types import Preference, Prompt, Sample
from poise.errors import PoiseError

ROWS = [{"prompt": f"p{i}", "chosen": f"a é {i}", "rejected": "b"} for i in range(3)]
EXPECTED = [Preference(**row) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def U(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def A(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- files ----


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json.gz", "x"])
def test_the_content_decides_how_a_file_is_read(
    tmp_path: Path, encoding: str, compress: Callable[[bytes], bytes], name: str
) -> None:
    path = tmp_path / name
    for text in (LINES, LINES.replace("\n", "\r\n"), json.dumps(ROWS), json.dumps(ROWS, indent=1)):
        path.write_bytes(compress(text.encode(encoding)))
        assert read_preferences(path) == EXPECTED


def test_tables_of_any_separator_are_read_with_long_cells_and_blank_margins(tmp_path: Path) -> None:
    long = "word " * 60_000
    path = tmp_path / "x.csv"
    for separator in (",", ";", "\t"):
        for mark in ("", "\ufeff"):
            path.write_text(
                mark + separator.join(["prompt", "chosen", "rejected", "margin"]) + "\r\n"
                + separator.join([f'"{long}"', '"a\n\nA"', "b", ""]) + "\r\n"
                + separator.join(["q", "c", "d", "0.5"]) + "\r\n",
                encoding="utf-8",
                newline="",
            )  # fmt: skip
            assert read_preferences(path) == [
                Preference(long, "a\n\nA", "b"),
                Preference("q", "c", "d", margin=0.5),
            ]


def test_a_margin_that_parquet_lacks_is_zero(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "margin": margin} for row, margin in zip(ROWS, (0.5, float("nan"), None), strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [p.margin for p in read_preferences(tmp_path / "x.parquet")] == [0.5, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("x.jsonl", LINES + "\n\n{\n", 6, "not JSON"),
        ("x.jsonl", LINES.encode() + b'{"prompt": "\xe9"}\n', 4, "not UTF-8: byte 0xe9"),
        ("x.csv", 'prompt,chosen,rejected\n"a\nb",c,d\n\ne,f,f\n', 5, "the same text"),
        ("x.csv", "prompt,chosen,rejected\na,b,c\ne,f\n", 3, "2 cells, and the header has 3"),
        ("x.csv", b"prompt,chosen,rejected\na,b,c\ne,\xe9,g\n", 3, "not UTF-8: byte 0xe9"),
        ("x.csv", 'prompt,chosen,rejected\na,b,c\ne,"f,g\nh,i,j\n', 3, "never closed"),
        ("x.csv", "prompt,chosen,chosen\na,b,c\n", 1, "names 'chosen' twice"),
        (
            "x.json",
            json.dumps([*ROWS, ROWS[0] | {"prompt": 3}], indent=0),
            17,
            "must be text, not int",
        ),
        ("x.json", json.dumps([*ROWS, 7], indent=0), 17, "a JSON object was expected, not int"),
        ("x.json", json.dumps(ROWS, indent=0)[:-1], 17, "is not closed"),
        ("x.json", json.dumps(ROWS, indent=0) + "\n3", 18, "text after the end"),
        ("x.json", json.dumps(ROWS, indent=0).replace('"p2"', "p2"), 13, "not JSON"),
        ("x.json", json.dumps(ROWS, indent=0).replace("},\n", "}\n"), 7, "a comma was expected"),
    ],
)
def test_faults_are_named_by_line_in_every_format(
    tmp_path: Path, name: str, content: str | bytes, line: int, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PoiseError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_damaged_archives_are_one_line(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    import random

    whole = compress(random.Random(0).randbytes(4000).hex().encode())
    cut, altered = whole[:-20], whole[:60] + b"\0\0\0\0" + whole[64:]
    for content in (cut,) if compress is zstd else (cut, altered):  # zstd has a checksum only if asked for one
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(PoiseError) as caught:
            list(raw_rows(tmp_path / "x"))
        assert str(caught.value).startswith(f"cannot read {tmp_path / 'x'}: ")
        assert "\n" not in str(caught.value)


def test_a_fifo_is_read_once(tmp_path: Path) -> None:
    for content, read in ((LINES, read_preferences), (LINES, read_prompts), (json.dumps(ROWS), read_preferences)):
        path = tmp_path / "fifo"
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_text, args=(content,))
        writer.start()
        assert len(read(path)) == 3  # type: ignore[operator]
        writer.join()
        path.unlink()
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(LINES,))
    writer.start()
    assert len(read_questions(str(path), "error")) == 3
    writer.join()


def test_a_long_array_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"prompt": "é" * 90_000, "chosen": f"a{i}", "rejected": "b"} for i in range(20)]))
    assert [p.chosen for p in read_preferences(path)] == [f"a{i}" for i in range(20)]


def test_readers_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, pkgutil, importlib, poise.data\n"
        "for module in pkgutil.iter_modules(poise.data.__path__):\n"
        "    importlib.import_module(f'poise.data.{module.name}')\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- conversations ----


SHAREGPT = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}]
CONVERSATION = [{"role": "system", "content": "Be kind."}, U("Hi")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (SHAREGPT, CONVERSATION),
        (json.dumps(CONVERSATION), CONVERSATION),
        (str(CONVERSATION), CONVERSATION),
        (json.dumps(SHAREGPT), CONVERSATION),
        (U("Hi"), [U("Hi")]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [U("Hi")]),
        ([{"role": "user", "content": "Hi", "name": None}], [U("Hi")]),
        ("\r\n\r\nHuman: Hi\r\n\r\nAssistant:", [U("Hi")]),
        ("Human: Hi\n\nAssistant: Yes\n\nHuman: Go on\n\nAssistant:", [U("Hi"), A("Yes"), U("Go on")]),
        ("Human: what is this?", "Human: what is this?"),
        ("[1, 2] what next?", "[1, 2] what next?"),
    ],
)
def test_forms_of_conversations_are_read_alike(tmp_path: Path, prompt: Any, expected: Prompt) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "completion": "c"}))
    assert read_samples(path) == [Sample(expected, "c")]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"from": "Ann", "value": "Hi"}], "is from 'Ann'"),
        ([{"from": "human"}], "a conversation is a list of"),
        ([{"content": "Hi", "name": "Ann"}], "a conversation is a list of"),
        ([{"role": "user", "content": None}], "must have text, not NoneType"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "must have text beside its tool calls"),
        ([{"role": "user", "content": [{"type": "image"}]}], "something other than text"),
        ([{"role": 3, "content": "Hi"}], "has no role"),
        (['{"role": "user"}'], "a conversation is a list of"),
        ('[{"role": "user", "content": oops}]', "cannot be read as one"),
        ([U("half \ud83d face")], "lone surrogate U+D83D at character 6"),
    ],
)
def test_faults_of_conversations_are_named(tmp_path: Path, turns: Any, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": turns}) + "\n")
    with pytest.raises(PoiseError, match=rf"x\.jsonl:1: .*{reason.replace('+', '.')}"):
        read_prompts(path)


# ---- parts that agree, and parts that do not ----


def pair(prompt: Any, before: list[dict[str, str]]) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [*before, A("yes")], "rejected": [*before, A("no")]}


S = {"role": "system", "content": "Be kind."}
TALK = [U("Hi"), A("Hello"), U("Go on")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (pair("Go on", TALK), TALK),
        (pair("Hi", [S, U("Hi")]), [S, U("Hi")]),
        (pair("Hi", [A("Hello"), U("Go on")]), TALK),
        (pair("Hi", [S]), [S, U("Hi")]),
        (pair([U("Hi")], [A("Hello"), U("Go on")]), TALK),
        (pair([U("Hi")], TALK), TALK),
        (pair(TALK, TALK), TALK),
        (pair(TALK, [U("Go on ")]), TALK),
        (pair([S, *TALK], TALK), [S, *TALK]),
        (pair(TALK, [S, *TALK]), [S, *TALK]),
        (pair("\n\nHuman: Hi\n\nAssistant:", [U("Hi")]), [U("Hi")]),
    ],
)
def test_every_shared_turn_is_read_once(row: dict[str, Any], prompt: Prompt) -> None:
    assert preferences_of(row) == [Preference(prompt, "yes", "no")]


@pytest.mark.parametrize(
    "row",
    [
        pair("Bye", TALK),
        pair([U("Bye")], TALK),
        pair([{**S, "content": "Be rude."}, *TALK], [S, *TALK]),
        {"prompt": "Hi", "chosen": [A("yes")], "rejected": "no"},
        {"prompt": "Hi", "chosen": "yes", "rejected": [A("no")]},
        {"chosen": [U("Hi"), U("yes")], "rejected": [U("Hi"), U("no")]},
        {"chosen": [A("yes")], "rejected": [A("no")]},
        {"question": "Is it good?", "chosen": "a good one", "rejected": "a bad one"},
        {"prompt": "p", "chosen": "a", "rejected": "a \n"},
    ],
)
def test_parts_that_disagree_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        preferences_of(row)


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [
        ("[1, 1, 2]", "aab"), ("1", "a"), ("1, 2", "ab"), ("1 2;0", "ab"), (1, "a"), (["1", "2", "tie"], "ab"),
        ([1.0, None, 2], "ab"),
    ],
)  # fmt: skip
def test_votes_in_any_writing_are_read(votes: Any, chosen: str) -> None:
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "annotators": votes}
    found = preferences_of(row)
    assert isinstance(found, list)
    assert "".join(p.chosen for p in found) == chosen


@pytest.mark.parametrize("votes", [None, [[1]], "ab", ["response_1"], [True], True, {"1": 2}, "[1, "])
def test_votes_that_are_none(votes: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        preferences_of({"prompt": "p", "response_1": "a", "response_2": "b", "annotators": votes})


def test_what_is_assumed_is_said_once_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"chosen": "the film was good", "rejected": "the film was gory"},
        {"chosen": "the film was dull", "rejected": "the film was fun"},
        {"prompt": "Is tea hot?", "chosen": "Is tea hot? Yes.", "rejected": "Is tea hot? No."},
        {"prompt": "User: hi", "chosen": "a", "rejected": "b"},
        {"prompt": "5 + 5?", "chosen": "a", "rejected": "b", "tools": [{"type": "function"}], "images": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    understood = Understood(str(path))
    assert [p.prompt for p in read_preferences(path, understood=understood)][2] == "Is tea hot?"
    said = " ".join(capsys.readouterr().err.split())
    assert "2 rows have no 'prompt'; it is what chosen and rejected share, e.g. line 1: 'the film was '" in said
    assert "1 rows repeat the prompt in both texts; it is read once, e.g. line 3: 'Is tea hot?', then ' Yes.'" in said
    assert "read as plain text of one user turn, e.g. line 4: 'User: hi'" in said
    assert "1 rows have 'tools' beside the text, which no model is shown, e.g. line 5" in said
    assert "'images'" not in said
    assert understood.forms == {"chosen, rejected": 2, "prompt, chosen, rejected": 3}


def test_rows_that_a_check_refuses_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    def check(prompt: Prompt, answers: Any) -> None:
        if prompt == "p1":
            raise PoiseError(f"no template for {len(answers)} answers")

    path = tmp_path / "x.jsonl"
    path.write_text(LINES)
    for read, count in ((read_preferences, 2), (read_prompts, 0)):
        with pytest.raises(PoiseError, match=rf"x\.jsonl:2: no template for {count} answers"):
            read(path, "error", check)
        assert len(read(path, "skip", check)) == 2
    with pytest.raises(PoiseError, match=r"x\.jsonl:2: no template"):
        read_questions(str(path), "error", check)


def test_a_file_of_the_user_is_no_place_for_bad_rows(tmp_path: Path) -> None:
    path, aside = tmp_path / "x.jsonl", tmp_path / "x.bad.jsonl"
    path.write_text(LINES + "{}\n")
    for own in ("my own notes\n", LINES, '{"line": 3}\n'):
        aside.write_text(own)
        with pytest.raises(PoiseError, match=r"x\.bad\.jsonl, and that holds something else"):
            read_preferences(path, "skip")
        assert aside.read_text() == own
    aside.unlink()
    for _ in range(2):  # an own file is written again
        assert read_preferences(path, "skip") == EXPECTED
        assert json.loads(aside.read_text())["line"] == 4


# ---- anything at all ----

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=6),
    st.sampled_from(["\ud83d", "1", "[1, 2]", '["a"]', '[{"role": "user", "content": "x"}]', "\n\nHuman: x", "nan"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "text", "type", "a", "response", "rank", "rating"]),
        inner,
        max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip
KEYS = [
    "prompt", "chosen", "rejected", "completion", "response", "rating", "responses", "ratings", "annotators",
    "response_1", "response_2", "margin", "score_chosen", "score_rejected", "source", "subset", "messages", "domain",
    "winner", "response_a", "response_b", "response_0", "better_response_id", "preference_strength", "labels", "system",
    "human_ref_A", "human_ref_B", "score_A", "score_B", "completions", "answers", "scores", "ranks", "rating", "score",
    "chosen-rating", "rejected-rating", "instruction", "overall_preference", "response1", "response2", "helpfulness",
]  # fmt: skip
GOOD = st.sampled_from(
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "completion": "c", "rating": 1},
        {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]},
        {"prompt": "p", "response_1": "a", "response_2": "b", "annotators": [1, 2]},
        {"prompt": "p", "chosen": ["a"], "rejected": ["b"]},
        {"instruction": "p", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "rank": 2}]},
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        {"system": "s", "question": "p", "chosen": "a", "rejected": "b", "ratings": [1, 2], "responses": ["a", "b"]},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}], "score": 1},
        pair(TALK, TALK),
    ]
)
HOSTILE = st.builds(lambda good, bad: {**good, **bad}, GOOD, st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))


def one_line_of(read: Callable[..., Any], *arguments: Any) -> str | None:
    """The line with which a reader refuses a file, if it does; any other error is a fault."""
    try:
        read(*arguments)
    except PoiseError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


@pytest.mark.slow
@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(HOSTILE | VALUES, min_size=1, max_size=6))
def test_any_value_in_any_field_is_used_counted_or_named(tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "first"}, *rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def preferences(understood: Understood) -> None:
        read_preferences(path, "skip", understood=understood)

    def questions(understood: Understood) -> None:
        read_questions(str(path), "skip", understood=understood)

    for read in (preferences, questions):
        understood = Understood(str(path), silent=True)  # no bad rows on the disk, whose fsync takes most of the time
        said = one_line_of(read, understood)
        assert said is None or "no usable row" in said
        assert understood.num_rows == len(rows)
        assert understood.refused == len(understood.bad)
    for reading in (read_prompts, read_samples):
        one_line_of(reading, path, "error")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.parquet", "x.gz"]))
def test_any_bytes_end_in_rows_or_one_line(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    for start in (b"", b"\xff\xfe", b"[", b"prompt,chosen,rejected\n", b"\x1f\x8b\x08\x00", b"PAR1"):
        path.write_bytes(start + content)
        one_line_of(lambda: list(raw_rows(path)))
        one_line_of(read_preferences, path, "skip", None, Understood(str(path), silent=True))
