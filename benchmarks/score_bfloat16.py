"""Scoring on a CPU in bfloat16 against float32: processor time of a group of completions, and how far rewards move.

    OMP_NUM_THREADS=1 python benchmarks/score_bfloat16.py [--layers 8] [--group 16] [--repeats 5]

A reward model of the first layers of the default model with random heads reads groups of completions of one prompt, in
turn in both, so that other work harms both. What bfloat16 gains depends on the processor: with AMX it multiplies
matrices, without it emulates. Prints JSON; dated results lie in results/.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from serve_load import make_reward_model
from serve_vllm import groups

from poise.models.reward_model import load_reward_model
from poise.models.scorer import FeatureExtractor, Scorer, generated
from poise.runtime.run_folder import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=255, help="tokens")
    parser.add_argument("--completion", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = make_reward_model(Path(folder) / "reward", options.layers)
        scorers = {}
        for dtype in (torch.float32, torch.bfloat16):
            classifier, tokenizer, layout = load_reward_model(path, dtype)
            extract = FeatureExtractor(classifier, tokenizer)
            scorers[dtype] = Scorer(extract, classifier.score.weight.data.float(), layout)
        asked = groups(
            options.groups, options.group, options.prompt, options.completion, scorers[torch.float32], seed=0
        )
        seconds: dict[str, list[float]] = {str(dtype): [] for dtype in scorers}
        rewards: dict[str, torch.Tensor] = {}
        for repeat in range(options.repeats + 1):
            for dtype, scorer in scorers.items():
                began = time.process_time()
                found = [scorer([generated(prompt, text) for text in texts]).mean for prompt, texts in asked]
                if repeat:  # the first warms up
                    seconds[str(dtype)].append((time.process_time() - began) / options.groups)
                rewards[str(dtype)] = torch.cat(found)
    exact, rounded = rewards.values()
    medians = [statistics.median(taken) for taken in seconds.values()]
    print(
        json.dumps(
            {
                "settings": vars(options),
                "processor seconds of a group": dict(zip(seconds, medians, strict=True)),
                "times": medians[0] / medians[1],
                "largest difference of a head, in stds over the texts": float(
                    ((rounded - exact) / exact.std(0)).abs().max()
                ),
                "environment": environment(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
