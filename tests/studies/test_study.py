"""The study: which cells there are, what survives a failure or a stop, and means over seeds by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise.data.preferences import Preference, read_preferences
from poise.errors import PoiseError
from poise.policy import train as train_policy
from poise.reward import train as train_reward
from poise.runtime import jobs as cells
from poise.runtime.run_folder import Run
from poise.studies import gold, study
from poise.studies import pool_study as study_pool
from poise.studies import quickstart as recipes
from poise.studies.arms import ARMS as ALL_ARMS

ARMS = ("single", "brme_0.4")


def config(tmp_path: Path, preferences: Path, prompts: Path, model: str, **changes: Any) -> study.Config:
    settings = {
        "arms": ARMS, "reward_seeds": 1, "num_layers": 2, "num_steps": 2, "max_tokens": 4, "num_preferences": 0,
        "label_noise": ("0",), "pool_size": 0,
    } | changes  # fmt: skip
    return study.Config(
        preferences=str(preferences), prompts=str(prompts), eval_prompts=str(prompts), output=str(tmp_path / "study"),
        model=model, **settings,
    )  # fmt: skip


def in_this_process(cell: cells.Cell, _jobs: int = 1) -> str:
    """`cells.run_cell` without starting an interpreter."""
    try:
        (train_reward if cell.command == "train-reward" else train_policy).run(cell.config)
    except PoiseError as error:
        return str(error)
    return ""


def test_a_study_grows_and_repeats_nothing(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def note(cell: cells.Cell, _jobs: int = 1) -> str:
        ran.append(str(cell.folder.relative_to(tmp_path / "study")))
        return in_this_process(cell)

    monkeypatch.setattr(cells, "run_cell", note)
    first = study.run(config(tmp_path, preferences_file, prompts_file, tiny_model)).results
    assert ran == ["noise-0/reward-0/reward", *(f"noise-0/reward-0/policy-0/{arm}" for arm in ARMS)]
    assert first["missing"] == {}
    assert {cell["arm"] for cell in first["cells"]} == set(ARMS)
    ran.clear()
    grown = study.run(
        config(
            tmp_path,
            preferences_file,
            prompts_file,
            tiny_model,
            label_noise=("0", "0.25"),
            policy_noise=("0", "0.25"),
            arms=(*ARMS, "constant"),
        )
    ).results
    assert ran[0] == "noise-0.25/reward-0/reward"
    assert sorted(ran[1:]) == [
        "noise-0.25/reward-0/policy-0/brme_0.4", "noise-0.25/reward-0/policy-0/constant",
        "noise-0.25/reward-0/policy-0/single", "noise-0/reward-0/policy-0/constant",
    ]  # fmt: skip
    assert [cell for cell in grown["cells"] if cell in first["cells"]] == first["cells"]
    assert grown["summary"].keys() == {"0", "0.25"}
    with pytest.raises(PoiseError, match=r"other settings \(differs in num_steps\)"):
        study.run(config(tmp_path, preferences_file, prompts_file, tiny_model, num_steps=3))


def test_a_cell_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(cell: cells.Cell, _jobs: int = 1) -> str:
        return "out of memory" if cell.folder.name == "constant" else in_this_process(cell)

    monkeypatch.setattr(cells, "run_cell", fail_once)
    wanted = config(tmp_path, preferences_file, prompts_file, tiny_model, arms=(*ARMS, "constant"))
    results = study.run(wanted).results
    assert results["missing"] == {"noise-0/reward-0/policy-0/constant": "out of memory"}
    assert results["summary"]["0"].keys() == set(ARMS)
    monkeypatch.setattr(cells, "run_cell", in_this_process)
    again = study.run(wanted).results
    assert again["missing"] == {}
    assert again["summary"]["0"].keys() == {*ARMS, "constant"}


def test_a_study_of_which_every_cell_fails_says_so(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "run_cell", lambda _cell, _jobs: "out of memory")
    results = study.run(config(tmp_path, preferences_file, prompts_file, tiny_model)).results
    assert results["missing"] == {"noise-0/reward-0/reward": "out of memory"}
    assert "1 run is missing" in (tmp_path / "study" / "report.html").read_text()


def test_a_cell_in_a_process_of_its_own(tmp_path: Path, tiny_model: str, prompts_file: Path) -> None:
    bad = train_policy.Config(
        prompts=str(prompts_file), reward=str(tmp_path / "nowhere"), output=str(tmp_path / "cell"), model=tiny_model,
        num_steps=1,
    )  # fmt: skip
    why = cells.run_cell(cells.Cell("train-policy", bad))
    assert "nowhere" in why
    assert "Traceback" not in why
    assert why in (tmp_path / "cell" / "error.txt").read_text()
    Run(tmp_path / "cell").finish({})  # as if another process had finished it while this one waited for the lock
    assert cells.run_cell(cells.Cell("train-policy", bad)) == ""


def test_a_cell_begun_with_other_settings_fails_alone(tmp_path: Path, tiny_model: str, prompts_file: Path) -> None:
    begun = train_policy.Config(
        prompts=str(prompts_file), reward=str(tmp_path), output=str(tmp_path / "cell"), model=tiny_model
    )
    Run.open(begun.output, begun)
    failed = cells.run_cells([cells.Cell("train-policy", replace(begun, eval_every=10))], 1, "cells")
    assert "differs in eval_every" in failed[tmp_path / "cell"]
    assert "differs in eval_every" in (tmp_path / "cell" / "error.txt").read_text()


def test_flipped_by_hand() -> None:
    pairs = [Preference("p", f"good {i}", f"bad {i}") for i in range(8)]
    found = study.flipped(pairs, 0.25, seed=0)
    assert sum(pair.chosen.startswith("bad") for pair in found) == 2
    assert all({a.chosen, a.rejected} == {b.chosen, b.rejected} for a, b in zip(pairs, found, strict=True))
    assert study.flipped(pairs, 0.0, seed=0) == pairs
    assert found != study.flipped(pairs, 0.25, seed=1)


def test_a_part_of_the_preferences_is_a_seeds_own() -> None:
    pairs = [Preference("p", f"good {i}", f"bad {i}") for i in range(50)]
    drawn = study.part(pairs, 20, seed=3)
    assert len({pair.chosen for pair in drawn}) == 20
    assert drawn == study.part(pairs, 20, seed=3) != study.part(pairs, 20, seed=4)
    assert study.part(pairs, 0, seed=3) == pairs
    with pytest.raises(PoiseError, match="--num-preferences 51, but there are 50"):
        study.part(pairs, 51, seed=3)


def test_best_of_n_alone_and_what_is_kept_of_it(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(
        tmp_path, preferences_file, prompts_file, tiny_model, pool_size=6, pool_seeds=3, policy_seeds=0,
        label_noise=("0", "0.25"),
    )  # fmt: skip
    # a reader of reviews thinks all alike of what a random model writes
    monkeypatch.setattr(gold, "judged", lambda rows, _: np.sin(np.arange(len(rows))))
    results = study.run(wanted).results
    assert results["cells"] == []
    assert results["best_of_n"].keys() == {"0", "0.25"}
    of_arms = results["best_of_n"]["0.25"]
    assert of_arms.keys() == {name for name, arm in ALL_ARMS.items() if not arm.only_policy}
    assert of_arms["single"]["seeds"] == 3
    assert of_arms["brme_0.4"]["measures"].keys() >= {"gain", "drawdown", "accuracy"}
    # What must be equal is: a constant reward chooses at random, and lambda = 1 is the nominal head.
    assert of_arms["constant"]["measures"]["accuracy"]["mean"] == 0.5
    assert of_arms["contrastive"]["best_of_n"][-1]["gold"] == pytest.approx(of_arms["single"]["best_of_n"][-1]["gold"])
    same = results["instability"]["0, same preferences, other seeds"]["single"]
    assert -1 <= same["rank_correlation"]["mean"] <= 1
    page = json.loads((tmp_path / "study" / "page-pool.json").read_text())
    assert page["per_prompt"] == 6
    assert page["rewards"]["0"][0]["posterior"]["kind"] == "moments"
    assert (tmp_path / "study" / "report.html").exists()

    monkeypatch.setattr(study_pool, "_score_one", None)  # nothing is trained or sampled again
    assert study.run(wanted).results["best_of_n"] == results["best_of_n"]
    file = tmp_path / "study" / "noise-0" / "reward-1" / "preferences.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    with pytest.raises(PoiseError, match="another reward model; delete it"):
        study.run(wanted)


def test_benchmarks_of_trained_policies_are_gathered_without_their_rows(tmp_path: Path) -> None:
    assert study._benchmarks(study.Config(), tmp_path) is None
    of_policies = [{"name": "single", "tasks": {"race": {"mean": 0.5, "outcomes": "01"}}}]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.json").write_text(json.dumps({"tasks": ["race"], "policies": of_policies}))
    found = study._benchmarks(study.Config(), tmp_path)
    assert found is not None
    assert found["policies"][0]["tasks"]["race"] == {"mean": 0.5}


def test_a_reward_model_in_memory_is_the_one_a_run_saves(
    tmp_path: Path, preferences_file: Path, tiny_model: str
) -> None:
    from poise.models.reward_model import load_trunk
    from poise.models.scorer import FeatureExtractor, Scorer

    settings = train_reward.Config(
        preferences=str(preferences_file), output=str(tmp_path / "run"), model=tiny_model, num_layers=2
    )
    train_reward.run(settings)
    models = train_reward.heads_in_memory(settings, FeatureExtractor(*load_trunk(tiny_model, 2), settings.max_length))
    for name, model in models.items():
        assert torch.equal(model.weight, Scorer.load(str(tmp_path / "run" / name)).weight), name


def test_a_cell_counts_its_processor_time(tmp_path: Path, tiny_model: str, preferences_file: Path) -> None:
    settings = train_reward.Config(
        preferences=str(preferences_file), output=str(tmp_path / "cell"), model=tiny_model, num_layers=2
    )
    assert cells.cpu_hours(tmp_path / "cell") == 0.0
    assert cells.run_cell(cells.Cell("train-reward", settings)) == ""
    assert 0.3 < cells.cpu_hours(tmp_path / "cell") * 3600 < 120  # seconds: importing torch alone takes some
    assert not (tmp_path / "cell" / "error.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("single", "nonsense")}, "no arm 'nonsense'; choose from single"),
        ({"arms": ("single",)}, "at least two"),
        ({"label_noise": ("0.7",)}, r"shares in \[0, 0.5\]"),
        ({"label_noise": ("much",)}, r"shares in \[0, 0.5\]"),
        ({"label_noise": ("nan",)}, r"shares in \[0, 0.5\]"),
        ({"label_noise": ("0", "-0")}, "each once"),
        ({"label_noise": (".25", "0.250")}, "each once"),
        ({"label_noise": ("0.0", ".250"), "policy_noise": ("0.5",)}, "0.5 is not among --label-noise 0 0.25"),
        ({"label_noise": ("raters",), "policy_noise": ("raters",)}, "needs --raters"),
        ({"policy_noise": ("0.25",)}, "--policy-noise 0.25 is not among --label-noise 0"),
        ({"pool_size": 1}, "--pool-size must be at least 2"),
        ({"policy_seeds": 0}, "leave nothing to study"),
        ({"prompts": ""}, "--preferences, --prompts and --eval-prompts belong together"),
        ({"reward_seeds": 0}, "--reward-seeds must be at least 1"),
        ({"num_steps": 0}, "--num-steps must be at least 1"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PoiseError, match=message):
        study.run(replace(config(tmp_path, tmp_path / "p", tmp_path / "q", "model"), **changes))
    assert not (tmp_path / "study").exists()  # nothing is written for a study that cannot be


def write_pairs(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"prompt": "Review.", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_study_keeps_to_the_files_it_began_with(tmp_path: Path, prompts_file: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("a", "b"))
    raters = write_pairs(tmp_path / "raters.jsonl", ("b", "a"))
    wanted = config(tmp_path, pairs, prompts_file, "model", raters=str(raters))
    study._open(wanted)
    saved = tmp_path / "study" / "study.json"
    without = json.loads(saved.read_text())
    assert without.pop("digests").keys() == {"preferences", "prompts", "eval_prompts"}
    write_pairs(raters, ("c", "d"))  # nothing was made of it yet
    study._open(replace(wanted, label_noise=("0", "raters")))
    write_pairs(raters, ("e", "f"))
    with pytest.raises(PoiseError, match=r"differs in what raters holds\); choose another --output"):
        study._open(replace(wanted, label_noise=("0", "raters")))
    study._open(wanted)
    assert "raters" in json.loads(saved.read_text())["digests"]  # not forgotten
    write_pairs(pairs, ("a", "c"))
    with pytest.raises(PoiseError, match=r"differs in what preferences holds"):
        study._open(wanted)
    saved.write_text(json.dumps(without))  # of a time before digests
    study._open(wanted)
    write_pairs(pairs, ("a", "d"))
    with pytest.raises(PoiseError, match=r"differs in what preferences holds"):
        study._open(wanted)
    pairs.unlink()  # as may be once all is trained
    study._open(wanted)


def test_raters_are_of_the_same_pairs(tmp_path: Path, prompts_file: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("a", "b"), ("c", "d"), ("e", "f"))
    raters = tmp_path / "raters.jsonl"
    noise = ("0", "raters")
    wanted = config(tmp_path, pairs, prompts_file, "model", raters=str(raters), label_noise=noise, policy_noise=noise)
    write_pairs(raters, ("b", "a"), ("c", "f"), ("e", "d"))
    with pytest.raises(PoiseError, match=r"pair 2 of .*raters\.jsonl is not pair 2 of .*pairs\.jsonl"):
        study.run(wanted)
    write_pairs(raters, ("b", "a"), ("c", "d"))
    with pytest.raises(PoiseError, match=r"pair 3 of .*raters\.jsonl is not pair 3 of"):
        study.run(wanted)
    assert not (tmp_path / "study").exists()  # so that a better file may follow
    write_pairs(raters, ("b", "a"), ("c", "d"), ("f", "e"))
    assert [pair.chosen for pair in study._read(wanted)[str(raters)]] == ["b", "c", "f"]


def test_conversations_that_share_their_last_turn_make_a_pool(
    tmp_path: Path, preferences_file: Path, tiny_model: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    turns = [[{"role": "system", "content": who}, {"role": "user", "content": "Go on."}] for who in ("Kind.", "Rude.")]
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in [*turns, turns[0]]))
    wanted = config(tmp_path, preferences_file, prompts, tiny_model, pool_size=2, pool_seeds=1, policy_seeds=0)
    with pytest.raises(PoiseError, match=r"prompts\.jsonl has a prompt twice: 'Go on\.'"):
        study.run(wanted)
    assert not (tmp_path / "study").exists()
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in turns))
    results = study.run(wanted).results
    assert results["best_of_n"].keys() == {"0"}
    assert json.loads((tmp_path / "study" / "page-pool.json").read_text())["prompts"] == ["Go on."] * 2


def test_the_standard_study_has_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.test_quickstart import fake_ratings, shorten

    monkeypatch.setattr(recipes, "human_ratings", fake_ratings)
    shorten(monkeypatch)
    with pytest.raises(PoiseError, match="no arm 'nonsense'"):
        study.run(study.Config(output=str(tmp_path / "study"), arms=("single", "nonsense")))
    assert not (tmp_path / "study").exists()
    recipes.study_files(tmp_path / "data", num_pairs=60)
    raters, means = (read_preferences(str(tmp_path / "data" / f"{name}.jsonl")) for name in ("raters", "preferences"))
    assert len(raters) == len(means) > 40  # the ratings are few texts: some pairs are drawn twice
    rating = {rated.text: rated.mean for rated in fake_ratings()}
    assert all(rating[pair.chosen] >= rating[pair.rejected] for pair in means)
