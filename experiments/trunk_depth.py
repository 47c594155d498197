"""What limits a small reward model on human pairs: the trunk's depth, the number of pairs, or how uncertainty is told?

    python experiments/trunk_depth.py --train train.jsonl --test test.jsonl [--pairs 2000]

One pass of the frozen model gives the features after every layer asked for, as a trunk of that many layers would. On
each depth, with ever more pairs, a Bradley-Terry head with its prior chosen on a fifth of the training pairs; judged on
the test file: accuracy, and each uncertainty's AUROC for wrong order, beside a random one's. Both files are what
experiments/hh_rlhf.py writes.
"""

import argparse
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from poise.data.evaluation_sets import Item, Questions
from poise.data.preferences import read_preferences
from poise.data.types import Preference
from poise.functional.objectives import mean
from poise.models.families import additive
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import LastLayer, load_trunk
from poise.models.scorer import FeatureExtractor
from poise.models.shared_prompt import attends, num_tokens, pack
from poise.reward.heads import Heads, choose_prior, draw_posterior, posterior_factor
from poise.reward.pairs import FeaturePairs, PreferenceSplit
from poise.reward.quality import TextScores, judge_pairs, pairs_of
from poise.reward.trunk_training import token_pairs
from poise.runtime.progress import progress
from poise.runtime.run_folder import environment

TOKENS_PER_BATCH = 4096


@torch.no_grad()
def features(
    extract: FeatureExtractor, preferences: Sequence[Preference], depths: Sequence[int]
) -> dict[int, FeaturePairs]:
    """Features of each pair after each number of layers."""
    trunk, pad_id = extract.classifier.base_model, extract.tokenizer.pad_token_id
    families = [pair.families for pair in token_pairs(extract, preferences)]
    order = sorted(range(len(families)), key=lambda i: -sum(map(num_tokens, families[i])))
    found = {depth: torch.empty(len(families), 2, trunk.config.hidden_size, dtype=torch.float64) for depth in depths}
    with progress("features of every depth", len(families)) as advance:
        while order:
            longest = max(num_tokens(family) for family in families[order[0]])
            count = max(TOKENS_PER_BATCH // longest, 1)
            batch, order = order[:count], order[count:]
            rows = pack([family for i in batch for family in families[i]], pad_id)
            mask = additive(attends(rows.group_BL, rows.part_BL), extract.classifier.dtype)
            states = trunk(
                input_ids=rows.ids_BL, attention_mask=mask, position_ids=rows.position_BL, use_cache=False,
                output_hidden_states=True,
            ).hidden_states  # fmt: skip
            for depth in depths:
                hidden = states[depth][rows.last_C2[:, 0], rows.last_C2[:, 1]]
                hidden = hidden if depth == len(states) - 1 else trunk.norm(hidden)
                found[depth][batch] = hidden.double().view(len(batch), 2, -1)
            advance(len(batch))
    margin = torch.tensor([p.margin for p in preferences], dtype=torch.float64)
    return {depth: FeaturePairs(both[:, 0], both[:, 1], margin) for depth, both in found.items()}


def judge(train: FeaturePairs, split: PreferenceSplit, test: FeaturePairs, items: list[Item], seed: int) -> dict:
    """Of a head and its posterior, on the test pairs. split: of the pairs to train on."""
    generator = split.generator
    center, scale = train.texts_NH.mean(0), train.texts_NH.std(0).clamp_min(1e-6)
    fit, held = train.standardized(center, scale), test.standardized(center, scale)
    part, stop = split.train, split.validation
    precision, weight = choose_prior(fit.rows(part), fit.rows(stop))
    factor = posterior_factor(fit.rows(part), weight, precision)
    heads = Heads(draw_posterior(weight, factor, 64, generator), torch.zeros(64, dtype=torch.float64), "point")
    raw_weight, layout = heads.on_raw_features(center, scale, 1.0)
    alternating: Tensor = torch.stack([test.chosen_NH, test.rejected_NH], 1).flatten(0, 1)
    last_layer = LastLayer(factor / scale.unsqueeze(-1), center)
    scores = TextScores.of(layout.decode(alternating @ raw_weight.double().T), layout, last_layer, alternating)
    asked = Questions.of("pairs", items)
    judged = judge_pairs(pairs_of(scores, asked, mean, seed), asked, seed)
    return {
        "pairs": len(part), "prior_precision": precision, "accuracy": judged["accuracy"],
        "interval": judged["accuracy_interval"], "nll": judged["probability"]["nll"],
        "length_accuracy": judged["length_accuracy"],
        "train_accuracy": ((fit.rows(part).difference_NH @ weight) > 0).double().mean().item(),
        "auroc_wrong_order": {
            name: {"auroc": known["auroc"], "interval": known["auroc_interval"]}
            for name, known in judged["uncertainties"].items()
        },
        "mean_uncertainty": {"last_layer_std": last_layer.difference_std(test.difference_NH).mean().item()},
        "held_margin_std": (held.difference_NH @ weight).std().item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 24, 30])
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    classifier, tokenizer = load_trunk(options.model, max(options.depths))
    extract = FeatureExtractor(classifier, tokenizer, options.max_length)
    train, test = read_preferences(options.train)[: options.pairs], read_preferences(options.test)
    both = features(extract, [*train, *test], options.depths)
    items = [Item(p.prompt, (p.chosen,), (p.rejected,)) for p in test]
    index = torch.arange(len(train) + len(test))
    result: dict = {"num_test": len(test), "depth": {}, "learning_curve": {}}
    for depth, pairs in both.items():
        mine, judged = pairs.rows(index[: len(train)]), pairs.rows(index[len(train) :])
        result["depth"][depth] = judge(mine, PreferenceSplit.draw(train, 0.2, 0), judged, items, 0)
        for count in (250, 500, 1000, len(train)):
            curve = result["learning_curve"].setdefault(depth, {})
            split = PreferenceSplit.draw(train[:count], 0.2, 0)
            curve[count] = judge(mine.rows(index[:count]), split, judged, items, 0)["accuracy"]
    print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
