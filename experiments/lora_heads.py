"""Do heads with adapters of their own know where they are wrong, and what does scoring by them cost?

    OMP_NUM_THREADS=1 python experiments/lora_heads.py --output results/lora-heads-DATE.json [--seeds 0 1]

Each seed draws pairs of reviews as single raters judged them, and trains on them the BRME of the paper (Gaussian heads
that imitate the one Bradley–Terry head on the same features) and three others: heads fitted to the preferences
themselves on the same features, and heads with LoRA adapters of their own (`--stage2-trunk lora_per_head`), on random
80 % of the pairs or on a fifth each; the adapters lie on the upper two layers. The trunk is the first eight layers of
the language model, frozen.

They are judged on pairs of texts of the fixed held-out split, against the difference of the mean ratings of about
twenty people. Every head's margins are divided by their root mean square, so that no head's scale counts. Of a pair,
the disagreement is the std over heads of these margins; the error is the distance of the rating difference, divided by
its own root mean square, from a times the mean margin, with the a that fits best. `agreement` is the mean correlation
of two heads' margins, `errors_alike` that of their errors. A text of no sense is the text's own first three words, over
and over, up to its length; `nonsense` is the AUROC of the disagreement (std over heads of standardized rewards) for it.

The times are CPU seconds of one thread per text, the least of three runs, on texts of one prompt each read anew.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import mannwhitneyu, spearmanr

from poise.data.human_ratings import human_ratings, is_held_out, preference_pairs
from poise.data.preferences import write_preferences
from poise.data.types import Preference, Sample
from poise.models.head_adapters import HeadLinear, add_head_adapters, apart
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import HeadLayout, load_trunk
from poise.models.scorer import FeatureExtractor, Scorer
from poise.reward import train as train_reward
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, environment, write_json
from poise.studies.config import LAPTOP_REWARD
from poise.studies.quickstart import RATED_DOMAINS

ARMS: dict[str, dict[str, Any]] = {
    "imitation (paper)": {},
    "preferences, shared features": {"head_loss": "probit_pairs", "shards": "bootstrap"},
    "adapters, 80 % each": {
        "head_loss": "probit_pairs", "shards": "bootstrap", "stage2_trunk": "lora_per_head", "head_layers": 2,
    },
    "adapters, a fifth each": {
        "head_loss": "probit_pairs", "shards": "disjoint", "stage2_trunk": "lora_per_head", "head_layers": 2,
    },
}  # fmt: skip


def judged(scorer: Scorer, pairs: list[Preference], truth_N: ndarray) -> Json:
    """What the heads say of held-out pairs. truth_N: mean rating of the chosen text less that of the rejected one."""
    texts = [Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    mean_NK = scorer(texts).mean.double().numpy()
    margin_PK = mean_NK[::2] - mean_NK[1::2]
    margin_PK /= np.sqrt((margin_PK**2).mean(0))
    truth = truth_N / np.sqrt((truth_N**2).mean())
    margin, spread = margin_PK.mean(1), margin_PK.std(1)
    decided = truth != 0
    wrong = (np.sign(margin) != np.sign(truth))[decided]
    error = np.abs(truth - margin * (margin @ truth) / (margin @ margin))
    errors_PK = truth[:, None] - margin_PK * ((margin_PK * truth[:, None]).sum(0) / (margin_PK**2).sum(0))
    scale = mean_NK.std(0)
    nonsense = [replace_text(sample) for sample in texts]
    other_NK = (scorer(nonsense).mean.double().numpy() - mean_NK.mean(0)) / scale
    known_N = ((mean_NK - mean_NK.mean(0)) / scale).std(1)
    return {
        "accuracy": 1 - wrong.mean(),
        "agreement": np.mean([np.corrcoef(margin_PK[:, i], margin_PK[:, j])[0, 1] for i, j in two(margin_PK)]),
        "errors_alike": np.mean([np.corrcoef(errors_PK[:, i], errors_PK[:, j])[0, 1] for i, j in two(margin_PK)]),
        "spearman_disagreement_error": spearmanr(spread, error).statistic,
        "auroc_wrong_disagreement": auroc(spread[decided], wrong),
        "auroc_wrong_small_margin": auroc(-np.abs(margin[decided]), wrong),
        "auroc_nonsense_disagreement": auroc(
            np.concatenate([other_NK.std(1), known_N]), np.arange(2 * len(texts)) < len(texts)
        ),
    }


def auroc(score_N: ndarray, positive_N: ndarray) -> float:
    """Chance that a positive row has the higher score; a tie counts half."""
    ones, others = score_N[positive_N], score_N[~positive_N]
    return float(mannwhitneyu(ones, others).statistic / (len(ones) * len(others)))


def two(margin_PK: ndarray) -> list[tuple[int, int]]:
    """Every two heads."""
    return list(combinations(range(margin_PK.shape[1]), 2))


def replace_text(sample: Sample) -> Sample:
    """The sample with a text of no sense."""
    words = sample.completion.split()
    return Sample(sample.prompt, " ".join((words[:3] * len(words))[: len(words)]))


def timed(model: str, num_heads: int) -> Json:
    """CPU milliseconds per text: one model, K models, and K heads with adapters on all, four or two upper layers."""
    samples = [Sample(f"Write a review, number {i}.", "It was a good film, " * 4) for i in range(64)]

    def scorer(head_layers: int | None) -> Scorer:
        classifier, tokenizer = load_trunk(model, 8)
        weight = torch.randn(num_heads, classifier.score.weight.shape[1])
        if head_layers is not None:
            add_head_adapters(classifier, num_heads, 16, head_layers)
            for module in classifier.modules():
                if isinstance(module, HeadLinear):
                    torch.nn.init.normal_(module.up_KOR, std=0.01)
            weight = apart(weight, num_heads)
        layout = HeadLayout(num_heads, "point", (0.0,) * num_heads, adapters=head_layers is not None)
        return Scorer(FeatureExtractor(classifier, tokenizer), weight, layout)

    def least(scorers: list[Scorer]) -> float:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            for one in scorers:
                one(samples)
            seconds.append(time.process_time() - start)
        return 1000 * min(seconds) / len(samples)

    found = {"one model": least([scorer(None)])}
    found[f"{num_heads} models"] = least([scorer(None) for _ in range(num_heads)])
    for layers in (0, 4, 2):
        found[f"{num_heads} heads, adapters on {layers or 8} of 8 layers"] = least([scorer(layers)])
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--held-out", type=int, default=400)
    options = parser.parse_args()
    started = time.process_time()
    rated = [text for text in human_ratings() if text.domain in RATED_DOMAINS]
    mean = {text.text: text.mean for text in rated}
    known, unknown = ([one for one in rated if is_held_out(one.text) is held] for held in (False, True))
    held = preference_pairs(unknown, RATED_DOMAINS.__getitem__, options.held_out, seed=1)
    truth_N = np.array([mean[pair.chosen] - mean[pair.rejected] for pair in held])
    seeds: list[Json] = []
    for seed in options.seeds:
        found: dict[str, Json] = {}
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "pairs.jsonl"
            write_preferences(file, preference_pairs(known, RATED_DOMAINS.__getitem__, options.pairs, seed=100 + seed))
            for name, changes in ARMS.items():
                start = time.process_time()
                config = replace(
                    LAPTOP_REWARD, **changes, preferences=str(file), model=options.model,
                    output=str(Path(scratch) / name.replace(" ", "-")), epochs=2.0, batch_size=8,
                    learning_rate=1e-3, posterior_heads=2, seed=seed,
                )  # fmt: skip
                run = train_reward.run(config)
                seconds = time.process_time() - start
                scorer = Scorer.load(str(run.folder / "brme"))
                found[name] = {**judged(scorer, held, truth_N), "train_cpu_seconds": round(seconds, 1)}
                console.print(name, found[name])
        seeds.append({"seed": seed, **found})
    means = {
        arm: {key: float(np.mean([one[arm][key] for one in seeds])) for key in seeds[0][arm]} for arm in ARMS
    }  # fmt: skip
    result = {
        "command": f"python experiments/lora_heads.py --pairs {options.pairs} --held-out {options.held_out}",
        "mean": means, "seeds": seeds, "cpu_ms_per_text": timed(options.model, 5),
        "cpu_seconds": round(time.process_time() - started), "environment": environment(),
    }  # fmt: skip
    write_json(options.output, json.loads(json.dumps(result, default=float)))


if __name__ == "__main__":
    main()
