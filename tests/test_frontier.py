"""The frontier's report has the values of curves counted by hand, and its picture and pages follow from the result."""

import importlib
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from poise.runtime.ladder import Best, best_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        patch.syspath_prepend(str(ROOT / "experiments"))
        yield importlib.import_module("frontier_report"), importlib.import_module("frontier_page")


@pytest.fixture
def found(modules: tuple[ModuleType, ModuleType]) -> dict[str, Any]:
    return json.loads(modules[1].newest().read_text())


def run(g2: list[float], g1: list[float] | None = None, kl: list[float] | None = None) -> dict[str, Any]:
    steps = len(g2)
    return {
        "step": list(range(steps)), "kl": kl or [10.0 * step for step in range(steps)], "reward": [0.0] * steps,
        "alarms": [], "g1": g1 or g2, "g2": g2, "deeper": g2, "other_pairs": g2[::-1],
        "std_at_start": {"g1": 1.0, "g2": 2.0, "deeper": 1.0, "other_pairs": 1.0},
    }  # fmt: skip


def test_endpoint_is_the_mean_over_kl_in_stds_of_the_start(modules: tuple[ModuleType, ModuleType]) -> None:
    report, _ = modules
    curve = run([3.0, 5.0, 9.0, 9.0])  # gains 0, 1, 3, 3 at KL 0, 10, 20, 30
    # over 5 to 10 the mean is .75, over 10 to 20 it is 2, over 20 to 30 it is 3
    assert report.endpoint(curve, "g2", 30.0) == pytest.approx((5 * 0.75 + 10 * 2 + 10 * 3) / 25)
    assert report.endpoint(curve, "g1", 10.0) == pytest.approx(1.5)


@pytest.mark.parametrize("gains", [[0.0, 1.0, 3.0, 2.0, 1.0], [0.0, -1.0, -2.0], [0.5, -1.5, 2.5, 1.5, 1.5, 2.5]])
def test_the_report_takes_the_step_that_a_run_keeps(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, gains: list[float]
) -> None:
    kept = Best(tmp_path)
    for step, gain in enumerate(gains):
        kept.keep(step, 1.0, gain, lambda: "whole", lambda *_: None)
    assert modules[0].best_step(np.array(gains)) == (best_of(tmp_path) or {"step": 0})["step"]


def test_rungs_take_the_runs_that_reach_them(modules: tuple[ModuleType, ModuleType]) -> None:
    report, _ = modules
    far, near = run([0.0, 2.0, 4.0, 6.0, 6.0]), run([0.0, 8.0, 8.0], kl=[0.0, 5.0, 6.0])
    rungs = report.at_rungs([far, near], "g2")
    # gains of the far run are 0, 1, 2, 3, 3; of the near one 0, 4, 4; each averaged over three steps
    assert rungs["5"] == {"seeds": 2, "gold": pytest.approx((1 + 8 / 3) / 2)}
    assert rungs["20"] == {"seeds": 1, "gold": pytest.approx(2.0)}
    assert rungs["40"] == {"seeds": 1, "gold": pytest.approx(3.0)}
    assert "40" not in report.at_rungs([near], "g2")


def test_arms_are_paired_by_seed_and_short_runs_stand_apart(modules: tuple[ModuleType, ModuleType]) -> None:
    report, _ = modules
    flat = [0.0] * 4
    curves = {
        seed: {"single": run(flat), "typical": run([0.0, lift, lift, lift])}
        for seed, lift in ((200, 2.0), (205, 4.0), (206, 6.0))
    }
    curves[203] = {"single": run(flat), "typical": run(flat, kl=[0.0, 3.0, 6.0, 9.0])}
    curves[204] = {"single": run(flat)}
    found = report.summarized(curves, ["single", "brme", "typical"])
    assert list(found) == ["single", "typical"]
    typical = found["typical"]
    assert typical["seeds that end below KL 10"] == [203]
    # of a lift by L (L/2 stds) from KL 10 on the mean over 5 to 30 is L/2 (5 × .75 + 20) / 25
    assert typical["g2, minus single"]["difference"] == pytest.approx(0.95 * 2)
    assert typical["g2, minus single"]["seeds"] == 3
    assert typical["g2, minus single, later seeds"]["difference"] == pytest.approx(0.95 * 2.5)
    assert typical["g2, minus single"]["p after Holm"] == typical["g2, minus single"]["p"]


@pytest.mark.parametrize(("p", "difference", "word"), [(0.04, 0.1, "yes"), (0.04, -0.1, "no"), (0.06, 0.1, "open")])
def test_a_verdict_follows_from_p_after_holm(
    modules: tuple[ModuleType, ModuleType], found: dict[str, Any], p: float, difference: float, word: str
) -> None:
    for arm in found["arms"].values():
        arm.get("g2, minus single", {})["p after Holm"] = 1.0
    found["arms"]["typical"]["g2, minus single"] |= {"p after Holm": p, "difference": difference}
    assert modules[1].verdict(found, "typical") == word
    told = modules[1].answer(found)
    assert f"{word} for " in told
    assert told.startswith("**Yes**" if word == "yes" else "**Open**")


