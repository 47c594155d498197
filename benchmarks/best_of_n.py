"""Best-of-n and tilted curves of many objectives, weights and reward models over one scored pool: how long?

    python benchmarks/best_of_n.py > results/best-of-n-DATE.json

10 objectives x 6 weights (or coefficients) x 20 reward models, 64 prompts x 256 completions, intervals over prompts and
reward models included. The floor: every objective must sort 20 x 64 rows of 256 and take 8 exponentials of each reward.
"""

import json
import time

import numpy as np
import torch

from poise.functional.best_of_n import KL_COEFS
from poise.functional.objectives import HeadRewards
from poise.functional.overoptimization import Choice, Curves, Resamples, differences_from, stacked, summarize
from poise.runtime.run_folder import environment

PROMPTS, PER_PROMPT, SEEDS, HEADS = 64, 256, 20, 5
WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
OBJECTIVES = {
    "tradeoff": WEIGHTS, "quantile": WEIGHTS,
    "uncertainty_weighted": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0), "lower_confidence": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0),
    "soft_min": (0.05, 0.1, 0.25, 0.5, 1.0, 2.0),
}  # fmt: skip


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = PROMPTS * PER_PROMPT
    gold = torch.randn(rows, generator=generator)

    def heads() -> HeadRewards:
        noise = torch.randn(rows, HEADS, generator=generator)
        return HeadRewards(0.5 * gold.unsqueeze(-1) + noise, 0.1 + torch.rand(rows, HEADS, generator=generator))

    models = [(heads(), 1.0) for _ in range(SEEDS)]
    specs = [f"{name}({value})" for name, values in OBJECTIVES.items() for value in values]
    choices = [Choice("brme", spec) for spec in specs]
    choices += [Choice("brme", f"tradeoff({w})", ceiling=2.0) for w in WEIGHTS]
    choices += [Choice("brme", f"lower_confidence({c})", ceiling=2.0) for c in OBJECTIVES["lower_confidence"]]
    choices += [Choice("brme", f"soft_min({t})", ceiling=2.0) for t in OBJECTIVES["soft_min"]]
    choices += [Choice("brme", f"tradeoff({w})", "contrastive") for w in WEIGHTS]
    gold_PN = gold.double().numpy().reshape(PROMPTS, PER_PROMPT)

    seconds = {"objectives": 0.0, "curves": 0.0, "intervals": 0.0}
    started = time.perf_counter()
    resamples = Resamples.draw(PROMPTS, SEEDS)
    first = None
    for choice in choices:
        at = time.perf_counter()
        proxy = stacked(choice, models, PER_PROMPT)
        then = time.perf_counter()
        curves = Curves.of(proxy, gold_PN)
        later = time.perf_counter()
        judged = summarize(curves, resamples)
        first = first or judged
        differences_from(judged, first)
        for name, value in zip(seconds, (then - at, later - then, time.perf_counter() - later), strict=True):
            seconds[name] += value
    total = time.perf_counter() - started

    rewards = np.random.default_rng(0).normal(size=(SEEDS * PROMPTS, PER_PROMPT))
    at = time.perf_counter()
    np.argsort(rewards, -1)
    for _ in KL_COEFS:
        np.exp(rewards)
    floor = (time.perf_counter() - at) * len(choices)
    print(
        json.dumps(
            {
                "choices": len(choices), "reward_models": SEEDS, "prompts": PROMPTS, "per_prompt": PER_PROMPT,
                "seconds": round(total, 2), "parts": {name: round(value, 2) for name, value in seconds.items()},
                "floor_seconds": round(floor, 2), "threads": torch.get_num_threads(), "environment": environment(),
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
