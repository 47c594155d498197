"""Over-optimization read off a scored pool: gold and proxy against KL for best-of-n and exactly tilted policies.

Everything here follows from the heads' scores of a pool and the pool's gold, so an objective costs milliseconds.
Gold comes in as numbers: nothing here trains or chooses.

Shapes: _S reward models (seeds), _P prompts, _N completions of each, _M points of a curve, _D bootstrap draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from poise.errors import PoiseError
from poise.functional.best_of_n import (
    KL_COEFS,
    MIN_SAMPLES,
    best_of_n_kl,
    fit_best_of_n,
    fit_rl,
    rank_weights,
    sizes,
    tilted_weights,
)
from poise.functional.objectives import (
    HeadRewards,
    Objective,
    RewardScale,
    expected_tradeoff,
    expected_worst_case,
    parse_objective,
)
from poise.functional.shapes import checked
from poise.functional.shaping import SHAPINGS, Shaping
from poise.functional.statistics import FEW, resampled_counts, shared_by_ties, student_shares
from poise.runtime.records import Json, undefined_as_none
from poise.runtime.settings import Count, above

DRAWS = 1000


@dataclass(frozen=True)
class Choice:
    """What to select by: a reward model of a run, the objective that combines its heads, and what is done to it."""

    reward: str
    objective: str
    shaping: Shaping = "none"
    ceiling: float = math.inf

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """REWARD:OBJECTIVE; PoiseError for another form, an unknown objective, or one that couples the whole pool."""
        reward, colon, spec = text.partition(":")
        if not colon:
            raise PoiseError(f"{text!r}: REWARD:OBJECTIVE was expected, e.g. brme:tradeoff(0.4)")
        _refuse_coupled(parse_objective(spec), spec)
        return cls(reward, spec)

    @checked
    def proxy(
        self, heads: HeadRewards, per_prompt: Count, unit: Annotated[float, above(0)] = 1.0
    ) -> Float[ndarray, "prompts pool"]:
        """The reward PPO would be given, of heads (P * N, K): centered, combined, scaled on the pool itself.

        unit: Bradley-Terry log odds per unit of the heads, which the shapings want. A completion is compared with all
        of its prompt's, which are the initial policy's.
        """
        if len(heads.mean) % per_prompt:
            raise PoiseError(f"{len(heads.mean)} completions are no whole number of prompts with {per_prompt} of each")
        if self.shaping != "none":
            by_prompt = heads.in_unit(unit).each(lambda part: part.unflatten(0, (-1, per_prompt)))
            others = by_prompt.each(lambda part: part.unsqueeze(1))
            heads = SHAPINGS[self.shaping](by_prompt, others).each(lambda part: part.flatten(0, 1))
        objective = parse_objective(self.objective)
        _refuse_coupled(objective, self.objective)
        _, reward = RewardScale.fit_and_combine(heads, objective, ceiling=self.ceiling)
        return reward.double().numpy().reshape(-1, per_prompt)


def _refuse_coupled(objective: Objective, spec: str) -> None:
    """PoiseError for objectives that take one head for all texts of a call: a prompt's best would depend on others."""
    function = objective.func if isinstance(objective, partial) else objective
    if function in (expected_tradeoff, expected_worst_case):
        per_sample = spec.strip().removeprefix("expected_")
        raise PoiseError(
            f"{spec.strip()} chooses one head for the whole pool, so it is undefined for one prompt; use {per_sample}"
        )


class Curves(NamedTuple):
    """One objective on the pool, per reward model and prompt; the two kinds of policy side by side."""

    n: ndarray
    best_of_n_gold_SPM: ndarray
    best_of_n_proxy_SPM: ndarray
    tilted_gold_SPM: ndarray
    tilted_proxy_SPM: ndarray
    tilted_kl_SPM: ndarray
    tilted_samples_SPM: ndarray  # effective sample size of the pool under the tilted policy, 1 / sum of squared weights
    accuracy_SP: ndarray  # share of pairs of completions that the proxy orders as gold does; ties count half

    @classmethod
    @checked
    def of(cls, proxy_SPN: Float[ndarray, "seeds prompts pool"], gold_PN: Float[ndarray, "prompts pool"]) -> "Curves":
        """Best-of-n over `sizes` and tilted policies over KL_COEFS."""
        shape = proxy_SPN.shape
        proxy = proxy_SPN.reshape(-1, shape[-1])
        gold = np.broadcast_to(gold_PN, shape).reshape(proxy.shape)
        n = sizes(shape[-1])
        weights = rank_weights(shape[-1], n)
        order = np.argsort(proxy, axis=-1, kind="stable")
        ordered = np.take_along_axis(proxy, order, -1)
        best_gold = shared_by_ties(np.take_along_axis(gold, order, -1), ordered)
        selected = [score @ weights for score in (best_gold, ordered)]
        points = []
        for kl_coef in KL_COEFS:
            weight, kl = tilted_weights(proxy, kl_coef)
            samples = 1 / np.square(weight).sum(-1)
            points.append(np.stack([(weight * gold).sum(-1), (weight * proxy).sum(-1), kl, samples]))
        best_gold, best_proxy, gold, proxy, kl, samples = (
            part.reshape(*shape[:2], -1) for part in (*selected, *np.stack(points, -1))
        )
        return cls(n, best_gold, best_proxy, gold, proxy, kl, samples, pair_accuracy(proxy_SPN, gold_PN))


