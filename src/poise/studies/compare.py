"""Finished policies side by side, scored by gold if there is one. No other module reads gold of trained policies.

RUN/results.json   per arm: gold, proxy, KL and heads per step; final gold with intervals; differences between
                   arms; completions, most over-scored first. Without gold: what is left of it, highest proxy first
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from poise.errors import PoiseError
from poise.functional.monitor import text_signs
from poise.functional.statistics import mean_interval
from poise.policy.formats import FinalRow, RewardSettings, SampleRow, StepRow, refuse_unfinished
from poise.runtime.display import short_names
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, Run, load_config_file
from poise.studies.comparisons import prompt_key
from poise.studies.config import CompareConfig as Config
from poise.studies.gold import gold_of, label_with_gold
from poise.studies.pool import PoolRow, prompt_label

NUM_SHOWN = 24


_OF_GOLD = {"gold", "peak_gold", "drawdown", "initial_gold", "initial_gold_std"}


def run(config: Config) -> Run:
    """Read the arms' completions, score them by gold, compare. Takes seconds; always done anew."""
    config.check()
    labels = config.labels or short_names(config.arms)
    finals = [_final(Path(arm), config.gold) for arm in config.arms]
    by_prompt = [_gold_by_prompt(rows) for rows in finals]
    if any(golds.keys() != by_prompt[0].keys() for golds in by_prompt):
        raise PoiseError("the arms were not evaluated on the same prompts")
    sampled = list(read_rows(Path(config.pool) / "pool.jsonl", PoolRow)) if config.pool else []
    if sampled and _by_prompt(sampled).keys() != by_prompt[0].keys():
        raise PoiseError(f"--pool {config.pool} is of other prompts than those that the arms were evaluated on")
    out = Run.open(config.output, config)
    arms = [
        _arm(Path(arm), label, rows, config.gold) for arm, label, rows in zip(config.arms, labels, finals, strict=True)
    ]
    names = [arm["name"] for arm in arms]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, config.arms, strict=True)]
    arms = [arm | {"name": name} for arm, name in zip(arms, names, strict=True)]
    per_prompt = len(finals[0]) // len(by_prompt[0])
    initial = _initial(sampled, per_prompt, config.gold) if sampled else {}
    for arm in arms if "gold" in initial else []:
        arm |= {"initial_gold": initial["gold"], "initial_gold_std": initial["gold_std"]}
    differences = []
    for arm, golds in zip(arms[1:], by_prompt[1:], strict=True) if config.gold else []:
        paired = np.array([golds[prompt] - by_prompt[0][prompt] for prompt in golds])
        difference: Json = {"arm": arm["name"], "against": arms[0]["name"], "num_prompts": len(paired)}
        differences.append(difference | {"gold": float(paired.mean()), "interval": _interval(paired)})
    found = {"initial": initial, "arms": arms, "differences": differences, "completions": _side_by_side(names, finals)}
    out.finish(found if config.gold else _without_gold(found))
    return out


def _without_gold(found: Any) -> Any:
    """The results with None for every measure of gold, which was NaN."""
    if isinstance(found, dict):
        return {name: None if name in _OF_GOLD else _without_gold(value) for name, value in found.items()}
    return [_without_gold(value) for value in found] if isinstance(found, list) else found


def _initial(rows: list[Json], per_prompt: int, gold: str) -> Json:
    """The initial policy on the same prompts; variety is counted on as many completions as the arms have."""
    texts = [row["completion"] for part in _by_prompt(rows).values() for row in part[:per_prompt]]
    if not gold:
        return {"distinct_bigrams": distinct_bigrams(texts)}
    label_with_gold(rows, gold)  # the pool may have labels of another gold
    golds = np.array([row["gold"] for row in rows])
    return {"gold": float(golds.mean()), "gold_std": _std(golds), "distinct_bigrams": distinct_bigrams(texts)}


def _final(arm: Path, gold: str) -> list[Json]:
    refuse_unfinished(arm)
    path = arm / "final.jsonl"
    rows = list(read_rows(path, FinalRow))
    if not rows:
        raise PoiseError(f"{path} holds no completions")
    for row, value in zip(rows, _gold_of(rows, gold), strict=True):
        row["gold"] = float(value)
    return rows


def _gold_of(rows: list[Json], gold: str) -> ndarray:
    """NaN for every row where there is no gold; `_without_gold` puts None in its place."""
    return gold_of(rows, gold) if gold else np.full(len(rows), np.nan)


def _by_prompt(rows: list[Json]) -> dict[str, list[Json]]:
    """Rows of each whole prompt: conversations may share their last turn."""
    found: dict[str, list[Json]] = {}
    for row in rows:
        found.setdefault(prompt_key(row["prompt"]), []).append(row)
    return found


def _gold_by_prompt(rows: list[Json]) -> dict[str, float]:
    return {prompt: float(np.mean([row["gold"] for row in part])) for prompt, part in _by_prompt(rows).items()}


