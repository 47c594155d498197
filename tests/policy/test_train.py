"""PPO's loop: it learns, it stands still on a constant, and a kill changes nothing."""

import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import forked
from conftest import rest_slow
from poise.cli.main import main
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.monitor import Monitor, Reading
from poise.functional.objectives import HeadRewards, RewardScale, joined, parameter, parse_objective
from poise.models.policy import Policy
from poise.models.scorer import Scorer, generated
from poise.policy import loop as training
from poise.policy import train as train_policy
from poise.policy.alarms import Alarms
from poise.policy.train import Config
from poise.runtime import distributed as processes
from poise.runtime import ladder
from poise.runtime.ladder import Best, Ladder, best_of, kept_policies
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Run, config_dict
from poise.studies.config import LAPTOP_POLICY

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def config(reward_folder: Path, prompts_file: Path, tiny_model: str, tmp_path: Path) -> Config:
    return dataclasses.replace(
        LAPTOP_POLICY,
        prompts=str(prompts_file), reward=str(reward_folder / "brme"), output=str(tmp_path / "policy"),
        model=tiny_model,
        num_steps=4, prompts_per_step=2, completions_per_prompt=4, max_tokens=8, adapted_layers=2, lora_rank=4,
        baseline_completions=16, save_every=2, eval_completions=2,
    )  # fmt: skip


@pytest.mark.parametrize("role", ["reward", "validator"])
def test_prompts_that_the_reward_model_refuses_are_found_before_the_first_step(
    role: str, config: Config, reward_folder: Path, tmp_path: Path
) -> None:
    """The policy's template takes system turns and the reward model's does not: a later step ended the run."""
    judge = Path(shutil.copytree(reward_folder / "single", tmp_path / "judge"))
    template = judge / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Review the lamp."}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path(config.prompts).read_text() + json.dumps({"prompt": turns}) + "\n")
    asked = dataclasses.replace(config, prompts=str(prompts), objective="mean", num_steps=1, **{role: str(judge)})
    with pytest.raises(PoiseError, match=r"prompts\.jsonl:5: for the reward model the chat template refuses"):
        train_policy.run(asked)
    assert not Path(config.output).exists()
    out = train_policy.run(dataclasses.replace(asked, on_bad_row="skip"))
    assert "Be brief" not in (out.folder / "samples.jsonl").read_text()


def test_a_run_leaves_what_it_says(config: Config) -> None:
    out = train_policy.run(config)
    metrics = out.metrics()
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for row in metrics:
        assert row["gap"] >= 0
        assert len(row["heads"]) == 5
        assert row["kl_k3"] >= 0
    samples = list(read_rows(out.folder / "samples.jsonl"))
    assert len(samples) == 4 * 8
    assert len(list(read_rows(out.folder / "final.jsonl"))) == 4 * 2
    assert (out.folder / "policy" / "adapter_model.safetensors").exists()
    assert not list(out.folder.rglob("*.pt")) + list(out.folder.rglob("*.bin"))
    # What is logged is what the objective makes of the logged heads and constants.
    assert out.results is not None
    scale = RewardScale.from_json(out.results["scale"])
    heads = HeadRewards(*(torch.tensor([row[part] for row in samples]) for part in ("mean", "std")))
    expected = scale.combine(heads, parse_objective(config.objective))
    torch.testing.assert_close(torch.tensor([row["reward"] for row in samples]), expected, rtol=0, atol=1e-4)


