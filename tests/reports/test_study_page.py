"""The page of a study: what it claims, that its script computes what Python does, and that nothing else in it runs."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image

from conftest import rest_slow
from pages import CHROMIUM, Page, assert_all_is_seen, assert_wrong_forms_are_one_line, needs_chromium, poison
from poise.errors import PoiseError
from poise.functional import best_of_n as selection
from poise.functional.objectives import HeadRewards, RewardScale, parse_objective
from poise.reports import study_page, study_plots
from poise.reports import verdicts as study_verdicts
from poise.reports.quickstart_page import Verdict
from poise.reports.summary import MEASURES
from poise.runtime.run_folder import Json, write_json

HOSTILE = '</script><script>document.title="pwned"</script><img src=x onerror="document.title=1"><!--<script>'
ARMS = {
    "single": ("single", "nominal"), "mean": ("ensemble", "mean"), "worst_case": ("ensemble", "worst_case"),
    "brme_0.4": ("brme", "tradeoff(0.4)"), "bayesian": ("posterior", "lower_confidence(1)"),
}  # fmt: skip
NOISES = ("0", "raters", "0.25")
CHECKED = ("single", "brme_0.4")  # benchmarks were asked while they trained


# ---- a finished study, made up ----


def around(value: float, width: float = 0.1) -> list[float]:
    return [value - width, value + width]


def make_measure(value: float, less: float | None, width: float = 0.1) -> Json:
    found: Json = {"mean": value, "interval": around(value, width)}
    return found if less is None else found | {"vs_baseline": less, "vs_baseline_interval": around(less, width)}


def make_summary(less: dict[str, float], seeds: int = 3) -> Json:
    """One noise: arms whose final gold is .3 and what `less` adds."""
    return {
        name: {
            "reward_seeds": seeds, "policies": seeds, "cpu_hours": 1.5 + len(name) / 7,
            **dict.fromkeys(MEASURES, make_measure(0.3 + less.get(name, 0.0), less.get(name))),
            **({"checkpoints": make_checkpoints(0.2, -0.1 if name in less else None)} if name in CHECKED else {}),
        }
        for name in ("single", *less)
    }  # fmt: skip


def make_curves(i: int) -> Json:
    """Best-of-n and tilted curves of one arm."""

    def points(key: str, values: tuple[float, ...]) -> list[Json]:
        found = []
        for j, value in enumerate(values):
            gold, proxy = 0.2 + 0.3 * np.sin(j / 4 + i / 9), 0.4 * j + i / 20
            bands = {"gold_low": gold - 0.05, "gold_high": gold + 0.05, "proxy_low": proxy, "proxy_high": proxy + 0.1}
            found.append({key: value, "kl": j / 2.5, "gold": gold, "proxy": proxy, **bands})
        return found

    less = None if i == 0 else 0.2 - 0.08 * i
    measures = {key: make_measure(0.4, less) for key in ("peak_gold", "final_gold", "drawdown", "gain")}
    fit = {"alpha": 0.41, "beta": 0.12, "r2": 0.97}
    return {
        "seeds": 20, "initial_gold": 0.2, "best_of_n": points("n", (1, 2, 3, 5, 8, 13, 23, 38, 64)),
        "tilted": points("kl_coef", study_page.KL_COEFS), "fits": {"best_of_n": fit, "tilted": fit},
        "measures": measures | ({"relative_gain": {"mean": 0.31, "interval": [0.1, 0.5]}} if i else {}),
    }  # fmt: skip


def make_benchmarks() -> Json:
    tasks = ("arc_easy", "lambada", "piqa")
    policies = []
    for i, name in enumerate(("single", "brme_0.4")):
        against = {"difference": 0.012, "interval": [-0.004, 0.028], "p_value": 0.031} if i else {}
        scores = {"metric": "acc", "mean": 0.51 + i / 50, "stderr": 0.011, "rows": 500, **against}
        policies.append({"name": name, "tasks": dict.fromkeys(tasks, scores), "average": scores})
    return {"tasks": list(tasks), "policies": policies, "fluctuation": {}}


def make_checkpoints(fall: float, less: float | None) -> Json:
    """LAMBADA at three checkpoints."""
    means = [0.41, 0.41 - fall / 2, 0.41 - fall]
    intervals = [None, *(around(mean, 0.03) for mean in means[1:])]
    moves = {key: make_measure(fall, less) for key in ("std", "range", "largest_drop")}
    return {"lambada": {"reward_seeds": 3, "steps": [0, 10, 20], "mean": means, "interval": intervals, **moves}}


def make_results() -> Json:
    less = {"mean": -0.3, "worst_case": 0.05, "brme_0.4": 0.2, "bayesian": 0.004}
    spread = {"seeds": 20, "correlation": make_measure(0.71, 0.02), "policy_gold_std": None}
    return {
        "version": 2,
        "settings": {"arms": list(ARMS), "reward_seeds": 3, "label_noise": list(NOISES), "kl_coef": 0.01},
        "arms": {
            name: {"reward": reward, "objective": objective, "label": f"{objective} of {reward} <b>"}
            for name, (reward, objective) in {**ARMS, "constant": ("single", "constant(0)"), "par": ("", "")}.items()
        },
        "missing": {"noise-raters/reward-2/policy-0/mean": f"ran out of memory {HOSTILE}"},
        "cells": [{"noise": "0", "arm": "single"}],
        "summary": {noise: make_summary(less) for noise in NOISES},
        "best_of_n": {noise: {name: make_curves(i) for i, name in enumerate([*ARMS, "constant"])} for noise in NOISES},
        "instability": {f"{noise}, other preferences": {"single": spread, "brme": spread} for noise in NOISES},
        "published": [
            {"claim": "ensembles +30 %", "published": "+30 %", "here": "+28 %", "replicated": "yes"},
            {"claim": "BRME nominal +1.1 %", "published": "+1.1 %", "here": "−4 %", "replicated": "no"},
            {"claim": "a large KL is as good", "published": "as good", "here": "±.3", "replicated": "unclear"},
        ],
        "benchmarks": make_benchmarks(),
        "comparisons": [f"noise-{noise}/reward-{seed}/policy-0/comparison" for noise in NOISES for seed in range(2)],
    }  # fmt: skip


def make_comparison(noise: str = "0", seed: int = 0, num_steps: int = 40) -> Json:
    """As `poise compare` writes it, with what the page adds."""
    rng = np.random.default_rng(seed)
    arms = []
    for i, name in enumerate(ARMS):
        num_heads = (1, 5, 5, 5, 16)[i]
        steps = [
            {
                "step": step, "kl": 0.4 * step + rng.normal() / 9, "proxy": 0.09 * step + rng.normal() / 9,
                "gold": 0.2 + 0.3 * np.sin(step / 11 + i / 3) + rng.normal() / 12, "disagreement": 0.2 + 0.01 * step,
                "gap": 0.3 + 0.02 * step, "routing_std": 0.4 if name.startswith("brme") else 0.0,
                "heads": (0.08 * step + 0.02 * step * rng.normal(size=num_heads)).tolist(),
            }
            for step in range(num_steps)
        ]  # fmt: skip
        steps[7]["gold"] = None  # a NaN of the run
        alarms = [{"step": step, "score": 1.2} for step in (23, 24, 31)] if i % 2 else []
        final = {"gold": 0.3 + i / 20, "interval": around(0.3), "proxy": 2.5, "kl": 14.0, "distinct_bigrams": 0.5}
        arms.append({"name": name, "label": name, "steps": steps, "final": final, "alarms": alarms})
    answer = {"completion": "A tender, funny film.", "proxy": 2.9, "gold": 0.4, "heads": [2.9, -0.3]}
    texts = [HOSTILE, *(f"Review film {i}." for i in range(6))]
    rows = [
        {
            "prompt": text,
            "over_scored": 4 - i / 9 - seed / 50,
            "arms": dict.fromkeys(ARMS, answer | {"completion": text}),
        }
        for i, text in enumerate(texts)
    ]
    return {"noise": noise, "reward_seed": seed, "policy_seed": 0, "arms": arms, "completions": rows}


def float32(values: ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def make_pool(num_prompts: int, per_prompt: int, noises: tuple[str, ...], seeds: int) -> Json:
    """Rewards that are right up to a point. Some completions have the same rewards as their neighbor and another gold,
    and stds are round numbers: there are ties to break.
    """
    rng = np.random.default_rng(0)
    rows = num_prompts * per_prompt
    quality = rng.normal(size=rows)
    quality[1::16] = quality[::16]
    gold = np.tanh(quality - 0.3 * quality**2 + 0.1 * rng.normal(size=rows))

    def heads(count: int, with_std: bool) -> Json:
        means = quality[:, None] + 0.6 * rng.normal(size=(rows, count))
        means[1::16] = means[::16]
        stds = float32(rng.uniform(0.1, 1, size=(rows, count)).round(1)) if with_std else None
        return {"kind": "heads", "num_heads": count, "mean": float32(means - means.mean(0)), "std": stds}

    def of_seed() -> Json:
        draws = quality[:, None] + 0.6 * rng.normal(size=(rows, 16))
        moments = {"kind": "moments", "mean": float32(draws.mean(-1)), "std": float32(draws.std(-1))}
        return {"single": heads(1, False), "ensemble": heads(5, False), "brme": heads(5, True), "posterior": moments}

    return {
        "prompts": [f"Review {i} {HOSTILE}" for i in range(num_prompts)], "per_prompt": per_prompt,
        "noises": list(noises), "seeds": list(range(seeds)), "gold": float32(gold),
        "rewards": {noise: [of_seed() for _ in range(seeds)] for noise in noises},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as `poise study` leaves behind."""
    folder, results = tmp_path_factory.mktemp("finished"), make_results()
    write_json(folder / "results.json", results)
    write_json(folder / "page-pool.json", make_pool(6, 16, NOISES[:2], 2))
    for name in results["comparisons"]:
        noise, seed = re.findall(r"noise-([^/]+)/reward-(\d)", name)[0]
        comparison = make_comparison(noise, int(seed))
        bare = {key: comparison[key] for key in ("arms", "completions")}  # its place is its folder
        write_json(folder / name / "results.json", bare)
    environment = {"python": "3.11.2", "system": "Linux x86_64", "device": "cpu", "date": "2026-11-25"}
    environment |= {"versions": {"torch": "2.6.0"}, "command": ["poise", "study", "--output", "a b"]}
    write_json(folder / "environment.json", environment)
    (folder / "config.yaml").write_text(f"output: runs/study\nmodel: '{HOSTILE}'\n")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to harm."""
    return shutil.copytree(finished, tmp_path / "study")


# ---- what it says ----


def texts(found: list[Verdict]) -> list[tuple[str, str]]:
    return [(verdict.kind, verdict.text.replace("\xa0", " ")) for verdict in found]


def test_the_answer_counts_and_failures_come_first(folder: Path):
    page = Page(study_page.build(folder))
    results = make_results()
    counts = (
        "of 12 comparisons of final gold with single, 3 are worse, 6 are not distinguishable from it and 3 are better"
    )
    assert texts(study_verdicts.headlines(results)) == [
        ("worse", f"After PPO, {counts}."),
        ("worse", f"At best-of-n, {counts}."),
    ]
    assert "best-of-n has 1 more, in its table" in page.text  # `constant`, which no policy was trained on
    found = texts(study_verdicts.findings(results))
    assert [kind for kind, _ in found] == sorted((kind for kind, _ in found), key=("worse", "unclear", "better").index)
    assert found[0] == (
        "worse",
        "After PPO, worse than single: mean −0.30 with no labels flipped (−0.40 to −0.20), −0.30 with single raters’ "
        "labels (−0.40 to −0.20), −0.30 with 25 % of labels flipped (−0.40 to −0.20).",
    )
    published = "Of 3 published figures 1 not found here: BRME nominal +1.1 %: published +1.1 %, here −4 %."
    assert ("worse", published) in found
    assert ("better", "Of 3 published figures 1 found here too.") in found
    assert ("unclear", "Of 3 published figures 1 open: the interval here holds both answers.") in found
    assert ("unclear", "On the average of the benchmarks, not distinguishable from single: brme_0.4.") in found
    order = [
        "3 are worse",
        "1 run is missing.",
        "After PPO, worse than",
        "not distinguishable from single",
        "better than",
    ]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    caveat = (
        "95 % intervals: after PPO Student’s, over 3 reward models at fewest; at best-of-n by bootstrap, over prompts"
    )
    assert f"{caveat} and 20 reward models at fewest. 3 are few" in page.text.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("less", "interval", "seeds", "kind"),
    [
        (0.2, [0.1, 0.3], 5, "better"), (0.2, [-0.1, 0.5], 5, "unclear"), (-0.2, [-0.3, -0.1], 5, "worse"),
        (0.2, [0.0, 0.4], 5, "unclear"), (0.2, [0.2, 0.2], 1, "unclear"), (0.2, [None, None], 5, "unclear"),
        (0.2, None, 5, "unclear"),
    ],
)  # fmt: skip
def test_a_verdict_claims_no_more_than_its_interval(less: float, interval: Any, seeds: int, kind: str):
    results: Json = {"settings": {"arms": ["single", "mean"]}, "summary": {"0": make_summary({"mean": less}, seeds)}}
    results["summary"]["0"]["mean"]["final_gold"] |= {"vs_baseline": less, "vs_baseline_interval": interval}
    [headline], [finding] = study_verdicts.headlines(results), study_verdicts.findings(results)
    assert finding.kind == kind
    assert ("1 is not distinguishable" in headline.text) == (kind == "unclear")


def test_differences_are_from_the_arm_that_the_settings_name_first():
    results = make_results()
    del results["summary"]["0"]["single"]  # no policy of it was trained there
    assert {one.first for one in study_verdicts.compared_arms(results)} == {"single"}


def test_no_difference_is_shown_as_zero():
    near = {"vs_baseline": -0.19, "vs_baseline_interval": [-0.461, -0.0003]}
    summary = {"0": {"mean": {"reward_seeds": 3, "final_gold": near}}}
    [found] = study_verdicts.findings({"settings": {"arms": ["single", "mean"]}, "summary": summary})
    assert "(−0.4610 to −0.0003)" in found.text


def test_one_seed_is_said_to_decide_nothing(folder: Path):
    results = make_results() | {"summary": {"0": make_summary({"mean": 0.4}, seeds=1)}}
    write_json(folder / "results.json", results)
    assert "One reward model decides nothing" in Page(study_page.build(folder)).text


def test_every_section_is_there(folder: Path):
    text = Page(study_page.build(folder)).text
    for words in (
        "Explore: which objective", "Gold and proxy against distance", "Arms after PPO", "One run, step by step",
        "While policies train", "Largest drop", "−0.100 (−0.200 to 0.000)",
        "How far reward models of different seeds are apart", "Published figures",
        "over-scored by 4.0", "heads +2.90, −0.30", "0.410", "+31 %", "p 0.031", "Of 3 tests of single tasks 3 have p",
        "0.610 to 0.810", "no labels flipped, other preferences", "ran out of memory", "poise study --output 'a b'",
        "torch 2.6.0", "Method and limits",
    ):  # fmt: skip
        assert words in text.replace("\xa0", " "), words
    assert "Not in this study" not in text
    assert text.count("over-scored by") == 7  # one a prompt, though every run has them


@pytest.mark.parametrize(
    ("absent", "says", "heading"),
    [
        (["best_of_n"], "best-of-n", "Fitted gain"),
        (["summary", "cells", "comparisons"], "policies trained by PPO", "While policies train"),
        (["benchmarks"], "benchmarks", "tests of single tasks"),
        (["instability"], "disagreement between reward models of different seeds", "are apart"),
        (["published", "missing", "arms"], "", "beside ours"),
    ],
)
def test_absent_parts_leave_their_sections_out_and_are_said(folder: Path, absent: list[str], says: str, heading: str):
    assert heading in Page(study_page.build(folder)).text
    results = make_results()
    for part in absent:
        del results[part]
    write_json(folder / "results.json", results | {"best_of_n": results.get("best_of_n", {})})
    text = Page(study_page.build(folder)).text
    assert heading not in text
    assert f"Not in this study: {says}" in text if says else "Not in this study" not in text


def test_a_comparison_whose_files_are_gone_is_said(folder: Path):
    (folder / make_results()["comparisons"][0] / "results.json").unlink()
    assert "1 of 6 comparisons, whose files are gone" in Page(study_page.build(folder)).text


def damage(change: Callable[[Json], Any], file: str = "results.json") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        write_json(folder / file, value)

    return apply


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "results.json").unlink(), "not a finished study; run poise study"),
        (lambda folder: write_json(folder / "results.json", {"stages": []}), "is not of a study"),
        (lambda folder: (folder / "results.json").write_text("{"), "cannot read"),
        (damage(lambda results: results.update(version=3)), "another version of poise; run poise study"),
        (damage(lambda results: results.pop("version")), "another version of poise"),
        (damage(lambda pool: pool.update(per_prompt=17), "page-pool.json"), "page-pool.json is damaged"),
        (damage(lambda pool: pool["rewards"]["0"][1]["brme"].update(std="????"), "page-pool.json"), "is damaged"),
        (damage(lambda pool: pool.pop("rewards"), "page-pool.json"), "is damaged"),
    ],
)
def test_what_is_no_finished_study_is_one_line(folder: Path, harm: Callable[[Path], None], says: str):
    harm(folder)
    with pytest.raises(PoiseError, match=re.escape(says)) as caught:
        study_page.build(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


# ---- what it is made of ----


def test_only_its_own_script_may_run_and_nothing_is_fetched(folder: Path):
    page = Page(study_page.build(folder))
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page.html, re.DOTALL)
    assert [attributes.strip() for attributes, _ in scripts] == [
        'type="application/json" id="study"', 'type="application/json" id="pool"', "",
    ]  # fmt: skip
    assert all("<" not in content for _, content in scripts[:2])  # neither `</script>` nor `<!--`
    digest = base64.b64encode(hashlib.sha256(scripts[2][1].encode()).digest()).decode()
    assert page.security_policy.startswith(
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    )
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    page.assert_fetches_nothing()
    assert "url(" not in page.html
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "object", "b"}


def test_the_script_writes_text_only():
    script = (Path(study_page.__file__).parent / "static" / "study.js").read_text()
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "</script",
        "<!--",
    ):
        assert way not in script
    for network in ("fetch(", "XMLHttpRequest", "WebSocket", "import("):
        assert network not in script


def test_the_page_is_accessible(folder: Path):
    page = Page(study_page.build(folder))
    page.assert_accessible()
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    anchors = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {anchor[1:] for anchor in anchors if anchor} <= identifiers
    for control in re.findall(r"<(?:select|input)[^>]*>", page.html):
        labeled = "aria-labelledby" in control or f"{control}" in "".join(re.findall(r"<label>.*?</label>", page.html))
        assert labeled, control


def test_the_same_study_gives_the_same_page(folder: Path):
    first = study_page.build(folder).read_text()
    assert study_page.build(folder).read_text() == first


@pytest.mark.slow
def test_building_needs_no_torch(folder: Path):
    code = "import sys; from poise.reports import study_page; study_page.build(sys.argv[1])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)


def test_long_runs_are_thinned_out_and_their_alarms_stay():
    comparison = make_comparison(num_steps=study_page.MAX_STEPS * 3)
    html = study_page.render(make_results(), [comparison], None, {}, "", None)
    [run] = json.loads(re.findall(r'id="study">(.*?)</script>', html)[0])["runs"]
    assert {len(arm["step"]) for arm in run["arms"]} == {study_page.MAX_STEPS}
    assert run["arms"][1]["step"][:3] == [0, 3, 6]
    assert [alarm["step"] for alarm in run["arms"][1]["alarms"]] == [23, 24, 31]


def test_mean_runs_equal_values_worked_out_by_hand():
    def one(reward_seed: int, policy_seed: int, gold: float, length: int = 3) -> Json:
        steps = [{"step": i, "kl": 2.0 * i, "proxy": 1.0, "gold": gold} for i in range(length)]
        place = {"noise": "0", "reward_seed": reward_seed, "policy_seed": policy_seed}
        return place | {"arms": [{"name": "single", "steps": steps}]}

    # Policies of one reward model are averaged first; the run that stopped early ends the mean.
    runs = list(map(study_page._run, [one(0, 0, 1.0), one(0, 1, 3.0), one(1, 0, 5.0, length=2)]))
    found = study_page._trained(runs)["0"]["single"]
    assert found["gold"] == [3.5, 3.5]
    assert found["kl"] == [1.0, 1.0]
    reach = 12.706 * 1.5  # Student's, one degree of freedom; the std of 2 and 5 over the root of 2 is 1.5
    assert found["gold_low"] == pytest.approx([3.5 - reach] * 2, rel=1e-3)
    assert found["proxy_low"] == found["proxy_high"] == [1.0, 1.0]
    assert study_page._trained(runs[:1])["0"]["single"]["gold_low"] == [None] * 3


def test_fitted_laws_equal_values_worked_out_by_hand():
    arm = {
        "initial_gold": 0.5, "fits": {key: {"alpha": 2.0, "beta": 0.5, "r2": 1.0} for key in ("best_of_n", "tilted")},
        "best_of_n": [{"kl": 0.0}, {"kl": 4.0}], "tilted": [{"kl": -1e-12}, {"kl": 1.0}],
    }  # fmt: skip
    assert study_page._laws(arm) == {"best_of_n": [0.5, 0.5 + 2 * (2 - 0.5 * 2)], "tilted": [0.5, 2.5]}
    assert study_page._laws({"initial_gold": 0.5}) == {}


def test_a_page_of_the_standard_study_is_small_and_soon_made():
    comparisons = [make_comparison(noise, seed) for noise in NOISES for seed in range(5)]
    pool = make_pool(40, 64, NOISES, 5)
    start = time.monotonic()
    html = study_page.render(make_results(), comparisons, pool, {}, "", None)
    assert time.monotonic() - start < 20
    assert len(html.encode()) < 5_000_000


def test_the_figure_has_a_panel_for_all_that_was_measured(tmp_path: Path):
    results = make_results()
    results["cells"] = [{"noise": "0", "arm": name, "final_gold": 0.3} for name in results["summary"]["0"]]
    widths = []
    for left_out in ((), ("best_of_n",), ("best_of_n", "cells")):
        study_plots.save_study(
            {key: value for key, value in results.items() if key not in left_out}, tmp_path / "study.png"
        )
        with Image.open(tmp_path / "study.png") as image:
            widths.append(image.width)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3
    single = results["summary"]["0"]["single"]["final_gold"]
    single["interval"] = None  # of one reward model
    study_plots.save_study(results, tmp_path / "study.png")


# ---- in a browser ----


class Visit(NamedTuple):
    """What Chromium made of a page."""

    dom: str
    console: list[str]
    requests: list[str]


def visit(page: Path, scratch: Path, state: str = "") -> Visit:
    """Open a page with what stands after `#` in its address; console lines, and requests that the page made."""
    net_log = scratch / "net.json"
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={scratch / 'profile'}",
        "--enable-logging=stderr", "--v=0", f"--log-net-log={net_log}", "--window-size=1200,2000", "--dump-dom",
    )  # fmt: skip
    address = f"{page.as_uri()}#{state}"
    done = subprocess.run([str(CHROMIUM), *flags, address], capture_output=True, text=True, timeout=120, check=True)
    log = json.loads(net_log.read_text())
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    params = [event["params"] for event in log["events"] if event["type"] == start and "params" in event]
    requests = [item["url"] for item in params if item.get("url") and item["initiator"] != "not an origin"]
    return Visit(done.stdout, re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr), requests)


def driven(page: Path, script: str) -> Path:
    """A copy of a page in which another script plays the reader; the page's own policy would not let it run."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    path = page.with_name("driven.html")
    path.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    return path


