"""Does the monitor fire when gold turns? Its signs, its alarm and trivial rules, on finished policy runs.

    python experiments/monitor.py RUN_FOLDERS... [--calibrate 0 1 2] > results/monitor.json
    python experiments/monitor.py RUN_FOLDERS... --calibrate > results/monitor.json      # the limits that are shipped

RUN_FOLDERS are those of `poise train-policy`. Runs whose seed is in --calibrate set every limit; the others are only
reported. Gold, which the monitor never sees, is scored from samples.jsonl and smoothed over 5 steps. A run fell if its
smoothed gold, or its gold on the held-out prompts at the end, lies more than .25 below its peak. An alarm is false
if it comes in a run that never fell, or while gold still has more than .1 to rise. Steps at which an alarm would be
false are "healthy". A rule fires above a limit that no healthy step of a calibration run reached (`limit_of`), or,
separately, above the value that maximizes mean gold at the stop in the calibration runs. The smoothed end of a run lags
its last steps by two, so what a stop saves is also given against the end on held-out prompts. Mind that this gold has a
penalty for repeated words, and none for saying the same of everything.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from poise.functional.calibration import weighted_auroc
from poise.functional.monitor import LIMITS, Monitor, MonitorConfig, suspicion, text_signs
from poise.functional.statistics import bootstrap_intervals, mean_interval
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, environment, load_config_file
from poise.studies.gold import gold_rewards

WIDTH, FALL, MARGIN = 5, 0.25, 0.1
START = MonitorConfig().baseline_steps


@dataclass
class Trajectory:
    """One run: what the monitor made of each step, and gold."""

    name: str
    seed: int
    reward: list[float]  # tells whether one run is the beginning of another
    signs: list[dict[str, float]]  # per step; none during the baseline
    gold: ndarray  # smoothed
    final_gold: float

    @property
    def peak(self) -> int:
        return int(self.gold.argmax())

    @property
    def fall(self) -> int | None:
        """The first step at which gold is more than FALL below its peak; the last one if only held-out gold says so."""
        low = np.flatnonzero(self.gold[self.peak :] < self.gold.max() - FALL)
        if len(low):
            return self.peak + int(low[0])
        return len(self.gold) - 1 if self.final_gold < self.gold.max() - FALL else None

    @property
    def healthy(self) -> int:
        """How many first steps an alarm would be false at."""
        if self.fall is None:
            return len(self.gold)
        rising = np.flatnonzero(self.gold[: self.peak] < self.gold.max() - MARGIN)
        return int(rising[-1]) + 1 if len(rising) else 0


def smooth(values: ndarray) -> ndarray:
    """Centered moving average of WIDTH; its first and last value stand for the steps beyond."""
    return np.pad(np.convolve(values, np.ones(WIDTH) / WIDTH, "valid"), WIDTH // 2, mode="edge")


def read(folder: Path) -> Trajectory:
    config, metrics = load_config_file(folder / "config.yaml"), list(read_rows(folder / "metrics.jsonl"))
    rows: dict[int, list[Json]] = {}
    for row in read_rows(folder / "samples.jsonl"):
        rows.setdefault(row["step"], []).append(row)
    monitor, found, gold = Monitor(), [], []
    for step in metrics:
        texts = [row["completion"] for row in rows[step["step"]]]
        extra = {
            "reward_std": float(np.std([row["reward"] for row in rows[step["step"]]])),
            "lower_bound": float(np.mean(step["heads"])) - step["disagreement"],
        }
        found.append(monitor.update(step | extra | text_signs(texts)).signs)
        gold.append(gold_rewards(texts).mean())
    final = [row["completion"] for row in read_rows(folder / "final.jsonl")]
    name = f"seed {config['seed']}, {config['objective']}, kl_coef {config['kl_coef']}, {len(metrics)} steps"
    rewards = [step["reward"] for step in metrics]
    return Trajectory(name, config["seed"], rewards, found, smooth(np.array(gold)), float(gold_rewards(final).mean()))


def distinct(runs: Iterable[Trajectory]) -> list[Trajectory]:
    """Without runs that are the beginning of another, longer one."""
    kept: list[Trajectory] = []
    for run in sorted(runs, key=lambda run: -len(run.reward)):
        if not any(other.reward[: len(run.reward)] == run.reward for other in kept):
            kept.append(run)
    return sorted(kept, key=lambda run: (run.seed, run.name))


# ---- rules: a number per step, an alarm above a threshold ----

Rule = Callable[[Trajectory], ndarray]


def sign(name: str) -> Rule:
    return lambda run: np.array([signs.get(name, -np.inf) for signs in run.signs])


def clock(run: Trajectory) -> ndarray:
    return np.where(np.arange(len(run.gold)) < START, -np.inf, np.arange(len(run.gold)))


def score(limits: dict[str, float]) -> Rule:
    return lambda run: np.array([suspicion(signs, limits) if signs else -np.inf for signs in run.signs])


def limit_of(rule: Rule, runs: list[Trajectory]) -> float:
    """The highest value at a healthy step of any run, times the most by which a seed exceeds that of the others, if
    it does: limits of few runs are too low for the next one."""
    seeds = sorted({run.seed for run in runs})
    by_seed = [max(rule(run)[: run.healthy].max(initial=-np.inf) for run in runs if run.seed == s) for s in seeds]
    first, second = sorted((float(value) for value in by_seed), reverse=True)[:2]
    return first * (first / second if second > 0 else 1.0)


def best_for_gold(rule: Rule, runs: list[Trajectory]) -> float:
    """The threshold of the highest mean gold at the stop; of equal ones the largest."""
    values = np.unique(np.concatenate([rule(run) for run in runs]))
    mean_gold = [np.mean([judge(rule, t, run)["gold"] for run in runs]) for t in values]
    return float(values[len(values) - 1 - int(np.argmax(mean_gold[::-1]))])


def judge(rule: Rule, threshold: float, run: Trajectory) -> Json:
    """What a rule does in a run; leads are negative (before), lags positive, in steps."""
    fired = np.flatnonzero(rule(run) > threshold)
    alarm = int(fired[0]) if len(fired) else None
    kind = "miss" if alarm is None else "hit"
    if run.fall is None:
        kind = "quiet" if alarm is None else "false"
    elif alarm is not None and alarm < run.healthy:
        kind = "false"
    return {
        "run": run.name, "kind": kind, "alarm": alarm, "peak": run.peak, "fall": run.fall,
        "gold": run.gold[-1 if alarm is None else alarm], "gold_end": run.gold[-1], "gold_peak": run.gold.max(),
        "gold_end_held_out": run.final_gold,
    }  # fmt: skip


def summary(rule: Rule, threshold: float, runs: list[Trajectory]) -> Json:
    judged = [judge(rule, threshold, run) for run in runs]
    saved = np.array([one["gold"] - one["gold_end"] for one in judged])
    held_out = np.array([one["gold"] - one["gold_end_held_out"] if one["alarm"] is not None else 0.0 for one in judged])
    fell = np.array([run.fall is not None for run in runs])
    after_peak = [one["alarm"] - one["peak"] for one in judged if one["kind"] == "hit"]
    after_fall = [one["alarm"] - one["fall"] for one in judged if one["kind"] == "hit"]
    return {
        "threshold": threshold,
        "runs": len(runs), "fell": int(fell.sum()),
        **{kind: sum(one["kind"] == kind for one in judged) for kind in ("hit", "miss", "quiet", "false")},
        "steps_after_peak": {"median": np.median(after_peak), "all": after_peak} if after_peak else None,
        "steps_after_fall": {"median": np.median(after_fall), "all": after_fall} if after_fall else None,
        "gold_at_stop": np.mean([one["gold"] for one in judged]),
        "gold_at_end": np.mean([one["gold_end"] for one in judged]),
        "gold_at_peak": np.mean([one["gold_peak"] for one in judged]),
        "saved": saved.mean(), "saved_interval": mean_interval(saved),
        "saved_against_held_out_end": held_out.mean(),
        "saved_against_held_out_end_interval": mean_interval(held_out),
        "saved_where_it_fell": saved[fell].mean() if fell.any() else None,
        "saved_where_it_did_not": saved[~fell].mean() if (~fell).any() else None,
    }  # fmt: skip


# ---- what each sign knows ----


def same_step_auroc(positive: ndarray, values: ndarray, step: ndarray, counts: ndarray) -> ndarray:
    """AUROC (draws,) over pairs of rows of equal step only: what a sign knows beyond how long training has gone on."""
    wins = (np.sign(values[:, None] - values[None]) + 1) / 2
    pairs = (step[:, None] == step[None]) & (positive[:, None] > positive[None])
    won = ((counts @ (wins * pairs)) * counts).sum(-1)
    total = ((counts @ pairs) * counts).sum(-1)
    return np.where(total > 0, won / np.maximum(total, 1e-300), np.nan)


def knowledge(rule: Rule, runs: list[Trajectory]) -> Json:
    """AUROC for steps past the peak of a run that fell, and for steps that have fallen, against all other steps."""
    rows = []
    for unit, run in enumerate(run for run in runs if np.isfinite(rule(run)).any()):
        past = run.fall is not None
        below = run.gold < np.maximum.accumulate(run.gold) - FALL
        for step, value in enumerate(rule(run)):
            if np.isfinite(value):
                rows.append((unit, step, value, past and step > run.peak, below[step]))
    unit, step, values, past_peak, fallen = (np.array(column) for column in zip(*rows, strict=True))

    def statistics(counts: ndarray) -> ndarray:
        return np.stack(
            [
                weighted_auroc(past_peak.astype(float), values, counts),
                weighted_auroc(fallen.astype(float), values, counts),
                same_step_auroc(past_peak.astype(float), values, step, counts),
            ],
            -1,
        )

    names = ("past_peak", "fallen", "past_peak_at_the_same_step")
    value, intervals = statistics(np.ones((1, len(rows))))[0], bootstrap_intervals(statistics, unit)
    found: Json = {"runs": int(unit.max()) + 1}
    return found | {
        name: {"auroc": auroc, "interval": interval.tolist()}
        for name, auroc, interval in zip(names, value, intervals, strict=True)
    }


def rounded(value: object) -> object:
    """JSON with figures that can be read; NaN and infinities become null."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 3) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--calibrate", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only-calibration", action="store_true", help="do not look at the other seeds")
    options = parser.parse_args()
    if len(set(options.calibrate)) == 1:
        parser.error("--calibrate needs at least two seeds, or none for the limits that are shipped")
    every = distinct(
        read(folder)
        for folder in options.folders
        if not options.only_calibration or load_config_file(folder / "config.yaml")["seed"] in options.calibrate
    )
    fit = [run for run in every if run.seed in options.calibrate]
    test = [run for run in every if run.seed not in options.calibrate]
    limits = {name: limit_of(sign(name), fit) for name in LIMITS} if fit else LIMITS
    without_texts = {name: limits[name] for name in ("kl", "reward")}
    names = sorted({name for run in every for signs in run.signs for name in signs})
    rules: dict[str, Rule] = {"score": score(limits), "score without texts": score(without_texts), "step": clock}
    rules |= {name: sign(name) for name in names}

    result: Json = {
        "limits": limits,
        "settings": {"smoothed over": WIDTH, "fall": FALL, "margin": MARGIN, "calibrated on seeds": options.calibrate},
        "runs": [
            {"name": run.name, "calibration": run in fit, "peak": run.peak, "fall": run.fall, "healthy": run.healthy,
             "gold_peak": run.gold.max(), "gold_end": run.gold[-1], "final_gold_held_out": run.final_gold}
            for run in every
        ],
    }  # fmt: skip
    for label, part in (("calibration", fit), ("test", test)):
        if part:
            table: Json = {}
            for name, rule in rules.items():
                table[name] = {"knows": knowledge(rule, part)}
                if fit or name.startswith("score"):
                    limit = 1.0 if name.startswith("score") else limit_of(rule, fit)
                    table[name]["alarm"] = summary(rule, limit, part)
                if fit:
                    best = best_for_gold(rule, fit)
                    table[name]["alarm, threshold best for gold in calibration"] = summary(rule, best, part)
            result[label] = table
            result[f"{label}: alarms of the score"] = [judge(rules["score"], 1.0, run) for run in part]
            result[f"{label}: score by threshold"] = [
                summary(rules["score"], t, part) for t in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
            ]
    made_by = {key: value for key, value in environment().items() if key != "command"}  # folders of one machine
    print(json.dumps(rounded({**result, "environment": made_by}), indent=1))


if __name__ == "__main__":
    main()
