"""Progress where no bar is seen, and stopping at the end of a step."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from poise.runtime import progress as module
from poise.runtime.progress import finish_the_step, progress


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
