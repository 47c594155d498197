"""What a validation split that shares prompts or texts with training hides: pairs split at random against whole groups.

    python experiments/validation_split.py [--hh hh_rlhf.jsonl.gz]

Three kinds of data. quickstart: the pairs that `poise quickstart` trains on, seeds 0 to 4. votes: 52 pairs of texts
that five raters each voted on, as rows of annotators' votes become preferences. hh: only how many pairs share a prompt.
For each: how many held-out pairs share a text, or the same two texts, with training; the validation accuracy of each
model; and its accuracy on 2,000 pairs of texts that no training sees. The features are the same for both splits.
Prints JSON.
"""

import argparse
import dataclasses
import json

import numpy as np
import torch
from torch import Tensor

from poise.data.human_ratings import Rated, human_ratings, is_held_out, preference_pairs
from poise.data.preferences import read_preferences
from poise.data.types import Preference
from poise.functional.statistics import t_interval
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.reward.head_training import TrainedModel, train_on_features
from poise.reward.pairs import FeaturePairs, PreferenceSplit, pair_features, prompt_groups
from poise.runtime.run_folder import Json, environment
from poise.studies.config import LAPTOP_REWARD
from poise.studies.quickstart import RATED_DOMAINS

SHARE, SEEDS, FRESH = 0.2, 5, 2000
MODELS = ("single", "brme")


def at_random(preferences: list[Preference], seed: int) -> PreferenceSplit:
    """The split of versions before 2026-11-28: single pairs, whatever they share."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(preferences), generator=generator)
    held = round(SHARE * len(preferences))
    return PreferenceSplit(preferences, order[held:], order[:held], generator)


def shared(split: PreferenceSplit) -> Json:
    """Of how many held-out pairs training has the prompt, one text, or both texts."""
    texts = {text for p in split.fit_on for text in (p.chosen, p.rejected)}
    same = {frozenset((p.chosen, p.rejected)) for p in split.fit_on}
    groups = prompt_groups(split.preferences)
    seen = set(groups[split.train.numpy()].tolist())
    return {
        "held_out": len(split.validation),
        "prompt_in_training": sum(group in seen for group in groups[split.validation.numpy()].tolist()),
        "one_text_in_training": sum(bool({p.chosen, p.rejected} & texts) for p in split.held_out),
        "same_pair_in_training": sum(frozenset((p.chosen, p.rejected)) in same for p in split.held_out),
    }


def accuracy(model: TrainedModel, pairs: FeaturePairs) -> float:
    def rewards(features: Tensor) -> Tensor:
        return model.layout.decode(features @ model.weight.double().T).mean.mean(-1)

    margin = rewards(pairs.chosen_NH) - rewards(pairs.rejected_NH)
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()


def compare(
    preferences: list[Preference], raw: FeaturePairs, fresh: FeaturePairs, extract: FeatureExtractor, seed: int
) -> Json:
    found: Json = {}
    splits = {"at random": at_random(preferences, seed), "in groups": PreferenceSplit.draw(preferences, SHARE, seed)}
    for name, split in splits.items():
        trained = train_on_features(dataclasses.replace(LAPTOP_REWARD, seed=seed), split, extract, raw)
        held = raw.rows(split.validation)
        found[name] = {**shared(split), "prior_precision": trained.precision} | {
            model: {
                "validation": accuracy(trained.models[model], held),
                "fresh": accuracy(trained.models[model], fresh),
            }
            for model in MODELS
        }
    return found


def votes(rated: list[Rated], seed: int, num_pairs: int = 52, num_votes: int = 5) -> list[Preference]:
    """Two texts and the choices of five raters each; a rater to whom both are equal says nothing."""
    by_text = {text.text: text for text in rated}
    generator = np.random.default_rng(seed)
    rows = []
    for pair in preference_pairs(rated, RATED_DOMAINS.__getitem__, num_pairs, seed + 100):
        for _ in range(num_votes):
            one, other = (int(generator.choice(by_text[text].ratings)) for text in (pair.chosen, pair.rejected))
            if one != other:
                texts = (pair.chosen, pair.rejected) if one > other else (pair.rejected, pair.chosen)
                rows.append(Preference(pair.prompt, *texts, pair.source))
    return rows


def summary(runs: list[Json]) -> Json:
    """Means over seeds, and Student's 95 % interval of the difference in groups - at random."""
    found: Json = {}
    for model in MODELS:
        for on in ("validation", "fresh"):
            one, other = (np.array([run[name][model][on] for run in runs]) for name in ("at random", "in groups"))
            found[f"{model}, {on}"] = {
                "at random": float(one.mean()), "in groups": float(other.mean()),
                "difference": float((other - one).mean()), "interval": t_interval(other - one).tolist(),
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--hh", default="", help="HH-RLHF preferences, to count prompts that repeat")
    options = parser.parse_args()
    ratings = [text for text in human_ratings() if text.domain in RATED_DOMAINS]
    trained_on = [text for text in ratings if not is_held_out(text.text)]
    extract = FeatureExtractor(*load_trunk(options.model, LAPTOP_REWARD.num_layers))
    others = preference_pairs([t for t in ratings if is_held_out(t.text)], RATED_DOMAINS.__getitem__, FRESH, 0)
    fresh = pair_features(extract, others)
    result: Json = {"seeds": SEEDS, "fresh_pairs": FRESH}
    for name in ("quickstart", "votes"):
        runs = []
        for seed in range(SEEDS):
            rows = (
                votes(trained_on, seed)
                if name == "votes"
                else preference_pairs(trained_on, RATED_DOMAINS.__getitem__, 400, seed)
            )
            runs.append(compare(rows, pair_features(extract, rows), fresh, extract, seed))
        result[name] = {"summary": summary(runs), "runs": runs}
    if options.hh:
        rows = read_preferences(options.hh, on_bad_row="skip")
        splits = {"at random": at_random(rows, 0), "in groups": PreferenceSplit.draw(rows, SHARE, 0)}
        result["hh"] = {"pairs": len(rows)} | {name: shared(split) for name, split in splits.items()}
    print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
