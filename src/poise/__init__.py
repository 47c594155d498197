"""Poise: reward-robust RLHF.

Names are imported on first use: `import poise` alone costs milliseconds.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "HeadRewards": "poise.functional.objectives",
    "parse_objective": "poise.functional.objectives",
    "RewardModel": "poise.api.reward_model",
    "RewardTrainer": "poise.api.trainers",
    "RewardConfig": "poise.reward.config:Config",
    "PolicyTrainer": "poise.api.trainers",
    "PolicyConfig": "poise.policy.config:Config",
    "TrainedPolicy": "poise.api.trainers",
    "RobustReward": "poise.integrations.trl_reward",
    "MonitorCallback": "poise.integrations.trl_reward",
    "Scorer": "poise.models.scorer",
    "Sample": "poise.data.preferences",
    "Preference": "poise.data.preferences",
    "Policy": "poise.models.policy",
    "Run": "poise.runtime.run_folder",
    "PoiseError": "poise.errors",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home, _, there = _HOMES[name].partition(":")
        return getattr(importlib.import_module(home), there or name)
    raise AttributeError(f"module 'poise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
