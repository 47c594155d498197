"""The KL of RLOO and GRPO against its definition; budgets and ladders, in runs and in scripts."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import forked
from conftest import rest_slow
from poise.errors import PoiseError
from poise.integrations import trl_trainers
from poise.integrations.trl_kl import KLBudgetCallback
from poise.integrations.trl_reward import RobustReward
from poise.models.loading import load_policy
from poise.policy import train as train_policy
from poise.policy.config import Config
from poise.runtime import ladder
from poise.runtime.ladder import best_of, kept_policies
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Run
from poise.studies import choose
from poise.studies.choose_config import Config as ChooseConfig
from trl_runs import PROMPTS, TRL_SETS_A_DEPRECATED_DEFAULT, own_script, settings
from validated_runs import validated_run

pytestmark = [pytest.mark.usefixtures("undrawn"), TRL_SETS_A_DEPRECATED_DEFAULT]


@pytest.fixture(scope="module")
def reward_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


@pytest.fixture
def config(reward_run: str, prompts_file: Path, tiny_model: str, tmp_path: Path) -> Config:
    return Config(
        prompts=str(prompts_file), reward=reward_run, objective="nominal", output=str(tmp_path / "policy"),
        model=tiny_model, algorithm="grpo", num_steps=6, prompts_per_step=2, completions_per_prompt=4, max_tokens=8,
        adapted_layers=2, lora_rank=4, num_minibatches=1, kl_coef=0.0, learning_rate=0.03, save_every=2,
        eval_completions=2, keep_at_kl=(),
    )  # fmt: skip


CASES = [
    ("grpo", 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("rloo", 2), ("grpo", 1), ("rloo", 1))),
]


def by_definition(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of each completion, (N,): the sum over its tokens of log π − log π_ref, from the logits of whole texts."""
    ids, seen = (torch.cat([batch[f"prompt_{one}"], batch[f"completion_{one}"]], 1) for one in ("ids", "mask"))
    chosen = []

    def read() -> None:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits
        chosen.append(logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1))

    read()
    with model.disable_adapter():
        read()
    tokens = batch["completion_mask"].shape[1]
    return ((chosen[0] - chosen[1])[:, -tokens:] * batch["completion_mask"]).sum(-1)


