"""What the literature reports, beside what a study found. Pure: a study's results in, rows of a table out.

`replicated` claims no more than the interval: `yes` where all of it is on the published side of zero, `no` where it
ends short of the published figure, `unclear` otherwise.
"""

from collections.abc import Sequence

import numpy as np

from poise.metrics import bootstrap_interval
from poise.runs import Json

ENSEMBLES = ("mean", "worst_case", "uncertainty_weighted")


def published(results: Json) -> list[Json]:
    """Rows of claim, published figure, what came out here, and whether that replicates it; failures first."""
    rows = [*_best_of_n(results), *_policies(results), *_benchmarks(results)]
    order = ("no", "unclear", "yes")
    return sorted(rows, key=lambda row: order.index(row["replicated"]))


def _best_of_n(results: Json) -> list[Json]:
    rows = []
    for noise, target in (("0", 0.30), ("0.25", 0.75), ("raters", 0.30)):
        arms = (results.get("best_of_n") or {}).get(noise) or {}
        for name in ENSEMBLES:
            gain = (arms.get(name) or {}).get("measures", {}).get("relative_gain")
            if gain:
                what = {"0": "clean labels", "0.25": "25 % flipped", "raters": "labels of single raters"}[noise]
                claim = f"best-of-n, {what}: gold gained by an ensemble ({name}) over one reward model (2310.02743)"
                rows.append(_row(claim, f"+{target:.0%}", target, gain["mean"], gain["interval"], "{:+.0%}"))
        accuracy = (arms.get("brme_1") or {}).get("measures", {}).get("accuracy", {})
        if "less_first" in accuracy:
            head = "the BRME's nominal head, less that of one Bradley–Terry head"
            claim = f"accuracy of {head}, noise {noise} (2409.15360)"
            interval = accuracy["less_first_interval"]
            rows.append(_row(claim, "+1.1 points", 0.011, accuracy["less_first"], interval, "{:+.1%}"))
    return rows


def _policies(results: Json) -> list[Json]:
    rows = []
    for noise, arms in (results.get("summary") or {}).items():
        for name in ENSEMBLES:
            both = paired(results["cells"], noise, name, "single_large_kl", "final_gold")
            if len(both) > 1:
                low, high = bootstrap_interval(both)
                here = f"{both.mean():+.2f} gold ({low:+.2f} to {high:+.2f})"
                claim = f"PPO, noise {noise}: {name} at small KL against one reward model at large KL (2310.02743)"
                kind = "yes" if low >= 0 else "no" if high < 0 else "unclear"
                rows.append({"claim": claim, "published": "as good", "here": here, "replicated": kind})
        for measure, sign, what in (("final_gold", 1, "ends with more gold"), ("drawdown", -1, "falls less")):
            entry = (arms.get("brme_0.4") or {}).get(measure, {})
            if "less_first" in entry:
                low, high = sorted(sign * x for x in entry["less_first_interval"])
                value, interval = entry["less_first"], entry["less_first_interval"]
                here = f"{value:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})"
                claim = f"PPO, noise {noise}: BRME with the robust term {what} than one head (2409.15360)"
                kind = "yes" if low > 0 else "no" if high < 0 else "unclear"
                rows.append({"claim": claim, "published": "yes", "here": here, "replicated": kind})
    return rows


def _benchmarks(results: Json) -> list[Json]:
    rows = []
    for policy in ((results.get("benchmarks") or {}).get("policies") or [])[1:]:
        average = policy.get("average") or {}
        if average.get("difference") is not None and "brme_0.4" in policy["name"]:
            claim = f"{policy['name']}: mean accuracy over the benchmarks, less that of the start (2409.15360)"
            interval = average["interval"]
            rows.append(_row(claim, "+1 to 4 points", 0.01, average["difference"], interval, "{:+.1%}"))
    return rows


def _row(claim: str, said: str, target: float, value: float, interval: Sequence[float], form: str) -> Json:
    low, high = interval
    kind = "yes" if low > 0 else "no" if high < target else "unclear"
    here = f"{form.format(value)} ({form.format(low)} to {form.format(high)})"
    return {"claim": claim, "published": said, "here": here, "replicated": kind}


def paired(cells: Sequence[Json], noise: str, one: str, other: str, measure: str) -> np.ndarray:
    """Differences of a measure between two arms, one per reward seed that both have (policy seeds averaged)."""
    values: dict[str, dict[int, list[float]]] = {one: {}, other: {}}
    for cell in cells:
        if cell["noise"] == noise and cell["arm"] in values:
            values[cell["arm"]].setdefault(cell["reward_seed"], []).append(cell[measure])
    seeds = sorted(values[one].keys() & values[other].keys())
    return np.array([np.mean(values[one][seed]) - np.mean(values[other][seed]) for seed in seeds])
