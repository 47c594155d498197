"""Can a validator's transfer raise an alarm? A rule fixed on five seeds of the frontier, shown on them and later ones.

The report of experiments/frontier.py holds what `alarms` says. Gold of a run falls if it ends `fall` stds of the
initial completions below the run's best step (means over three steps). The rule rings once it is sure, at LIMIT
standard errors over WINDOW steps, that the validator has gained less than SEEN of what the reward has. It was chosen
among 36 on the runs of seeds SEEN_FIRST (experiments/frontier_design.md). Beside it: the alarm that these runs logged,
for which nobody watched and whose limits are of other runs; a stop at KL 20; and no alarm.
"""

import math

import numpy as np
from equal_kl import compared
from frontier_curves import SEEN_FIRST, Curves, gain, over_three_steps

from poise.runtime.run_folder import Json

SEEN, LIMIT, WINDOW, BASELINE = 0.7, 2.33, 3, 4
FALLS = (0.25, 0.5, 1.0)
COMPLETIONS = 32  # of a step
VALIDATORS = {"deeper": "16 layers, held-back pairs", "other_pairs": "8 layers, other pairs"}


def alarm_step(curve: Json, validator: str) -> int | None:
    """Index of the first step at which the rule rings, after the monitor's BASELINE steps.

    The standard error is that of two means over COMPLETIONS of std 1 each that have nothing to do with one another.
    """
    short = SEEN * (np.array(curve["reward"]) - curve["reward"][0]) - gain(curve, validator)
    error = math.sqrt((1 + SEEN**2) / (WINDOW * COMPLETIONS))
    for step in range(BASELINE, len(short)):
        if short[step - WINDOW + 1 : step + 1].mean() > LIMIT * error:
            return step
    return None


def logged(curve: Json) -> int | None:
    """Index of the first step at which the run itself logged an alarm."""
    return curve["step"].index(curve["alarms"][0]) if curve["alarms"] else None


def at_kl(curve: Json, kl: float) -> int | None:
    reached = np.array(curve["kl"]) >= kl
    return int(np.argmax(reached)) if reached.any() else None


def falls(curve: Json, fall: float) -> bool:
    gold = over_three_steps(gain(curve, "g2"))
    return bool(gold.max() - gold[-1] > fall)


def told(curves: list[Json], steps: list[int | None], fall: float) -> Json:
    """[found, of all that fall], [false, of all others], and gold where the alarm, or else the run, ends it."""
    rang = np.array([step is not None for step in steps], dtype=bool)
    fell = np.array([falls(curve, fall) for curve in curves], dtype=bool)
    lost = []
    for curve, step in zip(curves, steps, strict=True):
        gold = over_three_steps(gain(curve, "g2"))
        lost.append(float(gold[-1 if step is None else step] - gold.max()))
    return {
        "found": [int((rang & fell).sum()), int(fell.sum())],
        "false alarms": [int((rang & ~fell).sum()), int((~fell).sum())],
        "gold there, minus best step": compared(lost),
    }


def alarms(curves: Curves) -> Json:
    """By seeds, and by how far gold must fall: what each alarm finds. Seeds without a run are left out."""
    found: Json = {}
    for name, chosen in (("seeds it was chosen on", True), ("later seeds", False)):
        runs = {
            f"{seed} {arm}": curve for seed, arms in sorted(curves.items()) if (seed in SEEN_FIRST) == chosen
            for arm, curve in arms.items()
        }  # fmt: skip
        of = list(runs.values())
        stops = {
            **{f"validator of {VALIDATORS[key]}": [alarm_step(run, key) for run in of] for key in VALIDATORS},
            "the monitor alone": [logged(run) for run in of],
            "KL 20": [at_kl(run, 20) for run in of], "none": [None] * len(of),
        }  # fmt: skip
        if of:
            found[name] = {
                f"{fall:g}": {
                    "falls": [run for run, curve in runs.items() if falls(curve, fall)],
                    **{stop: told(of, steps, fall) for stop, steps in stops.items()},
                }
                for fall in FALLS
            }
    return found
