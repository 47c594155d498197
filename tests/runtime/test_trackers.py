"""Other places to log a run to: what accelerate is given."""

from pathlib import Path
from typing import Any

import pytest

from poise.errors import PoiseError
from poise.runtime import trackers


class Accelerator:
    """In place of accelerate's: notes what it is given."""

    said: list[Any]

    def __init__(self, **settings: Any) -> None:
        Accelerator.said = [settings]
        self.trackers = [self]

    def init_trackers(self, project: str, config: dict[str, Any]) -> None:
        self.said.append((project, config))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.said.append((step, metrics))

    def finish(self) -> None:
        self.said.append("end")

    def end_training(self) -> None:
        pytest.fail("it destroys this process's group, in which the others still gather weights")


def test_settings_and_numbers_are_sent_on_and_the_trackers_closed_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator", Accelerator)
    settings = {"steps": 3, "arms": ["a", "b"], "model": "tiny", "full": None}
    with pytest.raises(KeyboardInterrupt), trackers.tracked(("tensorboard",), tmp_path, settings) as track:  # noqa: PT012
        track({"kl": 1.0, "heads": [0.5, 2], "action": "log"}, 7)
        raise KeyboardInterrupt
    assert Accelerator.said == [
        {"log_with": ["tensorboard"], "project_dir": str(tmp_path)},
        ("poise", {"steps": 3, "arms": "['a', 'b']", "model": "tiny", "full": "None"}),
        (7, {"kl": 1.0, "heads/0": 0.5, "heads/1": 2.0}),
        "end",
    ]


def test_a_service_that_is_away_costs_rows_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    class Away(Accelerator):
        def log(self, _: dict[str, float], step: int) -> None:
            tried.append(step)
            if 2 <= step < 20:
                raise ConnectionError("503 Service Unavailable\nby far")

        def finish(self) -> None:
            raise ConnectionError("gone")

    monkeypatch.setattr("accelerate.Accelerator", Away)
    with trackers.tracked(("mlflow",), tmp_path, {}) as track:
        for step in range(35):
            track({"kl": 1.0}, step)
    assert tried == [0, 1, 2, 4, 8, 16, *range(32, 35)]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("--trackers mlflow: step 2 is not told, and perhaps later ones: ConnectionError: 503") == 1
    assert "--trackers mlflow: its end is not told: ConnectionError: gone" in said

    monkeypatch.setattr(Away, "init_trackers", lambda *_, **__: 1 / 0)
    with pytest.raises(PoiseError, match=r"^--trackers mlflow: ZeroDivisionError: division by zero$"):  # noqa: SIM117
        with trackers.tracked(("mlflow",), tmp_path, {}):
            pass


@pytest.mark.parametrize(("names", "rank"), [((), "0"), (("tensorboard",), "1")])
def test_without_trackers_and_in_other_processes_nothing_is_sent(
    names: tuple[str, ...], rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator", None)  # calling it would raise
    monkeypatch.setenv("RANK", rank)
    with trackers.tracked(names, tmp_path, {}) as track:
        track({"kl": 1.0}, 0)


def test_every_tracker_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard", "wandb"])
    trackers.check_trackers(("tensorboard", "wandb"))
    with pytest.raises(PoiseError, match=r"^--trackers comet_ml: its package is not installed$"):
        trackers.check_trackers(("tensorboard", "comet_ml"))
    with pytest.raises(PoiseError, match=r"no tracker 'tensorbored'; accelerate knows .*tensorboard"):
        trackers.check_trackers(("wandb", "tensorbored"))
