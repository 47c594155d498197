"""Best-of-n in a study: many reward models score one pool of the initial policy's completions. It needs no RL.

    RUN/pool/pool.jsonl, RUN/pool/heads/…   the pool, and the scores of every reward model
    RUN/page-pool.json                      a part of it, from which the page computes

The reward models are trained in memory: heads on the features of one frozen trunk, which are kept on disk.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import rankdata

from poise.functional.objectives import HeadRewards, RewardScale, disagreement, mean
from poise.functional.overoptimization import Choice, interval
from poise.functional.statistics import resampled_counts
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.reward import train as train_reward
from poise.runtime.progress import parts_of_another, progress
from poise.runtime.run_folder import Json, config_dict, write_json
from poise.studies.pool import PoolHeads, proxies, samples_of

PAGE_SEEDS, PAGE_COMPLETIONS = 5, 64
DRAWS = 1000
UNSTABLE = {  # whose scores are compared between seeds
    "single": Choice("single", "nominal"),
    "ensemble, mean": Choice("ensemble", "mean"),
    "ensemble, worst case": Choice("ensemble", "worst_case"),
    "brme, nominal": Choice("brme", "nominal"),
    "brme, tradeoff(0.4)": Choice("brme", "tradeoff(0.4)"),
    "posterior, lower bound": Choice("posterior", "lower_confidence(1)"),
}

ByReward = dict[str, PoolHeads]


class Pool(NamedTuple):
    """A pool with gold, and where it lies."""

    folder: Path
    rows: list[Json]
    per_prompt: int

    @property
    def gold_PN(self) -> ndarray:
        return np.array([row["gold"] for row in self.rows]).reshape(-1, self.per_prompt)


def score(pool: Pool, configs: Mapping[str, train_reward.Config]) -> dict[str, ByReward]:
    """Per name (`noise-0/reward-3`): the scores of that config's reward models on the pool; missing ones are trained.

    Raises PoiseError if kept scores are of other preferences or settings.
    """
    files = {name: pool.folder / "heads" / name for name in configs}
    missing = [name for name, folder in files.items() if not (folder / "done").exists()]
    if missing:
        first = configs[missing[0]]
        extract = FeatureExtractor(
            *load_trunk(first.model, first.num_layers), first.max_length, cached=first.feature_cache
        )
        samples = samples_of(pool.rows)
        with progress("study: features of the pool", len(samples)) as advance:
            features = extract(samples, advance).cpu()
        with progress("study: reward models on the pool", len(configs), len(configs) - len(missing)) as advance:
            for name in missing:
                with parts_of_another():
                    _score_one(configs[name], extract, features, files[name])
                advance()
    return {
        name: {
            file.stem: PoolHeads.load(file, fingerprint(configs[name]), len(pool.rows))
            for file in sorted(folder.glob("*.safetensors"))
        }
        for name, folder in files.items()
    }


def _score_one(config: train_reward.Config, extract: FeatureExtractor, features: torch.Tensor, folder: Path) -> None:
    for reward, model in train_reward.heads_in_memory(config, extract).items():
        heads = model.layout.decode(features @ model.weight.T)
        PoolHeads(heads, model.layout.reward_scale, fingerprint(config)).save(folder / f"{reward}.safetensors")
    (folder / "done").touch()


def fingerprint(config: train_reward.Config) -> str:
    """Of a reward model's settings and preferences, wherever they lie."""
    settings = {name: value for name, value in config_dict(config).items() if name not in ("output", "preferences")}
    state = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    state.update(Path(config.preferences).read_bytes())
    return state.hexdigest()


# ---- how far reward models of different seeds are apart ----


