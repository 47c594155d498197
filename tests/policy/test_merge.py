"""Merging: one plain folder that writes what the adapted model writes, and one line for what cannot be merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import make_model
from poise.cli import main as cli
from poise.models.end_tokens import end_token_ids
from poise.models.loading import load_policy
from poise.models.policy import Policy, Tune
from poise.policy import merge
from poise.policy.merge import Config

TOKENS = torch.tensor([[5, 60, 100, 7, 33, 90, 12], [8, 8, 41, 2, 77, 30, 111]])


def make_policy(model: str, run: Path, tune: Tune = "lora") -> Path:
    """RUN/policy as `train-policy` leaves it, its trained weights moved; returns it."""
    torch.manual_seed(1)
    policy = Policy(*load_policy(model), adapted_layers=2, rank=4, tune=tune)
    for parameter in policy.trained_parameters().values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy.save(str(run / "policy"))
    return run / "policy"


def logits(model: transformers.PreTrainedModel | peft.PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def stock(folder: str | Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_merged_model_writes_as_the_adapted_one(any_model: str, tmp_path: Path) -> None:
    policy = make_policy(any_model, tmp_path / "run")
    folder = merge.run(Config(str(tmp_path / "run"), str(tmp_path / "merged")))
    adapted = logits(peft.PeftModel.from_pretrained(stock(any_model), str(policy)))
    merged = stock(folder)
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-5)
    assert (adapted - logits(stock(any_model))).abs().max() > 0.1  # there was something to fold in

    assert not (folder / "adapter_config.json").exists()
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert str(Path(any_model).parent) not in (folder / "config.json").read_text()
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (policy, folder))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template
    assert after.pad_token_id == merged.config.pad_token_id != after.eos_token_id


def test_the_tokenizer_is_that_of_the_adapters(tiny_model: str, tmp_path: Path) -> None:
    """They may have been trained with a chat template that the base model does not have."""
    policy = make_policy(tiny_model, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(policy)
    folder = merge.run(Config(str(policy), str(tmp_path / "merged")))
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_the_merged_model_ends_where_the_policy_does(tiny_model: str, tmp_path: Path) -> None:
    """The token that ends a turn need not be among those that the base model's generation config lists."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    model, (end,) = stock(tiny_model), end_token_ids(*load_policy(tiny_model))
    model.generation_config.eos_token_id = end + 1
    model.save_pretrained(base)
    folder = merge.run(Config(str(make_policy(str(base), tmp_path / "run")), str(tmp_path / "merged")))
    assert stock(folder).generation_config.eos_token_id == [end, end + 1]


def test_adapters_need_not_say_for_what_task_they_are(tiny_model: str, tmp_path: Path) -> None:
    """peft asks nobody for a task_type, and many scripts give none."""
    adapted = peft.get_peft_model(stock(tiny_model), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        parameter.data += "lora_B" in name
    adapted.save_pretrained(tmp_path / "adapters")
    folder = merge.run(Config(str(tmp_path / "adapters"), str(tmp_path / "merged")))
    torch.testing.assert_close(logits(stock(folder)), logits(adapted), rtol=0, atol=1e-5)
    model, tokenizer = merge.unfolded(tmp_path / "adapters")  # with them lies no tokenizer either
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-5)
    assert tokenizer.get_vocab() == load_policy(tiny_model)[1].get_vocab()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # that it saves them, and that layers are tied
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": {"embed_tokens": [-2, -1]}}],
    ids=["beside", "in modules", "in rows"],
)
def test_adapters_may_bring_rows_for_tokens_that_were_added(
    tiny_model: str, tmp_path: Path, how: dict[str, Any], tied: bool
) -> None:
    """Scripts give the base model tokens for a chat template, and peft saves the grown embeddings with the adapters."""
    base, adapters = str(tmp_path / "base"), tmp_path / "adapters"
    shutil.copytree(tiny_model, base)
    model, tokenizer = stock(base), transformers.AutoTokenizer.from_pretrained(base)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(base)
    tokenizer.add_tokens(["<think>", "</think>"])
    model = stock(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if "trainable_token_indices" in how:
        how = {"trainable_token_indices": {"embed_tokens": [len(tokenizer) - 2, len(tokenizer) - 1]}}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **how))
    for name, parameter in adapted.named_parameters():
        parameter.data += 0.1 * ("lora_B" in name)
    adapted.save_pretrained(adapters)
    tokenizer.save_pretrained(adapters)
    merged = stock(merge.run(Config(str(adapters), str(tmp_path / "merged"))))
    ids = torch.tensor([[5, len(tokenizer) - 1, 60, len(tokenizer) - 2]])
    with torch.no_grad():
        wanted = adapted.eval()(ids).logits
        for found in (merged, merge.unfolded(adapters)[0]):
            torch.testing.assert_close(found(ids).logits, wanted, rtol=0, atol=1e-5)