def test_saved_adapters_are_the_trained_policy(config: Config) -> None:
    import peft
    import transformers

    out = train_policy.run(config)
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(config.model), str(out.folder / "policy")
    )
    adapters = json.loads((out.folder / "policy" / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == config.model  # as it was asked for, not where it was found
    saved = load_file(out.folder / "checkpoint.safetensors")
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    weights = {n.removeprefix("weight.model.").replace(".default", ""): v for n, v in saved.items() if "lora" in n}
    checked = [name for name in weights if name in loaded]
    assert checked
    assert all(torch.equal(weights[name], loaded[name]) for name in checked)


@pytest.mark.slow
def test_the_kl_budget_ends_a_run_below_it(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever stops at a budget has the run of fewer steps: same weights, nothing of what came after."""
    settings = dataclasses.replace(config, num_steps=8, learning_rate=0.02, kl_coef=0.0)
    free = train_policy.run(dataclasses.replace(settings, output=f"{config.output}-free"))
    kl = [row["kl"] for row in free.metrics()]
    over = next(step for step in range(3, 8) if kl[step] > max(kl[:step]))
    limit = (max(kl[:over]) + kl[over]) / 2
    bounded = train_policy.run(dataclasses.replace(settings, max_kl=limit))
    assert bounded.results is not None
    steps = max(range(0, over, config.save_every))
    assert (bounded.results["steps"], bounded.results["ended_by"]) == (steps, "max_kl")
    assert [row["kl"] for row in bounded.metrics()] == kl[:steps]
    assert f"is above --max-kl {limit:g}; going back to a checkpoint below" in " ".join(capsys.readouterr().err.split())
    short = train_policy.run(dataclasses.replace(settings, output=f"{config.output}-short", num_steps=steps))
    assert same_weights(bounded.folder / "policy", short.folder / "policy")
    assert free.results is not None
    assert free.results["ended_by"] == "num_steps"
    # Killed when it has ended and before it says so, it ends the same; and more steps are not what it lacks.
    stormy = dataclasses.replace(settings, max_kl=limit, output=f"{config.output}-stormy")
    boundary = f"before results.json at {steps}"
    assert forked.status_of(lambda: run_until(stormy, boundary)) == -signal.SIGKILL
    again = train_policy.run(stormy)
    assert lasting([again.results or {}]) == lasting([bounded.results])
    assert same_weights(bounded.folder / "policy", again.folder / "policy")
    with pytest.raises(PoiseError, match=r"was ended by --max-kl .*; more --num-steps do not make it go on"):
        train_policy.run(dataclasses.replace(stormy, num_steps=20))


def test_a_run_above_its_kl_budget_ends_where_it_was_below(
    config: Config, reward_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After one update the policy is above: it is the initial one again, in weights, rows, units and what is said."""
    settings = dataclasses.replace(
        config, learning_rate=0.05, max_kl=1e-4, save_every=1, validator=str(reward_folder / "single")
    )
    run = Run.open(settings.output, settings)
    first = training.Training(settings, run, prompts_of(settings))
    start = {name: parameter.clone() for name, parameter in first.policy.trained_parameters().items()}
    assert first.validator is not None
    units = first.validator.state()
    out = train_policy.run(settings)
    assert out.results is not None
    assert (out.results["steps"], out.results["ended_by"]) == (0, "max_kl")
    assert out.metrics() == []
    assert out.results["kl"] == pytest.approx(0, abs=1e-4)
    said = " ".join(capsys.readouterr().err.split())
    assert "step 1: KL" in said
    assert "is above --max-kl 0.0001; going back to a checkpoint below" in said
    again = training.Training(settings, run, prompts_of(settings))
    assert again.alarms.ended == "max_kl"
    assert again.validator is not None
    assert again.validator.state() == units
    assert all(torch.equal(start[name], value) for name, value in again.policy.trained_parameters().items())
    with pytest.raises(PoiseError, match=r"was ended by --max-kl 0.0001; more --num-steps do not make it go on"):
        train_policy.run(dataclasses.replace(settings, num_steps=20))
    assert set(json.loads((run.folder / "inputs.json").read_text())) >= {"--validator", "--reward", "--prompts"}


@pytest.mark.slow
def test_the_ladder_keeps_the_first_policy_at_each_rung(config: Config) -> None:
    """Each is the policy whose completions have the KL of its row: the one that a run of as many steps ends with."""
    settings = dataclasses.replace(config, num_steps=8, learning_rate=0.02, kl_coef=0.0, save_every=8)
    plain = train_policy.run(dataclasses.replace(settings, keep_at_kl=(), output=f"{config.output}-plain"))
    kl = [row["kl"] for row in plain.metrics()]
    first, second = sorted(value for step, value in enumerate(kl) if step and value > max(kl[:step]))[:2]
    out = train_policy.run(dataclasses.replace(settings, keep_at_kl=(second, 1e6, first)))
    assert lasting(plain.metrics()) == lasting(out.metrics())
    rows = list(read_rows(out.folder / "ladder.jsonl"))
    assert [(row["rung"], row["kl"]) for row in rows] == [(first, first), (second, second)]
    assert sorted(place.name for place in (out.folder / "ladder").iterdir()) == sorted(
        f"kl-{rung:g}" for rung in (first, second)
    )
    places = kept_policies(out.folder)
    assert list(places) == [float(f"{rung:.3g}") for rung in (first, second)]
    for row, kept in zip(rows, places.values(), strict=True):
        assert kl[row["step"]] == row["kl"]
        short = dataclasses.replace(settings, num_steps=row["step"], output=f"{config.output}-{row['step']}")
        assert same_weights(train_policy.run(short).folder / "policy", kept)
    assert kept_policies(plain.folder) == {}


def save(folder: str, weights: str) -> None:
    (Path(folder) / "weights").write_text(weights)


def test_the_best_is_the_policy_whose_two_steps_the_validator_likes_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: means of two steps are -.5, .5, 2, 1.5, 2. One below the start does not count, nor a later equal one."""
    kept, marks = Best(tmp_path), []
    for step, gain in enumerate([0.5, -1.5, 2.5, 1.5, 1.5, 2.5]):
        kept.keep(step, 3.0 * step, gain, lambda: "whole", save)
        marks.append((best_of(tmp_path) or {}).get("step"))
        again = Best(tmp_path)
        again.restore(json.loads(json.dumps(kept.state())))
        kept = again
    assert marks == [None, None, 2, 3, 3, 3]
    assert best_of(tmp_path) == {"step": 3, "kl": 9.0, "validator": 2.0}
    assert (tmp_path / "best" / "weights").exists()
    monkeypatch.setenv("RANK", "1")  # another process of the run, which writes nothing and knows the mark
    other = Best(tmp_path / "other")
    for step in range(3):
        other.keep(step, 1.0, 1.0 * step, lambda: "whole", save)
    assert other.state() == (1.5, 2.0)
    assert best_of(tmp_path / "other") is None


def test_a_step_past_several_rungs_is_kept_at_the_highest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Ladder(tmp_path, (40.0, 5.0, 10.0))
    for step, kl in enumerate([0.0, 4.9, 12.0, 6.0, 11.0, 39.0, 90.0]):
        kept.keep(step, kl, lambda: "whole", save)
    rows = list(read_rows(tmp_path / "ladder.jsonl"))
    assert rows == [{"step": 2, "rung": 10.0, "kl": 12.0}, {"step": 6, "rung": 40.0, "kl": 90.0}]
    kept.drop_from(3)
    assert [row["step"] for row in read_rows(tmp_path / "ladder.jsonl")] == [2]
    assert [place.name for place in (tmp_path / "ladder").iterdir()] == ["kl-10"]
    monkeypatch.setenv("RANK", "1")  # another process of the run, which writes nothing and knows the rung
    other = Ladder(tmp_path / "other", (5.0,))
    other.keep(0, 6.0, lambda: "", save)
    assert other.reached == 5.0
    assert not (tmp_path / "other").exists()


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_few_prompts_make_smaller_steps_than_the_default(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    default = dataclasses.replace(config, prompts_per_step=Config.prompts_per_step, num_steps=1, save_every=1)
    out = train_policy.run(default)
    assert len(list(read_rows(out.folder / "samples.jsonl"))) == 4 * config.completions_per_prompt  # of four prompts
    assert "4 prompts are fewer than --prompts-per-step 32: a step takes 4" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(PoiseError, match="has 4 prompts, --prompts-per-step is 8"):
        train_policy.run(dataclasses.replace(config, prompts_per_step=8, output=f"{config.output}-8"))
    with pytest.raises(PoiseError, match=r"has 4 prompts, and a step takes at least 5, .* or fewer --num-minibatches"):
        train_policy.run(
            dataclasses.replace(config, prompts_per_step=10, num_minibatches=5, output=f"{config.output}-5")
        )


def test_a_run_folder_is_one_kind_of_heads_said_aloud(
    config: Config, reward_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounded = {"objective": "lower_confidence(1)", "reward_ceiling": 2.0, "settle": True, "num_steps": 1}
    out = train_policy.run(dataclasses.replace(config, reward=str(reward_folder), **bounded))
    said = " ".join(capsys.readouterr().err.split())
    assert f"lower_confidence(1) of the posterior heads of {reward_folder}; --heads takes others: single" in said
    assert out.results is not None
    assert out.results["num_heads"] == 6  # as many as the posterior's, not the BRME's five


def same_end(one: Path, other: Path) -> bool:
    a, b = load_file(one / "checkpoint.safetensors"), load_file(other / "checkpoint.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(config: Config, tmp_path: Path) -> None:
    """kill -9 at several moments of a real process, restarted each time."""
    config = dataclasses.replace(config, num_steps=8, save_every=1)
    settings = tmp_path / "config.yaml"
    settings.write_text(yaml.safe_dump(config_dict(config)))

    def start(output: Path) -> forked.Forked:
        return forked.started(lambda: main(["train-policy", "--config", str(settings), "--output", str(output)]))

    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    assert start(calm).ended() == 0
    kills = 0
    for at_step in (1, 3, 4, 6):
        process = start(stormy)
        metrics = stormy / "metrics.jsonl"
        while process.status() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") > at_step:
                time.sleep(0.013 * at_step)  # not always right after the same line
                kills += process.killed() == -signal.SIGKILL
                break
            time.sleep(0.005)
        process.ended()
    assert start(stormy).ended() == 0
    assert kills >= 3
    assert same_end(calm, stormy)
    keys = ("step", "reward", "kl", "heads", "policy_loss")
    rows = [[[row[key] for key in keys] for row in read_rows(run / "metrics.jsonl")] for run in (calm, stormy)]
    assert rows[0] == rows[1]
    assert (calm / "final.jsonl").read_text() == (stormy / "final.jsonl").read_text()


# Where a run is killed, in the order in which it comes there: before or after what, and at which step.
BOUNDARIES = (
    "before one_step at 0", "after one_step at 1", "before safe.safetensors at 2", "after safe.safetensors at 2",
    "before samples.jsonl at 2", "after samples.jsonl at 2", "after metrics.jsonl at 2",
    "before ladder.jsonl at 3", "after ladder.jsonl at 3",
    "before checkpoint.safetensors at 4", "after checkpoint.safetensors at 4", "before final sampling at 4",
    "before final.jsonl at 4", "after final.jsonl at 4", "before results.json at 4",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_at_every_boundary_ends_as_an_undisturbed_one(config: Config, tmp_path: Path) -> None:
    """With a moving parameter, a moving scale and a safe policy: everything that the end needs is in the checkpoint."""
    config = dataclasses.replace(
        config, objective="tradeoff(0.9)", final_parameter=0.0, reward_norm="running", on_alarm="rollback",
        alarm_threshold=1e6, keep_at_kl=(1e-9, 1e-3),
    )  # fmt: skip
    calm, stormy = (dataclasses.replace(config, output=str(tmp_path / name)) for name in ("calm", "stormy"))
    whole = train_policy.run(calm)
    for boundary in BOUNDARIES:
        assert forked.status_of(lambda at=boundary: run_until(stormy, at)) == -signal.SIGKILL, boundary  # type: ignore[misc]
    assert forked.status_of(lambda: train_policy.run(stormy)) == 0
    resumed = Run(Path(stormy.output))
    assert same_end(whole.folder, resumed.folder)
    for name in ("final.jsonl", "samples.jsonl", "ladder.jsonl"):
        assert (whole.folder / name).read_text() == (resumed.folder / name).read_text()
    assert lasting(whole.metrics()) == lasting(resumed.metrics())
    assert lasting([whole.results or {}]) == lasting([resumed.results or {}])


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a clock says."""
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def run_until(config: Config, boundary: str) -> None:
    """Run, and die at a boundary as from kill -9."""
    current: list[training.Training] = []

    def watched(owner: Any, attribute: str, name: Callable[..., str]) -> None:
        function = getattr(owner, attribute)

        def around(*args: Any, **kwargs: Any) -> Any:
            for when in ("before", "after"):
                if current and f"{when} {name(*args)} at {current[0].step}" == boundary:
                    os.kill(os.getpid(), signal.SIGKILL)
                if when == "before":
                    result = function(*args, **kwargs)
            return result

        setattr(owner, attribute, around)

    watched(training.Training, "one_step", lambda *_: "one_step")
    watched(training.Learner, "save", lambda _, path, *__: path.name)
    watched(training, "append_jsonl", lambda path, *_: path.name)
    watched(ladder, "append_jsonl", lambda path, *_: path.name)
    watched(Run, "log", lambda *_: "metrics.jsonl")
    watched(train_policy, "sample_policy", lambda *_: "final sampling")
    watched(train_policy, "write_jsonl", lambda path, *_: path.name)
    watched(Run, "finish", lambda *_: "results.json")
    resume_or_start = training.Training._resume_or_start

    def remembered(self: training.Training) -> None:
        current[:] = [self]
        resume_or_start(self)

    training.Training._resume_or_start = remembered  # type: ignore[method-assign]
    train_policy.run(config)


def test_the_final_reward_is_that_of_the_last_objective_for_checkpoints_without_it(config: Config) -> None:
    """A checkpoint of an earlier version does not hold the parameter; it follows from the step."""
    config = dataclasses.replace(config, objective="tradeoff(0.9)", final_parameter=0.0)
    started_run = training.Training(config, Run.open(config.output, config), prompts_of(config))
    saved = started_run._state()
    del saved["objective_parameter"], saved["num_truncated"], saved["scale_std_interval"]
    started_run._return_to(saved | {"step": 3})
    assert parameter(started_run.reward.objective) == pytest.approx(0.9 - 2 * 0.3)


def test_truncated_texts_are_counted_over_a_resume(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training.Training(config, Run.open(config.output, config), prompts_of(config))
    monkeypatch.setattr(first.reward, "truncated_before", 7)
    first.save()
    again = training.Training(config, Run.open(config.output, config), prompts_of(config))
    assert again.reward.num_truncated == first.reward.num_truncated == 7 + first.reward.scorer.num_truncated


def prompts_of(config: Config) -> list[Any]:
    return [json.loads(line)["prompt"] for line in Path(config.prompts).read_text().splitlines()]


@pytest.mark.slow
def test_ppo_raises_the_reward_it_is_given(config: Config) -> None:
    config = dataclasses.replace(
        config, num_steps=40, completions_per_prompt=32, kl_coef=0.0, learning_rate=1e-2, objective="nominal",
        reward=config.reward.replace("brme", "single"), save_every=40,
    )  # fmt: skip
    rewards = [row["reward"] for row in train_policy.run(config).metrics()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_a_constant_reward_leaves_the_policy_at_the_reference(config: Config, tune: str, kl_coef: float) -> None:
    config = dataclasses.replace(
        config, num_steps=25, objective="constant(3)", kl_coef=kl_coef, save_every=25, tune=tune,
        learning_rate=8e-3 if tune == "lora" else 8e-5, num_epochs=1,
    )  # fmt: skip
    rows = train_policy.run(config).metrics()
    assert all(row["reward"] == 0.0 for row in rows)  # the baseline takes the constant away
    assert max(abs(row["kl_k3"]) for row in rows) <= 1e-3


def test_the_reward_scale_equals_one_worked_out_by_hand() -> None:
    heads = HeadRewards(torch.tensor([[0.0, 10.0], [2.0, 14.0]]), torch.ones(2, 2))
    scale = RewardScale.fit(heads, parse_objective("worst_case"))
    assert scale.head_baseline == (1.0, 12.0)
    # centered: (-1, -2), (1, 2); worst case: -2, 1; mean -.5; sample std 3/sqrt(2)
    assert scale.mean == pytest.approx(-0.5)
    assert scale.std == pytest.approx(3 / 2**0.5)
    combined = scale.combine(heads, parse_objective("worst_case"))
    assert combined.tolist() == pytest.approx([-1.5 * 2**0.5 / 3, 1.5 * 2**0.5 / 3])


BAD = {
    "does not divide": {"num_minibatches": 3},
    "nominal weight must be in": {"objective": "tradeoff(2)"},
    "unknown objective": {"objective": "best"},
    "--kl-coef must be at least 0": {"kl_coef": -1.0},
    "--num-steps must be at least 1": {"num_steps": 0},
    "--num-minibatches must be at least 1": {"num_minibatches": 0},
    "--clip must be above 0": {"clip": 0.0},
    r"--trace must be in \[0, 1\]": {"trace": 1.5},
    "--entropy-coef must be at least 0": {"entropy_coef": -1.0},
    "--max-step-kl must be above 0": {"max_step_kl": 0.0},
    "--kl-target, --kl-horizon and --kl-coef must be above 0": {"kl_target": 0.0},
    "--kl-horizon 7 must hold": {"kl_target": 6.0, "kl_horizon": 7.0},
    "--settle needs a --reward-ceiling": {"settle": True},
    "--reward-floor must be below": {"reward_floor": 1.0, "reward_ceiling": 1.0},
    "has no parameter to move": {"objective": "mean", "final_parameter": 1.0},
    "nominal weight must be in .* got 1.5": {"final_parameter": 1.5},
    "--baselines is only read with": {"baselines": "x.jsonl"},
    "--shaping is for --algorithm ppo, not grpo": {"algorithm": "grpo", "shaping": "par"},
    "--tune is for --algorithm ppo, not rloo": {"algorithm": "rloo", "tune": "full"},
    "--on-alarm rollback is for --algorithm ppo": {"algorithm": "rloo", "on_alarm": "rollback"},
    r"prompts.jsonl:1: a prompt of \d+ tokens and 300 new ones exceed the model's context of 256": {"max_tokens": 300},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs_are_refused_before_a_model_is_loaded(
    config: Config, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(training, "load_policy")
    monkeypatch.delattr(training, "Scorer")
    with pytest.raises(PoiseError, match=message):
        train_policy.run(dataclasses.replace(config, **BAD[message]))


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_checkpoint(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    combine = RewardScale.combine
    calls = []

    def poisoned(self: RewardScale, heads: HeadRewards, objective: object) -> torch.Tensor:
        calls.append(1)
        return combine(self, heads, objective) * (float("nan") if len(calls) > 2 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(RewardScale, "combine", poisoned)
    with pytest.raises(PoiseError, match=r"step \d: the loss is not finite; the last checkpoint is kept"):
        train_policy.run(config)
    saved = load_file(Path(config.output) / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_a_policy_with_another_tokenizer_than_the_reward_model_is_said(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = tmp_path / "other"
    shutil.copytree(config.model, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    train_policy.run(dataclasses.replace(config, model=str(model), num_steps=1))
    assert "re-tokenized as text" in " ".join(capsys.readouterr().err.split())


BFLOAT16_KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"tune": "full"},
    "all layers": {"tune": "full", "adapted_layers": 0},
    "own values": {"value_trunk": "own", "entropy_coef": 0.0, "accumulation": 2},
    "parts of one completion": {"accumulation": 8},
}


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights in bfloat16, as on a GPU; on a CPU only slower."""
    for module in ("models.loading", "models.reward_model"):
        monkeypatch.setattr(f"poise.{module}.frozen_dtype", lambda: torch.bfloat16)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("kind", rest_slow(BFLOAT16_KINDS))
def test_a_constant_reward_moves_nothing_in_bfloat16(config: Config, kind: str) -> None:
    """To the bit: old, new and reference log-probabilities come of one path, so that no rounding is left between them.

    The advantages are 0, so the gradients are 0, and Adam's step is 0 / (0 + eps).
    """
    config = dataclasses.replace(
        config, objective="constant(3)", prompts_per_step=4, num_steps=3, **BFLOAT16_KINDS[kind]
    )
    out = train_policy.run(config)
    exactly = (
        "reward",
        "kl",
        "kl_k3",
        "policy_loss",
        "value_loss",
        "step_kl",
        "clipped",
        "grad_norm",
        "value_grad_norm",
    )
    assert [{name: row[name] for name in exactly} for row in out.metrics()] == 3 * [dict.fromkeys(exactly, 0.0)]
    assert out.results is not None
    assert out.results["kl"] == 0.0
    saved = load_file(out.folder / "checkpoint.safetensors")
    weights = {name: value for name, value in saved.items() if name.startswith("weight.")}
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert not any(value.any() for name, value in weights.items() if "lora_B" in name or "value_head" in name)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("kind", rest_slow(BFLOAT16_KINDS))
def test_before_the_first_update_ratios_are_1_and_kl_is_0_in_bfloat16(config: Config, kind: str) -> None:
    """To the bit, with a reward that does move the policy."""
    config = dataclasses.replace(
        config, objective="mean", prompts_per_step=4, num_steps=2, num_epochs=1, num_minibatches=1,
        **BFLOAT16_KINDS[kind],
    )  # fmt: skip
    first, second = train_policy.run(config).metrics()
    assert first["kl"] == first["kl_k3"] == first["step_kl"] == first["clipped"] == 0.0
    assert first["grad_norm"] > 0
    assert second["kl_k3"] > 0  # it has moved since
    assert second["step_kl"] == second["clipped"] == 0.0


# ---- the reward ----


def losses_of(out: Run) -> list[list[float]]:
    return [[row[key] for key in ("reward", "kl", "policy_loss", "value_loss", "grad_norm")] for row in out.metrics()]


@pytest.mark.slow
def test_parts_of_a_minibatch_add_up(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, prompts_per_step=4, num_minibatches=1)
    whole = train_policy.run(config)
    for number in (4, 8):  # of a prompt each; of half of its completions
        parts = train_policy.run(dataclasses.replace(config, accumulation=number, output=str(tmp_path / str(number))))
        assert losses_of(parts) == [pytest.approx(row, abs=2e-5) for row in losses_of(whole)]


class OnCuda(torch.Tensor):
    """A tensor on the CPU that counts as one that was moved to a GPU."""


def cuda_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Groups that, like NCCL's, take tensors of a GPU alone; returns who sent one, as it grows."""
    senders: list[str] = []

    def refuse_others(send: Callable[..., Any]) -> Callable[..., Any]:
        def checked(first: Any, *others: Any) -> Any:
            for part in [*(first if isinstance(first, list) else [first]), *others]:
                if not isinstance(part, OnCuda):
                    raise RuntimeError("No backend type associated with device type cpu")
            frames = [frame for frame in traceback.extract_stack() if "/poise/" in frame.filename]
            senders.extend({frame.name for frame in frames})
            return send(first, *others)

        return checked

    monkeypatch.setattr(processes, "group_devices", lambda: ["cuda"])
    monkeypatch.setattr(processes, "_moved", lambda part, _: part.as_subclass(OnCuda))
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(torch.distributed, name, refuse_others(getattr(torch.distributed, name)))
    return senders


@pytest.mark.slow
def test_two_processes_compute_what_one_does(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo on the CPU: the same rewards and losses, with an objective that couples the batch.

    Each tensor that is sent was moved before; PyTorch moves objects, such as rows, itself.
    """
    config = dataclasses.replace(
        config, prompts_per_step=4, num_minibatches=2, objective="expected_tradeoff(0.4)", shaping="contrastive",
        num_steps=3,
    )  # fmt: skip
    one = train_policy.run(config)
    one_step = training.Training.one_step

    def counted(self: training.Training) -> dict[str, Any]:
        (tmp_path / "two" / f"world{os.environ['RANK']}").write_text(str(processes.num_processes()))
        return one_step(self)

    monkeypatch.setattr(training.Training, "one_step", counted)
    command = ["train-policy", "--config", str(one.folder / "config.yaml"), "--output", str(tmp_path / "two")]

    def work() -> int:
        senders = cuda_only(monkeypatch)
        status = main(command)
        (tmp_path / f"senders{os.environ['RANK']}").write_text("\n".join(senders))
        return status

    forked.launched(2, work, tmp_path)
    for rank in (0, 1):  # whitening, gradients, losses, the stop flag, heads of samples and of baselines, facts
        sent = set((tmp_path / f"senders{rank}").read_text().split())
        assert {
            "whiten",
            "add_up_gradients",
            "gather",
            "gathered",
            "check_rereading",
            "one_step",
            "_fit_scale",
        } <= sent, sent
    two = Run(tmp_path / "two")
    assert [(two.folder / f"world{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    samples = [list(read_rows(run.folder / "samples.jsonl")) for run in (one, two)]
    assert [row["completion"] for row in samples[1][:16]] == [row["completion"] for row in samples[0][:16]]
    for mine, theirs in zip(samples[0][:16], samples[1][:16], strict=True):
        assert theirs["reward"] == pytest.approx(mine["reward"], abs=1e-5)
    assert losses_of(two)[0] == pytest.approx(losses_of(one)[0], abs=1e-5)
    assert losses_of(two)[2] == pytest.approx(losses_of(one)[2], abs=1e-2)  # rounding grows, slowly
    assert len(list(read_rows(two.folder / "final.jsonl"))) == 4 * 2


def test_every_collective_of_a_run_gets_a_tensor_of_the_group_s_device(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that knows CUDA alone, as one of NCCL does: each tensor that is sent was moved before."""
    moved: list[torch.Tensor] = []
    sent: list[torch.Tensor] = []
    group: dict[str, Any] = {
        "is_initialized": lambda: True, "get_world_size": lambda: 1, "get_rank": lambda: 0, "barrier": lambda: None,
        "get_backend_config": lambda: "cuda:nccl", "destroy_process_group": lambda: None,
        "all_reduce": sent.append,
        "all_gather": lambda parts, mine: sent.append(parts[0].copy_(mine)),
        "all_gather_object": lambda parts, mine: parts.__setitem__(0, mine),
    }  # fmt: skip
    for name, replacement in group.items():
        monkeypatch.setattr(torch.distributed, name, replacement)
    monkeypatch.setattr(processes, "_moved", lambda part, _device: moved.append(part) or part)
    train_policy.run(dataclasses.replace(config, num_steps=2))
    # Of a step: moments of the advantages (3), tokens, losses and gradients of 4 minibatches, heads (2), facts, stop.
    assert len(sent) == len(moved) >= 2 * (3 + 12 + 2 + 1 + 1)


def test_processes_must_share_a_step_evenly(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    with pytest.raises(PoiseError, match=r"2 × 2 processes does not divide --prompts-per-step 2"):
        config.check()


@pytest.mark.parametrize("shaping", ["contrastive", "par"])
def test_rewards_against_baselines_equal_those_worked_out_by_hand(config: Config, tmp_path: Path, shaping: str) -> None:
    given = tmp_path / "baselines.jsonl"
    texts = ["a fine film", "an awful phone", "it was good"]
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts).read_text().splitlines()]
    given.write_text("".join(json.dumps({"prompt": p, "completion": t}) + "\n" for p in prompts for t in texts))
    config = dataclasses.replace(
        config, shaping=shaping, baselines=str(given), objective="mean", num_steps=1, reward_ceiling=-0.3
    )
    out = train_policy.run(config)
    scorer = Scorer.load(config.reward)
    assert out.results is not None
    scale = out.results["scale"]
    rows = list(read_rows(out.folder / "samples.jsonl"))
    assert len(rows) == 8
    clipped = 0
    for row in rows:
        heads = scorer([generated(row["prompt"], row["completion"])]).mean[0].double() * scorer.layout.reward_scale
        others = scorer([Sample(row["prompt"], text) for text in texts]).mean.double() * scorer.layout.reward_scale
        shaped = heads - others.mean(0) if shaping == "contrastive" else torch.sigmoid(heads - others).mean(0)
        expected = ((shaped - torch.tensor(scale["head_baseline"])).mean().item() - scale["mean"]) / scale["std"]
        clipped += expected > -0.3
        assert row["reward"] == pytest.approx(min(expected, -0.3), abs=1e-4)
    assert 0 < clipped < 8


def test_baselines_of_a_run_that_goes_on_are_those_it_sampled(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, shaping="contrastive", baselines_per_prompt=2, objective="mean")
    run, sampled = Run.open(config.output, config), []
    first = training.Training(config, run, prompts_of(config))
    rows = list(read_rows(run.folder / "baselines.jsonl"))
    assert [len(row["completions"]) for row in rows] == [2] * 4
    first.step = 1  # rows of the step that a checkpoint follows are kept
    first.save()
    again = training.Training(config, run, prompts_of(config))
    sample = Policy.sample

    def noted(self: Policy, prompts: list[Any], *arguments: Any, **options: Any) -> Any:
        sampled.append(prompts)
        return sample(self, prompts, *arguments, **options)

    monkeypatch.setattr(Policy, "sample", noted)
    again.one_step()
    assert len(sampled) == 1  # the step's completions, and no baseline
    assert list(read_rows(run.folder / "baselines.jsonl")) == rows
    assert parameter(again.reward.objective) is None


@pytest.mark.slow
def test_baselines_are_sampled_once_for_each_prompt(config: Config) -> None:
    out = train_policy.run(dataclasses.replace(config, shaping="par", num_steps=6))
    rows = list(read_rows(out.folder / "baselines.jsonl"))
    assert len(rows) == len({row["key"] for row in rows}) == 4
    assert all(len(row["completions"]) == 4 for row in rows)


def test_a_prompt_without_baselines_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "Review the film.", "completion": "good"}\n')
    with pytest.raises(PoiseError, match=r"no completion of the prompt 'Review the phone\.'"):
        train_policy.run(dataclasses.replace(config, shaping="par", baselines=str(tmp_path / "b.jsonl")))


def test_what_never_ended_is_penalized(config: Config, tmp_path: Path) -> None:
    plain = train_policy.run(dataclasses.replace(config, num_steps=1))
    strict = train_policy.run(
        dataclasses.replace(config, num_steps=1, missing_eos_penalty=3.0, output=str(tmp_path / "strict"))
    )
    before, after = (list(read_rows(run.folder / "samples.jsonl")) for run in (plain, strict))
    lowered = [one["reward"] - other["reward"] for one, other in zip(before, after, strict=True)]
    assert sorted({round(value, 4) for value in lowered}) in ([3.0], [0.0, 3.0])
    assert sum(lowered) / 24 == pytest.approx(1 - strict.metrics()[0]["ended"])


@pytest.mark.slow
def test_constants_of_the_scale_are_recorded(config: Config, tmp_path: Path) -> None:
    rows = {}
    for norm in ("initial", "running", "batch"):
        rows[norm] = train_policy.run(
            dataclasses.replace(config, reward_norm=norm, output=str(tmp_path / norm), learning_rate=1e-2)
        ).metrics()
    assert len({row["scale_std"] for row in rows["initial"]}) == 1
    assert len({row["scale_std"] for row in rows["running"]}) == 4
    for row in rows["batch"]:
        assert row["reward"] == pytest.approx(0, abs=1e-5)
        assert row["reward_std"] == pytest.approx(1, abs=1e-5)


def test_running_scale_is_that_of_everything_so_far() -> None:
    batches = [HeadRewards(torch.randn(n, 3) * n + n, torch.ones(n, 3)) for n in (5, 8, 3)]
    objective = parse_objective("mean")
    scale = RewardScale.fit(batches[0], objective)
    for batch in batches[1:]:
        scale = scale.updated(batch, objective)
    everything = objective(scale.centered(joined(batches)))
    assert scale.count == 16
    assert scale.mean == pytest.approx(everything.mean().item(), abs=1e-5)
    assert scale.std == pytest.approx(everything.std().item(), abs=1e-5)


def test_the_interval_of_the_unit_is_logged_and_kept(config: Config) -> None:
    out = train_policy.run(dataclasses.replace(config, completions_per_prompt=2, num_steps=2))
    assert out.results is not None
    low, high = out.results["scale_std_interval"]
    assert low < out.results["scale"]["std"] < high
    assert all(row["scale_std_interval"] == [low, high] for row in out.metrics())


# ---- RLOO and GRPO ----


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("algorithm", rest_slow(["rloo", "grpo"]))
def test_other_algorithms_leave_the_same_folder(
    config: Config, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, algorithm=algorithm, num_steps=2, reward_ceiling=0.2)
    out = train_policy.run(config)
    assert f"--baseline-completions is not read: {algorithm} fits" in " ".join(capsys.readouterr().err.split())
    assert [row["step"] for row in out.metrics()] == [0, 1]
    assert all({"reward", "kl", "heads", "gap", "monitor_score"} <= row.keys() for row in out.metrics())
    assert out.results is not None
    scale = RewardScale.from_json(out.results["scale"])
    objective, scorer = parse_objective(config.objective), Scorer.load(config.reward)
    samples = list(read_rows(out.folder / "samples.jsonl"))
    assert len(samples) == 2 * 8
    for row in samples:
        heads = scorer([generated(row["prompt"], row["completion"])])
        assert row["reward"] == pytest.approx(scale.combine(heads, objective).item(), abs=1e-4)
    final = list(read_rows(out.folder / "final.jsonl"))
    assert len(final) == 4 * 2
    assert any(abs(row["kl"]) > 1e-4 for row in final)  # sampled from what was trained, not from where it began
    assert train_policy.run(config).results == out.results  # a finished run is left alone
    prompts = Path(shutil.copy(config.prompts, out.folder.with_name("copied.jsonl")))
    elsewhere = dataclasses.replace(config, prompts=str(prompts))
    assert train_policy.run(elsewhere).results == out.results
    prompts.write_text(prompts.read_text().replace("film", "book"))
    with pytest.raises(PoiseError, match="differs in prompts"):
        train_policy.run(elsewhere)
    settings = (out.folder / "config.yaml").read_text()
    (out.folder / "config.yaml").write_text(settings.replace(config.prompts, str(prompts)))
    with pytest.raises(PoiseError, match="is finished, and of its inputs --prompts changed since"):
        train_policy.run(elsewhere)


# ---- what moves during a run ----


def test_parameter_moves_linearly(config: Config) -> None:
    rows = train_policy.run(dataclasses.replace(config, objective="tradeoff(0.9)", final_parameter=0.0)).metrics()
    assert [row["parameter"] for row in rows] == pytest.approx([0.9, 0.6, 0.3, 0.0])


@pytest.mark.slow
def test_a_policy_settles_at_the_ceiling(config: Config, tmp_path: Path) -> None:
    """At the ceiling nothing of the policy moves; the value head still learns what the policy is worth."""
    config = dataclasses.replace(config, reward_ceiling=1.5, reward_floor=1.5 - 1e-6, settle=True, num_steps=2)
    rows = train_policy.run(config).metrics()
    assert all(row["pace"] == pytest.approx(0.0, abs=1e-6) for row in rows)
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-5) for row in rows)
    weights = load_file(Path(config.output) / "checkpoint.safetensors")
    value = [tensor for name, tensor in weights.items() if name.startswith("weight.value")]
    assert any(tensor.abs().sum() > 0 for tensor in value)
    # far from it the rate is in proportion to what is missing
    config = dataclasses.replace(config, reward_ceiling=2.0, reward_floor=None, output=str(tmp_path / "far"))
    for row in train_policy.run(config).metrics():
        assert row["pace"] == pytest.approx(min(1.0, 1 - row["reward"] / 2), abs=1e-6)
        assert row["kl"] < 1


def test_kl_coefficient_adapts_to_its_target(config: Config) -> None:
    rows = train_policy.run(dataclasses.replace(config, kl_target=0.01, kl_horizon=80.0, learning_rate=1e-2)).metrics()
    # A step of 8 completions moves it by at most .2 * 8 / 80.
    for row, following in itertools.pairwise(rows):
        error = min(max(row["kl"] / 0.01 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * 8 / 80))
    assert any(row["kl"] > 0.012 for row in rows[:-1])


def test_a_step_ends_when_it_has_moved_far_enough(config: Config) -> None:
    rows = train_policy.run(dataclasses.replace(config, max_step_kl=1e-9, learning_rate=1e-2, num_steps=2)).metrics()
    assert all(row["updates"] < 4 for row in rows)


@pytest.mark.slow
def test_an_entropy_bonus_raises_entropy(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, objective="constant(0)", kl_coef=0.0, num_steps=15, learning_rate=1e-2)
    plain = train_policy.run(config).metrics()
    bonus = train_policy.run(dataclasses.replace(config, entropy_coef=1.0, output=str(tmp_path / "bonus"))).metrics()
    assert bonus[-1]["entropy"] > plain[-1]["entropy"] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tune": "full", "learning_rate": 1e-3}, {"value_trunk": "own"}], ids=str)
def test_other_trunks_learn_and_resume(config: Config, tmp_path: Path, options: dict[str, Any]) -> None:
    config = dataclasses.replace(config, num_steps=4, **options)
    whole = train_policy.run(config)
    again = dataclasses.replace(config, output=str(tmp_path / "again"))

    class StopError(Exception):
        pass

    def stop_after_two(self: training.Training) -> dict[str, Any]:
        if self.step == 2:
            raise StopError
        return one_step(self)

    one_step = training.Training.one_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "one_step", stop_after_two)
        with pytest.raises(StopError):
            train_policy.run(again)
    train_policy.run(again)
    assert same_end(whole.folder, tmp_path / "again")
    if config.tune == "full":
        assert (whole.folder / "policy" / "model.safetensors").exists()
        assert (whole.folder / "policy" / "tokenizer.json").exists()


# ---- alarms ----


def alarmed_at(*steps: int) -> Callable[..., Reading]:
    def update(self: Monitor, _stats: object) -> Reading:
        self._steps += 1
        fires = self._steps - 1 in steps
        return Reading(2.0 if fires else 0.1, fires, {})

    return update


def test_after_an_alarm_a_run_goes_back_to_its_last_safe_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, save_every=1, on_alarm="rollback", learning_rate=1e-2)
    monkeypatch.setattr(Monitor, "update", alarmed_at(1))
    out = train_policy.run(config)
    assert out.results is not None
    assert (out.results["steps"], out.results["ended_by"]) == (1, "rollback")
    assert [row["step"] for row in out.metrics()] == [0]
    saved, safe = (load_file(out.folder / f"{name}.safetensors") for name in ("checkpoint", "safe"))
    assert all(torch.equal(saved[name], safe[name]) for name in safe)


def test_every_alarm_makes_the_objective_more_pessimistic() -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(final_parameter=None), alarms=Alarms("pessimism", 1.0), step=0,
        _first_objective=parse_objective("tradeoff(0.4)"),
    )  # fmt: skip
    found = []
    for run.alarms.pessimism in range(3):
        found.append(parameter(training.Training._objective(run)))
    assert found == pytest.approx([0.4, 0.2, 0.1])


@pytest.mark.slow
def test_an_alarm_does_what_the_settings_say(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, num_steps=8, save_every=2)
    monkeypatch.setattr(Monitor, "update", alarmed_at(5, 6))
    found = {
        action: train_policy.run(dataclasses.replace(config, on_alarm=action, output=str(tmp_path / action)))
        for action in ("log", "stop", "rollback", "pessimism")
    }
    results = {action: out.results or {} for action, out in found.items()}
    assert results["log"]["steps"] == 8
    assert [alarm["step"] for alarm in results["log"]["alarms"]] == [5]  # the next one within the pause
    assert results["stop"]["steps"] == 6
    assert results["rollback"]["steps"] == 4
    saved, plain = (load_file(found[action].folder / "checkpoint.safetensors") for action in ("rollback", "log"))
    safe = load_file(found["rollback"].folder / "safe.safetensors")
    assert all(torch.equal(saved[name], safe[name]) for name in safe)
    assert any(not torch.equal(saved[name], plain[name]) for name in safe)
    assert [row["step"] for row in found["rollback"].metrics()] == [0, 1, 2, 3]  # those of the policy that was kept
    assert {row["step"] for row in read_rows(found["rollback"].folder / "samples.jsonl")} == {0, 1, 2, 3}
    rows = found["pessimism"].metrics()
    assert [row["kl_coef"] for row in rows] == [0.05] * 6 + [0.1] * 2
    assert [row["parameter"] for row in rows] == [0.4] * 6 + [0.2] * 2


# ---- what can go wrong ----


def test_a_policy_that_is_read_otherwise_than_sampled_stops_before_its_first_update(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Policy._read

    def off(self: Policy, *args: Any, **options: Any) -> Any:
        logprob, *others = read(self, *args, **options)
        return logprob + 0.01, *others

    monkeypatch.setattr(Policy, "_read", off)
    with pytest.raises(PoiseError, match=r"read again before the first update, differ by 0\.01 nats"):
        train_policy.run(config)
    with safe_open(Path(config.output) / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 0
    assert not (Path(config.output) / "metrics.jsonl").exists()


def test_a_reward_that_is_not_finite_stops_and_names_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Scorer.decode
    calls = []

    def poisoned(self: Scorer, features: torch.Tensor) -> HeadRewards:
        calls.append(1)
        heads = decode(self, features)
        return heads if len(calls) < 4 else HeadRewards(heads.mean / 0, heads.std)

    monkeypatch.setattr(Scorer, "decode", poisoned)
    with pytest.raises(PoiseError, match=r"step \d: the reward of '.*' is not finite; the last checkpoint is kept"):
        train_policy.run(config)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(config: Config, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails half-way."""
    settings = Path(config.output).parent / "config.yaml"
    settings.write_text(yaml.safe_dump(config_dict(dataclasses.replace(config, save_every=1))))
    save = training.Training.save

    def limited(self: training.Training) -> None:
        if self.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(self)

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        training.Training.save = limited  # type: ignore[method-assign]
        return main(["train-policy", "--config", str(settings)])

    said = tmp_path / "stderr.txt"
    assert forked.started(work, stderr=said).ended() == 2
    assert "cannot write" in said.read_text()
    assert "the last checkpoint is kept" in said.read_text()
    folder = Path(config.output)
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 1
    assert not list(folder.glob(".*partial"))


def test_a_request_to_stop_ends_the_step_and_saves_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    one_step = training.Training.one_step

    def interrupted(self: training.Training) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return one_step(self)

    monkeypatch.setattr(training.Training, "one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_policy.run(dataclasses.replace(config, save_every=4))
    with safe_open(Path(config.output) / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 1
    assert [row["step"] for row in Run(Path(config.output)).metrics()] == [0]


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_saves(config: Config, tmp_path: Path) -> None:
    settings = Path(config.output).parent / "config.yaml"
    settings.write_text(yaml.safe_dump(config_dict(dataclasses.replace(config, num_steps=500, save_every=500))))
    said = tmp_path / "stderr.txt"
    process = forked.started(lambda: main(["train-policy", "--config", str(settings)]), stderr=said)
    metrics = Path(config.output) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.status() is None, said.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.ended(timeout=60) == 130
    assert "goes on from the last checkpoint" in said.read_text()
    with safe_open(Path(config.output) / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == metrics.read_bytes().count(b"\n")


def test_unknown_and_missing_trackers_are_refused(config: Config) -> None:
    with pytest.raises(PoiseError, match="no tracker 'tensorbored'"):
        dataclasses.replace(config, trackers=("tensorbored",)).check()
    with pytest.raises(PoiseError, match="--trackers comet_ml: its package is not installed"):
        dataclasses.replace(config, trackers=("comet_ml",)).check()
