"""What differs on a GPU: bfloat16 against float32, and short runs of PPO, LoRA and FSDP2. Skipped without CUDA."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import poise
from poise.data.types import Sample
from poise.models import reward_model
from poise.models.scorer import Scorer
from poise.policy import loop
from poise.policy import train as train_policy
from poise.reward import train as train_reward
from poise.reward.config import Trunk
from poise.runtime.run_folder import Run, config_dict
from poise.studies.config import LAPTOP_POLICY

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA finds no GPU here"),
    pytest.mark.slow,
]

FSDP2 = Path(poise.__file__).parent / "runtime" / "accelerate_configs" / "fsdp2.yaml"
SAMPLES = [Sample("Review a film.", f"a {word} film {i}") for i, word in enumerate(("good", "bad", "fine", "awful"))]

# bfloat16 keeps 8 bits of a number: rounding to nearest errs by at most 2^-8 of it. The tiny trunk rounds the
# embedding, then two layers of two sublayers, each six times (norm, input product, nonlinearity, output product,
# residual sum, weights), then the final norm: 26 roundings in sequence. If every one errs by the most, in the same
# direction, the features h err by 26 * 2^-8 |h|; a reward w h then errs by at most |w| times that (Cauchy-Schwarz).
# Independent errors would add up to a fifth of it, which leaves room for norms and residual sums that amplify errors.
RELATIVE_ERROR = 26 * 2.0**-8


def trunk_config(model: str, preferences: Path, output: Path, trunk: Trunk) -> train_reward.Config:
    """A run of `train-reward` whose trunk takes one step: the batch holds all pairs."""
    return train_reward.Config(
        str(preferences), str(output), model, num_layers=2, trunk=trunk, batch_size=64, device_batch_size=64,
        lora_rank=4, posterior_heads=4, head_steps=20, feature_cache=False,
    )  # fmt: skip


def ppo_config(reward: Path, prompts: Path, model: str, output: Path) -> train_policy.Config:
    return dataclasses.replace(
        LAPTOP_POLICY,
        prompts=str(prompts), reward=str(reward / "brme"), output=str(output), model=model, num_steps=2,
        prompts_per_step=2, completions_per_prompt=4, max_tokens=8, adapted_layers=2, lora_rank=4,
        baseline_completions=16, save_every=1, eval_completions=2,
    )  # fmt: skip


def test_bfloat16_scores_are_those_of_float32_on_the_cpu(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = Scorer.load(str(reward_folder / "single"))
    assert (on_gpu.extract.classifier.device.type, on_gpu.extract.classifier.dtype) == ("cuda", torch.bfloat16)
    monkeypatch.setattr(reward_model, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(reward_model, "frozen_dtype", lambda: torch.float32)
    on_cpu = Scorer.load(str(reward_folder / "single"))
    assert (on_cpu.extract.classifier.device.type, on_cpu.extract.classifier.dtype) == ("cpu", torch.float32)
    exact, rounded = on_cpu.extract(SAMPLES), on_gpu.extract(SAMPLES).cpu().float()
    tolerance = RELATIVE_ERROR * exact.norm(dim=-1)
    assert ((rounded - exact).norm(dim=-1) <= tolerance).all()
    difference = (on_gpu(SAMPLES).mean - on_cpu(SAMPLES).mean).abs()
    assert (difference[:, 0] <= tolerance * on_cpu.weight.norm()).all()


def test_stopped_ppo_resumes_and_finishes(
    reward_folder: Path, prompts_file: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(reward_folder, prompts_file, tiny_model, tmp_path / "policy")
    save = loop.Training.save

    def save_and_stop(training: loop.Training) -> None:
        save(training)
        if training.step == 1:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "save", save_and_stop)
        with pytest.raises(InterruptedError):
            train_policy.run(config)
    first_step = (tmp_path / "policy" / "metrics.jsonl").read_text()
    assert first_step.count("\n") == 1
    resumed = train_policy.run(config)
    assert (resumed.folder / "metrics.jsonl").read_text().startswith(first_step)
    assert [row["step"] for row in resumed.metrics()] == [0, 1]


def test_lora_of_the_trunk_takes_a_step(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    out = train_reward.run(trunk_config(tiny_model, preferences_file, tmp_path / "reward", "lora"))
    assert [row["step"] for row in out.metrics()] == [1]
    assert (out.folder / "single" / "model.safetensors").exists()


def test_the_whole_trunk_trains_under_fsdp2(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    """One process of `accelerate launch`, which starts it by torchrun."""
    config = trunk_config(tiny_model, preferences_file, tmp_path / "reward", "full")
    settings = tmp_path / "config.yaml"
    settings.write_text(yaml.safe_dump(config_dict(config)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "1"]
    command = [*launch, "--main_process_port", "0", "-m", "poise.cli", "train-reward", "--config", str(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in Run(tmp_path / "reward").metrics()] == [1]
    assert (tmp_path / "reward" / "trunk" / "model.safetensors").exists()
