"""Export: one label that is exactly what the heads say together, in a folder that any tool opens; and the upload."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import rest_slow
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import mean
from poise.models.chat_format import completion_text, prompt_text
from poise.models.reward_model import HeadLayout
from poise.models.scorer import Scorer
from poise.reward import export, push
from poise.reward.export import Config, scalar_head

SAMPLES = [
    Sample("Review a film.", "A fine film."),
    Sample([{"role": "user", "content": "Review a phone that is really great."}], "not really great, not really awful"),
    Sample("Review a kettle.", "It was the poor kettle of a poor kettle maker, and I love it."),
]


@pytest.fixture(scope="module")
def reward_run(any_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(any_model)


@pytest.fixture(scope="module")
def llama_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a tool without a line of Poise reads, one text after the other."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [prompt_text(tokenizer, s.prompt) + completion_text(tokenizer, s.prompt, s.completion) for s in SAMPLES]
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits for text in texts]
        )


# ---- the chat template ----


def test_the_saved_template_ends_where_the_score_is_read(llama_run: Path, tiny_model: str, tmp_path: Path) -> None:
    """Rendered by others, without a word about white space, a conversation gets the reward that Scorer gives."""
    exported = export.run(Config(str(llama_run / "brme"), str(tmp_path / "rm"), "mean"))
    stock = transformers.AutoTokenizer.from_pretrained(tiny_model)
    for folder in (llama_run / "single", exported):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        expected = Scorer.load(str(folder))(SAMPLES).mean[:, 0] + model.config.poise["offset"][0]
        rewards = {}
        for name, rendering in (("saved", tokenizer), ("stock", stock)):
            ids = [
                rendering.apply_chat_template(
                    [
                        *([{"role": "user", "content": s.prompt}] if isinstance(s.prompt, str) else s.prompt),
                        {"role": "assistant", "content": s.completion},
                    ],
                    return_tensors="pt",
                    return_dict=False,
                )
                for s in SAMPLES
            ]
            with torch.no_grad():
                rewards[name] = torch.cat([model(one).logits[:, 0] for one in ids])
        torch.testing.assert_close(rewards["saved"], expected, rtol=0, atol=1e-5)
        assert (rewards["stock"] - expected).abs().max() > 0.01


# ---- one label ----


@pytest.mark.parametrize("name", rest_slow(["brme", "posterior"]))
@pytest.mark.parametrize(("scalar", "head"), [("mean", None), ("head", 2)])
def test_one_label_says_what_the_heads_say(
    reward_run: Path, name: str, scalar: str, head: int | None, tmp_path: Path
) -> None:
    folder = export.run(Config(str(reward_run / name), str(tmp_path / "rm"), scalar, head))
    heads = Scorer.load(str(reward_run / name))(SAMPLES)
    expected = mean(heads) if head is None else heads.mean[:, head]
    ours = Scorer.load(str(folder))(SAMPLES)
    torch.testing.assert_close(ours.mean[:, 0], expected, rtol=0, atol=1e-5)
    assert (ours.std == 0).all()

    raw = logits(folder)
    assert raw.shape == (3, 1)
    settings = transformers.AutoConfig.from_pretrained(folder)
    assert (settings.num_labels, settings.problem_type) == (1, "regression")
    torch.testing.assert_close(raw[:, 0] - settings.poise["offset"][0], expected, rtol=0, atol=1e-5)
    assert abs(settings.poise["offset"][0]) > 1e-3  # there was something to subtract
    assert expected.std() > 0.01


def test_a_scalar_head_equals_one_worked_out_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0], [9.0, 9.0]])
    layout = HeadLayout(2, "gaussian", (1.0, 2.0, 7.0, 7.0), reward_scale=1.5)
    row, point = scalar_head(weight, layout, 1)
    assert row.tolist() == [[3.0, 2.0]]
    assert point == HeadLayout(1, "point", (2.0,), reward_scale=1.5)
    row, point = scalar_head(weight, layout, None)
    assert row.tolist() == [[2.0, 1.0]]
    assert point.offset == (1.5,)


def test_trunk_is_copied_bit_for_bit_and_the_row_is_exact_in_bfloat16(llama_run: Path, tmp_path: Path) -> None:
    source = half_precision(llama_run / "brme", tmp_path / "half")
    folder = export.run(Config(str(source), str(tmp_path / "rm"), "mean"))
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before.keys() - {"score.weight"}:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name], after[name])
    torch.testing.assert_close(after["score.weight"], before["score.weight"][:5].double().mean(0).float()[None])
    assert not torch.equal(after["score.weight"], after["score.weight"].bfloat16().float())  # would not have fitted
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.dtype == loaded.score.weight.dtype == torch.bfloat16
    expected = mean(Scorer.load(str(source))(SAMPLES))
    torch.testing.assert_close(Scorer.load(str(folder))(SAMPLES).mean[:, 0], expected, rtol=0, atol=1e-5)


def half_precision(source: Path, folder: Path) -> Path:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_shards_stay_shards(llama_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    shutil.copytree(llama_run / "brme", source)
    (source / "model.safetensors").unlink()
    transformers.AutoModelForSequenceClassification.from_pretrained(llama_run / "brme").save_pretrained(
        source, max_shard_size="40KB"
    )
    assert len(list(source.glob("*.safetensors"))) > 2
    folder = export.run(Config(str(source), str(tmp_path / "rm"), "mean", engine="sglang"))
    expected = mean(Scorer.load(str(source))(SAMPLES))
    torch.testing.assert_close(Scorer.load(str(folder))(SAMPLES).mean[:, 0], expected, rtol=0, atol=1e-5)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == stored
    assert index["weight_map"]["score.bias"] == index["weight_map"]["score.weight"]
    sizes = [t.numel() * t.element_size() for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    place = source / "model.safetensors.index.json"  # other writers leave the size out; a shard may be missing
    place.write_text(json.dumps(json.loads(place.read_text()) | {"metadata": {}}))
    bare = export.run(Config(str(source), str(tmp_path / "bare"), "mean"))
    assert json.loads((bare / place.name).read_text())["metadata"] == {}
    home = json.loads(place.read_text())["weight_map"]["score.weight"]
    next(path for path in source.glob("*.safetensors") if path.name != home).unlink()
    with pytest.raises(PoiseError, match=r"index.json names model-.*\.safetensors, which is not there"):
        export.run(Config(str(source), str(tmp_path / "less"), "mean"))
    assert not (tmp_path / "less").exists()


# ---- SGLang ----


@pytest.mark.parametrize("scalar", ["mean", ""])
def test_sglang_gets_a_zero_bias_that_transformers_ignores(reward_run: Path, scalar: str, tmp_path: Path) -> None:
    source = reward_run / "brme"
    folder = export.run(Config(str(source), str(tmp_path / "rm"), scalar, engine="sglang"))
    num_labels = 1 if scalar else 10
    assert load_file(folder / "model.safetensors")["score.bias"].tolist() == [0.0] * num_labels
    before, after = Scorer.load(str(source))(SAMPLES), Scorer.load(str(folder))(SAMPLES)
    assert logits(folder).shape == (3, num_labels)
    if scalar:
        torch.testing.assert_close(after.mean[:, 0], mean(before), rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(logits(folder), logits(source), rtol=0, atol=0)
        torch.testing.assert_close(after.mean, before.mean, rtol=0, atol=0)
        torch.testing.assert_close(after.std, before.std, rtol=0, atol=0)
    plain = export.run(Config(str(source), str(tmp_path / "plain"), "mean"))
    assert "score.bias" not in load_file(plain / "model.safetensors")


# ---- folders and refusals ----


def test_adapters_carry_the_heads(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    """The adapter form scores as the merged checkpoint does, and plain PEFT opens it."""
    import peft

    from poise.reward import train as train_reward

    run = train_reward.run(
        train_reward.Config(
            str(preferences_file), str(tmp_path / "run"), tiny_model, num_layers=2, trunk="lora", learning_rate=1e-2,
            posterior_heads=4, head_steps=40, validator_share=0.3,
        )
    )  # fmt: skip
    validator = Scorer.load(str(run.folder / "validator"))(SAMPLES)  # on layers, and adapters, of its own
    folder = export.run(Config(str(run.folder / "validator"), str(tmp_path / "watching"), adapter=True))
    torch.testing.assert_close(Scorer.load(str(folder))(SAMPLES).mean, validator.mean, rtol=0, atol=1e-4)
    merged = Scorer.load(str(run.folder / "brme"))(SAMPLES)
    for scalar in ("mean", ""):
        folder = export.run(Config(str(run.folder / "brme"), str(tmp_path / f"small{scalar}"), scalar, adapter=True))
        assert not list(folder.glob("model*.safetensors"))
        loaded = Scorer.load(str(folder))(SAMPLES)
        expected = mean(merged).unsqueeze(-1) if scalar else merged.mean
        torch.testing.assert_close(loaded.mean, expected, rtol=0, atol=1e-4)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]  # what its card says to do
    found: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(folder))), found)
    adapted = found["model"]
    assert isinstance(adapted, peft.PeftModel)
    tokens = Scorer.load(str(folder)).extract.encode(SAMPLES[0])
    offset = torch.tensor(adapted.config.poise["offset"])
    with torch.no_grad():
        raw = adapted(torch.tensor([[*tokens.prompt, *tokens.completion]])).logits - offset
    torch.testing.assert_close(raw[0, : loaded.mean.shape[1]], loaded.mean[0], rtol=0, atol=1e-4)
    with pytest.raises(PoiseError, match="train it with `--trunk lora`"):
        export.run(Config(str(folder), str(tmp_path / "x"), adapter=True))
    about = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(about | {"weights": "of another model"}))
    with pytest.raises(PoiseError, match="were trained on other weights"):
        Scorer.load(str(folder))
    weights = run.folder / "adapter" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if "score" not in name}, weights, {"format": "pt"})
    with pytest.raises(PoiseError, match=r"no score\.weight in its safetensors files or its adapters"):
        export.run(Config(str(run.folder / "brme"), str(tmp_path / "x"), adapter=True))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_adapters_of_another_trunk_are_refused(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    """After --stage2-trunk the adapters beside the BRME are those of stage 1."""
    from poise.reward import train as train_reward

    run = train_reward.run(
        train_reward.Config(
            str(preferences_file), str(tmp_path / "run"), tiny_model, num_layers=2, trunk="lora", stage2_trunk="lora",
            learning_rate=1e-2, posterior_heads=4, head_steps=40,
        )
    )  # fmt: skip
    with pytest.raises(PoiseError, match=r"would give other rewards than .*without --adapter"):
        export.run(Config(str(run.folder / "brme"), str(tmp_path / "small"), adapter=True))
    assert not (tmp_path / "small").exists()
    export.run(Config(str(run.folder / "brme"), str(tmp_path / "merged"), "mean"))
    export.run(Config(str(run.folder / "single"), str(tmp_path / "single"), adapter=True))


def test_an_export_is_compared_with_its_source(
    llama_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, layout = export.scalar_head(torch.ones(10, 32), HeadLayout(5, "gaussian", (0.0,) * 10), None)
    monkeypatch.setattr(export, "scalar_head", lambda *_: (row, layout))
    with pytest.raises(PoiseError, match="would give other rewards"):
        export.run(Config(str(llama_run / "brme"), str(tmp_path / "rm"), "mean"))
    assert not (tmp_path / "rm").exists()


def test_an_export_has_a_card_of_its_own(llama_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "brme"
    shutil.copytree(llama_run / "brme", source)
    (source / "README.md").write_text("---\nbase_model: user/model\n---\n\n# Ten labels\n")
    text = (export.run(Config(str(source), str(tmp_path / "rm"), "mean", engine="sglang")) / "README.md").read_text()
    assert text.startswith(
        "---\nbase_model: user/model\n---\n\n# Reward model with one label: mean of 5 gaussian heads"
    )
    assert "Ten labels" not in text
    assert "`/classify`" in text
    offset = json.loads((tmp_path / "rm" / "config.json").read_text())["poise"]["offset"][0]
    assert f"{offset:.6g}" in text
    bare = (export.run(Config(str(llama_run), str(tmp_path / "bare"), "head", 1)) / "README.md").read_text()
    assert "library_name: transformers" in bare
    assert "base_model" not in bare
    assert "head 1 of 5 gaussian heads" in bare
    for path in (tmp_path / "bare").iterdir():
        assert path.suffix == ".safetensors" or str(tmp_path.parent) not in path.read_text(), path.name


def test_only_an_earlier_export_is_written_over(llama_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "rm"
    target.mkdir()  # an empty folder holds nothing to lose
    export.run(Config(str(llama_run), str(target), "mean"))
    export.run(Config(str(llama_run), str(target), "head", 0))
    assert json.loads((target / "config.json").read_text())["poise_export"]["head"] == 0
    with pytest.raises(PoiseError, match="is the reward model itself"):
        export.run(Config(str(target), str(target), "mean"))

    other = tmp_path / "brme"
    shutil.copytree(llama_run / "brme", other)
    before = (other / "config.json").read_bytes()
    with pytest.raises(PoiseError, match="no earlier export"):
        export.run(Config(str(target), str(other), "mean"))
    assert (other / "config.json").read_bytes() == before
    trained = tmp_path / "trained-on"  # by another tool: its config.json still says that it was an export
    transformers.AutoModelForSequenceClassification.from_pretrained(target).save_pretrained(trained)
    assert "poise_export" in json.loads((trained / "config.json").read_text())
    with pytest.raises(PoiseError, match="no earlier export"):
        export.run(Config(str(llama_run), str(trained), "mean"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(PoiseError, match="no earlier export"):
        export.run(Config(str(llama_run), str(mine), "mean"))
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(PoiseError, match="is a file"):
        export.run(Config(str(llama_run), str(mine / "thesis.txt"), "mean"))


def test_a_failed_export_leaves_the_old_one(llama_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export.run(Config(str(llama_run), str(tmp_path / "rm"), "mean"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        export.run(Config(str(llama_run), str(folder), "head", 0))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scalar": "nominal"}, "only mean and head are linear"),
        ({"scalar": "worst_case"}, "need all heads"),
        ({"scalar": "head"}, "go together"),
        ({"scalar": "mean", "head": 1}, "go together"),
        ({"scalar": "head", "head": 5}, "has heads 0 to 4"),
        ({"scalar": "head", "head": -1}, "at least 0"),
        ({}, "vLLM serves the checkpoint as it is"),
        ({"adapter": True, "engine": "sglang"}, "do not go together: export the merged weights"),
    ],
)
def test_bad_options_are_refused(llama_run: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PoiseError, match=message):
        export.run(Config(str(llama_run), str(tmp_path / "rm"), **options))
    assert not list(tmp_path.iterdir())


def test_what_is_no_reward_model_of_ours_is_refused(tiny_model: str, llama_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="no heads to export"):
        export.run(Config(tiny_model, str(tmp_path / "rm"), "mean"))
    headless = tmp_path / "headless"
    shutil.copytree(llama_run / "brme", headless)
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(PoiseError, match=r"no score\.weight"):
        export.run(Config(str(headless), str(tmp_path / "rm"), "mean"))


# ---- upload ----


class FakeHub:
    """Records what would be sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"hub:{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(push, "HfApi", lambda: fake)
    monkeypatch.setattr(push, "get_token", lambda: "a token")
    return fake


