"""Config files as people write them: what YAML 1.1 would make of a word, aliases, and files that are none."""

import os
from pathlib import Path
from typing import Any

import pytest

from poise.cli.main import main, parse_config
from poise.errors import PoiseError
from poise.reward.config import ScoreConfig
from poise.runtime.config_files import load_config_file
from poise.toy.config import Config as Toy

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}]\n" for old, new in zip("abcd", "bcde", strict=False)
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *[(word, word) for word in ("010", "1:30", "12:30:00", "0x10", "0b11", "1_000", "2001-01-01", "1e-3", "+5")],
        *[("5", 5), ("-5", -5), ("0", 0), ("0.25", 0.25), ("1.0e-05", 1e-05), ("yes", True), ("~", None)],
        ("&m lm\nagain: *m", "lm"),
    ],
)  # fmt: skip
def test_a_word_is_what_it_looks_like(written: str, read: Any, file: Path) -> None:
    file.write_text(f"value: {written}\n")
    found = load_config_file(file)["value"]
    assert found == read
    assert isinstance(found, type(read))


@pytest.mark.parametrize("written", ["007", "1_0", "1.50", "2001-1-1", "0x1f", "12:30:00", "1e3", "5"])
def test_text_stays_as_it_was_written(written: str, file: Path) -> None:
    file.write_text(f"reward: r\nfile: f\noutput: {written}\n")
    assert parse_config(ScoreConfig, "poise score", [f"--config={file}"]).output == written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, r"line 2: *a stands for a list or for settings; write them out"),
        ("x: &x [*x]\n", "*x stands for a list"),
        ("seed: 1\nseed: 2\n", "line 2: 'seed' is there twice"),
        ("a: 1\n\tb: 2\n", r"line 2: found character '\t' that cannot start any token; indent by spaces"),
        ("1: 2\n", "1 is no name of one"),
        ("null: 2\n", "None is no name of one"),
        ("num_seed: 1\n", "does not know: num_seed; did you mean num_seeds?"),
        ("num-seeds: 1\n", "did you mean num_seeds?"),
        ("".join(f"x{i}: 1\n" for i in range(9)), "x0, x1, x2, x3, x4 and 4 more"),
        ("preferences: p\nhead_loss: crps\nnum_heads: 5\n", "head_loss, preferences; it is of `poise train-reward`"),
        ("num_seeds: 010\n", "must be a whole number: num_seeds cannot be '010'"),
        ("output: no\n", "output cannot be False; YAML reads yes, no, on and off so: put quotes around them"),
        ("output: !!binary eA==\n", "must be text: output cannot be b'x'"),
        ("num_seeds: " + "9" * 6000 + "\n", "must be a whole number: num_seeds cannot be '999"),
        (b"seed: \xe9\n", "it is no UTF-8 text, at byte 6; save it as UTF-8"),
        (b"# " + b"x" * 2**20, "it is larger than a file of settings can be"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(
    text: str | bytes, reason: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["toy", "--config", str(file), "--output", str(file.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert said.count("cannot read") <= 1
    assert not (file.parent / "out").exists()


def test_a_run_folder_and_a_pipe_that_nobody_writes_into(file: Path) -> None:
    file.write_text("seed: 1\n")
    with pytest.raises(PoiseError, match=r"Is a directory; name the file in it: .*config\.yaml"):
        load_config_file(file.parent)
    os.mkfifo(file.parent / "pipe")
    with pytest.raises(PoiseError, match="holds no settings"):
        load_config_file(file.parent / "pipe")


def test_a_byte_order_mark_is_no_part_of_a_name_and_none_is_null(file: Path) -> None:
    file.write_bytes("\ufeffmax_kl: None\nprompts: p\nreward: r\n".encode())
    from poise.policy.config import Config

    assert parse_config(Config, "poise train-policy", ["--config", str(file)]).max_kl is None
    file.write_text("num_seeds: 3\n")
    assert parse_config(Toy, "poise toy", ["--config", str(file), "--num-seeds", "4"]).num_seeds == 4
