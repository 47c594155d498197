"""The study: its settings and jobs, what survives a failure or a stop, and what is refused."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from poise.cli.main import parse_config
from poise.data.preferences import read_preferences
from poise.data.types import Preference
from poise.errors import PoiseError
from poise.functional.statistics import t_interval
from poise.models.reward_model import HeadLayout
from poise.policy import train as train_policy
from poise.reward import train as train_reward
from poise.runtime import jobs
from poise.runtime.run_folder import Run, config_dict, write_jsonl
from poise.studies import config as study_config
from poise.studies import gold, study
from poise.studies import pool_study as study_pool
from poise.studies import quickstart as recipes
from poise.studies.arms import ARMS as ALL_ARMS

pytestmark = pytest.mark.usefixtures("undrawn")
ARMS = ("single", "brme_0.4")


def config(tmp_path: Path, preferences: Path, prompts: Path, model: str, **changes: Any) -> study.Config:
    settings = {
        "arms": ARMS, "reward_seeds": 1, "num_preferences": 0, "label_noise": ("0",), "pool_size": 0,
        **of_reward(), **of_policy(),
    } | changes  # fmt: skip
    return study.Config(
        preferences=str(preferences), prompts=str(prompts), eval_prompts=str(prompts), output=str(tmp_path / "study"),
        model=model, **settings,
    )  # fmt: skip


def of_policy(**changes: Any) -> dict[str, Any]:
    """A study's settings with some of its policies' changed."""
    small: dict[str, Any] = {
        "num_steps": 2, "max_tokens": 4, "prompts_per_step": 4, "completions_per_prompt": 4, "adapted_layers": 1,
        "lora_rank": 4, "baseline_completions": 8, "eval_completions": 2,
    }  # fmt: skip
    return {"policy": replace(study_config.POLICY, **(small | changes))}


def of_reward(**changes: Any) -> dict[str, Any]:
    """A study's settings with some of its reward models' changed."""
    return {"reward": replace(study_config.REWARD, **({"num_layers": 2, "head_steps": 60} | changes))}


def in_this_process(job: jobs.Job, _at_a_time: int = 1, _gpu: str | None = None) -> str:
    """`jobs.run_job` without starting an interpreter."""
    try:
        (train_reward if job.command == "train-reward" else train_policy).run(job.config)
    except PoiseError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_study_grows_and_repeats_nothing(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def note(job: jobs.Job, _at_a_time: int = 1, _gpu: str | None = None) -> str:
        ran.append(str(job.folder.relative_to(tmp_path / "study")))
        return in_this_process(job)

    monkeypatch.setattr(jobs, "run_job", note)
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
    other = of_policy(num_steps=3) | of_reward(num_layers=1)
    with pytest.raises(PoiseError, match=r"other settings \(differs in policy\.num_steps, reward\.num_layers\)"):
        study.run(config(tmp_path, preferences_file, prompts_file, tiny_model, **other))


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(job: jobs.Job, _at_a_time: int = 1, _gpu: str | None = None) -> str:
        return "out of memory" if job.folder.name == "constant" else in_this_process(job)

    monkeypatch.setattr(jobs, "run_job", fail_once)
    wanted = config(tmp_path, preferences_file, prompts_file, tiny_model, arms=(*ARMS, "constant"))
    results = study.run(wanted).results
    assert results["missing"] == {"noise-0/reward-0/policy-0/constant": "out of memory"}
    assert results["summary"]["0"].keys() == set(ARMS)
    monkeypatch.setattr(jobs, "run_job", in_this_process)
    again = study.run(wanted).results
    assert again["missing"] == {}
    assert again["summary"]["0"].keys() == {*ARMS, "constant"}


def test_a_study_of_which_every_cell_fails_says_so(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "run_job", lambda *_: "out of memory")
    results = study.run(config(tmp_path, preferences_file, prompts_file, tiny_model)).results
    assert results["missing"] == {"noise-0/reward-0/reward": "out of memory"}
    assert "1 run is missing" in (tmp_path / "study" / "report.html").read_text()
    with pytest.raises(PoiseError, match=r"every policy of .* failed .* noise-0/reward-0/reward: out of memory"):
        study.check_outcome(Run(tmp_path / "study"))


def arm_of(name: str, gold: float) -> dict[str, Any]:
    """An arm of a comparison: gold as given, all else made up."""
    return {
        "name": name, "steps": [{"gold": gold}] * 4,
        "final": {"gold": gold, "interval": [gold, gold], "kl": 2.0, "proxy": 1.5, "distinct_bigrams": 0.5},
        "peak_gold": gold, "drawdown": 0.0, "initial_gold": 0.0, "initial_gold_std": 1.0,
    }  # fmt: skip


def test_finished_policies_of_a_world_are_compared_and_others_left_out(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Jobs and their gold are made up. In the second world one of two policies fails: nothing is compared there."""

    def run_job(job: jobs.Job, _at_a_time: int = 1, _gpu: str | None = None) -> str:
        if "reward-1/policy-0/single" in str(job.folder):
            return "out of memory"
        Run.open(job.folder, job.config).finish({})
        if job.folder.name == "brme_0.4":
            rows = [{"step": step, "task": "piqa", "mean": 0.5, "stderr": None} for step in (0, 1)]
            write_jsonl(job.folder / "benchmarks.jsonl", rows)
        return ""

    def compared(settings: Any) -> Any:
        assert Path(settings.output).is_dir()
        golds = {"single": 0.25, "brme_0.4": 0.75}
        return SimpleNamespace(
            results={"arms": [arm_of(Path(one).name, golds[Path(one).name]) for one in settings.arms]}
        )

    monkeypatch.setattr(jobs, "run_job", run_job)
    monkeypatch.setattr(study.compare, "run", compared)
    monkeypatch.setattr(study.study_page, "build", lambda _: None)
    wanted = config(tmp_path, preferences_file, prompts_file, tiny_model, reward_seeds=2)
    out = study.run(wanted)
    results = out.results
    assert results["missing"] == {"noise-0/reward-1/policy-0/single": "out of memory"}
    assert [(cell["arm"], cell["reward_seed"], cell["final_gold"]) for cell in results["cells"]] == [
        ("single", 0, 0.25), ("brme_0.4", 0, 0.75)
    ]  # fmt: skip
    assert results["comparisons"] == ["noise-0/reward-0/policy-0/comparison"]
    assert ["checkpoints" in cell for cell in results["cells"]] == [False, True]
    assert results["cells"][1]["checkpoints"]["piqa"]["steps"] == [0, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "failed: noise-0/reward-1/policy-0/single: out of memory" in said
    assert "noise 0, single: final gold +0.25" in said
    assert "noise 0, brme_0.4: final gold +0.75" in said
    study.check_outcome(out)  # some policies were compared
    assert (out.folder / "study.png").exists()


def test_a_pool_is_scored_by_every_seed_and_how_far_they_are_apart_is_said(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads are drawn by the seed of their preferences; that of the training changes a hundredth of them."""
    trained: list[Path] = []

    def heads_in_memory(settings: Any, extract: Any) -> dict[str, Any]:
        trained.append(settings.preferences)
        by_data = torch.Generator().manual_seed(int(Path(settings.preferences).parent.name.removeprefix("reward-")))
        by_seed = torch.Generator().manual_seed(100 + settings.seed)

        def model(count: int, kind: Any) -> Any:
            layout = HeadLayout(count, kind, (0.0,) * count * (2 if kind == "gaussian" else 1))
            shape = (layout.num_labels, extract.classifier.config.hidden_size)
            weight = torch.randn(shape, generator=by_data) + 0.01 * torch.randn(shape, generator=by_seed)
            return SimpleNamespace(layout=layout, weight=weight)

        kinds = {"single": (1, "point"), "ensemble": (5, "point"), "brme": (5, "gaussian"), "posterior": (9, "point")}
        return {name: model(*kind) for name, kind in kinds.items()}

    monkeypatch.setattr(study_pool.train_reward, "heads_in_memory", heads_in_memory)
    monkeypatch.setattr(gold, "gold_of", lambda rows, _: np.sin(np.arange(len(rows))))
    monkeypatch.setattr(study.study_page, "build", lambda _: None)
    wanted = config(
        tmp_path,
        preferences_file,
        prompts_file,
        tiny_model,
        pool_size=4,
        pool_seeds=2,
        policy_seeds=0,
        num_preferences=20,
    )
    out = study.run(wanted)
    assert len(trained) == 2 * 2
    assert (out.results["cells"], out.results["missing"]) == ([], {})
    study.check_outcome(out)
    found = out.results["instability"]
    assert found.keys() == {"0, other preferences", "0, same preferences, other seeds"}
    other, same = found.values()
    for name in same:
        assert same[name]["seeds"] == 2
        assert other[name]["rank_correlation"]["mean"] < 0.9 < same[name]["rank_correlation"]["mean"]
        assert ("vs_baseline" in same[name]["gold_std"]) == (name != "single")
    page = json.loads((out.folder / "page-pool.json").read_text())
    kinds = {name: (one["kind"], one["std"] is None) for name, one in page["rewards"]["0"][0].items()}
    assert kinds == {
        "single": ("heads", True), "ensemble": ("heads", True), "brme": ("heads", False),
        "posterior": ("moments", False),
    }  # fmt: skip
    best = study.run(replace(wanted, pool_seeds=1)).results  # nothing is trained again, and one is apart from none
    assert len(trained) == 2 * 2
    assert best["instability"] == {}
    assert best["best_of_n"]["0"]["single"]["seeds"] == 1
    rows = out.folder / "pool" / "pool.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(PoiseError, match=r"pool is not of 4 completions a prompt; delete it to sample again"):
        study.run(wanted)


def test_a_study_takes_no_folder_of_somebody_else(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str
) -> None:
    mine = tmp_path / "study" / "pool" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(PoiseError, match="no run of Poise wrote"):
        study.run(config(tmp_path, preferences_file, prompts_file, tiny_model))
    assert [path for path in (tmp_path / "study").rglob("*") if path.is_file()] == [mine]


@pytest.mark.slow
def test_a_cell_runs_in_a_process_of_its_own(tmp_path: Path, tiny_model: str, prompts_file: Path) -> None:
    bad = train_policy.Config(
        prompts=str(prompts_file), reward=str(tmp_path / "nowhere"), output=str(tmp_path / "cell"), model=tiny_model,
        num_steps=1,
    )  # fmt: skip
    why = jobs.run_job(jobs.Job("train-policy", bad))
    assert "nowhere" in why
    assert "Traceback" not in why
    assert why in (tmp_path / "cell" / "error.txt").read_text()
    Run(tmp_path / "cell").finish({})  # as if another process had finished it while this one waited for the lock
    assert jobs.run_job(jobs.Job("train-policy", bad)) == ""


def test_a_cell_begun_with_other_settings_fails_alone(tmp_path: Path, tiny_model: str, prompts_file: Path) -> None:
    begun = train_policy.Config(
        prompts=str(prompts_file), reward=str(tmp_path), output=str(tmp_path / "cell"), model=tiny_model
    )
    Run.open(begun.output, begun)
    (tmp_path / "cell" / "checkpoint.safetensors").write_bytes(b"")  # without any work a folder is taken over
    failed = jobs.run_jobs([jobs.Job("train-policy", replace(begun, eval_every=10))], 1, "cells")
    assert "differs in eval_every" in failed[tmp_path / "cell"]
    assert "differs in eval_every" in (tmp_path / "cell" / "error.txt").read_text()


def test_flips_change_the_share_that_was_asked_for() -> None:
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


@pytest.mark.slow
def test_best_of_n_alone_and_what_is_kept_of_it(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(
        tmp_path, preferences_file, prompts_file, tiny_model, pool_size=6, pool_seeds=3, policy_seeds=0,
        label_noise=("0", "0.25"),
    )  # fmt: skip
    # a reader of reviews thinks all alike of what a random model writes
    monkeypatch.setattr(gold, "gold_of", lambda rows, _: np.sin(np.arange(len(rows))))
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


@pytest.mark.slow
def test_a_reward_model_in_memory_is_the_one_a_run_saves(
    tmp_path: Path, preferences_file: Path, tiny_model: str
) -> None:
    from poise.models.reward_model import load_trunk
    from poise.models.scorer import FeatureExtractor, Scorer

    settings = train_reward.Config(
        preferences=str(preferences_file),
        output=str(tmp_path / "run"),
        model=tiny_model,
        num_layers=2,
        trunk="frozen",
    )
    train_reward.run(settings)
    models = train_reward.heads_in_memory(settings, FeatureExtractor(*load_trunk(tiny_model, 2), settings.max_length))
    for name, model in models.items():
        assert torch.equal(model.weight, Scorer.load(str(tmp_path / "run" / name)).weight), name


@pytest.mark.slow
def test_a_cell_counts_the_processor_time_of_all_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"  # in place of Python: it takes .2 s, and fails for want of `ready`
    program.write_text(
        f"#!{sys.executable} -S\nimport json, os, sys, time\nwhile time.process_time() < 0.2: pass\n"
        "folder = os.path.dirname(sys.argv[-1])\n"
        "if not os.path.exists(folder + '/ready'): sys.exit('not ready')\n"
        "json.dump({}, open(folder + '/results.json', 'w'))\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(program))
    cell = tmp_path / "cell"
    job = jobs.Job("train-reward", train_reward.Config(preferences="x", output=str(cell)))
    assert jobs.cpu_hours(cell) == 0.0
    assert jobs.run_job(job) == "not ready"
    assert 0.2 <= jobs.cpu_hours(cell) * 3600 < 10
    (cell / "ready").touch()
    assert jobs.run_job(job) == ""
    assert 0.4 <= jobs.cpu_hours(cell) * 3600 < 10
    assert not (cell / "error.txt").exists()


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
        (of_policy(num_steps=0), "arm single: --policy.num-steps must be at least 1"),
        (of_policy(settle=True), "arm single: --policy.settle needs a --policy.reward-ceiling above 0"),
        (of_policy(objective="mean"), "--policy.objective is set by the study; leave it out and see --arms"),
        (of_policy(eval_prompts="x"), "--policy.eval-prompts is set by the study; leave it out and see --eval-prompts"),
        (of_policy(seed=1), "--policy.seed is set by the study; leave it out and see --policy-seeds"),
        (of_reward(seed=1), "--reward.seed is set by the study; leave it out and see --reward-seeds"),
        (of_reward(preferences="x"), "--reward.preferences is set by the study; leave it out and see --preferences"),
        (of_reward(output="x"), "--reward.output is set by the study; leave it out and see --output"),
        (of_reward(trunk="lora") | {"pool_size": 8}, "--reward.trunk lora needs --pool-size 0"),
        (of_reward(stage2_trunk="full") | {"pool_size": 8}, "--reward.stage2-trunk full needs --pool-size 0"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PoiseError, match=message):
        study.run(replace(config(tmp_path, tmp_path / "p", tmp_path / "q", "model"), **changes))
    assert not (tmp_path / "study").exists()  # nothing is written for a study that cannot be


def test_more_layers_than_the_model_has_are_refused_before_a_pool_is_sampled(tmp_path: Path, tiny_model: str) -> None:
    wanted = replace(config(tmp_path, tmp_path / "p", tmp_path / "q", tiny_model), **of_reward(num_layers=8))
    with pytest.raises(PoiseError, match=r"--reward\.num-layers must be at most \d, the layers of .*, got 8"):
        wanted.check()


def test_levels_of_noise_for_policies_are_only_checked_where_policies_are_trained(tmp_path: Path) -> None:
    wanted = replace(config(tmp_path, tmp_path / "p", tmp_path / "q", "model"), label_noise=("0.25",), pool_size=8)
    replace(wanted, policy_seeds=0).check()
    with pytest.raises(PoiseError, match=r"--policy-noise 0 is not among --label-noise 0\.25"):
        wanted.check()


def test_dotted_options_reach_every_job() -> None:
    options = ["--reward.trunk", "lora", "--policy.learning-rate", "3e-4", "--pool-size", "0", "--model", "mine"]
    wanted = parse_config(study.Config, "poise study", [*options, "--policy.model", "theirs"])
    reward = study_config.reward_job(wanted, "0.25", 2).config
    assert (reward.trunk, reward.model, reward.seed) == ("lora", "mine", 2)
    assert reward.output == "runs/study/noise-0.25/reward-2/reward"
    large = study_config.policy_job(wanted, "brme_large_kl", 1, "0.25", 2).config
    assert (large.learning_rate, large.model, large.seed) == (3e-4, "theirs", 2001)
    assert (large.kl_coef, large.objective) == (20 * 0.01, "tradeoff(0.4)")
    settled = study_config.policy_job(wanted, "settle", 0, "0", 0).config
    assert (settled.reward_ceiling, settled.settle, settled.kl_coef) == (2.0, True, 0.01)


def test_a_job_by_default_has_the_laptop_s_settings() -> None:
    given = study.Config(prompts="p", eval_prompts="q", output="o")
    assert study_config.reward_config(given, "0", 1) == replace(
        study_config.LAPTOP_REWARD,
        preferences="o/noise-0/reward-1/preferences.jsonl",
        output="o/noise-0/reward-1/reward",
        seed=1,
    )
    assert study_config.policy_job(given, "single", 0, "0", 1).config == replace(
        study_config.LAPTOP_POLICY,
        prompts="p", eval_prompts="q", reward="o/noise-0/reward-1/reward/single", objective="nominal", kl_coef=0.01,
        output="o/noise-0/reward-1/policy-0/single", seed=1000,
    )  # fmt: skip


def test_best_of_n_has_the_ceiling_and_shaping_of_the_policies() -> None:
    choice = ALL_ARMS["single"].choice(replace(study_config.POLICY, reward_ceiling=3.0, shaping="par"))
    assert (choice.ceiling, choice.shaping) == (3.0, "par")
    assert ALL_ARMS["settle"].choice(study_config.POLICY).ceiling == 2.0
    assert ALL_ARMS["single"].choice(study_config.POLICY).ceiling == math.inf


def test_config_yaml_repeats_a_study(tmp_path: Path) -> None:
    options = ["--reward.trunk", "lora", "--policy.eval-tasks", "lambada", "race", "--arms", "mean", "brme_1"]
    wanted = parse_config(study.Config, "poise study", [*options, "--policy.max-step-kl", "0.1"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config_dict(wanted)))
    assert parse_config(study.Config, "poise study", ["--config", str(file)], study.RENAMED) == wanted
    again = parse_config(study.Config, "poise study", ["--config", str(file), "--policy.max-step-kl", "0.2"])
    assert again == replace(wanted, policy=replace(wanted.policy, max_step_kl=0.2))


def test_a_config_file_with_the_names_of_old_studies(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("num_layers: 4\nkl_coef: 0.1\neval_tasks: [race]\npolicy: {clip: 0.3}\nreward: {epochs: 2.0}\n")
    parsed = parse_config(study.Config, "poise study", ["--config", str(file)], study.RENAMED)
    assert (parsed.reward.num_layers, parsed.reward.epochs) == (4, 2.0)
    assert (parsed.policy.kl_coef, parsed.policy.clip, parsed.policy.eval_tasks) == (0.1, 0.3, ("race",))
    assert parsed.policy.prompts == ""


def test_a_config_file_written_by_hand_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("label_noise: [0, 0.25]\npolicy: {learning_rate: 1e-3, clip: 1, max_step_kl: null}\n")
    parsed = parse_config(study.Config, "poise study", ["--config", str(file)], study.RENAMED)
    assert parsed.label_noise == ("0", "0.25")
    assert (parsed.policy.learning_rate, parsed.policy.clip, parsed.policy.max_step_kl) == (0.001, 1.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("armz: [mean]\npolicy: {clip: 0.3, clop: 1}\nreward: {trunc: lora}\n",
         "settings poise study does not know: armz, policy.clop, reward.trunc; "
         r"did you mean arms, policy.clip, reward.trunk\?$"),
        ("policy: {settle: perhaps}\n", "policy.settle cannot be 'perhaps'$"),
        ("policy: {tune: half}\n", "policy.tune cannot be 'half'$"),
        ("arms: single\n", "arms cannot be 'single'$"),
        ("num_preferences: many\n", "num_preferences cannot be 'many'$"),
        ("policy: {learning_rate: fast}\n", "policy.learning_rate cannot be 'fast'$"),
        ("policy:\n", "policy must hold settings, each as `name: value`$"),
        ("kl_coef: 0.1\npolicy: 3\n", "policy must hold settings, each as `name: value`$"),
    ],
)  # fmt: skip
def test_bad_nested_settings_of_a_file_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(PoiseError, match=message):
        parse_config(study.Config, "poise study", ["--config", str(file)], study.RENAMED)


def test_a_study_folder_written_with_the_old_names_goes_on(tmp_path: Path, prompts_file: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("a", "b"))
    wanted = config(
        tmp_path, pairs, prompts_file, "model", policy=replace(study_config.POLICY, num_steps=2, max_tokens=4)
    )
    wanted = replace(wanted, reward=replace(wanted.reward, head_steps=study_config.REWARD.head_steps))
    old = {
        "preferences": str(pairs), "raters": "", "prompts": str(prompts_file), "eval_prompts": str(prompts_file),
        "num_preferences": 0, "model": "model", "num_layers": 2, "num_steps": 2, "kl_coef": 0.01, "max_tokens": 4,
        "gold": "",
    }  # fmt: skip
    (tmp_path / "study").mkdir()
    saved = tmp_path / "study" / "study.json"
    saved.write_text(json.dumps(old | {"kl_coef": 0.02}))
    with pytest.raises(PoiseError, match=r"differs in policy\.kl_coef\)"):
        study._open(wanted)
    saved.write_text(json.dumps(old))
    study._open(wanted)
    kept = json.loads(saved.read_text())
    assert (kept["policy.num_steps"], kept["reward.num_layers"]) == (2, 2)
    assert not kept.keys() & (study_config.RENAMED.keys() | study_config.GROWS | study_config.SET_BY_STUDY.keys())
    study._open(replace(wanted, policy=replace(wanted.policy, eval_every=10)))
    with pytest.raises(PoiseError, match=r"differs in policy\.learning_rate, reward\.trunk\)"):
        study._open(
            replace(
                wanted,
                policy=replace(study_config.POLICY, num_steps=2, max_tokens=4, learning_rate=1e-4),
                **of_reward(trunk="lora", head_steps=study_config.REWARD.head_steps),
            )
        )
    saved.write_text("{")
    with pytest.raises(PoiseError, match=r"study\.json is damaged; choose another --output$"):
        study._open(wanted)


def write_pairs(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"prompt": "Review.", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_study_does_not_go_on_with_another_model(tmp_path: Path, prompts_file: Path, tiny_model: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("a", "b"))
    wanted = replace(config(tmp_path, pairs, prompts_file, str(model)), gold=str(model))
    study._open(wanted)
    study._open(wanted)
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(PoiseError, match=r"begun with other inputs: --model, --gold changed since"):
        study._open(wanted)


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
    shutil.copy(pairs, tmp_path / "copied.jsonl")
    study._open(replace(wanted, preferences=str(tmp_path / "copied.jsonl")))  # what it holds counts, not where it lies
    study._open(wanted)
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


def test_raters_are_of_the_same_pairs(tmp_path: Path, prompts_file: Path, tiny_model: str) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", ("a", "b"), ("c", "d"), ("e", "f"))
    raters = tmp_path / "raters.jsonl"
    noise = ("0", "raters")
    wanted = config(
        tmp_path, pairs, prompts_file, tiny_model, raters=str(raters), label_noise=noise, policy_noise=noise
    )
    write_pairs(raters, ("b", "a"), ("c", "f"), ("e", "d"))
    with pytest.raises(PoiseError, match=r"pair 2 of .*raters\.jsonl is not pair 2 of .*pairs\.jsonl"):
        study.run(wanted)
    write_pairs(raters, ("b", "a"), ("c", "d"))
    with pytest.raises(PoiseError, match=r"pair 3 of .*raters\.jsonl is not pair 3 of"):
        study.run(wanted)
    assert not (tmp_path / "study").exists()  # so that a better file may follow
    write_pairs(raters, ("b", "a"), ("c", "d"), ("f", "e"))
    assert [pair.chosen for pair in study._read(wanted)[str(raters)]] == ["b", "c", "f"]


@pytest.mark.slow
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


# ---- how far reward models are apart ----


@pytest.mark.parametrize("count", [3, 10])
def test_the_interval_of_a_std_over_reward_models_covers_it_as_often_as_it_says(count: int) -> None:
    """A bootstrap of ten covers it in 78 % of cases, of three in 43 %."""
    rng, hits = np.random.default_rng(count), 0
    for _ in range(300):
        low, high = study_pool.Apart.of_std(rng.normal(size=count)).interval or (0, 0)
        hits += low <= 1 <= high
    assert hits / 300 >= 0.9


def test_measures_over_pairs_of_reward_models_by_hand() -> None:
    """Three pairs, of .2, .4 and .9: their pseudo-values have their mean, and without one model one pair is left."""
    table = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]])
    found = study_pool.Apart.of_pairs(table)
    assert found.value == pytest.approx(0.5)
    assert found.pseudo_S.tolist() == pytest.approx([3 * 0.5 - 2 * left for left in (0.9, 0.4, 0.2)])
    assert found.interval == pytest.approx(t_interval(found.pseudo_S).tolist())
    other = study_pool.Apart.of_pairs(np.where(np.eye(3) == 1, 1.0, 0.3))
    gap = t_interval(found.pseudo_S - 0.3).tolist()
    assert found.beyond(other) == {"vs_baseline": pytest.approx(0.2), "vs_baseline_interval": pytest.approx(gap)}


def test_of_two_reward_models_and_of_equal_ones_there_is_no_interval() -> None:
    two = study_pool.Apart.of_pairs(np.array([[1.0, 0.5], [0.5, 1.0]]))
    assert (two.value, two.interval) == (0.5, None)
    assert two.beyond(two) == {"vs_baseline": 0.0, "vs_baseline_interval": None}
    for equal in ([1.0] * 5, [0.25, 0.25, 0.5], [0.0, 1e-150, 1.0]):
        assert study_pool.Apart.of_std(np.array(equal)).interval is None
