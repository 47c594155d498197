"""The quickstart, whole, on a tiny model: every study, the resume, and the page."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from poise.data.human_ratings import Rated
from poise.errors import PoiseError
from poise.runtime.run_folder import Run
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


def test_stages_are_run_once_each_with_the_settings_of_their_arm(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages are made up. The run is stopped in its fourth stage and goes on there; cards are written once."""
    did: list[str] = []
    policies: dict[str, Any] = {}

    def done(config: Any) -> Run:
        run = Run(Path(config.output))
        if run.results is None:
            did.append(run.folder.name)
            if did.count("policy-robust") == 1 and run.folder.name == "policy-robust":
                raise KeyboardInterrupt
            run.finish({})
        return run

    def policy(config: Any) -> Run:
        policies[Path(config.output).name] = config
        return done(config)

    folder = tmp_path / "run"
    shorten(monkeypatch)
    monkeypatch.setattr(recipes, "human_ratings", fake_ratings)
    monkeypatch.setattr(recipes.train_reward, "run", done)
    monkeypatch.setattr(recipes.train_policy, "run", policy)
    monkeypatch.setattr(recipes.best_of_n, "run", done)
    monkeypatch.setattr(recipes.compare, "run", done)
    monkeypatch.setattr(recipes.reward_card, "write_cards", lambda run, _: did.append(f"cards of {run.folder.name}"))
    monkeypatch.setattr(recipes.policy_card, "write_card", lambda run, _: did.append(f"card of {run.folder.name}"))
    monkeypatch.setattr(recipes.report, "build", lambda folder: did.append(f"page of {folder.name}"))
    monkeypatch.setattr(recipes.live, "refreshed", lambda _: contextlib.nullcontext())
    config = recipes.Config(output=str(folder), model=tiny_model, num_preferences=40, num_steps=2, seed=3)
    with pytest.raises(KeyboardInterrupt):
        recipes.run(config)
    before = ["reward", "cards of reward", "pool", "policy-conventional", "card of policy-conventional"]
    assert did == [*before, "policy-robust"]
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*prompts.jsonl")}
    assert len(written) == 2
    out = recipes.run(config)
    assert did[len(before) + 1 :] == ["policy-robust", "card of policy-robust", "comparison", "page of run"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*prompts.jsonl")} == written
    plain, robust = policies["policy-conventional"], policies["policy-robust"]
    assert (plain.reward, plain.objective, plain.reward_ceiling) == (str(folder / "reward/single"), "nominal", None)
    assert (robust.reward, robust.objective) == (str(folder / "reward/posterior"), "lower_confidence(1)")
    assert (robust.reward_ceiling, robust.settle, robust.num_steps, robust.seed) == (2.0, True, 2, 3)
    assert out.results is not None
    stages = ["model and data", "reward models", "best-of-n pool", "PPO, conventional", "PPO, robust", "comparison"]
    assert [stage["name"] for stage in out.results["stages"]] == stages  # two tries of one are one stage
    assert len(out.metrics()) == 5 + len(stages)


def test_files_of_the_study_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    monkeypatch.setattr(recipes, "human_ratings", fake_ratings)
    recipes.study_files(tmp_path, 20)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept.keys() == {"raters.jsonl", "preferences.jsonl", "prompts.jsonl", "eval_prompts.jsonl"}
    monkeypatch.setattr(recipes, "human_ratings", None)  # not read again
    recipes.study_files(tmp_path, 30)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


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
