"""HH-RLHF: is the BRME as accurate as a single head, and does any uncertainty know which pairs are in the wrong order?

    python experiments/hh_rlhf.py --preferences hh_rlhf.jsonl.gz --output runs/hh [--layers 16] [--trunk full]

A fifth of the prompts, with all their pairs, is set aside for the judgment; `poise train-reward` sees the others only,
and `poise evaluate-reward` judges its three models on the rest. Both runs are resumable. Prints JSON: accuracies,
differences between the models on the same pairs, and every uncertainty's AUROC for wrong order beside a random one's.
"""

import argparse
import dataclasses
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from poise.data.preferences import read_preferences, write_preferences
from poise.data.types import Preference
from poise.functional.statistics import bootstrap_interval
from poise.models.loading import DEFAULT_MODEL
from poise.reward import evaluate as evaluate_reward
from poise.reward import train as train_reward
from poise.runtime.records import read_rows
from poise.runtime.run_folder import environment
from poise.studies.config import LAPTOP_REWARD

MODELS = ("single", "brme", "posterior")


def is_test(preference: Preference) -> bool:
    """By the prompt alone, so that no prompt is on both sides."""
    return hashlib.sha256(json.dumps(preference.prompt).encode()).digest()[0] < 256 // 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--trunk", choices=["frozen", "lora", "full"], default="full")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--objective", default="mean")
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    preferences = read_preferences(options.preferences, on_bad_row="skip")
    for name, rows in (
        ("train", [p for p in preferences if not is_test(p)]),
        ("test", [p for p in preferences if is_test(p)]),
    ):
        if not (folder / f"{name}.jsonl").exists():
            write_preferences(folder / f"{name}.jsonl", rows)
    config = dataclasses.replace(
        LAPTOP_REWARD, preferences=str(folder / "train.jsonl"), output=str(folder / "reward"), model=options.model,
        num_layers=options.layers,
        max_length=options.max_length, trunk=options.trunk, learning_rate=options.learning_rate,
        epochs=options.epochs, shards="source",
    )  # fmt: skip
    trained = train_reward.run(config).results or {}
    evaluated = evaluate_reward.run(
        evaluate_reward.Config(
            rewards=tuple(str(folder / "reward" / name) for name in MODELS), file=str(folder / "test.jsonl"),
            objective=options.objective, output=str(folder / f"evaluation-{options.objective}"),
            max_length=options.max_length,
        )
    )  # fmt: skip
    correct = {
        name: np.array([row["correct"] for row in read_rows(evaluated.folder / f"reward-{i}.jsonl")])
        for i, name in enumerate(MODELS, 1)
    }
    results = evaluated.results or {}
    table = {}
    for name, reward in zip(MODELS, results["rewards"], strict=True):
        pairs = reward["pairs"]
        table[name] = {
            "accuracy": pairs["accuracy"], "accuracy_interval": pairs["accuracy_interval"],
            "by_subset": pairs["by_subset"], "nll": pairs["probability"]["nll"], "ece": pairs["probability"]["ece"],
            "against_single": float((correct[name] - correct["single"]).mean()),
            "against_single_interval": bootstrap_interval(correct[name] - correct["single"]),
            "auroc_wrong_order": {
                key: {"auroc": entry["auroc"], "interval": entry["auroc_interval"]}
                for key, entry in pairs["uncertainties"].items()
            },
        }  # fmt: skip
    first = results["rewards"][0]["pairs"]
    print(
        json.dumps(
            {
                "num_train": trained["num_train"], "num_validation": trained["num_validation"],
                "num_test": first["num_pairs"], "length_accuracy": first["length_accuracy"],
                "constant_nll": first["constant_nll"], "objective": options.objective, "models": table,
                "config": asdict(config) | {"preferences": "train.jsonl", "output": "reward"},
                "environment": environment(),
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
