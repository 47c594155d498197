"""`poise trust`: from files to a page in words, with judgments that come later."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from poise.cli.main import main
from poise.errors import PoiseError
from poise.functional.objectives import mean
from poise.models.scorer import Scorer
from poise.reports import run_pages, trust_run
from poise.reports.quickstart_page import Verdict
from poise.reward.pairs import FeaturePairs
from poise.runtime.records import read_object, read_rows
from poise.runtime.run_folder import write_json
from poise.studies import trust
from poise.studies.pool import samples_of
from poise.studies.trust_config import TrustConfig


@pytest.fixture(scope="module")
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture
def config(reward: Path, tiny_model: str, prompts_file: Path, preferences_file: Path, tmp_path: Path) -> TrustConfig:
    return TrustConfig(
        str(reward / "single"), str(prompts_file), tiny_model, str(preferences_file), str(reward / "posterior"),
        per_prompt=6, max_tokens=8, judged=10, output=str(tmp_path / "trust"),
    )  # fmt: skip


def test_three_answers_on_a_page(config: TrustConfig, capsys: pytest.CaptureFixture[str]) -> None:
    out = trust.run(config)
    said = " ".join(capsys.readouterr().err.split())
    assert "10 comparisons to judge" in said
    results = out.results
    assert results is not None
    assert results["labels"] is None
    assert [row["n"] for row in results["transfer"]] == [1, 2, 3, 4, 5, 6]
    assert results["transfer"][-1]["transfer"] == pytest.approx(1, abs=0.3)  # the posterior's mean is the single head
    assert results["room"]["seen"] is False
    assert len(results["room"]["accuracy"]) == len(results["room"]["selection"]) == 3
    # Judged as the reward does it, but for two; and one tie.
    pairs = list(read_rows(out.folder / "comparisons.jsonl"))
    scorer = Scorer.load(config.reward)
    heads = [mean(scorer(samples_of([{**row, "completion": row[side]} for row in pairs]))) for side in "ab"]
    prefers_a = (heads[0] > heads[1]).tolist()
    key = read_object(out.folder / "key.json")
    assert key["reward"] == pytest.approx((heads[0] - heads[1]).tolist(), abs=1e-5)
    judged = [{"id": i, "better": "ab"[a == (i < 2)]} for i, a in enumerate(prefers_a)]
    judged[9]["better"] = "tie"
    (out.folder / "judgments.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in judged))
    again = trust.run(config)
    assert again.results is not None
    assert again.results["labels"]["reward"]["share"] == pytest.approx(7 / 9)
    assert again.results["labels"]["ties"] == 1
    assert {**again.results, "labels": None} == results
    (out.folder / "judgments.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in judged))
    by_page = trust.run(replace(config, page=True))  # all are judged: the page has nothing to ask
    assert by_page.results == again.results
    page = run_pages.build([again.folder]).read_text()
    assert "The reward orders 77.8" in page
    assert "Nothing here says what happens beyond it" in page  # KL 10 against 1.0 of the best of six
    assert "validator sees" in page


def test_the_pool_is_kept_and_other_settings_are_refused(config: TrustConfig) -> None:
    alone = replace(config, preferences="", validator="")
    out = trust.run(alone)
    assert out.results is not None
    assert out.results["room"] is out.results["transfer"] is None
    assert trust_run.findings(out.results) == []
    assert "Not asked" in run_pages.build([out.folder]).read_text()
    with pytest.raises(PoiseError, match="holds a run of another config"):
        trust.run(replace(alone, seed=1))
    prompts = Path(alone.output).with_name("same.jsonl")
    shutil.copy(alone.prompts, prompts)
    elsewhere = replace(alone, prompts=str(prompts))
    assert trust.run(elsewhere).results == out.results
    prompts.write_text(prompts.read_text() + '{"prompt": "One more."}\n')
    with pytest.raises(PoiseError, match="differs in prompts"):
        trust.run(elsewhere)


def test_pairs_that_a_trained_trunk_has_seen_tell_nothing(config: TrustConfig, reward: Path, tmp_path: Path) -> None:
    assert trust._has_seen(reward / "single", config.preferences) is False  # frozen
    run = tmp_path / "tuned"
    run.mkdir()
    settings = (reward / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("trunk: frozen", "trunk: lora"))
    assert trust._has_seen(run / "single", config.preferences) is True
    shutil.copy(reward / "inputs.json", run)  # which knows what the file held, wherever it lies now
    copied = Path(shutil.copy(config.preferences, tmp_path / "copied.jsonl"))
    assert trust._has_seen(run / "single", str(copied)) is True
    copied.write_text(copied.read_text() + "\n")
    assert trust._has_seen(run / "single", str(copied)) is False
    assert trust._has_seen(run / "single", str(tmp_path / "gone.jsonl")) is False
    assert trust._has_seen(run / "single", str(tmp_path / "other.jsonl")) is False
    room = {"accuracy_interval": [0.1, 0.2], "accuracy_doubled": 0.15, "seen": True}
    found = trust_run._said_of_room(room)
    assert isinstance(found, Verdict)
    assert found.kind == "unclear"
    assert "Room cannot be told" in found.text


def test_pairs_that_cannot_be_parted_are_refused_before_anything_is_made(
    config: TrustConfig, tmp_path: Path, reward: Path
) -> None:
    few = tmp_path / "few.jsonl"
    rows = [{"prompt": "p", "chosen": f"answer {i}", "rejected": f"answer {i + 1}"} for i in range(20)]
    few.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(PoiseError, match=r"few\.jsonl has too few prompts, and too few texts.*: 1 groups, and \d+ are"):
        trust.run(replace(config, preferences=str(few)))
    assert not Path(config.output).exists()
    members = [os.path.relpath(reward / kind, tmp_path / "both") for kind in ("single", "posterior")]
    write_json(tmp_path / "both" / "ensemble.json", {"members": members, "means": [0.0, 0.0], "stds": [1.0, 1.0]})
    with pytest.raises(PoiseError, match="an ensemble has no one trunk to fit heads on; take one of its members"):
        trust.run(replace(config, reward=str(tmp_path / "both"), validator=""))


def test_without_a_validator_room_is_that_of_the_pairs_alone(
    config: TrustConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What heads on a half, three quarters and all of the pairs reach is made up, of four parts that are left out."""
    accuracy = np.array([[0.5] * 4, [0.6] * 4, [0.7, 0.6, 0.7, 0.6]])
    found = SimpleNamespace(num_pairs=[10.0, 15.0, 20.0], accuracy_SF=accuracy)

    def made_up(pairs: FeaturePairs, *_: object) -> SimpleNamespace:
        found.right_N = np.arange(len(pairs.margin_N)) % 2
        return found

    monkeypatch.setattr(trust, "room", made_up)
    results = trust.run(replace(config, validator="")).results
    assert results is not None
    assert results["transfer"] is None
    assert results["room"]["accuracy"] == pytest.approx([0.5, 0.6, 0.65])
    assert results["room"]["accuracy_doubled"] == pytest.approx(0.05)
    assert results["room"]["held_out"]["share"] == 0.5
    assert not {"selection", "selection_doubled"} & results["room"].keys()


