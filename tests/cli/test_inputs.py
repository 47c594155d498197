"""Runs and policies where a language model may be named; other folders are refused before anything is imported."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from poise.cli import inputs
from poise.cli.chat import Config as ChatConfig
from poise.cli.inputs import check_inputs
from poise.cli.main import main
from poise.errors import PoiseError
from poise.policy.config import Config as PolicyConfig
from poise.policy.config import EvaluateConfig
from poise.reward.config import Config as RewardConfig
from poise.reward.config import EvaluateConfig as RewardEvaluation
from poise.reward.config import ScoreConfig
from poise.runtime.settings import Settings
from poise.studies.config import CompareConfig
from poise.studies.config import Config as StudyConfig


def test_a_policy_run_may_stand_for_a_language_model(tmp_path: Path, tiny_model: str) -> None:
    policy = tmp_path / "run" / "policy"
    policy.mkdir(parents=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": tiny_model}
    (policy / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(PoiseError, match=r"has no adapter_model\.safetensors"):
        check_inputs(ChatConfig(str(policy)))
    (policy / "adapter_model.safetensors").touch()
    check_inputs(EvaluateConfig(policies=(str(tmp_path / "run"),), model=tiny_model))
    check_inputs(ChatConfig(str(policy)))
    for wrong, reason in (
        ({"task_type": "SEQ_CLS"}, "no LoRA adapters of a language model"),
        ({"base_model_name_or_path": None}, "does not say of which model"),
        ({"base_model_name_or_path": str(tmp_path)}, r"no base model of .* is not a model folder: .*json; write where"),
        ({"base_model_name_or_path": "../nowhere"}, "start this in the directory in which it was trained, or write"),
    ):
        (policy / "adapter_config.json").write_text(json.dumps(settings | wrong))
        with pytest.raises(PoiseError, match=reason):
            check_inputs(ChatConfig(str(policy)))
    with pytest.raises(PoiseError, match="holds a policy's adapters, not a whole model; `poise merge"):
        check_inputs(PolicyConfig(prompts="", reward="", model=str(tmp_path / "run")))
    with pytest.raises(PoiseError, match="is not a model folder"):
        check_inputs(ChatConfig(str(tmp_path)))


def test_gold_is_reviews_or_a_reward_model(tmp_path: Path) -> None:
    check_inputs(CompareConfig(arms=(), gold="reviews"))
    check_inputs(CompareConfig(arms=()))
    with pytest.raises(PoiseError, match="is not a model folder"):
        check_inputs(CompareConfig(arms=(), gold=str(tmp_path)))


def test_a_data_set_of_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PoiseError, match="data set 'org/pairs' is neither a local file nor reachable on the model hub"):
        check_inputs(RewardConfig(preferences="org/pairs", model=""))
    (tmp_path / "datasets--org--pairs").mkdir()
    check_inputs(RewardConfig(preferences="org/pairs", model=""))
    for name in ("org/pairs.jsonl", str(tmp_path / "pairs")):
        with pytest.raises(PoiseError, match="no such file"):
            check_inputs(RewardConfig(preferences=name, model=""))


def test_small_files_are_read_and_others_left_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("oops\n")
    wrong: list[Settings] = [
        RewardConfig(preferences=str(path), model=""), ScoreConfig("", str(path)),
        RewardEvaluation(rewards=("",), file=str(path)), PolicyConfig(prompts=str(path), reward="", model=""),
    ]  # fmt: skip
    for config in wrong:
        with pytest.raises(PoiseError, match=r"bad.jsonl:1: not JSON"):
            check_inputs(config)
    check_inputs(RewardConfig(preferences=str(path), model="", on_bad_row="skip"))
    with pytest.raises(PoiseError, match="is a folder that `datasets` did not save; name a file"):
        check_inputs(RewardConfig(preferences=str(tmp_path), model=""))
    (tmp_path / "state.json").write_text("{}")
    check_inputs(RewardConfig(preferences=str(tmp_path), model=""))  # a folder, as `datasets` saves it
    monkeypatch.setattr(inputs, "_SMALL", 4)
    check_inputs(RewardConfig(preferences=str(path), model=""))
    assert capsys.readouterr().err == ""


def test_settings_within_settings_are_checked_too(tmp_path: Path) -> None:
    nested = StudyConfig(policy=replace(StudyConfig().policy, prompts=str(tmp_path / "none.jsonl")))
    with pytest.raises(PoiseError, match=r"no such file: .*none\.jsonl"):
        check_inputs(nested)


def test_an_output_that_cannot_be_is_one_line_before_anything_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for output, reason in (("a\0b.yaml", "cannot be the name of a file"), (str(tmp_path / "fifo"), "is no place")):
        assert main(["init", "serve", "--output", output]) == 2
        assert reason in capsys.readouterr().err
