"""How well a reward model's rewards and uncertainties agree with human labels: numbers in, JSON out.

Every figure stands beside a baseline without knowledge: a coin, the longer text, one confidence for all pairs, a random
uncertainty. Intervals are 95 % bootstrap intervals over pairs or sets; those of one prompt, or where prompts are few
those that share a text, are drawn together. Of fewer than 20 such units they are Student's, and Wilson's for shares.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from poise.data.evaluation_sets import Questions
from poise.functional.calibration import (
    aurc,
    brier,
    constant_log_loss,
    expected_calibration_error,
    folded,
    log_loss,
    reliability,
    risk_coverage,
    weighted_auroc,
)
from poise.functional.head_rewards import joined
from poise.functional.objectives import HeadRewards, Objective, RewardScale, disagreement, routing_std, total_std
from poise.functional.reward_benchmarks import REWARD_BENCH, picks_chosen, reward_bench, style_matrix, style_scores
from poise.functional.statistics import bootstrap_intervals, interval_of_share, intervals_of_means, spearman
from poise.models.reward_model import HeadLayout, LastLayer
from poise.runtime.records import Json, undefined_as_none

NUM_MISTAKES = 8  # the wrongly ordered pairs of largest margin that are shown
NUM_CURVE_POINTS = 60


class TextScores(NamedTuple):
    """What a reward model gives N texts: rewards and stds of every head, and how to read them.

    text_std, pair_std: under the posterior of the last layer, (N,) of each text's reward and (N / 2,) of the margin of
    each two that follow each other; only for a checkpoint with a Bayesian last layer.
    """

    heads: HeadRewards
    layout: HeadLayout
    text_std: Tensor | None = None
    pair_std: Tensor | None = None

    @classmethod
    def of(cls, heads: HeadRewards, layout: HeadLayout, last_layer: LastLayer | None, features: Tensor) -> "TextScores":
        """features: (N, hidden), the trunk's; an even number of texts. last_layer: None where there is none."""
        if last_layer is None:
            return cls(heads, layout)
        margins = last_layer.difference_std(features[0::2] - features[1::2])
        return cls(heads, layout, last_layer.std(features), margins)

    @classmethod
    def together(cls, parts: list["TextScores"]) -> "TextScores":
        """Of texts that were scored in parts."""
        stds = (
            [std for part in parts if (std := getattr(part, name)) is not None] for name in ("text_std", "pair_std")
        )
        joined_stds = (torch.cat(found) if found else None for found in stds)
        return cls(joined([part.heads for part in parts]), parts[0].layout, *joined_stds)


# ---- pairs ----


class PairJudgments(NamedTuple):
    """One reward model's judgment of N pairs.

    margin: reward of the chosen text minus that of the rejected one, by the objective.
    probability: sigmoid(reward_scale * margin), the predicted probability of the human choice.
    heads_probability: the mean over heads of sigmoid(reward_scale * the head's own margin).
    uncertainties: by name; one that is equal for all pairs is left out.
    longer: 1 where the chosen text has more characters, 1/2 where both have equally many, else 0.
    unit: pairs of equal number depend on each other, e.g. votes on one pair, pairs of one ranking.
    """

    margin: Float[ndarray, " pairs"]
    probability: Float[ndarray, " pairs"]
    heads_probability: Float[ndarray, " pairs"]
    uncertainties: dict[str, Float[ndarray, " pairs"]]
    longer: Float[ndarray, " pairs"]
    unit: Int[ndarray, " pairs"]

    @property
    def correct(self) -> Float[ndarray, " pairs"]:
        """1 where the margin is positive, 1/2 where it is zero."""
        return (np.sign(self.margin) + 1) / 2