@checked
def pair_accuracy(
    proxy_SPN: Float[ndarray, "seeds prompts pool"], gold_PN: Float[ndarray, "prompts pool"]
) -> Float[ndarray, "seeds prompts"]:
    """How often the proxy orders a prompt's first and second, third and fourth … completion as gold does.

    Ties of the proxy count half; pairs that gold ties are left out (NaN for a prompt of nothing else).

    >>> pair_accuracy(np.array([[[0.0, 1.0, 5.0, 5.0]]]), np.array([[1.0, 2.0, 3.0, 4.0]])).item()
    0.75
    """
    even = gold_PN.shape[-1] // 2 * 2
    truth = np.sign(gold_PN[:, 1:even:2] - gold_PN[:, 0:even:2])
    said = np.sign(proxy_SPN[..., 1:even:2] - proxy_SPN[..., 0:even:2])
    counts = np.broadcast_to(truth != 0, said.shape)
    total = counts.sum(-1)
    return np.where(total > 0, ((said * truth + 1) / 2 * counts).sum(-1) / np.maximum(total, 1), np.nan)


class Resamples(NamedTuple):
    """Draws of the means over prompts and over reward models, the same for every objective: differences are paired.

    Prompts are many, as a rule, and bootstrapped. Reward models are few, and a bootstrap of three leaves out zero in a
    fifth of the studies in which nothing differs: their mean, and that of few prompts, is drawn from Student's
    distribution (`student_shares`).
    """

    prompts_DP: Float[ndarray, "draws prompts"]
    seeds_DS: Float[ndarray, "draws seeds"]

    @classmethod
    def draw(cls, num_prompts: int, num_seeds: int, draws: int = DRAWS) -> "Resamples":
        shares = student_shares if num_prompts < FEW else resampled_counts
        return cls(shares(num_prompts, draws, 0), student_shares(num_seeds, draws, 1))

    def by_seed(self, values_SPM: ndarray) -> Float[ndarray, "draws seeds points"]:
        """Means over resampled prompts, per reward model."""
        seeds, prompts, points = values_SPM.shape
        flat = np.moveaxis(values_SPM, 0, 1).reshape(prompts, seeds * points)
        return (self.prompts_DP @ flat).reshape(-1, seeds, points)

    def over_seeds(self, values_DS: ndarray) -> ndarray:
        """Drawn means over reward models of (D, S) or (D, S, M)."""
        return np.einsum("ds,ds...->d...", self.seeds_DS, values_DS)


class CurveSummary(NamedTuple):
    """A choice's curves and measures as JSON, and its measures' draws for comparisons with others."""

    json: Json
    means: dict[str, float]
    draws: dict[str, Float[ndarray, " draws"]]


@checked
def summarize(curves: Curves, resamples: Resamples) -> CurveSummary:
    """Points with 95 % intervals over prompts and reward models, fitted laws, peak, final and drawdown of gold."""
    gold_DSM = resamples.by_seed(curves.best_of_n_gold_SPM)
    kls = best_of_n_kl(curves.n)
    points = _points(curves.best_of_n_gold_SPM, gold_DSM, curves.best_of_n_proxy_SPM, resamples)
    best = [{"n": int(n), "kl": float(kl)} | point for n, kl, point in zip(curves.n, kls, points, strict=True)]
    tilted, stopped = _tilted(curves, resamples)
    initial = best[0]["gold"]
    laws = {"best_of_n": fit_best_of_n(np.sqrt(kls), np.array([point["gold"] - initial for point in best]))}
    if len(tilted) > 2:  # two points, two constants: no law
        root = np.sqrt(np.maximum([point["kl"] for point in tilted], 0))
        laws["tilted"] = fit_rl(root, np.array([point["gold"] - initial for point in tilted]))
    # The peak is where the mean curve has it: a peak of its own for each resample would find a fall in any noise.
    peak = int(np.argmax([point["gold"] for point in best]))
    own, drawn = _measures(curves.best_of_n_gold_SPM.mean(1)[None], peak), _measures(gold_DSM, peak)
    known = ~np.isnan(curves.accuracy_SP[0])  # prompts of which gold does not tie every pair
    if known.any():
        right_SP1 = np.where(known, curves.accuracy_SP, 0.0)[..., None]
        count_SP1 = np.broadcast_to(known[None, :, None], right_SP1.shape).astype(float)
        own["accuracy"] = right_SP1.sum(1) / count_SP1.sum(1)
        counted_DS1 = resamples.by_seed(count_SP1)
        counted_DS1[counted_DS1 == 0] = np.nan  # a resample that drew no such prompt
        drawn["accuracy"] = (resamples.by_seed(right_SP1) / counted_DS1)[..., 0]
    means = {name: float(value.mean()) for name, value in own.items()}
    draws = {name: resamples.over_seeds(value) for name, value in drawn.items()}
    measures = {name: {"mean": means[name], "interval": interval(draws[name])} for name in means}
    return CurveSummary(
        {
            "seeds": len(curves.best_of_n_gold_SPM), "initial_gold": initial, "best_of_n": best, "tilted": tilted,
            "tilted_stopped": stopped,
            "fits": {name: undefined_as_none(law._asdict()) for name, law in laws.items()}, "measures": measures,
        },
        means,
        draws,
    )  # fmt: skip


