"""A run of the frontier as a curve: what its report, and what is asked of the same curves, read of it."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from poise.runtime.run_folder import Json

Curves = dict[int, dict[str, Json]]  # by seed and arm
SEEN_FIRST = range(200, 205)  # seeds seen before the alarm's rule was chosen, and before the arms' last order


def gain(curve: Json, name: str) -> np.ndarray:
    """Gold, or a validator's reward, of every step since the run's start, in stds of the initial completions."""
    return (np.array(curve[name]) - curve[name][0]) / curve["std_at_start"][name]


def over_three_steps(values: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(values, 1, mode="edge"), np.ones(3) / 3, "valid")


def written(rows: Sequence[Json]) -> Json:
    """What a trained policy writes, of which golds that read single texts see a part. rows: `prompt`, `completion`.

    distinct word pairs: share that differ of all pairs of neighboring words. whole sentences: share that end in a full
    stop or the like. on the subject: share that hold a word of what is to be reviewed. first: the first completion.
    """
    words = [row["completion"].lower().split() for row in rows]
    pairs = [pair for text in words for pair in pairwise(text)]
    return {
        "distinct word pairs": len(set(pairs)) / max(len(pairs), 1),
        "whole sentences": float(np.mean([row["completion"].rstrip().endswith((".", "!", "?")) for row in rows])),
        "on the subject": float(np.mean([_on_subject(row) for row in rows])),
        "first": rows[0]["completion"],
    }


def _on_subject(row: Json) -> bool:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    subject = re.findall(r"[a-z]{4,}", prompt.lower().split(" of ")[-1])
    return any(word.rstrip("s") in row["completion"].lower() for word in subject if word not in ("about", "with"))
