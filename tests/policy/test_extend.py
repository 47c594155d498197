"""A finished policy run goes on to more steps; completions that are all cut are said, with a length that would do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from poise.errors import PoiseError
from poise.integrations.trl_kl import KLBudgetCallback
from poise.integrations.trl_reward import RobustReward
from poise.integrations.trl_trainers import TrlSettings, _Report
from poise.policy import train
from poise.policy.config import Config
from poise.policy.loop import cut_off, note_of
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, Run, write_json


@pytest.fixture(scope="module")
def settings(
    tiny_model: str,
    train_tiny_reward: Callable[[str], Path],
    prompts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:
    return Config(
        prompts=str(prompts_file), reward=str(train_tiny_reward(tiny_model) / "brme"), model=tiny_model,
        output=str(tmp_path_factory.mktemp("run") / "policy"), num_steps=3, prompts_per_step=2,
        completions_per_prompt=2, max_tokens=4, adapted_layers=1, lora_rank=2, baseline_completions=4, save_every=9,
        eval_completions=1,
    )  # fmt: skip


def without_times(rows: list[Json]) -> list[Json]:
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


@pytest.mark.slow
def test_more_steps_of_a_finished_run_are_those_of_a_longer_run(settings: Config, tmp_path: Path) -> None:
    whole = train.run(dataclasses.replace(settings, output=str(tmp_path / "whole")))
    part = dataclasses.replace(settings, output=str(tmp_path / "part"), num_steps=2)
    assert (train.run(part).results or {})["steps"] == 2
    extended = train.run(dataclasses.replace(part, num_steps=3))
    assert without_times(extended.metrics()) == without_times(whole.metrics())
    assert list(read_rows(extended.folder / "final.jsonl")) == list(read_rows(whole.folder / "final.jsonl"))
    before, after = (dict(run.results or {}) for run in (whole, extended))
    assert before | {"seconds": 0} == after | {"seconds": 0}
    with pytest.raises(PoiseError, match="differs in num_steps"):
        train.run(part)  # it has more steps now
    with pytest.raises(PoiseError, match="differs in kl_coef, num_steps"):
        train.run(dataclasses.replace(part, num_steps=5, kl_coef=0.5))


def test_where_more_steps_are_not_a_longer_run(
    settings: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    moving = dataclasses.replace(settings, final_parameter=0.1)
    write_json(tmp_path / "results.json", {"alarms": [{"step": 1, "action": "log"}]})
    train._say_extended(moving, run)
    assert "the result is not that of one run of this length" in " ".join(capsys.readouterr().err.split())
    train._say_extended(settings, run)
    assert "not that of" not in capsys.readouterr().err
    write_json(tmp_path / "results.json", {"alarms": [{"step": 1, "action": "stop"}]})
    with pytest.raises(PoiseError, match="was ended by an alarm of the monitor"):
        train._say_extended(settings, run)


def test_bad_data_leave_no_folder(settings: Config, tmp_path: Path) -> None:
    many = dataclasses.replace(settings, output=str(tmp_path / "out"), prompts_per_step=64)
    with pytest.raises(PoiseError, match="prompts-per-step is 64"):
        train.run(many)
    assert not (tmp_path / "out").exists()


def test_cut_completions_are_said_with_the_lengths_people_chose(settings: Config, tmp_path: Path) -> None:
    lengths = (Run(Path(settings.reward).parent).results or {})["chosen_tokens"]
    assert 0 < lengths["median"] <= lengths["p90"]
    said = cut_off(4, settings.reward)
    assert said.startswith("no completion ended within --max-tokens 4")
    assert f"half have {lengths['median']} tokens and nine in ten {lengths['p90']}" in said
    assert cut_off(4, str(tmp_path)).endswith("give more")


def test_the_bar_shows_how_many_are_cut() -> None:
    assert note_of({"reward": 0.5, "kl": 1.0, "ended": 0.25}) == "reward +0.50  KL 1.0  75% cut"
    assert note_of({"reward": 0.5, "ended": 0.75}) == "reward +0.50  KL 0.0"


def test_grpo_saves_its_first_step(settings: Config) -> None:
    grpo = dataclasses.replace(settings, algorithm="grpo", num_epochs=2, num_minibatches=2)
    known = {field.name: getattr(grpo, field.name) for field in dataclasses.fields(TrlSettings)}
    reward, budget = RobustReward("rm", "mean", "", 0, 0.0, 1.0), KLBudgetCallback.__new__(KLBudgetCallback)
    report = _Report(TrlSettings(**known), reward, budget, lambda _: None)
    saved = []
    for step in range(1, 9):
        control = SimpleNamespace(should_save=False)
        report.on_step_end(None, SimpleNamespace(global_step=step), control)
        saved.append(control.should_save)
    assert saved == [False] * 3 + [True] + [False] * 4
    grpo.check()
