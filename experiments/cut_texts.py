"""Texts cut from the left: should the token that every text begins with be kept?

    python experiments/cut_texts.py --preferences hh_rlhf.jsonl.gz --output results/cut-texts-DATE.json

HH-RLHF pairs whose texts are longer than the limit, read by the frozen model in three ways: whole, cut to the last
tokens, and cut to the first token and the last ones. A linear head is fitted to the whole texts of three quarters of
the prompts; on the others, what it says of cut texts is compared with what it says of the whole ones.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from hh_rlhf import is_test

from poise.data.preferences import read_preferences
from poise.data.types import Sample
from poise.functional.statistics import bootstrap_interval
from poise.models.choices import DEFAULT_MODEL
from poise.models.encoding import Tokens
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.runtime.run_folder import environment, write_json

RIDGE = 1.0


def cut(tokens: Tokens, length: int, kept: int) -> Tokens:
    """The first `kept` and the last tokens of a text, `length` in all."""
    whole = [*tokens.prompt, *tokens.completion]
    short = [*whole[:kept], *whole[kept - length :]]
    answer = min(len(tokens.completion), length - kept)
    return Tokens(tuple(short[: length - answer]), tuple(short[length - answer :]))


def fitted(differences: np.ndarray) -> np.ndarray:
    """Ridge weights of a head whose reward differences are near 1."""
    square = differences.T @ differences
    return np.linalg.solve(square + RIDGE * np.trace(square) / len(square) * np.eye(len(square)), differences.sum(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    extract = FeatureExtractor(*load_trunk(DEFAULT_MODEL, 0))
    tokens, held_out = [], []
    for pair in read_preferences(options.preferences, on_bad_row="skip"):
        two = [extract.encode(Sample(pair.prompt, text)) for text in (pair.chosen, pair.rejected)]
        if all(options.length < len(one) <= options.longest for one in two):
            tokens += two
            held_out.append(is_test(pair))
        if len(held_out) == options.pairs:
            break
    first = extract.tokenizer.convert_ids_to_tokens(tokens[0].prompt[0])
    ways = {"whole": tokens} | {
        name: [cut(one, options.length, kept) for one in tokens] for name, kept in (("last", 0), ("first and last", 1))
    }
    features = {name: extract.forward(own).double().numpy() for name, own in ways.items()}
    test = np.array(held_out)
    differences = {name: own[::2] - own[1::2] for name, own in features.items()}
    of_whole = fitted(differences["whole"][~test])
    whole = features["whole"] @ of_whole
    both = np.repeat(test, 2)
    result = {
        "pairs": len(test), "held out": int(test.sum()), "length": options.length, "first token": first,
        "mean length": float(np.mean([len(one) for one in tokens])),
    }  # fmt: skip
    for name, own in features.items():
        reward = own @ of_whole
        shift, gap = (reward - whole)[both], [(one[::2] - one[1::2])[test] for one in (reward, whole)]
        spread = features["whole"] - features["whole"].mean(0)
        right = {
            "the head of whole texts": differences[name][test] @ of_whole > 0,
            "a head of such texts": differences[name][test] @ fitted(differences[name][~test]) > 0,
        }
        result[name] = {
            "correlation with whole rewards": float(np.corrcoef(reward[both], whole[both])[0, 1]),
            "of differences": float(np.corrcoef(*gap)[0, 1]),
            "mean shift, in stds of whole rewards": float(shift.mean() / whole[both].std()),
            "distance of features, share of their spread": float(
                np.linalg.norm(own - features["whole"]) / np.linalg.norm(spread)
            ),
            "accuracy": {of: [float(hit.mean()), *bootstrap_interval(hit.astype(float))] for of, hit in right.items()},
        }  # fmt: skip
    write_json(options.output, result | {"environment": environment()})


if __name__ == "__main__":
    main()
