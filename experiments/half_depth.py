"""What is a validator of half the reward's layers worth? `--validator-share` gives one to rewards of all layers.

    python experiments/half_depth.py train --seeds 200 201      # 5 minutes to prepare a seed, 8 a run on one core
    python experiments/half_depth.py report --into results/half-depth-DATE.json

PPO against a head on 16 layers, with a validator of 8 layers and other pairs; pairs, gold and rules are the frontier's
(experiments/frontier_design.md). For the same seeds the frontier has the reverse: 8 layers, validated by 16.
"""

import json
from pathlib import Path

import numpy as np
import torch
from equal_kl import HIGH, compared
from frontier import Arm, parser_of, prepare_one_head, read_curve, train, write_pairs
from frontier_curves import gain, over_three_steps
from frontier_report import FIRST, LEAST, RESULTS, best_step, endpoint, rounded

from poise.functional.statistics import spearman
from poise.runtime.run_folder import Json, environment, write_json

SEEDS = range(200, 206)
RUN = Arm("high/single", "nominal")
VALIDATOR = "half"  # the name of its curve; 8 layers, other pairs


def read(curve: Json, validator: str) -> dict[str, float]:
    """Gold (G2) of the policy that the validator keeps, minus that at other stops, and what it sees of the gain."""
    smooth, kl = over_three_steps(gain(curve, "g2")), np.array(curve["kl"])
    kept = smooth[best_step(gain(curve, validator))]
    at_20 = smooth[np.argmax(kl >= 20) if (kl >= 20).any() else -1]
    return {
        "minus best step": float(kept - smooth.max()), "minus KL 20": float(kept - at_20),
        "minus end": float(kept - smooth[-1]),
        "rank correlation with gold": float(spearman(np.array(curve[validator]), np.array(curve["g2"]))),
    }  # fmt: skip


def report(root: Path) -> Json:
    kept = json.loads(max(RESULTS.glob("frontier-*.json")).read_text())["curves"]
    paths = {seed: root / f"seed-{seed}" / "deep" / "curve.json" for seed in SEEDS}
    curves = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}
    validated = {
        "8 layers for a reward of 16": [read(curve, VALIDATOR) for curve in curves.values()],
        "16 layers for a reward of 8": [read(kept[str(seed)][FIRST], "deeper") for seed in curves],
    }
    highs = {seed: min(HIGH, max(curve["kl"]), max(kept[str(seed)][FIRST]["kl"])) for seed, curve in curves.items()}
    return {
        "what": "RUN/best by a validator of half the layers, and by one of twice as many on the same pairs",
        "policy kept as best": {
            name: {key: compared([run[key] for run in runs]) for key in runs[0]} for name, runs in validated.items()
        },
        "one head on 16 layers minus one on 8, gold over KL 5 to 30": {
            gold: compared([
                endpoint(curve, gold, highs[seed]) - endpoint(kept[str(seed)][FIRST], gold, highs[seed])
                for seed, curve in curves.items() if highs[seed] > LEAST
            ])
            for gold in ("g1", "g2")
        },
        "by seed": {str(seed): read(curve, VALIDATOR) for seed, curve in curves.items()},
        "curves": {str(seed): rounded(curve) for seed, curve in curves.items()},
        "environment": environment(),
    }  # fmt: skip


def main() -> None:
    options = parser_of(__doc__, ("train", "report"), SEEDS, "half-depth").parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "report":
        write_json(options.into, report(options.output))
        return
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        write_pairs(folder, seed)
        prepare_one_head(folder, seed, "high", "low", 16)
        prepare_one_head(folder, seed, "other", "other", 8)
        read_curve(train(folder / "deep", RUN, seed), validators={VALIDATOR: "other/single"})


if __name__ == "__main__":
    main()
