"""Means over seeds and differences between arms: by hand."""

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from poise.reports.summary import MEASURES, contrasts, measured, summary


def cell(arm: str, reward_seed: int, policy_seed: int, gold: float) -> dict[str, Any]:
    return {
        "noise": "0.25",
        "arm": arm,
        "reward_seed": reward_seed,
        "policy_seed": policy_seed,
        "cpu_hours": 0.5,
    } | dict.fromkeys(MEASURES, gold)


def test_measures_equal_values_worked_out_by_hand() -> None:
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


def test_the_summary_equals_one_worked_out_by_hand() -> None:
    cells = [
        cell("single", 0, 0, 1.0), cell("single", 0, 1, 2.0), cell("single", 1, 0, 4.0),
        cell("brme_0.4", 0, 0, 2.0), cell("brme_0.4", 0, 1, 2.0), cell("brme_0.4", 2, 0, 9.0),
    ]  # fmt: skip
    random.Random(0).shuffle(cells)
    found = summary(cells, ("single", "brme_0.4"))["0.25"]
    single, brme = found["single"], found["brme_0.4"]
    assert single["final_gold"]["mean"] == (1.5 + 4.0) / 2  # policy seeds first, then reward seeds
    assert "vs_baseline" not in single["final_gold"]
    assert brme["final_gold"]["mean"] == (2.0 + 9.0) / 2
    assert brme["final_gold"]["vs_baseline"] == 0.5  # seeds that both have: (1 + 0) / 2
    assert brme["final_gold"]["vs_baseline_interval"] is None  # of one reward model
    assert (brme["reward_seeds"], brme["policies"], brme["cpu_hours"]) == (2, 3, 1.5)
    assert single["final_gold"]["std"] == pytest.approx(2.5 / 2**0.5)
    assert json.dumps(found)


def checked(arm: str, reward_seed: int, means: list[float], every: int = 10) -> dict[str, Any]:
    """A cell that was asked LAMBADA at steps 0, `every`, …"""
    asked = {"lambada": {"steps": [every * i for i in range(len(means))], "mean": means}}
    return cell(arm, reward_seed, 0, 0.0) | {"checkpoints": asked}


def test_checkpoints_equal_values_worked_out_by_hand() -> None:
    cells = [
        checked("single", 0, [0.4, 0.3, 0.2], every=5), checked("single", 1, [0.4, 0.0]), cell("single", 2, 0, 1.0),
        checked("brme_0.4", 1, [0.4, 0.3, 0.2]), checked("brme_0.4", 2, [0.4, 0.1]), cell("mean", 0, 0, 1.0),
    ]  # fmt: skip
    found = summary(cells, ("single", "brme_0.4", "mean"))["0.25"]
    assert "checkpoints" not in found["mean"]
    single, brme = found["single"]["checkpoints"]["lambada"], found["brme_0.4"]["checkpoints"]["lambada"]
    assert (single["reward_seeds"], single["steps"], single["mean"]) == (2, [0, 10], [0.4, 0.1])
    assert single["interval"][0] == [0.4, 0.4]
    assert brme["steps"] == [0, 10]  # that all cells have, of whichever arm
    assert brme["mean"] == [0.4, pytest.approx(0.2)]
    assert brme["range"]["mean"] == pytest.approx((0.1 + 0.3) / 2)
    assert brme["range"]["vs_baseline"] == pytest.approx(0.1 - 0.4)  # seed 1, the only one that both have
    assert brme["largest_drop"]["vs_baseline_interval"] is None
    assert json.dumps(found)


def test_without_the_first_arm_there_is_no_difference() -> None:
    cells = [checked("brme_0.4", 0, [0.4, 0.3]), checked("mean", 0, [0.4, 0.1])]
    found = summary(cells, ("single", "brme_0.4", "mean"))["0.25"]
    assert "vs_baseline" not in found["mean"]["checkpoints"]["lambada"]["std"]
    assert "vs_baseline" not in found["mean"]["final_gold"]


def test_one_checkpoint_does_not_move() -> None:
    found = summary([checked("single", 0, [0.4])], ("single",))["0.25"]["single"]["checkpoints"]["lambada"]
    assert "std" not in found
    assert found["interval"] == [None]


def test_contrasts_of_benchmarks_equal_values_worked_out_by_hand() -> None:
    def policy(arm: str, seed: int, **tasks: str) -> dict[str, Any]:
        outcomes = {task: {"outcomes": text} for task, text in tasks.items()}
        return {"name": f"runs/study/noise-0/reward-{seed}/policy-0/{arm}", "tasks": outcomes}

    policies = [
        {"name": "SmolLM2-135M-Instruct", "tasks": {}},
        policy("single", 0, race="0011", piqa="01"), policy("brme_0.4", 0, race="0111", piqa="01"),
        policy("single", 1, race="0011", piqa="11"), policy("brme_0.4", 1, race="0011", piqa="11"),
        policy("mean", 0, race="0011", piqa="01"),
    ]  # fmt: skip
    for one in policies[1:]:
        one["tasks"]["boolq"] = {"outcomes": "1"}  # of a single row nothing is known
    found = contrasts(policies, ("single", "brme_0.4", "mean"))
    assert found.keys() == {"0"}
    assert found["0"].keys() == {"brme_0.4"}  # the mean has one reward model
    one = found["0"]["brme_0.4"]
    assert (one["against"], one["reward_seeds"], one["rows"]) == ("single", 2, 6)
    assert one["difference"] == (0.125 + 0.0) / 2
    # Rows: race differs by 0, .5, 0, 0, of variance 1/16; piqa by nothing. Reward models: .125 and 0.
    over_rows, over_rewards = 1 / 16 / 4 / 4, 0.125**2 / 2 / 2
    freedom = (over_rows + over_rewards) ** 2 / (over_rewards**2 + over_rows**2 / 5)
    reach = stats.t.ppf(0.975, freedom) * (over_rows + over_rewards) ** 0.5
    assert one["interval"] == pytest.approx([0.0625 - reach, 0.0625 + reach])


def test_contrasts_cover_as_often_as_they_say() -> None:
    """Nothing differs: rows and reward models both add noise, and the interval holds zero about 95 times in 100."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        policies = []
        for seed, arm in itertools.product(range(3), ("single", "brme_0.4")):
            skill = 0.4 + 0.05 * generator.normal()
            tasks = {f"t{i}": {"outcomes": "".join(map(str, generator.binomial(1, skill, 25)))} for i in range(8)}
            policies.append({"name": f"noise-0/reward-{seed}/policy-0/{arm}", "tasks": tasks})
        low, high = contrasts(policies, ("single", "brme_0.4"))["0"]["brme_0.4"]["interval"]
        hits += low <= 0 <= high
    assert hits >= 184