def decoded(text: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64).reshape(shape))


def reference(pool: Json, reward: str, spec: str, noise: str) -> tuple[ndarray, ndarray]:
    """(sizes, 5) and (KL coefficients, 5): KL, proxy, mean gold, its lowest and highest over seeds; all by Python.

    The tilted curve ends where the pool is worth fewer than ten samples a prompt.
    """
    num_prompts, size = len(pool["prompts"]), pool["per_prompt"]
    rows = num_prompts * size
    gold = decoded(pool["gold"], num_prompts, size).numpy()
    sizes = np.unique(np.geomspace(1, size, 9).round().astype(int))
    seeds, inverse_samples = [], []
    for seed in pool["rewards"][noise]:
        saved = seed[reward]
        if saved["kind"] == "moments":  # two heads that far apart have this mean and std
            mean, std = decoded(saved["mean"], rows), decoded(saved["std"], rows)
            heads = HeadRewards(torch.stack([mean - std, mean + std], -1), torch.zeros(rows, 2, dtype=torch.float64))
        else:
            means = decoded(saved["mean"], rows, saved["num_heads"])
            stds = decoded(saved["std"], rows, saved["num_heads"]) if saved["std"] else torch.zeros_like(means)
            heads = HeadRewards(means, stds)
        objective = parse_objective(spec)
        centered = RewardScale((0.0,) * heads.mean.shape[-1], 0.0, 1.0)  # the pool's heads are centered already
        proxy = centered.refitted(heads, objective).combine(heads, objective).numpy().reshape(num_prompts, size)
        best = [selection.best_of_n(proxy, values, sizes).mean(0) for values in (proxy, gold)]
        tilted = []
        for kl_coef in study_page.KL_COEFS:
            (tilted_gold, kl), (tilted_proxy, _) = (
                selection.tilted(proxy, values, kl_coef) for values in (gold, proxy)
            )
            tilted.append([kl.mean(), tilted_proxy.mean(), tilted_gold.mean()])
        weights = [selection.tilted_weights(proxy, kl_coef)[0] for kl_coef in study_page.KL_COEFS]
        inverse_samples.append([np.square(weight).sum(-1).mean() for weight in weights])
        seeds.append((np.stack([selection.best_of_n_kl(sizes), *best], -1), np.array(tilted)))
    both = [np.stack(of_policy) for of_policy in zip(*seeds, strict=True)]
    best_of_n, tilted_policies = (
        np.concatenate([points.mean(0), points[..., 2:].min(0), points[..., 2:].max(0)], -1) for points in both
    )
    samples = 1 / np.mean(inverse_samples, 0)
    reached = len(samples) if (samples >= 10).all() else int((samples < 10).argmax())
    return best_of_n, tilted_policies[:reached]


