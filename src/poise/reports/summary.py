"""A study's numbers: from judged cells to means over seeds and differences between arms. Pure: JSON in, JSON out.

A cell is one trained policy: its noise, arm, reward_seed and policy_seed, MEASURES, and what benchmarks said at
checkpoints of its training, if they were asked. Policies that share a reward model are not independent: policy seeds
are averaged within each, and intervals are Student's, 95 %, over reward models: there are few of them, and a bootstrap
of three leaves out zero one time in five where nothing differs. Differences are taken between policies of the same two
seeds.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import t as t_distribution

from poise.functional.statistics import movement, t_interval
from poise.runtime.run_folder import Json

MEASURES = (
    "final_gold", "peak_gold", "drawdown", "mean_gold", "gold_std", "kl", "proxy", "over_scoring", "distinct_bigrams",
)  # fmt: skip
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

    gold_std: over the second half of the steps, how unsteady it is once learned. over_scoring: proxy minus the gain in
    gold, each in stds of the initial policy's completions; 0 for a reward that gold agrees with.
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
    """Per noise and arm: each measure over reward seeds; its difference from the first arm's where both are there."""
    found: Json = {}
    by_arm: dict[tuple[str, str], list[Json]] = {}
    for cell in cells:
        by_arm.setdefault((cell["noise"], cell["arm"]), []).append(cell)
    for noise in sorted({noise for noise, _ in by_arm}):
        of_noise = {arm: own for arm in arms if (own := by_arm.get((noise, arm)))}
        first = of_noise.get(arms[0], [])
        found[noise] = {arm: _of_arm(own, first if arm != arms[0] else []) for arm, own in of_noise.items()}
        for task in sorted(
            {task for own in of_noise.values() for cell in own for task in cell.get("checkpoints") or {}}
        ):
            for arm, scores in over_checkpoints(of_noise, task, arms[0]).items():
                found[noise][arm].setdefault("checkpoints", {})[task] = scores
    return found


def _of_arm(own: Sequence[Json], first: Sequence[Json]) -> Json:
    part: Json = {"reward_seeds": len({cell["reward_seed"] for cell in own}), "policies": len(own)}
    for measure in MEASURES:
        part[measure] = estimate(values(own, measure), values(first, measure))
    return part | {"cpu_hours": sum(cell["cpu_hours"] for cell in own)}


def over_checkpoints(of_noise: Mapping[str, Sequence[Json]], task: str, first: str) -> Json:
    """Per arm, a benchmark at the steps at which all cells were asked it: means, and how much they move.

    Only common steps: asked more often, the same fall has a smaller std. Differences are from the arm `first`.
    """
    asked = {
        arm: {
            _seeds(cell): dict(zip(*(cell["checkpoints"][task][key] for key in ("steps", "mean")), strict=True))
            for cell in had
        }
        for arm, cells in of_noise.items()
        if (had := [cell for cell in cells if task in (cell.get("checkpoints") or {})])
    }
    steps = sorted(set.intersection(*(set(scores) for of_arm in asked.values() for scores in of_arm.values())))
    if not steps:
        return {}
    moves = {
        arm: {seeds: movement(np.array([scores[step] for step in steps])) for seeds, scores in of_arm.items()}
        for arm, of_arm in asked.items()
    }
    found: Json = {}
    for arm, of_arm in asked.items():
        means = [estimate({seeds: scores[step] for seeds, scores in of_arm.items()}, {}) for step in steps]
        found[arm] = {
            "reward_seeds": len({reward_seed for reward_seed, _ in of_arm}), "steps": steps,
            "mean": [one["mean"] for one in means], "interval": [one["interval"] for one in means],
        }  # fmt: skip
        for kind in ("std", "range", "largest_drop") if len(steps) > 1 else ():
            own, other = ({seeds: one[kind] for seeds, one in moves.get(name, {}).items()} for name in (arm, first))
            found[arm][kind] = estimate(own, other if arm != first else {})
    return found