def _tilted(curves: Curves, resamples: Resamples) -> tuple[list[Json], str]:
    """(points of the tilted curve as far as the pool reaches, why it stops; "" where it does not).

    A point's effective sample size is the harmonic mean over prompts and reward models: the error of the pool's KL goes
    with its inverse. The curve ends before the first point with fewer than MIN_SAMPLES.
    """
    samples = 1 / (1 / curves.tilted_samples_SPM).mean((0, 1))
    short = np.flatnonzero(samples < MIN_SAMPLES)
    end = int(short[0]) if len(short) else len(samples)
    gold_SPM, proxy_SPM = curves.tilted_gold_SPM[..., :end], curves.tilted_proxy_SPM[..., :end]
    points = _points(gold_SPM, resamples.by_seed(gold_SPM), proxy_SPM, resamples) if end else []
    kls = curves.tilted_kl_SPM.mean((0, 1)).tolist()
    reached = zip(KL_COEFS[:end], kls[:end], samples[:end].tolist(), points, strict=True)
    found = [{"kl_coef": coef, "kl": kl, "effective_samples": size} | point for coef, kl, size, point in reached]
    if end == len(samples):
        return found, ""
    return found, (
        f"at β = {KL_COEFS[end]:g} the pool is worth {samples[end]:.1f} samples a prompt, fewer than {MIN_SAMPLES:g}"
    )


@checked
def differences_from(own: CurveSummary, first: CurveSummary) -> Json:
    """The measures of `own` and what they are less those of `first`, paired; its gain also as a share of theirs."""
    measures: Json = {}
    for name, entry in own.json["measures"].items():
        less = own.draws[name] - first.draws[name]
        measures[name] = entry | {
            "vs_baseline": own.means[name] - first.means[name], "vs_baseline_interval": interval(less),
        }  # fmt: skip
    if first.means["gain"] > 0:
        shares = own.draws["gain"] / np.where(first.draws["gain"] > 0, first.draws["gain"], np.nan) - 1
        measures["relative_gain"] = {
            "mean": own.means["gain"] / first.means["gain"] - 1,
            "interval": undefined_as_none(interval(shares[~np.isnan(shares)])),
        }
    return measures


def _points(gold_SPM: ndarray, gold_DSM: ndarray, proxy_SPM: ndarray, resamples: Resamples) -> list[Json]:
    """Means with intervals, of gold and proxy; gold_DSM: gold's means over resampled prompts."""
    columns: dict[str, ndarray] = {}
    for name, values, by_seed in (("gold", gold_SPM, gold_DSM), ("proxy", proxy_SPM, resamples.by_seed(proxy_SPM))):
        drawn = resamples.over_seeds(by_seed)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        columns |= {name: values.mean((0, 1)), f"{name}_low": low, f"{name}_high": high}
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def _measures(gold_DSM: ndarray, peak: int) -> dict[str, ndarray]:
    """Of curves over n: where they end, their height at the peak, the fall from there, the gain over n = 1."""
    final, highest = gold_DSM[..., -1], gold_DSM[..., peak]
    return {"final_gold": final, "peak_gold": highest, "drawdown": highest - final, "gain": final - gold_DSM[..., 0]}


@checked
def interval(draws: Float[ndarray, " draws"]) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws that are there (not NaN)."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


@checked
def stacked(choice: Choice, models: Sequence[tuple[HeadRewards, float]], per_prompt: int) -> ndarray:
    """Proxies (S, P, N) of one choice under several reward models, each (heads, Bradley-Terry unit)."""
    return np.stack([choice.proxy(heads, per_prompt, unit) for heads, unit in models])
