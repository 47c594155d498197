"""`poise train-reward --validator-share`: a validator of pairs and layers of its own, and the line between the two."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import WORDS, rest_slow
from poise.data.types import Preference
from poise.errors import PoiseError
from poise.models.scorer import Scorer
from poise.reports import reward_card, reward_run
from poise.reward import train as train_reward
from poise.reward.config import Config
from poise.runtime.run_folder import Run, config_dict


def write(path: Path, rows: Sequence[Preference]) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) + "\n" for p in rows)
    )
    return path


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs, two of each prompt."""
    draw = random.Random(0)
    rows = []
    for i in range(60):
        filler = " ".join(draw.choices(WORDS[4:], k=4))
        good, bad = draw.choice(["good", "great", "fine"]), draw.choice(["bad", "awful", "poor"])
        rows.append(Preference(f"Review item {i // 2}.", f"{filler} {good} {i}", f"{filler} {bad} {i}"))
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def small(preferences: Path, output: Path, model: str, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "num_layers": 1, "trunk": "frozen", "head_steps": 10, "num_heads": 2, "posterior_heads": 2, "max_length": 256,
        "feature_cache": False, "validator_share": 0.4, "learning_rate": 3e-3,
    }  # fmt: skip
    return Config(str(preferences), str(output), model, **{**values, **changes})


@pytest.fixture(scope="module")
def watched(preferences: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_reward.run(small(preferences, tmp_path_factory.mktemp("runs") / "rm", tiny_model))


# ---- pairs ----


def prompts_and_texts(rows: Sequence[Preference]) -> tuple[set[str], set[str]]:
    return {str(row.prompt) for row in rows}, {text for row in rows for text in (row.chosen, row.rejected)}


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 80), st.integers(0, 80)), min_size=12, max_size=60),
    st.sampled_from([0.1, 0.3, 0.5]),
    st.integers(0, 3),
)
def test_no_prompt_or_text_is_of_both(drawn: list[tuple[int, int, int]], share: float, seed: int) -> None:
    rows = [Preference(f"prompt {p}", f"text {a}", f"text {b}") for p, a, b in drawn if a != b]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tokenizer", "resolve_model", "row_check", "load_config"):
            patch.setattr(train_reward, name, MagicMock())
        patch.setattr(train_reward, "context_length", lambda _: 256)
        patch.setattr(train_reward, "told_apart", lambda preferences, *_: preferences)
        patch.setattr(train_reward, "read_preferences", lambda *_: rows)
        try:
            own, back = train_reward.read(Config("p", validator_share=share, seed=seed))
        except PoiseError:
            assume(False)
    assert back is not None
    assert sorted(map(str, own.preferences + back.preferences)) == sorted(map(str, rows))
    asked = max(1, round(share * len(rows)))
    assert asked / 2 <= len(back.preferences) <= 2 * asked
    sides = [prompts_and_texts(one.preferences) for one in (own, back)]
    assert not sides[0][0] & sides[1][0] or not sides[0][1] & sides[1][1]


def test_each_is_what_its_pairs_alone_would_have_made(
    watched: Run, preferences: Path, tiny_model: str, tmp_path: Path
) -> None:
    """Bit by bit: neither has read a pair of the other."""
    config = small(preferences, watched.folder, tiny_model)
    own, back = train_reward.read(config)
    assert back is not None
    alone = {
        "own": replace(config, preferences=str(write(tmp_path / "own.jsonl", own.preferences)), validator_share=0.0),
        "back": replace(
            config, preferences=str(write(tmp_path / "back.jsonl", back.preferences)), validator_share=0.0, num_layers=2
        ),
    }
    runs = {name: train_reward.run(replace(one, output=str(tmp_path / name))).folder for name, one in alone.items()}
    twins = {kind: runs["own"] / kind for kind in ("single", "ensemble", "posterior", "brme")}
    for name, twin in {**twins, "validator": runs["back"] / "single"}.items():
        one, other = (load_file(folder / "model.safetensors") for folder in (watched.folder / name, twin))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert not (runs["own"] / "validator").exists()


def test_too_few_pairs_are_one_line_and_no_folder(tiny_model: str, tmp_path: Path) -> None:
    rows = [Preference(f"p{i}", f"a{i}", f"b{i}") for i in range(12)]
    config = small(write(tmp_path / "few.jsonl", rows), tmp_path / "rm", tiny_model, validator_share=0.1)
    with pytest.raises(
        PoiseError, match=r"^--validator-share 0.1 of .*few.jsonl: 1 preferences are too few to train on$"
    ):
        train_reward.run(config)
    assert not (tmp_path / "rm").exists()


# ---- layers ----


