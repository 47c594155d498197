"""`poise evaluate-reward` end to end on tiny models, and its page."""

import itertools
import json
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import rest_slow
from pages import UNSEEN, assert_all_is_seen, assert_wrong_forms_are_one_line, poison
from poise.cli import evaluate_reward as command
from poise.data.evaluation_sets import read_questions
from poise.data.preferences import read_preferences
from poise.errors import PoiseError
from poise.models.reward_model import load_last_layer
from poise.models.scorer import Ensemble, FeatureExtractor, Sample, Scorer
from poise.reports import plots
from poise.reports import reward_page as evaluation_page
from poise.reward import evaluate as evaluate_reward
from poise.reward.evaluate import Config
from poise.reward.model_comparison import over_rewards
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, write_json

pytestmark = pytest.mark.usefixtures("drawn_once")
SCRIPT = '<script>document.title="pwned"</script>'
VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "rect", "line"}


@pytest.fixture(scope="module")
def reward_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture(scope="module")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pairs of another kind."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": "Add.", "chosen": f"{i}+{i}={2 * i}", "rejected": f"{i}+{i}={2 * i + 1}0"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def evaluation(reward_run: Path, preferences_file: Path, sums_file: Path, tmp_path_factory: Any) -> Path:
    """Two checkpoints of a run, judged on its own pairs and on sums."""
    output = str(tmp_path_factory.mktemp("run") / "evaluation")
    rewards = (str(reward_run), str(reward_run / "single"))
    return command.run(Config(rewards, str(preferences_file), str(sums_file), output=output)).folder


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- rows and inputs ----


