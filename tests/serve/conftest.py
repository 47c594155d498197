"""One small reward model for all tests of the server."""

from collections.abc import Callable
from pathlib import Path

import pytest

from poise.models.scorer import Scorer


@pytest.fixture(scope="session")
def brme(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model) / "brme")


@pytest.fixture(scope="session")
def scorer(brme: str) -> Scorer:
    return Scorer.load(brme)
