"""The model card: its snippets run and agree with Scorer, its numbers are those of the run, and it names no machine."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from conftest import make_tokenizer, rest_slow
from pages import UNSEEN, assert_all_is_seen
from poise.cli import train_reward as command
from poise.cli.train_reward import Config
from poise.data.types import Sample
from poise.models.model_card import front_matter, front_matter_without_results, is_hub_id, public_name
from poise.models.scorer import Scorer
from poise.models.scoring_template import UNCHANGED, scoring_template
from poise.reports import plots
from poise.reports import reward_card as model_card
from poise.runtime.run_folder import Json, config_dict

pytestmark = pytest.mark.usefixtures("drawn_once")
SAMPLE = Sample("Review a film.", "A warm, funny film.")
NAMES = ("single", "ensemble", "brme", "posterior")
BINS = [{"confidence": 0.6, "accuracy": 0.5, "count": 3}, {"confidence": 0.9, "accuracy": 1.0, "count": 5}]
SETTINGS = config_dict(
    Config(preferences="/home/me/pairs.jsonl", output="/home/me/run", model="user/model", trunk="frozen")
)
RESULTS: Json = {
    "num_preferences": 100, "num_train": 80, "num_validation": 20, "num_truncated": 1, "num_layers": 2,
    "std_collapsed": False,
    "models": {
        "single": {"validation_accuracy": 0.75},
        "brme": {
            "validation_accuracy": 0.7, "validation_accuracy_interval": [0.48, 0.855], "validation_nll": 0.5921,
            "length_accuracy": 0.55, "auroc_wrong_order": {"disagreement": 0.61, "routing_std": 0.4},
            "reliability": BINS,
        },
    },
}  # fmt: skip
GAUSSIAN = {
    "num_heads": 3,
    "kind": "gaussian",
    "offset": [0.0] * 6,
    "floor": 1e-3,
    "reward_scale": 1.25,
    "std_scale": [],
}
POINT = {"num_heads": 1, "kind": "point", "offset": [0.0], "floor": 1e-3, "reward_scale": 1.0, "std_scale": []}


@pytest.fixture(scope="module")
def finished(any_model: str, train_tiny_reward: Callable[[str], Path]) -> tuple[Path, Config]:
    folder = train_tiny_reward(any_model)
    return folder, reread(folder)


def reread(folder: Path) -> Config:
    return Config(**yaml.safe_load((folder / "config.yaml").read_text()))


def edit_results(folder: Path, edit: Callable[[Json], None]) -> None:
    results = json.loads((folder / "results.json").read_text())
    edit(results)
    (folder / "results.json").write_text(json.dumps(results))


def text_of(name: str, block: Json, results: Json = RESULTS, settings: Json = SETTINGS, **tokenizer: Any) -> str:
    fake = type("Tokenizer", (), {"chat_template": None, **tokenizer})()
    return model_card.card(name, block, fake, settings, results, {"poise-rlhf": "0.1.0"})


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# ---- the snippets ----


@pytest.mark.parametrize("any_model", rest_slow(["llama", "qwen3", "gpt2"]), indirect=True)
@pytest.mark.parametrize("template", rest_slow(["chatml", "qwen3", "qwen3_5_think", "gemma3", None]))
def test_both_snippets_give_the_scores_of_each_model(
    finished: tuple[Path, Config], template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], folder)
    for name in NAMES:
        if template is None:
            (folder / name / "chat_template.jinja").unlink()
        elif template != "chatml":  # think blocks, which Qwen3 writes before an answer and not before a generation
            stock = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
            shutil.copy(stock, folder / name / "chat_template.jinja")
    command.run(replace(config, output=str(folder)))
    for name in NAMES:
        monkeypatch.chdir(folder / name)
        assert_both_snippets_give_the_scores(folder / name, name, template)


def assert_both_snippets_give_the_scores(folder: Path, name: str, template: str | None) -> None:
    plain, ours = snippets((folder / "README.md").read_text())
    read: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(plain, read)
    expected = Scorer.load(str(folder))([SAMPLE])
    torch.testing.assert_close(read["mean"], expected.mean[0], rtol=0, atol=1e-5)
    if name == "brme":
        torch.testing.assert_close(read["std"], expected.std[0], rtol=0, atol=1e-5)
    assert len([line for line in plain.splitlines() if line and not re.match("import|from", line)]) == 7
    assert (read["tokenizer"].chat_template is not None) == (template is not None)

    read = {}
    exec(ours, read)
    assert torch.equal(read["heads"].mean, expected.mean)
    assert torch.equal(read["heads"].std, expected.std)


def test_a_template_that_could_not_be_changed_is_said() -> None:
    tokenizer = make_tokenizer()
    assert UNCHANGED in model_card.card("single", POINT, tokenizer, SETTINGS, RESULTS, {})
    with scoring_template(tokenizer):
        assert UNCHANGED not in model_card.card("single", POINT, tokenizer, SETTINGS, RESULTS, {})


# ---- what a run writes ----


def test_cards_are_written_beside_untouched_weights(
    finished: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_once: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # A finished run is not trained again, nor is any model loaded.
    monkeypatch.delattr(transformers.AutoModelForSequenceClassification, "from_pretrained")
    out = command.run(replace(finished[1], output=str(folder)))
    assert out.folder == folder
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written = {str(path.relative_to(folder)) for path in after.keys() - before.keys()}
    assert written == {f"{name}/{file}" for name in NAMES for file in ("README.md", "calibration.png")}
    assert {path: after[path] for path in before} == before
    drawn_once.clear()
    command.run(replace(finished[1], output=str(folder)))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == after  # once more, the same


def test_a_card_names_no_machine(finished: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], folder)
    command.run(replace(config, output=str(folder)))
    for name in NAMES:
        text = (folder / name / "README.md").read_text()
        for path in (config.preferences, config.model, str(folder), config.output):
            assert str(Path(path).parent) not in text
        assert "`preferences.jsonl`" in text
        assert f"`{Path(config.model).name}`" in text  # the folder's own name
        assert "base_model" not in text
        head = yaml.safe_load(text.split("---\n")[1])
        assert head.pop("model-index")
        assert head == {
            "library_name": "transformers",
            "pipeline_tag": "text-classification",
            "tags": ["poise", "reward-model", "reward-robust-rlhf"],
        }


def test_a_fresh_run_is_trained_and_carded(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    config = Config(
        str(preferences_file),
        str(tmp_path / "run"),
        tiny_model,
        num_layers=1,
        trunk="frozen",
        posterior_heads=3,
        head_steps=20,
    )
    out = command.run(config)
    assert out.results is not None
    text = (out.folder / "single" / "README.md").read_text()
    assert f"| accuracy | {100 * out.results['models']['single']['validation_accuracy']:.1f} %" in text
    assert "40 preferences from `preferences.jsonl`: 32 to train on, 8 held out" in text
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(out.folder / "single")
    assert stock.config.num_labels == 1


# ---- what a card says ----


def test_hub_model_is_named_and_local_one_is_not() -> None:
    assert yaml.safe_load(text_of("brme", GAUSSIAN).split("---\n")[1])["base_model"] == "user/model"
    for local in ("/models/mine", "./mine", "~/models/mine", "mine", "C:\\models\\mine"):
        text = text_of("brme", GAUSSIAN, settings=SETTINGS | {"model": local})
        assert "base_model" not in text
        assert "/models" not in text


def test_the_hub_reads_the_front_matter_and_the_accuracy_in_it() -> None:
    data = ModelCard(text_of("brme", GAUSSIAN), ignore_metadata_errors=False).data
    assert (data.base_model, data.library_name) == ("user/model", "transformers")
    assert data.model_name == "Reward model of 3 Gaussian heads (BRME)"
    assert data.eval_results is not None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.7)
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == (*2 * ("pairs.jsonl",), "validation")
    unknown = RESULTS | {"models": {"single": {"validation_accuracy": None}}}
    assert ModelCard(text_of("single", POINT, unknown)).data.eval_results is None
    on_hub = ModelCard(text_of("single", POINT, settings=SETTINGS | {"preferences": "org/pairs"})).data.eval_results
    assert on_hub is not None
    assert on_hub[0].dataset_type == "org/pairs"


def test_an_export_is_another_model_and_does_not_inherit_the_accuracy(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert "base_model" not in front_matter_without_results(card)
    card.write_text(text_of("brme", GAUSSIAN))
    head = ModelCard(front_matter_without_results(card)).data
    assert (head.base_model, head.eval_results, head.model_name) == ("user/model", None, None)
    card.write_text("# A card without a head\n")
    assert front_matter_without_results(card) == front_matter()


def test_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_id("models/mine")
    assert public_name("models/mine") == "mine"
    assert public_name("org/pairs") == "org/pairs"
    assert public_name("data/pairs.parquet") == "pairs.parquet"


def test_numbers_are_those_of_the_results() -> None:
    text = text_of("brme", GAUSSIAN)
    for line in (
        "| 20 pairs | |",
        "| accuracy | 70.0 % (95 % interval 48.0 % to 85.5 %) |",
        "| accuracy of preferring the longer answer, for comparison | 55.0 % |",
        "| negative log-likelihood, nats a pair (a coin: 0.693) | 0.592 |",
        "| AUROC of disagreement for pairs in the wrong order (a coin: 0.5) | 0.610 |",
        "| AUROC of routing std for pairs in the wrong order (a coin: 0.5) | 0.400 |",
        "| head_loss | `sampled_mse` |",
        "| seed | 0 |",
        "| preferences | `pairs.jsonl` |",
    ):
        assert line in text.splitlines()
    assert (
        "100 preferences from `pairs.jsonl`: 80 to train on, 20 held out for validation (20 %). 1 sample lost" in text
    )
    by_prompt = RESULTS | {"split": {"unit": "prompt", "num_train": 31, "num_validation": 9}}
    assert "(20 %). No prompt is on both sides (31 and 9 prompts). 1 sample lost" in text_of(
        "brme", GAUSSIAN, results=by_prompt
    )
    assert "on the first 2 layers of `user/model`, as they are." in text
    tuned = text_of("brme", GAUSSIAN, settings=SETTINGS | {"trunk": "lora"})
    assert "on the first 2 layers of `user/model`, tuned by LoRA." in tuned
    assert "sigmoid(1.25 × difference)" in text
    assert "(8 pairs)" in text  # of the reliability bins
    assert "![Reliability on validation pairs](calibration.png)" in text
    assert "/home/me" not in text


def test_what_is_missing_is_left_out() -> None:
    text = text_of("single", POINT)
    assert "| accuracy | 75.0 % |" in text
    for absent in ("interval", "likelihood, nats", "AUROC", "longer answer", "calibration", "None", "std is"):
        assert absent not in text
    unknown = text_of("single", POINT, RESULTS | {"models": {"single": {"validation_accuracy": None}}})
    assert "None" not in unknown
    assert "| accuracy |" not in unknown


def test_std_collapse_comes_first_where_there_are_stds() -> None:
    collapsed = RESULTS | {"std_collapsed": True}
    lines = [line for line in text_of("brme", GAUSSIAN, collapsed).split("---\n", 2)[2].splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[2].startswith("> **Std collapse.**")
    assert "collapse" not in text_of("single", POINT, collapsed)
    assert "collapse" not in text_of("brme", GAUSSIAN)


def test_a_model_that_may_be_a_coin_says_so_first() -> None:
    lines = [line for line in text_of("brme", GAUSSIAN).split("---\n", 2)[2].splitlines() if line]
    assert lines[1].startswith("> **No better than a coin")  # .48 to .855
    sure = {**RESULTS["models"]["brme"], "validation_accuracy_interval": [0.51, 0.855]}
    assert "coin, as far" not in text_of("brme", GAUSSIAN, RESULTS | {"models": {"brme": sure}})
    assert "coin, as far" not in text_of("single", POINT)  # no interval, no claim


def test_what_a_std_is_depends_on_the_loss_and_its_calibration() -> None:
    losses = ("sampled_mse", "crps", "probit_pairs")
    said = {loss: text_of("brme", GAUSSIAN, settings=SETTINGS | {"head_loss": loss}) for loss in losses}
    assert "not an error bar: `sampled_mse` makes it count" in said["sampled_mse"]
    assert "conventional model's reward that it was fitted to" in said["crps"]
    assert "noise it sees in preferences" in said["probit_pairs"]
    for loss in losses[1:]:
        assert "sampled_mse" not in said[loss]
    assert "`std_scale` (2, 0.5, 1.25)" in text_of("brme", GAUSSIAN | {"std_scale": [2.0, 0.5, 1.25]})
    assert "`std_scale`" not in text_of("brme", GAUSSIAN)


def test_the_picture_of_reliability_shows_its_bins(tmp_path: Path, drawn_once: dict[str, Any]) -> None:
    for name, bins in (("a", BINS), ("b", BINS), ("c", BINS[:1]), ("d", [BINS[0] | {"accuracy": 0.1}, BINS[1]])):
        drawn_once.clear()
        plots.save_reliability(bins, tmp_path / f"{name}.png")
    pictures = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert pictures["a"] == pictures["b"]
    assert len(set(pictures.values())) == 3
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500


def test_names_are_text_in_a_card() -> None:
    name = f"/here/<b>[x](y)`|{UNSEEN}.jsonl"
    text = text_of("brme", GAUSSIAN, settings=SETTINGS | {"preferences": name, "model": f"<i>{UNSEEN}"})
    head, _, body = text.partition("\n---\n")
    assert_all_is_seen(body)
    assert not set(head) & set(UNSEEN) - set("[31m")
    assert r"| preferences | `<b>[x](y)'\|" in body
    for line in body.splitlines():
        assert "<b>" not in re.sub("`[^`]*`", "", line)
