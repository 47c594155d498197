"""How much do the reward models behind the README's picture differ between the old split of pairs and today's?

    python experiments/picture_rewards.py --pool runs/pool [--policies runs/holds] --output results/NAME.json

The left panel is of the seeds 1 to 5, the other two of 41 to 45. For each: the 400 pairs are split at random, as they
were then, in whole texts, as they are now, and at random once more, which shows how much any other draw changes. The
reward models of the three are trained on the same features, and score the same 320 completions of the initial policy
and, with --policies, the final answers of policies that the seeds' conventional arm trained (experiments/holds.py).
With --policies the gold of these policies stands beside that of the policies in the panel. Gold is read for the report
alone.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from validation_split import FRESH, SHARE, accuracy, at_random, shared

from poise.data.human_ratings import human_ratings, is_held_out, preference_pairs
from poise.data.types import Sample
from poise.functional.best_of_n import best_of_n
from poise.functional.objectives import RewardScale, parse_objective
from poise.functional.statistics import smoothed, spearman, t_interval
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor, generated
from poise.reward.head_training import HeadTraining, train_on_features
from poise.reward.pairs import PreferenceSplit, pair_features
from poise.runtime.records import read_object, read_rows, undefined_as_none
from poise.runtime.run_folder import Json, environment, write_json
from poise.studies.config import LAPTOP_REWARD
from poise.studies.gold import gold_rewards
from poise.studies.pool import kept_pool
from poise.studies.quickstart import EVAL_FILMS, EVAL_PRODUCTS, RATED_DOMAINS, review_prompts

SEEDS = {"left": (1, 2, 3, 4, 5), "middle and right": (41, 42, 43, 44, 45)}
ARMS = {
    "conventional": ("single", "nominal"), "brme": ("brme", "tradeoff(0.4)"),
    "settle": ("posterior", "lower_confidence(1)"),
}  # fmt: skip
PER_PROMPT = 8
PAIRS_OF_SPLITS = {"old and new": ("old", "new"), "old and another old": ("old", "another old")}


def rewards(trained: HeadTraining, arm: str, pool: torch.Tensor, others: torch.Tensor) -> list[ndarray]:
    """What PPO of the arm would be given for the pool, and for other texts, on the scale that the pool sets.

    Without the ceiling of `settle`, at which all rewards are equal.
    """
    name, objective = ARMS[arm]
    function = parse_objective(objective)
    model = trained.models[name]
    start, after = (model.layout.decode(part.double() @ model.weight.double().T) for part in (pool, others))
    scale, own = RewardScale.fit_and_combine(start, function)
    return [own.numpy(), scale.combine(after, function).numpy()]


def agreement(one: ndarray, other: ndarray) -> Json:
    return {"pearson": correlation(one, other), "spearman": undefined_as_none(spearman(one, other))}


def correlation(one: ndarray, other: ndarray) -> float | None:
    """None where all values are equal."""
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) and np.ptp(other) else None


def seed_of(seed: int, extract: FeatureExtractor, rated: list, fresh, pool: list[Json], final: list[Sample]) -> Json:
    preferences = preference_pairs(rated, RATED_DOMAINS.__getitem__, 400, seed)
    raw = pair_features(extract, preferences)
    splits = {
        "old": at_random(preferences, seed), "new": PreferenceSplit.draw(preferences, SHARE, seed),
        "another old": at_random(preferences, seed + 1000),
    }  # fmt: skip
    trained = {
        name: train_on_features(dataclasses.replace(LAPTOP_REWARD, seed=seed), split, extract, raw)
        for name, split in splits.items()
    }
    on_pool = extract([generated(row["prompt"], row["completion"]) for row in pool])
    on_final = extract(final) if final else on_pool[:0]
    gold = gold_rewards([row["completion"] for row in pool])
    found: Json = {"seed": seed, "splits": {}, "arms": {}}
    for name, split in splits.items():
        held = raw.rows(split.validation)
        layout = trained[name].models["brme"].layout
        found["splits"][name] = {
            **shared(split), "prior_precision": trained[name].precision, "std_scale": list(layout.std_scale),
            "validation": {m: accuracy(trained[name].models[m], held) for m in ("single", "brme")},
            "fresh": {m: accuracy(trained[name].models[m], fresh) for m in ("single", "brme", "posterior")},
        }  # fmt: skip
    for arm in ARMS:
        scored = {name: rewards(trained[name], arm, on_pool, on_final) for name in splits}
        found["arms"][arm] = {
            "gold_correlation": {name: correlation(own, gold) for name, (own, _) in scored.items()},
            "best_of_8_gold": {
                name: float(
                    best_of_n(own.reshape(-1, PER_PROMPT), gold.reshape(-1, PER_PROMPT), np.array([PER_PROMPT])).mean()
                )
                for name, (own, _) in scored.items()
            },
            "agreement": {
                name: agreement(scored[one][0], scored[other][0]) for name, (one, other) in PAIRS_OF_SPLITS.items()
            },
        }
        if final:
            found["arms"][arm]["after PPO"] = {
                "mean": {name: float(after.mean()) for name, (_, after) in scored.items()},
                **{name: agreement(scored[one][1], scored[other][1]) for name, (one, other) in PAIRS_OF_SPLITS.items()},
            }
    return found


def kept(path: Path, make: Callable[[], Json]) -> Json:
    """What was computed before a stop, or is now."""
    if not path.exists():
        write_json(path, make())
    return read_object(path)


def change(runs: list[Json], read) -> Json:
    """Means over seeds of a number under each split, and the change from old to new and to another old split."""
    values = {name: np.array([read(run, name) for run in runs], dtype=float) for name in ("old", "new", "another old")}
    return {name: float(value.mean()) for name, value in values.items()} | {
        f"{name} - old": {
            "mean": float((values[name] - values["old"]).mean()),
            "interval": t_interval(values[name] - values["old"]).tolist(),
        }
        for name in ("new", "another old")
    }


def summary(runs: list[Json]) -> Json:
    found: Json = {
        f"{what}, {model}": change(runs, lambda run, name, w=what, m=model: run["splits"][name][w][m])
        for what in ("validation", "fresh")
        for model in ("single", "brme")
    }
    found["log10 of the prior's precision"] = change(
        runs, lambda run, name: np.log10(run["splits"][name]["prior_precision"])
    )
    found["mean std scale of BRME"] = change(runs, lambda run, name: np.mean(run["splits"][name]["std_scale"]))
    for arm in ARMS:
        for what in ("gold_correlation", "best_of_8_gold"):
            found[f"{arm}, {what}"] = change(runs, lambda run, name, a=arm, w=what: run["arms"][a][w][name])
        for where in ("agreement", "after PPO"):
            own = [run["arms"][arm][where] for run in runs if where in run["arms"][arm]]
            for pair in PAIRS_OF_SPLITS if own else ():
                values = np.array([part[pair]["pearson"] for part in own if part[pair]["pearson"] is not None])
                found[f"{arm}, correlation of rewards, {where}, {pair}"] = {
                    "mean": float(values.mean()), "lowest": float(values.min()), "seeds": len(values),
                }  # fmt: skip
    return found


def gold_of_policy(folder: Path) -> Json:
    """A finished policy of the conventional arm: proxy, gold and KL by step, and the gold of its final answers."""
    by_step: dict[int, list[Json]] = {}
    for row in read_rows(folder / "samples.jsonl"):
        by_step.setdefault(row["step"], []).append(row)
    gold = [float(gold_rewards([row["completion"] for row in rows]).mean()) for rows in by_step.values()]
    metrics = list(read_rows(folder / "metrics.jsonl"))
    last = gold_rewards([row["completion"] for row in read_rows(folder / "final.jsonl")])
    return {
        "gold": gold, "kl": [row["kl"] for row in metrics], "proxy": [row["reward"] for row in metrics],
        "peak_gold": float(smoothed(np.array(gold)).max()), "final_gold": float(last.mean()),
    }  # fmt: skip


def trained_anew(folder: Path, seeds: tuple[int, ...]) -> Json:
    """The policies of the left panel that were trained again, beside those that it shows; {} if there are none."""
    shown = json.loads((Path(__file__).parents[1] / "results" / "quickstart-seeds-2026-11-23.json").read_text())
    before = {seed["seed"]: seed["arms"]["conventional"] for seed in shown["seeds"]}
    found: Json = {}
    for seed in seeds:
        if (folder / f"seed-{seed}" / "conventional" / "final.jsonl").exists():
            own = gold_of_policy(folder / f"seed-{seed}" / "conventional")
            old = {"peak_gold": before[seed]["peak_gold"], "final_gold": before[seed]["final"]["gold"]}
            found[str(seed)] = {"shown": old, "anew": own}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True, help="folder to keep the completions in")
    parser.add_argument("--policies", type=Path, help="folders seed-N/conventional of experiments/holds.py")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    ratings = [text for text in human_ratings() if text.domain in RATED_DOMAINS]
    rated = [text for text in ratings if not is_held_out(text.text)]
    extract = FeatureExtractor(*load_trunk(DEFAULT_MODEL, LAPTOP_REWARD.num_layers), cached=True)
    held_out = [text for text in ratings if is_held_out(text.text)]
    fresh = pair_features(extract, preference_pairs(held_out, RATED_DOMAINS.__getitem__, FRESH, 0))
    prompts = review_prompts(EVAL_FILMS, EVAL_PRODUCTS)
    pool = kept_pool(options.pool, DEFAULT_MODEL, lambda: prompts, PER_PROMPT, 20, 0)
    result: Json = {"summary": {}, "runs": []}
    for panel, seeds in SEEDS.items():
        runs = []
        for seed in seeds:
            path = options.policies and options.policies / f"seed-{seed}" / "conventional" / "final.jsonl"
            rows = list(read_rows(path)) if path and path.exists() else []
            final = [generated(row["prompt"], row["completion"]) for row in rows]
            runs.append(
                kept(
                    options.pool / f"seed-{seed}.json",
                    lambda seed=seed, final=final: seed_of(seed, extract, rated, fresh, pool, final),
                )
            )
            print(panel, seed, flush=True)
        result["summary"][panel] = summary(runs)
        result["runs"] += runs
    result["summary"]["all"] = summary(result["runs"])
    if options.policies:
        result["policies"] = trained_anew(options.policies, SEEDS["left"])
    write_json(options.output, result | {"environment": environment()})


if __name__ == "__main__":
    main()