@pytest.mark.parametrize(
    ("depth", "kept", "expected"),
    [(30, 8, 16), (30, 15, 30), (30, 16, 8), (30, 0, 15), (3, 0, 1), (3, 1, 2), (2, 0, 1), (2, 1, 2)],
)
def test_it_reads_twice_the_layers_or_half(
    depth: int, kept: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_depth(monkeypatch, depth)
    assert train_reward._for_validator(Config(num_layers=kept)).num_layers == expected


@pytest.mark.parametrize(
    ("depth", "kept", "said"), [(1, 0, "has one layer"), (1, 1, "has one layer"), (3, 4, "has 3 layers")]
)
def test_a_model_without_another_depth_is_refused(
    depth: int, kept: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_depth(monkeypatch, depth)
    with pytest.raises(PoiseError, match=said):
        train_reward._for_validator(Config(num_layers=kept))


def set_depth(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    class Of:
        num_hidden_layers = depth

        def get_text_config(self) -> "Of":
            return self

    monkeypatch.setattr(train_reward, "resolve_model", str)
    monkeypatch.setattr(train_reward, "load_config", lambda _: Of())


# ---- what is said of it ----


@pytest.mark.usefixtures("undrawn_here")
def test_results_page_and_card_tell_of_its_own_pairs(watched: Run, preferences: Path, tiny_model: str) -> None:
    results = watched.results
    assert results is not None
    of = results["validator"]
    assert (results["num_preferences"], of["num_preferences"]) == (36, 24)
    assert (of["num_train"] + of["num_validation"], of["num_layers"], results["num_layers"]) == (24, 2, 1)
    assert of["split"]["unit"] == "prompt"
    accuracy = of["models"]["validator"]["validation_accuracy"]
    assert 0 <= accuracy <= 1
    config = config_dict(small(preferences, watched.folder, tiny_model))
    reward_card.write_cards(watched, config)
    card = (watched.folder / "validator" / "README.md").read_text()
    assert "# Validator of a reward model" in card
    assert f"24 preferences from `{preferences.name}`: {of['num_train']} to train on" in card
    assert f"accuracy | {100 * accuracy:.1f} %" in card
    assert "the first 2 layers of" in card
    other = (watched.folder / "brme" / "README.md").read_text()
    assert "24 more were held back, for the validator in the folder beside this one." in other
    page = reward_run.page(watched.folder)
    assert any(one.text.startswith("validator orders ") for one in page.findings)


def test_it_is_a_reward_model_of_one_head(watched: Run) -> None:
    scorer = Scorer.load(str(watched.folder / "validator"))
    assert (scorer.layout.num_heads, scorer.layout.kind) == (1, "point")
    assert scorer.extract.classifier.config.num_hidden_layers == 2
    assert scorer.reference is None


@pytest.mark.parametrize("trunk", rest_slow(["lora", "full"]))
def test_it_tunes_a_trunk_of_its_own(trunk: str, preferences: Path, tiny_model: str, tmp_path: Path) -> None:
    config = small(preferences, tmp_path / "rm", tiny_model, trunk=trunk, lora_rank=2, save_steps=1)
    out = train_reward.run(config)
    steps = [
        json.loads(line)["step"]
        for line in (out.folder / "validator-training" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2]  # 19 pairs in steps of 16
    name = "model.layers.0.mlp.up_proj.weight"
    own, other = (load_file(out.folder / kind / "model.safetensors")[name] for kind in ("single", "validator"))
    assert not torch.equal(own, other)
    left = {path.name for path in (out.folder / "validator-training").iterdir()}
    assert left == {"metrics.jsonl"} | ({"adapter"} if trunk == "lora" else set())
    (
        out.folder / "validator-training" / "trainer"
    ).mkdir()  # as after a kill between the results and their last deletion
    train_reward.run(config)
    assert {path.name for path in (out.folder / "validator-training").iterdir()} == left


def test_a_run_that_was_stopped_after_its_validator_does_not_train_it_again(
    preferences: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(preferences, tmp_path / "rm", tiny_model, trunk="lora", lora_rank=2)
    trained: list[str] = []
    fine_tune = train_reward.fine_tune

    def counted(*given: Any, **options: Any) -> Any:
        if given[5].name == "rm" and not trained.count("rm"):
            trained.append("rm")
            raise KeyboardInterrupt
        trained.append(given[5].name)
        return fine_tune(*given, **options)

    monkeypatch.setattr(train_reward, "fine_tune", counted)
    with pytest.raises(KeyboardInterrupt):
        train_reward.run(config)
    weights = (tmp_path / "rm" / "validator" / "model.safetensors").read_bytes()
    out = train_reward.run(config)
    assert trained == ["validator-training", "rm", "rm"]
    assert (out.folder / "validator" / "model.safetensors").read_bytes() == weights
