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

    def init_trackers(self, project: str, config: dict[str, Any]) -> None:
        self.said.append((project, config))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.said.append((step, metrics))

    def end_training(self) -> None:
        self.said.append("end")


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
