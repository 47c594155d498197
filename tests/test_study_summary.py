"""Means over seeds and differences between arms: by hand."""

import json
import random
from typing import Any

import pytest

from poise.study_summary import MEASURES, measured, summary


def cell(arm: str, reward_seed: int, policy_seed: int, gold: float) -> dict[str, Any]:
    return {
        "noise": "0.25",
        "arm": arm,
        "reward_seed": reward_seed,
        "policy_seed": policy_seed,
        "cpu_hours": 0.5,
    } | dict.fromkeys(MEASURES, gold)


def test_measures_by_hand() -> None:
    arm = {
        "steps": [{"gold": gold} for gold in (0.0, 1.0, 0.5, 0.5, 1.5)], "initial_gold": 0.2, "initial_gold_std": 0.5,
        "peak_gold": 1.0, "drawdown": 0.4,
        "final": {"gold": 0.7, "interval": [0.6, 0.8], "proxy": 3.0, "kl": 9.0, "distinct_bigrams": 0.5},
    }  # fmt: skip
    found = measured(arm)
    assert found.keys() == {*MEASURES, "interval_over_prompts"}
    assert found["mean_gold"] == pytest.approx(0.7)
    assert found["gold_std"] == pytest.approx(1 / 3**0.5)  # of .5, .5 and 1.5
    assert found["over_scoring"] == pytest.approx(3.0 - 0.5 / 0.5)  # gold has gained one std
    assert measured(arm | {"steps": [{"gold": 1.0}]})["gold_std"] == 0.0


def test_summary_by_hand() -> None:
    cells = [
        cell("single", 0, 0, 1.0), cell("single", 0, 1, 2.0), cell("single", 1, 0, 4.0),
        cell("brme_0.4", 0, 0, 2.0), cell("brme_0.4", 0, 1, 2.0), cell("brme_0.4", 2, 0, 9.0),
    ]  # fmt: skip
    random.Random(0).shuffle(cells)
    found = summary(cells, ("single", "brme_0.4"))["0.25"]
    single, brme = found["single"], found["brme_0.4"]
    assert single["final_gold"]["mean"] == (1.5 + 4.0) / 2  # policy seeds first, then reward seeds
    assert "less_first" not in single["final_gold"]
    assert brme["final_gold"]["mean"] == (2.0 + 9.0) / 2
    assert brme["final_gold"]["less_first"] == 0.5  # seeds that both have: (1 + 0) / 2
    assert brme["final_gold"]["less_first_interval"] is None  # of one reward model
    assert (brme["reward_seeds"], brme["policies"], brme["cpu_hours"]) == (2, 3, 1.5)
    assert single["final_gold"]["std"] == pytest.approx(2.5 / 2**0.5)
    assert json.dumps(found)


def checked(arm: str, reward_seed: int, means: list[float]) -> dict[str, Any]:
    """A cell that was asked LAMBADA at steps 0, 10, …"""
    std = (means[1] - means[0]) / 2 if len(means) > 1 else None
    moves = {"std": std, "range": abs(means[-1] - means[0]), "largest_drop": max(means[0] - means[-1], 0.0)}
    asked = {"lambada": {"steps": [10 * i for i in range(len(means))], "mean": means, **moves}}
    return cell(arm, reward_seed, 0, 0.0) | {"checkpoints": asked}


def test_checkpoints_by_hand() -> None:
    cells = [
        checked("single", 0, [0.4, 0.2]), checked("single", 1, [0.4, 0.0]), cell("single", 2, 0, 1.0),
        checked("brme_0.4", 1, [0.4, 0.3, 0.2]), checked("brme_0.4", 2, [0.4, 0.1]), cell("mean", 0, 0, 1.0),
    ]  # fmt: skip
    found = summary(cells, ("single", "brme_0.4", "mean"))["0.25"]
    assert "checkpoints" not in found["mean"]
    single, brme = found["single"]["checkpoints"]["lambada"], found["brme_0.4"]["checkpoints"]["lambada"]
    assert (single["reward_seeds"], single["steps"], single["mean"]) == (2, [0, 10], [0.4, 0.1])
    assert (single["low"], single["high"]) == ([0.4, 0.0], [0.4, 0.2])
    assert brme["steps"] == [0, 10]  # that all cells have
    assert brme["mean"] == [0.4, pytest.approx(0.2)]
    assert brme["range"]["mean"] == pytest.approx((0.2 + 0.3) / 2)
    assert brme["range"]["less_first"] == pytest.approx(0.2 - 0.4)  # seed 1, the only one that both have
    assert json.dumps(found)


def test_a_single_checkpoint_has_no_std() -> None:
    found = summary([checked("single", 0, [0.4])], ("single",))["0.25"]["single"]["checkpoints"]["lambada"]
    assert "std" not in found
    assert found["range"]["mean"] == 0.0