def _arm(folder: Path, label: str, final: list[Json], gold: str) -> Json:
    settings = load_config_file(folder / "config.yaml", RewardSettings)
    metrics = list(read_rows(folder / "metrics.jsonl", StepRow))
    samples = list(read_rows(folder / "samples.jsonl", SampleRow))
    if not metrics or {step["step"] for step in metrics} != {row["step"] for row in samples}:
        raise PoiseError(f"{folder}: metrics.jsonl and samples.jsonl are not of the same steps; it cannot be compared")
    if metrics[0]["step"] != 0:
        raise PoiseError(f"{folder}: metrics.jsonl and samples.jsonl lack the first steps; it cannot be compared")
    golds: dict[int, list[float]] = {}
    for row, value in zip(samples, _gold_of(samples, gold), strict=True):
        golds.setdefault(row["step"], []).append(float(value))
    steps = [
        {
            "step": step["step"], "kl": step.get("kl"), "proxy": step["reward"],
            "gold": float(np.mean(golds[step["step"]])),
            **{name: step.get(name) for name in ("disagreement", "gap", "routing_std", "heads")},
        }
        for step in metrics
    ]  # fmt: skip
    by_prompt = np.array(list(_gold_by_prompt(final).values()))
    final_gold = float(by_prompt.mean())
    # Peak of a moving average: single steps of a few dozen completions are too noisy to name a peak.
    peak = max(final_gold, float(_moving_average(np.array([step["gold"] for step in steps])).max()))
    first = np.array(golds[metrics[0]["step"]])  # the initial policy's
    # TRL's trainers log no times, and no KL at beta 0.
    laps = [
        lap for lap in ("sample", "score", "reference", "update") if all(f"{lap}_seconds" in step for step in metrics)
    ]
    return {
        "name": folder.name.removeprefix("policy-"), "label": label, "objective": settings["objective"],
        "reward": _reward_of(folder, settings), "kl_coef": settings["kl_coef"], "steps": steps,
        "final": {
            "gold": final_gold, "interval": _interval(by_prompt) if gold else None,
            "proxy": float(np.mean([row["reward"] for row in final])),
            "kl": float(np.mean([row["kl"] for row in final])),
            "distinct_bigrams": distinct_bigrams([row["completion"] for row in final]),
        },
        "peak_gold": peak, "drawdown": peak - final_gold,
        "initial_gold": float(first.mean()), "initial_gold_std": _std(first),
        "alarms": [{"step": step["step"], "score": step["monitor_score"]} for step in metrics if step.get("alarm")],
        "seconds": sum(step[f"{lap}_seconds"] for step in metrics for lap in laps),
        "step_seconds": {lap: float(np.median([step[f"{lap}_seconds"] for step in metrics])) for lap in laps},
    }  # fmt: skip


def _reward_of(folder: Path, settings: Json) -> str:
    """The reward model's name, and of a run folder which heads of it."""
    results = Run(folder).results or {}
    heads = results.get("heads")
    return f"{Path(settings['reward']).name}/{heads}" if heads else Path(settings["reward"]).name


def _interval(values: ndarray) -> tuple[float, float] | None:
    """Of the mean over prompts; None for a single prompt, which says nothing of its own error."""
    return mean_interval(values) if len(values) > 1 else None


def _std(values: ndarray) -> float:
    """Sample std, as a unit: like a RewardScale's, 1 for a constant."""
    std = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(std) if std > 1e-6 else 1.0


def _moving_average(values: ndarray, width: int = 3) -> ndarray:
    return np.convolve(values, np.ones(width) / width, "valid") if len(values) >= width else values


def _side_by_side(names: list[str], finals: list[list[Json]]) -> list[Json]:
    """One completion of each arm per evaluation prompt, sorted by how much the first arm's proxy over-scores its own;
    without gold by that proxy.

    over_scored: standardized proxy minus standardized gold, both over all final completions of the arm and, for the
    comparison to mean something, of the other arms too.
    """
    gold = np.array([row["gold"] for rows in finals for row in rows])
    by_prompt = [_by_prompt(rows) for rows in finals]
    first = [(prompt, number) for prompt, rows in by_prompt[0].items() for number in range(len(rows))]
    rows = [by_prompt[0][prompt][number] for prompt, number in first]
    proxy = np.array([row["reward"] for row in rows])
    gap = (proxy - proxy.mean()) / max(proxy.std(), 1e-9)
    if np.isfinite(gold).all():
        gap -= (np.array([row["gold"] for row in rows]) - gold.mean()) / max(gold.std(), 1e-9)
    shown: dict[str, Json] = {}
    for i in np.argsort(-gap):
        prompt, number = first[i]
        if prompt not in shown and len(shown) < NUM_SHOWN:
            same = [rows[prompt] for rows in by_prompt]
            shown[prompt] = {
                "prompt": prompt_label(rows[i]["prompt"]), "over_scored": float(gap[i]),
                "arms": {name: _shown(arm[number % len(arm)]) for name, arm in zip(names, same, strict=True)},
            }  # fmt: skip
    return list(shown.values())


def _shown(row: Json) -> Json:
    return {"completion": row["completion"], "proxy": row["reward"], "gold": row["gold"], "heads": row["mean"]}


def distinct_bigrams(texts: list[str]) -> float:
    """Distinct word pairs as a share of all word pairs: low when a policy writes the same about everything.

    Gold reads one text at a time and cannot see this.

    >>> distinct_bigrams(["a fine film", "a fine phone"])
    0.75
    """
    return text_signs(texts)["variety"]