def pairs_of(scores: TextScores, questions: Questions, objective: Objective, seed: int) -> PairJudgments:
    """Margins, probabilities and uncertainties of pairs whose texts alternate: chosen, rejected, chosen, …

    disagreement        Std_k of the heads' margins
    routing_std         the larger of the two texts' min_k std
    total_std           sqrt(mean_k(std+^2 + std-^2) + Var_k margin_k), stds as calibrated error bars
    last_layer_std      std of the margin under the posterior of the last layer, where the checkpoint has one
    small_margin        -|margin|
    error_probability   1 - max(q, 1 - q), q = heads_probability
    random              independent of the pair, for comparison
    """
    layout = scores.layout
    heads = scores.heads.each(torch.Tensor.double)
    calibrated = layout.calibrated(heads).std
    spread = (calibrated[0::2].square() + calibrated[1::2].square()).sqrt()
    difference = HeadRewards(heads.mean[0::2] - heads.mean[1::2], spread)
    rewards, route = objective(heads), routing_std(heads)
    margin = rewards[0::2] - rewards[1::2]
    heads_probability = _probability(layout.reward_scale * difference.mean).mean(-1)
    uncertainties = {"disagreement": disagreement(difference)}
    if layout.kind == "gaussian":  # point heads have no stds: total_std would be the disagreement again
        uncertainties["routing_std"] = torch.maximum(route[0::2], route[1::2])
        uncertainties["total_std"] = total_std(difference)
    if scores.pair_std is not None:
        uncertainties["last_layer_std"] = scores.pair_std
    uncertainties["small_margin"] = -margin.abs()
    if layout.num_heads > 1:  # that of one head orders pairs as small_margin does
        uncertainties["error_probability"] = 1 - torch.maximum(heads_probability, 1 - heads_probability)
    named = {name: value.numpy().astype(float) for name, value in uncertainties.items()}
    named["random"] = np.random.default_rng(seed).random(len(margin))
    length = questions.lengths[0::2] - questions.lengths[1::2]
    return PairJudgments(
        margin.numpy(),
        _probability(layout.reward_scale * margin).numpy(),
        heads_probability.numpy(),
        {name: value for name, value in named.items() if np.ptp(value) > 0},
        (np.sign(length) + 1) / 2,
        questions.unit,
    )


def _probability(logit: Tensor) -> Tensor:
    """sigmoid, kept above zero: an absurd margin costs hundreds of nats, not infinity."""
    return torch.sigmoid(logit).clamp_min(torch.finfo(logit.dtype).tiny)


def judge_pairs(pairs: PairJudgments, questions: Questions, seed: int) -> Json:
    """Accuracy, calibration and quality of the uncertainties, with intervals; by subset; the largest mistakes."""
    correct = pairs.correct
    rows = np.stack([correct, correct - pairs.longer, -np.log(pairs.probability)], -1)

    def means(counts: ndarray) -> ndarray:
        return counts @ rows / counts.sum(-1, keepdims=True)

    accuracy, over_length, nll = bootstrap_intervals(means, pairs.unit, seed=seed).tolist()
    same = correct * pairs.longer + (1 - correct) * (1 - pairs.longer)
    return {
        "num_pairs": len(correct), "num_distinct": int(pairs.unit.max()) + 1,
        "accuracy": float(correct.mean()),
        "accuracy_interval": interval_of_share(accuracy, correct, pairs.unit),
        "length_accuracy": float(pairs.longer.mean()),
        "over_length": float((correct - pairs.longer).mean()), "over_length_interval": over_length,
        "agreement_with_length": float(same.mean()),
        "coin_nll": float(np.log(2)), "constant_nll": constant_log_loss(float(correct.mean())),
        "probability": _calibration(pairs.probability) | {"nll_interval": nll},
        "heads_probability": _calibration(pairs.heads_probability),
        "uncertainties": _uncertainty_quality(pairs, seed), "risk_coverage": _curves(pairs),
        "by_subset": by_subset(correct, pairs.longer, questions.subset), "mistakes": _mistakes(pairs, questions),
    }  # fmt: skip


def _uncertainty_quality(pairs: PairJudgments, seed: int) -> Json:
    """How well each uncertainty predicts wrong order: AUROC, area under risk–coverage, rank correlation with 1 - p."""
    correct = pairs.correct
    known: Json = {}
    for name, value in pairs.uncertainties.items():

        def statistics(counts: ndarray, value: ndarray = value) -> ndarray:
            error = 1 - counts @ correct / counts.sum(-1)  # the area of a random uncertainty
            return np.column_stack([weighted_auroc(1 - correct, value, counts), aurc(correct, value, counts) - error])

        auroc, excess = statistics(np.ones((1, len(correct))))[0].tolist()
        auroc_interval, excess_interval = bootstrap_intervals(statistics, pairs.unit, seed=seed).tolist()
        known[name] = {  # without an error, or without a right pair, there is no AUROC
            "auroc": undefined_as_none(auroc), "auroc_interval": undefined_as_none(auroc_interval),
            "aurc": float(excess + 1 - correct.mean()),
            "aurc_excess": excess, "aurc_excess_interval": excess_interval,
            "spearman": undefined_as_none(spearman(value, 1 - pairs.probability)),
        }  # fmt: skip
    return known


