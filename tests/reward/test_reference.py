"""Reference texts beside a checkpoint: who writes them, what reads them, and what is said where they are missing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import rest_slow
from poise.cli.main import main
from poise.data.preferences import read_preferences
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, RewardScale, parse_objective
from poise.functional.overoptimization import Choice
from poise.integrations.trl_reward import RobustReward
from poise.models.reward_model import REFERENCE
from poise.models.scorer import Ensemble, Scorer
from poise.policy import train as train_policy
from poise.reward import export, push, reference, score
from poise.reward.config import ExportConfig, ReferenceConfig, ScoreConfig
from poise.runtime.records import read_rows
from poise.studies.pool import PoolHeads

TEXTS = ["a good film", "bad", "it is fine , really", "awful awful awful awful", "?!"]
SAMPLES = [Sample("Review a film.", text) for text in TEXTS]


@pytest.fixture(scope="module")
def run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(run / "single", tmp_path / "single"))


@pytest.fixture
def texts_file(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": "Review a film.", "completion": f"{text} {n}"} for n in range(6) for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_reference(folder: Path) -> Path:
    """As an earlier version of Poise wrote it."""
    (folder / REFERENCE).unlink()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["poise"].pop("reference_texts") == 64  # of 40 pairs 8 are held out
    assert 0 < settings["poise"].pop("reference_shrinkage") <= 1
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_every_reward_model_of_a_run_measures_from_its_training_texts(run: Path, preferences_file: Path) -> None:
    scorers = [Scorer.load(str(run / name)) for name in ("single", "ensemble", "posterior", "brme")]
    pairs = read_preferences(preferences_file)
    samples = [Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    found = [scorer(samples).distance for scorer in scorers]
    assert all(one is not None and torch.equal(one, found[0]) for one in found)
    assert 1.0 < found[0].mean().item() < 1.5  # 64 of the 80 texts have mean 1, the others lie a little further out
    strange = scorers[0]([Sample("Review a film.", "zq" * 40)]).distance
    assert strange is not None
    assert strange.item() > 2 * found[0].max().item()


@pytest.mark.parametrize("any_model", rest_slow(["llama", "qwen3", "gpt2"]), indirect=True)
def test_distances_are_the_same_alone_and_in_a_batch(any_model: str, train_tiny_reward: Callable[[str], Path]) -> None:
    scorer = Scorer.load(str(train_tiny_reward(any_model) / "brme"))
    together = scorer(SAMPLES).distance
    alone = torch.cat([scorer([sample]).distance for sample in SAMPLES])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


@pytest.mark.parametrize("given", ["preferences", "completions"])
def test_an_earlier_checkpoint_gets_a_reference(
    copy: Path, preferences_file: Path, texts_file: str, given: str, tmp_path: Path
) -> None:
    before = Scorer.load(str(without_reference(copy)))
    assert before(SAMPLES).distance is None
    rows = {"preferences": str(preferences_file), "completions": texts_file}[given]
    assert main(["reference", str(copy), f"--{given}", rows]) == 0
    scorer = Scorer.load(str(copy))
    assert scorer.layout.reference_texts == {"preferences": 80, "completions": 30}[given]
    found = scorer(SAMPLES)
    assert torch.equal(found.mean, before(SAMPLES).mean)
    if given == "completions":
        again = [Sample(row["prompt"], row["completion"]) for row in read_rows(Path(texts_file))]
        assert scorer(again).distance.mean().item() == pytest.approx(1, abs=1e-4)
    scored = list(read_rows(score.run(ScoreConfig(str(copy), texts_file, "typical(0.5)", str(tmp_path / "out")))))
    for row in scored:
        assert row["reward"] == pytest.approx(row["mean"][0] - 0.5 * row["distance"], abs=1e-5)


def test_reference_texts_that_were_cut_are_counted(
    copy: Path, preferences_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference.run(ReferenceConfig(str(copy), preferences=str(preferences_file), max_length=8))
    said = " ".join(capsys.readouterr().err.split())
    assert "80 texts lost their oldest tokens (longer than 8)" in said
    assert "80 reference texts, shrinkage" in said


def test_without_a_reference_one_line_says_what_to_do(copy: Path, texts_file: str, run: Path) -> None:
    without_reference(copy)
    with pytest.raises(PoiseError, match="`poise reference CHECKPOINT --preferences FILE` adds them"):
        score.run(ScoreConfig(str(copy), texts_file, "typical"))
    with pytest.raises(PoiseError, match="`poise reference CHECKPOINT --preferences FILE` adds them"):
        RobustReward.load(str(copy), "typical(2)")
    both = Ensemble([Scorer.load(str(run / "single"))] * 2, [0.0, 0.0], [1.0, 1.0])
    assert both(SAMPLES).distance is None
    with pytest.raises(PoiseError, match="an ensemble takes none"):
        both.layout.check_objective("typical")


def test_what_cannot_be_a_reference_is_refused(copy: Path, texts_file: str, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="either --preferences FILE or --completions FILE"):
        reference.run(ReferenceConfig(str(copy)))
    with pytest.raises(PoiseError, match="is no folder of this machine"):
        reference.run(ReferenceConfig("somebody/model", completions=texts_file))
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(PoiseError, match="is an ensemble"):
        reference.run(ReferenceConfig(str(tmp_path), completions=texts_file))


def test_a_checkpoint_that_cannot_be_written_to_is_refused_before_the_work(
    copy: Path, texts_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != copy or how != os.W_OK)
    with pytest.raises(PoiseError, match=r"the reference is written into .*, which may not be written to; copy"):
        reference.run(ReferenceConfig(str(copy), completions=texts_file))


def test_a_reference_that_was_left_behind_is_missed(copy: Path, texts_file: str) -> None:
    """As by `save_pretrained` of transformers, which keeps the block of config.json and drops the file."""
    (copy / REFERENCE).unlink()
    scorer = Scorer.load(str(copy))
    assert scorer(SAMPLES).distance is None
    assert scorer.layout.reference_texts == 0
    with pytest.raises(PoiseError, match="`poise reference CHECKPOINT --preferences FILE` adds them"):
        score.run(ScoreConfig(str(copy), texts_file, "typical"))


@pytest.mark.parametrize("damage", ["not a file of tensors", "another size", "not a number"])
def test_a_damaged_reference_is_one_line(copy: Path, damage: str) -> None:
    file = copy / REFERENCE
    tensors = load_file(file)
    if damage == "not a file of tensors":
        file.write_bytes(b"\0" * 40)
    else:
        changed = tensors["center"] * float("nan") if damage == "not a number" else tensors["center"][:-1]
        save_file(tensors | {"center": changed.contiguous()}, file)
    with pytest.raises(PoiseError, match=r"reference\.safetensors") as raised:
        Scorer.load(str(copy))
    assert "\n" not in str(raised.value)


def test_a_policy_is_trained_on_it(run: Path, prompts_file: Path, tiny_model: str, tmp_path: Path) -> None:
    """Its logged rewards are the formula, recomputed from the logged heads and distances."""
    config = train_policy.Config(
        prompts=str(prompts_file), reward=str(run / "single"), output=str(tmp_path / "policy"), model=tiny_model,
        objective="typical(0.5)", num_steps=2, prompts_per_step=2, completions_per_prompt=4, max_tokens=8,
        adapted_layers=1, lora_rank=2, baseline_completions=16, eval_completions=1,
    )  # fmt: skip
    out = train_policy.run(config)
    samples = list(read_rows(out.folder / "samples.jsonl"))
    assert out.results is not None
    scale = RewardScale.from_json(out.results["scale"])
    for row in samples:
        combined = row["mean"][0] - scale.head_baseline[0] - 0.5 * row["distance"]
        assert row["reward"] == pytest.approx((combined - scale.mean) / scale.std, abs=1e-4)
    steps = [[row["distance"] for row in samples if row["step"] == step] for step in (0, 1)]
    logged = [row["distance"] for row in out.metrics()]
    assert logged == pytest.approx([sum(step) / len(step) for step in steps], rel=1e-5)
    assert max(logged) > 1.5  # a model of random weights writes other texts than people
    assert next(read_rows(out.folder / "final.jsonl"))["distance"] > 0


def test_trl_gets_it(run: Path) -> None:
    reward = RobustReward.load(str(run / "single"), "typical(0.5)")
    logged: dict[str, float] = {}
    found = reward(["Review a film."] * len(TEXTS), TEXTS, log_metric=logged.__setitem__)
    heads = Scorer.load(str(run / "single"))(SAMPLES)
    assert heads.distance is not None
    combined = heads.mean[:, 0] - 0.5 * heads.distance[:, 0]
    torch.testing.assert_close(torch.tensor(found), (combined - combined.mean()) / combined.std(), rtol=0, atol=1e-4)
    assert logged["poise/distance"] == pytest.approx(heads.distance.mean().item())


@pytest.mark.parametrize("shaping", ["none", "contrastive"])
def test_best_of_n_selects_by_it(run: Path, shaping: str, tmp_path: Path) -> None:
    """Also after the scores were kept on disk, and with a shaping, which leaves distances as they are."""
    heads = Scorer.load(str(run / "single"))(SAMPLES[:4])
    PoolHeads(heads, 1.0, "x").save(tmp_path / "heads.safetensors")
    kept = PoolHeads.load(tmp_path / "heads.safetensors", "x", 4).heads
    assert all(torch.equal(one, other) for one, other in zip(kept, heads, strict=True))
    far, near = (Choice("single", f"typical({c})", shaping).proxy(kept, 4) for c in (1e6, 0.0))
    assert far[0].argmax() == kept.distance.argmin()
    assert near[0].argmax() == kept.mean.argmax()
    broken = HeadRewards(kept.mean, kept.std, kept.distance / 0)
    with pytest.raises(PoiseError, match="NaN or infinity"):
        PoolHeads(broken, 1.0, "x").save(tmp_path / "broken.safetensors")


def test_it_travels_with_the_heads_and_not_with_a_scalar(run: Path, tmp_path: Path) -> None:
    whole = export.run(ExportConfig(str(run / "brme"), str(tmp_path / "whole"), engine="sglang"))
    expected, found = (Scorer.load(str(folder))(SAMPLES) for folder in (run / "brme", whole))
    torch.testing.assert_close(found.distance, expected.distance)
    scalar = export.run(ExportConfig(str(run / "brme"), str(tmp_path / "scalar"), "mean"))
    assert Scorer.load(str(scalar))(SAMPLES).distance is None
    assert REFERENCE in push.checkpoint_files(run / "brme")


def test_the_objective_is_named_like_the_others() -> None:
    heads = HeadRewards(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[0.5]]))
    assert parse_objective("typical")(heads).item() == 1.5
