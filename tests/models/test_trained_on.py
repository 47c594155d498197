"""Adapters are put on the weights that they were trained on, and on no others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from conftest import make_model
from poise.cli import chat
from poise.errors import PoiseError
from poise.models.loading import load_adapters, load_policy
from poise.models.policy import Policy
from poise.models.reward_model import load_trunk
from poise.models.trained_on import FILE, check_base, digest, remember, write_base
from poise.policy import merge
from poise.policy.config import MergeConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in `base`, and in `policy` adapters that were trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    policy = Policy(*load_policy(make_model(folder / "base")), adapted_layers=2, rank=2)
    for parameter in policy.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save(str(folder / "policy"))
    return folder


def other_weights(base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(base)


def other_type(base: Path) -> None:
    settings = json.loads((base / "config.json").read_text()) | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_weights, "were trained on other weights than .*delete base.json"),
        (other_type, "of type llama, and .* mistral"),
    ],
)
def test_a_base_that_became_another_model_is_one_line(
    trained: Path, change: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    """Of equal shapes, so that nothing else would tell."""
    for part in ("base", "policy"):
        shutil.copytree(trained / part, tmp_path / part)
    settings = tmp_path / "policy" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(trained / "base"), str(tmp_path / "base")))
    change(tmp_path / "base")
    for use in (
        lambda: merge.run(MergeConfig(str(tmp_path / "policy"), str(tmp_path / "merged"))),
        lambda: chat.Talker(chat.Config(str(tmp_path / "policy"))),
        lambda: Policy(*load_policy(str(tmp_path / "base")), adapted_layers=2, rank=2).load_adapters(
            str(tmp_path / "policy")
        ),
    ):
        with pytest.raises(PoiseError, match=why) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "policy" / FILE).unlink()  # as adapters of other tools are
    merge.run(MergeConfig(str(tmp_path / "policy"), str(tmp_path / "merged")))


def test_in_any_precision_the_weights_are_the_same(trained: Path, tmp_path: Path) -> None:
    base = str(trained / "base")
    model, _ = load_policy(base)
    classifier, _ = load_trunk(base, 0)
    found = digest(model)
    assert found == model.poise_weights == digest(classifier) == digest(model.bfloat16()) == digest(model.float())
    assert found != digest(load_trunk(base, 2)[0])
    assert found != digest(load_policy(make_model(tmp_path / "gpt2", "gpt2"))[0])


def test_a_number_in_any_column_counts(trained: Path) -> None:
    model, _ = load_policy(str(trained / "base"))
    weight, found = model.model.layers[0].mlp.up_proj.weight.data, set()
    for column in range(weight.shape[1]):
        weight[:, column] += 1.0
        found.add(digest(model))
    assert len(found) == weight.shape[1]


def test_adapters_of_a_classifier_say_it_too(trained: Path, tmp_path: Path) -> None:
    classifier, _ = load_trunk(str(trained / "base"), 2)
    remember(classifier)
    write_base(classifier, tmp_path)
    check_base(load_trunk(str(trained / "base"), 2)[0], tmp_path)
    with pytest.raises(PoiseError, match="were trained on other weights"):
        check_base(load_trunk(str(trained / "base"), 3)[0], tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(PoiseError, match=r"base\.json"):
        check_base(classifier, tmp_path)


def test_a_policy_goes_on_from_its_own_adapters(trained: Path) -> None:
    model, _ = load_policy(str(trained / "base"))
    plain = load_adapters(load_policy(str(trained / "base"))[0], str(trained / "policy"))
    policy = Policy(model, load_policy(str(trained / "base"))[1], adapted_layers=2, rank=2)
    policy.load_adapters(str(trained / "policy"))
    del policy._base.poise_weights  # a model that load_policy did not load
    policy.load_adapters(str(trained / "policy"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, plain(ids).logits, rtol=0, atol=1e-6)
