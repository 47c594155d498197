"""Trainers of TRL for tests: as a user's script makes them, and the settings of a tiny run."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
import trl

from poise.integrations.trl_reward import RobustReward
from poise.integrations.trl_trainers import TrlSettings
from poise.models.loading import load_policy

PROMPTS = [f"Review the {thing}." for thing in ("film", "phone", "pan", "kettle")]
TRAINERS = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}
TRL_SETS_A_DEPRECATED_DEFAULT = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)


def own_script(
    algorithm: str, reward: RobustReward, model: str, folder: Path, rows: list[Any], **arguments: Any
) -> Any:
    """A trainer as a user of TRL would write it."""
    trainer_class, config_class = TRAINERS[algorithm]
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-3,
        "max_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no",
    }  # fmt: skip
    policy, tokenizer = load_policy(model)
    trainer = trainer_class(
        model=policy, processing_class=tokenizer, reward_funcs=[reward],
        args=config_class(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=datasets.Dataset.from_list([{"prompt": row} for row in rows]),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def settings(algorithm: str = "rloo", **changes: Any) -> TrlSettings:
    values = {
        "kl_coef": 0.05, "num_steps": 3, "prompts_per_step": 2, "completions_per_prompt": 4, "max_tokens": 6,
        "learning_rate": 1e-2, "num_epochs": 2, "num_minibatches": 2, "clip": 0.2, "max_grad_norm": 1.0,
        "adapted_layers": 2, "lora_rank": 4, "save_every": 2, "seed": 0,
    }  # fmt: skip
    return TrlSettings(algorithm=algorithm, **{**values, **changes})  # type: ignore[arg-type]
