"""`poise plan`: what fits says so, what does not names the largest part and what to change."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from poise.cli import plan
from poise.cli.main import main
from poise.functional.memory import GIB, Memory


def test_a_small_model_fits_and_no_weights_are_read(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    assert main(["plan", "--model", str(tmp_path), "--memory", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("  fits") == 2
    assert "train-policy: 0." in said


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_rloo_and_grpo_are_planned_too(
    algorithm: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No part of theirs is PPO's own; a larger minibatch takes more, and fewer completions at once help."""
    (tmp_path / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    command = ["plan", "--model", str(tmp_path), "--algorithm", algorithm]
    assert main([*command, "--memory", "1"]) == 0
    of_policy = capsys.readouterr().out.split("train-policy:")[1]
    assert "values" not in of_policy
    with pytest.raises(SystemExit) as stop:
        main([*command, "--memory", "1", "--num-minibatches", "1", "--max-tokens", "1024"])
    assert stop.value.code == 1
    assert "fits with --num-minibatches 4" in capsys.readouterr().out
    config = plan.Config(model=str(tmp_path), algorithm=algorithm, max_tokens=1024)  # type: ignore[arg-type]
    totals = [
        plan.of_policy(dataclasses.replace(config, num_minibatches=n), plan._Shapes(config)).phases["update"]
        for n in (1, 8)
    ]
    assert totals[0]["activations"] > 4 * totals[1]["activations"]
    for name, value in {"--tune": "full", "--value-trunk": "own", "--accumulation": "2"}.items():
        assert main([*command, name, value]) == 2
        assert f"{name} is for --algorithm ppo, not {algorithm}" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_validator_is_counted(
    algorithm: Any, tiny_model: str, watched_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own config.json: here of two layers beside a reward model of one."""
    config = plan.Config(tiny_model, str(watched_reward / "single"), algorithm=algorithm)
    watched = dataclasses.replace(config, validator=str(watched_reward / "validator"))
    alone, held = (plan.of_policy(one, plan._Shapes(one)).held for one in (config, watched))
    assert held["validator"] > held["reward model"]
    assert {name: size for name, size in held.items() if name != "validator"} == alone
    assert main(["plan", "--model", tiny_model, "--validator", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def takes(config: plan.Config, _: object) -> Memory:
    """A training of which parts, shards and the kind of training each take a known share away."""
    update = 40 // config.accumulation + 8 // (config.gpus if config.shard else 1) + 30 * (config.tune == "full")
    return Memory({"weights": GIB}, {"update": {"activations": update * GIB}})


@pytest.mark.parametrize(
    ("memory", "changes"),
    [
        (100, {}),
        (60, {"train-policy": ("--accumulation 8",)}),
        (45, {"train-policy": ("--accumulation 8", "--shard")}),
        (20, {"train-policy": ("--accumulation 8", "--tune lora")}),
        (1, {"train-policy": None}),
    ],
)
def test_what_does_not_fit_says_the_fewest_changes(
    memory: float, changes: dict[str, object], tiny_model: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of what takes 1 + 20 + 8 + 30 GiB, a tenth of the memory left unused."""
    monkeypatch.setattr(plan, "TRAININGS", {"train-policy": takes})
    config = plan.Config(model=tiny_model, tune="full", gpus=2, accumulation=2, memory=float(memory))
    found = plan.plan_of(config)
    assert found.changes == changes
    said = plan.as_text(found)
    assert ("fits with" in said) == bool(changes.get("train-policy"))
    assert ("a smaller model" in said) == (memory == 1)
    if changes:
        assert "activations is the largest part" in said
        with pytest.raises(SystemExit) as stop:
            plan.check_outcome(found)
        assert stop.value.code == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("training", "settings", "fits", "change"),
    [
        ("train-reward", {"device_batch_size": 4}, {"device_batch_size": 1}, "--device-batch-size 1"),
        ("train-reward", {"device_batch_size": 1}, {"device_batch_size": 1, "tune": "lora"}, ""),
        ("train-reward", {"tune": "full"}, {"tune": "lora"}, "--trunk lora"),
        ("train-policy", {"tune": "full"}, {"tune": "lora"}, "--tune lora"),
        ("train-reward", {}, {"gradient_checkpointing": True}, "--gradient-checkpointing"),
        ("train-reward", {"gpus": 1}, {"gpus": 2, "shard": True}, "2 GPUs with --shard"),
        ("train-reward", {"gpus": 3}, {"gpus": 3, "shard": True}, "--shard"),
        ("train-reward", {"gpus": 3, "shard": True}, {"gpus": 48}, "48 GPUs with --shard"),
        ("train-reward", {"gpus": 3}, {"gpus": 96}, None),
        ("train-reward", {"adapter_heads": 4}, {"head_layers": 1}, "--head-layers 1"),
        ("train-reward", {"adapter_heads": 4, "head_layers": 1}, {"gpus": 2}, None),  # which it cannot be spread over
        ("train-policy", {"adapter_heads": 4, "head_layers": 0}, {"head_layers": 1}, None),  # not a setting of it
        ("train-policy", {"accumulation": 2}, {"accumulation": 8}, "--accumulation 8"),
        ("train-policy", {"accumulation": 8}, {"accumulation": 32}, "--accumulation 32"),  # of 4 completions each
        ("train-policy", {"accumulation": 32}, {"accumulation": 64}, None),
    ],
)
def test_every_change_is_known_by_its_option(
    training: str, settings: dict[str, Any], fits: dict[str, Any], change: str | None, tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a training that fits with certain settings, and no others. "": it fits as it is."""

    def needs(config: plan.Config, _: object) -> Memory:
        fine = all(getattr(config, name) == value for name, value in fits.items())
        return Memory({"weights": GIB}, {"update": {"activations": 0 if fine else 1000 * GIB}})

    monkeypatch.setattr(plan, "TRAININGS", {training: needs})
    whole = {"prompts_per_step": 16, "num_minibatches": 2, "completions_per_prompt": 4, "head_layers": 3, **settings}
    found = plan.plan_of(plan.Config(model=tiny_model, **whole))
    assert found.fits == (change == "")
    assert found.changes == ({} if change == "" else {training: (change,) if change else None})


def test_adapters_of_heads_cannot_be_spread(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", tiny_model, "--adapter-heads", "4", "--shard"]) == 2
    assert capsys.readouterr().err == "poise: --adapter-heads does not go with --shard: leave one of them out\n"


def test_a_model_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing known"}))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "gpus"), [("lora", 1), ("full", 8)])
def test_the_table_of_the_documentation_is_what_is_computed(tune: str, gpus: int) -> None:
    place = Path(__file__).parents[2] / "docs" / "sizing.py"
    spec = importlib.util.spec_from_file_location("sizing_of_docs", place)
    assert spec
    assert spec.loader
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    assert docs.row("1.5B (Qwen2.5)", tune, gpus) in docs.PAGE.read_text()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1"),
        ({"vocab_size": -5}, "vocab_size must be a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1"),
        ({"model_type": "bert"}, "it reads no reward from a last token"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(
    sizes: dict[str, object], reason: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((Path(tiny_model) / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_counts_that_no_gpu_holds_are_refused_before_they_are_listed(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, reason in (
        (["--adapter-heads", "1000000000"], "--adapter-heads must be in [0, 1024]"),
        (["--max-length", "2000000000"], "tokens at once are more than any GPU holds"),
    ):
        assert main(["plan", "--model", tiny_model, *options]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--gpus", "3"],
            "--num-minibatches 2 × 3 GPUs does not divide --prompts-per-step 32, which train-policy refuses",
        ),
        (["--gpus", "3"], "--prompts-per-step 36 would do"),
        (["--num-minibatches", "7"], "--num-minibatches 7 does not divide --prompts-per-step 32"),
        (["--adapted-layers", "99"], "--adapted-layers must be at most 3"),
        (["--algorithm", "grpo", "--completions-per-prompt", "1"], "--completions-per-prompt must be at least 2"),
    ],
)
def test_what_train_policy_refuses_is_not_planned(
    options: list[str], reason: str, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", tiny_model, *options]) == 2
    assert reason in capsys.readouterr().err


def test_no_more_gpus_are_offered_than_divide_the_prompts(tiny_model: str) -> None:
    config = plan.Config(model=tiny_model, gpus=8)
    offered = {name: [text for text, _ in plan._known_changes(config, name)] for name in plan.TRAININGS}
    assert "16 GPUs with --shard" in offered["train-policy"]
    assert not {"32 GPUs with --shard", "64 GPUs with --shard"} & set(offered["train-policy"])
    assert "64 GPUs with --shard" in offered["train-reward"]
