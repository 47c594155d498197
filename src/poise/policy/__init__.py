"""Policies: PPO, GRPO and RLOO against a reward model, evaluation, merging. Nothing here imports `poise.reward`."""