def test_the_validator_of_the_reward_s_run_is_asked(
    config: TrustConfig, watched_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word of the user's, and said in one line; not with `--validator None`."""
    own = replace(config, reward=str(watched_reward / "single"), preferences="", validator="", judged=2)
    out = trust.run(own)
    assert f"validator: {watched_reward}/validator, trained with" in " ".join(capsys.readouterr().err.split())
    assert (out.results or {})["transfer"] is not None
    named = replace(own, validator=str(watched_reward / "validator"), output=str(tmp_path / "named"))
    assert (trust.run(named).results or {})["transfer"] == (out.results or {})["transfer"]
    alone = trust.run(replace(own, validator=None, output=str(tmp_path / "alone")))
    assert (alone.results or {})["transfer"] is None
    assert json.loads((alone.folder / "key.json").read_text())["validator"] == []


def test_a_validator_at_chance_is_said_on_the_page(config: TrustConfig, tmp_path: Path) -> None:
    own = replace(config, preferences="", judged=2, validator=f"{tmp_path}/other")
    shutil.copytree(config.validator or "", own.validator or "")
    (tmp_path / "other" / "README.md").write_text("> **No better than a coin.** What it says means nothing.\n")
    out = trust.run(own)
    assert "The validator: No better than a coin. What it says means nothing." in trust_run.page(out.folder).warnings
    alone = replace(own, validator=None, output=str(tmp_path / "alone"))
    assert not any("validator:" in one for one in trust_run.page(trust.run(alone).folder).warnings)


def test_a_checkpoint_without_a_run_is_not_known_to_have_seen_the_pairs(config: TrustConfig, tmp_path: Path) -> None:
    assert trust._has_seen(tmp_path / "rm", config.preferences) is False


def _compared(folder: Path, prompts: list[str], reward: list[float]) -> None:
    """A folder with comparisons of these prompts, and by how much the reward prefers each one's a."""
    rows = [{"id": i, "prompt": prompt, "a": "x", "b": "y"} for i, prompt in enumerate(prompts)]
    (folder / "comparisons.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_json(folder / "key.json", {"reward": reward, "validator": []})


def test_ties_alone_say_nothing_of_a_reward(tmp_path: Path) -> None:
    _compared(tmp_path, ["p", "q"], [1.0, -1.0])
    assert trust._labels(tmp_path, {0: "tie", 1: "tie"}) == {"ties": 2}
    found = trust._labels(tmp_path, {0: "b", 1: "tie"})
    assert (found["ties"], found["reward"]["share"], "validator" in found) == (1, 0.0, False)


def test_a_tie_of_the_reward_is_half_right_whichever_side_the_judge_takes(tmp_path: Path) -> None:
    _compared(tmp_path, ["p", "q"], [0.0, 0.0])
    for better in "ab":
        assert trust._labels(tmp_path, dict.fromkeys((0, 1), better))["reward"]["share"] == 0.5


def test_judged_pairs_of_one_prompt_depend_on_each_other(tmp_path: Path) -> None:
    """Twelve pairs, right on each of four prompts' and wrong on each of two others'."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    for folder, prompts in ((apart, [str(i) for i in range(12)]), (together, [str(i // 2) for i in range(12)])):
        folder.mkdir()
        _compared(folder, prompts, [1.0] * 8 + [-1.0] * 4)
    judged = dict.fromkeys(range(12), "a")
    narrow, wide = (trust._labels(folder, judged)["reward"] for folder in (apart, together))
    assert narrow["share"] == wide["share"] == pytest.approx(2 / 3)
    assert np.ptp(wide["interval"]) > 1.3 * np.ptp(narrow["interval"])


def test_agreement_is_below_the_training_s_only_where_the_difference_is_sure() -> None:
    """35 of 50, by a reward that was right on 84 % of its validation pairs: of 25, or of 2,500."""
    labels = {"reward": trust.trust.agreement(np.repeat([1.0, 0.0], [35, 15]), np.arange(50))}
    said = [
        trust_run._said_of_labels(
            {"labels": labels, "validation_accuracy": 0.84, "validation_accuracy_interval": list(interval)}
        )
        for interval in ((0.65, 0.94), (0.825, 0.855))
    ]
    assert [one.kind for one in said if one] == ["better", "worse"]
    alone = trust_run._said_of_labels({"labels": labels, "validation_accuracy": 0.84})  # of an earlier version
    assert alone is not None
    assert alone.kind == "better"


def test_transfer_of_too_few_prompts_in_words() -> None:
    row = {"n": 8, "transfer": 0.5, "transfer_interval": None}
    found = trust_run._said_of_transfer([row])
    assert found is not None
    assert found.kind == "unclear"
    assert "prompts are too few" in found.text


@pytest.mark.parametrize(
    ("interval", "kind", "words"),
    [([0.01, 0.05], "better", "There is room"), ([-0.01, 0.05], "unclear", "Whether there is room cannot be told"),
     ([-0.01, 0.015], "worse", "There is no room"), ([-0.05, -0.01], "worse", "More pairs make it worse")],
)  # fmt: skip
@pytest.mark.parametrize("what", ["accuracy", "selection"])
def test_room_in_words(what: str, interval: list[float], kind: str, words: str) -> None:
    """Of the validator's stds five times as much is wanted as of accuracy."""
    interval = [5 * end for end in interval] if what == "selection" else interval
    room = {"seen": False, "accuracy_interval": [0.5, 0.6], "accuracy_doubled": 0.55}
    measured = {what: [0.0, 0.0, 0.0], f"{what}_interval": interval, f"{what}_doubled": 0.0}
    found = trust_run._said_of_room(room | measured)
    assert found is not None
    assert found.kind == kind
    assert words in found.text


def test_the_command_ends_with_what_to_do_next(config: TrustConfig, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", config.prompts, "--model", config.model, "--per-prompt", "4", "--max-tokens", "6"]
    assert main(["trust", config.reward, *options, "--output", config.output]) == 0
    said = capsys.readouterr().out
    assert "--page" in said
    assert "report.html" in said
    assert main(["trust", config.reward, *options, "--objective", "typicl", "--output", config.output]) == 2


def test_a_head_that_learns_nothing_is_said_first() -> None:
    """48 of 100 rightly: Wilson's interval from .385 to .577 holds one half."""
    room = {"accuracy_interval": [0.1, 0.2], "accuracy_doubled": 0.15, "seen": False}
    held = trust.trust.agreement((np.arange(100) < 48).astype(float), np.arange(100))
    found = trust_run._said_of_room(room | {"held_out": held})
    assert found is not None
    assert found.kind == "worse"
    assert (
        "48.0\xa0% of 100 held-out ones rightly (95\xa0% interval 38.5\xa0% to 57.7\xa0%), no better than a coin"
        in found.text
    )
    sure = trust_run._said_of_room(
        room | {"held_out": trust.trust.agreement((np.arange(100) < 70) * 1.0, np.arange(100))}
    )
    assert sure is not None
    assert "There is room" in sure.text
