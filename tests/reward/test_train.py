"""`poise train-reward`: the three models of a run, what they are worth, and what is refused."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import disagreement
from poise.models.scorer import Scorer
from poise.reward import train as train_reward
from poise.reward.train import Config


@pytest.fixture(scope="module")
def finished(tiny_model: str, preferences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> train_reward.Run:
    output = tmp_path_factory.mktemp("runs") / "reward"
    config = Config(
        preferences=str(preferences_file), output=str(output), model=tiny_model, num_layers=3, trunk="frozen"
    )
    return train_reward.run(config)


def test_the_whole_run_learns_good_from_bad(finished: train_reward.Run) -> None:
    results = finished.results
    assert results is not None
    assert set(results["models"]) == {"single", "ensemble", "brme", "posterior"}
    assert (results["num_train"], results["num_validation"]) == (32, 8)
    assert results["split"] == {"unit": "text", "num_train": 64, "num_validation": 16}  # of two prompts
    scorer = Scorer.load(str(finished.folder))  # a run folder stands for its BRME
    assert scorer.layout.kind == "gaussian"
    assert scorer.layout.num_heads == 5
    single = scorer.with_heads_of(str(finished.folder / "single"))
    good = single(
        [Sample("Review a film.", f"the film was {word} {i}") for i in range(20) for word in ("good", "great")]
    )
    bad = single([Sample("Review a film.", f"the film was {word} {i}") for i in range(20) for word in ("bad", "awful")])
    assert (good.mean > bad.mean.median()).float().mean() > 0.7


def test_rewards_are_standardized_on_the_training_texts(finished: train_reward.Run, preferences_file: Path) -> None:
    from poise.data.preferences import read_preferences

    preferences = read_preferences(preferences_file)
    samples = [Sample(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    rewards = Scorer.load(str(finished.folder / "single"))(samples).mean
    assert rewards.mean().item() == pytest.approx(0, abs=0.3)  # all texts, of which a fifth is validation
    assert rewards.std().item() == pytest.approx(1, abs=0.2)


def test_posterior_heads_average_to_the_single_one(finished: train_reward.Run) -> None:
    samples = [Sample("Review a film.", text) for text in ("good", "bad", "it was really not great")]
    posterior = Scorer.load(str(finished.folder / "posterior"))
    single = posterior.with_heads_of(str(finished.folder / "single"))
    torch.testing.assert_close(posterior(samples).mean.mean(-1), single(samples).mean[:, 0], rtol=0, atol=1e-3)
    assert (disagreement(posterior(samples)) > 0).all()


def test_a_finished_run_is_not_run_again(
    finished: train_reward.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import yaml

    monkeypatch.delattr(train_reward, "load_trunk")
    config = Config(**yaml.safe_load((finished.folder / "config.yaml").read_text()))
    assert train_reward.run(config).results == finished.results
    pairs = Path(shutil.copy(config.preferences, tmp_path / "pairs.jsonl"))
    elsewhere = dataclasses.replace(config, preferences=str(pairs))
    assert train_reward.run(elsewhere).results == finished.results
    shutil.copytree(finished.folder, tmp_path / "run")
    moved = dataclasses.replace(elsewhere, output=str(tmp_path / "run"))
    settings = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(settings.replace(config.preferences, str(pairs)))
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(PoiseError, match="run is finished, and of its inputs --preferences changed since"):
        train_reward.run(moved)


@pytest.mark.parametrize("tuned", [{"trunk": "lora"}, {"trunk": "frozen", "stage2_trunk": "lora"}], ids=str)
def test_models_with_a_trunk_of_their_own_are_not_trained_in_memory(
    tuned: dict[str, Any], finished: train_reward.Run, preferences_file: Path, tiny_model: str
) -> None:
    extract = Scorer.load(str(finished.folder / "single")).extract
    with pytest.raises(PoiseError, match=r"^reward models with a trunk of their own are trained as runs$"):
        train_reward.heads_in_memory(Config(str(preferences_file), "x", tiny_model, **tuned), extract)


def test_a_trunk_that_lost_a_part_says_how_to_have_it_again(
    preferences_file: Path, tiny_model: str, tmp_path: Path
) -> None:
    config = Config(preferences=str(preferences_file), model=tiny_model, trunk="lora", output=str(tmp_path / "run"))
    shutil.copytree(tiny_model, tmp_path / "run" / "trunk", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run" / ".poise").touch()
    with pytest.raises(PoiseError, match=r"; delete .*/run/trunk and start again: it is trained anew$"):
        train_reward.run(config)


def test_shards_by_a_source_that_no_row_names_are_refused(
    preferences_file: Path, tiny_model: str, tmp_path: Path
) -> None:
    config = Config(preferences=str(preferences_file), model=tiny_model, shards="source", output=str(tmp_path / "run"))
    with pytest.raises(PoiseError, match=r"--shards source: no row of .* names its `source`; choose other --shards"):
        train_reward.run(config)
    assert not (tmp_path / "run").exists()


def test_too_little_data_and_bad_settings_are_refused(tmp_path: Path, tiny_model: str) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 2)
    with pytest.raises(PoiseError, match="too few"):
        train_reward.run(Config(preferences=str(path), output=str(tmp_path / "x"), model=tiny_model))
    path.write_text("".join(f'{{"prompt": "p", "chosen": "a{i}", "rejected": "b{i}"}}\n' for i in range(9)))
    with pytest.raises(PoiseError, match="must be at most 3, the layers of"):
        train_reward.run(Config(str(path), str(tmp_path / "y"), model=tiny_model, num_layers=9))
    with pytest.raises(PoiseError, match="num-heads"):
        train_reward.run(Config(preferences=str(path), num_heads=0))


@pytest.mark.parametrize(("asked", "place"), [("", None), ("FSDP", "cpu"), ("DEEPSPEED", "cpu")])
def test_weights_that_the_launcher_spreads_are_loaded_on_the_cpu(
    asked: str, place: str | None, tiny_model: str, preferences_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A GPU need not hold all of them, nor the copy into which they are gathered."""
    places = []

    def load_trunk(*_: Any, place: torch.device | None, **__: Any) -> None:
        places.append(place)
        raise PoiseError("loaded")

    monkeypatch.setattr(train_reward, "load_trunk", load_trunk)
    if asked:
        monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    config = Config(str(preferences_file), str(tmp_path / "run"), model=tiny_model, num_layers=3, trunk="full")
    with pytest.raises(PoiseError, match="loaded"):
        train_reward.run(config)
    assert places == [place and torch.device(place)]
