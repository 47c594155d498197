"""Best-of-n in a study: many reward models score one pool of the initial policy's completions. It needs no RL.

    RUN/pool/pool.jsonl, RUN/pool/heads/…   the pool, and the scores of every reward model
    RUN/page-pool.json                      a part of it, from which the page computes

The reward models are trained in memory: heads on the features of one frozen trunk, which are kept on disk.
"""

import base64
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import rankdata

from poise.functional.objectives import HeadRewards, RewardScale, disagreement, mean
from poise.functional.overoptimization import Choice
from poise.functional.statistics import t_interval
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.reward import train as train_reward
from poise.runtime.progress import parts_of_another, progress
from poise.runtime.run_folder import Json, config_dict, write_json
from poise.studies.pool import PoolHeads, proxies, samples_of

PAGE_SEEDS, PAGE_COMPLETIONS = 5, 64
_LARGEST_LOG = math.log(sys.float_info.max)
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
    Intervals are Student's over reward models, by the jackknife; differences against the first kind, paired. Of two
    reward models there are none: without one of them nothing is left to compare.
    """
    result: Json = {}
    first: dict[str, Apart] = {}
    for name, choice in UNSTABLE.items():
        proxy = proxies(choice, heads, pool.per_prompt)
        ranks = np.stack([rankdata(one) for one in proxy.reshape(len(heads), -1)])
        best = proxy.argmax(-1)
        gold = np.take_along_axis(pool.gold_PN[None], best[..., None], -1)[..., 0].mean(-1)
        found = {
            "rank_correlation": Apart.of_pairs(np.corrcoef(ranks)),
            "same_choice": Apart.of_pairs((best[:, None] == best[None]).mean(-1)),
            "gold_std": Apart.of_std(gold),
        }
        first = first or found
        result[name] = {"seeds": len(heads)} | {
            key: {"mean": one.value, "interval": one.interval} | (one.beyond(first[key]) if found is not first else {})
            for key, one in found.items()
        }
    return result


class Apart(NamedTuple):
    """A measure of how far S reward models are apart, its 95 % interval, and its pseudo-values (S,)."""

    value: float
    interval: list[float] | None
    pseudo_S: ndarray

    @classmethod
    def of_pairs(cls, table_SS: ndarray) -> "Apart":
        """The mean of a table over pairs of different reward models."""

        def mean_over(some: ndarray) -> float:
            return float(table_SS[np.ix_(some, some)][~np.eye(len(some), dtype=bool)].mean())

        pseudo = _pseudo_values(mean_over, len(table_SS))
        return cls(mean_over(np.arange(len(table_SS))), _students(pseudo), pseudo)

    @classmethod
    def of_std(cls, values_S: ndarray) -> "Apart":
        """The std of one number of each reward model; its interval by the log, in which it is more nearly normal.

        None where the others of some reward model do not differ, or so little that there is no upper end.
        """

        def std(some: ndarray) -> float:
            return float(values_S[some].std(ddof=1))

        def log_std(some: ndarray) -> float:
            return math.log(std(some)) if std(some) > 0 else math.nan

        ends = _students(_pseudo_values(log_std, len(values_S)))
        if ends is not None and ends[1] > _LARGEST_LOG:
            ends = None
        pseudo = _pseudo_values(std, len(values_S))
        return cls(std(np.arange(len(values_S))), ends and np.exp(ends).tolist(), pseudo)

    def beyond(self, other: "Apart") -> Json:
        """What this is less another one of the same reward models, with its interval."""
        gap = _students(self.pseudo_S - other.pseudo_S)
        return {"vs_baseline": self.value - other.value, "vs_baseline_interval": gap}


def _pseudo_values(statistic: Callable[[ndarray], float], count: int) -> ndarray:
    """count times the statistic of all, less count - 1 times that of all but one; NaN for fewer than three."""
    every = np.arange(count)
    if count < 3:
        return np.full(count, np.nan)
    without = np.array([statistic(np.delete(every, one)) for one in every])
    return np.asarray(count * statistic(every) - (count - 1) * without)


def _students(values: ndarray) -> list[float] | None:
    return None if np.isnan(values).any() else t_interval(values).tolist()


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
