"""Runs and policies where a language model may be named; other folders are refused before anything is imported."""

from pathlib import Path

import pytest

from poise.cli.chat import Config as ChatConfig
from poise.cli.inputs import check_inputs
from poise.errors import PoiseError
from poise.policy.config import EvaluateConfig
from poise.studies.config import CompareConfig


def test_a_policy_run_may_stand_for_a_language_model(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "run" / "policy").mkdir(parents=True)
    (tmp_path / "run" / "policy" / "adapter_config.json").write_text("{}")
    check_inputs(EvaluateConfig(policies=(str(tmp_path / "run"),), model=tiny_model))
    check_inputs(ChatConfig(str(tmp_path / "run" / "policy")))
    with pytest.raises(PoiseError, match="is not a model folder"):
        check_inputs(ChatConfig(str(tmp_path)))


def test_gold_is_reviews_or_a_reward_model(tmp_path: Path) -> None:
    check_inputs(CompareConfig(arms=(), gold="reviews"))
    check_inputs(CompareConfig(arms=()))
    with pytest.raises(PoiseError, match="is not a model folder"):
        check_inputs(CompareConfig(arms=(), gold=str(tmp_path)))
