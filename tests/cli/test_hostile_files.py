"""A corpus of wrong files: every field of our formats and of model folders × missing, null, wrong type, NaN, negative,
huge, other length. Each ends with status 2 and one line, quickly, and nothing on the disk has changed."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.cli.main import main, settings_of
from poise.errors import PoiseError
from poise.functional.objectives import RewardScale
from poise.models.template_trial import SECONDS
from poise.runtime.settings import hints, problem

MISSING = object()
HUGE = 10**400
Json = dict[str, Any]

NUMBER = {"null": None, "text": "many", "list": [1], "nan": math.nan, "inf": math.inf, "huge": HUGE, "object": {}}
WHOLE = NUMBER | {"fraction": 1.5, "true": True, "negative": -3, "zero": 0}
NUMBERS = {
    "null": None, "text": "1, 2", "number": 1.0, "object": {"0": 1}, "nan": [math.nan], "inf": [math.inf],
    "huge": [HUGE], "texts": ["a"], "nulls": [None], "nested": [[1.0]],
}  # fmt: skip
TEXTS = {"null": None, "number": 3, "object": {}, "numbers": [1, 2], "nulls": [None, None], "empty": [], "blank": [""]}

BLOCK: Json = {
    "num_heads": 2, "kind": "gaussian", "offset": [0.0] * 4, "floor": 0.1, "reward_scale": 1.0, "std_scale": [1.0, 1.0],
}  # fmt: skip
WRONG_BLOCKS: dict[str, dict[str, Any]] = {
    "num_heads": WHOLE | {"missing": MISSING, "other": 3, "a million and one": 1_000_001},
    "kind": {"missing": MISSING, "null": None, "number": 1, "other": "uniform", "list": ["gaussian"], "nan": math.nan},
    "offset": NUMBERS | {"missing": MISSING, "short": [0.0] * 3, "long": [0.0] * 5, "empty": []},
    "floor": NUMBER | {"negative": -5, "true": True},
    "reward_scale": NUMBER | {"negative": -1.0, "false": False},
    "std_scale": NUMBERS | {"short": [1.0], "long": [1.0] * 3, "zero": [0.0, 1.0], "negative": [1.0, -1.0]},
    "unknown": {"field": 1},
}
ENSEMBLE: Json = {"members": ["a", "b"], "means": [0.0, 0.0], "stds": [1.0, 1.0]}
WRONG_ENSEMBLES: dict[str, dict[str, Any]] = {
    "members": TEXTS | {"missing": MISSING, "itself": [".", "b"], "short": ["a"], "long": ["a", "b", "a"],
                        "nowhere": ["a", "/no where/c"], "null byte": ["a", "\0"]},
    "means": NUMBERS | {"missing": MISSING, "short": [0.0], "long": [0.0] * 3},
    "stds": NUMBERS | {"missing": MISSING, "short": [1.0], "long": [1.0] * 3, "zero": [0.0, 1.0],
                       "negative": [-1.0, 1.0]},
    "unknown": {"field": 1},
}  # fmt: skip
SIZE = {name: value for name, value in WHOLE.items() if name != "null"}
WRONG_CONFIGS: dict[str, dict[str, Any]] = {
    "model_type": {"missing": MISSING, "null": None, "number": 3, "list": ["llama"], "unknown": "its_own", "empty": ""},
    **dict.fromkeys(
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_key_value_heads",
         "intermediate_size", "max_position_embeddings"), SIZE,
    ),
    "is_encoder_decoder": {"true": True},
    "vision_config": {"object": {}, "sizes": {"hidden_size": 3}},
    "audio_config": {"object": {"hidden_size": 3}},
    "quantization_config": {"text": "int8", "empty": {}, "bitsandbytes": {"quant_method": "bitsandbytes"},
                            "gptq": {"quant_method": "gptq", "bits": 4}, "number": {"quant_method": 4}},
    "id2label": {"list": ["a"], "text": "a", "three": {"0": "a", "1": "b", "2": "c"}},
}  # fmt: skip
SCALE: Json = {"head_baseline": [0.0, 1.0], "mean": 0.0, "std": 1.0, "floor": -1.0, "ceiling": 2.0, "count": 8}
WRONG_SCALES: dict[str, dict[str, Any]] = {
    "head_baseline": NUMBERS | {"missing": MISSING},
    "mean": NUMBER | {"missing": MISSING},
    "std": NUMBER | {"missing": MISSING, "zero": 0, "negative": -1.0},
    "floor": NUMBER | {"above the ceiling": 3.0},
    "ceiling": NUMBER | {"below the floor": -2.0},
    "count": {name: value for name, value in WHOLE.items() if name != "zero"},
    "unknown": {"field": 1},
}
# Settings that may be negative, or None; their other values are as wrong as everybody's.
MAY_BE_NEGATIVE = {"reward_floor", "reward_ceiling", "final_parameter"}
COMMANDS = ("train-reward", "train-policy", "toy", "quickstart", "evaluate-policy", "best-of-n", "score")


def changed(saved: Json, field: str, value: Any) -> Json:
    rest = {name: old for name, old in saved.items() if name != field}
    return rest if value is MISSING else rest | {field: value}


def cases(wrong: dict[str, dict[str, Any]]) -> list[Any]:
    return [pytest.param(f, value, id=f"{f}-{name}") for f, values in wrong.items() for name, value in values.items()]


def wrong_settings() -> list[Any]:
    found: list[Any] = []
    for command in COMMANDS:
        for name, default in ((field.name, field.default) for field in dataclasses.fields(settings_of(command)[0])):
            if isinstance(default, bool) or not isinstance(default, (int, float)):
                continue
            values = {"nan": math.nan, "huge": 10**30, "text": "many", "list": [1], "null": None}
            values |= {} if name in MAY_BE_NEGATIVE else {"negative": -1}
            if not problem(None, hints(settings_of(command)[0])[name]):  # nothing is a value, too
                del values["null"]
            found += [pytest.param(command, name, value, id=f"{command}-{name}-{w}") for w, value in values.items()]
    return found


def state(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    """`model`: a language model; `reward`: the same with a poise block, for what is refused before weights are read."""
    root = tmp_path_factory.mktemp("hostile")
    for name in ("model", "reward", "a", "b"):
        shutil.copytree(tiny_model, root / name)
    config = json.loads((root / "model" / "config.json").read_text())
    labels = {str(i): f"LABEL_{i}" for i in range(4)}
    for name in ("reward", "a", "b"):
        (root / name / "config.json").write_text(json.dumps(config | {"id2label": labels, "poise": BLOCK}))
    (root / "both").mkdir()
    (root / "rows.jsonl").write_text('{"prompt": "Review.", "completion": "good"}\n')
    (root / "prompts.jsonl").write_text('{"prompt": "Review."}\n{"prompt": "Tell."}\n')
    return root


@pytest.fixture
def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to end with status 2, one line, and the disk as it was; returns the line."""

    def check(*arguments: str) -> str:
        before = state(folder)
        assert main([*arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("poise: "), err
        assert err.count("\n") == 1, err
        assert state(folder) == before
        assert not (tmp_path / "out").exists()
        return err

    return check


def written(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(("field", "value"), cases(WRONG_BLOCKS))
def test_a_wrong_poise_block_is_one_line(
    field: str, value: Any, folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    file = folder / "reward" / "config.json"
    right = json.loads(file.read_text())
    written(file, right | {"poise": changed(BLOCK, field, value)})
    try:
        said = refused("score", str(folder / "reward"), str(folder / "rows.jsonl"), "--output", str(tmp_path / "out"))
        assert "poise" in said.removeprefix("poise: ")
    finally:
        written(file, right)


@pytest.mark.parametrize(("field", "value"), cases(WRONG_ENSEMBLES))
def test_a_wrong_ensemble_is_one_line(
    field: str, value: Any, folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    written(folder / "both" / "ensemble.json", changed(ENSEMBLE | {"members": ["../a", "../b"]}, field, value))
    refused("score", str(folder / "both"), str(folder / "rows.jsonl"), "--output", str(tmp_path / "out"))


@pytest.mark.parametrize(("field", "value"), cases(WRONG_CONFIGS))
def test_a_wrong_model_folder_is_one_line(
    field: str, value: Any, folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    of_labels = field == "id2label"
    file = folder / ("reward" if of_labels else "model") / "config.json"
    right = json.loads(file.read_text())
    written(file, changed(right, field, value))
    rows, out = str(folder / "rows.jsonl"), str(tmp_path / "out")
    try:
        if of_labels:
            refused("score", str(folder / "reward"), rows, "--output", out)
        else:
            prompts = str(folder / "prompts.jsonl")
            command = ["train-policy", "--prompts", prompts, "--reward", str(folder / "a"), "--output", out]
            assert "config.json" in refused(*command, "--model", str(folder / "model"))
    finally:
        written(file, right)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": ' * 100_000, "\x00", '{"members": ["\ud800"]}'])
@pytest.mark.parametrize("file", ["reward/config.json", "both/ensemble.json", "model/tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_one_line(
    file: str, text: str, folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = folder / file
    right = path.read_bytes() if path.exists() else None
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    rows, prompts, out = str(folder / "rows.jsonl"), str(folder / "prompts.jsonl"), str(tmp_path / "out")
    try:
        if file.startswith("model"):
            command = ["train-policy", "--prompts", prompts, "--reward", str(folder / "a")]
            if text != '{"members": ["\ud800"]}':
                refused(*command, "--model", str(path.parent), "--output", out)
        else:
            refused("score", str(path.parent), rows, "--output", out)
    finally:
        path.unlink()
        if right is not None:
            path.write_bytes(right)


@pytest.mark.parametrize(("field", "value"), cases(WRONG_SCALES))
def test_a_wrong_saved_scale_is_one_line(field: str, value: Any) -> None:
    assert RewardScale.from_json(SCALE).to_json() == SCALE | {"head_baseline": (0.0, 1.0)}
    with pytest.raises(PoiseError) as caught:
        RewardScale.from_json(changed(SCALE, field, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("command", "name", "value"), wrong_settings())
def test_a_wrong_config_file_is_one_line(
    command: str, name: str, value: Any, refused: Callable[..., str], tmp_path: Path, folder: Path
) -> None:
    rows = str(folder / "rows.jsonl")
    needed: Json = {"train-policy": {"prompts": rows, "reward": "r"}, "train-reward": {"preferences": rows}}
    needed |= {"best-of-n": {"prompts": rows, "reward": ["r"]}, "score": {"reward": "r", "file": rows}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(needed.get(command, {}) | {name: value}))
    said = refused(command, "--config", str(file), "--output", str(tmp_path / "out"))
    assert name in said.replace("-", "_")


def test_an_ensemble_of_ensembles_in_a_ring_is_refused(
    folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    for one, other in (("ring1", "ring2"), ("ring2", "ring1")):
        (folder / one).mkdir()
        written(folder / one / "ensemble.json", ENSEMBLE | {"members": [f"../{other}", "../a"]})
    rows = str(folder / "rows.jsonl")
    assert "is itself an ensemble" in refused("score", str(folder / "ring1"), rows, "--output", str(tmp_path / "out"))


TEMPLATES = {
    "no template": ("{% for %}", "is no template"),
    "nothing": ("{# nothing #}", "writes nothing;"),
    "ignores the answer": ("{{ messages[0]['content'] }}", "writes nothing of an answer"),
    "never ends": ("{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}", "did not end"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_wrong_template_is_one_line(
    what: str, folder: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SECONDS <= 5
    monkeypatch.setattr("poise.models.template_trial.SECONDS", 0.2)
    template, words = TEMPLATES[what]
    file = folder / "a" / "chat_template.jinja"
    right = file.read_text()
    file.write_text(template)
    try:
        command = ["score", str(folder / "a"), str(folder / "rows.jsonl"), "--output", str(tmp_path / "out")]
        assert words in refused(*command)
    finally:
        file.write_text(right)
