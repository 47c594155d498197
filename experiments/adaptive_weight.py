"""Should lambda fall as the policy leaves what the heads know? Rules against fixed weights and schedules, on the toy.

    python experiments/adaptive_weight.py [--choose-on 100 --report-on 200 --seeds 20]

Worlds of `poise toy`: eight prompts, eight responses, 2 to 4 of them in no preference pair; PPO on
lambda * nominal + (1 - lambda) * worst case of five Gaussian heads, beta = 0.25, tabular policies. A signal is measured
on every step's batch and held against its value on the first one; a rule makes lambda of the two. Settings: labels as
Bradley-Terry draws them, and a quarter of them flipped besides.

What is chosen is chosen on the first seeds and without gold: by the reward that a second set of heads, from other
first weights and shards, gives the trained policy (`held_out`, in stds under the reference policy), mean of both
settings. Gold is reported for every arm on both sets of seeds, with 95 % bootstrap intervals over seeds, and paired
against the fixed weight that the same criterion chose. A rule that only ends at a good weight is no better than that
weight from the start, so every arm is also paired against a fixed weight equal to the mean one it ended at (gold
interpolated between the fixed arms around it).
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from poise.functional import schedules as controllers
from poise.functional.objectives import HeadRewards, disagreement, mean, nominal, routing_std, tradeoff, worst_case
from poise.functional.statistics import mean_interval
from poise.runtime.progress import progress
from poise.runtime.run_folder import environment
from poise.toy import bandit
from poise.toy import unseen_responses as blind_spots

KL_COEF, STEPS, SAMPLES, PAIRS, HEADS = 0.25, 200, 64, 32, 5
NOISES = (0.0, 0.25)
FIXED = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Rule = Callable[[float, float, float, float], float]  # (base, the last weight, signal, its first value) -> weight


def proportional(base: float, _last: float, signal: float, initial: float) -> float:
    return base * min(1.0, initial / max(signal, 1e-9))


def exponential(base: float, _last: float, signal: float, initial: float, rate: float) -> float:
    return base * math.exp(-rate * max(0.0, signal / initial - 1.0))


def integral(base: float, last: float, signal: float, initial: float, target: float) -> float:
    return min(max(last - 0.05 * (signal / initial - target), 0.0), base)


RULES: dict[str, Rule] = {
    "proportional": proportional,
    "exponential, rate 1": partial(exponential, rate=1.0),
    "exponential, rate 3": partial(exponential, rate=3.0),
    "integral to its first value": partial(integral, target=1.0),
    "integral to 0.7 of it": partial(integral, target=0.7),
}
KL_RULES: dict[str, Rule] = {  # the KL begins at 0: it is held against nats
    "proportional, 1 nat": lambda base, _last, kl, _first: base / (1.0 + kl),
    "exponential, 1 nat": lambda base, _last, kl, _first: base * math.exp(-max(kl, 0.0)),
    "exponential, 2 nats": lambda base, _last, kl, _first: base * math.exp(-max(kl, 0.0) / 2.0),
}


@dataclass
class Arm:
    """One way to set lambda, in all worlds of a setting."""

    name: str
    kind: str
    base: float
    rule: Rule | None = None
    signal: str = ""
    end: float | None = None
    step: int = 0
    first: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def update(self, signals: dict[str, list[float]], num_worlds: int) -> Tensor:
        """This step's lambda of every world, (W, 1, 1)."""
        if not self.weights:
            self.weights = [self.base] * num_worlds
        if self.rule is not None:
            now = signals[self.signal]
            self.first = self.first or now
            triples = zip(self.weights, now, self.first, strict=True)
            self.weights = [self.rule(self.base, *triple) for triple in triples]
        elif self.end is not None:
            self.weights = [controllers.linear(self.base, self.end, self.step / STEPS)] * num_worlds
        self.step += 1
        return torch.tensor(self.weights).view(-1, 1, 1)


def make_arms() -> list[Arm]:
    arms = [Arm(f"fixed {weight}", "fixed", weight) for weight in FIXED]
    arms += [Arm(f"linear {a} to {b}", "schedule", a, end=b) for a, b in ((1.0, 0.0), (0.8, 0.2))]
    for base in (1.0, 0.6):
        for signal in ("gap", "routing_std", "disagreement"):
            arms += [
                Arm(f"{signal}, {name}, from {base}", "adaptive", base, rule, signal) for name, rule in RULES.items()
            ]
        arms += [Arm(f"KL, {name}, from {base}", "adaptive", base, rule, "KL") for name, rule in KL_RULES.items()]
    return arms


