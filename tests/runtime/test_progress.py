"""Progress where no bar is seen, and stopping at the end of a step."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from poise.runtime import progress as module
from poise.runtime.progress import finish_the_step, progress, shown_if_long


def test_a_pipe_gets_lines_while_a_stage_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress("GRPO on mean", 3, 1) as advance:
        advance(1, "reward +0.50")
        assert capsys.readouterr().err == "GRPO on mean 2/3 reward +0.50\n"
    assert "2/3" in capsys.readouterr().err  # where the stage ends, as before
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 60.0)
    with progress("GRPO on mean", 3) as advance:
        advance(1, "reward +0.50")
        assert "reward" not in capsys.readouterr().err


def on_a_terminal(script: str) -> str:
    """What a Python script shows on a terminal, less its control sequences."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 65536):
                shown += part
        except OSError:  # what Linux says at the end of a terminal
            pass
    os.close(leader)
    assert process.returncode == 0
    return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()


def test_a_terminal_shows_the_bar_while_it_moves_and_what_is_printed_above_it() -> None:
    shown = on_a_terminal(
        "import sys, time\n"
        "from poise.runtime.progress import console, progress\n"
        "with progress('PPO', 100) as advance:\n"
        "    advance(30, 'reward +0.50'); time.sleep(0.4)\n"
        "    console.print('a sentence of ours'); print('of another', file=sys.stderr)\n"
        "    advance(30, 'reward +0.75'); time.sleep(0.4)\n"
    )
    at = [shown.index(text) for text in ("30/100", "a sentence of ours", "of another", "60/100")]
    assert at == sorted(at), shown
    assert "reward +0.50" in shown


def test_a_notebook_gets_a_bar_that_needs_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.console, "is_jupyter", True)
    with progress("PPO on mean", 4, 1) as advance:
        advance(3, "reward +0.50")
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("PPO on mean: 100%")
    assert "4/4" in shown
    assert "reward +0.50" in shown
    assert "\x1b" not in shown
    with module.parts_of_another(), progress("features", 4) as advance:
        advance(4)
    assert not capsys.readouterr().err


def test_a_long_loop_gets_a_bar_and_a_short_one_none() -> None:
    script = (
        "import time\n"
        "from poise.runtime import progress as module\n"
        "module._SECONDS_WITHOUT_BAR = {}\n"
        "with module.progress('features', 8):\n"
        "    for item in module.shown_if_long('tokens', 'abcdefgh', lambda: 8): time.sleep(0.1)\n"
    )
    long, short = on_a_terminal(script.format(0.2)), on_a_terminal(script.format(60))
    assert re.search("tokens .*[4-7]/8", long), long
    assert "tokens" not in short
    assert "features" in short


def test_the_bar_of_a_reader_ends_before_its_error_is_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f'{{"prompt": "p {i}", "chosen": "a", "rejected": "b"}}\n' for i in range(40)))
    shown = on_a_terminal(
        "import time\n"
        "from poise.data.preferences import read_preferences\n"
        "from poise.errors import PoiseError\n"
        "from poise.runtime import progress as module\n"
        "module._SECONDS_WITHOUT_BAR = 0.1\n"
        "def check(prompt, answers):\n"
        "    time.sleep(0.02)\n"
        "    if prompt == 'p 30': raise ValueError('refused')\n"
        f"try: read_preferences({str(file)!r}, check=check)\n"
        "except PoiseError as error: module.console.print(str(error)); time.sleep(0.5)\n"
    )
    assert re.search("reading mine.jsonl .*3[01]/40", shown), shown
    after = shown[shown.index("refused") :]
    assert "reading" not in after, shown


def test_a_long_loop_yields_everything_once_and_counts_by_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_SECONDS_WITHOUT_BAR", -1.0)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    rows = [(1, "a"), (4, "b"), (9, "c")]  # blank lines lie between
    assert list(shown_if_long("reading", rows, lambda: 12, lambda row: row[0])) == rows
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()[:2]] == ["4/12", "9/12"]
    assert list(shown_if_long("reading", "abc", lambda: None)) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines()[:2] == ["reading 2", "reading 3"]
    assert not list(shown_if_long("reading", [], lambda: pytest.fail("asked for nothing")))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_request_is_noted_and_the_second_obeyed(
    first: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), finish_the_step() as asked_to_stop:  # noqa: PT012
        assert not asked_to_stop()
        os.kill(os.getpid(), first)
        assert asked_to_stop()
        assert "stopping after this step; once more to stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_are_left_as_they_are() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with finish_the_step() as asked_to_stop:
            found.append((asked_to_stop(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_a_long_sentence_stays_on_one_line_in_a_pipe() -> None:
    script = "from poise.runtime.progress import console; console.print('word ' * 60)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count("\n") == 1
