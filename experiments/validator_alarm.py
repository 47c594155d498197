"""An alarm on the transfer ratio of a validator: limits from some seeds of the frontier, shown on the others.

The report of experiments/frontier.py holds what `alarms` says. Gold of a run falls if it ends `fall` stds of the
initial completions below the run's best step (means over three steps). The alarm is raised at the first step from KL
5 on at which transfer (`functional.monitor.transfer_ratio`, mean over three steps) is below a limit. The limit is the
lowest transfer that any run reached whose gold did not fall: of all seeds but the one that the alarm is then shown
on, so that no seed judges its own limit. Beside it: the monitor's own alarm, which these runs logged and whose limits
are of other runs.
"""

from typing import NamedTuple

import numpy as np
from equal_kl import LOW, compared
from frontier_curves import Curves, gain, over_three_steps

from poise.functional.monitor import transfer_ratio
from poise.runtime.run_folder import Json

FALLS = (0.25, 0.5, 1.0)
COMPLETIONS = 32  # of a step
VALIDATORS = {"deeper": "16 layers, held-back pairs", "other_pairs": "8 layers, other pairs"}


class Watched(NamedTuple):
    """A run: did its gold fall, transfer at every step by validator (NaN where undefined), gold of every step."""

    seed: int
    arm: str
    falls: bool
    transfer: dict[str, np.ndarray]
    curve: Json


def watched(seed: int, arm: str, curve: Json, fall: float) -> Watched:
    gold = over_three_steps(gain(curve, "g2"))
    proxy = np.array(curve["reward"]) - curve["reward"][0]
    ratios = {}
    for name in VALIDATORS:
        pairs = zip(proxy, gain(curve, name), strict=True)
        found = np.array([np.nan if (ratio := transfer_ratio(p, v, COMPLETIONS)) is None else ratio for p, v in pairs])
        smooth = over_three_steps(found)
        ratios[name] = np.where(np.array(curve["kl"]) >= LOW, smooth, np.nan)
    return Watched(seed, arm, bool(gold.max() - gold[-1] > fall), ratios, curve)


def alarm_step(run: Watched, name: str, limit: float) -> int | None:
    below = run.transfer[name] < limit
    return int(np.argmax(below)) if below.any() else None


def shown(runs: list[Watched], name: str) -> Json:
    """Every run under the limit that all other seeds give."""
    steps = []
    for run in runs:
        healthy = [one.transfer[name] for one in runs if one.seed != run.seed and not one.falls]
        known = [transfer for transfer in healthy if np.isfinite(transfer).any()]
        steps.append(alarm_step(run, name, min(map(np.nanmin, known))) if known else None)
    return told(runs, steps)


def told(runs: list[Watched], steps: list[int | None]) -> Json:
    """[found, of all that fall], [false, of all others], and gold where the alarm, or else the run, ends it."""
    rang, falls = np.array([step is not None for step in steps]), np.array([run.falls for run in runs])
    lost = []
    for run, step in zip(runs, steps, strict=True):
        gold = over_three_steps(gain(run.curve, "g2"))
        lost.append(float(gold[-1 if step is None else step] - gold.max()))
    return {
        "found": [int((rang & falls).sum()), int(falls.sum())],
        "false alarms": [int((rang & ~falls).sum()), int((~falls).sum())],
        "gold there, minus best step": compared(lost),
    }


def alarms(curves: Curves) -> Json:
    """By how far gold must fall: what an alarm on each validator's transfer, the monitor's, and none find."""
    found: Json = {}
    for fall in FALLS:
        runs = [watched(seed, arm, curve, fall) for seed, arms in curves.items() for arm, curve in arms.items()]
        own = [
            curve["step"].index(curve["alarms"][0]) if curve["alarms"] else None for curve in (r.curve for r in runs)
        ]
        found[f"{fall:g}"] = {
            "falls": [f"{run.seed} {run.arm}" for run in runs if run.falls],
            **{f"transfer to {VALIDATORS[name]}": shown(runs, name) for name in VALIDATORS},
            "the monitor's alarm": told(runs, own), "no alarm": told(runs, [None] * len(runs)),
        }  # fmt: skip
    return found