def study(first_seed: int, num_seeds: int, noise: float) -> dict[str, dict[str, np.ndarray]]:
    """Every arm's gold, held-out reward, mass on unseen responses, KL and last weight, per seed."""
    worlds = blind_spots.make_worlds(
        [torch.Generator().manual_seed(first_seed + i) for i in range(num_seeds)], PAIRS, HEADS, noise
    )
    generator = torch.Generator().manual_seed(first_seed)
    others = worlds._replace(
        first_single_WPD=torch.randn(worlds.first_single_WPD.shape, generator=generator),
        first_heads_WPDK=torch.randn(worlds.first_heads_WPDK.shape, generator=generator),
        shards_WPNK=torch.rand(worlds.shards_WPNK.shape, generator=generator) < blind_spots.SHARD,
    )
    heads, held_out = (blind_spots.fit_heads(each, blind_spots.fit_single(each)) for each in (worlds, others))
    reference = worlds.reference_WPA
    baseline = bandit.draw(reference, 512, generator)
    judge = blind_spots.combine(held_out, blind_spots.fit_scales(held_out, mean, baseline), mean)
    arms = make_arms()
    ends = []  # each arm's reward at lambda 1 and 0, on the scale of its base
    for arm in arms:
        scales = blind_spots.fit_scales(heads, partial(tradeoff, nominal_weight=arm.base), baseline)
        ends.append([blind_spots.combine(heads, scales, objective) for objective in (nominal, worst_case)])
    centered = HeadRewards(
        torch.stack([s.centered(HeadRewards(*w)).mean for s, *w in zip(scales, *heads, strict=True)]), heads.std
    )
    tables = {
        "gap": nominal(centered) - worst_case(centered),
        "routing_std": routing_std(centered),
        "disagreement": disagreement(centered),
    }

    def score(logprob: Tensor, drawn: Tensor) -> Tensor:
        rewards = []
        for arm, (high, low), policy, shown in zip(
            arms, ends, logprob.chunk(len(arms)), drawn.chunk(len(arms)), strict=True
        ):
            signals = {name: table.gather(-1, shown).mean((1, 2)).tolist() for name, table in tables.items()}
            kl = (policy - reference).gather(-1, shown).mean((1, 2))
            signals["KL"] = kl.clamp_min(0.0).tolist()
            weight = arm.update(signals, num_seeds)
            rewards.append((weight * high + (1 - weight) * low).gather(-1, shown))
        return torch.cat(rewards)

    everywhere = reference.repeat(len(arms), 1, 1)
    with progress(f"seeds from {first_seed}, {noise:.0%} flipped", STEPS) as advance:
        trained = bandit.train(
            (everywhere,), everywhere, score, KL_COEF, num_steps=STEPS, num_samples=SAMPLES, seed=first_seed,
            advance=advance,
        ).chunk(len(arms))  # fmt: skip
    unseen = (~worlds.seen_WPA).float()
    return {
        arm.name: {
            "gold": bandit.expected(policy, worlds.gold_WPA).mean(-1).numpy(),
            "held_out": bandit.expected(policy, judge).mean(-1).numpy(),
            "unseen": bandit.expected(policy, unseen).mean(-1).numpy(),
            "kl": bandit.exact_kl(policy, reference).mean(-1).numpy(),
            "last_weight": np.array(arm.weights),
        }
        for arm, policy in zip(arms, trained, strict=True)
    }


def interval(values: np.ndarray) -> dict:
    low, high = mean_interval(values.astype(float))
    return {"mean": round(float(values.mean()), 4), "interval": [round(low, 4), round(high, 4)]}


def table(settings: dict[float, dict[str, dict[str, np.ndarray]]], rival: str) -> list[dict]:
    """A row per arm, best held-out reward first; gold also as the mean of both settings, paired against `rival`."""
    rows = []
    for name in next(iter(settings.values())):
        row: dict = {"arm": name}
        row["held_out"] = round(float(np.mean([found[name]["held_out"].mean() for found in settings.values()])), 4)
        gain = np.mean([found[name]["gold"] - found[rival]["gold"] for found in settings.values()], axis=0)
        row[f"gold less that of {rival}"] = interval(gain)
        row["gold less that of a fixed weight where it ended"] = interval(
            np.mean(
                [
                    found[name]["gold"] - of_fixed(found, found[name]["last_weight"].mean())
                    for found in settings.values()
                ],
                axis=0,
            )
        )
        for noise, found in settings.items():
            arm = found[name]
            rest = {key: round(float(arm[key].mean()), 3) for key in ("held_out", "unseen", "kl", "last_weight")}
            row[f"{noise:.0%} flipped"] = {"gold": interval(arm["gold"]), **rest}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["held_out"])


def of_fixed(found: dict[str, dict[str, np.ndarray]], weight: float) -> np.ndarray:
    """Gold per world of a fixed weight, linear between the fixed arms."""
    gold = np.stack([found[f"fixed {each}"]["gold"] for each in FIXED])
    return np.array([np.interp(weight, FIXED, world) for world in gold.T])


def by_held_out_heads(found: dict[str, dict[str, np.ndarray]], names: list[str]) -> np.ndarray:
    """Gold per world of the fixed weight that the held-out heads choose in that world."""
    choice = np.stack([found[name]["held_out"] for name in names]).argmax(0)
    return np.stack([found[name]["gold"] for name in names])[choice, np.arange(len(choice))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose-on", type=int, default=100)
    parser.add_argument("--report-on", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {arm.name: arm.kind for arm in make_arms()}
    sets = {
        first: {noise: study(first, options.seeds, noise) for noise in NOISES}
        for first in (options.choose_on, options.report_on)
    }
    chosen: dict[str, str] = {}
    for row in table(sets[options.choose_on], "fixed 0.4"):
        chosen.setdefault(kinds[row["arm"]], row["arm"])  # rows come best first
    rival = chosen["fixed"]
    result: dict = {"chosen without gold": chosen, "arms": len(kinds), "seeds": options.seeds}
    for first, settings in sets.items():
        rows = table(settings, rival)
        held_out, gold = (
            [np.mean([found[name][key].mean() for found in settings.values()]) for name in kinds]
            for key in ("held_out", "gold")
        )
        fixed = [name for name, kind in kinds.items() if kind == "fixed"]
        per_world = {noise: by_held_out_heads(found, fixed) for noise, found in settings.items()}
        gain = np.mean([each - settings[noise][rival]["gold"] for noise, each in per_world.items()], axis=0)
        result[f"seeds from {first}"] = {
            "correlation of held_out and gold over arms": round(float(np.corrcoef(held_out, gold)[0, 1]), 3),
            "fixed weight chosen in each world by held-out heads": {
                **{f"{noise:.0%} flipped": {"gold": interval(each)} for noise, each in per_world.items()},
                f"gold less that of {rival}": interval(gain),
            },
            "rows": rows,
        }
    print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
