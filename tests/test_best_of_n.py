"""`poise best-of-n` on tiny models: several reward models, a gold of one's own, what is kept, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from poise import best_of_n, pool
from poise.best_of_n import Config
from poise.errors import PoiseError
from poise.runs import read_jsonl

CHOICES = ("single:nominal", "ensemble:worst_case", "brme:tradeoff(0.4)")


@pytest.fixture(scope="module")
def reward(train_tiny_reward: Callable[[str], Path], tiny_model: str) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture(scope="module")
def settings(reward: Path, tiny_model: str, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        prompts=str(prompts_file), reward=(str(reward), str(reward)), model=tiny_model, objectives=CHOICES,
        per_prompt=6, max_tokens=4, output=str(tmp_path_factory.mktemp("run") / "pool"),
        gold=str(reward / "posterior"),  # a reward model as gold: it says different things of different texts
    )  # fmt: skip


def test_curves_laws_and_differences(settings: Config) -> None:
    results = best_of_n.run(settings).results
    assert results is not None
    assert [curve["name"] for curve in results["curves"]] == list(CHOICES)
    assert results["num_rewards"] == 2
    first, _, brme = results["curves"]
    assert [point["n"] for point in first["best_of_n"]] == [1, 2, 3, 4, 5, 6]
    assert first["best_of_n"][0]["gold"] == pytest.approx(results["initial_gold"])
    proxies = [point["proxy"] for point in first["best_of_n"]]
    assert proxies == sorted(proxies)
    assert "less_first" not in first["measures"]["gain"]
    assert brme["measures"]["gain"]["less_first"] == pytest.approx(
        brme["measures"]["gain"]["mean"] - first["measures"]["gain"]["mean"]
    )
    assert {"alpha", "beta", "r2"} == set(first["fits"]["best_of_n"])


def test_gold_of_ones_own_is_the_mean_of_its_heads(settings: Config, reward: Path) -> None:
    best_of_n.run(settings)
    rows = list(read_jsonl(Path(settings.output) / "pool.jsonl"))
    heads = pool.score_pool(Path(settings.output), rows, {"0-posterior": str(reward / "posterior")})[
        "0-posterior"
    ].heads
    np.testing.assert_allclose([row["gold"] for row in rows], heads.mean.mean(-1).numpy(), atol=1e-5)


def test_nothing_is_sampled_or_scored_twice(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = best_of_n.run(settings).results
    monkeypatch.setattr(pool, "load_policy", None)
    monkeypatch.setattr(pool.Scorer, "load", None)
    (Path(settings.output) / "results.json").unlink()
    assert best_of_n.run(settings).results == before


def test_heads_of_another_checkpoint_are_refused(settings: Config, tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "pool"))
    best_of_n.run(own)
    (tmp_path / "pool" / "results.json").unlink()
    file = tmp_path / "pool" / "heads" / "0-single.safetensors"
    file.write_bytes((tmp_path / "pool" / "heads" / "0-brme.safetensors").read_bytes())
    with pytest.raises(PoiseError, match="holds rewards of another reward model; delete it to score again"):
        best_of_n.run(own)


def test_bad_settings_are_one_line(settings: Config, tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "pool"))
    with pytest.raises(PoiseError, match="unknown objective 'nonsense'"):
        best_of_n.run(replace(own, objectives=("brme:nonsense",)))
    with pytest.raises(PoiseError, match="--per-prompt must be at least 2"):
        best_of_n.run(replace(own, per_prompt=1))
    alone = tmp_path / "one.jsonl"
    alone.write_text(json.dumps({"prompt": "Review a film."}) + "\n")
    with pytest.raises(PoiseError, match=r"one\.jsonl has one prompt"):
        best_of_n.run(replace(own, prompts=str(alone)))
