"""How much of what PPO runs differ by is the reward model, and how much the policy's own seed?

    python experiments/policy_seeds.py train --seeds 200 201    # 6 minutes to prepare a seed, 6 a run on one core
    python experiments/policy_seeds.py report --into results/policy-seeds-DATE.json

Part of experiments/frontier_design.md: six of its reward models, three policy seeds each, one head. The first policy
seed is the run of the frontier itself, whose curve is read from its results.
"""

import json
from pathlib import Path

import numpy as np
import torch
from equal_kl import HIGH
from frontier import ARMS, parser_of, prepare_low, read_curve, train, write_pairs
from frontier_curves import gain, over_three_steps
from frontier_report import FIRST, RESULTS, endpoint
from scipy.stats import f

from poise.runtime.run_folder import Json, environment, write_json

SEEDS = range(200, 206)  # the first six of the design's twelve
LATER = 1000, 2000  # a policy's seed: its reward model's, and this much more


def components(values: np.ndarray, level: float = 0.95) -> Json:
    """Stds of one-way random effects of (M, P) values, P policies on each of M reward models.

    share: of the variance that the reward model holds, with its exact F interval (Searle, 1971); the estimates are
    those of the analysis of variance, no less than 0.
    """
    models, policies = values.shape
    within = values.var(axis=1, ddof=1).mean()
    between = policies * values.mean(axis=1).var(ddof=1)
    of_model = max(0.0, (between - within) / policies)
    cuts = [f.ppf(q, models - 1, models * (policies - 1)) for q in ((1 + level) / 2, (1 - level) / 2)]
    ratios = [between / within / cut for cut in cuts]
    return {
        "std of reward models": float(of_model**0.5), "std of policy seeds": float(within**0.5),
        "share of the reward model": float(of_model / (of_model + within)),
        "interval of the share": [max(0.0, float((ratio - 1) / (ratio - 1 + policies))) for ratio in ratios],
    }  # fmt: skip


def read(curve: Json) -> dict[str, float]:
    """A run in single numbers: gold in stds of the initial completions, the endpoint of the frontier first."""
    smooth, kl = over_three_steps(gain(curve, "g2")), np.array(curve["kl"])
    return {
        "g2 over KL 5 to 30": endpoint(curve, "g2", min(HIGH, kl.max())),
        "g1 over KL 5 to 30": endpoint(curve, "g1", min(HIGH, kl.max())),
        "g2 at the best step": float(smooth.max()), "g2 at the end": float(smooth[-1]), "KL at the end": float(kl[-1]),
    }  # fmt: skip


def report(root: Path) -> Json:
    """Variance components over the seeds that have all policies."""
    curves: dict[int, list[Json]] = {}
    kept = json.loads(max(RESULTS.glob("frontier-*.json")).read_text())["curves"]
    for seed in SEEDS:
        paths = [root / f"seed-{seed}" / f"{FIRST}-{seed + more}" / "curve.json" for more in LATER]
        if all(path.exists() for path in paths):
            curves[seed] = [kept[str(seed)][FIRST], *(json.loads(path.read_text()) for path in paths)]
    runs = {seed: [read(curve) for curve in own] for seed, own in curves.items()}
    names = next(iter(runs.values()))[0]
    return {
        "what": f"{len(runs)} reward models, {1 + len(LATER)} policy seeds each, PPO against one head",
        "components": {
            name: components(np.array([[run[name] for run in own] for own in runs.values()])) for name in names
        },
        "runs": {str(seed): own for seed, own in runs.items()},
        "curves": {str(seed): own[1:] for seed, own in curves.items()},
        "environment": environment(),
    }  # fmt: skip


def main() -> None:
    options = parser_of(__doc__, ("train", "report"), SEEDS, "policy-seeds").parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "report":
        write_json(options.into, report(options.output))
        return
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        write_pairs(folder, seed)
        prepare_low(folder, seed)
        for more in LATER:
            run = train(folder / f"{FIRST}-{seed + more}", ARMS[FIRST], seed + more)
            read_curve(run, validators={})


if __name__ == "__main__":
    main()
