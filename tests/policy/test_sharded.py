"""PPO with `--shard`: two processes hold half of the layers each, sample and train as one."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forked
from conftest import rest_slow
from poise.cli.boundary import exit_status
from poise.cli.main import main
from poise.errors import PoiseError
from poise.models.adapted_maps import decoder_layers
from poise.models.trained_parts import without_adapters
from poise.policy import loop
from poise.policy import train as train_policy
from poise.policy.train import Config
from poise.runtime import distributed as processes
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Run
from poise.studies.config import LAPTOP_POLICY

LOSSES = ("policy_loss", "value_loss", "grad_norm", "value_grad_norm", "clipped", "step_kl", "reward", "kl")
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"objective": "expected_tradeoff(0.4)", "shaping": "contrastive"},
    "full": {"tune": "full", "learning_rate": 1e-3},
    "all of them": {"tune": "full", "adapted_layers": 0, "learning_rate": 1e-3},
    "own values": {"value_trunk": "own", "gradient_checkpointing": True},
}


@pytest.fixture
def config(reward_folder: Path, prompts_file: Path, tiny_model: str, tmp_path: Path) -> Config:
    return dataclasses.replace(
        LAPTOP_POLICY,
        prompts=str(prompts_file), reward=str(reward_folder / "brme"), output=str(tmp_path / "one"), model=tiny_model,
        num_steps=2, prompts_per_step=4, completions_per_prompt=4, max_tokens=8, adapted_layers=2, lora_rank=4,
        num_minibatches=2, baseline_completions=16, save_every=1, eval_completions=2,
    )  # fmt: skip


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which each process leaves how many there are, and which share of the layers it holds."""
    one_step = loop.Training.one_step

    def telling(self: loop.Training) -> dict[str, Any]:
        layers = [p for model in self.policy._models() for p in decoder_layers(without_adapters(model))[1].parameters()]
        parts = [(p.to_local() if hasattr(p, "to_local") else p).numel() for p in layers]
        share = sum(parts) / sum(p.numel() for p in layers)
        (tmp_path / f"share{os.environ.get('RANK')}").write_text(f"{processes.num_processes()} {share:.2f}")
        return one_step(self)

    monkeypatch.setattr(loop.Training, "one_step", telling)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_with_half_of_the_layers_train_as_one(way: str, config: Config, told: Path) -> None:
    one = train_policy.run(dataclasses.replace(config, **WAYS[way]))
    command = ["train-policy", "--config", str(one.folder / "config.yaml"), "--output", str(told / "two"), "--shard"]
    forked.launched(2, lambda: main(command), told)
    assert [(told / f"share{rank}").read_text() for rank in (0, 1)] == ["2 0.50", "2 0.50"]
    two = Run(told / "two")
    samples = [list(read_rows(run.folder / "samples.jsonl")) for run in (one, two)]
    assert [row["completion"] for row in samples[1][:16]] == [row["completion"] for row in samples[0][:16]]
    for mine, theirs in zip(samples[0][:16], samples[1][:16], strict=True):
        assert theirs["reward"] == pytest.approx(mine["reward"], abs=1e-5)
    first, second = ([[row[name] for name in LOSSES] for row in run.metrics()] for run in (one, two))
    assert second[0] == pytest.approx(first[0], abs=1e-5)
    assert second[1] == pytest.approx(first[1], abs=1e-2)  # Adam's first steps make rounding large
    assert len(list(read_rows(two.folder / "final.jsonl"))) == 4 * 2
    for kind in ("*.safetensors", "policy/*.safetensors"):
        for mine in sorted(one.folder.glob(kind)):
            alone, together = load_file(mine), load_file(two.folder / mine.relative_to(one.folder))
            assert {name: t.shape for name, t in alone.items()} == {name: t.shape for name, t in together.items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_killed_run_goes_on_with_as_many_processes_and_with_one(
    way: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, **WAYS[way], shard=True, num_steps=3, save_every=2)
    start = dataclasses.replace(config, output=str(tmp_path / "killed"))
    forked.launched(2, lambda: int(train_policy.run(config) is None), tmp_path)
    one_step = loop.Training.one_step

    def stopped(self: loop.Training) -> dict[str, Any]:
        if self.step == 2:  # the last checkpoint has just been written
            one_step(self)
            os._exit(0)
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "one_step", stopped)
        forked.launched(2, lambda: int(train_policy.run(start) is None), tmp_path)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    forked.launched(2, lambda: int(train_policy.run(start) is None), tmp_path)
    train_policy.run(dataclasses.replace(start, output=str(tmp_path / "alone")))
    whole, killed, alone = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "killed", "alone")
    )
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    texts = [[row["completion"] for row in read_rows(tmp_path / name / "samples.jsonl")] for name in ("one", "killed")]
    assert texts[0] == texts[1]
    assert alone.keys() == whole.keys()
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[2]) for name in ("one", "alone")]
    assert [last[1][name] for name in LOSSES] == pytest.approx([last[0][name] for name in LOSSES], abs=1e-4)


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_with_a_line_each(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = loop.Training.one_step

    def failing(self: loop.Training) -> dict[str, Any]:
        if self.step == 1 and processes.process_index() == 1:
            raise PoiseError("this process cannot go on")
        return one_step(self)

    monkeypatch.setattr(loop.Training, "one_step", failing)

    def work() -> int:
        try:
            train_policy.run(dataclasses.replace(config, shard=True))
        except Exception as error:  # noqa: BLE001  as the command line does
            return int(exit_status(error) != 2)
        return 1

    forked.launched(2, work, tmp_path)
    said = [
        [line for line in (tmp_path / f"stderr{rank}").read_text().splitlines() if line.startswith("poise: ")]
        for rank in (0, 1)
    ]
    assert said[1] == ["poise: this process cannot go on"]
    assert len(said[0]) == 1
    assert said[0][0].startswith("poise: another process of this run has ended")


def test_what_is_not_sharded_is_refused(config: Config) -> None:
    with pytest.raises(PoiseError, match="--shard with --tune full needs --baselines"):
        dataclasses.replace(config, tune="full", shaping="par", shard=True).check()


@pytest.mark.slow
@pytest.mark.parametrize("way", rest_slow([{"value_trunk": "own"}, {"tune": "full", "adapted_layers": 0}]))
def test_recomputed_activations_change_nothing(way: dict[str, Any], config: Config, tmp_path: Path) -> None:
    """To the last bit: every checkpoint and every number that is logged, but for seconds."""
    plain = train_policy.run(dataclasses.replace(config, **way))
    again = train_policy.run(
        dataclasses.replace(config, **way, gradient_checkpointing=True, output=str(tmp_path / "again"))
    )
    one, other = (load_file(run.folder / "checkpoint.safetensors") for run in (plain, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in run.metrics()] for run in (plain, again)]
    assert rows[0] == rows[1]