def shown_curves(dom: str) -> dict[str, list[ndarray]]:
    """Every curve on the page: its numbers in the best-of-n table, then in the table of tilted policies."""
    found: dict[str, list[ndarray]] = {}
    for table in re.findall(r'<table id="numbers-[^>]*>(.*?)</table>', dom, re.DOTALL):
        for key, body in re.findall(r'<tbody data-curve="([^"]*)">(.*?)</tbody>', table, re.DOTALL):
            rows = re.findall(r"<tr data-at.*?</tr>", body, re.DOTALL)
            numbers = [re.findall(r'data-(?:value|low|high)="([^"]*)"', row) for row in rows]
            found.setdefault(unescape(key), []).append(np.array(numbers, dtype=float))
    return found


CHOICES = {
    "heads": (
        "nominal", "worst_case", "tradeoff(0)", "tradeoff(0.4)", "tradeoff(1)", "mean", "median", "quantile(0)",
        "quantile(0.3)", "quantile(1)", "uncertainty_weighted(0.1)", "uncertainty_weighted(3)", "lower_confidence(0)",
        "lower_confidence(1.5)", "soft_min(0.05)", "soft_min(1)", "soft_min(5)", "random_head", "constant",
    ),
    "moments": (
        "mean", "uncertainty_weighted(0.1)", "uncertainty_weighted(3)", "lower_confidence(0)", "lower_confidence(1.5)",
    ),
}  # fmt: skip


