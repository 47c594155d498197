"""The report page: what it claims, that nothing in it runs or is fetched, and that a browser shows it."""

import contextlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from conftest import rest_slow
from pages import CHROMIUM, Page, assert_all_is_seen, needs_chromium, poison
from poise.errors import PoiseError
from poise.reports import plots, run_pages
from poise.reports import quickstart_page as report
from poise.reports.config import ReportConfig
from poise.runtime.run_folder import Json, write_json

pytestmark = pytest.mark.usefixtures("drawn_once")
SCRIPT = '<script>document.title="pwned"</script>'
BREAKOUT = '"><img src=x onerror="document.title=1"></style></svg>'


# ---- a finished quickstart, made up ----


def make_arm(name: str, label: str, reward: str, objective: str, num_heads: int, fall: float) -> Json:
    """An arm whose gold rises, then falls by `fall`, while its proxy rises throughout."""
    steps = [
        {
            "step": i, "kl": 0.28 * i - 0.02, "proxy": 0.09 * i, "disagreement": 0.2 + 0.02 * i, "gap": 0.3 + 0.04 * i,
            "gold": 0.15 + 0.3 * math.sin(i / 8) - fall * (i / 24) ** 2 + 0.03 * math.sin(37 * i),
            "routing_std": 0.4 - 0.01 * i if reward == "brme" else 0.0,
            "heads": [0.08 * i + 0.02 * i * math.sin(k) for k in range(num_heads)],
        }
        for i in range(24)
    ]  # fmt: skip
    steps[7]["gold"] = None  # a NaN of the run
    return {
        "name": name, "label": label, "reward": reward, "objective": objective, "kl_coef": 0.05, "steps": steps,
        "initial_gold": 0.15, "peak_gold": 0.5, "drawdown": fall, "seconds": 210.0,
        "final": {"gold": 0.47 - fall, "interval": [0.37 - fall, 0.57 - fall], "proxy": 1.9, "kl": 6.1},
        "step_seconds": {"sample": 2.9, "score": 0.7, "reference": 0.5, "update": 3.0},
    }  # fmt: skip


def make_comparison() -> Json:
    arms = [
        make_arm("conventional", "conventional: one head at $5 & <b>", "single", "nominal", 1, 0.16),
        make_arm("brme", "BRME: nominal and worst case of Gaussian heads", "brme", "tradeoff(0.4)", 5, 0.10),
        make_arm("robust", "robust: lower bound of posterior heads", "posterior", "lower_confidence(1)", 16, 0.0),
    ]
    text = "A tender, funny film that never talks down to its young heroine."
    answers = {arm["name"]: {"completion": text, "proxy": 2.9, "gold": 0.4, "heads": [2.9, -0.3]} for arm in arms}
    hostile = answers | {"conventional": {"completion": SCRIPT + BREAKOUT, "proxy": 3.1, "gold": -1.0, "heads": [3.1]}}
    return {
        "arms": arms,
        "differences": [make_difference("robust", 0.16, [0.05, 0.27]), make_difference("brme", 0.06, [-0.04, 0.15])],
        "completions": [
            {"prompt": f"{SCRIPT}{BREAKOUT}", "over_scored": 4.1, "arms": hostile},
            *({"prompt": f"Review film {i}.", "over_scored": 3 - i / 9, "arms": answers} for i in range(20)),
        ],
    }


def make_difference(arm: str, gold: float | None, interval: list[float] | None) -> Json:
    return {"arm": arm, "against": "conventional", "gold": gold, "interval": interval, "num_prompts": 40}


