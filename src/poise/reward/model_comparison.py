"""Several reward models side by side: means over models of one kind, paired differences between models of several.

Models of one kind (the same number and kind of heads) count as trainings from several seeds. `single` and `brme` of a
run are two kinds, and the mean over both would describe neither.
"""

from collections.abc import Iterable
from itertools import combinations
from math import isfinite

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from poise.functional.reward_benchmarks import picks_chosen, style_matrix, style_scores
from poise.functional.statistics import intervals_of_means, t_interval
from poise.runtime.run_folder import Json


def headline(results: Json) -> dict[str, float]:
    """The numbers of one reward model that are averaged over several."""
    numbers: Json = {}
    for data in ("pairs", "ood"):
        if block := results.get(data):
            numbers |= {f"{data} accuracy": block["accuracy"], f"{data} over length": block["over_length"]}
            numbers[f"{data} NLL"] = block["probability"]["nll"]
            for name, known in block["uncertainties"].items():
                numbers[f"{data} AUROC of errors, {name}"] = known["auroc"]
    for name, known in (results.get("ood_auroc") or {}).items():
        numbers[f"AUROC of --ood texts, {name}"] = known["auroc"]
    sets = results.get("sets") or {}
    numbers |= {f"{name} accuracy": score["accuracy"] for name, score in (sets.get("scores") or {}).items()}
    if "accuracy" in sets:
        numbers |= {"accuracy": sets["accuracy"], "over chance": sets["over_chance"]}
    return {name: value for name, value in numbers.items() if value is not None and isfinite(value)}


def of_one_kind(rewards: list[Json]) -> bool:
    """True if all models have the same number and kind of heads."""
    return len({(results["num_heads"], results["kind"]) for results in rewards}) == 1


def over_rewards(rewards: list[Json]) -> Json:
    """Mean of each headline number that all models have, with Student's interval over the models; {} for a single model
    and for models of several kinds."""
    if len(rewards) < 2 or not of_one_kind(rewards):
        return {}
    numbers = [headline(results) for results in rewards]
    shared = [name for name in numbers[0] if all(name in other for other in numbers)]
    columns = {name: np.array([own[name] for own in numbers]) for name in shared}
    return {
        name: {"mean": float(values.mean()), "interval": t_interval(values).tolist(), "values": values.tolist()}
        for name, values in columns.items()
    }


def differences(
    rewards: list[Json], rows: Iterable[list[Json]], kind: str, units: dict[str, Int[ndarray, " items"]], seed: int
) -> list[Json]:
    """For models of several kinds, each model minus each earlier one on the same pairs or sets; [] for one kind.

    rows: of each model, as reward-N.jsonl holds them. units: for `file` and `ood`; the bootstrap draws rows of equal
    number together. An entry names `reward` and `versus`, and per column gives `mean` and `interval` (95 %).
    """
    if of_one_kind(rewards):
        return []
    columns = [_columns(own, kind) for own in rows]
    found = []
    for first, second in combinations(range(len(rewards)), 2):
        entry: Json = {"reward": rewards[second]["reward"], "versus": rewards[first]["reward"]}
        for data, unit in units.items():
            names = list(columns[first][data])
            values = np.column_stack([columns[second][data][name] - columns[first][data][name] for name in names])
            intervals = intervals_of_means(values, unit, seed)
            prefix = {"file": "pairs ", "ood": "ood "}[data] if kind == "pairs" else ""
            for name, mean, interval in zip(names, values.mean(0).tolist(), intervals, strict=True):
                entry[prefix + name] = {"mean": mean, "interval": interval}
        found.append(entry)
    return found


def _columns(rows: list[Json], kind: str) -> dict[str, dict[str, Float[ndarray, " items"]]]:
    """For `file` and `ood`, the numbers of each pair or set whose means are headline numbers."""
    if kind == "pairs":
        columns: dict[str, dict[str, ndarray]] = {}
        for data in dict.fromkeys(row["data"] for row in rows):
            own = [row for row in rows if row["data"] == data]
            probability = np.array([row["probability"] for row in own])
            correct = np.array([float(row["correct"]) for row in own])
            columns[data] = {"accuracy": correct, "NLL": -np.log(probability)}
        return columns
    sides = [(np.array(row["chosen"]), np.array(row["rejected"])) for row in rows]
    if kind == "rm_bench":
        scores = [style_scores(style_matrix(chosen[None], rejected[None])) for chosen, rejected in sides]
        return {"file": {f"{name} accuracy": np.array([own[name] for own in scores]) for name in scores[0]}}
    return {"file": {"accuracy": np.array([float(picks_chosen(*side)) for side in sides])}}
