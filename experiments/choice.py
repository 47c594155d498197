"""How often `poise choose` finds a rung within .05 gold of the best one, on the stored gold-KL curves.

python experiments/choice.py --output results/choice-2026-11-29.json

Curves: the 15 runs of results/holds-60-steps-2026-11-24.json, on which the law was preferred to other fits. The report
of experiments/frontier.py asks the same of its own curves, which had no part in that (`of_frontier`). Gold is a mean
over five steps. Rungs: the first step at which KL reaches 5, 10, 20 and 40; the frontier's runs stop before 40, and the
end of one that passes 32 is its last rung, since `poise choose` takes steps within a factor of 1.25. A judge prefers
the policy with probability .1 + .8 Phi(gain / (sqrt 2 * std)), std being that of gold over the initial policy's
completions (.433 for the lexicon), and .1 the share of raters who differ from the mean. 160 labels spread over a run's
rungs, each beside the rung below, as `poise choose` asks, or beside the start, as it did before 2026-11-29. With labels
beside the start there are two other rules: a free unimodal fit (isotonic up to a split, then down) and the rung with
the most wins. The frontier's gold (G2) is in its own stds, and .05 of the lexicon's gold is .05 / .433 of them.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from sklearn.isotonic import isotonic_regression

from poise.functional.choice import Ladder, beside_below, beside_start, choose

CURVES = Path(__file__).parents[1] / "results" / "holds-60-steps-2026-11-24.json"
RUNGS, LABELS, STD, NOISE, WITHIN = (5, 10, 20, 40), 160, 0.433, 0.1, 0.05
NEAR = 1.25


class Curve(NamedTuple):
    """KL and gold of every step of a run."""

    seed: int
    arm: str
    kl: np.ndarray
    gold: np.ndarray


def stored() -> list[Curve]:
    return [
        Curve(entry["seed"], arm, np.array(run["kl_by_step"]), np.array(run["gold"]))
        for entry in json.loads(CURVES.read_text())["seeds"]
        for arm, run in entry["arms"].items()
    ]


def of_frontier(curves: dict[int, dict[str, dict]]) -> dict:
    """The same on the frontier's curves, by seed and arm. Gold is G2, in stds of the initial policy's completions."""
    runs = [
        Curve(seed, arm, np.array(run["kl"]), np.array(run["g2"]) / run["std_at_start"]["g2"])
        for seed, arms in curves.items()
        for arm, run in arms.items()
    ]
    return simulated(runs, 1.0, WITHIN / STD, NEAR, 10)


def rungs_of(run: Curve, near: float) -> tuple[np.ndarray, np.ndarray]:
    """(KL, gold) at the start and at the rungs that the run reached, the next one up to a factor `near`."""
    smooth = np.array([run.gold[max(0, i - 2) : i + 3].mean() for i in range(len(run.gold))])
    at = [int(np.argmax(run.kl >= rung)) for rung in RUNGS if run.kl.max() >= rung]
    kl = [0.0, *RUNGS[: len(at)]]
    if len(at) < len(RUNGS) and run.kl.max() >= RUNGS[len(at)] / near:
        at.append(int(run.kl.argmax()))
        kl.append(float(run.kl.max()))
    return np.array(kl), np.array([run.gold[:2].mean(), *smooth[at]])


def free_fit(ladder: Ladder) -> int:
    """The mode of the most likely unimodal curve through one half at the start."""
    rate, labels, best = ladder.wins_C / ladder.labels_C, ladder.labels_C, (-np.inf, np.zeros(0))
    for split in range(len(rate) + 1):
        up, down = rate[:split], rate[split:]
        up = isotonic_regression(up, sample_weight=labels[:split], y_min=0.5) if split else up
        down = isotonic_regression(down, sample_weight=labels[split:], increasing=False) if len(down) else down
        fitted = np.clip(np.concatenate([up, down]), 1e-9, 1 - 1e-9)
        likelihood = (labels * (rate * np.log(fitted) + (1 - rate) * np.log1p(-fitted))).sum()
        best = max(best, (float(likelihood), np.concatenate([[0.5], fitted])), key=lambda one: one[0])
    return int(best[1].argmax())


def simulated(curves: list[Curve], std: float, within: float, near: float, seeds: int) -> dict:
    """Shares of simulated choices that lose at most `within` gold, and what they lose on average, by rule.

    std: of gold over the initial policy's completions. near: as of `rungs_of`. seeds: of labels, for every curve.
    """
    lost: dict[str, list[float]] = {name: [] for name in ("below", "start", "free unimodal fit", "most wins")}
    decided: dict[str, list[bool]] = {"below": [], "start": []}
    runs = []
    for run in curves:
        kl, gold = rungs_of(run, near)
        labels = np.full(len(kl) - 1, float(LABELS // (len(kl) - 1)))

        def judged(gain: np.ndarray, seed: int, labels: np.ndarray = labels) -> np.ndarray:
            rate = NOISE + (1 - 2 * NOISE) * norm.cdf(gain / (2**0.5 * std))
            return np.random.default_rng(seed).binomial(labels.astype(int), rate).astype(float)

        for seed in range(1000, 1000 + seeds):
            below = choose(beside_below(kl[1:], judged(np.diff(gold), seed), labels))
            ladder = beside_start(kl[1:], judged(gold[1:] - gold[0], seed), labels)
            start = choose(ladder)
            decided["below"].append(below.decided)
            decided["start"].append(start.decided)
            most = int(np.argmax([0.5, *(ladder.wins_C / labels)]))
            for name, chosen in zip(lost, (below.chosen, start.chosen, free_fit(ladder), most), strict=True):
                lost[name].append(float(gold.max() - gold[chosen]))
        own = np.array(lost["below"][-seeds:])
        runs.append({"seed": run.seed, "arm": run.arm, "kl": kl.tolist(), "gold": gold.tolist(),
                     "within": int((own <= within).sum())})  # fmt: skip
    return {
        "settings": {"labels": LABELS, "rungs": RUNGS, "std": std, "noise": NOISE, "within": within, "seeds": seeds},
        "share within": {name: float(np.mean(np.array(one) <= within)) for name, one in lost.items()},
        "mean gold lost": {name: float(np.mean(one)) for name, one in lost.items()},
        "share decided": {name: float(np.mean(one)) for name, one in decided.items()}, "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="results/choice.json")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    found = simulated(stored(), STD, WITHIN, 1.0, arguments.seeds) | {"command": "python experiments/choice.py"}
    Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("share within", "mean gold lost", "share decided")}, indent=1))


if __name__ == "__main__":
    main()
