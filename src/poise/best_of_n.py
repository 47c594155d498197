"""`poise best-of-n`: what each objective would select, before any RL.

One pool of the initial policy's completions is scored once by every reward model of a `poise train-reward` run; from
those scores best-of-n and the exactly tilted policy pi ~ pi_0 exp(r / beta) follow for any objective in milliseconds.

    RUN/pool.jsonl     prompt, completion, gold, and every head's mean and std per reward model
    RUN/results.json   gold and proxy against KL, per objective
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

from poise.data import OnBadRow, read_prompts
from poise.errors import PoiseError
from poise.gold import gold_rewards
from poise.metrics import best_of_n, best_of_n_kl, bootstrap_interval, tilted
from poise.models import DEFAULT_MODEL, load_policy
from poise.objectives import HeadRewards, RewardScale, disagreement, mean, parse_objective, routing_std
from poise.policy import Policy, uniforms
from poise.progress import progress
from poise.runs import Json, Run, read_jsonl, write_jsonl
from poise.scorer import Scorer, generated

KL_COEFS = (2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12)


@dataclass(frozen=True)
class Config:
    """Best-of-n and exactly tilted policies, for every objective, from one pool of completions."""

    prompts: str
    """JSON lines with `prompt`."""
    reward: str
    """A `poise train-reward` run folder."""
    output: str = "runs/best-of-n"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the policy to sample."""
    objectives: tuple[str, ...] = (
        "single:nominal", "brme:tradeoff(0.4)", "brme:worst_case", "posterior:lower_confidence(1)",
    )  # fmt: skip
    """What to select by: REWARD:OBJECTIVE, the reward model being a folder of the reward run."""
    per_prompt: int = 24
    """Completions per prompt."""
    max_tokens: int = 20
    """Longest completion, in tokens."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Of the sampling."""


def run(config: Config) -> Run:
    """Sample, score, select; a finished run is returned as it is, a sampled pool is not sampled again."""
    choices = [_parse_choice(choice) for choice in config.objectives]
    out = Run.open(config.output, config)
    if out.results is not None:
        return out
    path = out.folder / "pool.jsonl"
    if not path.exists():
        write_jsonl(path, _make_pool(config, sorted({reward for reward, _ in choices})))
    pool = list(read_jsonl(path))
    out.finish(summarise(pool, config.per_prompt, config.objectives))
    return out


def summarise(pool: list[Json], per_prompt: int, choices: tuple[str, ...]) -> Json:
    """Curves of every REWARD:OBJECTIVE over a scored pool, rows grouped by prompt."""
    shape = (len(pool) // per_prompt, per_prompt)
    gold = np.array([row["gold"] for row in pool]).reshape(shape)
    sizes = np.unique(np.geomspace(1, per_prompt, 9).round().astype(int))
    curves = []
    for choice in choices:
        reward, spec = _parse_choice(choice)
        heads, objective = pool_heads(pool, reward), parse_objective(spec)
        proxy = RewardScale.fit(heads, objective).combine(heads, objective).numpy().reshape(shape)  # as in training
        golds, proxies = best_of_n(proxy, gold, sizes), best_of_n(proxy, proxy, sizes)
        curve: Json = {"name": choice, "label": choice, "reward": reward, "objective": spec, "tilted": []}
        curve["best_of_n"] = [
            {"n": int(n), "kl": float(kl), **_summary(golds[:, i], proxies[:, i])}
            for i, (n, kl) in enumerate(zip(sizes, best_of_n_kl(sizes), strict=True))
        ]
        for kl_coef in KL_COEFS:
            (tilted_gold, kl), (tilted_proxy, _) = tilted(proxy, gold, kl_coef), tilted(proxy, proxy, kl_coef)
            point = {"kl_coef": kl_coef, "kl": float(kl.mean()), **_summary(tilted_gold, tilted_proxy)}
            curve["tilted"].append(point)
        curves.append(curve)
    spread = []
    for reward in sorted({_parse_choice(choice)[0] for choice in choices}):
        heads = pool_heads(pool, reward)
        heads = RewardScale.fit(heads, mean).centred(heads)
        spread.append(
            {
                "reward": reward,
                "disagreement": disagreement(heads).mean().item(),
                "routing_std": routing_std(heads).mean().item(),
            }
        )
    return {
        "num_prompts": shape[0], "per_prompt": per_prompt, "initial_gold": float(gold.mean()),
        "curves": curves, "head_spread": spread,
    }  # fmt: skip


def pool_heads(pool: list[Json], reward: str) -> HeadRewards:
    """Heads (rows, K) of one reward model over a pool."""
    return HeadRewards(*(torch.tensor([row[part][reward] for row in pool]) for part in ("mean", "std")))


def _summary(gold: ndarray, proxy: ndarray) -> Json:
    low, high = bootstrap_interval(gold, draws=2000)
    return {"proxy": float(proxy.mean()), "gold": float(gold.mean()), "gold_low": low, "gold_high": high}


def _parse_choice(choice: str) -> tuple[str, str]:
    reward, colon, spec = choice.partition(":")
    if not colon:
        raise PoiseError(f"{choice!r}: REWARD:OBJECTIVE was expected, e.g. brme:tradeoff(0.4)")
    parse_objective(spec)
    return reward, spec


def _make_pool(config: Config, rewards: list[str]) -> list[Json]:
    prompts = read_prompts(config.prompts, config.on_bad_row)
    first = Scorer.load(str(Path(config.reward) / rewards[0]))
    scorers = {rewards[0]: first} | {name: first.with_heads_of(str(Path(config.reward) / name)) for name in rewards[1:]}
    model, tokenizer = load_policy(config.model)
    policy = Policy(model, tokenizer, adapted_layers=1, rank=1)
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[Json] = []
    with progress("best-of-n: sampling the pool", len(prompts) * config.per_prompt) as advance:
        for start in range(0, len(prompts), 8):
            batch = prompts[start : start + 8]
            rollout = policy.sample(batch, uniforms(len(batch), config.per_prompt, config.max_tokens, generator))
            for prompt, texts in zip(batch, policy.texts(rollout), strict=True):
                rows += [{"prompt": prompt, "completion": text} for text in texts]
            advance(len(batch) * config.per_prompt)
    samples = [generated(row["prompt"], row["completion"]) for row in rows]
    with progress("best-of-n: scoring the pool", len(samples)) as advance:
        features = first.extract(samples, advance)
    heads = {name: scorer.decode(features) for name, scorer in scorers.items()}
    gold = gold_rewards([row["completion"] for row in rows])
    for i, row in enumerate(rows):
        row["gold"] = float(gold[i])
        row["mean"] = {name: value.mean[i].tolist() for name, value in heads.items()}
        row["std"] = {name: value.std[i].tolist() for name, value in heads.items()}
    return rows
