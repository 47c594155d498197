"""How commands end: what was measured, warnings, folder, page and next command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.cli import ending, main
from poise.errors import PoiseError
from poise.models.card_warnings import card_warnings
from poise.policy.config import Config as PolicyConfig
from poise.reward.config import Config as RewardConfig
from poise.reward.config import EvaluateConfig
from poise.runtime.run_folder import Run, append_jsonl, config_dict, write_json, write_jsonl
from poise.studies.config import BestOfNConfig, CompareConfig, QuickstartConfig
from poise.studies.config import Config as StudyConfig
from poise.toy.config import Config as ToyConfig

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


def test_a_whole_run_is_named_as_the_reward_so_that_the_objective_takes_its_heads(
    reward: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: {"validation_accuracy": 0.8} for name in ("single", "ensemble", "posterior", "brme")}
    write_json(reward.folder / "results.json", {"models": models, "num_train": 80, "num_validation": 20})
    ending.say_ending("train-reward", RewardConfig(preferences="p", output=str(reward.folder), model="m"), reward)
    assert f"next:   poise train-policy --reward {reward.folder} --prompts p --model m" in capsys.readouterr().out


def test_train_policy_repeats_the_warnings_of_its_reward_model(
    reward: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(reward.folder / "single")
    config = PolicyConfig(prompts="p", reward=place, output=str(tmp_path / "policy"), validator=place)
    ending.warn_of_models(config)
    assert capsys.readouterr().out.startswith(f"warning: {reward.folder}/single: No better than a coin")
    run = finished(tmp_path / "policy", config, {"reward": 1.0, "kl": 2.0, "alarms": [], "steps": 1})
    append_jsonl(run.folder / "metrics.jsonl", [{"step": 0, "reward": 0.5, "kl": 1.0, "tokens": 9, "ended": 0.5}])
    ending.say_ending("train-policy", config, run)
    out = capsys.readouterr().out
    assert "warning: Reward model single: No better than a coin" in out
    assert "warning: The validator: No better than a coin" in out
    assert "9 tokens, 50% ended by themselves" in out
    assert f"next:   poise chat {run.folder}" in out
    assert "was cut" not in out
    write_jsonl(run.folder / "metrics.jsonl", [{"step": 0, "reward": 0.5, "kl": 1.0, "tokens": 9, "ended": 0.0}])
    ending.say_ending("train-policy", config, run)
    assert "warning: every completion was cut at --max-tokens" in capsys.readouterr().out
    write_jsonl(run.folder / "metrics.jsonl", [{"step": 0, "reward": 0.5, "kl": 1.0, "tokens": 9, "ended": 0.25}])
    ending.say_ending("train-policy", config, run)
    assert "warning: 75% of the completions were cut at --max-tokens" in capsys.readouterr().out
    (run.folder / "metrics.jsonl").unlink()
    ending.say_ending("train-policy", config, run)
    said = capsys.readouterr().out
    assert f"reward       not known: {run.folder}/metrics.jsonl lacks steps" in said
    assert "nan" not in said
    write_json(run.folder / "results.json", {**(run.results or {}), "steps": 0, "ended_by": "max_kl"})
    ending.say_ending("train-policy", replace(config, max_kl=0.5), run)
    said = capsys.readouterr().out
    assert "ended        passed --max-kl 0.5 and went back: the policy is the start's" in said
    assert "lacks steps" not in said


def test_the_warnings_of_a_run_are_those_of_the_heads_that_are_taken(
    reward: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("single", "brme"):
        (reward.folder / name / "config.json").write_text("{}")
    config = PolicyConfig(prompts="p", reward=str(reward.folder), objective="nominal")
    ending.warn_of_models(config)
    assert capsys.readouterr().out == ""  # the BRME's card warns of nothing
    ending.warn_of_models(replace(config, heads="single"))
    assert f"warning: {reward.folder}/single: No better than a coin" in capsys.readouterr().out


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
    for name in ("single", "brme"):
        (reward.folder / name / "model.safetensors").touch()
    ending.say_finished("train-reward", config)
    assert "is finished; nothing is computed again" in capsys.readouterr().out
    with pytest.raises(PoiseError, match="holds a run of another config"):
        ending.say_finished("train-reward", RewardConfig(preferences="others", output=str(reward.folder), model="m"))


def test_a_finished_run_that_lost_what_it_made_says_what_to_do(reward: Run, tmp_path: Path) -> None:
    config = RewardConfig(preferences="my pairs.jsonl", output=str(reward.folder), model="m")
    (reward.folder / "single" / "model.safetensors").touch()
    again = f"was deleted since it finished; delete {reward.folder}/results.json and start its command again to have it"
    with pytest.raises(PoiseError, match=f"{reward.folder} is finished and not whole: brme {again}"):
        ending.say_finished("train-reward", config)
    (reward.folder / "brme" / "model.safetensors").touch()
    write_json(reward.folder / "results.json", (reward.results or {}) | {"validator": {"models": {}}})
    with pytest.raises(PoiseError, match=f"not whole: validator {again}"):
        ending.say_finished("train-reward", config)
    policy = PolicyConfig(prompts="p", reward="r", output=str(tmp_path / "policy"))
    run = finished(tmp_path / "policy", policy, {"validator": None})
    with pytest.raises(PoiseError, match="not whole: policy was deleted"):
        ending.say_finished("train-policy", policy)
    (run.folder / "policy").mkdir()
    (run.folder / "policy" / "adapter_model.safetensors").touch()
    ending.say_finished("train-policy", policy)


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


def said_of(command: str, config: Any, done: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of an ending, with single spaces."""
    capsys.readouterr()
    ending.say_ending(command, config, done)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_best_of_n_ends_with_what_each_objective_gained(
    reward: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("single:nominal", "brme:tradeoff(0.4)")
    config = BestOfNConfig(prompts="p.jsonl", reward=(str(reward.folder),), objectives=names, model="m")
    curves = [
        {"name": "brme:tradeoff(0.4)", "best_of_n": [{"n": 1, "proxy": 0.0}, {"n": 16, "proxy": 1.5}]},
        {"name": "with gold", "best_of_n": [{"n": 1, "proxy": 0, "gold": -0.5}, {"n": 4, "proxy": 2, "gold": 0.25}]},
    ]
    run = finished(tmp_path / "pool", config, {"curves": curves})
    lines = said_of("best-of-n", config, run, capsys)
    assert "brme:tradeoff(0.4) best of 16: reward +0.00 to +1.50" in lines
    assert "with gold best of 4: reward +0.00 to +2.00, gold -0.50 to +0.25" in lines
    assert f"selected {run.folder}/selected.jsonl" in lines
    assert any(line.startswith("warning: No better than a coin") for line in lines)
    chosen = f"--reward {reward.folder}/brme --objective 'tradeoff(0.4)'"
    assert lines[-1] == f"next: poise train-policy {chosen} --prompts p.jsonl --model m"


def test_a_comparison_with_gold_ends_with_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [{"name": name, "final": {"gold": gold, "proxy": 1.0, "kl": 2.0}} for name, gold in (("a", 0.5), ("b", 1))]
    difference = {"arm": "b", "against": "a", "gold": 0.5, "interval": [-0.1, 1.1]}
    config = CompareConfig(arms=("a", "b"), output=str(tmp_path / "c"))
    lines = said_of(
        "compare", config, finished(tmp_path / "c", config, {"arms": arms, "differences": [difference]}), capsys
    )
    assert "b gold +1.00, reward +1.00, KL 2.0" in lines
    assert "b − a gold +0.50 (-0.10 to +1.10)" in lines
    assert not any("none was given" in line for line in lines)
    assert lines[-1] == "next: poise chat b"


@pytest.mark.parametrize(
    ("changes", "following"),
    [
        ({}, "poise quickstart --arms conventional robust brme"),
        ({"output": "runs/mine"}, "poise quickstart --output runs/mine --arms conventional robust brme"),
        ({"arms": ("conventional", "brme")}, None),
    ],
)
def test_the_quickstart_offers_the_arm_of_the_paper(
    changes: dict[str, Any], following: str | None, reward: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = QuickstartConfig(**changes)
    run = finished(tmp_path / "quick", config, {"total_seconds": 130.0})
    reward.folder.rename(run.folder / "reward")
    arms = [{"name": name, "final": {"gold": 0.5, "proxy": 1.0, "kl": 2.0}} for name in config.arms]
    finished(run.folder / "comparison", config, {"arms": arms, "differences": []})
    (run.folder / "report.html").write_text("")
    lines = said_of("quickstart", config, run, capsys)
    assert "time 2 min" in lines
    assert f"page: {run.folder}/report.html" in lines
    assert [line for line in lines if line.startswith("warning: single: No better than a coin")]
    talk = f"next: poise chat {run.folder}/policy-{config.arms[-1]}"
    assert [line for line in lines if line.startswith("next:")] == [
        talk,
        *([f"next: {following}"] if following else []),
    ]


def test_evaluate_reward_ends_with_differences_of_accuracy(
    reward: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"accuracy": 0.75, "num_pairs": 40, "length_accuracy": 0.5}
    more = {"accuracy": {"mean": 0.1, "interval": [-0.05, 0.25]}, "nll": {"mean": 3, "interval": [1, 2]}, "rows": 40}
    config = EvaluateConfig(rewards=(str(reward.folder / "single"), "org/b"), file="x", output=str(tmp_path / "judged"))
    results = {
        "rewards": [{"reward": name, "pairs": pairs} for name in config.rewards],
        "differences": [{"reward": "org/b", "versus": config.rewards[0], **more}],
    }
    lines = said_of("evaluate-reward", config, finished(tmp_path / "judged", config, results), capsys)
    assert "single 75.0% of 40 pairs, the longer text 50.0%" in lines
    assert "b − single accuracy +0.100 (-0.050 to +0.250)" in lines
    assert not any("nll" in line for line in lines)
    assert f"warning: {config.rewards[0]}: No better than a coin: the interval includes 50 %. Do not optimize" in str(
        lines
    )
    assert lines[-1] == f"next: poise inspect {config.rewards[0]}"


def test_the_toy_ends_with_what_pessimism_gained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gain = {"against_single": {"mean": 0.25, "low": 0.125, "high": 0.375}}
    names = ("reference", "gold", "single", "worst_case")
    results = {"objectives": [{"name": name, "ppo": gain if name == "worst_case" else {}} for name in names]}
    run = finished(tmp_path / "toy", ToyConfig(), results)
    (run.folder / "toy.png").write_text("")
    lines = said_of("toy", ToyConfig(), run, capsys)
    assert lines == [
        "", "worst_case gold +0.250 against the single head (+0.125 to +0.375)", f"folder: {run.folder}",
        f"page: {run.folder}/toy.png", "next: poise quickstart",
    ]  # fmt: skip


def test_of_many_rows_the_first_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {f"arm {i}": {"final_gold": {"mean": i / 10}} for i in range(ending.MOST_ROWS)}
    run = finished(tmp_path / "study", StudyConfig(), {"summary": {"0.0": arms, "0.2": dict(list(arms.items())[:2])}})
    lines = said_of("study", StudyConfig(), run, capsys)
    assert lines[1:4] == [f"noise 0.0, arm {i} final gold +0.{i}0" for i in range(3)]
    assert lines[1 + ending.MOST_ROWS] == "… and 2 more on the page"
    few = finished(tmp_path / "few", StudyConfig(), {"summary": {"0.0": arms}})
    assert not any("more on the page" in line for line in said_of("study", StudyConfig(), few, capsys))


def test_a_model_that_was_not_judged_says_so(reward: Run, capsys: pytest.CaptureFixture[str]) -> None:
    results = {"models": {"single": {"validation_accuracy": None}}, "num_train": 80, "num_validation": 0}
    write_json(reward.folder / "results.json", results)
    config = RewardConfig(preferences="my pairs.jsonl", output=str(reward.folder), model="m")
    lines = said_of("train-reward", config, reward, capsys)
    assert "single not judged" in lines
    assert not any(line.startswith("longer answer") for line in lines)
    assert f"next: poise inspect {reward.folder}/single" in lines


def test_other_processes_say_nothing(
    reward: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PolicyConfig(prompts="p", reward=str(reward.folder / "single"))
    monkeypatch.setenv("RANK", "1")
    ending.warn_of_models(config)
    ending.say_finished(
        "train-reward", RewardConfig(preferences="my pairs.jsonl", output=str(reward.folder), model="m")
    )
    ending.say_ending("train-reward", config, reward)
    assert capsys.readouterr().out == ""
    assert not (reward.folder / "report.html").exists()
