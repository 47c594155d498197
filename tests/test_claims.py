"""What counts as a replication: by hand."""

from typing import Any

import pytest

from poise.claims import published


def results(gain: tuple[float, float, float], drawdown: tuple[float, float, float]) -> dict[str, Any]:
    measure = {"mean": gain[1], "interval": [gain[0], gain[2]]}
    return {
        "best_of_n": {"0": {"mean": {"measures": {"relative_gain": measure}}}},
        "cells": [],
        "summary": {
            "0": {
                "brme_0.4": {"drawdown": {"less_first": drawdown[1], "less_first_interval": [drawdown[0], drawdown[2]]}}
            }
        },
    }


@pytest.mark.parametrize(
    ("gain", "kind"),
    [((0.1, 0.2, 0.3), "yes"), ((-0.1, 0.1, 0.2), "no"), ((-0.1, 0.3, 0.7), "unclear"), ((-0.5, -0.4, -0.1), "no")],
)
def test_an_interval_decides(gain: tuple[float, float, float], kind: str) -> None:
    row = next(row for row in published(results(gain, (0.0, 0.0, 0.0))) if "best-of-n" in row["claim"])
    assert row["replicated"] == kind
    assert row["published"] == "+30%"


@pytest.mark.parametrize(
    ("fall", "kind"), [((-0.4, -0.2, -0.1), "yes"), ((0.1, 0.2, 0.3), "no"), ((-0.1, 0.0, 0.1), "unclear")]
)
def test_less_drawdown_is_the_good_side(fall: tuple[float, float, float], kind: str) -> None:
    row = next(row for row in published(results((0.0, 0.0, 0.0), fall)) if "falls less" in row["claim"])
    assert row["replicated"] == kind


def test_a_single_seed_replicates_nothing() -> None:
    found = results((0.1, 0.2, 0.3), (0.0, 0.0, 0.0))
    found["summary"]["0"]["brme_0.4"]["drawdown"]["less_first_interval"] = None
    assert not [row for row in published(found) if "falls less" in row["claim"]]


def test_failures_come_first() -> None:
    kinds = [row["replicated"] for row in published(results((0.1, 0.2, 0.3), (0.1, 0.2, 0.3)))]
    assert kinds == ["no", "yes"]


def test_policies_are_compared_where_both_arms_were_trained() -> None:
    golds = {"mean": (0.1, 0.2, 0.9), "single_large_kl": (0.4, 0.5), "brme_large_kl": (0.5, 0.5)}
    cells = [
        {"noise": "raters", "arm": arm, "reward_seed": seed, "policy_seed": 0, "final_gold": gold}
        for arm, of_arm in golds.items()
        for seed, gold in enumerate(of_arm)
    ]
    std = {"less_first": -0.02, "less_first_interval": [-0.03, -0.01]}
    arms = {"brme_0.4": {"checkpoints": {"lambada": {"std": std}}}}
    rows = published({"cells": cells, "summary": {"raters": arms}})
    assert [(row["replicated"], row["here"]) for row in rows] == [
        ("no", "-0.30 gold (-0.30 to -0.30)"),  # the mean's third seed has no partner
        ("unclear", "+0.05 (+0.00 to +0.10)"),
        ("yes", "-0.02 (-0.03 to -0.01)"),
    ]
    assert all("single raters’ labels" in row["claim"] for row in rows)