def _calibration(probability: Float[ndarray, " pairs"]) -> Json:
    bins = reliability(*folded(probability))
    columns = (bins.confidence.tolist(), bins.accuracy.tolist(), bins.size.tolist())
    return {
        "nll": log_loss(probability), "brier": brier(probability), "ece": expected_calibration_error(bins),
        "bins": [{"confidence": c, "accuracy": a, "count": n} for c, a, n in zip(*columns, strict=True)],
    }  # fmt: skip


def _curves(pairs: PairJudgments) -> Json:
    """Risk–coverage of every uncertainty, at a few dozen coverages."""
    count = len(pairs.margin)
    shown = np.unique(np.linspace(0, count - 1, NUM_CURVE_POINTS).round().astype(int))
    risk = {name: risk_coverage(pairs.correct, value)[1][shown].tolist() for name, value in pairs.uncertainties.items()}
    return {"coverage": ((shown + 1) / count).tolist(), "risk": risk}


def rows_of(pairs: PairJudgments, subset: list[str]) -> Iterator[Json]:
    """A row of every pair; subset: of each."""
    columns = {
        "margin": pairs.margin, "probability": pairs.probability, "heads_probability": pairs.heads_probability,
        "correct": pairs.correct, "longer_is_chosen": pairs.longer, **pairs.uncertainties,
    }  # fmt: skip
    for i, own in enumerate(subset):
        yield {"pair": i, "subset": own, **{name: float(column[i]) for name, column in columns.items()}}


def _mistakes(pairs: PairJudgments, questions: Questions) -> list[Json]:
    """The pairs that the model orders wrongly by the largest margin, one of a unit."""
    shown: dict[int, int] = {}
    for i in np.argsort(pairs.margin, kind="stable").tolist():
        if pairs.margin[i] >= 0 or len(shown) == NUM_MISTAKES:
            break
        shown.setdefault(int(pairs.unit[i]), i)
    items = questions.some(shown.values())
    return [
        {
            "prompt": item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"],
            "chosen": item.chosen[0], "rejected": item.rejected[0], "subset": item.subset,
            "margin": float(pairs.margin[i]), "probability": float(pairs.probability[i]),
        }
        for i in shown.values()
        for item in [items[i]]
    ]  # fmt: skip


def by_subset(correct: Float[ndarray, " items"], baseline: Float[ndarray, " items"], subset: list[str]) -> Json | None:
    """Accuracy, and that of a baseline, by subset; RewardBench's sections where all subsets are its own."""
    names = sorted(set(subset))
    if names == [""]:
        return None
    table: dict[str, Json] = {}
    for name in names:
        own = np.array([one == name for one in subset])
        accuracy, other = float(correct[own].mean()), float(baseline[own].mean())
        table[name] = {"count": int(own.sum()), "accuracy": accuracy, "baseline": other}
    means = {name: row["accuracy"] for name, row in table.items()}
    sections = {}
    if {name for members in REWARD_BENCH.values() for name in members} >= set(names):
        sections = reward_bench(means, {name: row["count"] for name, row in table.items()})
    return {"subsets": table, "sections": sections, "mean": float(np.mean(list((sections or means).values())))}


# ---- other data ----


def text_uncertainties(scores: TextScores, baseline: RewardScale) -> dict[str, Float[ndarray, " texts"]]:
    """Uncertainties of single texts, by name.

    baseline: subtracted from each head's mean; a constant that a head adds to all rewards is no disagreement.
    """
    heads = baseline.centered(scores.heads)
    uncertainties = {"disagreement": disagreement(heads)}
    if scores.layout.kind == "gaussian":
        uncertainties["routing_std"] = routing_std(heads)
        uncertainties["total_std"] = total_std(scores.layout.calibrated(heads))
    if scores.text_std is not None:
        uncertainties["last_layer_std"] = scores.text_std
    return {name: value.numpy().astype(float) for name, value in uncertainties.items()}


