"""The reward of a `poise serve` for TRL, as a callable for `reward_funcs`: the reward model is in another process.

    from poise.integrations.trl_http import ServedReward

    trainer = GRPOTrainer(model, reward_funcs=[ServedReward("http://127.0.0.1:8400")], …)

TRL's commands take that of POISE_URL by its name: `trl grpo --reward_funcs poise.integrations.trl_http.served_reward`.
For a reward model in the training process itself, see poise.integrations.trl_reward.
"""

import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from poise.integrations.trl_turns import as_lists, as_pair, is_finished, lines_to_say
from poise.serve.client import Client, own_client, scalars

_TOGETHER = 64  # requests
_LOG = logging.getLogger("poise")
_said: set[str] = set()  # in this process


class ServedReward:
    """One reward per completion; completions of one prompt go out together. Heads are logged through `log_metric`."""

    __name__ = "ServedReward"  # what TRL calls it in its logs

    def __init__(self, url: str = "", **options: Any):
        """url, options: as for `Client`."""
        self.client = Client(url, **options)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Text and conversations both. Raises PoiseError if there is no reward.

        None for a completion that was cut among the calls of tools: there is no answer to score.
        """
        return _rewards(self.client, prompts, completions, columns.get("log_metric"))


def served_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """`ServedReward` of the server that POISE_URL names when it is first asked."""
    return _rewards(own_client(), prompts, completions, columns.get("log_metric"))


def _rewards(client: Client, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Any) -> list[float | None]:
    rows: list[dict[str, Any]] = []
    prompts, completions = as_lists(prompts, completions)
    finished = [is_finished(completion) for completion in completions]
    every = zip(prompts, completions, finished, strict=True)
    pairs = [as_pair(prompt, completion) for prompt, completion, whole in every if whole]
    for about, line in lines_to_say(completions).items():
        if about not in _said:
            _said.add(about)
            _LOG.warning(line)
    groups = [
        (prompt, [text for _, text in group]) for prompt, group in itertools.groupby(pairs, key=lambda one: one[0])
    ]
    if groups:  # together, for a server with a new scale answers none before it has enough of them
        with ThreadPoolExecutor(min(len(groups), _TOGETHER)) as pool:
            rows = list(itertools.chain.from_iterable(pool.map(lambda group: client.score(*group), groups)))
    if log_metric and rows:
        numbers = [scalars(row) for row in rows]
        for name in filter(lambda name: all(name in row for row in numbers), numbers[0]):
            log_metric(f"poise/{name}", sum(row[name] for row in numbers) / len(numbers))
    if log_metric and not all(isinstance(completion, str) for completion in completions):
        log_metric("poise/unfinished", finished.count(False) / len(finished))
    rewards = iter(rows)
    return [next(rewards)["reward"] if whole else None for whole in finished]
