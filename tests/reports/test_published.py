"""What counts as a replication: by hand."""

from typing import Any

import pytest

from poise.reports.published import as_read_today, published


def cells(noise: str = "0", measure: str = "final_gold", **of_arm: tuple[float, ...]) -> list[dict[str, Any]]:
    """One policy for each reward model of each arm; `brme` stands for brme_0.4."""
    return [
        {"noise": noise, "arm": "brme_0.4" if arm == "brme" else arm, "reward_seed": seed, "policy_seed": 0}
        | {"final_gold": 0.0, "drawdown": 0.0, measure: value}
        for arm, values in of_arm.items()
        for seed, value in enumerate(values)
    ]


def gained(low: float, mean: float, high: float, seeds: int = 20) -> dict[str, Any]:
    measure = {"relative_gain": {"mean": mean, "interval": [low, high]}}
    return {"best_of_n": {"0": {"mean": {"seeds": seeds, "measures": measure}}}}


def more_accurate(low: float, mean: float, high: float, seeds: int = 20) -> dict[str, Any]:
    """Of the BRME's nominal head, whose published gain is 1.1 points."""
    measure = {"accuracy": {"vs_baseline": mean, "vs_baseline_interval": [low, high]}}
    return {"best_of_n": {"0": {"brme_1": {"seeds": seeds, "measures": measure}}}}


@pytest.mark.parametrize(
    ("gain", "kind"),
    [
        ((0.005, 0.01, 0.015), "yes"), ((0.002, 0.005, 0.01), "smaller"), ((-0.01, 0.005, 0.01), "no"),
        ((-0.01, 0.01, 0.03), "open"), ((-0.05, -0.04, -0.01), "no"),
    ],
)  # fmt: skip
def test_an_interval_decides(gain: tuple[float, float, float], kind: str) -> None:
    [row] = published(more_accurate(*gain))
    assert (row["replicated"], row["published"]) == (kind, "+1.1 %, read as points")


@pytest.mark.parametrize("gain", [(0.1, 0.2, 0.35), (-0.1, 0.1, 0.2), (-0.1, 0.3, 0.7), (-0.5, -0.4, -0.1)])
def test_what_was_measured_on_other_terms_is_not_comparable(gain: tuple[float, float, float]) -> None:
    """Ensembles' gains are of pairs that gold labeled: no interval of ours says yes or no to them."""
    [row] = published(gained(*gain))
    assert (row["replicated"], row["published"]) == ("not comparable", "+30%")
    assert row["here"].startswith(f"{gain[1]:+.0%} (")


def test_answers_that_earlier_versions_stored_are_read_as_today() -> None:
    stored = [
        {"claim": "as good (2310.02743)", "replicated": "no"},
        {"claim": "steadier (2409.15360)", "replicated": "unclear"},
        {"claim": "more (2409.15360)", "replicated": "no"}, {"claim": "most (2409.15360)", "replicated": "yes"},
    ]  # fmt: skip
    found = [(row["claim"].split(" (")[0], row["replicated"]) for row in as_read_today(stored)]
    assert found == [("more", "no"), ("steadier", "open"), ("as good", "not comparable"), ("most", "yes")]


def test_a_single_reward_model_answers_nothing() -> None:
    assert published(gained(0.1, 0.2, 0.4, seeds=1)) == []
    assert published({"cells": cells(single=(0.0,), brme=(0.5,))}) == []


@pytest.mark.parametrize(
    ("fall", "kind"), [((-0.3, -0.2, -0.25), "yes"), ((0.3, 0.2, 0.25), "no"), ((-0.1, 0.1, 0.05), "open")]
)
def test_less_drawdown_is_the_good_side(fall: tuple[float, ...], kind: str) -> None:
    found = published({"cells": cells(measure="drawdown", mean=(9.0,), single=(0.0, 0.0, 0.0), brme=fall)})
    assert [row["replicated"] for row in found if "falls less" in row["claim"]] == [kind]


def test_failures_come_first() -> None:
    rising = cells(single=(0.0, 0.0, 0.0), brme=(0.1, 0.2, 0.15))
    best_of_n = more_accurate(-0.01, 0.005, 0.01)["best_of_n"]["0"] | gained(-0.1, 0.1, 0.2)["best_of_n"]["0"]
    kinds = [row["replicated"] for row in published({"best_of_n": {"0": best_of_n}, "cells": rising})]
    assert kinds == ["no", "open", "not comparable", "yes"]  # nothing fell more or less


def test_policies_are_compared_where_both_arms_were_trained() -> None:
    """With the arm that the claim names, whichever the study's first is."""
    of_arm: dict[str, tuple[float, ...]] = {"mean": (0.1, 0.2, 0.9), "single_large_kl": (0.4, 0.5)}
    rows = published({"cells": cells("raters", **of_arm, brme_large_kl=(0.5, 0.8))})
    assert [(row["replicated"], row["here"]) for row in rows] == [
        ("open", "+0.20 (-1.07 to +1.47)"),
        ("not comparable", "-0.30 (-0.30 to -0.30)"),  # the mean's third reward model has no partner
    ]
    assert all("single raters’ labels" in row["claim"] for row in rows)


def test_steadiness_is_that_of_a_benchmark() -> None:
    policies = cells(single=(0.0, 0.0), brme=(0.0, 0.0))
    for cell, fall in zip(policies, (0.4, 0.3, 0.1, 0.02), strict=True):
        cell["checkpoints"] = {"lambada": {"steps": [0, 10], "mean": [0.4, 0.4 - fall]}}
    [row] = [row for row in published({"cells": policies}) if "lambada" in row["claim"]]
    assert row["here"].startswith("-0.21 (")  # std of two checkpoints: their difference over the root of 2
    assert row["replicated"] == "yes"


def test_benchmarks_against_one_head_and_not_against_the_start() -> None:
    contrast = {"difference": 0.012, "interval": [-0.02, 0.04], "against": "single"}
    [row] = published({"benchmarks": {"contrasts": {"0": {"brme_0.4": contrast}}}})
    assert (row["replicated"], row["here"]) == ("open", "+1.2% (-2.0% to +4.0%)")
    assert published({"benchmarks": {"contrasts": {"0": {"brme_0.4": contrast | {"against": "mean"}}}}}) == []
