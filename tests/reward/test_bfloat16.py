"""Reward models and policies in bfloat16, as a GPU trains, scores and exports them; on a CPU only slower."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import rest_slow
from poise.data.types import Sample
from poise.models.families import rounding
from poise.models.scorer import Scorer
from poise.policy import train as train_policy
from poise.reward import export
from poise.reward import train as train_reward
from poise.reward.config import Trunk
from poise.runtime.records import read_rows
from poise.studies.config import LAPTOP_POLICY

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


POLICIES: dict[str, dict[str, Any]] = {
    "lora": {}, "full": {"tune": "full"}, "own values": {"value_trunk": "own", "entropy_coef": 0.0},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", POLICIES)
def test_the_whole_path_in_bfloat16(
    kind: str, tiny_model: str, preferences_file: Path, prompts_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Preferences to reward model to PPO to exported reward model: each reward is the float32 one up to rounding.

    The bound is that of the features times the norm of a head, as above; twice, for the heads are rounded, too.
    """
    with monkeypatch.context() as patch:
        for place in PLACES:
            patch.setattr(f"poise.{place}.frozen_dtype", lambda: torch.bfloat16)
        reward = train_reward.run(
            train_reward.Config(
                str(preferences_file), str(tmp_path / "reward"), tiny_model, num_layers=2, trunk="frozen",
                posterior_heads=4, head_steps=20, feature_cache=False,
            )
        )  # fmt: skip
        source = str(reward.folder / "brme")
        allowed = 5 * rounding(Scorer.load(source).extract.classifier)
        out = train_policy.run(
            dataclasses.replace(
                LAPTOP_POLICY, prompts=str(prompts_file), reward=source, output=str(tmp_path / "policy"),
                model=tiny_model, num_steps=2, prompts_per_step=2, completions_per_prompt=4, max_tokens=8,
                adapted_layers=2, lora_rank=4, baseline_completions=16, eval_completions=2, num_minibatches=1,
                num_epochs=1, **POLICIES[kind],
            )
        )  # fmt: skip
        exported = export.run(export.Config(source, str(tmp_path / "export"), scalar="mean"))
        low = Scorer.load(str(exported))
    first, second = out.metrics()
    assert first["kl_k3"] == first["step_kl"] == second["step_kl"] == 0.0  # one path: no rounding between readings
    assert first["grad_norm"] > 0
    assert second["kl_k3"] > 0
    rows = list(read_rows(out.folder / "samples.jsonl"))
    samples = [Sample(row["prompt"], row["completion"]) for row in rows if row["completion"].strip()]
    kept = torch.tensor([row["mean"] for row in rows if row["completion"].strip()])
    exact = Scorer.load(source)
    norms = exact.weight[: exact.layout.num_heads].norm(dim=-1)
    reach = 2 * allowed * exact.extract(samples).norm(dim=-1, keepdim=True)
    assert ((kept - exact(samples).mean).abs() <= reach * norms).all()
    mean = exact(samples).mean.mean(-1, keepdim=True)
    assert ((low(samples).mean - mean).abs() <= reach * norms.max()).all()
