"""A Poise reward for Molt (molt-rl 0.2.1): `--train.agent_path agent.py`, a file with one line:

from poise.integrations.molt_env import AgentRunner
"""

from typing import Any

from molt.agents import Env, Result, StepEnvRunner

from poise.serve.client import own_client as _client


class PoiseEnv(Env):
    """An episode of one turn; every head and uncertainty is in its info."""

    async def reset(self, state: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Keep the whole prompt, as rendered; Molt cuts what it later shows of one that is too long."""
        self.prompt = state["observation"]
        return state

    async def step(self, state: dict[str, Any], **_: Any) -> Result:
        """The reward of the answer. Raises PoiseError if there is none."""
        answer = await _client().aone(self.prompt, state["action_text"])
        return Result(reward=answer.pop("reward"), info=answer)


class AgentRunner(StepEnvRunner):
    """What Molt looks for in the file."""

    def __init__(self) -> None:
        super().__init__(PoiseEnv)