def tells_apart(
    inside: dict[str, Float[ndarray, " inside"]],
    outside: dict[str, Float[ndarray, " outside"]],
    inside_unit: Int[ndarray, " inside_pairs"],
    outside_unit: Int[ndarray, " outside_pairs"],
    seed: int,
) -> Json:
    """AUROC with which each uncertainty of a text, and a random one, tells --ood texts from the file's.

    The two texts of a pair follow each other. The bootstrap draws them together with those of the same unit.
    """
    unit = np.concatenate([np.repeat(inside_unit, 2), np.repeat(outside_unit, 2) + inside_unit.max() + 1])
    foreign = np.repeat([0.0, 1.0], [2 * len(inside_unit), 2 * len(outside_unit)])
    values = {name: np.concatenate([value, outside[name]]) for name, value in inside.items()}
    values["random"] = np.random.default_rng(seed).random(len(unit))
    values = {name: value for name, value in values.items() if np.ptp(value) > 0}

    def statistics(counts: ndarray) -> ndarray:
        return np.column_stack([weighted_auroc(foreign, value, counts) for value in values.values()])

    points = statistics(np.ones((1, len(unit))))[0].tolist()
    intervals = bootstrap_intervals(statistics, unit, seed=seed).tolist()
    return {
        name: {"auroc": undefined_as_none(point), "auroc_interval": undefined_as_none(interval)}
        for name, point, interval in zip(values, points, intervals, strict=True)
    }


# ---- sets of texts ----


def judge_styles(questions: Questions, rewards: Float[ndarray, " texts"], seed: int) -> tuple[Json, Iterator[Json]]:
    """(RM-Bench results, rewards by row): every style of the chosen text against every style of the rejected one."""
    sets, length = (values.reshape(len(questions), 2, -1) for values in (rewards, questions.lengths.astype(float)))
    each = np.array([list(style_scores(style_matrix(s[:1], s[1:])).values()) for s in sets])
    matrix = style_matrix(sets[:, 0], sets[:, 1])
    scores, by_length = style_scores(matrix), style_scores(style_matrix(length[:, 0], length[:, 1]))
    drawn = intervals_of_means(each, questions.unit, seed)
    intervals = [interval_of_share(one, own, questions.unit) for one, own in zip(drawn, each.T, strict=True)]
    results: Json = {
        "num_sets": len(questions), "matrix": matrix.tolist(),
        "scores": {
            name: {"accuracy": score, "interval": interval, "length_accuracy": by_length[name]}
            for (name, score), interval in zip(scores.items(), intervals, strict=True)
        },
        "by_subset": {},
    }  # fmt: skip
    for name in sorted(set(questions.subset) - {""}):
        own = np.array([one == name for one in questions.subset])
        mean_of = dict(zip(scores, each[own].mean(0).tolist(), strict=True))
        results["by_subset"][name] = {"count": int(own.sum()), **mean_of}
    rows = zip(questions.subset, sets, strict=True)
    return results, ({"subset": name, "chosen": s[0].tolist(), "rejected": s[1].tolist()} for name, s in rows)


def judge_sets(questions: Questions, rewards: Float[ndarray, " texts"], seed: int) -> tuple[Json, Iterator[Json]]:
    """(best-of-n results, rewards by row) beside picking at random and picking the longest text."""
    sides, lengths = _sides(questions, rewards), _sides(questions, questions.lengths.astype(float))
    correct = np.array([picks_chosen(*side) for side in sides])
    longest = np.array([picks_chosen(*side) for side in lengths])
    chance = questions.sizes[:, 0] / questions.sizes.sum(1)
    values = np.column_stack([correct, correct - chance, correct - longest])
    (accuracy, over_chance, over_length), intervals = (
        values.mean(0).tolist(),
        intervals_of_means(values, questions.unit, seed),
    )
    results: Json = {
        "num_sets": len(questions), "accuracy": accuracy,
        "accuracy_interval": interval_of_share(intervals[0], correct, questions.unit),
        "chance": float(chance.mean()), "over_chance": over_chance, "over_chance_interval": intervals[1],
        "length_accuracy": float(longest.mean()), "over_length": over_length, "over_length_interval": intervals[2],
        "by_subset": by_subset(correct, chance, questions.subset),
    }  # fmt: skip
    rows = zip(questions.subset, sides, strict=True)
    return results, ({"subset": name, "chosen": c.tolist(), "rejected": r.tolist()} for name, (c, r) in rows)


def _sides(questions: Questions, values: Float[ndarray, " texts"]) -> list[list[ndarray]]:
    """Values of the chosen and of the rejected texts of every item."""
    ends = questions.sizes.sum(1).cumsum()[:-1]
    return [np.split(own, [chosen]) for own, (chosen, _) in zip(np.split(values, ends), questions.sizes, strict=True)]