def refusing_system_turns(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    return folder


@pytest.mark.parametrize("place", ["file", "ood", "member"])
def test_a_row_that_a_template_refuses_is_named_or_set_aside(reward_run: Path, tmp_path: Path, place: str) -> None:
    strict = refusing_system_turns(reward_run / "single", tmp_path / "strict")
    pair = {"chosen": "good", "rejected": "bad"}
    refused = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}], **pair}
    rows = [{"prompt": f"Review {i}.", **pair} for i in range(3)]
    bad, good = write(tmp_path / "bad.jsonl", *rows, refused), write(tmp_path / "good.jsonl", *rows)
    if place == "member":  # the second member's template refuses it
        (tmp_path / "both").mkdir()
        both = {"members": [str(reward_run / "single"), "../strict"], "means": [0.0, 0.0], "stds": [1.0, 1.0]}
        (tmp_path / "both" / "ensemble.json").write_text(json.dumps(both))
        strict = tmp_path / "both"
    rewards = (str(reward_run / "single"), str(strict))
    file, ood = (good, bad) if place == "ood" else (bad, "")
    with pytest.raises(PoiseError, match=r"bad\.jsonl:4: .*no system turns.*--on-bad-row skip"):
        evaluate_reward.run(Config(rewards, file, ood, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    done = evaluate_reward.run(Config(rewards, file, ood, output=str(tmp_path / "run"), on_bad_row="skip"))
    assert (done.results or {})["rewards"][1]["ood" if ood else "pairs"]["num_pairs"] == 3
    assert "no system turns" in (tmp_path / "bad.bad.jsonl").read_text()


def test_an_unfinished_evaluation_does_not_go_on_with_another_file(reward_run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Review {i}.", "chosen": "good", "rejected": "bad"} for i in range(3)]
    file = write(tmp_path / "pairs.jsonl", *rows)
    config = Config((str(reward_run / "single"),), file, output=str(tmp_path / "run"))
    evaluate_reward.run(config)
    (tmp_path / "run" / "results.json").unlink()
    evaluate_reward.run(config)
    write(tmp_path / "pairs.jsonl", *rows[:2])
    with pytest.raises(PoiseError, match=r"run is finished, and of its inputs --file changed since"):
        evaluate_reward.run(config)
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(PoiseError, match=r"begun with other inputs: --file changed since"):
        evaluate_reward.run(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("reward", None), ("num_heads", 1.5), ("kind", "uniform"), ("reward_scale", float("nan")), ("num_samples", 0),
     ("pairs", [1]), ("num_truncated", "0")],
)  # fmt: skip
def test_a_kept_part_that_is_wrong_is_one_line(reward_run: Path, tmp_path: Path, field: str, value: Any) -> None:
    file = write(tmp_path / "pairs.jsonl", {"prompt": "Review.", "chosen": "good", "rejected": "bad"})
    config = Config((str(reward_run / "single"),), file, output=str(tmp_path / "run"))
    evaluate_reward.run(config)
    (tmp_path / "run" / "results.json").unlink()
    kept = tmp_path / "run" / "reward-1.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {field: value}))
    with pytest.raises(PoiseError, match=r"reward-1\.json") as caught:
        evaluate_reward.run(config)
    assert "\n" not in str(caught.value)


# ---- the study ----


@pytest.mark.slow
def test_accuracy_and_probabilities_are_those_of_the_scorer(
    evaluation: Path, reward_run: Path, preferences_file: Path
) -> None:
    results = json.loads((evaluation / "results.json").read_text())
    assert results["kind"] == "pairs"
    pairs = read_preferences(preferences_file)
    scorer = Scorer.load(str(reward_run))
    rewards = [scorer([Sample(p.prompt, text)]).mean.mean().item() for p in pairs for text in (p.chosen, p.rejected)]
    margin = np.array(rewards[0::2]) - np.array(rewards[1::2])
    judged = results["rewards"][0]["pairs"]
    assert judged["num_pairs"] == 40
    assert judged["accuracy"] == pytest.approx((margin > 0).mean())
    nll = np.logaddexp(0, -scorer.layout.reward_scale * margin).mean()
    assert judged["probability"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert judged["length_accuracy"] == pytest.approx(
        np.mean([0.5 * (1 + np.sign(len(p.chosen) - len(p.rejected))) for p in pairs])
    )
    rows = list(read_rows(evaluation / "reward-1.jsonl"))
    assert [row["data"] for row in rows] == ["file"] * 40 + ["ood"] * 30
    np.testing.assert_allclose([row["margin"] for row in rows[:40]], margin, atol=1e-4)
    assert rows[0].keys() >= {"pair", "subset", "heads_probability", "disagreement", "routing_std", "random"}


def test_every_model_has_its_own_uncertainties(evaluation: Path, reward_run: Path) -> None:
    brme, single = json.loads((evaluation / "results.json").read_text())["rewards"]
    spreads = {"disagreement", "routing_std", "total_std"}
    assert spreads | {"small_margin", "error_probability", "random"} <= brme["pairs"]["uncertainties"].keys()
    assert spreads.isdisjoint(single["pairs"]["uncertainties"])
    for results, path in ((brme, reward_run / "brme"), (single, reward_run / "single")):
        has_last_layer = load_last_layer(str(path)) is not None
        assert ("last_layer_std" in results["pairs"]["uncertainties"]) == has_last_layer
        assert ("last_layer_std" in results["ood_auroc"]) == has_last_layer
    assert brme["ood_auroc"].keys() >= spreads
    assert (brme["kind"], brme["num_heads"], single["num_heads"]) == ("gaussian", 5, 1)
    assert brme["learning"]["stage2_history"][0]["step"] == 20
    assert single["learning"] is None  # the run's stds are not its own
    assert brme["num_samples"] == 2 * 40 + 2 * 30
    assert brme["pairs"]["uncertainties"]["random"] != single["pairs"]["uncertainties"]["random"]


def test_models_of_several_kinds_are_compared_and_not_averaged(evaluation: Path) -> None:
    results = json.loads((evaluation / "results.json").read_text())
    assert results["over_rewards"] == {}
    [found], models = results["differences"], results["rewards"]
    assert (found["reward"], found["versus"]) == (models[1]["reward"], models[0]["reward"])
    for data in ("pairs", "ood"):
        brme, single = (model[data] for model in models)
        assert found[f"{data} accuracy"]["mean"] == pytest.approx(single["accuracy"] - brme["accuracy"])
        assert found[f"{data} NLL"]["mean"] == pytest.approx(single["probability"]["nll"] - brme["probability"]["nll"])
    brme_rows, single_rows = (list(read_rows(evaluation / f"reward-{number}.jsonl"))[:40] for number in (1, 2))
    nll = -np.log([row["probability"] for row in single_rows]) + np.log([row["probability"] for row in brme_rows])
    reach = 1.96 * nll.std() / 40**0.5  # paired: over the 40 pairs' own differences
    assert found["pairs NLL"]["interval"] == pytest.approx([nll.mean() - reach, nll.mean() + reach], abs=0.4 * reach)


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(
    reward_run: Path, preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config((str(reward_run / "single"), str(reward_run)), str(preferences_file), output=str(tmp_path / "run"))
    loaded: list[str] = []
    load = Scorer.load

    def loading(path: str, max_length: int = 0, *, cached: bool = False) -> Scorer:
        if len(loaded) == 1 and path not in loaded:
            loaded.append("stop")
            raise KeyboardInterrupt
        loaded.append(path)
        return load(path, max_length, cached=cached)

    monkeypatch.setattr(Scorer, "load", loading)
    with pytest.raises(KeyboardInterrupt):
        evaluate_reward.run(config)
    assert not (tmp_path / "run" / "results.json").exists()
    results = evaluate_reward.run(config).results
    assert loaded == [config.rewards[0], "stop", config.rewards[1]]
    assert evaluate_reward.run(config).results == results
    assert len(loaded) == 3


def test_truncated_samples_are_counted(reward_run: Path, preferences_file: Path, tmp_path: Path) -> None:
    config = Config((str(reward_run),), str(preferences_file), max_length=8, output=str(tmp_path / "run"))
    results = evaluate_reward.run(config).results
    assert results
    assert results["rewards"][0]["num_truncated"] == results["rewards"][0]["num_samples"] == 80
    assert "80 were too long" in page_text(evaluation_page.build(tmp_path / "run"))


def test_an_ensemble_is_judged_without_a_last_layer(
    reward_run: Path, preferences_file: Path, sums_file: Path, tmp_path: Path
) -> None:
    members = [str(reward_run / "posterior"), str(reward_run / "single")]
    samples = [Sample(p.prompt, p.chosen) for p in read_preferences(preferences_file)]
    Ensemble.fit(members, samples).save(tmp_path / "ensemble", members)
    config = Config(
        (str(tmp_path / "ensemble"),), str(preferences_file), str(sums_file), output=str(tmp_path / "run")
    )  # fmt: skip
    results = evaluate_reward.run(config).results
    assert results
    assert results["rewards"][0]["num_heads"] == 7
    assert "last_layer_std" not in results["rewards"][0]["pairs"]["uncertainties"]


def test_wrong_requests_are_one_line(reward_run: Path, preferences_file: Path, tmp_path: Path) -> None:
    sets = write(tmp_path / "sets.jsonl", {"prompt": "Q", "chosen": ["a"], "rejected": ["b", "c"]})
    output = str(tmp_path / "run")
    with pytest.raises(PoiseError, match="at least one reward model"):
        evaluate_reward.run(Config((), str(preferences_file), output=output))
    with pytest.raises(PoiseError, match="--ood compares pairs with pairs"):
        evaluate_reward.run(Config((str(reward_run),), str(preferences_file), sets, output=output))
    with pytest.raises(PoiseError, match="unknown objective"):
        evaluate_reward.run(Config((str(reward_run),), str(preferences_file), objective="best", output=output))
    assert not (tmp_path / "run").exists()
    with pytest.raises(PoiseError, match="not a finished poise evaluate-reward run"):
        evaluation_page.build(tmp_path)


# ---- lists of texts ----


def sets_of(chosen: int, rejected: int, count: int = 12) -> list[dict[str, Any]]:
    generator = random.Random(0)
    words = lambda good: " ".join(generator.choices(("film", "the", "is", "good" if good else "bad"), k=4))  # noqa: E731
    return [
        {
            "prompt": "Q", "chosen": [f"{words(True)} {i}" for _ in range(chosen)], "subset": f"s{i % 2}",
            "rejected": [f"{words(False)} {i}." for _ in range(rejected)],
        }
        for i in range(count)
    ]  # fmt: skip


def test_rm_bench_rows_give_a_matrix_of_the_rewards(reward_run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "styles.jsonl", *sets_of(3, 3))
    run = command.run(Config((str(reward_run),), path, output=str(tmp_path / "run")))
    assert run.results
    assert run.results["kind"] == "rm_bench"
    scorer = Scorer.load(str(reward_run))
    matrix = np.zeros((3, 3))
    for row in read_rows(Path(path)):
        c, r = (scorer([Sample("Q", text) for text in row[key]]).mean.mean(-1) for key in ("chosen", "rejected"))
        matrix += (c[:, None] > r).numpy() + 0.5 * torch.isclose(c[:, None], r, atol=1e-6).numpy()
    sets = run.results["rewards"][0]["sets"]
    np.testing.assert_allclose(sets["matrix"], matrix / 12)
    assert sets["scores"]["hard"]["accuracy"] == pytest.approx(matrix[np.triu_indices(3, 1)].mean() / 12)
    text = page_text(run.folder / "evaluation.html")
    assert "of hard comparisons" in text
    assert "s0 6 rows" in text
    assert not (run.folder / "calibration.png").exists()


def test_best_of_n_sets_stand_beside_chance(reward_run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "sets.jsonl", *sets_of(1, 3))
    run = command.run(Config((str(reward_run), str(reward_run / "single")), path, output=str(tmp_path / "run")))
    assert run.results
    sets = run.results["rewards"][0]["sets"]
    rows = list(read_rows(run.folder / "reward-1.jsonl"))
    assert sets["accuracy"] == pytest.approx(np.mean([max(row["chosen"]) > max(row["rejected"]) for row in rows]))
    assert sets["chance"] == 0.25
    [found], single = run.results["differences"], run.results["rewards"][1]["sets"]
    assert found["accuracy"]["mean"] == pytest.approx(single["accuracy"] - sets["accuracy"])
    assert "chance would in 25.0 %" in page_text(run.folder / "evaluation.html")


# ---- the page ----


class Page(HTMLParser):
    """Tags that close in the order they opened, and the text between them."""

    def __init__(self, path: Path):
        super().__init__()
        self.html, self.words = path.read_text(), [""]
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_text(path: Path) -> str:
    return " ".join(" ".join(Page(path).words).split())


def test_the_page_is_whole_and_points_nowhere(evaluation: Path) -> None:
    page = Page(evaluation / "evaluation.html")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)) > 0
    assert sum(tag == "svg" for tag, _ in page.tags) == 9  # two figures of two models on two files, and the stds'
    anchors = {v for _, attributes in page.tags for k, v in attributes.items() if k == "href" and v != "data:,"}
    assert (
        {"#glossary", "#model-1", "#model-2", "#made"}
        <= {link for link in anchors if link}
        <= {f"#{name}" for name in identifiers}
    )
    wide = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("data-label")]
    assert len(wide) > 40  # on a phone each cell says which column it is of
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    links = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
    assert all(link and link.startswith(("#", "data:")) for link in links)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert "@media print" in page.html  # the style sheet of the house
    text = page_text(evaluation / "evaluation.html")
    for words in ("Does it notice other data?", "How the stds came about", "routing_std"):
        assert words in text
    with Image.open(evaluation / "calibration.png") as image:
        assert image.width > 1200


def test_the_same_run_gives_the_same_page(evaluation: Path, drawn_once: dict[str, Any]) -> None:
    first = (evaluation / "evaluation.html").read_text()
    drawn_once.clear()
    assert evaluation_page.build(evaluation).read_text() == first


def test_texts_and_names_stay_text(reward_run: Path, tmp_path: Path) -> None:
    texts = [(f"{SCRIPT} bad {i}", f"<b>good</b> {i}") for i in range(12)]
    rows = [
        {"prompt": f"{SCRIPT} {i}", "chosen": texts[i][i % 2], "rejected": texts[i][1 - i % 2], "subset": SCRIPT}
        for i in range(12)  # whichever the model likes better, it is wrong on half
    ]
    run = command.run(Config((str(reward_run),), write(tmp_path / "p.jsonl", *rows), output=str(tmp_path / "run")))
    assert run.results
    shown = len(run.results["rewards"][0]["pairs"]["mistakes"])
    assert shown > 0
    page = Page(run.folder / "evaluation.html")
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b"}
    # A mistake's prompt, text and subset, and the subset's row.
    assert page_text(run.folder / "evaluation.html").count(SCRIPT) == 3 * shown + 1


def made_up(accuracy: list[float], over_length: list[float], spread: list[float], nll: float = 0.6) -> Json:
    """A reward model's results with given intervals; the values are their middles."""

    intervals = {"disagreement": spread, "small_margin": [0.6, 0.8], "random": [0.4, 0.7]}
    pairs: Json = {
        "num_pairs": 80, "accuracy": sum(accuracy) / 2, "accuracy_interval": accuracy, "length_accuracy": 0.55,
        "over_length": sum(over_length) / 2, "over_length_interval": over_length, "coin_nll": 0.693,
        "constant_nll": 0.65, "probability": {"nll": nll, "nll_interval": [nll - 0.03, nll + 0.03]},
        "uncertainties": {
            name: {"auroc": sum(interval) / 2, "auroc_interval": interval} for name, interval in intervals.items()
        },
    }  # fmt: skip
    return {"reward": "runs/Mine", "pairs": pairs}


@pytest.mark.parametrize(
    ("accuracy", "over_length", "kind", "says"),
    [
        ([0.6, 0.8], [0.05, 0.25], "better", "+15.0 points (95 % interval +5.0 points to +25.0 points) better."),
        ([0.6, 0.8], [-0.05, 0.25], "unclear", "not distinguishable from picking the longer text, +10.0 points"),
        ([0.6, 0.8], [-0.2, -0.1], "worse", "worse than picking the longer text, −15.0 points"),
        ([0.45, 0.65], [0.05, 0.25], "unclear", "not distinguishable from a coin toss."),
        ([0.2, 0.4], [-0.3, -0.1], "worse", "worse than a coin toss."),
    ],
)
def test_accuracy_claims_no_more_than_its_intervals(
    accuracy: list[float], over_length: list[float], kind: str, says: str
) -> None:
    found = evaluation_page.findings(made_up(accuracy, over_length, [0.55, 0.7]), "It")[0]
    assert found.kind == kind
    assert says in found.text.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("spread", "kind", "says"),
    [
        ([0.55, 0.7], "better", "Its errors are told by disagreement, small_margin (AUROC disagreement 0.62"),
        ([0.45, 0.7], "unclear", "Only how close it calls a pair tells its errors, none of its spreads does"),
        ([0.3, 0.45], "worse", "disagreement is larger where it is right than where it is wrong"),
    ],
)
def test_uncertainties_claim_no_more_than_their_intervals(spread: list[float], kind: str, says: str) -> None:
    found = evaluation_page.findings(made_up([0.6, 0.8], [0.1, 0.2], spread), "It")[2]
    assert (found.kind, says in found.text) == (kind, True), found.text


