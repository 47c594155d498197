"""The study: which cells there are, what survives a failure or a stop, and means over seeds by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from poise import study, train_policy, train_reward
from poise.data import Preference
from poise.errors import PoiseError
from poise.runs import Run

ARMS = ("single", "brme_0.4")


def config(tmp_path: Path, preferences: Path, prompts: Path, model: str, **changes: Any) -> study.Config:
    settings = {"arms": ARMS, "reward_seeds": 1, "num_layers": 2, "num_steps": 2, "max_tokens": 4} | changes
    return study.Config(
        preferences=str(preferences), prompts=str(prompts), eval_prompts=str(prompts), output=str(tmp_path / "study"),
        model=model, **settings,
    )  # fmt: skip


def in_this_process(cell: study.Cell, _jobs: int = 1) -> str:
    """`study.run_cell` without starting an interpreter."""
    try:
        (train_reward if cell.command == "train-reward" else train_policy).run(cell.config)
    except PoiseError as error:
        return str(error)
    return ""


def test_a_study_grows_and_repeats_nothing(
    tmp_path: Path, preferences_file: Path, prompts_file: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def note(cell: study.Cell, _jobs: int = 1) -> str:
        ran.append(str(cell.folder.relative_to(tmp_path / "study")))
        return in_this_process(cell)

    monkeypatch.setattr(study, "run_cell", note)
    first = study.run(config(tmp_path, preferences_file, prompts_file, tiny_model)).results
    assert ran == ["noise-0/reward-0/reward", *(f"noise-0/reward-0/policy-0/{arm}" for arm in ARMS)]
    assert first["missing"] == {}
    assert {cell["arm"] for cell in first["cells"]} == set(ARMS)
    ran.clear()
    grown = study.run(
        config(tmp_path, preferences_file, prompts_file, tiny_model, label_noise=(0.0, 0.25), arms=(*ARMS, "constant"))
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
    def fail_once(cell: study.Cell, _jobs: int = 1) -> str:
        return "out of memory" if cell.folder.name == "constant" else in_this_process(cell)

    monkeypatch.setattr(study, "run_cell", fail_once)
    wanted = config(tmp_path, preferences_file, prompts_file, tiny_model, arms=(*ARMS, "constant"))
    results = study.run(wanted).results
    assert results["missing"] == {"noise-0/reward-0/policy-0/constant": "out of memory"}
    assert results["summary"]["0"].keys() == set(ARMS)
    monkeypatch.setattr(study, "run_cell", in_this_process)
    again = study.run(wanted).results
    assert again["missing"] == {}
    assert again["summary"]["0"].keys() == {*ARMS, "constant"}


def test_a_cell_in_a_process_of_its_own(tmp_path: Path, tiny_model: str, prompts_file: Path) -> None:
    bad = train_policy.Config(
        prompts=str(prompts_file), reward=str(tmp_path / "nowhere"), output=str(tmp_path / "cell"), model=tiny_model,
        num_steps=1,
    )  # fmt: skip
    why = study.run_cell(study.Cell("train-policy", bad))
    assert "nowhere" in why
    assert "Traceback" not in why
    assert why in (tmp_path / "cell" / "error.txt").read_text()
    Run(tmp_path / "cell").finish({})  # as if another process had finished it while this one waited for the lock
    assert study.run_cell(study.Cell("train-policy", bad)) == ""


def test_flipped_by_hand() -> None:
    pairs = [Preference("p", f"good {i}", f"bad {i}") for i in range(8)]
    found = study.flipped(pairs, 0.25, seed=0)
    assert sum(pair.chosen.startswith("bad") for pair in found) == 2
    assert all({a.chosen, a.rejected} == {b.chosen, b.rejected} for a, b in zip(pairs, found, strict=True))
    assert study.flipped(pairs, 0.0, seed=0) == pairs
    assert found != study.flipped(pairs, 0.25, seed=1)


def cell(arm: str, reward_seed: int, policy_seed: int, gold: float) -> dict[str, Any]:
    return {
        "noise": 0.25,
        "arm": arm,
        "reward_seed": reward_seed,
        "policy_seed": policy_seed,
        "hours": 0.5,
    } | dict.fromkeys(study.MEASURES, gold)


def test_summary_by_hand() -> None:
    cells = [
        cell("single", 0, 0, 1.0), cell("single", 0, 1, 2.0), cell("single", 1, 0, 4.0),
        cell("brme_0.4", 0, 0, 2.0), cell("brme_0.4", 0, 1, 2.0), cell("brme_0.4", 2, 0, 9.0),
    ]  # fmt: skip
    random.Random(0).shuffle(cells)
    found = study.summary(cells, ("single", "brme_0.4"))["0.25"]
    single, brme = found["single"], found["brme_0.4"]
    assert single["final_gold"]["mean"] == (1.5 + 4.0) / 2  # policy seeds first, then reward seeds
    assert "less_first" not in single["final_gold"]
    assert brme["final_gold"]["mean"] == (2.0 + 9.0) / 2
    assert brme["final_gold"]["less_first"] == 0.5  # seeds that both have: (1 + 0) / 2
    assert (brme["reward_seeds"], brme["policies"], brme["hours"]) == (2, 3, 1.5)
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("single", "nonsense")}, "no arm 'nonsense'; choose from single"),
        ({"arms": ("single",)}, "at least two"),
        ({"label_noise": (0.7,)}, r"shares in \[0, 0.5\]"),
        ({"reward_seeds": 0}, "--reward-seeds must be at least 1"),
        ({"num_steps": 0}, "--num-steps must be at least 1"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PoiseError, match=message):
        study.run(config(tmp_path, tmp_path / "p", tmp_path / "q", "model", **changes))
