"""Adapters for each head: what PEFT computes, all heads in one pass, whatever a text is read beside."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import make_model, rest_slow
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models import head_adapters
from poise.models.head_adapters import (
    FOLDER,
    HeadLinear,
    add_head_adapters,
    apart,
    fold_head,
    logits_of,
    num_adapted_heads,
    together,
)
from poise.models.head_kinds import same_trunk
from poise.models.reward_model import HeadLayout, heads_fingerprint, load_reward_model, load_trunk, save_reward_model
from poise.models.scorer import Ensemble, Scorer
from poise.models.shared_prompt import Family, pack, packed_hidden
from poise.runtime.quiet import quiet_loading

HEADS = 3
TEXTS = [Sample("Review a film.", text) for text in ("good", "a bad film, really", "it")] + [
    Sample("Which one?", "the film"),
    Sample("Review a phone that is very long, longer than the film.", "fine"),
]


def adapted(model: str, layers: int = 2) -> tuple[Any, Any]:
    """A classifier whose adapters are not zero, and its tokenizer."""
    classifier, tokenizer = load_trunk(model, 0)
    torch.manual_seed(1)
    add_head_adapters(classifier, HEADS, 4, layers)
    for module in classifier.modules():
        if isinstance(module, HeadLinear):
            torch.nn.init.normal_(module.up_KOR, std=0.3)
    return classifier, tokenizer


def saved(folder: Path, model: str) -> str:
    """A checkpoint of three Gaussian heads with adapters on the upper two layers."""
    classifier, tokenizer = adapted(model)
    weight = torch.randn(2 * HEADS, 32, generator=torch.Generator().manual_seed(2))
    layout = HeadLayout(HEADS, "gaussian", (0.5, -1.0, 0.0, 0.1, 0.2, 0.3), adapters=True)
    save_reward_model(folder, classifier, tokenizer, apart(weight, HEADS), layout)
    return str(folder)


@pytest.mark.parametrize("family", rest_slow(["llama", "gpt2", "qwen3", "gemma2"]))
def test_each_head_says_what_peft_says_with_its_adapter(family: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "rm", make_model(tmp_path / "model", family))
    scorer = Scorer.load(path)
    layout, found = scorer.layout, scorer(TEXTS)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    for head in range(HEADS):
        model = peft.PeftModel.from_pretrained(copy.deepcopy(stock), f"{path}/{FOLDER}/head_{head}").eval()
        for i, sample in enumerate(TEXTS):
            prompt, completion = scorer.extract.encode(sample)
            with torch.no_grad():
                told = layout.decode(model(torch.tensor([[*prompt, *completion]])).logits[0])
                plain = layout.decode(stock.eval()(torch.tensor([[*prompt, *completion]])).logits[0])
            torch.testing.assert_close(found.mean[i, head], told.mean[head], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.std[i, head], told.std[head], rtol=1e-5, atol=1e-5)
            assert abs(plain.mean[head] - told.mean[head]) > 1e-3


@pytest.mark.parametrize("family", rest_slow(["llama", "gpt2", "gemma2"]))
def test_a_text_scores_alone_as_in_a_batch_and_beside_its_siblings(family: str, tmp_path: Path) -> None:
    scorer = Scorer.load(saved(tmp_path / "rm", make_model(tmp_path / "model", family)))
    alone = torch.cat([scorer.extract([sample]) for sample in TEXTS])
    assert alone.shape == (len(TEXTS), HEADS * 32)
    torch.testing.assert_close(scorer.extract(TEXTS), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scorer.extract(TEXTS[:2]), alone[:2], rtol=1e-5, atol=1e-5)


def test_layers_below_the_adapters_are_run_once(tiny_model: str) -> None:
    classifier, _ = adapted(tiny_model, layers=1)
    rows: list[int] = []
    for layer in classifier.base_model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    hidden = packed_hidden(classifier, pack([Family([5, 6], [[7], [8, 9]]), Family([4], [[3]])], 0, one_per_row=True))
    assert hidden.shape == (3, HEADS * 32)
    assert rows == [2, 2, 2 * HEADS]


def test_new_adapters_change_nothing_and_are_all_that_learns(tiny_model: str) -> None:
    plain, _ = load_trunk(tiny_model, 0)
    rows = pack([Family([5, 6], [[7], [8, 9]])], 0)
    before = packed_hidden(plain, rows)
    add_head_adapters(plain, HEADS, 4)
    torch.testing.assert_close(packed_hidden(plain, rows), before.repeat(1, HEADS), rtol=1e-5, atol=1e-5)
    learns = {name.rpartition(".")[2] for name, one in plain.named_parameters() if one.requires_grad}
    assert learns == {"down_KRI", "up_KOR", "weight"}
    assert [name for name, one in plain.named_parameters() if one.requires_grad and name.endswith("weight")] == [
        "score.weight"
    ]


def test_gradients_of_heads_together_are_those_of_each_head_alone(tiny_model: str) -> None:
    """The loss of each head is on texts of its own; another head's texts leave its adapter alone."""
    classifier, _ = adapted(tiny_model)
    classifier.score.weight = torch.nn.Parameter(torch.randn(HEADS, 32))
    families = [Family([5, 6], [[7], [8, 9]]), Family([4], [[3], [2, 1]]), Family([9, 9], [[1], [6]])]

    def gradients(texts: list[Family], mask: torch.Tensor) -> list[torch.Tensor]:
        classifier.zero_grad()
        logits = logits_of(classifier, packed_hidden(classifier, pack(texts, 0)))
        (logits.unflatten(0, (-1, 2)).diff(dim=1).squeeze(1).sigmoid() * mask).sum().backward()
        return [one.grad.clone() for one in classifier.parameters() if one.requires_grad]

    together_ = gradients(families, torch.eye(HEADS))
    for head in range(HEADS):
        alone = gradients([families[head]], torch.eye(HEADS)[[head]])
        for one, other in zip(together_, alone, strict=True):
            torch.testing.assert_close(one[head], other[head], rtol=1e-5, atol=1e-5)
            assert one[head].abs().max() > 0
            assert all(other[k].abs().max() == 0 for k in range(HEADS) if k != head)