def key_of(reward: str, spec: str, noise: str) -> str:
    name, _, parameter = spec.rstrip(")").partition("(")
    return f"{reward},{name},{parameter},{noise}"


@pytest.mark.slow
@needs_chromium
def test_the_page_computes_what_python_does(folder: Path, tmp_path: Path):
    pool = json.loads((folder / "page-pool.json").read_text())
    kinds = {name: saved["kind"] for name, saved in pool["rewards"]["0"][0].items()}
    choices = [(name, spec, noise) for noise in NOISES[:2] for name, kind in kinds.items() for spec in CHOICES[kind]]
    assert {spec.partition("(")[0] for spec in CHOICES["heads"]} == {
        "nominal", "worst_case", "tradeoff", "mean", "median", "quantile", "uncertainty_weighted", "lower_confidence",
        "soft_min", "random_head", "constant",
    }  # fmt: skip
    state = "&".join(f"keep={key_of(*choice)}" for choice in choices)
    seen = visit(
        study_page.build(folder), tmp_path, f"reward=brme&objective=tradeoff&parameter=0.437&noise=raters&{state}"
    )
    assert seen.console == []
    shown = shown_curves(seen.dom)
    choices.append(("brme", "tradeoff(0.437)", "raters"))
    assert shown.keys() == {key_of(*choice) for choice in choices}
    lengths = set()
    for choice in choices:
        expected = reference(pool, *choice)
        lengths.add(len(expected[1]))
        for page, python in zip(shown[key_of(*choice)], expected, strict=True):
            np.testing.assert_allclose(page.reshape(-1, 5), python, rtol=0, atol=1e-6, err_msg=str(choice))
    assert 0 < min(lengths) < max(lengths)  # curves that end early, and some that do not


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_the_page_and_nothing_else_runs_or_is_fetched(folder: Path, tmp_path: Path):
    seen = visit(
        study_page.build(folder), tmp_path, f"reward={HOSTILE}&keep={HOSTILE}&hide={HOSTILE}&run=99&arms_sort={HOSTILE}"
    )
    assert seen.console == []  # a script that slipped in would be refused by the page's policy, and that is logged
    assert seen.requests == []
    assert "<title>Poise: does a robust reward help?</title>" in seen.dom
    assert "</html>" in seen.dom
    tags = re.sub(r"<script.*?</script>", "", seen.dom, flags=re.DOTALL)
    assert "<img" not in tags
    assert "<b>" not in tags
    assert seen.dom.count("<script") == 3
    # Best-of-n, tilted and PPO for three noises each, and those of the other sections: drawn, with lines in them.
    assert seen.dom.count('<svg viewBox="0 0 ') >= 4 + 3 * 6 + 3 + 2 + 4
    assert "NaN" not in tags
    assert "undefined" not in tags


