"""`poise score`: what its columns hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from poise.data.types import Sample
from poise.models.scorer import Scorer
from poise.reward import score


def test_total_std_is_calibrated_and_routing_is_not(
    tiny_model: str, train_tiny_reward: Callable[[str], Path], tmp_path: Path
) -> None:
    run = train_tiny_reward(tiny_model)
    texts = ["good", "bad", "it was not great"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Review a film.", "completion": text}) + "\n" for text in texts))
    rows = [json.loads(line) for line in score.run(score.Config(str(run), str(file))).read_text().splitlines()]
    scorer = Scorer.load(str(run))
    heads = scorer([Sample("Review a film.", text) for text in texts])
    scale = np.array(scorer.layout.std_scale)
    assert np.abs(scale - 1).max() > 0.1
    np.testing.assert_allclose([row["std"] for row in rows], heads.std, rtol=1e-5)
    np.testing.assert_allclose([row["routing_std"] for row in rows], heads.std.amin(-1), rtol=1e-5)
    assert [row["nominal_head"] for row in rows] == heads.std.argmin(-1).tolist()
    expected = np.sqrt(np.square(heads.std.numpy() * scale).mean(-1) + heads.mean.numpy().var(-1))
    np.testing.assert_allclose([row["total_std"] for row in rows], expected, rtol=1e-4)


def test_a_stopped_command_goes_on_after_its_last_part(
    tiny_model: str, train_tiny_reward: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_tiny_reward(tiny_model)
    monkeypatch.setattr(score, "ROWS_PER_PART", 4)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Review.", "completion": f"good {i}"}) + "\n" for i in range(10)))
    whole = score.run(score.Config(str(run), str(file))).read_text()
    assert len(whole.splitlines()) == 10
    assert {path.name for path in tmp_path.iterdir()} >= {"texts.jsonl", "texts.scored.jsonl"}
    assert not list(tmp_path.glob("*.partial*"))

    parts, scored = [], score._scored

    def killed_in_the_third_part(scorer: Scorer, samples: list[Sample], *more: Any) -> list[dict[str, Any]]:
        parts.append(len(samples))
        if parts == [4, 4, 2]:
            raise KeyboardInterrupt
        return scored(scorer, samples, *more)

    monkeypatch.setattr(score, "_scored", killed_in_the_third_part)
    again = score.Config(str(run), str(file), output=str(tmp_path / "again.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        score.run(again)
    assert len((tmp_path / "again.jsonl.partial").read_text().splitlines()) == 8
    assert score.run(again).read_text() == whole
    assert parts == [4, 4, 2, 2]


def test_parts_of_another_reward_model_are_not_kept(
    tiny_model: str, train_tiny_reward: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also of a run folder and of an ensemble, whose own files say nothing of the heads."""
    run, copy = train_tiny_reward(tiny_model), tmp_path / "rm"
    shutil.copytree(run, copy)
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"prompt": "Review.", "completion": "good"}) + "\n")
    both = {"members": ["../rm", "../rm/brme"], "means": [0.0, 0.0], "stds": [1.0, 1.0]}
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "ensemble.json").write_text(json.dumps(both))
    found = {}
    for name in ("rm", "both"):
        config = score.Config(str(tmp_path / name), str(file), output=str(tmp_path / f"{name}.jsonl"))
        partial = tmp_path / f"{name}.jsonl.partial"
        score._resumed(partial, config)
        found[name] = score._settings_of(partial).read_text()
    [weights] = [path for path in (copy / "brme").glob("*.safetensors") if "score.weight" in load_file(path)]
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    for name, before in found.items():
        config = score.Config(str(tmp_path / name), str(file), output=str(tmp_path / f"{name}.jsonl"))
        score._resumed(tmp_path / f"{name}.jsonl.partial", config)
        assert score._settings_of(tmp_path / f"{name}.jsonl.partial").read_text() != before
