"""Several seeds of the quickstart side by side.

    for s in 1 2 3 4 5; do poise quickstart --seed $s --output runs/seed-$s; done
    python experiments/quickstart_seeds.py runs/seed-* > results/quickstart-seeds.json

A seed draws other preference pairs and raters, other heads, other prompts per step and other samples: everything but
the texts, the model and the settings. Intervals are over seeds (Student's); each seed's own are over held-out prompts.
"""

import json
import sys
from pathlib import Path

import numpy as np

from poise.functional.statistics import mean_interval
from poise.runtime.run_folder import Json, load_config_file


def read(folder: Path) -> Json:
    """What one finished quickstart says, without its texts."""
    comparison = json.loads((folder / "comparison" / "results.json").read_text())
    timing = json.loads((folder / "results.json").read_text())
    reward = json.loads((folder / "reward" / "results.json").read_text())
    kept = ("peak_gold", "drawdown", "seconds", "step_seconds", "final")
    return {
        "seed": load_config_file(folder / "config.yaml")["seed"],
        "initial": comparison["initial"],
        "arms": {
            arm["name"]: {key: arm[key] for key in kept}
            | {"steps": [{key: step[key] for key in ("step", "kl", "proxy", "gold")} for step in arm["steps"]]}
            for arm in comparison["arms"]
        },
        "differences": comparison["differences"],
        "validation_accuracy": {name: model["validation_accuracy"] for name, model in reward["models"].items()},
        "total_seconds": timing["total_seconds"],
        "peak_memory_gb": timing["peak_memory_gb"],
    }


def summarize(seeds: list[Json]) -> Json:
    """Per arm: mean final gold over seeds with its interval, and over how many seeds it beat the first arm."""
    summary: Json = {}
    first = next(iter(seeds[0]["arms"]))
    for name in seeds[0]["arms"]:
        gold = np.array([seed["arms"][name]["final"]["gold"] for seed in seeds])
        against = gold - np.array([seed["arms"][first]["final"]["gold"] for seed in seeds])
        summary[name] = {
            "final_gold": gold.mean(), "interval": mean_interval(gold),
            "worst_seed": gold.min(), "drawdown": np.mean([seed["arms"][name]["drawdown"] for seed in seeds]),
            "proxy": np.mean([seed["arms"][name]["final"]["proxy"] for seed in seeds]),
            "kl": np.mean([seed["arms"][name]["final"]["kl"] for seed in seeds]),
            "distinct_bigrams": np.mean([seed["arms"][name]["final"]["distinct_bigrams"] for seed in seeds]),
        }  # fmt: skip
        if name != first:
            summary[name] |= {
                "difference": against.mean(), "difference_interval": mean_interval(against),
                "wins": int((against > 0).sum()), "seeds": len(seeds),
            }  # fmt: skip
    return summary


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    seeds = sorted((read(folder) for folder in folders), key=lambda seed: seed["seed"])
    environment = json.loads((folders[0] / "environment.json").read_text())
    config = load_config_file(folders[0] / "config.yaml")
    settings = {key: value for key, value in config.items() if key not in ("output", "seed")}
    report = {"summary": summarize(seeds), "settings": settings, "seeds": seeds}
    report |= {"date": environment["date"], "versions": environment["versions"], "device": environment["device"]}
    print(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
