"""`poise best-of-n`: the completions that each objective selects, before any RL.

One pool of the initial policy's completions is scored once by every reward model of one or several `poise train-reward`
runs; from those scores best-of-n and the exactly tilted policy pi ~ pi_0 exp(r / beta) follow for any objective in
milliseconds.

    RUN/pool.jsonl          prompt, completion; with --gold also gold, judge: the fingerprint of that gold
    RUN/selected.jsonl      per objective and prompt, by the first reward run: best, reward, runner_up, runner_up_reward
    RUN/heads/…             every head's mean and std, per reward model
    RUN/results.json        per objective: gold and proxy against KL with 95 % intervals over prompts and reward-model
                            runs, fitted laws, peak, final and fall of gold, and differences from the first objective;
                            without --gold the proxy alone
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from poise.data.types import Prompt
from poise.functional.objectives import RewardScale, disagreement, mean, routing_std
from poise.functional.overoptimization import Choice
from poise.models.loading import found_here, resolve_model
from poise.models.reward_model import files_of
from poise.models.row_check import row_check_of, tokenizers_of
from poise.runtime.run_folder import Inputs, Json, Run, write_jsonl
from poise.studies.config import REVIEWS
from poise.studies.config import BestOfNConfig as Config
from poise.studies.gold import label_with_gold
from poise.studies.pool import (
    FILE,
    PoolHeads,
    compare_choices,
    kept_pool,
    pool_prompts,
    proxies,
    score_pool,
)


def run(config: Config) -> Run:
    """Sample, score, select; a finished run is returned as it is, a sampled pool is not sampled again."""
    config.check()
    choices = {text: Choice.parse(text) for text in config.objectives}
    out = Run(Path(config.output))
    out.check_config(config, lambda: inputs_of(config, found_here))
    if out.results is not None:
        out.refuse_edited(lambda: inputs_of(config, found_here))
        return out
    prompts_of(config)  # what is wrong with them comes before the folder
    out = Run.open(config.output, config, lambda: inputs_of(config))
    pool = make_pool(out.folder, config)
    heads = []
    for number, folder in enumerate(config.reward):
        names = dict.fromkeys(choice.reward for choice in choices.values())
        scored = score_pool(out.folder, pool, {f"{number}-{name}": str(Path(folder) / name) for name in names})
        heads.append({name: scored[f"{number}-{name}"] for name in names})
    write_jsonl(out.folder / "selected.jsonl", list(selected(pool, config.per_prompt, choices, heads[0])))
    found = summarize(pool, config.per_prompt, choices, heads)
    out.finish(found if config.gold else _without_gold(found))
    return out


def inputs_of(config: Config, place: Callable[[str], str] = resolve_model) -> Inputs:
    """What the run reads, by the setting that names it; reward runs are counted from 1. place: where a model is."""
    names = dict.fromkeys(Choice.parse(text).reward for text in config.objectives)
    rewards = {
        f"--reward {number}": [file for name in names for file in files_of(str(Path(folder) / name), place)]
        for number, folder in enumerate(config.reward, 1)
    }
    gold: Inputs = {"--gold": files_of(config.gold, place)} if config.gold not in ("", REVIEWS) else {}
    model = [Path(place(config.model))]
    return {"--prompts": [Path(config.prompts)], "--model": model, **rewards, **gold}


def prompts_of(config: Config) -> list[Prompt]:
    """What is sampled for; each prompt leaves the model room for a completion."""
    kinds = dict.fromkeys(Choice.parse(text).reward for text in config.objectives)
    readers = tokenizers_of([str(Path(folder) / kind) for folder in config.reward for kind in kinds])
    return pool_prompts(config.prompts, config.on_bad_row, row_check_of(config.model, config.max_tokens, readers))


def make_pool(folder: Path, config: Config) -> list[Json]:
    """Rows of the pool in `folder`; sampled if the file is missing, and relabeled if the gold is another."""
    rows = kept_pool(
        folder, config.model, lambda: prompts_of(config), config.per_prompt, config.max_tokens, config.seed
    )
    if config.gold and label_with_gold(rows, config.gold):
        write_jsonl(folder / FILE, rows)
    return rows


def selected(
    pool: Sequence[Json], per_prompt: int, choices: Mapping[str, Choice], heads: Mapping[str, PoolHeads]
) -> Iterator[Json]:
    """Of each objective and prompt, the completion with the highest reward and the next one; the first of equal ones.

    heads: the scores of one run's reward models. Rewards are centered and scaled on the pool, as best-of-n takes them.
    """
    for name, choice in choices.items():
        scores = proxies(choice, [heads], per_prompt)[0]
        for number, own in enumerate(scores):
            best, second = np.argsort(-own, kind="stable")[:2]
            rows = pool[number * per_prompt : (number + 1) * per_prompt]
            yield {
                "objective": name, "prompt": rows[0]["prompt"], "best": rows[best]["completion"],
                "reward": float(own[best]), "runner_up": rows[second]["completion"],
                "runner_up_reward": float(own[second]),
            }  # fmt: skip


def _without_gold(results: Json) -> Json:
    """The results less all that gold would have said."""
    curves = [
        {
            key: [{name: value for name, value in point.items() if not name.startswith("gold")} for point in points]
            if key in ("best_of_n", "tilted")
            else points
            for key, points in curve.items()
            if key not in ("fits", "measures", "initial_gold")
        }
        for curve in results["curves"]
    ]
    return {key: value for key, value in results.items() if key != "initial_gold"} | {"curves": curves}


def summarize(
    pool: Sequence[Json], per_prompt: int, choices: Mapping[str, Choice], heads: Sequence[Mapping[str, PoolHeads]]
) -> Json:
    """Curves of every choice over a pool scored by several runs, rows grouped by prompt.

    heads: per run, the scores of each of its reward models. A row without gold counts as 0.
    """
    gold = np.array([row.get("gold", 0.0) for row in pool]).reshape(-1, per_prompt)
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
