"""What distances to reference texts tell apart, on the default model's first eight layers.

python experiments/typicality.py --output results/typicality-2026-11-28.json

Reference: the 640 texts of 320 pairs of rated texts, seed 0. Asked: 200 rated texts that are no part of them, and the
same with their words shuffled, with their first three words repeated to the same length, and cut after half of their
words. AUROC: how often an altered text lies further out than an untouched one. No reward is trained, no gold is read.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

from poise.data.human_ratings import human_ratings, is_held_out, preference_pairs
from poise.data.types import Sample
from poise.functional.statistics import auroc
from poise.functional.typicality import distance, fit_reference
from poise.models.choices import DEFAULT_MODEL
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor


def question(domain: str) -> str:
    return f"Write a short text of the kind: {domain}."


def altered(text: str, how: str, rng: random.Random) -> str:
    words = text.split()
    if how == "shuffled":
        rng.shuffle(words)
    elif how == "repeated":
        words = (words[:3] * len(words))[: len(words)]
    elif how == "cut":
        words = words[: max(1, len(words) // 2)]
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="results/typicality.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratings = human_ratings()
    known = [one for one in ratings if not is_held_out(one.text)]
    pairs = preference_pairs(known, question, 320, 0)
    rng = random.Random(1)
    asked = rng.sample([one for one in ratings if is_held_out(one.text) and len(one.text.split()) >= 6], 200)
    extract = FeatureExtractor(*load_trunk(DEFAULT_MODEL, 8), 256)
    features = extract([Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)])
    started = time.process_time()
    reference = fit_reference(features)
    seconds = time.process_time() - started
    found = {}
    for how in ("untouched", "shuffled", "repeated", "cut"):
        samples = [Sample(question(one.domain), altered(one.text, how, rng)) for one in asked]
        found[how] = distance(extract(samples), reference).numpy()
        if how == "untouched":
            alone = np.array([distance(extract([sample]), reference).item() for sample in samples[:20]])
    result = {
        "reference": {
            "texts": reference.num_texts, "hidden": len(reference.center_H), "shrinkage": reference.shrinkage,
        },
        "mean distance": {how: float(values.mean()) for how, values in found.items()},
        "auroc against untouched": {
            how: float(auroc(values, found["untouched"])) for how, values in found.items() if how != "untouched"
        },
        "largest relative difference, alone and in a batch": float(np.abs(alone / found["untouched"][:20] - 1).max()),
        "seconds of the fit": seconds, "command": "python experiments/typicality.py",
    }  # fmt: skip
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
