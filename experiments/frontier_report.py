"""What the frontier's curves say, arm by arm: `frontier.py report` calls it. NumPy only, no models.

A curve is one run: KL, reward, both golds and both validators of every step, as `frontier.py train` leaves it in
RUN/curve.json. The rules are those of experiments/frontier_design.md.
"""

import json
from pathlib import Path

import numpy as np
from choice import of_frontier
from equal_kl import HIGH, LOW, compared
from frontier_curves import SEEN_FIRST, Curves, gain, over_three_steps, written
from validator_alarm import alarm_step, alarms

from poise.functional.statistics import holm, mean_between, spearman
from poise.runtime.run_folder import Json

RESULTS = Path(__file__).parents[1] / "results"
FIRST = "single"
KEPT = "what a run keeps as best, deeper validator"
RUNGS = (5, 10, 20, 40)
WRITTEN = ("distinct word pairs", "whole sentences", "on the subject")
LEAST = 2 * LOW  # a run that ends below this KL is reported apart


def endpoint(curve: Json, gold: str, high: float) -> float:
    """Mean gain of gold over KL 5 to `high`."""
    return mean_between(np.array(curve["kl"]), gain(curve, gold), LOW, high)


def stops(curve: Json) -> dict[str, float]:
    """Gold (G2) at each stop that reads no gold, and at the best step in hindsight: means over three steps, all."""
    smooth, kl = over_three_steps(gain(curve, "g2")), np.array(curve["kl"])
    end = len(kl) - 1

    def first(reached: np.ndarray) -> int:
        return int(np.argmax(reached)) if reached.any() else end

    at = {
        "KL 10": first(kl >= 10), "KL 20": first(kl >= 20), "end": end,
        "largest gain of the deeper validator": int(np.argmax(curve["deeper"])),
        "largest gain of the other pairs' validator": int(np.argmax(curve["other_pairs"])),
        KEPT: best_step(gain(curve, "deeper")),
        "alarm of the deeper validator": end if (rang := alarm_step(curve, "deeper")) is None else rang,
        "first alarm": first(np.isin(curve["step"], curve["alarms"][:1])),
    }  # fmt: skip
    return {"best step": float(smooth.max()), **{name: float(smooth[step]) for name, step in at.items()}}


def kept_against(curves: Curves) -> Json:
    """Gold of the policy that a run keeps as best, minus that at other stops: by seed, the mean over its arms."""
    stopped = [[stops(run) for run in runs.values()] for runs in curves.values()]
    found: Json = {"runs": sum(map(len, stopped))}
    for other in ("best step", "KL 20", "end"):
        found[f"minus {other}"] = compared(
            [float(np.mean([one[KEPT] - one[other] for one in runs])) for runs in stopped]
        )
    return found


def best_step(gains: np.ndarray) -> int:
    """The step whose policy `poise.runtime.ladder.Best` keeps; 0, the start, if it keeps none."""
    marks = np.concatenate([[0.0], (gains[1:] + gains[:-1]) / 2])
    return int(np.argmax(marks))


def at_rungs(runs: list[Json], gold: str) -> dict[str, Json]:
    """Gold where a run's KL first reaches each rung, mean over three steps, over the runs that reach it."""
    found = {}
    for rung in RUNGS:
        reached = [run for run in runs if max(run["kl"]) >= rung]
        if reached:
            at = [over_three_steps(gain(run, gold))[np.argmax(np.array(run["kl"]) >= rung)] for run in reached]
            found[str(rung)] = {"seeds": len(reached), "gold": float(np.mean(at))}
    return found


def against_first(curves: Curves, arm: str) -> Json:
    """Differences of an arm from one head at equal KL, by both golds; and the seeds on which there is too little KL."""
    pairs = {seed: (runs[arm], runs[FIRST]) for seed, runs in curves.items() if arm in runs and FIRST in runs}
    highs = {seed: min(HIGH, *(max(run["kl"]) for run in pair)) for seed, pair in pairs.items()}
    found: Json = {"seeds that end below KL 10": sorted(seed for seed, high in highs.items() if high <= LEAST)}
    for gold in ("g1", "g2"):
        gaps = {
            seed: endpoint(own, gold, highs[seed]) - endpoint(first, gold, highs[seed])
            for seed, (own, first) in pairs.items() if highs[seed] > LEAST
        }  # fmt: skip
        if gaps:
            found[f"{gold}, minus {FIRST}"] = compared(list(gaps.values()))
        if fresh := [gap for seed, gap in gaps.items() if seed not in SEEN_FIRST]:
            found[f"{gold}, minus {FIRST}, later seeds"] = compared(fresh)
    ends = [(stops(own)["end"], stops(first)) for own, first in pairs.values()]
    for stop in ("end", "KL 20"):
        found[f"g2 at its end, minus {FIRST} at {stop}"] = compared([own - first[stop] for own, first in ends])
    return found