def make_pool() -> Json:
    def points(key: str, values: tuple[float, ...], peak: float) -> list[Json]:
        golds = [0.15 + peak * math.sin(i / 3) for i in range(len(values))]
        return [
            {key: value, "kl": i / 3, "proxy": i / 4, "gold": gold, "gold_low": gold - 0.05, "gold_high": gold + 0.05}
            for i, (value, gold) in enumerate(zip(values, golds, strict=True))
        ]

    choices = (("single", "nominal"), ("brme", "tradeoff(0.4)"), ("posterior", "lower_confidence(1)"), ("brme", "mean"))
    curves = [
        {
            "name": f"{reward}:{objective}", "label": f"{reward}:{objective}", "reward": reward, "objective": objective,
            "best_of_n": points("n", (1, 2, 4, 8, 16, 24), 0.2 + i / 30),
            "tilted": points("kl_coef", (2.0, 1.0, 0.5, 0.25), 0.2 + i / 30),
        }
        for i, (reward, objective) in enumerate(choices)
    ]  # fmt: skip
    spread = [{"reward": "brme", "disagreement": 0.31, "routing_std": 0.44}]
    return {"num_prompts": 40, "per_prompt": 24, "initial_gold": 0.15, "curves": curves, "head_spread": spread}


def make_reward(std_collapsed: bool = False) -> Json:
    models = {
        "single": {"num_heads": 1, "validation_accuracy": 0.69},
        "posterior": {"num_heads": 16, "validation_accuracy": 0.69, "auroc_wrong_order": {"disagreement": 0.54}},
        "brme": {
            "num_heads": 5, "validation_accuracy": 0.65,
            "auroc_wrong_order": {"disagreement": 0.45, "routing_std": 0.42},
        },
    }  # fmt: skip
    history = [{"step": 20 * i, "mse": 0.4 + 1 / i, "std": 0.9**i} for i in range(1, 12)]
    return {
        "num_preferences": 400, "num_train": 320, "num_validation": 80, "num_truncated": 2, "num_layers": 8,
        "prior_precision": 100.0, "std_collapsed": std_collapsed, "stage2_history": history, "models": models,
    }  # fmt: skip


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A folder such as `poise quickstart` leaves behind."""
    folder = tmp_path / "quickstart"
    write_json(folder / "comparison" / "results.json", make_comparison())
    write_json(folder / "pool" / "results.json", make_pool())
    write_json(folder / "reward" / "results.json", make_reward())
    stages = [{"name": "reward models", "seconds": 41.2}, {"name": "PPO, robust", "seconds": 210.0}]
    write_json(folder / "results.json", {"stages": stages, "total_seconds": 251.2, "peak_memory_gb": 3.1})
    (folder / "config.yaml").write_text(f"output: runs/quickstart\nmodel: '{SCRIPT}'\n")
    environment = {"python": "3.11.2", "system": "Linux x86_64", "device": "cpu, 2 threads", "date": "2026-11-23"}
    environment |= {"versions": {"torch": "2.6.0"}, "command": ["poise", "quickstart", "--output", "a b"]}
    write_json(folder / "environment.json", environment)
    return folder


# ---- what it says ----


def test_the_answer_comes_first_and_says_what_it_is_worth(quickstart: Path):
    page = Page(report.build(quickstart))
    paragraph = re.search(r'<p class="answer">(.*?)</p>', page.html)
    assert paragraph
    assert paragraph[1].replace("\xa0", " ") == (
        "The robust policy ended at gold +0.47, the conventional one at +0.31: +0.16 "
        "(95 % interval +0.05 to +0.27 over 40 held-out prompts)."
    )
    assert page.html.index('<p class="answer">') == page.html.index("<p ")
    assert "The BRME policy ended at gold +0.37, the conventional one at +0.31: +0.06, not distinguish" in page.text
    assert "One policy seed, one reward-model seed: an illustration, not a result" in page.text


@pytest.mark.parametrize(
    ("gold", "interval", "kind", "says"),
    [
        (0.16, [0.05, 0.27], "better", "+0.16 (95 % interval +0.05 to +0.27"),
        (0.16, [-0.05, 0.27], "unclear", "+0.16, not distinguishable from zero (95 % interval −0.05 to +0.27"),
        (-0.16, [-0.3, 0.05], "unclear", "−0.16, not distinguishable from zero"),
        (-0.16, [-0.3, -0.02], "worse", "The robust policy did worse: it ended at gold +0.47"),
        (0.0, [0.0, 0.0], "unclear", "0.000, not distinguishable from zero"),
        (0.1, [0.002, 0.2], "better", "interval +0.002 to"),
        (0.16, None, "unclear", "no interval"),
        (0.16, [None, None], "unclear", "no interval"),
        (None, None, "unclear", "–, with no interval"),
    ],
)
def test_a_verdict_claims_no_more_than_its_interval(gold: Any, interval: Any, kind: str, says: str):
    verdict = report.verdict(make_difference("robust", gold, interval), make_comparison())
    assert verdict.kind == kind
    assert says in verdict.text.replace("\xa0", " ")


@pytest.mark.slow
def test_a_collapsed_std_is_warned_of(quickstart: Path):
    assert "collapsed" not in Page(report.build(quickstart)).text
    write_json(quickstart / "reward" / "results.json", make_reward(std_collapsed=True))
    assert "The heads’ std collapsed." in Page(report.build(quickstart)).text


def test_every_section_is_there(quickstart: Path):
    text = Page(report.build(quickstart)).text
    for words in (
        "69.0 % ± 5.2", "0.54", "41 s", "3 min 30 s", "4 min 11 s", "Peak memory 3.1 GB", "over-scored by 4.1",
        "proxy +3.10 · gold −1.00", "heads −0.30 … +2.90", "poise quickstart --output 'a b'", "torch 2.6.0", "VADER",
    ):  # fmt: skip
        assert words in text
    assert text.count("over-scored by") == report.NUM_COMPLETIONS


def test_optional_pieces_leave_their_sections_out(tmp_path: Path):
    comparison = make_comparison()
    del comparison["differences"], comparison["completions"]
    comparison["arms"] = [comparison["arms"][0] | {"step_seconds": None, "final": None}]
    write_json(tmp_path / "comparison" / "results.json", comparison)
    text = Page(report.build(tmp_path)).text
    assert "it was compared with no other" in text
    for heading in ("The heads over training", "What the policies wrote", "Time and cost", "How it was made"):
        assert heading not in text
    assert "Best-of-n" not in text


def test_an_unfinished_or_damaged_folder_is_one_line(tmp_path: Path, quickstart: Path):
    with pytest.raises(PoiseError, match=r"has no comparison/results\.json: not a finished quickstart"):
        report.build(tmp_path / "nowhere")
    (quickstart / "pool" / "results.json").write_text("{")
    with pytest.raises(PoiseError, match=r"cannot read .*pool/results\.json"):
        report.build(quickstart)
    write_json(quickstart / "comparison" / "results.json", {"arms": []})
    with pytest.raises(PoiseError, match="lists no arms") as caught:
        report.build(quickstart)
    assert "\n" not in str(caught.value)
    assert not (quickstart / "report.html").exists()


# ---- what it is made of ----


def test_generated_text_stays_text(quickstart: Path):
    page = Page(report.build(quickstart))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b", "iframe", "object"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(SCRIPT) == 3  # a prompt, a completion, the config: all shown as they are
    assert BREAKOUT in page.text
    assert "$5 & <b>" in page.text  # in a figure's legend too, where `$` would start a formula


def test_nothing_on_the_page_points_outside(quickstart: Path):
    page = Page(report.build(quickstart))
    page.assert_fetches_nothing()
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.html))
    assert page.security_policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_page_is_accessible(quickstart: Path):
    page = Page(report.build(quickstart))
    page.assert_accessible()
    cards = [attributes for _, attributes in page.tags if attributes.get("class") == "card"]
    assert len(cards) == sum(tag == "svg" for tag, _ in page.tags) == 4
    assert all(card["role"] == "img" and card["aria-label"] for card in cards)
    assert ("html", {"lang": "en"}) in page.tags


def test_the_same_study_gives_the_same_page(quickstart: Path, drawn_once: dict[str, Any]):
    first = report.build(quickstart).read_text()
    drawn_once.clear()
    assert report.build(quickstart).read_text() == first


def test_curves_take_the_color_of_the_arm_they_belong_to():
    comparison, pool = make_comparison(), make_pool()
    assert list(plots.arm_styles(comparison, pool)) == ["conventional", "brme", "robust", "brme:mean"]
    arms = [plots.arm_of(curve, comparison) for curve in pool["curves"]]
    assert [arm and arm["name"] for arm in arms] == ["conventional", "brme", "robust", None]


def test_the_command_writes_the_page_and_the_figure(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_pages.run(ReportConfig(folders=(str(quickstart),), png=str(tmp_path / "curves.png")))
    assert capsys.readouterr().out == f"{quickstart}/report.html\n"
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1200


@pytest.mark.slow
def test_building_needs_no_torch_and_no_pyplot(quickstart: Path):
    code = (
        "import sys; from poise.reports import quickstart_page; quickstart_page.build(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(quickstart)], check=True, timeout=120)


# ---- in a browser ----


class Visit(NamedTuple):
    """What Chromium did with a page."""

    dom: str
    console: list[str]
    requests: list[str]
    screenshot: Path


def visit(page: Path, scratch: Path) -> Visit:
    """Open a page in headless Chromium; every console line and every request that the page (not Chromium) made."""
    net_log, screenshot = scratch / "net.json", scratch / "page.png"
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # also Chromium's own calls stay on this machine
        f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", "--v=0", f"--log-net-log={net_log}",
        "--dump-dom", f"--screenshot={screenshot}", "--window-size=1200,3000",
    )  # fmt: skip
    done = subprocess.run(
        [str(CHROMIUM), *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    log = json.loads(net_log.read_text())
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    params = [event["params"] for event in log["events"] if event["type"] == start and "params" in event]
    # What the browser asks for by itself has no page as its origin.
    requests = [item["url"] for item in params if item.get("url") and item["initiator"] != "not an origin"]
    return Visit(done.stdout, re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr), requests, screenshot)


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_the_page_and_nothing_runs_or_is_fetched(quickstart: Path, tmp_path: Path):
    seen = visit(report.build(quickstart), tmp_path)
    assert seen.console == []  # a script that slipped in would be refused by the page's policy, and that is logged
    assert seen.requests == []
    assert "<title>Poise: conventional against robust reward models</title>" in seen.dom
    assert "</html>" in seen.dom
    with Image.open(seen.screenshot) as image:
        assert image.size == (1200, 3000)
        colors = image.convert("RGB").getcolors(maxcolors=1_000_000)
        assert colors is not None
        assert len(colors) > 200
        # The color of the curve that has no swatch in the text is on the picture: the figures were drawn.
        drawn = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in colors}
        assert plots.arm_styles(make_comparison(), make_pool())["brme:mean"].color in drawn


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "case",
    rest_slow(
        [
            ("", '<script>console.error("bad")</script>', "bad", []),
            ("", "<script>undefined_function()</script>", "ReferenceError", []),
            ("", '<img src="http://127.0.0.1:9/x">', None, ["http://127.0.0.1:9/x"]),
            ("", '<img src="http://example.invalid/y">', None, ["http://example.invalid/y"]),
            ("<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">", SCRIPT, "violates", []),
        ]
    ),
)
def test_the_browser_check_can_fail(tmp_path: Path, case: tuple[str, str, str | None, list[str]]):
    head, body, console, requests = case
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><html><head><title>t</title>{head}</head><body>{body}</body></html>")
    seen = visit(page, tmp_path)
    assert seen.requests == requests
    assert "<title>t</title>" in seen.dom
    if console:
        assert any(console in line for line in seen.console)


@pytest.mark.slow
@needs_chromium
def test_the_browser_check_sees_a_changed_title(tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><html><head><title>t</title></head><body>{SCRIPT}</body></html>")
    assert "<title>pwned</title>" in visit(page, tmp_path).dom


def test_characters_that_are_not_seen_are_shown_as_escapes(quickstart: Path):
    poison(quickstart)
    assert_all_is_seen(report.build(quickstart).read_text())


@pytest.mark.parametrize("value", rest_slow([None, "text", 3, [], {}, [1], {"a": 1}]), ids=str)
def test_results_of_a_wrong_form_are_one_line(quickstart: Path, value: Any):
    file = quickstart / "comparison" / "results.json"
    before = json.loads(file.read_text())
    for field in before:
        file.write_text(json.dumps(before | {field: value}))
        with contextlib.suppress(PoiseError):  # no other error leaves; what is optional may be of any form
            report.build(quickstart)