@pytest.mark.parametrize(("algorithm", "updates"), CASES)
def test_the_kl_is_that_of_the_policy_that_sampled(
    algorithm: str, updates: int, tiny_model: str, reward_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In nats per completion. With one update GRPO itself reads no log-probabilities of its policy."""
    make, expected = trl_trainers.make_trainer, []

    def watched(*arguments: Any) -> Any:
        trainer = make(*arguments)
        generate = trainer._generate_and_score_completions

        def generating(inputs: Any) -> Any:
            batch = generate(inputs)
            expected.append(by_definition(trainer.model, batch))
            return batch

        trainer._generate_and_score_completions = generating
        return trainer

    monkeypatch.setattr(trl_trainers, "make_trainer", watched)
    rows: list[dict[str, Any]] = []
    how = settings(algorithm, num_epochs=updates, num_minibatches=1, learning_rate=0.03)
    trl_trainers.train(how, RobustReward.load(reward_run), *load_policy(tiny_model), PROMPTS, tmp_path, rows.append)
    assert len(expected) == len(rows) == 3
    for row, kl in zip(rows, expected, strict=True):
        assert [sample["kl"] for sample in row["samples"]] == pytest.approx(kl.tolist(), abs=1e-4)
        assert row["kl"] == pytest.approx(kl.mean().item(), abs=1e-4)
        assert row["kl_k3"] >= 0
    assert abs(rows[-1]["kl"]) > 0.05
    assert not (tmp_path / "ladder").exists()


def kls(run: Run) -> list[float]:
    return [row["kl"] for row in run.metrics()]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lasting(results: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (results or {}).items() if key != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_kl_budget_ends_a_run_as_it_ends_ppo(
    algorithm: Any, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever stops at a budget has the run of fewer steps: same weights, nothing of what came after."""
    how = dataclasses.replace(config, algorithm=algorithm)
    free = train_policy.run(dataclasses.replace(how, output=f"{config.output}-free"))
    kl = kls(free)
    over = next(step for step in range(3, 6) if kl[step] > max(kl[:step]))
    limit = (max(kl[:over]) + kl[over]) / 2
    bounded = train_policy.run(dataclasses.replace(how, max_kl=limit))
    assert bounded.results is not None
    steps = max(range(0, over, how.save_every))
    assert (bounded.results["steps"], bounded.results["ended_by"]) == (steps, "max_kl")
    assert kls(bounded) == kl[:steps]
    assert {row["step"] for row in read_rows(bounded.folder / "samples.jsonl")} == set(range(steps))
    said = " ".join(capsys.readouterr().err.split())
    assert f"step {over}: KL {kl[over]:.1f} is above --max-kl {limit:g}; going back to a checkpoint below" in said
    short = train_policy.run(dataclasses.replace(how, output=f"{config.output}-short", num_steps=steps))
    assert same_weights(bounded.folder / "policy", short.folder / "policy")
    assert (free.results or {})["ended_by"] == "num_steps"
    # Killed when it has ended and before it says so, it ends the same; and more steps are not what it lacks.
    for name, dies in (("marked", "ended.json"), ("dropped", "final.jsonl")):
        stormy = dataclasses.replace(how, max_kl=limit, output=f"{config.output}-{name}")
        assert forked.status_of(lambda one=stormy, at=dies: run_until_written(one, at)) == -signal.SIGKILL  # type: ignore[misc]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.Trainer, "train", pytest.fail)  # what has ended is not trained again
            again = train_policy.run(stormy)
        assert lasting(again.results) == lasting(bounded.results)
        assert same_weights(bounded.folder / "policy", again.folder / "policy")
        assert (again.folder / "samples.jsonl").read_text() == (bounded.folder / "samples.jsonl").read_text()
        assert kls(again) == kl[:steps]
    with pytest.raises(PoiseError, match=r"was ended by --max-kl .*; more --num-steps do not make it go on"):
        train_policy.run(dataclasses.replace(stormy, num_steps=20))


def run_until_written(config: Config, name: str) -> None:
    """Run, and die as from kill -9 once a file is written."""
    for module in (trl_trainers, train_policy):
        for function in ("write_json", "write_jsonl"):
            if write := getattr(module, function, None):

                def dying(path: Path, *more: Any, write: Any = write) -> None:
                    write(path, *more)
                    if path.name == name:
                        os.kill(os.getpid(), signal.SIGKILL)

                setattr(module, function, dying)
    train_policy.run(config)


def test_a_run_above_its_kl_budget_at_once_ends_where_it_began(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    how = dataclasses.replace(config, max_kl=1e-4, save_every=1, learning_rate=0.05)
    out = train_policy.run(how)
    assert out.results is not None
    assert (out.results["steps"], out.results["ended_by"], out.results["alarms"]) == (0, "max_kl", [])
    assert out.metrics() == []
    assert out.results["kl"] == pytest.approx(0, abs=1e-4)
    assert same_weights(out.folder / "policy", out.folder / "trainer" / "start")
    said = " ".join(capsys.readouterr().err.split())
    assert "step 1: KL" in said
    assert "is above --max-kl 0.0001; going back to a checkpoint below" in said
    with pytest.raises(PoiseError, match=r"was ended by --max-kl 0.0001; more --num-steps do not make it go on"):
        train_policy.run(dataclasses.replace(how, num_steps=20))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_ladder_keeps_the_first_policy_at_each_rung(algorithm: Any, config: Config, tmp_path: Path) -> None:
    """Each is the one that a run of as many steps ends with, also after a kill; `poise choose` samples it."""
    how = dataclasses.replace(config, algorithm=algorithm)
    plain = train_policy.run(dataclasses.replace(how, output=f"{config.output}-plain"))
    kl = kls(plain)
    first, second = sorted(value for step, value in enumerate(kl) if step and value > max(kl[:step]))[:2]
    climbing = dataclasses.replace(how, keep_at_kl=(second, 1e6, first))
    out = train_policy.run(climbing)
    assert kls(out) == kl
    rows = list(read_rows(out.folder / "ladder.jsonl"))
    assert [(row["rung"], row["kl"]) for row in rows] == [(first, first), (second, second)]
    places = kept_policies(out.folder)
    assert list(places) == [float(f"{rung:.3g}") for rung in (first, second)]
    for row, kept in zip(rows, places.values(), strict=True):
        assert kl[row["step"]] == row["kl"]
        short = dataclasses.replace(how, num_steps=row["step"], output=f"{config.output}-{row['step']}")
        assert same_weights(train_policy.run(short).folder / "policy", kept)
        assert {path.name for path in kept.iterdir()} >= {"base.json", "tokenizer.json", "adapter_config.json"}
    stormy = dataclasses.replace(climbing, output=f"{config.output}-stormy")
    assert forked.status_of(lambda: run_until_kept(stormy, rows[1]["step"])) == -signal.SIGKILL
    again = train_policy.run(stormy)
    for name in ("ladder.jsonl", "samples.jsonl", "final.jsonl"):
        assert (again.folder / name).read_text() == (out.folder / name).read_text()
    found = choose.from_run(ChooseConfig(str(out.folder), str(tmp_path / "out"), rungs=(second,), per_rung=4))
    assert {row["kl"] for row in found} == {0.0, float(f"{second:.3g}")}


@pytest.mark.parametrize("algorithm", rest_slow(["grpo", "rloo"]))
def test_the_policy_that_the_validator_likes_best_is_kept(
    algorithm: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one a run of two steps ends with, in one run and in one that goes on; within --max-kl alone."""
    reward = f"{config.reward}/single"
    how = dataclasses.replace(
        config, algorithm=algorithm, heads="brme", validator=reward, num_steps=5, num_epochs=2, save_every=1
    )  # fmt: skip
    out = validated_run(how, monkeypatch)
    told = {"step": 2, "kl": out.metrics()[2]["kl"], "validator": 2.0}
    assert (out.results or {})["best"] == best_of(out.folder) == told
    short = train_policy.run(dataclasses.replace(how, validator=None, num_steps=2, output=f"{config.output}-short"))
    assert same_weights(out.folder / "best", short.folder / "policy")
    assert (short.results or {})["best"] is None
    parted = dataclasses.replace(how, output=f"{config.output}-again")
    validated_run(dataclasses.replace(parted, num_steps=2), monkeypatch)
    again = validated_run(parted, monkeypatch, first=2)
    assert best_of(again.folder) == told  # its mark takes the step before, which only a checkpoint knows
    tight = validated_run(
        dataclasses.replace(how, max_kl=told["kl"] * 0.99, output=f"{config.output}-tight"), monkeypatch
    )
    assert ((tight.results or {})["best"] or {"step": 1})["step"] < 2


def run_until_kept(config: Config, step: int) -> None:
    """Run, and die as from kill -9 between a kept policy and its row."""
    append = ladder.append_jsonl

    def dying(path: Path, rows: Any) -> None:
        if rows[0]["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, rows)

    ladder.append_jsonl = dying  # type: ignore[assignment]
    train_policy.run(config)


def test_a_run_without_kl_in_its_samples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\n")
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "prompt": "p", "completion": "c"}\n')
    with pytest.raises(PoiseError, match="is of an earlier version, whose RLOO and GRPO runs kept no KL"):
        choose.from_run(ChooseConfig(str(tmp_path), str(tmp_path / "out")))


# ---- in a script of TRL's own ----


@pytest.mark.parametrize("algorithm", rest_slow(["grpo", "rloo"]))
def test_a_script_stops_at_its_budget_and_has_the_weights_of_a_checkpoint(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a whole model, whose reference is a model of its own."""
    arguments: dict[str, Any] = {
        "beta": 1e-9, "max_steps": 12, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3,
        "num_iterations": 2, "save_total_limit": 2,
    }  # fmt: skip
    make = own_script(algorithm, RobustReward.load(reward_run), tiny_model, tmp_path / "a", PROMPTS, **arguments)
    free = KLBudgetCallback(make, keep_at_kl=(1e-9,))
    make.add_callback(free)
    make.train()
    kl = [row["poise/kl"] for row in make.state.log_history if "poise/kl" in row]
    assert len(kl) == 6  # two updates a generation
    assert kl[0] == pytest.approx(0, abs=1e-5)
    over = next(at for at in range(2, 6) if kl[at] > max(kl[:at]))
    limit = (max(kl[:over]) + kl[over]) / 2
    assert list(kept_policies(tmp_path / "a")) == [float(f"{next(value for value in kl if value >= 1e-9):.3g}")]

    trainer = own_script(algorithm, RobustReward.load(reward_run), tiny_model, tmp_path / "b", PROMPTS, **arguments)
    budget = KLBudgetCallback(trainer, max_kl=limit)
    trainer.add_callback(budget)
    trainer.train()
    assert budget.ended
    assert trainer.state.global_step == 2 * over + 2
    assert budget.within == 2 * over - 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"step {2 * over}: KL {kl[over]:.1f} is above max_kl {limit:g}; going back to a checkpoint below" in said
    kept = transformers.AutoModelForCausalLM.from_pretrained(budget.place(budget.within))
    ours = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in kept.named_parameters())
    start, _ = load_policy(tiny_model)
    assert not all(torch.equal(parameter, ours[name]) for name, parameter in start.named_parameters())


def test_what_has_no_kl_or_nothing_to_go_back_to_is_one_line() -> None:
    def made(max_kl: float | None = 20.0, keep: tuple[float, ...] = (), fsdp: bool = False, **args: Any) -> None:
        known = {"beta": 0.1, "save_strategy": "steps", "save_total_limit": None, "output_dir": "out"}
        trainer = SimpleNamespace(
            args=SimpleNamespace(**{**known, **args}), is_fsdp_enabled=fsdp, is_deepspeed_enabled=False,
            _generate_and_score_completions=None, _get_per_token_logps_and_entropies=None,
        )  # fmt: skip
        KLBudgetCallback(trainer, max_kl, keep)

    made()
    made(None, save_strategy="no", save_total_limit=1, fsdp=True)  # it only measures
    for said, wrong in {
        r"at beta 0 TRL reads no reference, .*; give beta=1e-9": {"beta": 0.0, "max_kl": None},
        r"cannot save or load weights that FSDP or DeepSpeed has spread; `poise train-policy --shard` can": {
            "fsdp": True
        },
        r"give save_strategy='steps', not 'no'": {"save_strategy": "no"},
        r"give save_total_limit=2 or more": {"save_total_limit": 1},
        r"a KL must be above 0 and finite, got -1": {"max_kl": -1.0},
        r"a KL must be above 0 and finite, got nan": {"keep": (5.0, float("nan"))},
    }.items():
        with pytest.raises(PoiseError, match=said) as caught:
            made(**wrong)
        assert "\n" not in str(caught.value)


def test_checkpoints_between_generations_are_refused(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    trainer = own_script(
        "grpo", RobustReward.load(reward_run), tiny_model, tmp_path, PROMPTS, save_strategy="steps", save_steps=3,
        num_iterations=2, beta=0.1,
    )  # fmt: skip
    trainer.add_callback(KLBudgetCallback(trainer, max_kl=1.0))
    with pytest.raises(PoiseError, match=r"save_steps must be a multiple of 2, the updates of a generation"):
        trainer.train()


def test_a_kl_that_is_no_number_ends_the_training(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    trainer = own_script("grpo", RobustReward.load(reward_run), tiny_model, tmp_path, PROMPTS, beta=0.1)
    trainer.add_callback(KLBudgetCallback(trainer))
    for parameter in trainer.ref_model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(PoiseError, match="step 0: the KL of the completions is not finite"):
        trainer.train()
    with pytest.raises(PoiseError, match="in a way not known here: no KL is measured"):
        KLBudgetCallback(trainer)._both({}, [])


def test_its_state_is_kept_in_checkpoints(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    trainer = own_script(
        "grpo", RobustReward.load(reward_run), tiny_model, tmp_path, PROMPTS, save_strategy="steps", save_steps=1,
        beta=0.1, learning_rate=0.01,
    )  # fmt: skip
    budget = KLBudgetCallback(trainer, max_kl=100.0, keep_at_kl=(1e-9, 50.0))
    trainer.add_callback(budget)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["KLBudgetCallback"] == json.loads(json.dumps(budget.state()))
    assert (budget.ladder.reached, budget.within) == (1e-9, 1)
    again, fresh = (KLBudgetCallback(trainer, 100.0, (1e-9, 50.0)) for _ in range(2))
    again.on_train_begin(trainer.args, trainer.state, None)
    assert again.state() == budget.state()
    trainer.state.global_step = 0
    fresh.on_train_begin(trainer.args, trainer.state, None)
    assert (fresh.ladder.reached, fresh.within) == (0.0, 0)
    assert kept_policies(tmp_path) == {}  # of a training that begins anew
