"""Means over reward models of one kind, and paired differences between models of several."""

import math
from typing import Any

import numpy as np
import pytest

from poise.reward.model_comparison import differences, over_rewards
from poise.runtime.run_folder import Json


def model(accuracy: float, kind: str = "point", num_heads: int = 1, **known: float) -> Json:
    return {
        "reward": f"{kind}-{num_heads}", "kind": kind, "num_heads": num_heads,
        "pairs": {
            "accuracy": accuracy, "over_length": 0.0, "probability": {"nll": 0.6},
            "uncertainties": {name: {"auroc": auroc} for name, auroc in known.items()},
        },
    }  # fmt: skip


def pair_rows(correct: list[float], probability: list[float], data: str = "file") -> list[Json]:
    return [{"data": data, "correct": c, "probability": p} for c, p in zip(correct, probability, strict=True)]


def test_mean_over_models_equals_the_one_worked_out_by_hand() -> None:
    over = over_rewards([model(0.6, random=0.5, disagreement=0.7), model(0.7, random=0.4), model(0.8, random=0.6)])
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert over["pairs accuracy"] == {
        "mean": pytest.approx(0.7), "interval": pytest.approx([0.7 - reach, 0.7 + reach]), "values": [0.6, 0.7, 0.8],
    }  # fmt: skip
    assert "pairs AUROC of errors, random" in over
    assert "pairs AUROC of errors, disagreement" not in over  # not all have it
    assert over_rewards([model(0.6)]) == {}


def test_means_of_sets_are_taken_with_what_chance_gives() -> None:
    models = [{"kind": "point", "num_heads": 1, "sets": {"accuracy": a, "over_chance": a - 0.25}} for a in (0.5, 1.0)]
    over = over_rewards(models)
    assert {name: one["values"] for name, one in over.items()} == {"accuracy": [0.5, 1], "over chance": [0.25, 0.75]}
    assert over["accuracy"]["interval"] == pytest.approx([0.75 - 12.7062047 * 0.25, 0.75 + 12.7062047 * 0.25])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
def test_interval_over_few_models_covers_the_truth_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        drawn = generator.normal(0.7, 0.05, count).tolist()
        low, high = over_rewards([model(value) for value in drawn])["pairs accuracy"]["interval"]
        covered += low <= 0.7 <= high
    assert 0.93 < covered / 1000 < 0.97


@pytest.mark.parametrize("other", [{"kind": "gaussian"}, {"num_heads": 5}])
def test_models_of_two_kinds_are_not_averaged(other: dict[str, Any]) -> None:
    models = [model(0.5), model(0.75, **other)]
    assert over_rewards(models) == {}
    rows = [pair_rows([1, 0, 1, 0], [0.8, 0.4, 0.5, 0.5]), pair_rows([1, 1, 1, 0], [0.4, 0.8, 0.5, 0.5])]
    [found] = differences(models, rows, "pairs", {"file": np.arange(4)}, seed=0)
    assert (found["reward"], found["versus"]) == (models[1]["reward"], models[0]["reward"])
    # Student's, of differences 0, 1, 0, 0: their std is 1/2
    assert found["pairs accuracy"] == {"mean": 0.25, "interval": pytest.approx([-0.5456, 1.0456], abs=1e-4)}
    assert found["pairs NLL"]["mean"] == pytest.approx(0.0)
    assert differences([models[0]] * 2, rows, "pairs", {"file": np.arange(4)}, seed=0) == []
    same = differences(models, [rows[0], rows[0]], "pairs", {"file": np.arange(4)}, seed=0)
    assert same[0]["pairs NLL"] == {"mean": 0.0, "interval": [0.0, 0.0]}  # paired: equal rows differ nowhere


def test_votes_on_one_pair_are_drawn_together() -> None:
    models = [model(0.5), model(0.5, kind="gaussian")]
    generator = np.random.default_rng(0)
    one, other = generator.uniform(0.1, 0.9, (2, 30))

    def width(repeats: int) -> float:
        rows = [pair_rows([1.0] * 30 * repeats, np.repeat(p, repeats).tolist()) for p in (one, other)]
        [found] = differences(models, rows, "pairs", {"file": np.repeat(np.arange(30), repeats)}, seed=0)
        low, high = found["pairs NLL"]["interval"]
        return high - low

    assert width(10) == pytest.approx(width(1))


def test_differences_of_sets_equal_values_worked_out_by_hand() -> None:
    models = [model(0.5), model(0.5, kind="gaussian")]
    good, bad = {"chosen": [2.0], "rejected": [1.0, 0.0]}, {"chosen": [0.0], "rejected": [1.0, 0.0]}
    [found] = differences(models, [[good, bad], [good, good]], "best_of_n", {"file": np.arange(2)}, seed=0)
    assert found["accuracy"]["mean"] == 0.5
    styles = {"chosen": [1.0, 2.0, 3.0], "rejected": [0.0, 0.0, 0.0]}
    wrong = {"chosen": [0.0, 2.0, 3.0], "rejected": [1.0, 1.0, 1.0]}
    [found] = differences(models, [[styles], [wrong]], "rm_bench", {"file": np.arange(1)}, seed=0)
    assert found["normal accuracy"]["mean"] == pytest.approx(-1 / 3)
