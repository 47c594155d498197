"""Reward models in bfloat16, as a GPU trains, scores and exports them; on a CPU only slower."""

from pathlib import Path

import pytest
import torch

from conftest import rest_slow
from poise.data.types import Sample
from poise.models.families import rounding
from poise.models.scorer import Scorer
from poise.reward import export
from poise.reward import train as train_reward
from poise.reward.config import Trunk

SAMPLES = [Sample("Review a film.", f"a {word} film {i}") for i, word in enumerate(("good", "bad", "fine", "awful"))]
PLACES = ("models.loading", "models.reward_model", "reward.train", "reward.trunk_training", "reward.export")


@pytest.mark.parametrize("trunk", rest_slow(["frozen", "lora", "full"]))
def test_reward_models_are_trained_scored_and_exported_in_bfloat16(
    trunk: Trunk, tiny_model: str, preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features differ from those in float32 by the rounding; `rounding` expects it within a factor of 5.

    A reward is w h, so it differs by |w| times that at most (Cauchy-Schwarz). The heads are float32, but those of a
    checkpoint in bfloat16 were rounded when it was written.
    """
    with monkeypatch.context() as patch:
        for place in PLACES:
            patch.setattr(f"poise.{place}.frozen_dtype", lambda: torch.bfloat16)
        out = train_reward.run(
            train_reward.Config(
                str(preferences_file), str(tmp_path / "reward"), tiny_model, num_layers=2, trunk=trunk, batch_size=64,
                device_batch_size=64, lora_rank=4, posterior_heads=4, head_steps=20, feature_cache=False,
            )
        )  # fmt: skip
        source = str(out.folder / "brme")
        low = Scorer.load(source)
        assert low.extract.classifier.dtype == torch.bfloat16
        features, rewards = low.extract(SAMPLES), low(SAMPLES).mean
        export.run(export.Config(source, str(tmp_path / "export"), scalar="mean"))
        exported = Scorer.load(str(tmp_path / "export"))(SAMPLES).mean
        allowed = 5 * rounding(low.extract.classifier)
    exact = Scorer.load(source)
    assert exact.extract.classifier.dtype == torch.float32
    reach = allowed * exact.extract(SAMPLES).norm(dim=-1, keepdim=True)
    difference = features - exact.extract(SAMPLES)
    assert difference.abs().max() > 0
    assert (difference.norm(dim=-1, keepdim=True) <= reach).all()
    norms = exact.weight[: exact.layout.num_heads].norm(dim=-1)
    assert ((rewards - exact(SAMPLES).mean).abs() <= 2 * reach * norms).all()  # of the features and of the heads
    whole = (rewards.mean(-1, keepdim=True) - exported).abs()
    assert (whole <= torch.finfo(torch.bfloat16).eps * reach / allowed * norms.max()).all()