def test_numbers_have_two_digits(modules: tuple[ModuleType, ModuleType]) -> None:
    number = modules[1].number
    assert [number(0.794), number(-1.2), number(10.05), number(-0.5), number(0.03, sign=False)] == [
        "+.79", "−1.20", "+10.05", "−.50", ".03",
    ]  # fmt: skip


def test_curves_by_kl_start_at_zero_and_average_over_kl(modules: tuple[ModuleType, ModuleType]) -> None:
    grid, gain = modules[1].by_kl(run([1.0, 5.0, 5.0, 5.0]), "g2")  # gains 0, 2, 2, 2
    assert gain[0] == 0.0
    at = dict(zip(grid.tolist(), gain.tolist(), strict=True))
    assert at[5.0] == pytest.approx(1.0)  # a line is its own mean
    assert at[15.0] == pytest.approx(2.0)


@pytest.mark.parametrize("missing", ["bound_settled", "brme", "typical"])
def test_the_picture_and_the_pages_do_without_an_arm(
    modules: tuple[ModuleType, ModuleType], found: dict[str, Any], missing: str
) -> None:
    page = modules[1]
    without = deepcopy(found)
    without["arms"].pop(missing, None)
    for runs in without["curves"].values():
        runs.pop(missing, None)
    assert page.drawn(without).startswith("<svg")
    label = page.ARMS[missing][0]
    for name in ("caption", "differences", "stops", "rungs", "verdict", "finding", "answer", "summary"):
        text = page.PASSAGES[name](without)
        assert text
        assert f"| {label} |" not in text


def test_the_picture_is_of_the_result(modules: tuple[ModuleType, ModuleType], found: dict[str, Any]) -> None:
    kept = (ROOT / "docs" / "images" / "frontier.svg").read_text(encoding="utf-8")
    assert modules[1].digest(found) in kept, "run python docs/frontier_page.py"
    found["curves"]["200"]["single"]["reward"][5] += 1.0
    assert modules[1].digest(found) not in kept