def rows_of(dom: str, table: str) -> list[tuple[str, str, str]]:
    """Noise, arm and the other attributes of every row, in the order shown."""
    body = re.findall(rf'<table id="{table}">(.*?)</table>', dom, re.DOTALL)[0]
    return re.findall(r'<tr data-noise="([^"]*)"[^>]*data-arm-name="([^"]*)"([^>]*)>', body)


@needs_chromium
def test_the_address_sorts_and_filters_the_tables(folder: Path, tmp_path: Path):
    state = (
        "arms_sort=final_gold&arms_order=descending&arms_noise=raters&curves_sort=vs_baseline&curves_order=ascending"
    )
    dom = visit(study_page.build(folder), tmp_path, state).dom
    rows = rows_of(dom, "arms-table")
    assert [arm for noise, arm, _ in rows if noise == "raters"] == [
        "brme_0.4", "worst_case", "bayesian", "single", "mean",
    ]  # fmt: skip
    assert all(("hidden" in rest) == (noise != "raters") for noise, _, rest in rows)
    assert re.findall(r'data-column="([^"]*)"[^>]*aria-sort="(\w+)"', dom) == [
        ("vs_baseline", "ascending"), ("final_gold", "descending"),
    ]  # fmt: skip
    # `single` is what the others are less: it has no value, so it is last.
    order = ("constant", "bayesian", "brme_0.4", "worst_case", "mean", "single")
    assert [row[:2] for row in rows_of(dom, "curves-table")] == [(noise, arm) for arm in order for noise in NOISES]


