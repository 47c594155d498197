"""RLOO and GRPO with `--shard`: accelerate spreads the weights of TRL's trainers over two processes, on CPUs, too."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate.state import PartialState
from safetensors.torch import load_file

from conftest import make_model
from forked import launched
from poise.cli.main import main
from poise.errors import PoiseError
from poise.integrations import trl_trainers
from poise.integrations.trl_reward import RobustReward
from poise.integrations.trl_trainers import TrlSettings, steps_kept, train
from poise.models.loading import load_policy
from poise.runtime import distributed as processes
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Run

PROMPTS = [f"Review the {thing}." for thing in ("film", "phone", "pan", "kettle")]
LOSSES = ("policy_loss", "grad_norm", "clipped", "kl", "reward", "entropy", "ended")
ADAPTERS = "policy/adapter_model.safetensors"


@pytest.fixture(scope="module")
def reward_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


@pytest.fixture
def output_layer_apart(tmp_path: Path) -> str:
    """A model whose output layer has weights of its own."""
    return make_model(tmp_path / "qwen3", "qwen3")


def settings(algorithm: str, **changes: Any) -> TrlSettings:
    values: dict[str, Any] = {
        "kl_coef": 0.05, "num_steps": 2, "prompts_per_step": 2, "completions_per_prompt": 4, "max_tokens": 8,
        "learning_rate": 1e-3, "num_epochs": 2, "num_minibatches": 1, "clip": 0.2, "max_grad_norm": 1.0,
        "adapted_layers": 2, "lora_rank": 4, "save_every": 1, "seed": 0, "shard": True,
    }  # fmt: skip
    return TrlSettings(algorithm=algorithm, **{**values, **changes})  # type: ignore[arg-type]


def run(how: TrlSettings, model: str, reward: str, folder: Path, stop_at: int = -1) -> None:
    """Train; FOLDER/rows.json has what each step reported, FOLDER/share0 and share1 the parts that processes held."""
    rows: list[dict[str, Any]] = []
    folder.mkdir(exist_ok=True)
    make = trl_trainers.make_trainer

    def told(*arguments: Any) -> Any:
        trainer = make(*arguments)
        step = trainer.training_step

        def telling(*inputs: Any) -> Any:
            loss = step(*inputs)
            weights = list(trainer.model.parameters())
            held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in weights)
            share = held / sum(p.numel() for p in weights)
            (folder / f"share{processes.process_index()}").write_text(f"{processes.num_processes()} {share:.2f}")
            return loss

        trainer.training_step = telling
        return trainer

    def on_step(row: dict[str, Any]) -> None:
        rows.append(row)
        (folder / "rows.json").write_text(json.dumps(rows))
        if row["step"] == stop_at:
            os._exit(0)

    trl_trainers.make_trainer = told
    try:
        train(how, RobustReward.load(reward), *load_policy(model), PROMPTS, folder, on_step)
    finally:
        trl_trainers.make_trainer = make


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_processes_with_half_of_the_weights_train_as_those_with_whole_ones(
    algorithm: str,
    tiny_model: str,
    output_layer_apart: str,
    reward_run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL draws other completions in another number of processes, so that both are two.

    Every other token is an end: the completions of one process end before those of the other.
    """
    monkeypatch.setattr(trl_trainers, "end_token_ids", lambda *_: list(range(3, 250, 2)))
    model = {"rloo": tiny_model, "grpo": output_layer_apart}[algorithm]

    def work() -> None:
        processes.join()
        before = PartialState().distributed_type
        run(settings(algorithm), model, reward_run, tmp_path / "spread")
        assert PartialState().distributed_type == before
        assert "ACCELERATE_USE_FSDP" not in os.environ
        run(settings(algorithm, shard=False), model, reward_run, tmp_path / "whole")

    launched(2, work, tmp_path)
    assert [(tmp_path / "spread" / f"share{rank}").read_text() for rank in (0, 1)] == ["2 0.50", "2 0.50"]
    assert (tmp_path / "whole" / "share0").read_text() == "2 1.00"
    spread, whole = rows_of(tmp_path / "spread"), rows_of(tmp_path / "whole")
    assert len(spread) == len(whole) == 2
    for mine, theirs in zip(spread, whole, strict=True):
        assert [row["completion"] for row in mine["samples"]] == [row["completion"] for row in theirs["samples"]]
        assert [mine[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-5, abs=1e-5)
    assert spread[0]["ended"] > 0.9
    one, other = (load_file(tmp_path / name / ADAPTERS) for name in ("spread", "whole"))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5


@pytest.fixture
def given_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same completions for any number of processes, in place of those that TRL draws."""

    def given(self: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        first, step = processes.process_index() * len(prompt_ids), self.state.global_step
        rows = [
            [5 + (7 * i + 3 * step + t) % 20 for t in range(3 + i % 3)] for i in range(first, first + len(prompt_ids))
        ]
        return (rows, None) if isinstance(self, trl.GRPOTrainer) else rows

    for trainer in (trl.RLOOTrainer, trl.GRPOTrainer):
        monkeypatch.setattr(trainer, "_generate_single_turn", given)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.usefixtures("given_completions")
def test_two_processes_train_as_one_on_the_same_completions(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    run(settings(algorithm), tiny_model, reward_run, tmp_path / "one")

    def work() -> None:
        processes.join()
        run(settings(algorithm), tiny_model, reward_run, tmp_path / "two")

    launched(2, work, tmp_path)
    assert (tmp_path / "one" / "share0").read_text() == "1 1.00"
    assert (tmp_path / "two" / "share1").read_text() == "2 0.50"
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for mine, theirs in zip(one, two, strict=True):
        assert [row["completion"] for row in mine["samples"]] == [row["completion"] for row in theirs["samples"]]
        assert [mine[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-5, abs=1e-5)
    assert abs(one[1]["kl"]) > 1e-3  # the policy has moved


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit_or_with_another_number(
    tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    how = settings("grpo", num_steps=3)

    def work(name: str, stop_at: int = -1) -> Callable[[], None]:
        def inside() -> None:
            processes.join()
            run(how, tiny_model, reward_run, tmp_path / name, stop_at)
            processes.leave()

        return inside

    launched(2, work("whole"), tmp_path)
    two_steps = dataclasses.replace(how, num_steps=2)

    def stopped() -> None:
        processes.join()
        run(two_steps, tiny_model, reward_run, tmp_path / "again")

    launched(2, stopped, tmp_path)
    assert steps_kept(how, tmp_path / "again") == 2
    shutil.copytree(tmp_path / "again", tmp_path / "alone")
    launched(2, work("again"), tmp_path)
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "whole")[2:]
    whole, again = (load_file(tmp_path / name / ADAPTERS) for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    checkpoints = tmp_path / "whole" / "trainer"
    assert {path.suffix for path in checkpoints.rglob("*.*")} <= {".safetensors", ".json", ".md"}  # nothing pickled

    run(how, tiny_model, reward_run, tmp_path / "alone")  # one process, which draws other completions
    assert [row["step"] for row in rows_of(tmp_path / "alone")] == [2]
    assert (tmp_path / "alone" / "share0").read_text() == "1 1.00"


@pytest.mark.slow
def test_the_command_takes_shard(tiny_model: str, reward_run: str, prompts_file: Path, tmp_path: Path) -> None:
    command = [
        "train-policy", "--algorithm", "grpo", "--shard", "--prompts", str(prompts_file), "--reward", reward_run,
        "--model", tiny_model, "--output", str(tmp_path / "run"), "--num-steps", "1", "--prompts-per-step", "4",
        "--completions-per-prompt", "4", "--max-tokens", "6", "--eval-completions", "2",
    ]  # fmt: skip
    launched(2, lambda: main(command), tmp_path)
    assert len(Run(tmp_path / "run").metrics()) == 1
    assert len(list(read_rows(tmp_path / "run" / "final.jsonl"))) == 8
    assert (tmp_path / "run" / ADAPTERS).exists()


def test_accelerates_own_settings_are_refused_with_what_to_do(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poise.policy import train as train_policy

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = train_policy.Config(
        prompts="p.jsonl", reward="r", model=tiny_model, algorithm="grpo", output=str(tmp_path)
    )
    with pytest.raises(PoiseError, match=r"FSDP was asked for in accelerate's settings: .*--shard"):
        train_policy.run(config)


@pytest.mark.slow
def test_the_kl_budget_and_the_ladder_are_those_of_whole_weights(
    tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    """On two processes: the same KL, the same policy kept, the same end; the start is put together, too."""

    def work() -> None:
        processes.join()
        for name, shard in (("spread", True), ("whole", False)):
            how = settings("grpo", learning_rate=0.05, num_steps=4, shard=shard, max_kl=1e-3, keep_at_kl=(1e-4,))
            run(how, tiny_model, reward_run, tmp_path / name)

    launched(2, work, tmp_path)
    assert (tmp_path / "spread" / "share0").read_text() == "2 0.50"
    spread, whole = rows_of(tmp_path / "spread"), rows_of(tmp_path / "whole")
    assert len(spread) == len(whole) < 4
    assert len(spread[0]["samples"]) == 8
    for mine, theirs in zip(spread, whole, strict=True):
        kl = [[sample["kl"] for sample in row["samples"]] for row in (mine, theirs)]
        assert kl[0] == pytest.approx(kl[1], abs=1e-4)
        assert mine["kl"] == pytest.approx(sum(kl[0]) / 8, abs=1e-6)
    assert spread[-1]["kl"] > 1e-3
    how = settings("grpo", max_kl=1e-3)
    assert steps_kept(how, tmp_path / "spread") == steps_kept(how, tmp_path / "whole") == len(spread) - 2
    for place in (ADAPTERS, "ladder/kl-0.0001/adapter_model.safetensors", "trainer/start/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / name / place) for name in ("spread", "whole"))
        assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
