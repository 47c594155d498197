"""`poise choose`: comparisons that hide the policy, judgments that are counted right, and the rung that comes of it."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise.cli.main import main
from poise.errors import PoiseError
from poise.functional.choice import beside_start
from poise.models.loading import load_policy
from poise.models.policy import Policy, Tune
from poise.runtime.records import read_rows
from poise.runtime.run_folder import write_json, write_jsonl
from poise.studies import choose
from poise.studies.choose_config import Config as ChooseConfig
from poise.studies.pool import sample, sample_pool

PROMPTS = [f"Review the {thing}." for thing in ("film", "phone", "pan")]


def ladder_rows() -> list[dict[str, Any]]:
    """The start, and three rungs whose texts say which they are of."""
    return [
        {"prompt": prompt, "completion": f"{kl:g} {n}", "kl": kl} for kl in (0, 5, 10, 20) for prompt in PROMPTS
        for n in range(4)
    ]  # fmt: skip


@pytest.fixture
def ladder(tmp_path: Path) -> str:
    write_jsonl(tmp_path / "ladder.jsonl", ladder_rows())
    return str(tmp_path / "ladder.jsonl")


def kl_of(text: str) -> float:
    return float(text.split()[0])


def judge(out: Path, wins: dict[float, int]) -> None:
    """A judge who knows the texts: of each rung this many comparisons go to the higher KL."""
    left, rows = Counter(wins), []
    for row in read_rows(out / "comparisons.jsonl"):
        policy = "a" if kl_of(row["a"]) > kl_of(row["b"]) else "b"
        kl = kl_of(row[policy])
        better = policy if left[kl] > 0 else "ba"["ab".index(policy)]
        left[kl] -= 1
        rows.append({"id": row["id"], "better": better})
    write_jsonl(out / "judgments.jsonl", rows)


def test_comparisons_are_blind_and_fair(ladder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = ChooseConfig(ladder, str(out), per_rung=12)
    assert choose.run(config) is None
    rows = list(read_rows(out / "comparisons.jsonl"))
    assert [row["id"] for row in rows] == list(range(36))
    assert {frozenset(row) for row in rows} == {frozenset({"id", "prompt", "a", "b"})}
    key = json.loads((out / "key.json").read_text())
    for row, side in zip(rows, key["sides"], strict=True):
        below = "ba"["ab".index(side["policy"])]
        assert side["beside"] == side["rung"]  # the point below, counted from the start
        assert kl_of(row[below]) == [0, *key["kl"]][side["beside"]]
        assert kl_of(row[side["policy"]]) == key["kl"][side["rung"]]
    assert 9 <= sum(side["policy"] == "a" for side in key["sides"]) <= 27
    assert [side["rung"] for side in key["sides"]] != sorted(side["rung"] for side in key["sides"])
    per_prompt = Counter((side["rung"], row["prompt"]) for row, side in zip(rows, key["sides"], strict=True))
    assert set(per_prompt.values()) == {4}  # every prompt as often
    before = (out / "comparisons.jsonl").read_text()
    choose.run(config)
    assert (out / "comparisons.jsonl").read_text() == before


def test_judgments_decide(ladder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["choose", ladder, "--output", str(out), "--per-rung", "12", "--delta", "0.2"]
    assert main(command) == 0
    judge(out, {5.0: 2, 10.0: 12, 20.0: 0})
    assert main(command) == 0
    found = json.loads((out / "choice.json").read_text())
    assert found["comparisons"] == [
        {"kl": 5, "beside": 0, "wins": 2, "labels": 12}, {"kl": 10, "beside": 5, "wins": 12, "labels": 12},
        {"kl": 20, "beside": 10, "wins": 0, "labels": 12},
    ]  # fmt: skip
    assert [rung["kl"] for rung in found["rungs"]] == [0, 5, 10, 20]
    assert found["misfit"] < 0.05
    said = capsys.readouterr()
    assert "does not rise and fall as the law says" in said.out + said.err


@pytest.mark.parametrize(
    ("kl", "wins", "labels", "said"),
    [
        ([5, 20], [300, 10], [400, 400], "take KL 5: with 90% probability no other wins more than 0.55 against it"),
        ([5], [0], [400], "keep the start: no rung is better: with 90% probability"),
        ([5, 10], [3, 3], [6, 6], r", undecided: about [1-9]\d+ labels more would decide"),
    ],
)
def test_the_decision_is_said_in_words(
    kl: list[float], wins: list[int], labels: list[int], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, count = tmp_path / "out", sum(labels)
    rung = [number for number, of_rung in enumerate(labels) for _ in range(of_rung)]
    key = {"source": "x", "kl": [float(one) for one in kl], "sides": [{"policy": "a", "rung": one} for one in rung]}
    write_json(out / "key.json", key)
    write_jsonl(out / "comparisons.jsonl", [{"id": i, "prompt": "p", "a": "1", "b": "2"} for i in range(count)])
    won = [i < wins[number] for number, of_rung in enumerate(labels) for i in range(of_rung)]
    write_jsonl(out / "judgments.jsonl", [{"id": i, "better": "a" if one else "b"} for i, one in enumerate(won)])
    choose.run(ChooseConfig("x", str(out)))
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_rates_that_labels_cannot_tell_apart_are_said(
    ladder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ChooseConfig(ladder, str(tmp_path / "out"), per_rung=12)
    choose.run(config)
    judge(tmp_path / "out", {5.0: 6, 10.0: 6, 20.0: 6})
    decide = choose.choose
    monkeypatch.setattr(choose, "choose", lambda *given: decide(*given)._replace(decided=False, more_labels=None))
    choose.run(config)
    assert ", undecided: the rates are too close for labels to tell them apart" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_policy_that_a_run_kept_at_the_chosen_rung_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "ladder" / "kl-5").mkdir(parents=True)
    write_jsonl(run / "ladder.jsonl", [{"step": 3, "rung": 5.0, "kl": 5.23}])
    write_json(out / "key.json", {"source": str(run), "kl": [5.2], "sides": [{"policy": "a", "rung": 0}] * 40})
    write_jsonl(out / "comparisons.jsonl", [{"id": i, "prompt": "p", "a": "1", "b": "2"} for i in range(40)])
    write_jsonl(out / "judgments.jsonl", [{"id": i, "better": "a"} for i in range(40)])
    choose.run(ChooseConfig(str(run), str(out)))
    assert f"policy: {run / 'ladder' / 'kl-5'}" in capsys.readouterr().err
    (run / "ladder" / "kl-5").rmdir()
    choose.run(ChooseConfig(str(run), str(out)))
    assert "policy: " not in capsys.readouterr().err


def test_a_run_that_never_came_near_a_rung_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: m\n")
    write_jsonl(tmp_path / "run" / "samples.jsonl", [{"step": 0, "prompt": "p", "completion": "c", "kl": 1.0}])
    with pytest.raises(PoiseError, match=r"run has no step whose KL is near 5, 20 nats$"):
        choose.run(ChooseConfig(str(tmp_path / "run"), str(tmp_path / "out"), rungs=(5.0, 20.0)))
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_judgment_is_said(ladder: str, tmp_path: Path) -> None:
    config = ChooseConfig(ladder, str(tmp_path / "out"), per_rung=4)
    choose.run(config)
    (tmp_path / "out" / "judgments.jsonl").touch()
    with pytest.raises(PoiseError, match=r"judgments\.jsonl has no usable row$"):
        choose.run(config)


def test_ties_are_half_wins_and_rungs_without_labels_are_left_out() -> None:
    """Folders of earlier versions, whose rungs all stood beside the start."""
    key = {"kl": [5.0, 10.0], "sides": [{"policy": "a", "rung": 0}, {"policy": "b", "rung": 0}]}
    found = choose.count(key, {0: "tie", 1: "b"})
    assert [part.tolist() for part in found] == [[5.0], [1], [0], [1.5], [2.0]]
    assert choose.count(key, {0: "b", 1: "a"}).wins_C.tolist() == [0.0]


def test_a_rung_stays_that_another_stood_beside() -> None:
    sides = [{"policy": "a", "rung": 2, "beside": 2}, {"policy": "a", "rung": 0, "beside": 0}]
    key = {"kl": [5.0, 10.0, 20.0], "sides": sides}
    assert [part.tolist() for part in choose.count(key, {0: "a"})] == [[10.0, 20.0], [2], [1], [1.0], [1.0]]
    both = choose.count(key, {0: "a", 1: "tie"})
    assert [part.tolist() for part in both] == [[5.0, 10.0, 20.0], [1, 3], [0, 2], [0.5, 1.0], [1.0, 1.0]]


def test_rungs_of_other_prompts_stand_beside_the_start() -> None:
    rows = [{"prompt": prompt, "completion": f"{kl}", "kl": float(kl)} for kl in (0, 5, 10) for prompt in "pq"]
    rows = [row for row in rows if row["kl"] != 5 or row["prompt"] == "p"]
    _, key = choose.draw(rows, 1, 0)
    assert {(side["rung"], side["beside"]) for side in key["sides"]} == {(0, 0), (1, 1)}
    _, key = choose.draw([*rows, {"prompt": "p", "completion": "5", "kl": 5.0}], 2, 0)
    assert {(side["rung"], side["beside"]) for side in key["sides"]} == {(0, 0), (1, 0)}  # 10 shares but one prompt


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": 36, "better": "a"}, "'id' must be the number of a comparison, 0 to 35"),
        ({"id": True, "better": "a"}, "'id' must be the number"),
        ({"id": 3, "better": "A"}, "'better' must be a, b or tie"),
        ({"id": 0, "better": "a"}, "comparison 0 is judged twice"),
    ],
)
def test_wrong_judgments_are_named_by_line(ladder: str, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    config = ChooseConfig(ladder, str(tmp_path / "out"), per_rung=12)
    choose.run(config)
    write_jsonl(tmp_path / "out" / "judgments.jsonl", [{"id": 0, "better": "a"}, row])
    with pytest.raises(PoiseError, match=said) as raised:
        choose.run(config)
    assert "judgments.jsonl:2:" in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p", "completion": "c", "kl": -1}], "'kl' must be the rung's KL"),
        ([{"prompt": "p", "completion": "c", "kl": "5"}], "'kl' must be the rung's KL"),
        ([{"prompt": "p", "completion": "c", "kl": 5}], "completions of the start"),
        ([{"prompt": "p", "completion": "c", "kl": 0}, {"prompt": "q", "completion": "c", "kl": 5}], "has 0 compl"),
    ],
)
def test_files_that_hold_no_ladder_are_refused(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(PoiseError, match=said):
        choose.run(ChooseConfig(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), per_rung=1))
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_not_written_to(ladder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(PoiseError, match="holds other files"):
        choose.run(ChooseConfig(ladder, str(out), per_rung=4))
    choose.run(ChooseConfig(ladder, str(tmp_path / "ours"), per_rung=4))
    write_jsonl(tmp_path / "other.jsonl", ladder_rows())
    with pytest.raises(PoiseError, match="holds comparisons of"):
        choose.run(ChooseConfig(str(tmp_path / "other.jsonl"), str(tmp_path / "ours"), per_rung=4))


@pytest.mark.parametrize("changed", [{"per_rung": 5}, {"seed": 1}])
def test_comparisons_are_not_taken_for_others(ladder: str, tmp_path: Path, changed: dict[str, int]) -> None:
    config = ChooseConfig(ladder, str(tmp_path / "out"), per_rung=4)
    choose.run(config)
    choose.run(replace(config, delta=0.1))  # decides, and draws nothing
    option = f"--{next(iter(changed)).replace('_', '-')}"
    with pytest.raises(PoiseError, match=rf"holds comparisons that were drawn with another {option} \(\d\)"):
        replace(config, **changed).for_command()


def test_a_run_is_asked_at_its_own_steps(tiny_model: str, tmp_path: Path) -> None:
    """Steps near a rung's KL, and the start's completions for the same prompts, sampled anew."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model: {tiny_model}\nmax_tokens: 6\n")
    steps = [0.0, 4.6, 5.2, 8.5, 10.5, 13.5]
    rows = [
        {"step": step, "prompt": prompt, "completion": f"{step}", "kl": kl + (0.2 if n else -0.2)}
        for step, kl in enumerate(steps) for prompt in PROMPTS for n in range(2)
    ]  # fmt: skip
    write_jsonl(run / "samples.jsonl", rows)
    found = choose.from_run(ChooseConfig(str(run), per_rung=9))
    by_rung = {kl: Counter(row["completion"] for row in found if row["kl"] == kl) for kl in (5.0, 10.0)}
    assert by_rung == {5.0: {"1": 6, "2": 6}, 10.0: {"3": 6, "4": 6}}  # 13.5 is too far from 10, and 20 not reached
    start = [row for row in found if row["kl"] == 0]
    assert Counter(row["prompt"] for row in start) == dict.fromkeys(PROMPTS, 3)
    assert len(choose.draw(found, 9, 0)[0]) == 18
    (run / "samples.jsonl").unlink()
    with pytest.raises(PoiseError, match="is no `poise train-policy` run"):
        choose.run(ChooseConfig(str(run), str(tmp_path / "out")))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_policies_that_a_run_kept_are_sampled_for_the_prompts_of_the_start(
    tune: Tune, tiny_model: str, tmp_path: Path
) -> None:
    run, shape = tmp_path / "run", {"adapted_layers": 0, "rank": 2}
    policy = Policy(*load_policy(tiny_model), **shape, tune=tune)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    (run / "ladder").mkdir(parents=True)
    policy.save(str(run / "ladder" / "kl-5"))
    (run / "config.yaml").write_text(
        f"model: {tiny_model}\nmax_tokens: 6\nadapted_layers: 0\nlora_rank: 2\ntune: {tune}\n"
    )
    write_jsonl(run / "ladder.jsonl", [{"step": 1, "rung": 5.0, "kl": 5.234}])
    rows = [
        {"step": step, "prompt": prompt, "completion": f"{step}", "kl": kl}
        for step, kl in enumerate([0.0, 5.2, 10.5]) for prompt in PROMPTS for _ in range(2)
    ]  # fmt: skip
    write_jsonl(run / "samples.jsonl", rows)
    found = choose.from_run(ChooseConfig(str(run), per_rung=6, rungs=(5.0, 10.0, 20.0)))
    of = {kl: [row for row in found if row["kl"] == kl] for kl in (0.0, 5.23, 10.0)}
    assert len(found) == sum(map(len, of.values())) == 18
    assert {row["completion"] for row in of[10.0]} == {"2"}  # no policy was kept there: the run's own
    prompts = [row["prompt"] for row in of[5.23]]
    assert prompts == [row["prompt"] for row in of[0.0]]
    assert Counter(prompts) == dict.fromkeys(PROMPTS, 2)
    kept = sample(policy, list(dict.fromkeys(prompts)), 2, 6, 1, "kept")
    assert [row["completion"] for row in of[5.23]] == [row["completion"] for row in kept]
    start = sample_pool(tiny_model, list(dict.fromkeys(prompts)), 2, 6, 0)
    assert [row["completion"] for row in of[0.0]] == [row["completion"] for row in start]
    _, key = choose.draw(found, 6, 0)
    assert {(side["rung"], side["beside"]) for side in key["sides"]} == {(0, 0), (1, 1)}


def test_the_decision_as_json_is_that_of_the_equations() -> None:
    ladder = beside_start(np.array([5.0, 20.0]), np.array([300.0, 10.0]), np.array([400.0, 400.0]))
    found = choose.as_json(ladder, choose.choose(ladder))
    assert (found["chosen_kl"], found["decided"], found["misfit"]) == (5.0, True, None)
    assert found["rungs"][0]["win_rate"] == pytest.approx(0.5)
    json.dumps(found, allow_nan=False)
