"""Does a policy's gold hold under long optimization at next to no KL? Arms side by side, over seeds.

    python experiments/holds.py train --seeds 31 32 33 34 35 --output runs/holds      # hours on a laptop; resumable
    python experiments/holds.py report --output runs/holds > results/holds-DATE.json

Setting of the quickstart (400 human preference pairs, 8 frozen layers, β = 0.01), trained longer. A seed draws other
pairs and raters, other heads, other prompts and samples. Gold is read by `report` alone.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from poise.data.human_ratings import human_ratings, is_held_out, preference_pairs
from poise.data.preferences import write_preferences
from poise.policy import train as train_policy
from poise.reports.summary import estimate, measured
from poise.reward import train as train_reward
from poise.runtime.run_folder import Json, environment, load_config_file
from poise.studies import compare
from poise.studies import quickstart as recipes
from poise.studies.config import LAPTOP_POLICY, LAPTOP_REWARD, REVIEWS

ARMS: dict[str, tuple[str, str, float | None, bool]] = {  # name -> reward model, objective, ceiling, settle
    "conventional": ("single", "nominal", None, False),
    "brme": ("brme", "tradeoff(0.4)", None, False),
    "worst_case": ("brme", "worst_case", None, False),
    "lower_bound": ("posterior", "lower_confidence(1)", None, False),
    "ceiling_single": ("single", "nominal", 2.0, False),
    "ceiling": ("posterior", "lower_confidence(1)", 2.0, False),
    "settle_single": ("single", "nominal", 2.0, True),
    "settle_brme": ("brme", "tradeoff(0.4)", 2.0, True),
    "settle": ("posterior", "lower_confidence(1)", 2.0, True),
}


def prepare(folder: Path, seed: int) -> None:
    """Preferences, prompts and reward models of a seed."""
    if not (folder / "eval_prompts.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rated = [
            text for text in human_ratings() if text.domain in recipes.RATED_DOMAINS and not is_held_out(text.text)
        ]
        write_preferences(
            folder / "preferences.jsonl", preference_pairs(rated, recipes.RATED_DOMAINS.__getitem__, 400, seed)
        )
        recipes.write_prompts(folder)
    train_reward.run(
        replace(
            LAPTOP_REWARD,
            preferences=str(folder / "preferences.jsonl"),
            output=str(folder / "reward"),
            seed=seed,
        )
    )


def train(folder: Path, seed: int, arm: str, steps: int, kl_coef: float) -> None:
    reward, objective, ceiling, settle = ARMS[arm]
    train_policy.run(
        replace(
            LAPTOP_POLICY,
            prompts=str(folder / "prompts.jsonl"),
            eval_prompts=str(folder / "eval_prompts.jsonl"),
            reward=str(folder / "reward" / reward),
            output=str(folder / arm),
            objective=objective,
            reward_ceiling=ceiling,
            settle=settle,
            kl_coef=kl_coef,
            num_steps=steps,
            seed=seed,
            save_every=10,
        )
    )


def report(root: Path) -> Json:
    """Per arm and seed: gold over the steps, at the peak, at the end; differences over seeds with intervals."""
    seeds: list[Json] = []
    for folder in sorted(root.glob("seed-*")):
        names = [name for name in ARMS if (folder / name / "results.json").exists()]
        if len(names) < 2:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            arms_of = tuple(str(folder / name) for name in names)
            out = compare.run(compare.Config(arms=arms_of, output=scratch, gold=REVIEWS))
            compared = out.results or {}
        arms = {}
        for arm in compared["arms"]:
            gold = np.array([step["gold"] for step in arm["steps"]])
            alarms = json.loads((folder / arm["name"] / "results.json").read_text())["alarms"]
            arms[arm["name"]] = measured(arm) | {
                "last_quarter_gold": float(gold[-len(gold) // 4 :].mean()),
                "first_alarm": alarms[0]["step"] if alarms else None,
                "gold": gold.round(3).tolist(), "kl_by_step": [round(step["kl"], 2) for step in arm["steps"]],
                "hours": round(arm["seconds"] / 3600, 3),
            }  # fmt: skip
        seeds.append({"seed": int(folder.name.removeprefix("seed-")), "arms": arms})
    return {"summary": summary(seeds), "seeds": seeds, "environment": environment()}


def summary(seeds: list[Json]) -> Json:
    """Means over the seeds an arm has with Student's 95 % intervals; differences to the first arm, paired by seed."""
    found: Json = {}
    names = [name for name in ARMS if any(name in seed["arms"] for seed in seeds)]
    for name in names:
        own, first = (
            {seed["seed"]: seed["arms"][arm] for seed in seeds if arm in seed["arms"]} for arm in (name, names[0])
        )
        part: Json = {"seeds": len(own)}
        for key in ("final_gold", "last_quarter_gold", "peak_gold", "drawdown", "kl", "distinct_bigrams"):
            values, of_first = ({(seed, 0): arm[key] for seed, arm in of.items()} for of in (own, first))
            part[key] = estimate(values, of_first if name != names[0] else {}) | {"worst": min(values.values())}
        found[name] = part
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33, 34, 35])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["conventional", "brme", "ceiling"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kl-coef", type=float, default=0.01)
    parser.add_argument("--output", type=Path, default=Path("runs/holds"))
    options = parser.parse_args()
    if options.what == "report":
        settings = load_config_file(next(options.output.glob("seed-*/*/checkpoint.safetensors")).parent / "config.yaml")
        kept = {k: v for k, v in settings.items() if k not in ("prompts", "eval_prompts", "reward", "output", "seed")}
        print(json.dumps(report(options.output) | {"settings": kept}, indent=1, default=float))
        return
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        prepare(folder, seed)
        for arm in options.arms:
            train(folder, seed, arm, options.steps, options.kl_coef)


if __name__ == "__main__":
    main()
