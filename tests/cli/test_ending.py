"""How commands end: what was measured, warnings, folder, page and next command."""

from pathlib import Path

import pytest
import yaml

from poise.cli import ending, main
from poise.models.card_warnings import card_warnings
from poise.policy.config import Config as PolicyConfig
from poise.reward.config import Config as RewardConfig
from poise.runtime.run_folder import Run, append_jsonl, config_dict, write_json, write_jsonl
from poise.studies.config import BestOfNConfig, CompareConfig

COIN = "> **No better than a coin**: the interval includes 50 %. Do not optimize against it.\n"


def finished(folder: Path, config: object, results: dict[str, object]) -> Run:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config_dict(config)))
    write_json(folder / "results.json", results)
    return Run(folder)


@pytest.fixture
def reward(tmp_path: Path) -> Run:
    models = {
        "single": {"validation_accuracy": 0.55, "validation_accuracy_interval": [0.4, 0.7], "length_accuracy": 0.5},
        "brme": {"validation_accuracy": 0.8, "validation_accuracy_interval": [0.7, 0.9], "length_accuracy": 0.5},
    }
    config = RewardConfig(preferences="my pairs.jsonl", output=str(tmp_path / "rm"), model="m")
    run = finished(tmp_path / "rm", config, {"models": models, "num_train": 80, "num_validation": 20})
    for name, text in (("single", COIN), ("brme", "# Card\n\n> a plain quote\n")):
        (run.folder / name).mkdir()
        (run.folder / name / "README.md").write_text(text)
    return run


def test_train_reward_ends_with_what_to_do_next(reward: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = RewardConfig(preferences="my pairs.jsonl", output=str(reward.folder), model="m")
    ending.say_ending("train-reward", config, reward)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  single         55.0% of validation pairs in the right order (95 % interval 40.0% to 70.0%)"
    assert "warning: single: No better than a coin: the interval includes 50\xa0%. Do not optimize against it." in lines
    assert f"page:   {reward.folder}/report.html" in lines
    assert (reward.folder / "report.html").exists()
    assert lines[-1] == (
        f"next:   poise train-policy --reward {reward.folder}/brme --prompts 'my pairs.jsonl' --model m"
    )


def test_train_policy_repeats_the_warnings_of_its_reward_model(
    reward: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PolicyConfig(prompts="p", reward=str(reward.folder / "single"), output=str(tmp_path / "policy"))
    ending.warn_of_models(config)
    assert capsys.readouterr().out.startswith(f"warning: {reward.folder}/single: No better than a coin")
    run = finished(tmp_path / "policy", config, {"reward": 1.0, "kl": 2.0, "alarms": [], "steps": 1})
    append_jsonl(run.folder / "metrics.jsonl", [{"step": 0, "reward": 0.5, "kl": 1.0, "tokens": 9, "ended": 0.5}])
    ending.say_ending("train-policy", config, run)
    out = capsys.readouterr().out
    assert "warning: No better than a coin" in out
    assert "9 tokens, 50% ended by themselves" in out
    assert f"next:   poise chat {run.folder}" in out
    assert "was cut" not in out
    write_jsonl(run.folder / "metrics.jsonl", [{"step": 0, "reward": 0.5, "kl": 1.0, "tokens": 9, "ended": 0.0}])
    ending.say_ending("train-policy", config, run)
    assert "warning: every completion was cut at --max-tokens" in capsys.readouterr().out


def test_best_of_n_warns_of_what_its_objectives_select_by(reward: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ending.warn_of_models(BestOfNConfig(prompts="p", reward=(str(reward.folder),), objectives=("single:nominal",)))
    assert "No better than a coin" in capsys.readouterr().out
    ending.warn_of_models(BestOfNConfig(prompts="p", reward=(str(reward.folder),), objectives=("brme:mean",)))
    assert capsys.readouterr().out == ""


def test_compare_without_gold_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = {"gold": None, "proxy": 1.0, "kl": 2.0}
    arms = [{"name": name, "final": final} for name in ("a", "b")]
    config = CompareConfig(arms=("a", "b"), output=str(tmp_path / "c"))
    run = finished(tmp_path / "c", config, {"arms": arms, "differences": []})
    ending.say_ending("compare", config, run)
    out = capsys.readouterr().out
    assert "none was given, so nothing here says which texts are better" in out
    assert "no page: " in out  # these results lack what the page needs, and the command does not fail


def test_a_finished_run_says_so_at_once(reward: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = RewardConfig(preferences="my pairs.jsonl", output=str(reward.folder), model="m")
    ending.say_finished("train-reward", config)
    assert "is finished; nothing is computed again" in capsys.readouterr().out
    ending.say_finished("train-reward", RewardConfig(preferences="others", output=str(reward.folder), model="m"))
    assert capsys.readouterr().out == ""


def test_every_command_that_makes_something_has_an_ending() -> None:
    silent = {
        "data",
        "push",
        "report",
        "inspect",
        "chat",
        "watch",
        "serve",
        "init",
        "completion",
        "choose",
        "reference",
        "plan",
    }  # they print what they found, or talk
    assert set(main.COMMANDS) - silent <= set(ending.ENDINGS)


def test_warnings_of_an_ensemble_are_those_of_its_members(reward: Run, tmp_path: Path) -> None:
    write_json(
        tmp_path / "both" / "ensemble.json", {"members": ["../rm/single", "../rm/brme"], "means": [], "stds": []}
    )
    assert len(card_warnings(tmp_path / "both")) == 1
    assert card_warnings(reward.folder) == []  # a run stands for its BRME
    assert card_warnings("org/model") == []