def summarized(curves: Curves, arms: list[str]) -> Json:
    """By arm: seeds, KL, differences from one head with p-values after Holm, gold at stops and at rungs."""
    found: dict[str, Json] = {}
    for arm in arms:
        own = {seed: runs[arm] for seed, runs in sorted(curves.items()) if arm in runs}
        if not own:
            continue
        runs = list(own.values())
        ended = [stops(run) for run in runs]
        found[arm] = {
            "seeds": list(own), "largest KL": [round(max(run["kl"]), 1) for run in runs],
            **({} if arm == FIRST else against_first(curves, arm)),
            "gold at stops": {name: float(np.mean([one[name] for one in ended])) for name in ended[0]} | {
                "lost against the best step": {
                    name: compared([one[name] - one["best step"] for one in ended])
                    for name in ended[0] if name != "best step"
                }
            },
            "gold at rungs": {gold: at_rungs(runs, gold) for gold in ("g1", "g2")},
            "written": {
                name: float(np.mean([run["written"][name] for run in runs if "written" in run]))
                for name in WRITTEN if any("written" in run for run in runs)
            },
        }  # fmt: skip
    tested = [arm for arm in found if "p" in found[arm].get(f"g2, minus {FIRST}", {})]
    for arm, p in zip(tested, holm([found[arm][f"g2, minus {FIRST}"]["p"] for arm in tested]), strict=True):
        found[arm][f"g2, minus {FIRST}"]["p after Holm"] = float(p)
    return found


def report(root: Path, arms: list[str], gold: Json) -> Json:
    """All of results/frontier-DATE.json: of the runs under `root`, and of those that earlier results hold.

    gold: what is known of G2 (its judged.json).
    """
    curves: Curves = {}
    for earlier in sorted(RESULTS.glob("frontier-*.json")):  # of other machines, on the same gold
        for seed, runs in json.loads(earlier.read_text())["curves"].items():
            curves.setdefault(int(seed), {}).update(runs)
    for path in sorted(root.glob("seed-*/*/curve.json")):
        if path.parts[-2] not in arms:
            continue  # another policy seed: policy_seeds.py
        seed = int(path.parts[-3].removeprefix("seed-"))
        run = curves.setdefault(seed, {})[path.parts[-2]] = json.loads(path.read_text())
        if (final := path.with_name("final.jsonl")).exists():
            run["written"] = written([json.loads(line) for line in final.read_text().splitlines()])
    found = summarized(curves, arms)
    both = [
        [one[f"{name}, minus {FIRST}"]["difference"] for name in ("g1", "g2")]
        for one in found.values() if f"g2, minus {FIRST}" in one
    ]  # fmt: skip
    agreement = [
        spearman(np.array(run["g1"]), np.array(run["g2"])) for runs in curves.values() for run in runs.values()
    ]
    return {
        "what": "mean gold over KL 5 to 30 minus that of one head, paired by seed, in stds of the initial completions",
        "arms": found, "rank correlation of G1 and G2 over a run's steps": float(np.mean(agreement)),
        "arms on which G1 and G2 have the same sign": [sum(one * two > 0 for one, two in both), len(both)],
        "gold": gold, "alarms": alarms(curves), "kept as best": kept_against(curves),
        "poise choose": of_frontier(curves),
        "curves": {
            str(seed): {arm: rounded(run) for arm, run in runs.items()} for seed, runs in sorted(curves.items())
        },
    }  # fmt: skip


def rounded(run: Json) -> Json:
    return {
        name: [round(value, 3) if isinstance(value, float) else value for value in values]
        if isinstance(values, list) else values
        for name, values in run.items()
    }  # fmt: skip
