"""`poise report` on any run folder: pages made of hand-written JSON, as runs leave it."""

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pages import CHROMIUM, Page, assert_all_is_seen, needs_chromium, poison
from poise.errors import PoiseError
from poise.reports import run_pages, run_plots
from poise.reports.config import ReportConfig
from poise.runtime.run_folder import Json, write_json, write_jsonl

SCRIPT = '<script>document.title="pwned"</script>'
COIN = "> **No better than a coin, as far as the validation pairs can say**: do not optimize against it."


def settings(folder: Path, **values: Any) -> Path:
    """A run folder with a config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    environment = {"python": "3.11", "system": "Linux", "device": "cpu", "date": "2026-11-28", "versions": {}}
    write_json(folder / "environment.json", environment | {"command": ["poise", "x"]})
    return folder


def policy(folder: Path, reward: str = "rm", steps: int = 12, finished: bool = True, ended: float = 0.9) -> Path:
    settings(
        folder, prompts="p.jsonl", reward=reward, objective="tradeoff(0.4)", kl_coef=0.01, num_steps=12,
        algorithm="ppo", alarm_threshold=3.0, max_tokens=20,
    )  # fmt: skip
    laps = {f"{lap}_seconds": 0.5 for lap in ("sample", "reference", "score", "update")}
    rows = [
        {
            "step": i, "reward": 0.1 * i, "reward_std": 1.0, "kl": 0.5 * i, "gap": 0.2, "disagreement": 0.1 + 0.01 * i,
            "routing_std": 0.3, "tokens": 15.0, "ended": ended, "monitor_score": i / 4, "alarm": i == 10,
            "heads": [0.1 * i, 0.2 * i], **laps,
        }
        for i in range(steps)
    ]  # fmt: skip
    write_jsonl(folder / "metrics.jsonl", rows)
    turns = [{"role": "user", "content": "Review a film."}]
    samples = [
        {"step": i, "prompt": turns, "completion": f"text of step {i} {SCRIPT}", "reward": 0.1 * i}
        for i in range(steps)
    ]
    write_jsonl(folder / "samples.jsonl", samples)
    if finished:
        alarms = [{"step": 10, "score": 3.2, "action": "log"}]
        write_json(folder / "results.json", {"reward": 1.1, "kl": 5.0, "alarms": alarms, "steps": steps})
    return folder


def reward(folder: Path) -> Path:
    settings(folder, preferences="pairs.jsonl", head_loss="x", num_heads=3, model="m")
    bins = [{"confidence": 0.6, "accuracy": 0.5, "count": 3}, {"confidence": 0.9, "accuracy": 1.0, "count": 5}]
    models: Json = {
        "single": {
            "num_heads": 1, "validation_accuracy": 0.55, "validation_accuracy_interval": [0.45, 0.65],
            "length_accuracy": 0.5, "validation_nll": 0.69, "reliability": bins,
        },
        "brme": {
            "num_heads": 3, "validation_accuracy": 0.8, "validation_accuracy_interval": [0.7, 0.9],
            "length_accuracy": 0.5, "auroc_wrong_order": {"disagreement": 0.61},
        },
    }  # fmt: skip
    history = [{"step": 20 * i, "mse": 0.4 + 1 / i, "std": 0.9**i} for i in range(1, 6)]
    counts = {"num_train": 80, "num_validation": 20, "num_truncated": 1, "std_collapsed": False}
    write_json(folder / "results.json", {"models": models, "stage2_history": history, **counts})
    (folder / "single").mkdir()
    (folder / "single" / "README.md").write_text(f"# Card\n\n{COIN}\n")
    return folder


def selection(folder: Path, gold: bool) -> Path:
    settings(folder, objectives=["single:nominal"], per_prompt=4, prompts="p.jsonl")
    points = [
        {"n": n, "kl": math.log(n), "proxy": n / 4, "proxy_low": n / 5, "proxy_high": n / 3}
        | ({"gold": n / 8, "gold_low": 0.0, "gold_high": 1.0} if gold else {})
        for n in (1, 2, 4)
    ]
    curve: Json = {"name": "single:nominal", "label": "single:nominal", "best_of_n": points, "tilted": []}
    results: Json = {"num_prompts": 2, "per_prompt": 4, "curves": [curve]}
    if gold:
        names = ("peak_gold", "drawdown", "gain")
        curve["measures"] = {name: {"mean": 0.3, "interval": [0.1, 0.5]} for name in names}
        results["initial_gold"] = 0.1
    write_json(folder / "results.json", results)
    row = {"objective": "single:nominal", "prompt": "A film?", "best": f"Good. {SCRIPT}", "reward": 1.0}
    write_jsonl(folder / "selected.jsonl", [row | {"runner_up": "Fine.", "runner_up_reward": 0.5}])
    return folder


def comparison(folder: Path, gold: float | None) -> Path:
    settings(folder, arms=["a", "b"], labels=[], pool="")
    steps = [{"step": i, "proxy": 0.1 * i, "kl": 0.2 * i, "gold": gold, "disagreement": None} for i in range(5)]
    final = {"gold": gold, "interval": None if gold is None else [0.1, 0.3], "proxy": 1.0, "kl": 2.0}
    arms = [
        {
            "name": name, "label": name, "objective": "nominal", "reward": "single", "kl_coef": 0.01, "steps": steps,
            "final": final | {"distinct_bigrams": 0.5}, "alarms": [], "initial_gold": gold, "peak_gold": gold,
        }
        for name in ("a", "b")
    ]  # fmt: skip
    difference = {"arm": "b", "against": "a", "gold": gold, "interval": [-0.1, 0.2], "num_prompts": 4}
    answers = {name: {"completion": f"text {SCRIPT}", "proxy": 1.0, "gold": gold} for name in ("a", "b")}
    results = {
        "initial": {}, "arms": arms, "differences": [] if gold is None else [difference],
        "completions": [{"prompt": "A film?", "over_scored": 1.0, "arms": answers}],
    }  # fmt: skip
    write_json(folder / "results.json", results)
    return folder


def page_of(*folders: Path) -> Page:
    page = Page(run_pages.build(folders))
    page.assert_fetches_nothing()
    page.assert_accessible()
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe"}
    return page


def test_a_policy_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "README.md").write_text(COIN)
    page = page_of(policy(tmp_path / "one", str(tmp_path / "rm"), ended=0.0))
    text = page.text.replace("\xa0", " ")
    for words in (
        "signs of over-optimization at step 10.", "went from +0.10 to +1.00 in 12 steps", "12 of 12",
        "Reward model rm: No better than a coin", "was cut at 20 tokens", "text of step 0", "text of step 11",
        "Glossary", SCRIPT,
    ):  # fmt: skip
        assert words in text, words
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    assert 'http-equiv="refresh"' not in page.html


def test_a_page_shows_what_a_validator_sees(tmp_path: Path) -> None:
    folder = policy(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").unlink()
    seen = [{"validator": 0.06 * row["step"]} | ({"transfer": 0.6} if row["step"] else {}) for row in rows]
    write_jsonl(folder / "metrics.jsonl", [row | more for row, more in zip(rows, seen, strict=True)])
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", results | {"best": {"step": 7, "kl": 3.51, "validator": 0.4}})
    page = page_of(folder)
    text = page.text.replace("\xa0", " ")
    assert "The validator likes the policy of step 7 best, at KL 3.5." in text
    assert "The validator saw 60 % of what the reward gained, at the end." in text
    assert "What the validator sees of it" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 8
    assert "The validator saw" not in Page(run_pages.build([policy(tmp_path / "alone")])).text
    assert "The validator’s gain over training steps." in Page(run_pages.build([folder, tmp_path / "alone"])).html


@pytest.mark.usefixtures("undrawn_here")
def test_a_page_says_which_heads_were_the_reward_and_that_most_completions_were_cut(tmp_path: Path) -> None:
    folder = policy(tmp_path / "run", ended=0.25)
    write_json(folder / "results.json", {"reward": 1.0, "kl": 2.0, "heads": "posterior"})
    text = Page(run_pages.build([folder])).text
    assert "rm/posterior" in text
    assert "75 % of the completions were cut at 20 tokens" in text


@pytest.mark.usefixtures("undrawn_here")
def test_a_page_says_how_a_run_ended_before_its_last_step(tmp_path: Path) -> None:
    for steps, ended, said in (
        (4, {"ended_by": "max_kl"}, "It passed --max-kl 0.5 and went back: the policy is that of 4 steps."),
        (0, {"ended_by": "max_kl"}, "It passed --max-kl 0.5 and went back: the policy is the start's."),
        (4, {"ended_by": "rollback"}, "It was ended by an alarm of the monitor (--on-alarm rollback)."),
        (4, {"ended_by": "num_steps"}, ""),
    ):
        folder = policy(tmp_path / f"{len(list(tmp_path.iterdir()))}", steps=steps)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"max_kl": 0.5}))
        write_json(folder / "results.json", {"reward": 1.0, "kl": 2.0, "alarms": [], "steps": steps, **ended})
        text = Page(run_pages.build([folder])).text.replace("’", "'")
        assert said in text
        assert said or "It passed" not in text
        assert "No step has been taken yet" not in text
        assert ("What it wrote" in text) == bool(steps)


@pytest.mark.usefixtures("undrawn_here")
def test_prompts_that_never_came_twice_are_shown_from_both_ends(tmp_path: Path) -> None:
    folder = policy(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    write_jsonl(folder / "samples.jsonl", [row | {"prompt": f"Review film {row['step']}."} for row in rows])
    text = Page(run_pages.build([folder])).text
    assert "No prompt came twice" in text
    assert [number for number in range(12) if f"text of step {number} " in text] == [0, 1, 2, 9, 10, 11]


def test_many_heads_are_drawn_faint() -> None:
    drawn = [run_plots.heads([{"step": i, "heads": [0.1] * count} for i in range(3)], "h") for count in (8, 9)]
    assert ["opacity: 0.4" in text for text in drawn] == [False, True]


def test_the_page_of_a_run_in_progress_loads_itself_anew(tmp_path: Path) -> None:
    page = page_of(policy(tmp_path / "one", steps=3, finished=False))
    assert "This run is not finished: 3 of 12 steps." in page.text
    assert ("meta", {"http-equiv": "refresh", "content": "30"}) in page.tags
    assert "has been taken yet" in page_of(policy(tmp_path / "two", steps=0, finished=False)).text


def test_a_reward_run_has_a_page(tmp_path: Path) -> None:
    page = page_of(reward(tmp_path / "one"))
    text = page.text.replace("\xa0", " ")
    assert "single orders 55.0 % of 20 validation pairs as people did (95 % interval 45.0 % to 65.0 %)" in text
    assert "single: No better than a coin" in text
    assert "0.61" in text
    (tmp_path / "one" / "results.json").unlink()
    assert "is not finished" in page_of(tmp_path / "one").text


@pytest.mark.parametrize("gold", [True, False])
def test_best_of_n_has_a_page_with_gold_and_without(tmp_path: Path, gold: bool) -> None:
    text = page_of(selection(tmp_path / "one", gold)).text
    assert ("No gold was given" in text) is not gold
    assert ("has gold +0.50" in text) is gold
    assert "runner-up +0.50: Fine." in text


@pytest.mark.parametrize("gold", [0.2, None])
def test_a_comparison_has_a_page_with_gold_and_without(tmp_path: Path, gold: float | None) -> None:
    text = page_of(comparison(tmp_path / "one", gold)).text
    assert ("No gold was given" in text) is (gold is None)
    assert ("not distinguishable from zero" in text) is (gold is not None)
    assert f"text {SCRIPT}" in text


@pytest.mark.usefixtures("undrawn_here")
def test_several_runs_make_one_page_with_contents(tmp_path: Path) -> None:
    folders = [policy(tmp_path / "one"), policy(tmp_path / "two"), reward(tmp_path / "rm")]
    page = page_of(*folders)
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    identifiers = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert len(links) == 5
    assert links <= identifiers
    assert "2 policies side by side" in page.text
    assert run_pages.build(folders, tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"


@pytest.mark.usefixtures("undrawn_here")
def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        policy(tmp_path / name / "one")
    said = page_of(Path("a/one"), Path("b/one")).text
    assert "a/one" in said
    assert "b/one" in said


def test_a_folder_of_any_name_has_a_page_whose_figures_are_whole(tmp_path: Path) -> None:
    name = 'a "b"><i>#\\d'
    page = page_of(policy(tmp_path / name))
    assert not any(tag == "i" for tag, _ in page.tags)
    used = {
        attributes["id"] for tag, attributes in page.tags if tag in ("g", "clippath", "path") and "id" in attributes
    }
    assert used
    assert all(re.fullmatch(r"[\w.-]+", one) for one in used)


def test_what_has_no_page_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match=r"is not a run folder: it has no config\.yaml; its run is"):
        run_pages.build([reward(tmp_path / "one") / "single"])
    with pytest.raises(PoiseError, match="of a command that has no page"):
        run_pages.build([settings(tmp_path / "toy", num_seeds=3)])
    write_json(policy(tmp_path / "bad") / "results.json", {"reward": "high", "kl": [1]})
    with pytest.raises(PoiseError, match="results that no page can be made of"):
        run_pages.build([tmp_path / "bad"])


@pytest.mark.usefixtures("undrawn_here")
def test_what_cannot_be_seen_is_shown_as_escapes(tmp_path: Path) -> None:
    poison(comparison(tmp_path / "one", 0.2))
    assert_all_is_seen(run_pages.build([tmp_path / "one"]).read_text())


@pytest.mark.usefixtures("undrawn_here")
def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_pages.run(ReportConfig(folders=(str(reward(tmp_path / "one")),)))
    assert capsys.readouterr().out == f"{tmp_path}/one/report.html\n"
    assert json.loads((tmp_path / "one" / "results.json").read_text())["num_train"] == 80


# ---- on a phone ----

MEASURE = """<script>addEventListener("load", () => parent.postMessage([...document.querySelectorAll(
"html, .scroll, .card, .answers")].filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.className || x.tagName)
.concat(innerWidth), "*"))</script>"""
FRAME = """<iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>
<script>onmessage = message => document.title = JSON.stringify(message.data)</script>"""


def cut_off_at_390_pixels(page: Path, scratch: Path) -> list[Any]:
    """What is wider than a phone, then the width that the page was given. Chromium's own window is never as narrow."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (scratch / "page.html").write_text(text.replace("</body>", f"{MEASURE}</body>"))
    (scratch / "frame.html").write_text(FRAME)
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--virtual-time-budget=5000",
        "--dump-dom",
    )
    command = [str(CHROMIUM), *flags, f"--user-data-dir={scratch / 'profile'}", (scratch / "frame.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return list(json.loads(re.findall(r"<title>(.*?)</title>", dom)[0].replace("&quot;", '"')))


@pytest.mark.slow
@needs_chromium
def test_nothing_is_cut_off_on_a_phone(tmp_path: Path) -> None:
    runs = [
        policy(tmp_path / "one"),
        policy(tmp_path / "two"),
        reward(tmp_path / "rm"),
        selection(tmp_path / "n", True),
    ]
    runs.append(comparison(tmp_path / "cmp", 0.2))
    assert cut_off_at_390_pixels(run_pages.build(runs), tmp_path) == [390]