@pytest.mark.parametrize(
    ("accuracy", "says"), [([0.94, 0.98], "only 3 of 80 pairs wrongly"), ([0, 0.1], "4 of 80 pairs rightly")]
)
def test_of_few_errors_nothing_is_said(accuracy: list[float], says: str) -> None:
    found = evaluation_page.findings(made_up(accuracy, [0.1, 0.2], [0.3, 0.45]), "It")[2]
    assert (found.kind, says in found.text) == ("unclear", True), found.text


@pytest.mark.parametrize(
    ("nll", "kind", "says"),
    [
        (0.6, "better", "of one confidence for all pairs 0.650."),
        (0.63, "unclear", "which the interval does not rule out"),
        (0.66, "unclear", "no less than the 0.650 of one confidence"),
        (0.8, "worse", "surer than it is right"),
    ],
)
def test_probabilities_claim_no_more_than_their_interval(nll: float, kind: str, says: str) -> None:
    found = evaluation_page.findings(made_up([0.6, 0.8], [0.1, 0.2], [0.5, 0.7], nll), "It")[1]
    assert (found.kind, says in found.text) == (kind, True), found.text


@pytest.mark.parametrize(
    ("intervals", "kind", "says"),
    [
        ({"disagreement": [0.6, 0.7], "routing_std": [0.4, 0.6]}, "better", "notices texts of the other data; not by"),
        ({"disagreement": [0.4, 0.7]}, "unclear", "None of its uncertainties is larger on texts of the other data"),
        ({"disagreement": [0.6, 0.7], "total_std": [0.2, 0.3]}, "worse", "as if they were better known: total_std"),
        ({}, "unclear", "no uncertainty that could notice"),
    ],
)  # fmt: skip
def test_noticing_other_data_claims_no_more_than_its_intervals(
    intervals: dict[str, list[float]], kind: str, says: str
) -> None:
    block = made_up([0.6, 0.8], [0.1, 0.2], [0.5, 0.7])
    known = {name: {"auroc": sum(pair) / 2, "auroc_interval": pair} for name, pair in intervals.items()}
    known["random"] = {"auroc": 0.5, "auroc_interval": [0.45, 0.55]}
    found = evaluation_page.findings(block | {"ood": block["pairs"], "ood_auroc": known}, "It")
    assert found[3].text.startswith("On the other data it orders")
    assert (found[4].kind, says in found[4].text) == (kind, True), found[4].text


