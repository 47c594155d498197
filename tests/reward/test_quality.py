"""Judgments of reward models by hand, and against the plain definitions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch

from poise.data.evaluation_sets import Item, Questions
from poise.functional.objectives import HeadRewards, RewardScale, mean, worst_case
from poise.functional.statistics import auroc
from poise.models.reward_model import HeadLayout, LastLayer
from poise.reward.quality import (
    PairJudgments,
    TextScores,
    by_subset,
    judge_pairs,
    judge_sets,
    judge_styles,
    pairs_of,
    tells_apart,
    text_uncertainties,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def item(chosen: str, rejected: str, subset: str = "") -> Item:
    return Item("Q", (chosen,), (rejected,), subset)


def pairs_like(count: int) -> Questions:
    return Questions.of("pairs", [item("c", "r")] * count)


TWO = Questions.of("pairs", [item("long", "s"), item("a", "bb")])
GAUSSIAN = HeadLayout(2, "gaussian", (0.0,) * 4, reward_scale=2.0, std_scale=(2.0, 0.5))
HEADS = HeadRewards(
    torch.tensor([[1.0, 3.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),  # chosen, rejected, chosen, rejected
    torch.tensor([[0.1, 0.4], [0.3, 0.2], [0.5, 0.6], [0.7, 0.5]]),
)


def test_uncertainties_of_pairs_equal_values_worked_out_by_hand() -> None:
    last_layer = LastLayer(torch.diag(torch.tensor([1.0, 2.0])), torch.zeros(2))
    features = torch.tensor([[3.0, 2.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    pairs = pairs_of(TextScores.of(HEADS, GAUSSIAN, last_layer, features), TWO, mean, seed=0)
    np.testing.assert_allclose(pairs.margin, [2.0 - 0.5, 0.0 - 0.5])
    np.testing.assert_allclose(pairs.probability, [sigmoid(3), sigmoid(-1)])
    heads = [(sigmoid(2) + sigmoid(4)) / 2, (sigmoid(-2) + sigmoid(0)) / 2]
    np.testing.assert_allclose(pairs.heads_probability, heads)
    expected = {
        "disagreement": [0.5, 0.5],  # margins (1, 2) and (-1, 0)
        "routing_std": [0.2, 0.5],
        # stds as error bars: (.2, .2) and (.6, .1); (1, .3) and (1.4, .25)
        "total_std": [
            math.sqrt((0.04 + 0.36 + 0.04 + 0.01) / 2 + 0.25),
            math.sqrt((1.0 + 1.96 + 0.09 + 0.0625) / 2 + 0.25),
        ],
        "last_layer_std": [5.0, 2.0],  # |(3, 2 * 2)|, |(0, 2 * 1)|
        "small_margin": [-1.5, -0.5],
        "error_probability": [1 - heads[0], heads[1]],
    }
    del expected["disagreement"]  # the same for both pairs: says nothing, left out
    assert list(pairs.uncertainties) == [*expected, "random"]
    for name, values in expected.items():
        np.testing.assert_allclose(pairs.uncertainties[name], values, rtol=1e-6, err_msg=name)
    assert pairs.correct.tolist() == [1.0, 0.0]
    assert pairs.longer.tolist() == [1.0, 0.0]


def test_the_objective_orders_pairs_and_heads_keep_their_own_probability() -> None:
    pairs = pairs_of(TextScores(HEADS, GAUSSIAN), TWO, worst_case, seed=0)
    np.testing.assert_allclose(pairs.margin, [1.0 - 0.0, 0.0 - 0.0])
    assert pairs.correct.tolist() == [1.0, 0.5]
    np.testing.assert_allclose(pairs.heads_probability[0], (sigmoid(2) + sigmoid(4)) / 2)


def test_an_absurd_margin_has_a_finite_cost() -> None:
    heads = HeadRewards(torch.tensor([[-5000.0], [5000.0], [1.0], [0.0]]), torch.zeros(4, 1))
    pairs = pairs_of(TextScores(heads, HeadLayout(1, "point", (0.0,))), TWO, mean, seed=0)
    assert 600 < judge_pairs(pairs, TWO, seed=0)["probability"]["nll"] * 2 < 800


@pytest.mark.parametrize("judge", [judge_sets, judge_styles])
def test_sixteen_copies_of_a_set_are_worth_one(judge: Callable[..., tuple[Any, Any]]) -> None:
    sets = [Item(f"Q{n}", ("c1", "c2", "c3"), ("r1", "r2", "r3")) for n in range(25)]
    rewards = np.random.default_rng(0).normal(size=150)
    once, _ = judge(Questions.of(None, sets), rewards, seed=0)
    often, _ = judge(Questions.of(None, sets * 16), np.tile(rewards, 16), seed=0)
    if judge is judge_sets:
        assert often["accuracy_interval"] == pytest.approx(once["accuracy_interval"])
    else:
        assert often["scores"]["hard"]["interval"] == pytest.approx(once["scores"]["hard"]["interval"])


def test_point_heads_have_no_stds_and_one_head_no_disagreement() -> None:
    layout = HeadLayout(1, "point", (0.0,))
    one = HeadRewards(HEADS.mean[:, :1], torch.zeros(4, 1))
    assert list(pairs_of(TextScores(one, layout), TWO, mean, seed=0).uncertainties) == ["random"]  # |margins| are equal
    several = HeadRewards(torch.tensor([[1.0, 3.0], [0.0, 1.0], [0.0, 0.0], [2.0, 0.0]]), torch.zeros(4, 2))
    named = pairs_of(TextScores(several, HeadLayout(2, "point", (0.0, 0.0))), TWO, mean, seed=0).uncertainties
    assert list(named) == ["disagreement", "small_margin", "error_probability", "random"]


def made_up(num_pairs: int = 400, wrong: float = 0.3) -> PairJudgments:
    """Pairs with an uncertainty that knows the errors and one that does not."""
    generator = np.random.default_rng(0)
    margin = np.where(generator.random(num_pairs) < wrong, -1.0, 1.0) * generator.uniform(0.1, 2, num_pairs)
    probability = 1 / (1 + np.exp(-margin))
    knowing = generator.normal(size=num_pairs) + 2 * (margin < 0)
    uncertainties = {"disagreement": knowing, "random": generator.random(num_pairs)}
    longer = generator.choice([0.0, 0.5, 1.0], num_pairs)
    return PairJudgments(margin, probability, probability, uncertainties, longer, np.arange(num_pairs))


def test_judged_pairs_are_the_plain_definitions() -> None:
    pairs = made_up()
    items = Questions.of("pairs", [item(f"c{i}", f"r{i}") for i in range(400)])
    judged = judge_pairs(pairs, items, seed=0)
    wrong = pairs.margin < 0
    accuracy = 1 - wrong.mean()
    assert judged["num_pairs"] == judged["num_distinct"] == 400
    assert judged["accuracy"] == pytest.approx(accuracy)
    error = math.sqrt(accuracy * (1 - accuracy) / 400)
    assert judged["accuracy_interval"] == pytest.approx([accuracy - 1.96 * error, accuracy + 1.96 * error], abs=0.01)
    assert judged["over_length"] == pytest.approx(accuracy - pairs.longer.mean())
    agree = np.where(pairs.longer == 0.5, 0.5, (pairs.longer == 1) == ~wrong)
    assert judged["agreement_with_length"] == pytest.approx(agree.mean())
    assert judged["coin_nll"] == pytest.approx(math.log(2))
    assert judged["constant_nll"] == pytest.approx(
        sklearn.metrics.log_loss(~wrong, np.full(400, accuracy), labels=[False, True])
    )
    low, high = judged["probability"]["nll_interval"]
    assert judged["probability"]["nll"] == pytest.approx(-np.log(pairs.probability).mean())
    assert low < judged["probability"]["nll"] < high
    for name, known in judged["uncertainties"].items():
        value = pairs.uncertainties[name]
        assert known["auroc"] == pytest.approx(auroc(value[wrong], value[~wrong]))
        assert known["auroc_interval"][0] < known["auroc"] < known["auroc_interval"][1]
        order = np.argsort(value)
        assert known["aurc"] == pytest.approx((np.cumsum(wrong[order]) / np.arange(1, 401)).mean())
        assert known["aurc_excess"] == pytest.approx(known["aurc"] - wrong.mean())
        assert judged["risk_coverage"]["risk"][name][-1] == pytest.approx(wrong.mean())
    knowing, random = judged["uncertainties"]["disagreement"], judged["uncertainties"]["random"]
    assert knowing["auroc_interval"][0] > 0.8
    assert knowing["aurc_excess_interval"][1] < -0.1
    assert random["auroc_interval"][0] < 0.5 < random["auroc_interval"][1]
    assert random["aurc_excess_interval"][0] < 0 < random["aurc_excess_interval"][1]
    assert judged["risk_coverage"]["coverage"][-1] == 1.0
    assert judged["by_subset"] is None


def test_interval_of_an_auroc_covers_the_truth_as_often_as_it_says() -> None:
    """Wrong pairs N(1, 1), right ones N(0, 1): the AUROC is Phi(1 / sqrt(2))."""
    truth, covered = 0.5 * (1 + math.erf(0.5)), 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        margin = np.where(generator.random(150) < 0.3, -1.0, 1.0)
        value = generator.normal(size=150) + (margin < 0)
        probability = np.full(150, 0.6)
        pairs = PairJudgments(margin, probability, probability, {"disagreement": value}, margin * 0, np.arange(150))
        judged = judge_pairs(pairs, pairs_like(150), seed)
        low, high = judged["uncertainties"]["disagreement"]["auroc_interval"]
        covered += low <= truth <= high
    assert 0.87 <= covered / 60 <= 1.0


def test_a_model_without_a_mistake_leaves_nothing_to_tell() -> None:
    pairs = made_up(20, wrong=0.0)
    judged = judge_pairs(pairs, pairs_like(20), seed=0)
    assert judged["accuracy_interval"] == pytest.approx([0.025 ** (1 / 20), 1.0])  # exact: 20 of 20
    assert judged["uncertainties"]["disagreement"]["auroc"] is None
    assert judged["uncertainties"]["disagreement"]["aurc_excess"] == 0.0
    assert judged["mistakes"] == []


def test_twenty_votes_on_each_of_twenty_pairs_are_worth_twenty_pairs() -> None:
    few = made_up(20)
    repeated = {name: np.repeat(value, 20) for name, value in few.uncertainties.items()}
    votes = PairJudgments(
        np.repeat(few.margin, 20), np.repeat(few.probability, 20), np.repeat(few.heads_probability, 20),
        repeated, np.repeat(few.longer, 20), np.arange(400) // 20,
    )  # fmt: skip
    once, often = judge_pairs(few, pairs_like(20), seed=0), judge_pairs(votes, pairs_like(400), seed=0)
    assert (often["num_pairs"], often["num_distinct"]) == (400, 20)
    assert often["accuracy_interval"] == pytest.approx(once["accuracy_interval"])
    for name in repeated:
        first, second = (judged["uncertainties"][name]["auroc_interval"] for judged in (once, often))
        assert second == pytest.approx(first)


def test_the_surest_mistakes_come_first_and_once() -> None:
    margin = np.array([1.0, -2.0, -0.5, -3.0, -2.0])
    p = 1 / (1 + np.exp(-margin))
    pairs = PairJudgments(margin, p, p, {}, np.zeros(5), np.array([0, 1, 2, 3, 1]))
    items = Questions.of("pairs", [item(f"c{i}", f"r{i}", "s") for i in range(5)])
    mistakes = judge_pairs(pairs, items, seed=0)["mistakes"]
    assert [(m["chosen"], m["margin"]) for m in mistakes] == [("c3", -3.0), ("c1", -2.0), ("c2", -0.5)]
    wrong = PairJudgments(-np.arange(1.0, 4.0), p[:3], p[:3], {}, np.zeros(3), np.arange(3))  # no pair is right
    three = Questions.of("pairs", [item(f"c{i}", f"r{i}", "s") for i in range(3)])
    assert [m["margin"] for m in judge_pairs(wrong, three, seed=0)["mistakes"]] == [-3.0, -2.0, -1.0]


def test_numbers_by_subset_equal_values_worked_out_by_hand() -> None:
    correct, longer = np.array([1.0, 0.0, 0.5, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])
    mine = by_subset(correct, longer, ["b", "b", "b", "a"])
    assert mine == {
        "subsets": {
            "a": {"count": 1, "accuracy": 1.0, "baseline": 0.0},
            "b": {"count": 3, "accuracy": 0.5, "baseline": pytest.approx(2 / 3)},
        },
        "sections": {}, "mean": 0.75,
    }  # fmt: skip
    names = ("math-prm", "hep-go", "hep-cpp", "donotanswer")
    theirs = by_subset(correct, longer, list(names))
    assert theirs is not None
    assert theirs["sections"] == {"Safety": 1.0, "Reasoning": pytest.approx((1.0 + 0.25) / 2)}
    assert theirs["mean"] == pytest.approx((1.0 + 0.625) / 2)


def test_uncertainties_of_texts_ignore_what_a_head_adds_to_every_reward() -> None:
    last_layer = LastLayer(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 0.0]))
    features = torch.tensor([[4.0, 2.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    baseline = RewardScale.fit(HEADS, mean)
    named = text_uncertainties(TextScores.of(HEADS, GAUSSIAN, last_layer, features), baseline)
    centered = HEADS.mean.numpy() - HEADS.mean.numpy().mean(0)
    np.testing.assert_allclose(named["disagreement"], centered.std(-1), rtol=1e-6)
    np.testing.assert_allclose(named["routing_std"], [0.1, 0.2, 0.5, 0.5], rtol=1e-6)
    spread = np.square(HEADS.std.numpy() * [2.0, 0.5]).mean(-1) + centered.std(-1) ** 2
    np.testing.assert_allclose(named["total_std"], np.sqrt(spread), rtol=1e-6)
    np.testing.assert_allclose(named["last_layer_std"], [5.0, 0.0, 2.0, 0.0])
    shifted = HeadRewards(HEADS.mean + torch.tensor([0.0, 100.0]), HEADS.std)
    again = text_uncertainties(TextScores(shifted, GAUSSIAN), RewardScale.fit(shifted, mean))
    np.testing.assert_allclose(again["disagreement"], named["disagreement"], rtol=1e-4)


def test_other_data_is_told_apart_by_auroc() -> None:
    generator = np.random.default_rng(0)
    inside = {"disagreement": generator.normal(size=60), "total_std": np.ones(60)}
    outside = {"disagreement": generator.normal(size=40) + 1, "total_std": np.ones(40)}
    found = tells_apart(inside, outside, np.arange(30), np.arange(20), seed=0)
    assert list(found) == ["disagreement", "random"]  # the constant one is left out
    known = found["disagreement"]
    assert known["auroc"] == pytest.approx(auroc(outside["disagreement"], inside["disagreement"]))
    assert 0.5 < known["auroc_interval"][0] < known["auroc"] < known["auroc_interval"][1] < 1
    assert found["random"]["auroc_interval"][0] < 0.5 < found["random"]["auroc_interval"][1]


def test_styles_equal_values_worked_out_by_hand() -> None:
    items = [Item("Q", ("a", "bb", "ccc"), ("d", "ee", "fff"), "chat"), Item("Q", ("a",) * 3, ("b",) * 3, "math")]
    rewards = np.array([5.0, 1.0, 2.0, 1.0, 3.0, 4.0, 0.0, 9.0, 3.0, 1.0, 2.0, 3.0])
    results, rows = judge_styles(Questions.of("rm_bench", items), rewards, seed=0)
    assert results["matrix"] == [[0.5, 0.5, 0.5], [0.75, 0.5, 0.5], [1.0, 0.5, 0.25]]
    scores = results["scores"]
    assert scores["hard"]["accuracy"] == pytest.approx(0.5)
    # The first row's length follows its style, the second's says nothing.
    assert {name: score["length_accuracy"] for name, score in scores.items()} == pytest.approx(
        {"easy": 0.75, "normal": 0.5, "hard": 0.25, "mean": 0.5}
    )
    # Row 1 hard: 5 > 3, 5 > 4, 1 < 4. Row 2: 0 < 2, 0 < 3, 9 > 3.
    assert [results["by_subset"][name]["hard"] for name in ("chat", "math")] == pytest.approx([2 / 3, 1 / 3])
    assert scores["hard"]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)  # Wilson's of 1 in 2
    assert list(rows)[1] == {"subset": "math", "chosen": [0.0, 9.0, 3.0], "rejected": [1.0, 2.0, 3.0]}


def test_styles_that_are_always_right_have_an_interval_of_some_width() -> None:
    """A bootstrap of thirty sets, all right, says 100 % to 100 %; shares below p are refuted once p^30 < 2.5 %."""
    items = [Item(f"Q{i}", ("a",) * 3, ("b",) * 3) for i in range(30)]
    rewards = np.tile([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 30)
    results, _ = judge_styles(Questions.of("rm_bench", items), rewards, seed=0)
    assert results["scores"]["hard"]["interval"] == pytest.approx([0.025 ** (1 / 30), 1.0])


def test_sets_by_hand() -> None:
    items = [
        Item("Q", ("aa",), ("b", "c", "d"), "x"),
        Item("Q", ("a", "b"), ("cc",), "y"),
        Item("Q", ("a",), ("b",), "y"),
    ]
    rewards = np.array([2.0, 1.0, 0.0, -1.0, 1.0, 3.0, 4.0, 5.0, 5.0])
    results, rows = judge_sets(Questions.of("best_of_n", items), rewards, seed=0)
    assert results["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert results["chance"] == pytest.approx((1 / 4 + 2 / 3 + 1 / 2) / 3)
    assert results["length_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert results["over_chance"] == pytest.approx(results["accuracy"] - results["chance"])
    assert results["over_length"] == pytest.approx(0.0)
    assert results["over_length_interval"] == [0.0, 0.0]
    assert results["by_subset"]["subsets"]["y"] == {
        "count": 2, "accuracy": 0.25, "baseline": pytest.approx((2 / 3 + 1 / 2) / 2),
    }  # fmt: skip
    assert list(rows)[1] == {"subset": "y", "chosen": [1.0, 3.0], "rejected": [4.0]}
