"""Best-of-n of ensembles whose members have trunks of their own, as in arXiv 2310.02743.

    python experiments/trunk_ensembles.py --study runs/study --noise 0.25 --seeds 0 1 2 3 4

The ensembles of a study share one frozen trunk; this says what that leaves open. Takes the preferences and the pool of
a `poise study`. For every seed, members are reward models tuned with LoRA on that seed's preferences, each from a seed
of its own, with mean 0 and std 1 over the pool. `single` is the mean over members of what each would choose, which is
what one drawn at random gains. Members that are finished are kept: several processes can share out the seeds, and one
with all of them comes last.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from safetensors.torch import load_file
from scipy.stats import rankdata

from poise.functional.objectives import HeadRewards
from poise.functional.overoptimization import Choice, Curves, Resamples, differences_from, summarize
from poise.models.loading import DEFAULT_MODEL
from poise.reward import train as train_reward
from poise.runtime.progress import parts_of_another, progress
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, environment, write_json
from poise.studies.config import LAPTOP_REWARD
from poise.studies.pool import score_pool

ENSEMBLES = {
    "mean": "mean", "worst_case": "worst_case", "uncertainty_weighted": "uncertainty_weighted(0.5)",
}  # fmt: skip


def train_and_score(options: argparse.Namespace, seed: int, member: int, rows: list[Json]) -> tuple[ndarray, float]:
    """Rewards of the pool's rows by one member, and its accuracy on held-out preferences."""
    world = f"noise-{options.noise}/reward-{seed}"
    folder = options.output / world / f"member-{member}"
    config = replace(
        LAPTOP_REWARD,
        preferences=str(options.study / world / "preferences.jsonl"), output=str(folder), model=options.model,
        num_layers=options.layers, trunk="lora", epochs=options.epochs, feature_cache=False, seed=1000 * seed + member,
    )  # fmt: skip
    with parts_of_another():
        results = train_reward.run(config).results or {}
        heads = score_pool(folder, rows, {"single": str(folder / "single")})["single"].heads
    return heads.mean[:, 0].double().numpy(), results["models"]["single"]["validation_accuracy"]


def frozen(options: argparse.Namespace) -> ndarray | None:
    """Rewards (S, R) of the whole pool by the study's one Bradley–Terry head of each seed, on the frozen trunk.

    None if the study has no such heads.
    """
    folder = options.study / "pool" / "heads" / f"noise-{options.noise}"
    files = [folder / f"reward-{seed}" / "single.safetensors" for seed in options.seeds]
    if not folder.exists():
        return None
    return np.stack([load_file(file)["mean"][:, 0].double().numpy() for file in files])


def curves_of(heads_SRK: ndarray, objective: str, gold_PN: ndarray) -> Curves:
    """By one objective of K heads."""
    choice, (_, per_prompt) = Choice("members", objective), gold_PN.shape
    heads = map(torch.from_numpy, heads_SRK)
    proxies = [choice.proxy(HeadRewards(one, torch.zeros_like(one)), per_prompt, 1.0) for one in heads]
    return Curves.of(np.stack(proxies), gold_PN)


def judged(rewards_SRK: ndarray, frozen_SR: ndarray | None, gold_PN: ndarray) -> Json:
    """Curves and measures of one member, the ensembles, and one head on a frozen trunk; all less `single`."""
    scaled = (rewards_SRK - rewards_SRK.mean(1, keepdims=True)) / rewards_SRK.std(1, ddof=1, keepdims=True)
    resamples = Resamples.draw(len(gold_PN), len(scaled))
    members = [curves_of(scaled[..., [k]], "nominal", gold_PN) for k in range(scaled.shape[-1])]
    expected = [np.mean(parts, axis=0) for parts in zip(*(one[1:] for one in members), strict=True)]
    single = summarize(Curves(members[0].n, *expected), resamples)
    found = {"single": single.json}
    others = {name: curves_of(scaled, objective, gold_PN) for name, objective in ENSEMBLES.items()}
    if frozen_SR is not None:
        others["single, frozen trunk"] = curves_of(frozen_SR[..., None], "nominal", gold_PN)
    for name, curves in others.items():
        one = summarize(curves, resamples)
        found[name] = one.json | {"measures": differences_from(one, single)}
    return found


def agreement(rewards_RK: ndarray) -> float:
    """Spearman's correlation of two members over the pool, mean over pairs of them."""
    correlation = np.corrcoef(rankdata(rewards_RK, axis=0), rowvar=False)
    return float(correlation[np.triu_indices(len(correlation), 1)].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("runs/study"))
    parser.add_argument("--output", type=Path, default=Path("runs/trunk-ensembles"))
    parser.add_argument("--noise", default="0.25", help="label noise of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="reward seeds of the study")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pool", type=int, default=64, help="of each prompt's completions, the first so many")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--result", type=Path, help="file to write")
    options = parser.parse_args()

    pool = list(read_rows(options.study / "pool" / "pool.jsonl"))
    prompts = [json.dumps(row["prompt"]) for row in pool]
    per_prompt = prompts.count(prompts[0])
    kept = [i for i in range(len(pool)) if i % per_prompt < options.pool]
    rows = [pool[i] for i in kept]
    gold_PN = np.array([row["gold"] for row in rows]).reshape(-1, min(options.pool, per_prompt))
    members = [(seed, member) for seed in options.seeds for member in range(options.members)]
    with progress("reward models with trunks of their own", len(members)) as advance:
        scored = []
        for seed, member in members:
            scored.append(train_and_score(options, seed, member, rows))
            advance()
    shape = (len(options.seeds), options.members, len(rows))
    rewards_SRK = np.moveaxis(np.array([rewards for rewards, _ in scored]).reshape(shape), 1, 2)
    frozen_SR = frozen(options)
    found = judged(rewards_SRK, None if frozen_SR is None else frozen_SR[:, kept], gold_PN)
    for name, one in found.items():
        gain, accuracy = (one["measures"][key] for key in ("gain", "accuracy"))
        relative = one["measures"].get("relative_gain")
        text = (
            f"{relative['mean']:+.0%} ({relative['interval'][0]:+.0%} to {relative['interval'][1]:+.0%})"
            if relative
            else ""
        )
        print(f"{name}: gain {gain['mean']:.3f} {text} accuracy {accuracy['mean']:.3f}")
    if options.result:
        about = {
            "settings": {key: str(value) for key, value in vars(options).items()}, "environment": environment(),
            "validation_accuracy": [accuracy for _, accuracy in scored],
            "members_agree": [agreement(rewards_RK) for rewards_RK in rewards_SRK],
        }  # fmt: skip
        write_json(options.result, about | {"best_of_n": found})


if __name__ == "__main__":
    main()
