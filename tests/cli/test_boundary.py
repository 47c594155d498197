"""The boundary: every error is one line and a documented exit status; text of others is shown as text."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from poise.cli.boundary import exit_status
from poise.cli.main import main
from poise.errors import PoiseError
from poise.runtime import progress
from poise.studies import quickstart


def failing_with(error: BaseException) -> object:
    def run(_: object) -> None:
        raise error

    return run


def foreign_error() -> Exception:
    import yaml

    try:
        yaml.safe_load("a: [")
    except yaml.YAMLError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PoiseError("a\nb"), "a\\nb"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "r/.a.html.poise-host-7"), "r/a.html: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "/x: Not a directory"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "what read this output has ended"),
        (json.JSONDecodeError("Expecting value", "", 0), "a file is not JSON"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not UTF-8 text: invalid start byte"),
        (foreign_error(), "yaml: ParserError"),
        (RecursionError(), "nested too deeply"),
        (MemoryError(), "out of memory"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "the package x is not installed"),
        (ModuleNotFoundError("No module", name="uvicorn"), 'uvicorn is not installed: pip install "poise-rlhf[serve]"'),
    ],
)
def test_trouble_of_input_and_machine_is_one_line(
    error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # a pipe that broke is replaced; here it is pytest's
    monkeypatch.setattr(quickstart, "run", failing_with(error))
    assert main(["quickstart"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("poise: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("together", "status"), [(True, 2), (False, 1)])
def test_the_end_of_another_process_is_no_fault_of_this_one(
    together: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("poise.cli.boundary.several", lambda: together)
    monkeypatch.setattr(quickstart, "run", failing_with(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")))
    assert main(["quickstart"]) == status
    assert ("poise: another process of this run has ended" in capsys.readouterr().err) == together


def test_a_fault_of_ours_says_where_its_traceback_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(quickstart, "run", failing_with(KeyError("of ours")))
    assert main(["quickstart"]) == 1
    err = capsys.readouterr().err
    [file] = tmp_path.iterdir()
    assert str(file) in err
    assert err.count("\n") == 1
    assert "KeyError: 'of ours'" in file.read_text()
    monkeypatch.setenv("POISE_DEBUG", "1")
    assert main(["quickstart"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_the_traceback_of_bad_input_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POISE_DEBUG", "1")
    assert main(["nonsense"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["[/b]", "[bold]x", "a\x1b[31mb", "\u202egnp.x", "\ud800"])
def test_names_that_break_messages(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-reward", "--preferences", f"{name}.jsonl"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("poise: no such file: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert "\u202e" not in err
    progress.console.print(f"reading {name}")
    shown = capsys.readouterr().err
    assert name in shown if name.isprintable() else "\\" in shown
    assert "\x1b" not in shown
    with progress.progress(f"reading {name}", 1) as advance:
        advance(note=name)


def test_an_output_that_is_a_file_or_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, preferences_file: Path, tiny_model: str
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for output in (taken, taken / "below"):
        command = ["train-reward", "--preferences", str(preferences_file), "--model", tiny_model]
        assert main([*command, "--output", str(output)]) == 2
        err = capsys.readouterr().err
        assert err.count("poise: ") == 1
        assert "taken" in err
    assert taken.read_text() == "mine"


def test_a_closed_stderr_loses_the_line_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    progress.console.print("lost")
    with progress.progress("lost", 2) as advance:
        advance()
    assert exit_status(PoiseError("lost")) == 2
    monkeypatch.setattr(sys, "stderr", None)
    progress.console.print("lost")
    assert exit_status(PoiseError("lost")) == 2


def test_without_a_stdout_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0


def test_a_stdout_that_is_no_file_is_written_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["--version"]) == 0
    assert sys.stdout.getvalue().startswith("poise 0.")  # type: ignore[attr-defined]


def test_a_reader_that_has_ended_is_no_traceback() -> None:
    program = "import sys; from poise.cli.main import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == "poise: what read this output has ended; nothing more is written there\n"
