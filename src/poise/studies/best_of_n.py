"""`poise best-of-n`: the completions that each objective selects, before any RL.

One pool of the initial policy's completions is scored once by every reward model of one or several `poise train-reward`
runs; from those scores best-of-n and the exactly tilted policy pi ~ pi_0 exp(r / beta) follow for any objective in
milliseconds.

    RUN/pool.jsonl          prompt, completion, gold, judge: the fingerprint of that gold
    RUN/heads/…             every head's mean and std, per reward model
    RUN/results.json        per objective: gold and proxy against KL with 95 % intervals over prompts and reward-model
                            runs, fitted laws, peak, final and fall of gold, and differences from the first objective
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np

from poise.data.preferences import OnBadRow, read_prompts
from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional.objectives import RewardScale, disagreement, mean, routing_std
from poise.functional.overoptimization import Choice
from poise.models.loading import resolve_model
from poise.models.reward_model import files_of
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Inputs, Json, Run, write_jsonl
from poise.studies.config import BestOfNConfig as Config
from poise.studies.gold import label_with_gold
from poise.studies.pool import PoolHeads, PoolRow, compare_choices, prompt_key, prompt_label, sample_pool, score_pool


def run(config: Config) -> Run:
    """Sample, score, select; a finished run is returned as it is, a sampled pool is not sampled again."""
    config.check()
    choices = {text: Choice.parse(text) for text in config.objectives}
    out = Run.open(config.output, config, lambda: inputs_of(config))
    if out.results is not None:
        return out
    pool = make_pool(out.folder, config)
    heads = []
    for number, folder in enumerate(config.reward):
        names = dict.fromkeys(choice.reward for choice in choices.values())
        scored = score_pool(out.folder, pool, {f"{number}-{name}": str(Path(folder) / name) for name in names})
        heads.append({name: scored[f"{number}-{name}"] for name in names})
    out.finish(summarize(pool, config.per_prompt, choices, heads))
    return out


def inputs_of(config: Config) -> Inputs:
    """What the run reads, by the setting that names it; reward runs are counted from 1."""
    names = dict.fromkeys(Choice.parse(text).reward for text in config.objectives)
    rewards = {
        f"--reward {number}": [file for name in names for file in files_of(str(Path(folder) / name))]
        for number, folder in enumerate(config.reward, 1)
    }
    gold: Inputs = {"--gold": files_of(config.gold)} if config.gold else {}
    model = [Path(resolve_model(config.model))]
    return {"--prompts": [Path(config.prompts)], "--model": model, **rewards, **gold}


def make_pool(folder: Path, config: Config) -> list[Json]:
    """Rows of the pool in `folder`, with gold; sampled if the file is missing, and relabeled if the gold is another."""
    path = folder / "pool.jsonl"
    if not path.exists():
        prompts = pool_prompts(config.prompts, config.on_bad_row)
        write_jsonl(path, sample_pool(config.model, prompts, config.per_prompt, config.max_tokens, config.seed))
    rows = list(read_rows(path, PoolRow))
    if label_with_gold(rows, config.gold):
        write_jsonl(path, rows)
    return rows


def pool_prompts(path: str, on_bad_row: OnBadRow = "error") -> list[Prompt]:
    """Prompts to sample a pool of: at least two, each once."""
    prompts = read_prompts(path, on_bad_row)
    if len(prompts) < 2:
        raise PoiseError(f"{path} has one prompt; intervals over prompts need at least two")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt_key(prompt) in seen:
            label = shorten(prompt_label(prompt), 80, placeholder="…")
            raise PoiseError(f"{path} has a prompt twice: {label!r}; leave each in once")
        seen.add(prompt_key(prompt))
    return prompts


def summarize(
    pool: Sequence[Json], per_prompt: int, choices: Mapping[str, Choice], heads: Sequence[Mapping[str, PoolHeads]]
) -> Json:
    """Curves of every choice over a pool scored by several runs, rows grouped by prompt.

    heads: per run, the scores of each of its reward models.
    """
    gold = np.array([row["gold"] for row in pool]).reshape(-1, per_prompt)
    curves = [
        {"name": name, "label": name, "reward": choices[name].reward, "objective": choices[name].objective} | judged
        for name, judged in compare_choices(gold, heads, choices).items()
    ]
    spread = []
    for reward in sorted({choice.reward for choice in choices.values()}):
        centered = [RewardScale.fit(run[reward].heads, mean).centered(run[reward].heads) for run in heads]
        spread.append(
            {
                "reward": reward,
                "disagreement": float(np.mean([disagreement(one).mean().item() for one in centered])),
                "routing_std": float(np.mean([routing_std(one).mean().item() for one in centered])),
            }
        )
    return {
        "num_prompts": len(gold), "per_prompt": per_prompt, "initial_gold": float(gold.mean()),
        "num_rewards": len(heads), "curves": curves, "head_spread": spread,
    }  # fmt: skip
