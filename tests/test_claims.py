"""What counts as a replication: by hand."""

from typing import Any

import pytest

from poise.claims import paired, published


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


def test_failures_come_first() -> None:
    kinds = [row["replicated"] for row in published(results((0.1, 0.2, 0.3), (0.1, 0.2, 0.3)))]
    assert kinds == ["no", "yes"]


def test_paired_by_reward_seed() -> None:
    cells = [
        {"noise": "0", "arm": arm, "reward_seed": seed, "final_gold": gold}
        for arm, seed, gold in (("a", 0, 1.0), ("a", 0, 3.0), ("a", 1, 5.0), ("b", 0, 1.5), ("b", 2, 9.0))
    ]
    assert paired(cells, "0", "a", "b", "final_gold").tolist() == [0.5]
    assert paired(cells, "0.25", "a", "b", "final_gold").tolist() == []