def test_the_pages_say_what_the_result_says(modules: tuple[ModuleType, ModuleType], found: dict[str, Any]) -> None:
    page = modules[1]
    names = {path.name for path in page.pages()}
    assert {"README.md", "index.md", "stopping.md", "frontier.md"} <= names
    moved = deepcopy(found)
    for arm in moved["arms"].keys() - {"single"}:
        moved["arms"][arm]["g2, minus single"]["difference"] += 1.0
    for path in page.pages():
        text = path.read_text(encoding="utf-8")
        assert page.with_passages(text, found) == text, f"run python docs/frontier_page.py: {path.name} is old"
    assert page.with_passages((ROOT / "README.md").read_text(encoding="utf-8"), moved) != (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.usefixtures("modules")
def test_the_alarm_that_is_shipped_is_shown_on_the_seeds_it_was_chosen_on_and_on_later_ones() -> None:
    """Validators that see 1, .8, .5 and .9 of a reward of 2 stds; gold of the last two falls. Only .5 is below .7."""
    module = importlib.import_module("validator_alarm")
    up = [0.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    fall = [0.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0]  # by 1 std of 2

    def watched(gold: list[float], share: float) -> dict[str, Any]:
        reward = [0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        return run(gold) | {"reward": reward, "deeper": [one * share for one in reward], "other_pairs": reward}

    half, kept = watched(fall, 0.5), watched(fall, 0.9) | {"alarms": [2]}
    curves = {
        200: {"single": watched(up, 1.0)}, 201: {"single": watched(up, 0.8)},
        204: {"single": half}, 205: {"single": kept},
    }  # fmt: skip
    assert module.alarm_step(half, "deeper") == 4  # the first after the baseline
    assert module.alarm_step(kept, "deeper") is None
    found = module.alarms(curves)
    first, later = found["seeds it was chosen on"]["0.5"], found["later seeds"]["0.5"]
    assert (first["falls"], later["falls"]) == (["204 single"], ["205 single"])
    deeper = first["validator of 16 layers, held-back pairs"]
    assert (deeper["found"], deeper["false alarms"]) == ([1, 1], [0, 2])
    assert deeper["gold there, minus best step"]["difference"] == pytest.approx(-(1 - 1 / 3) / 3)  # gain 1 1/3 of 2
    assert first["validator of 8 layers, other pairs"]["found"] == [0, 1]
    assert later["validator of 16 layers, held-back pairs"]["found"] == [0, 1]
    assert later["the monitor alone"]["found"] == [1, 1]
    assert first["KL 20"]["false alarms"] == [2, 2]
    assert later["none"]["gold there, minus best step"]["difference"] == pytest.approx(-1.0)
    assert found["seeds it was chosen on"]["1"]["none"]["found"] == [0, 0]
    assert "later seeds" not in module.alarms({200: curves[200]})


def test_a_report_reads_run_folders(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    report, _ = modules
    for seed in (900, 901):
        for arm, lift in (("single", 0.0), ("typical", 2.0 + seed % 2)):
            folder = tmp_path / f"seed-{seed}" / arm
            folder.mkdir(parents=True)
            (folder / "curve.json").write_text(json.dumps(run([0.0, lift + 1, lift + 2, lift + 2 - 0.1 * lift])))
    found = report.report(tmp_path, ["single", "typical"], {})
    assert {"900", "901"} <= set(found["curves"])
    assert {900, 901} <= set(found["arms"]["typical"]["seeds"])
    assert np.isfinite(found["rank correlation of G1 and G2 over a run's steps"])


@pytest.mark.usefixtures("modules")
def test_what_policies_write_is_counted_by_hand() -> None:
    curves = importlib.import_module("frontier_curves")
    film, pan = (
        "Write a one-sentence review of a film about war.",
        [{"role": "user", "content": "Review of a pan lid."}],
    )
    rows = [{"prompt": film, "completion": "A good film."}, {"prompt": film, "completion": "A good one"}]
    rows += [{"prompt": pan, "completion": "A good one!"}]
    # pairs: a good, good film. | a good, good one | a good, good one! : four of six differ; "pan" is too short a word
    assert curves.written(rows) == {
        "distinct word pairs": pytest.approx(4 / 6), "whole sentences": pytest.approx(2 / 3),
        "on the subject": pytest.approx(1 / 3), "first": "A good film.",
    }  # fmt: skip
    assert curves.written(rows[2:] * 3)["distinct word pairs"] == pytest.approx(1 / 3)


def test_arms_without_a_run_count_with_the_largest_p(modules: tuple[ModuleType, ModuleType]) -> None:
    """Of five p-values .005 is the smallest; of the seven of the design Holm multiplies it by 7, and .04 by 5."""
    _, page = modules
    arms = ["brme", "typical", "two_depths", "single_settled", "bound_settled"]
    gaps = [
        {"p": p, "p after Holm": 0.03, "difference": 0.4, "interval": [0.1, 0.7]} for p in (0.9, 0.5, 0.4, 0.008, 0.005)
    ]
    found = {"arms": {arm: {"seeds": [200], "g2, minus single": gap} for arm, gap in zip(arms, gaps, strict=True)}}
    for gap in gaps[:3]:
        gap["p after Holm"] = 0.9
    said = page.with_all_arms(found)
    assert said.startswith(" 2 of the 7 arms")
    assert said.endswith("to .05 at most.")  # 6 times .008 is .048
    gaps[3]["p after Holm"] = gaps[4]["p after Holm"] = 0.9
    assert page.with_all_arms(found) == ""


@pytest.mark.usefixtures("modules")
def test_parts_of_the_variance_by_hand() -> None:
    found = importlib.import_module("policy_seeds").components(np.array([[1.0, 3.0], [5.0, 7.0]]))
    # within a model the variance is 2; that of the means 2 and 6 is 8, of which 2 / 2 is the policies'
    assert found["std of policy seeds"] == pytest.approx(2**0.5)
    assert found["std of reward models"] == pytest.approx(7**0.5)
    assert found["share of the reward model"] == pytest.approx(7 / 9)


@pytest.mark.usefixtures("modules")
def test_the_interval_of_the_share_holds_it_as_often_as_it_says() -> None:
    components = importlib.import_module("policy_seeds").components
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = rng.normal(size=(6, 1)) + 0.5 * rng.normal(size=(6, 3))  # .8 of the variance is the model's
        low, high = components(values)["interval of the share"]
        held += low <= 0.8 <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.usefixtures("modules")
def test_a_validator_of_half_the_depth_is_read_as_a_run_keeps_its_best() -> None:
    read = importlib.import_module("half_depth").read
    curve = run([0.0, 2.0, 4.0, 4.0, 2.0, 2.0], kl=[0.0, 5.0, 10.0, 15.0, 20.0, 25.0]) | {
        "half": [0.0, 1.0, 3.0, 2.0, 0.0, 0.0]  # a mean over two steps is largest at the fourth
    }
    curve["std_at_start"]["half"] = 1.0
    # gold in stds, as means over three steps: 1/3, 1, 5/3, 5/3, 4/3, 1
    assert read(curve, "half")["minus best step"] == pytest.approx(0.0)
    assert read(curve, "half")["minus KL 20"] == pytest.approx(1 / 3)
    assert read(curve, "half")["minus end"] == pytest.approx(2 / 3)
