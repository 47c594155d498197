"""What `poise plan` computes of RLOO and GRPO against tensors that TRL's trainers make, counted phase by phase."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import rest_slow
from poise.functional.memory import Memory, TrlRun, trl_memory
from poise.integrations import trl_trainers
from poise.integrations.trl_reward import RobustReward
from poise.models import sizing
from poise.models.chat_format import encode_prompt
from poise.models.loading import load_policy
from trl_runs import PROMPTS, TRL_SETS_A_DEPRECATED_DEFAULT, settings


@pytest.fixture(scope="module")
def reward_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


def planned(model: str, tokens: int, how: Any) -> Memory:
    config = sizing.config_of(model)
    shape = sizing.shape_of(config)
    run = TrlRun(
        shape, shape, how.adapted_layers, how.lora_rank, how.prompts_per_step, how.completions_per_prompt,
        how.num_minibatches, tokens, how.max_tokens, frozen_bytes=4,
    )  # fmt: skip
    measured = sizing.trl_measured(
        config, layers=how.adapted_layers, rank=how.lora_rank, part=run.part, sampled=run.turn, prompt_tokens=tokens,
        max_tokens=how.max_tokens, dtype=torch.float32, checkpointing=False,
    )  # fmt: skip
    return trl_memory(run, measured)


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.parametrize("algorithm", rest_slow(["grpo", "rloo"]))
def test_phases_are_counted_as_they_are(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_trainers, "end_token_ids", lambda *_: [])  # every completion is as long as planned
    how = settings(algorithm, num_steps=1, num_epochs=1, max_tokens=40, completions_per_prompt=16)
    model, tokenizer = load_policy(tiny_model)
    asked = PROMPTS[:1] * 2  # prompts as long as planned
    trainer = trl_trainers.make_trainer(how, RobustReward.load(reward_run), model, tokenizer, asked, tmp_path)
    peaks: dict[str, list[int]] = {"sampling": [], "update": []}

    def watched(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def working(*arguments: Any, **named: Any) -> Any:
            with sizing.counted() as live:
                found = work(*arguments, **named)
            peaks[phase].append(live.peak)
            return found

        return working

    trainer._generate_single_turn = watched("sampling", trainer._generate_single_turn)
    trainer.training_step = watched("update", trainer.training_step)
    trainer.train()
    peaks["update"] = peaks["update"][1:]  # the first samples, too
    plan = planned(tiny_model, len(encode_prompt(tokenizer, asked[0])), how)
    for phase, found in peaks.items():
        parts = ("prompts", "sampling") if phase == "sampling" else (phase,)
        expected = max(sum(plan.phases[part].values()) for part in parts)
        assert 0.9 < expected / max(found) < 1.2, (phase, expected, max(found))