def test_failures_come_first() -> None:
    good, bad = made_up([0.6, 0.8], [0.1, 0.2], [0.55, 0.7]), made_up([0.6, 0.8], [-0.2, -0.1], [0.3, 0.4], 0.9)
    alone = evaluation_page.verdicts({"rewards": [bad]})
    assert [verdict.kind for verdict in alone] == ["worse", "worse", "worse"]
    both = evaluation_page.verdicts({"rewards": [good, bad | {"reward": "runs/Theirs"}]})
    assert [verdict.kind for verdict in both] == ["worse", "worse", "worse", "better"]
    assert both[0].text.startswith("runs/Theirs orders")
    assert both[1].text.startswith("runs/Theirs: Its probabilities")
    assert both[3].text.startswith("runs/Mine orders")
    lost = made_up([0.45, 0.6], [-0.1, 0.1], [0.5, 0.7])["pairs"]
    silent = {"random": {"auroc": 0.5, "auroc_interval": [0.45, 0.55]}}
    abroad = evaluation_page.verdicts({"rewards": [good, good | {"ood": lost, "ood_auroc": silent}]})
    assert [verdict.kind for verdict in abroad] == ["unclear", "better", "better"]
    assert abroad[0].text.startswith("runs/Mine: On the other data it orders")


def test_the_page_shows_means_over_models_of_one_kind(evaluation: Path, tmp_path: Path) -> None:
    single = json.loads((evaluation / "results.json").read_text())["rewards"][1]
    rewards = [single, single | {"reward": "another seed"}]
    write_json(tmp_path / "results.json", {"kind": "pairs", "rewards": rewards, "over_rewards": over_rewards(rewards)})
    assert "Over 2 reward models" in page_text(evaluation_page.build(tmp_path))


