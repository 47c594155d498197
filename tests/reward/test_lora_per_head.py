"""Stage 2 with an adapter for each head: trained on preferences, each on its shard; heads that really disagree."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import WORDS, make_model
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import worst_case
from poise.models.head_adapters import FOLDER
from poise.models.reward_model import read_layout
from poise.models.scorer import Scorer
from poise.reward import export, reference, trunk_training
from poise.reward import train as train_reward
from poise.reward.config import ReferenceConfig
from poise.reward.train import Config
from poise.runtime.run_folder import Run

AGREED, DISPUTED = ("good", "bad"), ("long", "short")


def text(generator: random.Random, word: str) -> str:
    """A few words that say nothing, and one that does."""
    return f"{' '.join(generator.choices(WORDS[8:], k=2))} {word}"


def contradictory(folder: Path, num_pairs: int = 96) -> Path:
    """Two sources: both prefer good to bad; one prefers long to short, the other short to long."""
    generator = random.Random(0)
    rows = []
    for i in range(num_pairs):
        source = "ab"[i % 2]
        best, worst = AGREED if i % 4 < 2 else DISPUTED if source == "a" else DISPUTED[::-1]
        texts = {"chosen": text(generator, best), "rejected": text(generator, worst)}
        rows.append({"prompt": "Review a film.", **texts, "source": source})
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def unseen(word: str) -> list[Sample]:
    generator = random.Random(word)
    return [Sample("Review a film.", text(generator, word)) for _ in range(40)]


def config(model: str, preferences: Path, output: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "trunk": "frozen", "stage2_trunk": "lora_per_head", "head_loss": "probit_pairs", "shards": "source",
        "num_heads": 2, "num_layers": 2, "head_layers": 1, "lora_rank": 4, "epochs": 2.0, "batch_size": 8,
        "device_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "posterior_heads": 2, "head_steps": 20,
    }  # fmt: skip
    return Config(str(preferences), str(output), model, **{**values, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    model = make_model(folder / "model")
    return train_reward.run(
        config(
            model, contradictory(folder), folder / "run", num_layers=0, head_layers=2, epochs=6.0, device_batch_size=8
        )
    )


def test_heads_of_contradictory_shards_disagree_where_the_shards_do(run: Run) -> None:
    scorer = Scorer.load(str(run.folder / "brme"))
    assert scorer.layout.adapters
    texts = {word: unseen(word) for word in AGREED + DISPUTED}
    mean = {word: scorer(samples).mean for word, samples in texts.items()}
    agreed, disputed = mean["good"] - mean["bad"], mean["long"] - mean["short"]
    assert (agreed > 0).float().mean() > 0.9
    assert ((disputed[:, 0] > 0) != (disputed[:, 1] > 0)).float().mean() > 0.9
    scale = agreed.square().mean(0).sqrt()
    assert (disputed / scale).std(-1).mean() > 2 * (agreed / scale).std(-1).mean()
    # Of the pairs that the shards agree on the worst head knows the better text; of the others none is told apart.
    assert ((worst_case(scorer(texts["good"])) - worst_case(scorer(texts["bad"]))) > 0).float().mean() > 0.9
    assert (disputed / scale).min(-1).values.max() < (agreed / scale).min(-1).values.median()


def test_shared_features_cannot_follow_both_shards_as_well(run: Run) -> None:
    """The imitation of one head, on the same shards, has heads that order the disputed pairs alike."""
    preferences = run.folder.parent / "preferences.jsonl"
    model = str(run.folder.parent / "model")
    paper = train_reward.run(
        config(
            model,
            preferences,
            run.folder.parent / "paper",
            num_layers=0,
            stage2_trunk="frozen",
            head_loss="sampled_mse",
        )
    )
    texts = {word: unseen(word) for word in DISPUTED}

    def apart(path: Path) -> float:
        scorer = Scorer.load(str(path))
        margin = scorer(texts["long"]).mean - scorer(texts["short"]).mean
        return ((margin[:, 0] > 0) != (margin[:, 1] > 0)).float().mean().item()

    assert apart(run.folder / "brme") > apart(paper.folder / "brme") + 0.3


def test_the_run_holds_a_stock_classifier_and_a_folder_for_each_head(run: Run) -> None:
    folder = run.folder / "brme"
    assert read_layout(str(folder)).adapters
    assert sorted(path.name for path in (folder / FOLDER).iterdir()) == ["head_0", "head_1"]
    single, brme = (load_file(run.folder / kind / "model.safetensors") for kind in ("single", "brme"))
    assert single.keys() == brme.keys()
    assert all(torch.equal(single[name], brme[name]) for name in single if not name.startswith("score."))
    assert brme["score.weight"].shape == (4, 32)
    tensors = load_file(folder / FOLDER / "head_1" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert not any("score" in name for name in tensors)
    judged = run.results["models"]["brme"] if run.results else {}
    assert judged["validation_accuracy"] > 0.5


def test_one_head_is_exported_and_a_mean_of_all_is_refused(run: Run, tmp_path: Path) -> None:
    brme = str(run.folder / "brme")
    expected = Scorer.load(brme)([Sample("Review a film.", "a film good"), Sample("Which?", "short")])
    for engine in ("vllm", "sglang"):
        made = export.run(export.Config(brme, str(tmp_path / engine), "head", 1, engine=engine))  # type: ignore[arg-type]
        found = Scorer.load(str(made))([Sample("Review a film.", "a film good"), Sample("Which?", "short")])
        torch.testing.assert_close(found.mean[:, 0], expected.mean[:, 1], rtol=1e-5, atol=1e-5)
        assert ("score.bias" in load_file(made / "model.safetensors")) == (engine == "sglang")
    for wrong in ({"scalar": "mean"}, {"adapter": True}, {"engine": "sglang"}, {"adapter": True, "scalar": "mean"}):
        with pytest.raises(PoiseError, match="choose --scalar head --head NUMBER") as error:
            export.run(export.Config(brme, str(tmp_path / "x"), **wrong))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(PoiseError, match="heads 0 to 1"):
        export.run(export.Config(brme, str(tmp_path / "x"), "head", 2))


def test_a_reference_of_features_is_refused(run: Run) -> None:
    with pytest.raises(PoiseError, match="share no features to measure"):
        reference.run(ReferenceConfig(str(run.folder), str(run.folder.parent / "preferences.jsonl")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_loss": "sampled_mse"}, "choose --head-loss probit_pairs"), ({"shard": True}, "does not go with --shard")],
)
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match=message):
        config("model", tmp_path / "none", tmp_path / "run", **changes).check()


def test_a_stopped_training_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: str
) -> None:
    preferences = contradictory(tmp_path, 48)
    whole = train_reward.run(config(tiny_model, preferences, tmp_path / "whole"))
    stopped = config(tiny_model, preferences, tmp_path / "stopped")
    steps = 0

    def stop(*_: Any, **__: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trunk_training._Record, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train_reward.run(stopped)
    again = train_reward.run(stopped)
    for name in ("model.safetensors", *(f"{FOLDER}/head_{k}/adapter_model.safetensors" for k in range(2))):
        assert (again.folder / "brme" / name).read_bytes() == (whole.folder / "brme" / name).read_bytes(), name
    assert (again.folder / "brme" / "config.json").read_text() == (whole.folder / "brme" / "config.json").read_text()
