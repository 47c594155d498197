"""Rewards of any number of rows on a Ray cluster: `poise score` by Ray Data.

python examples/ray_data_score.py REWARD_MODEL IN.parquet OUT_FOLDER [WORKERS]
"""

import json
import sys

import numpy as np
import ray

from poise import RewardModel, parse_objective
from poise.models.score_columns import score_columns


class Score:
    """One reward model in each worker; `num_gpus=1` in map_batches gives each a GPU."""

    def __init__(self, reward, objective="tradeoff(0.4)"):
        self.model, self.objective = RewardModel.from_pretrained(reward), parse_objective(objective)

    def __call__(self, batch):
        pairs = zip(batch["prompt"], batch["completion"], strict=True)
        heads = self.model.score([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
        columns = score_columns(heads, self.model.layout, self.objective(heads))
        texts = {name: as_text(batch[name]) for name in ("prompt", "completion")}
        return {**batch, **texts, **{name: column.numpy() for name, column in columns.items()}}


def as_text(values):
    """Conversations as their JSON text, as `poise score` writes them: Ray would pickle them into the file."""

    def text(value):
        return value if isinstance(value, str) else json.dumps(list(value), default=list, ensure_ascii=False)

    return np.array([text(value) for value in values], dtype=object)


if __name__ == "__main__":
    reward, source, target, *workers = sys.argv[1:]
    rows = ray.data.read_parquet(source)
    # Leave Ray a CPU that no worker has: reading and writing need one.
    scores = rows.map_batches(
        Score, fn_constructor_args=(reward,), batch_size=1024, concurrency=int(workers[0]) if workers else 1
    )
    scores.write_parquet(target)
