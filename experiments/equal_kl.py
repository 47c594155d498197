"""Stored PPO runs re-read at equal KL: gold over KL 5 to 30, by arm, minus that of one head.

python experiments/equal_kl.py --output results/equal-kl-2026-11-28.json

Read are the runs whose gold and KL are stored for every step: results/holds-60-steps-2026-11-24.json (seeds 41 to 45)
and results/quickstart-seeds-2026-11-23.json (seeds 1 to 5). A run's gold over KL 5 to 30 is the mean, over KL, of the
line through its steps' (KL, gold), in order of KL; from 5 to 30, or to the largest KL it reached.
Arms are paired with one head by seed, over the KL that both reached. Intervals are Student's, 95 %; p-values are
corrected by Holm over the arms. The study of 2026-11-25 stored the end of its runs only, and is not read here.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from poise.functional.statistics import holm, mean_between, t_interval

RESULTS = Path(__file__).parents[1] / "results"
FILES = ("holds-60-steps-2026-11-24.json", "quickstart-seeds-2026-11-23.json")
LOW, HIGH, STOP = 5.0, 30.0, 20.0
FIRST = "conventional"


def curves() -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """By seed and arm: (KL, gold) of every step."""
    found: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name in FILES:
        for entry in json.loads((RESULTS / name).read_text())["seeds"]:
            for arm, run in entry["arms"].items():
                steps = run.get("steps")
                kl = [step["kl"] for step in steps] if steps else run["kl_by_step"]
                gold = [step["gold"] for step in steps] if steps else run["gold"]
                found.setdefault(entry["seed"], {})[arm] = np.array(kl), np.array(gold)
    return found


def compared(differences: list[float]) -> dict:
    """The mean of differences, one a seed; of several seeds Student's interval and p-value, too."""
    values = np.array(differences)
    found = {"seeds": len(values), "difference": float(values.mean())}
    if len(values) == 1:
        return found
    return found | {"interval": t_interval(values).tolist(), "p": float(ttest_1samp(values, 0).pvalue)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="results/equal-kl.json")
    arguments = parser.parse_args()
    by_seed = curves()
    arms = dict.fromkeys(arm for of_seed in by_seed.values() for arm in of_seed if arm != FIRST)
    found: dict[str, dict] = {}
    for arm in arms:
        pairs = [(of_seed[arm], of_seed[FIRST]) for of_seed in by_seed.values() if arm in of_seed]
        shared = [min(HIGH, own[0].max(), first[0].max()) for own, first in pairs]
        gaps = [
            mean_between(*own, LOW, high) - mean_between(*first, LOW, high)
            for (own, first), high in zip(pairs, shared, strict=True)
        ]
        found[arm] = compared(gaps) | {"least shared KL": float(min(shared))}
    for arm, adjusted in zip(found, holm([one["p"] for one in found.values()]), strict=True):
        found[arm]["p after Holm"] = float(adjusted)
    ends = []
    for of_seed in by_seed.values():
        if "settle" in of_seed:
            kl, gold = of_seed[FIRST]
            at = int(np.argmax(kl >= STOP))
            ends.append((of_seed["settle"][1][-5:].mean(), gold[max(0, at - 2) : at + 3].mean(), gold[-5:].mean()))
    settled, stopped, end = np.array(ends).T
    result = {
        "what": f"gold over KL {LOW:g} to {HIGH:g}, minus that of {FIRST}, paired by seed",
        "arms": found,
        "stopping": {
            "what": f"settled policy's end minus the {FIRST} one where KL first passes {STOP:g}, means over five steps",
            **compared((settled - stopped).tolist()),
            "settled": float(settled.mean()), "stopped": float(stopped.mean()),
            "conventional at its end": float(end.mean()),
        },
        "files": list(FILES), "command": "python experiments/equal_kl.py",
    }  # fmt: skip
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
