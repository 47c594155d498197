"""The quickstart, whole, on a tiny model: every study, the resume, and the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from poise.data.human_ratings import Rated
from poise.errors import PoiseError
from poise.studies import compare
from poise.studies import quickstart as recipes
from poise.studies.quickstart import EVAL_FILMS, EVAL_PRODUCTS, TRAIN_FILMS, TRAIN_PRODUCTS


def fake_ratings() -> list[Rated]:
    words = {4: "great", 2: "good", -2: "bad", -4: "awful"}
    return [
        Rated(domain, f"a {words[mean]} one {i}", (mean, mean - 1 if mean > 0 else mean + 1))
        for domain in recipes.RATED_DOMAINS
        for i in range(40)
        for mean in words
    ]


@pytest.fixture(scope="module")
def finished(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "human_ratings", fake_ratings)
        shorten(patch)
        config = recipes.Config(output=str(folder), model=tiny_model, num_preferences=40, num_steps=2)
        two = recipes.run(config).results
        assert two is not None
        assert [stage["name"] for stage in two["stages"]][3:] == ["PPO, conventional", "PPO, robust", "comparison"]
        # A third arm is added to the finished two, which are not trained again.
        before = {path: path.stat().st_mtime_ns for path in folder.glob("policy-*/policy/*")}
        recipes.run(replace(config, arms=ALL))
        assert {path: path.stat().st_mtime_ns for path in before} == before
    return folder


ALL: tuple[Any, ...] = ("conventional", "robust", "brme")


def shorten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipes, "TRAIN_FILMS", TRAIN_FILMS[:4])
    patch.setattr(recipes, "TRAIN_PRODUCTS", TRAIN_PRODUCTS[:4])
    patch.setattr(recipes, "EVAL_FILMS", EVAL_FILMS[:3])
    patch.setattr(recipes, "EVAL_PRODUCTS", EVAL_PRODUCTS[:3])
    patch.setattr(recipes, "LAPTOP_REWARD", replace(recipes.LAPTOP_REWARD, num_layers=2))


@pytest.mark.slow
def test_a_quickstart_leaves_every_result(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == [
        "model and data", "reward models", "best-of-n pool", "PPO, conventional", "PPO, robust", "comparison",
        "PPO, brme",
    ]  # fmt: skip
    comparison = json.loads((finished / "comparison" / "results.json").read_text())
    assert [arm["name"] for arm in comparison["arms"]] == ["conventional", "robust", "brme"]
    assert [d["arm"] for d in comparison["differences"]] == ["robust", "brme"]
    for difference in comparison["differences"]:
        low, high = difference["interval"]
        assert low <= difference["gold"] <= high
        assert difference["num_prompts"] == 6
    models = [path.parent for path in finished.glob("*/*/config.json")] + list(finished.glob("policy-*/policy"))
    assert len(models) == 4 + 3
    assert all("## What it is not" in (model / "README.md").read_text() for model in models)
    page = (finished / "report.html").read_text()
    assert "<html" in page
    assert "robust" in page


@pytest.mark.slow
def test_arms_start_from_the_same_policy_and_prompts(finished: Path) -> None:
    def first_step(arm: str) -> list[tuple[str, str]]:
        lines = (finished / f"policy-{arm}" / "samples.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(str(row["prompt"]), row["completion"]) for row in rows if row["step"] == 0]

    assert first_step("conventional") == first_step("robust") == first_step("brme")


@pytest.mark.slow
def test_starting_again_does_nothing_twice(finished: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from poise.policy import train as train_policy
    from poise.reward import train as train_reward
    from poise.studies import pool

    for module, name in ((train_policy, "load_policy"), (train_reward, "load_trunk"), (pool, "load_policy")):
        monkeypatch.delattr(module, name)
    monkeypatch.setattr(recipes, "human_ratings", None)
    shorten(monkeypatch)
    before = (finished / "comparison" / "results.json").read_text()
    recipes.run(recipes.Config(output=str(finished), model=tiny_model, num_preferences=40, num_steps=2, arms=ALL))
    assert (finished / "comparison" / "results.json").read_text() == before


def test_a_quickstart_does_not_go_on_with_another_model(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)

    def stopped() -> list[Rated]:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "human_ratings", stopped)
    settings = recipes.Config(output=str(tmp_path / "run"), model=str(model))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipes.run(settings)
    (tmp_path / "run" / "preferences.jsonl").write_text("")  # without any work a folder is taken over
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(PoiseError, match=r"begun with other inputs: --model changed since"):
        recipes.run(settings)


def test_training_and_evaluation_prompts_are_disjoint() -> None:
    assert not {*TRAIN_FILMS, *TRAIN_PRODUCTS} & {*EVAL_FILMS, *EVAL_PRODUCTS}
    assert len({*TRAIN_FILMS, *TRAIN_PRODUCTS, *EVAL_FILMS, *EVAL_PRODUCTS}) == 80


@pytest.mark.slow
def test_no_training_file_holds_gold(finished: Path) -> None:
    for path in finished.glob("policy-*/*.jsonl"):
        assert "gold" not in json.loads(path.read_text().splitlines()[0]), path


@pytest.mark.slow
def test_unfinished_arm_is_one_line(finished: Path, tmp_path: Path) -> None:
    arms = (str(finished / "policy-robust"), str(finished / "reward"))
    with pytest.raises(PoiseError, match="not a finished policy run"):
        compare.run(compare.Config(arms=arms, output=str(tmp_path / "x")))
    with pytest.raises(PoiseError, match="at least two arms"):
        compare.run(compare.Config(arms=arms[:1], output=str(tmp_path / "y")))
