"""`poise data`: the report says what the commands will read, and is quick."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from poise.cli.main import main

ROWS = [
    {"prompt": "Review.", "chosen": "good", "rejected": "bad"},
    {"prompt": "Review.", "chosen": "good", "rejected": "bad"},
    {"prompt": "Review.", "chosen": "same", "rejected": "same "},
    {"prompt": "Review.", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
    {"chosen": "a fine film", "rejected": "a dull film"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_report_counts_every_row(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(file), "--json", "--show", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "preferences"
    assert report["rows"] == {"read": 5, "used": 2, "ties": 1, "repeated": 1, "refused": 1}
    assert report["forms"] == {"prompt, chosen, rejected": 3, "chosen, rejected": 1}
    assert report["bad_rows"][0]["line"] == 3
    assert report["examples"] == [{"prompt": "Review.", "chosen": "good", "rejected": "bad"}]
    assert "share" in report["assumed"][0]["what"]
    assert list(file.parent.iterdir()) == [file]  # nothing is written


def test_the_text_names_bad_rows_and_assumptions(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(file)]) == 0
    out = capsys.readouterr().out
    assert "5 read: 2 used, 1 ties, 1 repeated, 1 refused" in out
    assert "refused   line 3: 'chosen' and 'rejected' are the same text" in out
    assert "e.g. line 5: 'a ', then 'fine film'" in out
    assert "chosen    'good'" in out


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "p"}, "prompts"),
        ({"prompt": "p", "completion": "c"}, "samples"),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]}, "questions"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "subset": "s"}, "questions"),
    ],
)
def test_a_files_kind_is_recognized(
    tmp_path: Path, row: dict[str, object], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("oops\n" + json.dumps(row) + "\n")
    assert main(["data", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["rows"]["used"], report["rows"]["refused"]) == (kind, 1, 1)


def test_a_file_without_a_usable_row_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": 3}\n')
    assert main(["data", str(path)]) == 2
    shown = capsys.readouterr()
    assert "line 1: 'prompt' must be text, not int" in shown.out
    assert "has no usable row" in shown.err
    assert main(["data", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_rows_as_the_model_reads_them(file: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(file), "--model", tiny_model, "--max-length", "9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["truncated"]["texts"] == 4
    assert report["truncated"]["truncated"] > 0
    assert "the oldest" in report["examples"][0]["chosen"]
    assert "good" in report["examples"][0]["chosen"]


def test_pairs_that_the_model_reads_as_one_text_are_counted(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "Say.", "chosen": f"One {end}", "rejected": f"Two {end}"} for end in ("a" * 40, "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", str(path), "--model", tiny_model, "--max-length", "32"]) == 0
    assert "1 rows are left out in training: their texts are then the same" in capsys.readouterr().out


def test_a_look_without_a_model_imports_no_torch(file: Path) -> None:
    program = (
        "import sys; from poise.cli.main import main; main(['data', sys.argv[1]])\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_of_many_bad_rows_the_first_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("oops\n" * 8 + '{"prompt": "p", "completion": "c"}\n')
    assert main(["data", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("refused   line ") == 5
    assert "refused   … and 3 more" in out
    assert f"next:   poise score RUN {path} --on-bad-row skip\n" in out  # without it the command would end at line 1
    assert "(without the 8 refused rows; or correct them first)" in out
    path.write_text('{"prompt": "p", "completion": "c"}\n')
    assert main(["data", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"next:   poise score RUN {path}\n")


def test_a_conversation_is_shown_turn_by_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": turns}) + "\n")
    assert main(["data", str(path)]) == 0
    assert "  prompt    system: 'Be brief.'\n  prompt    user: 'Hi\\n'" in capsys.readouterr().out


def test_a_file_without_any_object_is_read_as_preferences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("oops\n[1]\n")
    assert main(["data", str(path)]) == 2
    shown = capsys.readouterr()
    assert f"{path}: preferences" in shown.out
    assert "2 read: 0 used, 0 ties, 0 repeated, 2 refused" in shown.out


@pytest.mark.parametrize("kind", ["preferences", "questions", "samples", "prompts"])
def test_a_missing_file_of_a_named_kind_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(tmp_path / "none.jsonl"), "--kind", kind]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("poise: no such file")
    assert shown.out == ""


def test_prompts_as_the_model_reads_them(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "Hi"}\n')
    assert main(["data", str(path), "--model", tiny_model, "--max-length", "4"]) == 0
    out = capsys.readouterr().out
    assert "tokens    1 of 1 texts are longer than 4" in out
    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    assert "prompt    «21 tokens, the oldest 17 left out» 'ant\\n'" in out