def test_a_weight_is_rounded_once(tiny_model: str, tmp_path: Path) -> None:
    """bfloat16 stays bfloat16, and W + (alpha / r) B A is summed before it is rounded; alpha is 2 r."""
    base = tmp_path / "half"
    shutil.copytree(tiny_model, base)
    stock(tiny_model).bfloat16().save_pretrained(base)
    policy = make_policy(str(base), tmp_path / "run")
    folder = merge.run(Config(str(policy), str(tmp_path / "merged")))  # the policy folder itself is as good
    adapters, merged = load_file(policy / "adapter_model.safetensors"), load_file(folder / "model.safetensors")
    before, name = load_file(base / "model.safetensors"), "model.layers.2.mlp.up_proj"
    a, b = (adapters[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    expected = (before[f"{name}.weight"].float() + 2.0 * b @ a).bfloat16()
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=0)
    untouched = "model.layers.0.mlp.up_proj.weight"  # below the adapted layers
    assert torch.equal(merged[untouched], before[untouched])


@pytest.mark.parametrize(("size", "said"), [(1e-4, True), (0.1, False), (0.0, False)])
def test_changes_that_rounding_takes_are_said(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: float, said: bool
) -> None:
    """What RL changes in a weight is often less than the distance of two numbers in bfloat16."""
    base = tmp_path / "half"
    shutil.copytree(tiny_model, base)
    stock(tiny_model).bfloat16().save_pretrained(base)
    policy = Policy(*load_policy(str(base)), adapted_layers=2, rank=4)
    for name, parameter in policy.trained_parameters().items():
        parameter.data += (
            size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * ("lora_B" in name)
        )
    policy.save(str(tmp_path / "policy"))
    capsys.readouterr()
    folder = merge.run(Config(str(tmp_path / "policy"), str(tmp_path / "merged")))
    line = capsys.readouterr().err
    assert ("rounded to bfloat16" in line) is said
    if said:
        start, merged = (logits(stock(place).float()) for place in (base, folder))
        wanted = logits(peft.PeftModel.from_pretrained(stock(base).float(), str(tmp_path / "policy")))
        assert (merged - wanted).norm() > 0.1 * (wanted - start).norm()


def test_a_policy_without_adapters_is_copied(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy(tiny_model, tmp_path / "run", tune="full")
    folder = merge.run(Config(str(tmp_path / "run"), str(tmp_path / "merged")))
    assert "is a whole model, there is nothing to fold: copied to" in " ".join(capsys.readouterr().err.split())
    copied, original = ({p.name: p.read_bytes() for p in path.iterdir()} for path in (folder, policy))
    assert copied == original
    assert "model.safetensors" in copied
    assert torch.equal(logits(stock(folder)), logits(stock(policy)))


def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target, run = tmp_path / "out" / "merged", tmp_path / "run"

    def said(path: Path = run, output: Path = target) -> str:
        assert cli.main(["merge", str(path), "--output", str(output)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))
        return lines[0]

    assert "holds no policy; name a finished `poise train-policy` run" in said(tmp_path / "nowhere")
    policy = make_policy(tiny_model, run)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "taken exists; choose another folder" in said(output=tmp_path / "taken")
    assert "file exists; choose another folder" in said(output=tmp_path / "taken" / "file")

    settings = json.loads((policy / "adapter_config.json").read_text())

    def rewrite(**changes: object) -> None:
        (policy / "adapter_config.json").write_text(json.dumps(settings | changes))

    rewrite(base_model_name_or_path=str(tmp_path / "gone"))
    assert "no base model of " in (line := said())
    assert line.endswith(f"write where it is into {policy / 'adapter_config.json'}")
    rewrite(base_model_name_or_path=None)
    assert "no base model" in said()
    other = make_model(tmp_path / "other", "gpt2")  # has no such layers
    capsys.readouterr()
    rewrite(base_model_name_or_path=other)
    assert f"cannot fold {policy} into" in said()
    rewrite(task_type="SEQ_CLS")
    assert "reward models are for `poise export`" in said()
    (policy / "adapter_config.json").write_text("{")
    assert "is not JSON" in said()

    rewrite()
    weights = (policy / "adapter_model.safetensors").read_bytes()
    (policy / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert f"cannot fold {policy} into" in said()
    (policy / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in said()
