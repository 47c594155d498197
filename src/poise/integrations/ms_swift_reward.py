"""A Poise reward for ms-swift 4.6: `--external_plugins …/poise/integrations/ms_swift_reward.py --reward_funcs poise`.

Do not pass the reward model to `--reward_model`: its plugin takes the first logit, one head's uncentered mean.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from swift.rewards.orm import AsyncORM, orms

from poise.serve.client import Client


class PoiseReward(AsyncORM):
    """One reward per completion. `messages`: the conversations, their last turn the completion."""

    def __init__(self, args: Any = None, **options: Any):
        super().__init__(args, **options)
        self.client = Client()

    async def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[dict[str, Any]]], **_: Any
    ) -> list[float]:
        asked = [
            self.client.ascore(list(turns[:-1] if turns[-1]["role"] == "assistant" else turns), [completion])
            for turns, completion in zip(messages, completions, strict=True)
        ]
        return [rows[0]["reward"] for rows in await asyncio.gather(*asked)]


orms["poise"] = PoiseReward
