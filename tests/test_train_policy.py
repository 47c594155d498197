"""PPO's loop: it learns, it stands still on a constant, and a kill changes nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from poise import train_policy, train_reward
from poise.errors import PoiseError
from poise.objectives import HeadRewards, RewardScale, parse_objective
from poise.runs import read_jsonl
from poise.train_policy import Config


@pytest.fixture(scope="module")
def reward_folder(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture
def config(reward_folder: Path, prompts_file: Path, tiny_model: str, tmp_path: Path) -> Config:
    return Config(
        prompts=str(prompts_file), reward=str(reward_folder / "brme"), output=str(tmp_path / "policy"),
        model=tiny_model,
        num_steps=4, prompts_per_step=2, completions_per_prompt=4, max_tokens=8, adapted_layers=2, lora_rank=4,
        baseline_completions=16, save_every=2, eval_completions=2,
    )  # fmt: skip


def test_a_run_leaves_what_it_says(config: Config) -> None:
    out = train_policy.run(config)
    metrics = out.metrics()
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for row in metrics:
        assert row["gap"] >= 0
        assert len(row["heads"]) == 5
        assert row["kl_k3"] >= 0
    samples = list(read_jsonl(out.folder / "samples.jsonl"))
    assert len(samples) == 4 * 8
    assert len(list(read_jsonl(out.folder / "final.jsonl"))) == 4 * 2
    assert (out.folder / "policy" / "adapter_model.safetensors").exists()
    assert not list(out.folder.rglob("*.pt")) + list(out.folder.rglob("*.bin"))
    # What is logged is what the objective makes of the logged heads and constants.
    assert out.results is not None
    scale = RewardScale(**(out.results["scale"] | {"head_baseline": tuple(out.results["scale"]["head_baseline"])}))
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
    saved = load_file(out.folder / "checkpoint.safetensors")
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    weights = {n.removeprefix("weight.model.").replace(".default", ""): v for n, v in saved.items() if "lora" in n}
    checked = [name for name in weights if name in loaded]
    assert checked
    assert all(torch.equal(weights[name], loaded[name]) for name in checked)


def same_end(one: Path, other: Path) -> bool:
    a, b = load_file(one / "checkpoint.safetensors"), load_file(other / "checkpoint.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(config: Config, tmp_path: Path) -> None:
    """kill -9 at several moments of a real process, restarted each time."""
    config = dataclasses.replace(config, num_steps=12, save_every=1)
    program = "from poise.cli import main; import sys, torch; torch.set_num_threads(1); sys.exit(main(sys.argv[1:]))"

    def start(output: Path) -> subprocess.Popen[bytes]:
        options = [
            argument
            for field in dataclasses.fields(config)
            for argument in (f"--{field.name.replace('_', '-')}", str(getattr(config, field.name)))
            if field.name != "output"
        ]
        command = [sys.executable, "-c", program, "train-policy", *options, "--output", str(output)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    assert start(calm).wait(timeout=200) == 0
    kills = 0
    for at_step in (1, 4, 5, 9):
        process = start(stormy)
        metrics = stormy / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") > at_step:
                time.sleep(0.013 * at_step)  # not always right after the same line
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert start(stormy).wait(timeout=200) == 0
    assert kills >= 3
    assert same_end(calm, stormy)
    keys = ("step", "reward", "kl", "heads", "policy_loss")
    rows = [[[row[key] for key in keys] for row in read_jsonl(run / "metrics.jsonl")] for run in (calm, stormy)]
    assert rows[0] == rows[1]
    assert (calm / "final.jsonl").read_text() == (stormy / "final.jsonl").read_text()


def test_ppo_raises_the_reward_it_is_given(config: Config) -> None:
    config = dataclasses.replace(
        config, num_steps=40, completions_per_prompt=32, kl_coef=0.0, learning_rate=1e-2, objective="nominal",
        reward=config.reward.replace("brme", "single"), save_every=40,
    )  # fmt: skip
    rewards = [row["reward"] for row in train_policy.run(config).metrics()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.5


def test_constant_reward_with_kl_stays_at_the_reference(config: Config) -> None:
    config = dataclasses.replace(config, num_steps=15, objective="constant(3)", kl_coef=1.0, save_every=15)
    rows = train_policy.run(config).metrics()
    assert all(row["reward"] == 0.0 for row in rows)  # the baseline takes the constant away
    assert rows[-1]["kl_k3"] < 0.05


def test_reward_scale_by_hand() -> None:
    heads = HeadRewards(torch.tensor([[0.0, 10.0], [2.0, 14.0]]), torch.ones(2, 2))
    scale = RewardScale.fit(heads, parse_objective("worst_case"))
    assert scale.head_baseline == (1.0, 12.0)
    # centred: (-1, -2), (1, 2); worst case: -2, 1; mean -.5; sample std 3/sqrt(2)
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
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs_are_refused_before_a_model_is_loaded(
    config: Config, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(train_policy, "load_policy")
    monkeypatch.delattr(train_policy, "Scorer")
    with pytest.raises(PoiseError, match=message):
        train_policy.run(dataclasses.replace(config, **BAD[message]))


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_checkpoint(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    combine = RewardScale.combine
    calls = []

    def poisoned(self: RewardScale, heads: HeadRewards, objective: object) -> torch.Tensor:
        calls.append(1)
        return combine(self, heads, objective) * (float("nan") if len(calls) > 4 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(RewardScale, "combine", poisoned)
    with pytest.raises(PoiseError, match=r"step \d: the gradient is not finite"):
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
    assert "re-tokenised as text" in " ".join(capsys.readouterr().err.split())


def test_bfloat16_weights_as_on_a_gpu(
    config: Config, preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen weights in bfloat16, adapters and heads in float32; on a CPU only slower."""
    from poise import models, reward_model

    for module in (models, reward_model):
        monkeypatch.setattr(module, "frozen_dtype", lambda: torch.bfloat16)
    reward = train_reward.run(
        train_reward.Config(str(preferences_file), str(tmp_path / "reward"), model=config.model, num_layers=2)
    )
    out = train_policy.run(dataclasses.replace(config, reward=str(reward.folder), num_steps=2))
    assert all(abs(row["kl"]) < 5 for row in out.metrics())
    saved = load_file(out.folder / "checkpoint.safetensors")
    assert all(value.dtype == torch.float32 for name, value in saved.items() if name.startswith("weight."))
