"""A Poise reward for OpenRLHF 0.11.2, in its `.py` form: `--reward.remote_url …/poise/integrations/openrlhf_reward.py`.

The URL form, `--reward.remote_url http://127.0.0.1:8400/get_reward`, needs no file and gives up after five tries, 1 s
apart; this one waits for a server that is restarted. OpenRLHF clips rewards to ±10 by default.
"""

from collections.abc import Sequence
from typing import Any

from poise.serve.client import own_client as _client


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
    """Rewards of rendered prompts and answers. OpenRLHF passes one at a time, and takes scalars only."""
    import torch

    found, logs = _client().of_queries(queries, prompts)
    rewards = torch.tensor(found[0] if len(found) == 1 else found)
    return {
        "rewards": rewards, "scores": rewards, "extra_logs": {name: torch.tensor(value) for name, value in logs.items()}
    }  # fmt: skip
