"""A Poise reward for ms-swift 4.6: `--external_plugins …/poise/integrations/ms_swift_reward.py --reward_funcs poise`.

Do not pass the reward model to `--reward_model`: its plugin takes the first logit, one head's uncentered mean.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from swift.rewards.orm import AsyncORM, orms

from poise.integrations.trl_turns import as_lists, as_pair, as_prompt
from poise.serve.client import Client


class PoiseReward(AsyncORM):
    """One reward per completion. `messages`: the conversations, their last turn the completion."""

    def __init__(self, args: Any = None, **options: Any):
        super().__init__(args, **options)
        self.client = Client()

    async def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[dict[str, Any]]], **_: Any
    ) -> list[float]:
        asked = []
        for conversation, completion in zip(*as_lists(messages, completions), strict=True):
            prompt, answer = as_pair(_before_answer(as_prompt(conversation)), completion)
            asked.append(self.client.ascore(prompt, [answer]))
        return [rows[0]["reward"] for rows in await asyncio.gather(*asked)]


def _before_answer(turns: Any) -> Any:
    return turns[:-1] if isinstance(turns, list) and turns[-1]["role"] == "assistant" else turns


orms["poise"] = PoiseReward
