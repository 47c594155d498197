"""Does the head with the lowest std know best? Min-std routing against the mean of the heads and a random head.

    python experiments/routing.py [--seeds 20] [--run RUN --test FILE]

Synthetic: texts are points around five centers. "content": the true reward is another linear function in each region.
"noise": one linear reward for all, with noise of std .1 to 2 on the targets, another in each region. Heads are trained
by `train_heads` with the paper's loss on shards of each kind; what is compared is the RMSE of the reward on fresh texts
of all regions. With --run: accuracy on real pairs that the run has not seen, heads fitted to the stage-1 reward on its
trunk, for each seed a bootstrap draw of its training pairs. Every figure: mean over seeds and 95 % bootstrap interval,
paired differences too.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from poise.data.preferences import read_preferences
from poise.functional.objectives import HeadRewards, mean, nominal
from poise.functional.statistics import mean_interval
from poise.models.reward_model import HeadLayout, load_trunk
from poise.models.scorer import FeatureExtractor
from poise.reward import train as train_reward
from poise.reward.heads import Heads, Targets, choose_prior, train_heads
from poise.reward.pairs import FeaturePairs
from poise.reward.shards import ShardKind, make_shards
from poise.runtime.run_folder import environment, load_config_file

HEADS, HIDDEN, PAIRS = 5, 16, 300
SHARDS: tuple[ShardKind, ...] = ("same", "bootstrap", "disjoint", "cluster")


def random_head(heads: HeadRewards, generator: torch.Generator) -> Tensor:
    index = torch.randint(heads.mean.shape[-1], heads.mean.shape[:-1], generator=generator)
    return heads.mean.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def decode(heads: Heads, texts: Tensor) -> HeadRewards:
    layout = HeadLayout(len(heads.weight_LH) // 2, heads.kind, tuple(heads.offset_L.tolist()))
    return layout.decode(texts @ heads.weight_LH.T)


def synthetic(world: str, seed: int) -> dict[str, dict[str, float]]:
    """RMSE of each way of reading the heads, per kind of shard."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centers = 3 * torch.nn.functional.normalize(normal(HEADS, HIDDEN), dim=-1)
    local = normal(HEADS, HIDDEN) / HIDDEN**0.5
    weights = local if world == "content" else local[:1].expand(HEADS, -1)
    noise = torch.zeros(HEADS) if world == "content" else torch.logspace(-1, np.log10(2), HEADS)

    def draw(count: int, *, noisy: bool) -> tuple[FeaturePairs, Tensor]:
        region = torch.arange(count) % HEADS
        texts = [centers[region] + normal(count, HIDDEN) for _ in range(2)]
        reward = [(x * weights[region]).sum(-1) + noisy * noise[region] * normal(count) for x in texts]
        return FeaturePairs(texts[0], texts[1], torch.zeros(count, dtype=torch.float64)), torch.cat(reward)

    (fit, target), (held, held_target), (test, truth) = (draw(PAIRS, noisy=n) for n in (True, True, False))
    found = {}
    for shards in SHARDS:
        split = make_shards(shards, fit, held, HEADS, generator)
        heads, _ = train_heads(
            fit, held, Targets(target, held_target), split, generator, loss_name="sampled_mse", num_steps=2000,
            learning_rate=3e-3, initial_std=0.1,
        )  # fmt: skip
        said = decode(heads, test.texts_NH)
        ways = {"min_std": nominal(said), "mean": mean(said), "random": random_head(said, generator)}
        found[shards] = {name: (reward - truth).square().mean().sqrt().item() for name, reward in ways.items()}
    return found


def real(run: Path, test: str) -> Callable[[int], dict[str, dict[str, float]]]:
    """Accuracy on the pairs of `test`, heads trained on those of the run; a new draw of its pairs for each seed."""
    config = train_reward.Config(**load_config_file(run / "config.yaml"))
    data, _ = train_reward.read(config)
    classifier, tokenizer = load_trunk(*train_reward.trunk_source(config, run))
    extract = FeatureExtractor(classifier, tokenizer, config.max_length, cached=True)
    raw, judged = (train_reward.pair_features(extract, rows) for rows in (data.preferences, read_preferences(test)))
    texts = raw.rows(data.train).texts_NH
    center, scale = texts.mean(0), texts.std(0).clamp_min(1e-6)
    pairs, judge = raw.standardized(center, scale), judged.standardized(center, scale)
    stop, stop_sources = pairs.rows(data.validation), [p.source for p in data.held_out]

    def accuracy(chosen: Tensor, rejected: Tensor) -> float:
        return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()

    def one(seed: int) -> dict[str, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(data.train), (len(data.train),), generator=generator)
        fit, sources = pairs.rows(data.train[drawn]), [data.preferences[i].source for i in data.train[drawn]]
        _, weight = choose_prior(fit, stop)
        rewards = fit.texts_NH @ weight
        single = Heads((weight / rewards.std()).unsqueeze(0), (rewards.mean() / rewards.std()).unsqueeze(0), "point")
        found = {"single": {"single": accuracy(judge.chosen_NH @ weight, judge.rejected_NH @ weight)}}
        for shards in (*SHARDS, "source") if len(set(sources)) > 1 else SHARDS:
            split = make_shards(shards, fit, stop, HEADS, generator, sources, stop_sources)
            std = single.weight_LH.std().item()
            heads, _ = train_heads(
                fit, stop, Targets.of(single, fit, stop), split, generator, loss_name="sampled_mse", num_steps=600,
                learning_rate=3e-3, initial_std=std,
            )  # fmt: skip
            chosen, rejected = (decode(heads, part) for part in (judge.chosen_NH, judge.rejected_NH))
            draw = [random_head(said, generator) for said in (chosen, rejected)]
            found[shards] = {
                "min_std": accuracy(nominal(chosen), nominal(rejected)),
                "mean": accuracy(mean(chosen), mean(rejected)),
                "random": accuracy(draw[0], draw[1]),
            }
            found[shards]["min_std - single"] = found[shards]["min_std"] - found["single"]["single"]
        return found

    return one


def over_seeds(study: Callable[[int], dict[str, dict[str, float]]], num_seeds: int) -> dict:
    cells = [study(seed) for seed in range(num_seeds)]

    def said(values: np.ndarray) -> dict:
        return {"mean": round(values.mean(), 4), "interval": [round(v, 4) for v in mean_interval(values)]}

    table: dict = {}
    for shards in cells[0]:
        columns = {way: np.array([cell[shards][way] for cell in cells]) for way in cells[0][shards]}
        table[shards] = {way: said(values) for way, values in columns.items()}
        if "min_std" in columns:
            for other in ("mean", "random"):
                table[shards][f"min_std - {other}"] = said(columns["min_std"] - columns[other])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--run", default="", help="a finished poise train-reward run")
    parser.add_argument("--test", default="", help="preferences that the run has not seen")
    options = parser.parse_args()
    result: dict = {"seeds": options.seeds, "heads": HEADS}
    for world in ("content", "noise"):
        result[f"synthetic, {world} by region: RMSE"] = over_seeds(lambda s, w=world: synthetic(w, s), options.seeds)
    if options.run:
        result["real pairs: accuracy"] = over_seeds(real(Path(options.run), options.test), options.seeds)
    print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
