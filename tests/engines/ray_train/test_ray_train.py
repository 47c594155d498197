"""Ray Train on a local cluster: examples/ray_train.py runs PPO and reward training on two workers as on one process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import pytest

from poise.cli.main import main
from poise.runtime.run_folder import Run

ROOT = Path(__file__).parents[3]
PPO = ("policy_loss", "value_loss", "grad_norm", "value_grad_norm", "clipped", "step_kl", "reward", "kl")

pytestmark = pytest.mark.timeout(1200)  # on a busy machine Ray takes minutes to start


def by_ray(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """The example on two workers, and its seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "ray_train.py", "2", *command],
        capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return done, time.monotonic() - started


def remember(**found: float) -> None:
    """Add to the dated result."""
    if path := os.environ.get("ENGINE_RESULT"):
        kept = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        content = {
            "engine": "ray.train", "version": metadata.version("ray"), "date": time.strftime("%Y-%m-%d"),
            "python": ".".join(map(str, sys.version_info[:3])), "workers": 2, "backend": "gloo",
        }  # fmt: skip
        Path(path).write_text(json.dumps({**kept, **content, **found}, indent=1) + "\n")


@pytest.fixture(scope="module")
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


def test_ppo_with_shard_is_that_of_one_process(
    reward: str, tiny_model: str, prompts_file: Path, tmp_path: Path
) -> None:
    settings = [
        "train-policy", "--prompts", str(prompts_file), "--reward", reward, "--model", tiny_model, "--num-steps", "2",
        "--prompts-per-step", "4", "--completions-per-prompt", "4", "--max-tokens", "8", "--adapted-layers", "2",
        "--baseline-completions", "16", "--eval-completions", "2",
    ]  # fmt: skip
    assert main([*settings, "--output", str(tmp_path / "one")]) == 0
    done, seconds = by_ray([*settings, "--output", str(tmp_path / "two"), "--shard"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training worker group of size 2" in done.stdout + done.stderr
    one, two = (Run(tmp_path / name).metrics()[0] for name in ("one", "two"))
    assert [two[name] for name in PPO] == pytest.approx([one[name] for name in PPO], abs=1e-5)
    assert len(Run(tmp_path / "two").metrics()) == 2
    assert (tmp_path / "two" / "policy" / "adapter_model.safetensors").exists()
    largest = max(abs(one[name] - two[name]) for name in PPO)
    remember(ppo_largest_difference_of_the_first_step=largest, ppo_seconds_with_start_of_ray=round(seconds, 1))


def test_reward_training_with_shard_is_that_of_one_process(
    tiny_model: str, preferences_file: Path, tmp_path: Path
) -> None:
    settings = [
        "train-reward", "--preferences", str(preferences_file), "--model", tiny_model, "--trunk", "lora", "--epochs",
        "1", "--batch-size", "8", "--device-batch-size", "4", "--posterior-heads", "4", "--head-steps", "20",
        "--num-layers", "2",
    ]  # fmt: skip
    assert main([*settings, "--output", str(tmp_path / "one")]) == 0
    done, seconds = by_ray([*settings, "--output", str(tmp_path / "two"), "--shard"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training worker group of size 2" in done.stdout + done.stderr
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, abs=1e-5)
    largest = max(abs(here - there) for here, there in zip(one, two, strict=True))
    remember(reward_largest_difference_of_losses=largest, reward_seconds_with_start_of_ray=round(seconds, 1))


def test_an_error_of_the_command_ends_the_job_and_is_in_its_output(prompts_file: Path, tmp_path: Path) -> None:
    done, _ = by_ray(["train-policy", "--prompts", str(prompts_file), "--reward", str(tmp_path / "none")])
    assert done.returncode != 0
    assert "poise: " in done.stdout + done.stderr
    assert "none" in done.stdout + done.stderr
