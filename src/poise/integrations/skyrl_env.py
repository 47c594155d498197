"""A Poise reward as an environment of SkyRL (skyrl-gym 0.4.0): one prompt, one answer, one reward.

from skyrl_gym.envs import register
register(id="poise", entry_point="poise.integrations.skyrl_env:PoiseEnv")
"""

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from poise.data.types import Prompt
from poise.integrations.trl_turns import as_prompt
from poise.serve.client import Client


class PoiseEnv(BaseTextEnv):
    """An episode of one turn; every head is among its metrics."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None):
        super().__init__()
        self.client = Client()
        self.prompt: Prompt = []
        self.metrics: dict[str, Any] = {}

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Keep the conversation that is answered."""
        self.prompt = as_prompt(prompt)
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """The reward of the answer, without the end token that it may carry."""
        self.metrics = self.client.one(self.prompt, action)
        reward = self.metrics["reward"]
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata=dict(self.metrics))

    def get_metrics(self) -> dict[str, Any]:
        """Of the episode: the reward and every head."""
        return dict(self.metrics)