@pytest.mark.parametrize("name", ["single", "brme", "posterior"])
def test_only_the_checkpoint_is_uploaded(llama_run: Path, name: str, tmp_path: Path, hub: FakeHub) -> None:
    folder = tmp_path / name
    shutil.copytree(llama_run / name, folder)
    expected = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} | {
        "README.md",
        "calibration.png",
    }
    kept_here = ["optimizer.safetensors", "training_args.bin", "preferences.jsonl", "results.json", "checkpoint-5/"]
    for name in ["README.md", "calibration.png", *kept_here]:
        if name.endswith("/"):
            shutil.copytree(llama_run / "brme", folder / name)
        else:
            (folder / name).write_text("x")
    assert push.run(push.Config(str(folder), "user/rm", private=True)) == "hub:user/rm"
    (first, created), (second, uploaded) = hub.calls
    assert (first, second) == ("create_repo", "upload_folder")
    assert created == {"repo_id": "user/rm", "private": True, "exist_ok": False}
    assert (uploaded["repo_id"], Path(uploaded["folder_path"])) == ("user/rm", folder)
    everything = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(everything, allow_patterns=uploaded["allow_patterns"]))  # as the hub client does
    assert sent == expected
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sent


def test_a_run_stands_for_its_brme(llama_run: Path, hub: FakeHub) -> None:
    push.run(push.Config(str(llama_run), "user/rm"))
    assert Path(hub.calls[1][1]["folder_path"]) == llama_run / "brme"
    assert hub.calls[0][1]["private"] is True  # unless asked for
    push.run(push.Config(str(llama_run), "user/rm", private=False, existing=True))
    assert hub.calls[2][1] == {"repo_id": "user/rm", "private": False, "exist_ok": True}


