"""Progress where no bar is seen."""

import pytest

from poise.runtime import progress as module
from poise.runtime.progress import progress


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