def test_the_page_shows_differences_between_models_of_several_kinds(evaluation: Path) -> None:
    results = json.loads((evaluation / "results.json").read_text())
    [found], text = results["differences"], page_text(evaluation / "evaluation.html")
    assert "Differences between reward models" in text
    names = [Path(found[side]).name for side in ("reward", "versus")]  # as much of the paths as tells them apart
    assert f"{names[0]} minus {names[1]}" in text
    assert f"{found['pairs accuracy']['mean']:+.3f}".replace("-", "−") in text


def test_a_model_without_a_mistake_has_a_page(evaluation: Path, tmp_path: Path) -> None:
    results = json.loads((evaluation / "results.json").read_text())
    one = results["rewards"][1]
    for block in (one["pairs"], one["ood"]):
        for known in block["uncertainties"].values():
            known.update(auroc=None, auroc_interval=[None, None], spearman=None)
    write_json(tmp_path / "results.json", {"kind": "pairs", "rewards": [one], "over_rewards": {}})
    assert "nothing to tell apart" in page_text(evaluation_page.build(tmp_path))


def test_an_uncertainty_has_one_color_in_every_figure(evaluation: Path, drawn_once: dict[str, Any]) -> None:
    pairs = json.loads((evaluation / "results.json").read_text())["rewards"][0]["pairs"]
    svg = "".join(plots.calibration(pairs, "one"))
    drawn_once.clear()
    assert "".join(plots.calibration(pairs, "one")) == svg
    for name in ("disagreement", "routing_std", "small_margin"):
        assert plots.UNCERTAINTY_STYLES[name].color in svg
    assert plots.UNCERTAINTY_STYLES["last_layer_std"].color not in svg or "last_layer_std" in pairs["uncertainties"]