def test_weights_apart_read_each_heads_own_features() -> None:
    weight = torch.randn(4, 5)
    hidden = torch.randn(7, 2, 5)
    logits = hidden.flatten(1) @ apart(weight, 2).T
    for label in range(4):
        torch.testing.assert_close(logits[:, label], hidden[:, label % 2] @ weight[label])
    assert torch.equal(together(apart(weight, 2), 2), weight)


@pytest.mark.parametrize("family", rest_slow(["llama", "gpt2"]))
def test_a_folded_head_is_a_stock_classifier(family: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "rm", make_model(tmp_path / "model", family))
    scorer = Scorer.load(path)
    classifier, _, layout = load_reward_model(path)
    fold_head(classifier, 1)
    assert num_adapted_heads(classifier) == 0
    assert not any(isinstance(module, HeadLinear) for module in classifier.modules())
    prompt, completion = scorer.extract.encode(TEXTS[1])
    with torch.no_grad():
        told = layout.decode(classifier(torch.tensor([[*prompt, *completion]])).logits[0])
    torch.testing.assert_close(told.mean[1], scorer(TEXTS[1:2]).mean[0, 1], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_knows_its_adapters(tiny_model: str, tmp_path: Path) -> None:
    """Another adapter is another reward model: to caches, to servers, and to what shares a trunk."""
    one, other = (Path(saved(tmp_path / name, tiny_model)) for name in ("one", "other"))
    assert heads_fingerprint(str(one)) == heads_fingerprint(str(other))
    file = other / FOLDER / "head_2" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, name: tensors[name] + 1}, file)
    assert heads_fingerprint(str(one)) != heads_fingerprint(str(other))
    assert not same_trunk(one, other)
    assert not Scorer.load(str(one)).shares_trunk_with(Scorer.load(str(other)))
    for folder in (one, other):
        shutil.rmtree(folder / FOLDER)
    weights = load_file(other / "model.safetensors")
    assert same_trunk(one, one)
    save_file({name: t for name, t in weights.items() if "norm" not in name}, other / "model.safetensors")
    assert not same_trunk(one, other)  # a weight less


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors")


def _with_another(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.more.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[min(tensors)] += torch.inf
    save_file(tensors, folder / "adapter_model.safetensors")


def _of_another_scale(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 99}))


def _of_other_maps(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = settings["target_modules"][1:]
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_tensor, "it lacks base_model.model.model.layers.1"),
        (_with_another, "it is of other layers; it holds base_model.model.more"),
        (_not_finite, "is not finite"),
        (_of_another_scale, "is not of plain LoRA with lora_alpha twice r"),
        (_of_other_maps, "not all are of the same maps"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    ],
)  # fmt: skip
def test_wrong_adapters_are_one_line(damage: Any, message: str, tiny_model: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "rm", tiny_model)
    damage(Path(path) / FOLDER / "head_1")
    with pytest.raises(PoiseError, match=message) as error:
        Scorer.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["no copies", "rows on the second axis"])
def test_a_family_that_cannot_read_copies_is_refused(
    fault: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no copies":
        monkeypatch.setattr(head_adapters, "_spread", lambda *given: given[3:])
    else:
        forward = HeadLinear.forward
        monkeypatch.setattr(
            HeadLinear, "forward", lambda self, x: forward(self, x.transpose(0, 1).contiguous()).transpose(0, 1)
        )
    classifier, _ = load_trunk(tiny_model, 0)
    with pytest.raises(PoiseError, match="a llama cannot carry an adapter for each head"):
        add_head_adapters(classifier, HEADS, 4)


def test_recomputing_activations_changes_no_gradient(tiny_model: str) -> None:
    classifier, _ = adapted(tiny_model)
    classifier.score.weight = torch.nn.Parameter(torch.randn(HEADS, 32))
    rows = pack([Family([5, 6], [[7], [8, 9]]), Family([4], [[3], [2, 1]])], 0)

    def gradients() -> list[torch.Tensor]:
        classifier.zero_grad()
        logits_of(classifier, packed_hidden(classifier, rows)).square().sum().backward()
        return [one.grad.clone() for one in classifier.parameters() if one.requires_grad]

    plain = gradients()
    with quiet_loading():
        classifier.gradient_checkpointing_enable({"use_reentrant": False})
    classifier.train()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_ensemble_takes_them_as_members(tiny_model: str, tmp_path: Path) -> None:
    paths = [saved(tmp_path / "one", tiny_model), saved(tmp_path / "two", tiny_model)]
    together_ = Ensemble.fit(paths, TEXTS)
    alone = Scorer.load(paths[0])(TEXTS).mean
    found = together_(TEXTS).mean
    assert found.shape == (len(TEXTS), 2 * HEADS)
    scaled = (alone - together_.means[0]) / together_.stds[0]
    torch.testing.assert_close(found[:, :HEADS], scaled, rtol=1e-5, atol=1e-5)
