"""Checkpoints of a Trainer without a Trainer: what is saved comes back to the bit, and half of one is never taken."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from poise.errors import PoiseError
from poise.runtime.checkpoints import SafeCheckpoints, latest_checkpoint, write_tensors


class Training(SafeCheckpoints):
    """One weight, Adam, and a schedule that falls."""

    is_fsdp_enabled = is_deepspeed_enabled = False

    def __init__(self, should_save: bool = True) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.optimizer = torch.optim.Adam([{"params": [self.weight], "lr": 0.1, "weight_decay": 0.01}])
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.args = SimpleNamespace(should_save=should_save, process_index=0)

    def step(self) -> list[float]:
        (self.weight.square().sum() * torch.rand(())).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        return [*self.weight.tolist(), self.lr_scheduler.get_last_lr()[0], random.random(), float(np.random.rand())]


def test_a_training_that_was_saved_goes_on_bitwise(tmp_path: Path) -> None:
    """Adam's moments, the schedule, and the random numbers of Python, NumPy and torch; the Trainer saves weights."""
    one, other = Training(), Training()
    for _ in range(3):
        one.step()
    one._save_optimizer_and_scheduler(str(tmp_path))
    one._save_rng_state(str(tmp_path / "new"))
    weight = one.weight.detach().clone()
    expected = [one.step() for _ in range(3)]
    other.step()
    other.weight.data.copy_(weight)
    other._load_optimizer_and_scheduler(str(tmp_path))
    other._load_rng_state(str(tmp_path / "new"))
    assert [other.step() for _ in range(3)] == expected


def test_a_process_that_must_not_save_writes_nothing(tmp_path: Path) -> None:
    Training(should_save=False)._save_optimizer_and_scheduler(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_random_states_those_of_now_are_kept(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for checkpoint in (None, str(tmp_path)):
        Training()._load_rng_state(checkpoint)
        assert torch.equal(torch.get_rng_state(), before)


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    """By its number, not its name; the Trainer's state is written last, and a file may end before its header says."""
    assert latest_checkpoint(tmp_path) is None
    for number in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        save_file({"x": torch.ones(3)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    weights = tmp_path / "checkpoint-100" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"step": 1')
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    assert latest_checkpoint(tmp_path) is None


def test_a_failed_write_keeps_the_tensors_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "learner.safetensors"
    write_tensors(path, {"x": torch.ones(2, 3).T}, {"run": "1"})
    assert torch.equal(load_file(path)["x"], torch.ones(3, 2))

    def full(tensors: object, partial: Path, metadata: object) -> None:  # noqa: ARG001
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("poise.runtime.checkpoints.save_file", full)
    with pytest.raises(PoiseError, match=r"cannot write .*No space left on device; the last checkpoint is kept"):
        write_tensors(path, {"x": torch.zeros(2)}, {})
    assert torch.equal(load_file(path)["x"], torch.ones(3, 2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


class Spread:
    """In place of a Trainer whose weights FSDP or DeepSpeed spread: keeps its own checkpoints."""

    def __init__(self) -> None:
        self.did: list[tuple[str, str | None]] = []

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.did.append(("save", output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.did.append(("load", checkpoint))


@pytest.mark.parametrize("way", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_spread_states_are_left_to_the_trainer(way: str, tmp_path: Path) -> None:
    class Mixed(SafeCheckpoints, Spread):
        is_fsdp_enabled, is_deepspeed_enabled = way == "is_fsdp_enabled", way == "is_deepspeed_enabled"

    one = Mixed()
    one._save_optimizer_and_scheduler(str(tmp_path))
    one._load_optimizer_and_scheduler(str(tmp_path))
    assert one.did == [("save", str(tmp_path)), ("load", str(tmp_path))]
    assert list(tmp_path.iterdir()) == []


def test_the_random_state_of_a_gpu_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, found = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", found.append)
    Training()._save_rng_state(str(tmp_path))
    Training()._load_rng_state(str(tmp_path))
    assert torch.equal(found[0], state)