READER = """
const change = (id, value) => { const e = document.getElementById(id); e.value = value;
  e.dispatchEvent(new Event(e.type === 'number' || e.type === 'range' ? 'input' : 'change', {bubbles: true})); };
const note = (name) => document.body.setAttribute(`data-${name}`, location.hash);
note('start');
change('parameter', '0.75'); note('typed');
change('parameter', '7'); note('refused');
document.getElementById('keep').click();
change('reward', 'posterior'); note('moments');
change('objective', 'mean'); note('mean');
document.body.setAttribute('data-slider', document.getElementById('parameter-field').hidden);
document.body.setAttribute('data-curves', document.querySelectorAll('#numbers-best_of_n tbody').length);
document.querySelector('#kept button').click();
document.body.setAttribute('data-left', document.querySelectorAll('#numbers-best_of_n tbody').length);
const sort = document.querySelector('#arms-table th[data-column="kl"] button');
sort.click(); note('sorted'); sort.click(); note('again');
document.querySelector('[data-arm="mean"]').click(); note('hidden');
change('run', '1'); change('run-arm', 'brme_0.4'); note('run');
document.body.setAttribute('data-alarms', document.querySelectorAll('#step-charts path.alarm').length);
"""


@pytest.mark.slow
@needs_chromium
def test_a_reader_can_operate_it_and_the_address_follows(folder: Path, tmp_path: Path):
    seen = visit(driven(study_page.build(folder), READER), tmp_path)
    assert seen.console == []
    body = re.findall(r"<body[^>]*>", seen.dom)[0]
    noted = {name: unescape(value).replace("%2C", ",") for name, value in re.findall(r'data-(\w+)="([^"]*)"', body)}
    assert "parameter=0.75" in noted["typed"]
    assert noted["refused"] == noted["typed"]  # λ = 7 is out of range
    assert "reward=posterior&objective=lower_confidence&parameter=1&" in noted["moments"]
    assert "reward=posterior&objective=mean&noise=0&keep=brme,tradeoff,0.75,0" in noted["mean"]
    assert noted["slider"] == "true"
    assert (noted["curves"], noted["left"]) == ("2", "1")
    assert "arms_sort=kl&arms_order=descending" in noted["sorted"]
    assert "arms_sort=kl&arms_order=ascending" in noted["again"]
    assert noted["hidden"].endswith("hide=constant,mean")
    assert "run=1&run_arm=brme_0.4" in noted["run"]
    assert noted["alarms"] == str(7 * 3)  # three alarms in each of seven charts


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "absent", rest_slow([("best_of_n", "benchmarks", "instability"), ("summary", "cells", "comparisons")])
)
def test_a_page_without_some_parts_runs_too(folder: Path, tmp_path: Path, absent: tuple[str, ...]):
    results = {key: value for key, value in make_results().items() if key not in absent}
    write_json(folder / "results.json", {"cells": []} | results)
    (folder / "page-pool.json").unlink()
    seen = visit(study_page.build(folder), tmp_path)
    assert seen.console == []
    assert '<svg viewBox="0 0 ' in seen.dom


@pytest.mark.slow
@needs_chromium
def test_the_browser_check_can_fail(folder: Path, tmp_path: Path):
    page = study_page.build(folder)
    page.write_text(page.read_text().replace("</body>", '<script>document.title = "pwned"</script></body>'))
    seen = visit(page, tmp_path)
    assert any("violates" in line for line in seen.console)
    assert "<title>Poise" in seen.dom


def test_characters_that_are_not_seen_are_shown_as_escapes(folder: Path):
    poison(folder)
    assert_all_is_seen(study_page.build(folder).read_text())


@pytest.mark.parametrize("value", rest_slow([None, "text", 3, [], {}, [1], {"a": 1}]), ids=str)
def test_results_of_a_wrong_form_are_one_line(folder: Path, value: Any):
    """With one comparison: all six are read alike, and the page is built once for each field."""
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", results | {"comparisons": results["comparisons"][:1]})
    assert_wrong_forms_are_one_line(folder, study_page.build, value)
