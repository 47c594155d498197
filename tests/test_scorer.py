"""Reward models: the checkpoint is a stock classifier, and a score does not depend on company or padding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from poise.data import Sample
from poise.errors import PoiseError
from poise.models import completion_text, encode, prompt_text
from poise.objectives import HeadRewards
from poise.reward_model import HeadLayout
from poise.scorer import Scorer, pooled_features

SAMPLES = [
    Sample("Review a film.", "A fine film."),
    Sample("Review.", "bad"),
    Sample([{"role": "user", "content": "Review a phone that is really great."}], "not really great, not really awful"),
    Sample("Review a kettle.", "It was the poor kettle of a poor kettle maker, and I love it."),
]


@pytest.fixture(scope="module")
def reward_run(any_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(any_model)


@pytest.mark.parametrize("name", ["single", "brme", "posterior"])
def test_score_is_the_same_alone_and_in_any_batch(reward_run: Path, name: str) -> None:
    scorer = Scorer.load(str(reward_run / name))
    together = scorer(SAMPLES)
    for i, sample in enumerate(SAMPLES):
        for heads in (scorer([sample]), scorer([sample, *SAMPLES[::-1]])):
            torch.testing.assert_close(heads.mean[0], together.mean[i], rtol=0, atol=1e-5)
            torch.testing.assert_close(heads.std[0], together.std[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_the_same_with_padding_on_either_side(reward_run: Path, side: str) -> None:
    scorer = Scorer.load(str(reward_run / "brme"))
    extract, tokenizer = scorer.extract, scorer.extract.tokenizer
    rows = [
        encode(tokenizer, prompt_text(tokenizer, s.prompt) + completion_text(tokenizer, s.prompt, s.completion))
        for s in SAMPLES
    ]
    longest = max(map(len, rows)) + 5
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, span], mask[i, span] = torch.tensor(row), 1
    with torch.no_grad():
        padded = scorer.decode(pooled_features(extract.classifier, ids, mask))
    torch.testing.assert_close(padded.mean, scorer(SAMPLES).mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.std, scorer(SAMPLES).std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["single", "brme", "posterior"])
def test_checkpoint_is_a_stock_classifier(reward_run: Path, name: str) -> None:
    """Opened without a line of Poise, its logits decode to the scorer's rewards."""
    folder = reward_run / name
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert stock.config.problem_type == "regression"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert stock.config.pad_token_id == tokenizer.pad_token_id
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    texts = [prompt_text(tokenizer, s.prompt) + completion_text(tokenizer, s.prompt, s.completion) for s in SAMPLES]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        logits = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    block = stock.config.poise
    heads = HeadLayout(block["num_heads"], block["kind"], tuple(block["offset"]), block["floor"]).decode(logits)
    scorer = Scorer.load(str(folder))
    torch.testing.assert_close(heads.mean, scorer(SAMPLES).mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(heads.std, scorer(SAMPLES).std, rtol=0, atol=1e-4)


def test_layout_by_hand() -> None:
    layout = HeadLayout(2, "gaussian", (1.0, 0.0, 0.5, 0.0), floor=0.1)
    heads = layout.decode(torch.tensor([3.0, 4.0, 0.5, -50.0]))
    assert heads.mean.tolist() == [2.0, 4.0]
    assert heads.std.tolist() == pytest.approx([0.1 + 0.693147, 0.1])


def test_any_scalar_classifier_is_a_conventional_reward_model(tiny_model: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(tmp_path / "scalar")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "scalar")
    heads = Scorer.load(str(tmp_path / "scalar"))(SAMPLES)
    assert heads.mean.shape == (4, 1)
    assert (heads.std == 0).all()


def test_long_samples_lose_their_oldest_tokens_and_are_counted(reward_run: Path) -> None:
    scorer = Scorer.load(str(reward_run / "brme"), max_length=60)
    long = [Sample("x" * 300 + tail, "good") for tail in ("A", "B")]
    heads = scorer(long)
    assert scorer.extract.num_truncated == 2
    assert not torch.equal(heads.mean[0], heads.mean[1])  # the newest tokens were kept
    assert scorer([Sample("x", "y" * 200)]).mean.isfinite().all()  # a completion that is too long by itself
    assert scorer.extract.num_truncated == 3


def test_empty_completion_is_refused(reward_run: Path) -> None:
    with pytest.raises(PoiseError, match="empty completion"):
        Scorer.load(str(reward_run / "brme"))([Sample("x", " ")])


def edited(reward_run: Path, folder: Path, **changes: object) -> str:
    shutil.copytree(reward_run / "brme", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(folder)


def test_checkpoint_without_poise_block(reward_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="no `poise` block"):
        Scorer.load(edited(reward_run, tmp_path / "x", poise=None))


def test_heads_that_do_not_fit_the_labels(reward_run: Path, tmp_path: Path) -> None:
    block = {"num_heads": 4, "kind": "gaussian", "offset": [0.0] * 8}
    with pytest.raises(PoiseError, match="10 labels but its poise block says 4 gaussian heads, which need 8"):
        Scorer.load(edited(reward_run, tmp_path / "x", poise=block))


def test_truncated_weights_are_one_line(reward_run: Path, tmp_path: Path) -> None:
    folder = Path(edited(reward_run, tmp_path / "x"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(PoiseError, match="cannot load"):
        Scorer.load(str(folder))


def test_heads_of_another_checkpoint_share_one_trunk(reward_run: Path) -> None:
    brme = Scorer.load(str(reward_run / "brme"))
    shared = brme.with_heads_of(str(reward_run / "single"))(SAMPLES)
    assert isinstance(shared, HeadRewards)
    torch.testing.assert_close(shared.mean, Scorer.load(str(reward_run / "single"))(SAMPLES).mean)
