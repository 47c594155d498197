"""Runs and policies where a language model may be named; other folders are refused before anything is imported."""

import os
from pathlib import Path

import pytest

from poise.cli.chat import Config as ChatConfig
from poise.cli.inputs import check_inputs
from poise.cli.main import main
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


def test_an_output_that_cannot_be_is_one_line_before_anything_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for output, reason in (("a\0b.yaml", "cannot be the name of a file"), (str(tmp_path / "fifo"), "is no place")):
        assert main(["init", "serve", "--output", output]) == 2
        assert reason in capsys.readouterr().err