def test_uploads_of_what_is_no_reward_model_are_refused(
    tiny_model: str, llama_run: Path, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (str(tmp_path), tiny_model, "user/somewhere"):
        with pytest.raises(PoiseError, match=r"is not a reward model: no config\.json with a `poise` block"):
            push.run(push.Config(folder, "user/rm"))
    weightless = tmp_path / "weightless"
    shutil.copytree(llama_run / "brme", weightless)
    (weightless / "model.safetensors").unlink()
    with pytest.raises(PoiseError, match=r"no model\.safetensors"):
        push.run(push.Config(str(weightless), "user/rm"))
    with pytest.raises(PoiseError, match="not of the form user/name"):
        push.run(push.Config(str(llama_run), "rm"))
    assert hub.calls == []

    def refused(*_: object, **__: object) -> str:
        raise OSError("403 Forbidden\nand a long story")

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(PoiseError, match="cannot upload to user/rm: 403 Forbidden;") as caught:
        push.run(push.Config(str(llama_run), "user/rm"))
    assert "long story" not in str(caught.value)
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(PoiseError, match="log in with `hf auth login`"):
        push.run(push.Config(str(llama_run), "user/rm"))


def test_an_existing_repository_needs_a_flag(llama_run: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class ConflictError(OSError):
        class response:  # noqa: N801  as in the hub client's errors
            status_code = 409

    def exists(*_: object, **__: object) -> str:
        raise ConflictError("409 Conflict: you already created this model repo")

    monkeypatch.setattr(hub, "create_repo", exists)
    with pytest.raises(PoiseError, match="user/rm exists already; --existing uploads into it"):
        push.run(push.Config(str(llama_run), "user/rm"))


def test_an_upload_carries_no_paths_of_this_machine(
    llama_run: Path, tiny_model: str, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "rm"
    shutil.copytree(llama_run / "brme", folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny_model, "r": 4}))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    texts = {"chat_template": "/set/x/then/y", "note": "/a/b/c\n/d/e/f", "place": "/home/me/rm"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | texts))
    (folder / "README.md").write_text(f"poise score {folder.resolve()} x.jsonl\nand/or <br/> `/v1/classify`\n")
    sent: dict[str, bytes] = {}

    def upload(*, folder_path: Path, allow_patterns: list[str], **_: object) -> None:
        sent.update({name: (Path(folder_path) / name).read_bytes() for name in allow_patterns})

    monkeypatch.setattr(hub, "upload_folder", upload)
    push.run(push.Config(str(folder), "user/rm"))
    assert json.loads(sent["adapter_config.json"]) == {"base_model_name_or_path": Path(tiny_model).name, "r": 4}
    assert json.loads(sent["tokenizer_config.json"]) == tokens | texts | {"place": "rm"}  # no path is a template
    assert sent["README.md"].decode() == "poise score rm x.jsonl\nand/or <br/> `/v1/classify`\n"
    assert not [name for name, content in sent.items() if str(tmp_path).encode() in content]
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert tiny_model in (folder / "adapter_config.json").read_text()  # here it stays usable
    said = capsys.readouterr().err
    assert all(name in said for name in sent)


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(llama_run: Path, tmp_path: Path, hub: FakeHub, name: str) -> None:
    folder, secret = tmp_path / "rm", tmp_path / "secret"
    shutil.copytree(llama_run / "brme", folder)
    (folder / name).touch()
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(PoiseError, match=f"{name} is a symbolic link out of the folder"):
        push.run(push.Config(str(folder), "user/rm"))
    assert hub.calls == []
    if name == "model.safetensors":
        with pytest.raises(PoiseError, match="is a symbolic link out of the folder"):
            export.run(Config(str(folder), str(tmp_path / "output"), "mean"))


def test_the_links_of_the_hubs_cache_are_read(llama_run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--user--rm"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    shutil.copytree(llama_run / "brme", snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert (export.run(Config(str(snapshot), str(tmp_path / "output"), "mean")) / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["../payload.sh", "/tmp/payload.sh", "sub/../../payload.sh", "run.sh", 7, None, ""])
def test_a_weight_map_names_no_file_outside(llama_run: Path, tmp_path: Path, name: object) -> None:
    folder, output = tmp_path / "sub" / "rm", tmp_path / "out" / "rm"
    shutil.copytree(llama_run / "brme", folder)
    (folder.parent / "payload.sh").write_text("evil")
    (folder / "run.sh").write_text("evil")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "payload.sh").write_text("mine")
    with safe_open(folder / "model.safetensors", "pt") as file:
        weight_map: dict[str, object] = dict.fromkeys(file.keys(), "model.safetensors")
    weight_map["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PoiseError, match=r"names") as caught:
        export.run(Config(str(folder), str(output), "mean"))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "payload.sh").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["payload.sh"]
