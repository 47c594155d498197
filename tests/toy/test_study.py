"""`poise toy`, small: what it claims must hold in the tables it writes."""

from pathlib import Path
from typing import Any

import pytest

from poise.cli import toy as toy_figure
from poise.errors import PoiseError
from poise.toy import study as toy

SMALL = {"num_seeds": 3, "num_steps": 150}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = toy.Config(output=str(tmp_path_factory.mktemp("toy") / "run"), **SMALL)
    results = toy.run(config).results
    assert results is not None
    assert toy.run(config).results == results  # a finished run is left alone: `seconds` would differ
    return results


@pytest.mark.slow
def test_the_figure_shows_finished_tables(tmp_path: Path) -> None:
    config = toy.Config(output=str(tmp_path / "run"), num_seeds=2, num_steps=2)
    picture = toy_figure.run(config).folder / "toy.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    toy_figure.run(config)  # a finished run is drawn again
    assert picture.exists()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["table", "network"])
def test_policies_reach_the_known_optimum(results: dict[str, Any], policy: str) -> None:
    exactness, constant = results["exactness"][policy], results["constant"][policy]
    assert exactness["worst_seed"] <= 0.02 < 0.3 < exactness["of_the_reference"]
    assert exactness["total_variation"]["mean"] <= exactness["worst_seed"] <= exactness["worst_prompt"]
    assert constant["worst_seed"] <= 1e-3
    assert constant["begun_elsewhere_worst_seed"] <= 1e-3 < 0.1 < constant["begun_elsewhere"]


def test_simulated_gradients_agree_with_each_statement(results: dict[str, Any]) -> None:
    rows = {row["statement"]: row for row in results["statements"]}
    assert rows["constant reward: gradient along the true one"]["predicted"] == pytest.approx(0, abs=1e-7)
    for reward in ("constant reward", "true reward", "noise by prompt", "noise by call"):
        along = rows[f"{reward}: gradient along the true one"]
        # 400 batches of 8 prompts x 16 samples, 3 seeds: the standard error of the mean is about .001
        assert along["simulated"] == pytest.approx(along["predicted"], abs=0.005)
        variance = rows[f"{reward}: variance of the gradient"]
        assert variance["simulated"] == pytest.approx(variance["predicted"], rel=0.1)
    variances = [
        rows[f"{reward}: variance of the gradient"]["predicted"] for reward in ("true reward", "noise by call")
    ]
    assert variances[1] > 1.5 * variances[0]
    for statement, row in rows.items():
        if statement.endswith("from the optimum"):
            assert row["simulated"] < 0.04, statement
        if statement.endswith("best response"):
            assert row["simulated"] == pytest.approx(row["predicted"], abs=0.02), statement
        if statement.endswith("gold lost"):
            assert row["simulated"] == pytest.approx(row["predicted"], abs=0.01), statement
            assert row["predicted"] < row["bound"], statement
    assert len(rows) == 8 + 6 + 8


def test_gold_is_highest_where_gold_is_the_reward(results: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in results["objectives"]}
    assert list(rows) == ["reference", "gold", "single", *toy.OBJECTIVES]
    gold = {name: row["ppo"]["gold"]["mean"] for name, row in rows.items()}
    assert max(gold, key=lambda name: gold[name]) == "gold"
    assert min(gold, key=lambda name: gold[name]) == "reference"
    assert rows["single"]["ppo"]["against_single"]["mean"] == 0.0
    for name, row in rows.items():
        assert [point["kl_coef"] for point in row["exact"]] == list(toy.KL_COEFS)
        assert row["ppo"]["total_variation"] <= 0.02, name
        exact = next(point for point in row["exact"] if point["kl_coef"] == 0.25)
        assert row["ppo"]["gold"]["mean"] == pytest.approx(exact["gold"]["mean"], abs=0.03), name
        assert exact["unseen"] == pytest.approx(row["ppo"]["unseen"], abs=0.02), name
    assert rows["worst_case"]["ppo"]["unseen"] < rows["nominal"]["ppo"]["unseen"]
    # the reference policy does not know what was seen
    assert rows["reference"]["ppo"]["unseen"] == pytest.approx(results["heads"]["unseen_share"], abs=0.1)
    assert results["heads"]["disagreement"]["mean"] > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_seeds": 0}, "--num-seeds must be at least 1"),
        ({"heads_kl_coef": 0.0}, "--heads-kl-coef must be > 0"),
        ({"label_noise": 0.6}, r"--label-noise must be in \[0, 0.5\], got 0.6"),
    ],
)
def test_bad_settings_are_said_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PoiseError, match=message):
        toy.run(toy.Config(output=str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run").exists()
