"""Reward-model training with `--shard`: two processes hold half of the weights each and train as one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked import launched
from poise.cli.main import main
from poise.reward import train as train_reward
from poise.reward import trunk_training
from poise.reward.train import Config
from poise.runtime import distributed as processes

FEW = {
    "epochs": 1.0, "batch_size": 8, "device_batch_size": 4, "learning_rate": 1e-3, "posterior_heads": 4,
    "head_steps": 20, "num_layers": 2, "save_steps": 2, "feature_cache": False,
}  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "trunk" / "model.safetensors")


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which each process leaves how many there are, and which share of the weights it holds."""
    spread = trunk_training.shard

    def told(layers: Any, root: torch.nn.Module, *args: Any) -> None:
        spread(layers, root, *args)
        parts = [(p.to_local() if hasattr(p, "to_local") else p).numel() for p in root.parameters()]
        share = sum(parts) / sum(p.numel() for p in root.parameters())
        (tmp_path / f"share{os.environ.get('RANK')}").write_text(f"{processes.num_processes()} {share:.2f}")

    monkeypatch.setattr(trunk_training, "shard", told)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_two_processes_with_half_of_the_weights_train_as_one(
    trunk: str, tiny_model: str, preferences_file: Path, said: Path
) -> None:
    one = train_reward.run(Config(str(preferences_file), str(said / "one"), tiny_model, trunk=trunk, **FEW))  # type: ignore[arg-type]
    again = ["--config", str(one.folder / "config.yaml"), "--output", str(said / "two"), "--shard"]
    launched(2, lambda: main(["train-reward", *again]), said)
    assert [(said / f"share{rank}").read_text() for rank in (0, 1)] == ["2 0.50", "2 0.50"]
    first, second = metrics(said / "one"), metrics(said / "two")
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert [row[name] for row in second] == pytest.approx([row[name] for row in first], abs=1e-5), name
    alone, together = weights(said / "one"), weights(said / "two")
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=2e-5)
    assert json.loads((said / "two" / "results.json").read_text())["models"].keys() == {
        "single",
        "ensemble",
        "posterior",
        "brme",
    }


@pytest.mark.slow
def test_a_killed_run_goes_on_with_as_many_processes_and_with_one(
    tiny_model: str, preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "train-reward",
        "--preferences",
        str(preferences_file),
        "--model",
        tiny_model,
        "--shard",
        "--trunk",
        "lora",
    ]
    for name, value in FEW.items():
        option = f"--{name.replace('_', '-')}"
        arguments += ["--no-feature-cache"] if value is False else [option, str(value)]
    launched(2, lambda: main([*arguments, "--output", str(tmp_path / "whole")]), tmp_path)
    recorded = trunk_training._Record.on_step_end

    def stopped(self: Any, args: Any, state: Any, *rest: Any, **others: Any) -> None:
        recorded(self, args, state, *rest, **others)
        if state.global_step == 3:  # the last checkpoint is of step 2
            os._exit(0)

    with monkeypatch.context() as patch:
        patch.setattr(trunk_training._Record, "on_step_end", stopped)
        launched(2, lambda: main([*arguments, "--output", str(tmp_path / "killed")]), tmp_path)
    assert {path.name for path in (tmp_path / "killed" / "trainer").iterdir()} == {"checkpoint-2"}
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    launched(2, lambda: main([*arguments, "--output", str(tmp_path / "killed")]), tmp_path)
    assert main([*arguments, "--output", str(tmp_path / "alone")]) == 0
    whole, killed, alone = (weights(tmp_path / name) for name in ("whole", "killed", "alone"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    for name, tensor in whole.items():
        torch.testing.assert_close(alone[name], tensor, rtol=0, atol=2e-5)