def test_characters_that_are_not_seen_are_shown_as_escapes(evaluation: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(evaluation, tmp_path / "page")
    poison(folder)
    results = json.loads((folder / "results.json").read_text())
    results["rewards"][0]["reward"] += UNSEEN
    (folder / "results.json").write_text(json.dumps(results))
    assert_all_is_seen(evaluation_page.build(folder).read_text())


@pytest.mark.parametrize("value", rest_slow([None, "text", 3, [], {}, [1], {"a": 1}]), ids=str)
def test_results_of_a_wrong_form_are_one_line(evaluation: Path, tmp_path: Path, value: Any) -> None:
    folder = shutil.copytree(evaluation, tmp_path / "page")
    assert_wrong_forms_are_one_line(folder, evaluation_page.build, value)


def test_texts_are_read_again_in_parts_and_none_is_kept(
    reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "Add.", "chosen": f"{i}+1={i + 1}", "rejected": f"{i}+1={i}"} for i in range(7)]
    file = write(tmp_path / "sums.jsonl", *rows)
    whole = evaluate_reward.run(Config((str(reward_run / "posterior"),), file, output=str(tmp_path / "whole")))
    sizes: list[int] = []

    def extract(self: FeatureExtractor, samples: list[Sample], progress: Any = None) -> torch.Tensor:
        sizes.append(len(samples))
        return original(self, samples, progress)

    original = FeatureExtractor.__call__
    monkeypatch.setattr(FeatureExtractor, "__call__", extract)
    monkeypatch.setattr(evaluate_reward, "TEXTS_PER_PART", 4)
    parts = evaluate_reward.run(Config((str(reward_run / "posterior"),), file, output=str(tmp_path / "parts")))
    assert sizes == [4, 4, 4, 2]
    for one, other in zip(
        read_rows(whole.folder / "reward-1.jsonl"), read_rows(parts.folder / "reward-1.jsonl"), strict=True
    ):
        assert one["last_layer_std"] > 0
        assert one == {name: pytest.approx(value, abs=1e-5) for name, value in other.items()}
    shown = [
        [row["chosen"] for row in (run.results or {})["rewards"][0]["pairs"]["mistakes"]] for run in (whole, parts)
    ]
    assert shown[0] == shown[1]
    assert shown[0][0] in {row["chosen"] for row in rows}
    asked = read_questions(file, "error")
    held = [value for value in vars(asked).values() if isinstance(value, (list, np.ndarray))]
    assert not any(text in str(held) for text in ("Add.", "6+1=7"))


def test_a_file_that_changes_while_it_is_judged_is_one_line(
    reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "Add.", "chosen": f"{i}+1={i + 1}", "rejected": f"{i}+1={i}"} for i in range(3)]
    file = write(tmp_path / "sums.jsonl", *rows)
    load = Scorer.load

    def loaded(*arguments: Any, **more: Any) -> Scorer:
        write(tmp_path / "sums.jsonl", *rows[:2])
        return load(*arguments, **more)

    monkeypatch.setattr(Scorer, "load", loaded)
    with pytest.raises(PoiseError, match="the file changed while it was read"):
        evaluate_reward.run(Config((str(reward_run / "single"),), file, output=str(tmp_path / "run")))
