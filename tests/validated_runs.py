"""Policy runs whose validator says what a test wants it to say."""

import pytest

from poise.models.validator import Validator
from poise.policy import train as train_policy
from poise.policy.config import Config
from poise.runtime.run_folder import Run

GAINS = (0.0, 1.0, 3.0, 0.5, 1.0)  # of its five steps; the mean of two is largest, 2, at the third


def validated_run(config: Config, monkeypatch: pytest.MonkeyPatch, first: int = 0) -> Run:
    """A run from step `first` on, or to where it is told to end, whose validator gains GAINS."""
    left = iter(GAINS[first:])
    monkeypatch.setattr(Validator, "metrics", lambda *_: {"validator": next(left)})
    return train_policy.run(config)