def instability(pool: Pool, heads: Sequence[ByReward]) -> Json:
    """Per kind of reward: agreement of two reward models that differ in their seed, and the spread of what they select.

    rank_correlation: Spearman over the pool, mean over pairs of reward models.
    same_choice: how often two of them pick the same best of a prompt's completions.
    gold_std: std over reward models of the gold of best-of-N.
    Intervals over reward models; differences against the first kind, paired.
    """
    drawn = resampled_counts(len(heads), DRAWS, 1)
    result: Json = {}
    first: dict[str, tuple[float, ndarray]] = {}
    for name, choice in UNSTABLE.items():
        proxy = proxies(choice, heads, pool.per_prompt)
        ranks = np.stack([rankdata(one) for one in proxy.reshape(len(heads), -1)])
        best = proxy.argmax(-1)
        gold = np.take_along_axis(pool.gold_PN[None], best[..., None], -1)[..., 0].mean(-1)
        same = (best[:, None] == best[None]).mean(-1)
        found = {
            "rank_correlation": _over_pairs(np.corrcoef(ranks), drawn),
            "same_choice": _over_pairs(same, drawn),
            "gold_std": (float(gold.std(ddof=1)), _std_draws(gold, drawn)),
        }
        first = first or found
        result[name] = {"seeds": len(heads)} | {
            key: {"mean": value, "interval": interval(draws)}
            | (
                {"vs_baseline": value - first[key][0], "vs_baseline_interval": interval(draws - first[key][1])}
                if found is not first
                else {}
            )
            for key, (value, draws) in found.items()
        }
    return result


def _over_pairs(table_SS: ndarray, drawn_DS: ndarray) -> tuple[float, ndarray]:
    """Mean over pairs of different reward models, and its draws; a pair of one with itself never counts."""
    apart = ~np.eye(len(table_SS), dtype=bool)
    total = np.einsum("di,ij,dj->d", drawn_DS, np.where(apart, table_SS, 0.0), drawn_DS)
    weight = np.einsum("di,ij,dj->d", drawn_DS, apart.astype(float), drawn_DS)
    return float(table_SS[apart].mean()), total / np.maximum(weight, 1e-12)


def _std_draws(values_S: ndarray, drawn_DS: ndarray) -> ndarray:
    middle = drawn_DS @ values_S
    count = len(values_S)
    return np.sqrt(np.maximum(drawn_DS @ np.square(values_S) - np.square(middle), 0) * count / (count - 1))


# ---- the part from which the page computes ----


def write_page_pool(path: Path, pool: Pool, labels: Sequence[str], heads: Mapping[str, Sequence[ByReward]]) -> None:
    """The first completions of each prompt and the first reward models of each noise, float32 in base64.

    Heads are centered on this part, as training centers them; of the posterior's many heads only mean and std over
    heads are kept, which is what its objectives read.
    labels: a line for each prompt.   heads: per noise, per seed.
    """
    keep = min(pool.per_prompt, PAGE_COMPLETIONS)
    rows = np.arange(len(pool.rows)).reshape(-1, pool.per_prompt)[:, :keep].ravel()
    write_json(
        path,
        {
            "prompts": list(labels), "per_prompt": keep, "noises": list(heads),
            "seeds": list(range(min(PAGE_SEEDS, *map(len, heads.values())))),
            "gold": _packed(pool.gold_PN[:, :keep]),
            "rewards": {
                noise: [{name: _for_page(one.heads, rows) for name, one in run.items()} for run in runs[:PAGE_SEEDS]]
                for noise, runs in heads.items()
            },
        },
    )  # fmt: skip


def _for_page(heads: HeadRewards, rows: ndarray) -> Json:
    part = heads.each(lambda whole: whole[rows])
    centered = RewardScale.fit(part, mean).centered(part)
    if centered.mean.shape[-1] > 8:
        return {"kind": "moments", "mean": _packed(mean(centered)), "std": _packed(disagreement(centered))}
    has_std = bool(centered.std.any())
    return {
        "kind": "heads", "num_heads": centered.mean.shape[-1], "mean": _packed(centered.mean),
        "std": _packed(centered.std) if has_std else None,
    }  # fmt: skip


def _packed(values: ndarray | torch.Tensor) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()