def values(cells: Iterable[Json], measure: str) -> Values:
    """A measure of each cell of one noise and arm."""
    return {_seeds(cell): cell[measure] for cell in cells}


def _seeds(cell: Json) -> tuple[int, int]:
    return cell["reward_seed"], cell["policy_seed"]


def estimate(own: Values, first: Values) -> Json:
    """Mean over reward models, its interval and std if there are several.

    Also its difference from the first arm's, over the reward models and policy seeds that both have.
    """
    means = over_policies(own)
    found: Json = {"mean": float(means.mean()), "interval": seed_interval(means)}
    if len(means) > 1:
        found["std"] = float(means.std(ddof=1))
    if len(gap := difference(own, first)):
        found |= {"vs_baseline": float(gap.mean()), "vs_baseline_interval": seed_interval(gap)}
    return found


def seed_interval(values: Float[ndarray, " reward_seeds"]) -> list[float] | None:
    """Student's 95 % interval of their mean; None for a single one."""
    return t_interval(values).tolist() if len(values) > 1 else None


def contrasts(policies: Sequence[Json], arms: Sequence[str]) -> Json:
    """Per noise and arm: mean accuracy over the benchmarks minus that of the first arm, of policies of the same seeds.

    policies: of `poise evaluate-policy`, named by their cells (`noise-0/reward-1/policy-0/ARM`), with their outcomes,
    one character a row. Rows and reward models are both samples: the variances of the mean over either are added, with
    Welch and Satterthwaite's degrees of freedom. Nothing of fewer than two reward models.
    """
    of_cell: dict[tuple[str, str], dict[tuple[int, int], Json]] = {}
    for policy in policies:
        if place := re.search(r"noise-([^/]+)/reward-(\d+)/policy-(\d+)/([^/]+)$", policy["name"]):
            noise, reward_seed, policy_seed, arm = place.groups()
            of_cell.setdefault((noise, arm), {})[int(reward_seed), int(policy_seed)] = policy["tasks"]
    found: Json = {}
    for (noise, arm), own in of_cell.items():
        first = of_cell.get((noise, arms[0]), {})
        both = sorted(own.keys() & first.keys())
        if arm == arms[0] or len({reward_seed for reward_seed, _ in both}) < 2:
            continue
        tasks = sorted(set.intersection(*(set(of[seeds]) for of in (own, first) for seeds in both)))
        gaps = [
            over_policies({seeds: _outcomes(own[seeds][task]) - _outcomes(first[seeds][task]) for seeds in both})
            for task in tasks
        ]
        if gaps := [of_task for of_task in gaps if of_task.shape[1] > 1]:  # a single row has no variance
            found.setdefault(noise, {})[arm] = {"against": arms[0]} | _contrast(gaps)
    return found


def _contrast(of_task: Sequence[Float[ndarray, "reward_seeds _"]]) -> Json:
    """Of differences of outcomes, by benchmark."""
    by_reward = np.mean([gap.mean(1) for gap in of_task], axis=0)
    over_rows = sum(gap.mean(0).var(ddof=1) / gap.shape[1] for gap in of_task) / len(of_task) ** 2
    over_rewards, rows = by_reward.var(ddof=1) / len(by_reward), sum(gap.shape[1] for gap in of_task)
    total = over_rows + over_rewards
    freedom = total**2 / max(over_rewards**2 / (len(by_reward) - 1) + over_rows**2 / (rows - 1), 1e-300)
    mean, reach = float(by_reward.mean()), float(t_distribution.ppf(0.975, max(freedom, 1.0)) * np.sqrt(total))
    return {"difference": mean, "interval": [mean - reach, mean + reach], "reward_seeds": len(by_reward), "rows": rows}


def _outcomes(task: Json) -> Float[ndarray, " rows"]:
    return np.array(list(map(int, task["outcomes"])), dtype=float)


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
