"""Policies against the model they started from: the tests by hand, the study, its cache, and benchmarks in training."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import norm

from conftest import rest_slow
from poise.cli import main as cli
from poise.errors import PoiseError
from poise.integrations import lm_eval as harness
from poise.models.loading import resolve_model
from poise.policy import evaluate as evaluate_policy
from poise.policy import train as train_policy
from poise.policy.evaluate import Config, average, average_difference, fluctuation, paired_difference
from poise.policy.loop import Training
from poise.runtime import run_folder as runs
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, config_dict, load_config_file
from poise.studies.config import LAPTOP_POLICY

# ---- outcomes ----


def outcomes(both: int, b: int, c: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """(after, before): rows that both, only `after`, only `before`, and neither have right."""
    after = np.repeat([1.0, 1.0, 0.0, 0.0], [both, b, c, neither])
    return after, np.repeat([1.0, 0.0, 1.0, 0.0], [both, b, c, neither])


def test_a_paired_difference_equals_one_worked_out_by_hand() -> None:
    found = paired_difference(*outcomes(10, 6, 1, 3))
    assert found.difference == 0.25
    assert found.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # of 7 coins none or one falls the other way
    # b' = 6.5, c' = 1.5, n' = 22: center 5/22, variance (8 - 25/22) / 22²
    half = norm.ppf(0.975) * math.sqrt(8 - 25 / 22) / 22
    assert found.interval == pytest.approx((5 / 22 - half, 5 / 22 + half))
    same = paired_difference(*outcomes(4, 0, 0, 2))
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.interval[0] == pytest.approx(-same.interval[1])
    assert same.interval[1] > 0
    assert paired_difference(*outcomes(0, 2, 0, 0)).interval[1] == 1.0


@pytest.mark.parametrize("chances", rest_slow([(0.5, 0.1, 0.1, 0.3), (0.6, 0.15, 0.05, 0.2), (0.2, 0.02, 0.01, 0.77)]))
def test_the_interval_covers_as_it_says(chances: tuple[float, ...]) -> None:
    tables = np.random.default_rng(0).multinomial(100, chances, size=2000)
    truth = chances[1] - chances[2]
    intervals = [paired_difference(*outcomes(*map(int, table))).interval for table in tables]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.94 <= covered <= 0.995


def test_the_sign_flip_test_is_that_of_every_assignment() -> None:
    """All assignments of the rows on which the two differ, in three benchmarks of different sizes."""
    pairs = [outcomes(3, 3, 0, 2), outcomes(1, 2, 1, 0), outcomes(0, 1, 1, 9)]
    differences = [after - before for after, before in pairs]
    observed = np.mean([d.mean() for d in differences])
    rows = [(t, i) for t, d in enumerate(differences) for i in np.flatnonzero(d)]
    as_far = 0
    for signs in itertools.product([-1.0, 1.0], repeat=len(rows)):
        flipped = [np.zeros_like(d) for d in differences]
        for (t, i), sign in zip(rows, signs, strict=True):
            flipped[t][i] = sign
        as_far += abs(np.mean([d.mean() for d in flipped])) >= abs(observed) - 1e-12
    after, before = zip(*pairs, strict=True)
    found = average_difference(after, before)
    assert found.difference == pytest.approx(observed)
    assert found.p_value == pytest.approx(as_far / 2 ** len(rows), abs=5e-3)


def test_the_average_of_one_benchmark_is_that_benchmark() -> None:
    after, before = outcomes(20, 9, 2, 12)
    one, alone = paired_difference(after, before), average_difference([after], [before])
    assert alone.difference == one.difference
    assert alone.p_value == pytest.approx(one.p_value, abs=5e-3)  # McNemar's test is the sign-flip test of 0 and 1
    # Its center is not drawn toward 0, and its half-width is per row, not per row and two more.
    assert sum(alone.interval) / 2 == pytest.approx(alone.difference)
    assert np.ptp(alone.interval) == pytest.approx(np.ptp(one.interval) * 45 / 43)


def test_the_interval_of_an_average_equals_one_worked_out_by_hand() -> None:
    after, before = zip(outcomes(10, 6, 1, 3), outcomes(2, 0, 0, 6), strict=True)
    found = average_difference(after, before)
    # Spreads 6.5 + 1.5 - 5²/22 and 0.5 + 0.5 - 0, of 20 and 8 rows.
    half = norm.ppf(0.975) * math.sqrt((8 - 25 / 22) / 20**2 + 1 / 8**2) / 2
    assert found.difference == 0.125
    assert found.interval == pytest.approx((0.125 - half, 0.125 + half))
    after, before = outcomes(0, 2, 0, 0)
    assert average_difference([after] * 2, [before] * 2).interval[1] == 1.0


@pytest.mark.parametrize("truth", [0.0, 0.1, 0.25])
@pytest.mark.parametrize(("rows", "least", "most"), [(12, 0.93, 1.0), (100, 0.93, 0.99)])
def test_the_interval_of_an_average_covers_as_it_says(truth: float, rows: int, least: float, most: float) -> None:
    """16 benchmarks; a row is right only after with chance 0.1 + truth, only before with 0.1, in both with 0.3."""
    coins = np.random.default_rng(0).random((500, 16, rows))
    after, before = (right.astype(float) for right in (coins < 0.4 + truth, (coins < 0.3) | (coins >= 0.9)))
    found = [average_difference([*one], [*other], draws=1) for one, other in zip(after, before, strict=True)]
    assert np.mean([sum(one.interval) / 2 - one.difference for one in found]) == pytest.approx(0, abs=1e-12)
    covered = np.mean([one.interval[0] <= truth <= one.interval[1] for one in found])
    assert least <= covered <= most


def test_benchmarks_count_equally_whatever_their_size() -> None:
    small, large = harness.Answers("acc", "01", {}, 0), harness.Answers("acc", "1" * 99 + "0", {}, 0)
    mean, stderr = average([small, large])
    assert mean == pytest.approx((0.5 + 0.99) / 2)
    assert stderr == pytest.approx(math.hypot(0.5, 0.1 / 10) / 2)  # stds over n - 1: 1/√2 and 0.1
    draws = np.random.default_rng(0).random((20_000, 102)) < np.repeat([0.5, 0.9], [2, 100])
    means = (draws[:, :2].mean(-1) + draws[:, 2:].mean(-1)) / 2
    parts = [harness.Answers("acc", "01", {}, 0), harness.Answers("acc", "1" * 90 + "0" * 10, {}, 0)]
    unbiased = math.sqrt(2 / 1)  # n - 1 of two rows overstates the binomial variance twofold
    assert math.hypot(parts[0].stderr / unbiased, parts[1].stderr) / 2 == pytest.approx(means.std(), rel=0.02)


def test_fluctuation_equals_values_worked_out_by_hand() -> None:
    rows = [{"step": step, "task": "race", "mean": mean} for step, mean in [(0, 0.5), (4, 0.7), (2, 0.3), (6, 0.6)]]
    rows.append({"step": 0, "task": "piqa", "mean": 0.4})
    found = fluctuation(rows)
    assert (found["race"]["steps"], found["race"]["mean"]) == ([0, 2, 4, 6], [0.5, 0.3, 0.7, 0.6])
    assert found["race"]["range"] == pytest.approx(0.4)
    assert found["race"]["largest_drop"] == pytest.approx(0.2)
    assert found["race"]["std"] == pytest.approx(np.std([0.5, 0.3, 0.7, 0.6], ddof=1))
    assert found["piqa"] == {"steps": [0], "mean": [0.4], "std": None, "range": 0.0, "largest_drop": 0.0}


# ---- training with benchmarks ----


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmarks of three shapes; a model of random weights is right in some rows."""
    folder = tmp_path_factory.mktemp("benchmarks")
    words = ["good", "bad", "a fine film", "it is really awful", "the phone", "love", "not this"]
    rows = {
        "piqa": [
            {"query": f"Question: {i} {words[i % 7]}?", "choices": [words[i % 5], words[(i + 3) % 7]], "gold": i % 2}
            for i in range(24)
        ],
        "winogrande": [
            {"context_options": [f"{i} the pan", f"{i} a kettle"], "continuation": words[i % 7], "gold": i % 2}
            for i in range(20)
        ],
        "gsm8k": [{"question": f"How many {i}?", "answer": f"#### {i}"} for i in range(3)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.fixture(scope="module")
def training(reward_folder: Path, prompts_file: Path, tiny_model: str, data: Path) -> train_policy.Config:
    return replace(
        LAPTOP_POLICY,
        prompts=str(prompts_file), reward=str(reward_folder / "brme"), model=tiny_model,
        num_steps=4, prompts_per_step=2, completions_per_prompt=4, max_tokens=8, adapted_layers=2, lora_rank=4,
        baseline_completions=16, save_every=2, eval_completions=2, learning_rate=0.03,
        eval_every=1, eval_tasks=("piqa", "winogrande"), eval_data=str(data), eval_rows=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(training: train_policy.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(training, output=str(tmp_path_factory.mktemp("runs") / "lora"))
    return train_policy.run(config).folder


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_benchmarks_do_not_disturb_the_training(
    training: train_policy.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str
) -> None:
    """Written answers included: with and without benchmarks every file is the same but for the clock."""
    monkeypatch.setattr(harness, "MAX_TOKENS", 8)
    monkeypatch.setattr(train_policy, "evaluate", lambda *args: harness.evaluate(*args, max_tokens=8))
    rate = 0.03 if tune == "lora" else 1e-3
    asked = dataclasses.replace(
        training, output=str(tmp_path / "asked"), tune=tune, learning_rate=rate,
        eval_tasks=(*training.eval_tasks, "gsm8k"), num_steps=3, baseline_completions=8,
    )  # fmt: skip
    calm = dataclasses.replace(asked, output=str(tmp_path / "calm"), eval_every=0)
    one, other = (train_policy.run(config).folder for config in (asked, calm))
    assert len(list(read_rows(one / "benchmarks.jsonl"))) == 4 * 3
    assert not (other / "benchmarks.jsonl").exists()
    for name in ("samples.jsonl", "final.jsonl", "checkpoint.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for path in (one / "policy").iterdir():
        assert path.read_bytes() == (other / "policy" / path.name).read_bytes(), path.name
    steps = [
        [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in read_rows(run)]
        for run in (one / "metrics.jsonl", other / "metrics.jsonl")
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_benchmarks_are_asked_before_between_and_after(trained: Path) -> None:
    rows = list(read_rows(trained / "benchmarks.jsonl"))
    assert [(row["step"], row["task"]) for row in rows] == [
        (step, task) for step in range(5) for task in ("piqa", "winogrande")
    ]
    assert {row["rows"] for row in rows} == {20}
    assert {row["metric"] for row in rows if row["task"] == "piqa"} == {"acc_norm"}
    assert len({row["mean"] for row in rows if row["task"] == "piqa"}) > 1  # the policy did move


@pytest.mark.slow
def test_a_stopped_run_asks_again_what_its_checkpoint_does_not_know(
    training: train_policy.Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(training, output=str(tmp_path))
    step = Training.one_step

    def killed(self: Training) -> Json:
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "one_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_policy.run(config)
    rows = (tmp_path / "benchmarks.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(row)["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    (tmp_path / "benchmarks.jsonl").write_text("".join(rows[:-1]) + rows[-1][:20])  # cut off, as by a kill
    train_policy.run(config)
    assert (tmp_path / "benchmarks.jsonl").read_text() == (trained / "benchmarks.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": -1}, "--eval-every must be at least 0"),
        ({"eval_tasks": ()}, "needs --eval-tasks"),
        ({"eval_rows": 0}, "--eval-rows must be at least 1"),
        ({"eval_tasks": ("lambda",)}, "no benchmark 'lambda'; choose from"),
        ({"eval_tasks": ("race",)}, "has no race.jsonl"),
        (
            {"algorithm": "grpo"},
            "--eval-every is for --algorithm ppo, not grpo",
        ),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    training: train_policy.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Json, message: str
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_policy, "Training", load)
    with pytest.raises(PoiseError, match=message) as caught:
        train_policy.run(dataclasses.replace(training, output=str(tmp_path / "run"), **changes))
    assert "\n" not in str(caught.value)


# ---- the study ----


@pytest.fixture
def config(trained: Path, tiny_model: str, data: Path, tmp_path: Path) -> Config:
    return Config(
        policies=(str(trained),), model=tiny_model, data=str(data), tasks=("piqa", "winogrande", "gsm8k"), rows=20,
        max_tokens=8, output=str(tmp_path / "out"),
    )  # fmt: skip


def test_a_run_leaves_what_it_says(
    config: Config, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate_policy.run(config).results
    assert results is not None
    assert results["tasks"] == ["piqa", "winogrande", "gsm8k"]
    start, policy = results["policies"]
    assert (start["name"], policy["name"], policy["path"]) == ("llama", "lora", str(trained))
    for task in (*start["tasks"].values(), start["average"]):
        assert not {"difference", "interval", "p_value"} & task.keys()
    for name, task in policy["tasks"].items():
        own, first = (np.array(list(side["outcomes"]), dtype=float) for side in (task, start["tasks"][name]))
        assert set(task["outcomes"]) <= {"0", "1"}
        assert task["rows"] == len(own) == (3 if name == "gsm8k" else 20)
        assert task["mean"] == own.mean()
        assert task["difference"] == pytest.approx(own.mean() - first.mean())
        assert task["interval"][0] <= task["difference"] <= task["interval"][1]
        assert 0 < task["p_value"] <= 1
    means = [task["mean"] for task in policy["tasks"].values()]
    assert policy["average"]["mean"] == pytest.approx(np.mean(means))
    assert policy["average"].keys() == {"mean", "stderr", "difference", "interval", "p_value"}
    logged = results["fluctuation"]["lora"]["piqa"]
    assert results["fluctuation"].keys() == {"lora"}
    assert logged["steps"] == [0, 1, 2, 3, 4]
    # What was logged in training, of the first and the last step, is what is found now.
    assert logged["mean"][0] == start["tasks"]["piqa"]["mean"]
    assert logged["mean"][-1] == policy["tasks"]["piqa"]["mean"]
    assert start["tasks"]["piqa"]["outcomes"] != policy["tasks"]["piqa"]["outcomes"]
    shown = capsys.readouterr().err
    assert "average" in shown
    assert "winogrande" in shown
    copied = Path(shutil.copytree(trained, tmp_path / "copied"))
    elsewhere = dataclasses.replace(config, policies=(str(copied),))
    assert evaluate_policy.run(elsewhere).results == results
    (copied / "policy" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(PoiseError, match="differs in policies"):
        evaluate_policy.run(elsewhere)
    settings = (tmp_path / "out" / "config.yaml").read_text()
    (tmp_path / "out" / "config.yaml").write_text(settings.replace(str(trained), str(copied)))
    with pytest.raises(PoiseError, match="is finished, and of its inputs --policies 1 changed since"):
        evaluate_policy.run(elsewhere)


def test_adapters_answer_as_the_model_they_are_folded_into(config: Config, trained: Path, tmp_path: Path) -> None:
    from poise.policy import merge

    merged = merge.run(merge.Config(policy=str(trained), output=str(tmp_path / "merged")))
    results = evaluate_policy.run(dataclasses.replace(config, policies=(str(trained), str(merged)))).results
    assert results is not None
    _, adapted, folded = results["policies"]
    assert [task["outcomes"] for task in adapted["tasks"].values()] == [
        task["outcomes"] for task in folded["tasks"].values()
    ]


def test_a_whole_model_run_is_that_model(training: train_policy.Config, config: Config, tmp_path: Path) -> None:
    full = dataclasses.replace(
        training, tune="full", learning_rate=1e-3, output=str(tmp_path / "full"), num_steps=1, eval_every=0
    )
    out = train_policy.run(full)
    copy = shutil.copytree(out.folder / "policy", tmp_path / "policy")
    wanted = dataclasses.replace(config, policies=(str(out.folder), str(copy)), tasks=("piqa",))
    results = evaluate_policy.run(wanted).results
    assert results is not None
    assert results["policies"][1]["tasks"] == results["policies"][2]["tasks"]
    assert [policy["name"] for policy in results["policies"]] == ["llama", "full", "policy"]


def test_the_same_is_not_asked_twice(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    first = evaluate_policy.run(config).results
    asked: list[str] = []

    def evaluate(model: Any, tokenizer: Any, task: harness.Task, **options: Any) -> harness.Answers:
        asked.append(task.name)
        return harness.evaluate(model, tokenizer, task, **options)

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate_policy, "evaluate", evaluate)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_policy, "load_policy", load)
        again = evaluate_policy.run(dataclasses.replace(config, output=str(tmp_path / "again"))).results
        assert again == first
        assert evaluate_policy.run(config).results == first  # a finished run, which does not even look
    assert asked == []
    kept = sorted((tmp_path / "cache" / "benchmarks").glob("*.json"))
    assert len(kept) == 2 * 3
    for number, path in enumerate(kept):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_truncated": number}))
    capsys.readouterr()
    evaluate_policy.run(dataclasses.replace(config, output=str(tmp_path / "truncated")))
    told = re.findall(
        r": (\d+) requests are longer than the model's context", " ".join(capsys.readouterr().err.split())
    )
    assert sum(map(int, told)) == sum(range(2 * 3))
    fewer = dataclasses.replace(config, output=str(tmp_path / "fewer"), tasks=("piqa",), policies=(), rows=19)
    evaluate_policy.run(fewer)
    assert asked == ["piqa"]
    # One weight more in the same folder is another model.
    moved = tmp_path / "model"
    shutil.copytree(tiny_model, moved)
    evaluate_policy.run(dataclasses.replace(fewer, output=str(tmp_path / "moved"), model=str(moved)))
    assert asked == ["piqa"]  # a copy is the same model
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    evaluate_policy.run(dataclasses.replace(fewer, output=str(tmp_path / "other"), model=str(moved)))
    assert asked == ["piqa", "piqa"]


def test_adapters_of_any_folder_are_a_policy(trained: Path, tmp_path: Path) -> None:
    """RUN/policy, RUN/best, a rung of the ladder, a copy: with the logits of the policy in its run."""
    shutil.copytree(trained / "policy", tmp_path / "kl-5")
    ids = torch.tensor([[5, 60, 100, 7]])
    logits = []
    for path in (trained, trained / "policy", tmp_path / "kl-5"):
        model, tokenizer = evaluate_policy._source(str(path), resolve_model).load()
        assert tokenizer.chat_template
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    start, _ = evaluate_policy._source(load_config_file(trained / "config.yaml")["model"], resolve_model).load()
    with torch.no_grad():
        assert not torch.allclose(start(input_ids=ids).logits, logits[0])


def test_bad_input_is_one_line(config: Config, trained: Path, reward_folder: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((trained / "config.yaml").read_text())
    for changes, message in [
        ({"policies": (str(unfinished),)}, "is not a finished `poise train-policy` run"),
        ({"policies": (str(reward_folder),)}, "is not a finished `poise train-policy` run"),
        ({"policies": (str(tmp_path),)}, "is not a model folder"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"rows": -1}, "--rows must be at least 0, got -1"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
        ({"tasks": ("pica",)}, "no benchmark 'pica'"),
        ({"data": str(tmp_path / "none")}, "no such folder"),
    ]:
        with pytest.raises(PoiseError, match=message) as caught:
            evaluate_policy.run(dataclasses.replace(config, **changes))
        assert "\n" not in str(caught.value)
        assert not Path(config.output).exists()


def test_the_command_writes_its_settings_and_refuses_in_one_line(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", config.model, "--data", config.data, "--output", str(tmp_path / "command"), "--rows", "5"]
    assert cli.main(["evaluate-policy", *options, "--tasks", "piqa", "winogrande"]) == 0
    assert runs.load_config_file(tmp_path / "command" / "config.yaml")["tasks"] == ["piqa", "winogrande"]
    capsys.readouterr()
    assert cli.main(["evaluate-policy", *options, "--tasks", "race"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert config_dict(Config())["policies"] == []
