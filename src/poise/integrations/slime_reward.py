"""A Poise reward for slime and miles: `--custom-rm-path poise.integrations.slime_reward.custom_rm --reward-key reward`.

With `--group-rm`, slime passes the samples of one prompt as a list; they are sent together, and share their prompt.
"""

import asyncio
from typing import Any

from poise.errors import PoiseError
from poise.integrations.trl_turns import as_prompt
from poise.serve.client import own_client as _client


async def custom_rm(args: Any, sample: Any, **_: Any) -> Any:
    """The reward with every head, as a dict of scalars; a list of them for a list of samples."""
    if isinstance(sample, (list, tuple)):
        return list(await asyncio.gather(*(custom_rm(args, one) for one in sample)))
    if not hasattr(sample, "prompt") or not hasattr(sample, "response"):
        raise PoiseError(f"a sample has a prompt and a response; one of type {type(sample).__name__} has not")
    return await _client().aone(as_prompt(sample.prompt), sample.response)
