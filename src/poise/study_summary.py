"""A study's numbers: from judged cells to means over seeds and differences between arms. Pure: JSON in, JSON out.

A cell is one trained policy: its noise, arm, reward_seed and policy_seed, MEASURES, and what benchmarks said at
checkpoints of its training, if they were asked. Policies that share a reward model are not independent: policy seeds
are averaged within each, and intervals are 95 % bootstrap intervals over reward models. Differences are taken between
policies of the same two seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from poise.metrics import bootstrap_interval
from poise.runs import Json

MEASURES = (
    "final_gold", "peak_gold", "drawdown", "mean_gold", "gold_std", "kl", "proxy", "over_scoring", "distinct_bigrams",
)  # fmt: skip
MOVEMENTS = ("std", "range", "largest_drop")  # of a benchmark's means over checkpoints
Values = dict[tuple[int, int], float]  # of one arm, by reward seed and policy seed


def noise_label(noise: str) -> str:
    """Label noise in words.

    >>> noise_label("0"), noise_label("raters"), noise_label("0.25")
    ('no labels flipped', 'single raters’ labels', '25\\xa0% of labels flipped')
    """
    if noise == "raters":
        return "single raters’ labels"
    try:
        share = float(noise)
    except ValueError:
        return noise
    return "no labels flipped" if share == 0 else f"{100 * share:.3g}\xa0% of labels flipped"


def measured(arm: Json) -> Json:
    """MEASURES of one arm of a comparison, and the interval of its final gold over prompts.

    gold_std: over the second half of the steps, how unsteady it is once learned. over_scoring: proxy less what gold has
    gained, each in stds of the initial policy's completions; 0 for a reward that gold agrees with.
    """
    final, gold = arm["final"], np.array([step["gold"] for step in arm["steps"]])
    late = gold[len(gold) // 2 :]
    return {
        "final_gold": final["gold"], "interval_over_prompts": final["interval"],
        "peak_gold": arm["peak_gold"], "drawdown": arm["drawdown"],
        "mean_gold": float(gold.mean()), "gold_std": float(late.std(ddof=1)) if len(late) > 1 else 0.0,
        "kl": final["kl"], "proxy": final["proxy"],
        "over_scoring": final["proxy"] - (final["gold"] - arm["initial_gold"]) / arm["initial_gold_std"],
        "distinct_bigrams": final["distinct_bigrams"],
    }  # fmt: skip


def summary(cells: Iterable[Json], arms: Sequence[str]) -> Json:
    """Per noise and arm: each measure over reward seeds, and less the first arm's where both are there."""
    found: Json = {}
    by_arm: dict[tuple[str, str], list[Json]] = {}
    for cell in cells:
        by_arm.setdefault((cell["noise"], cell["arm"]), []).append(cell)
    for noise in sorted({noise for noise, _ in by_arm}):
        first = by_arm.get((noise, arms[0]), [])
        found[noise] = {
            arm: _of_arm(own, first if arm != arms[0] else [])
            for arm in arms
            if (own := by_arm.get((noise, arm)))
        }  # fmt: skip
    return found


def _of_arm(own: Sequence[Json], first: Sequence[Json]) -> Json:
    part: Json = {"reward_seeds": len({cell["reward_seed"] for cell in own}), "policies": len(own)}
    for measure in MEASURES:
        part[measure] = estimate(values(own, measure), values(first, measure))
    part["cpu_hours"] = sum(cell["cpu_hours"] for cell in own)
    if checkpoints := _of_checkpoints(own, first):
        part["checkpoints"] = checkpoints
    return part


def _of_checkpoints(own: Sequence[Json], first: Sequence[Json]) -> Json:
    """Per benchmark: its mean at every step that all cells have, and how much it moves over them."""
    found: Json = {}
    for task in sorted({task for cell in own for task in cell.get("checkpoints") or {}}):
        asked, of_first = _asked(own, task), _asked(first, task)
        at = {seeds: dict(zip(one["steps"], one["mean"], strict=True)) for seeds, one in asked.items()}
        steps = sorted(set.intersection(*map(set, at.values())))
        means = [estimate({seeds: mean[step] for seeds, mean in at.items()}, {}) for step in steps]
        low, high = zip(*(one["interval"] for one in means), strict=True)
        found[task] = {
            "reward_seeds": len({reward_seed for reward_seed, _ in asked}), "steps": steps,
            "mean": [one["mean"] for one in means], "low": list(low), "high": list(high),
        }  # fmt: skip
        for movement in MOVEMENTS:
            one, other = (
                {seeds: moves[movement] for seeds, moves in of.items() if moves[movement] is not None}
                for of in (asked, of_first)
            )
            if one:  # a single checkpoint has no std
                found[task][movement] = estimate(one, other)
    return found


def _asked(cells: Iterable[Json], task: str) -> dict[tuple[int, int], Json]:
    """How a benchmark moved in every cell that was asked it."""
    return {_seeds(cell): cell["checkpoints"][task] for cell in cells if task in (cell.get("checkpoints") or {})}


def values(cells: Iterable[Json], measure: str) -> Values:
    """A measure of each cell of one noise and arm."""
    return {_seeds(cell): cell[measure] for cell in cells}


def _seeds(cell: Json) -> tuple[int, int]:
    return cell["reward_seed"], cell["policy_seed"]


def estimate(own: Values, first: Values) -> Json:
    """Mean over reward models, its interval, the std if there are several; and less the first arm's, where paired.

    A difference of a single reward model has no interval: the bootstrap would draw that one again and again.
    """
    means = over_policies(own)
    found: Json = {"mean": float(means.mean()), "interval": bootstrap_interval(means)}
    if len(means) > 1:
        found["std"] = float(means.std(ddof=1))
    if len(less := difference(own, first)):
        interval = bootstrap_interval(less) if len(less) > 1 else None
        found |= {"less_first": float(less.mean()), "less_first_interval": interval}
    return found


def difference(own: Values, other: Values) -> Float[ndarray, " reward_seeds"]:
    """What one arm has beyond another: of each reward model, over the policy seeds that both have.

    >>> difference({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0}, {(0, 0): 0.5, (0, 1): 0.5, (2, 0): 9.0})
    array([1.5])
    """
    return over_policies({at: own[at] - other[at] for at in sorted(own.keys() & other.keys())})


def over_policies(of_cells: Mapping[tuple[int, int], Any]) -> Float[ndarray, "reward_seeds ..."]:
    """Means over the policy seeds of each reward model, of numbers or of arrays.

    >>> over_policies({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0})
    array([2., 5.])
    """
    by_reward: dict[int, list[Any]] = {}
    for seeds in sorted(of_cells):
        by_reward.setdefault(seeds[0], []).append(of_cells[seeds])
    return np.array([np.mean(of_reward, axis=0) for of_reward in by_reward.values()])
