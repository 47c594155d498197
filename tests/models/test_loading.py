"""Loading: every weight comes from the checkpoint, or one line says which does not."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import make_model, make_tokenizer, save_model
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models import loading, reward_model
from poise.models.context import room_or_raise, steady_context_length
from poise.models.loading import load_policy, load_tokenizer, resolve_model
from poise.models.model_folder import check_model, check_precision
from poise.models.padding import pad_apart
from poise.models.policy import Policy
from poise.models.reward_model import HeadLayout, load_reward_model, load_trunk, save_reward_model
from poise.models.scorer import Scorer
from poise.policy.merge import folded

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], Tensors]
WEIGHTS = "model.safetensors"


def damaged(source: Path, target: Path, damage: Damage, file: str = WEIGHTS) -> str:
    """A copy of a folder whose weights went through `damage`."""
    shutil.copytree(source, target)
    save_file(damage(load_file(target / file)), target / file, {"format": "pt"})
    return str(target)


def without(part: str) -> Damage:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def renamed(rename: Callable[[str], str]) -> Damage:
    return lambda tensors: {rename(name): value for name, value in tensors.items()}


def cut(part: str) -> Damage:
    return lambda tensors: {n: v[:-1].contiguous() if part in n else v for n, v in tensors.items()}


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no embeddings": (without("embed_tokens"), "lack .*embed_tokens"),
    "no first layer": (without("layers.0."), r"lack .*layers\.0\."),
    "one tensor missing": (without("layers.1.mlp.up_proj"), r"lack .*layers\.1\.mlp\.up_proj\.weight$"),
    "no last norm": (without("model.norm"), r"lack .*model\.norm\.weight$"),
    "module.": (renamed(lambda name: f"module.{name}"), r"lack .*it holds module\."),
    "base_model.model.": (renamed(lambda name: f"base_model.model.{name}"), r"lack .*it holds base_model\.model\."),
    "model.language_model.": (
        renamed(lambda name: name.replace("model.", "model.language_model.", 1)),
        r"lack .*it holds model\.language_model\.",
    ),
    "another shape": (cut("layers.0.self_attn.k_proj"), r"k_proj\.weight has the shape"),
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3: its output layer is a weight of its own."""
    return Path(make_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3"))


@pytest.fixture(scope="module")
def classifier(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_weights_that_did_not_load_are_one_line(
    language_model: Path, classifier: Path, tmp_path: Path, name: str
) -> None:
    damage, line = DAMAGES[name]
    lm = damaged(language_model, tmp_path / "lm", damage)
    rm = damaged(classifier, tmp_path / "rm", damage)
    for load in (
        lambda: load_policy(lm),
        lambda: load_trunk(lm, 2),
        lambda: load_trunk(lm, 0),
        lambda: load_reward_model(rm),
        lambda: load_trunk(rm, 2),
        lambda: folded(lm, tmp_path),
    ):
        with pytest.raises(PoiseError, match=line) as error:
            load()
        assert "\n" not in str(error.value)


def test_a_head_may_be_fresh_in_a_trunk_and_nowhere_else(
    language_model: Path, classifier: Path, tmp_path: Path
) -> None:
    headless = damaged(classifier, tmp_path / "rm", without("score"))
    with pytest.raises(PoiseError, match=r"lack score\.weight$"):
        load_reward_model(headless)
    load_trunk(headless, 2)
    with pytest.raises(PoiseError, match=r"lack lm_head\.weight$"):
        load_policy(damaged(language_model, tmp_path / "lm", without("lm_head")))


def test_a_language_model_that_says_it_has_one_label_is_no_reward_model(language_model: Path, tmp_path: Path) -> None:
    shutil.copytree(language_model, tmp_path / "x")
    config = transformers.AutoConfig.from_pretrained(language_model)
    config.num_labels = 1
    config.save_pretrained(tmp_path / "x")
    with pytest.raises(PoiseError, match=r"lack score\.weight$"):
        load_reward_model(str(tmp_path / "x"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(classifier: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["score.weight"][0, 3] = value
        return tensors

    with pytest.raises(PoiseError, match="not finite"):
        load_reward_model(damaged(classifier, tmp_path / "x", spoil))


def test_tensors_without_a_place_are_named(
    language_model: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(tensors: Tensors) -> Tensors:
        return {**tensors, "value_head.weight": torch.ones(2)}

    load_policy(damaged(language_model, tmp_path / "lm", add))
    assert "value_head.weight" in capsys.readouterr().err
    load_reward_model(damaged(classifier, tmp_path / "rm", add))
    assert "value_head.weight" in capsys.readouterr().err


def test_what_is_left_out_on_purpose_is_not_named(
    language_model: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The upper layers and the output layer of the language model, and the zero bias of an export for SGLang."""
    load_trunk(str(language_model), 2)
    load_reward_model(damaged(classifier, tmp_path / "x", lambda t: {**t, "score.bias": torch.zeros(1)}))
    assert "not read" not in capsys.readouterr().err


def test_a_bias_of_the_head_that_is_not_read_is_named(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_reward_model(damaged(classifier, tmp_path / "x", lambda t: {**t, "score.bias": torch.ones(1)}))
    assert "score.bias" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_of_any_precision_are_no_quantized_ones(classifier: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """F64 is no kind of F6."""
    sample = Sample("Is tea hot?", "Mostly.")
    expected = Scorer.load(str(classifier))([sample]).mean
    rm = damaged(classifier, tmp_path / "rm", lambda tensors: {n: v.to(dtype) for n, v in tensors.items()})
    torch.testing.assert_close(Scorer.load(rm)([sample]).mean, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0", "I8", "U4"])
def test_kinds_of_few_bits_are_known_by_their_names(tmp_path: Path, kind: str) -> None:
    header = json.dumps({"a.weight": {"dtype": kind, "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PoiseError, match=f"a.weight is quantized .{kind}."):
        check_precision(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_that_nothing_says_how_to_read_are_one_line(
    language_model: Path, classifier: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """transformers would take the numbers as they are, without their scales."""

    def quantized(tensors: Tensors) -> Tensors:
        return {n: (20 * v).to(dtype) if "up_proj" in n else v for n, v in tensors.items()}

    lm = damaged(language_model, tmp_path / "lm", quantized)
    rm = damaged(classifier, tmp_path / "rm", quantized)
    for load in (
        lambda: load_policy(lm),
        lambda: load_trunk(lm, 2),
        lambda: load_reward_model(rm),
        lambda: check_model(lm),
    ):
        with pytest.raises(PoiseError, match=r"up_proj\.weight is quantized \((I8|F8_E4M3)\), and config\.json has no"):
            load()


# ---- padding ----


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def test_padding_that_the_model_does_not_embed_is_replaced(language_model: Path, tmp_path: Path) -> None:
    """[PAD] was added to the tokenizer, and the embeddings stayed as they were."""
    shutil.copytree(language_model, tmp_path / "x")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "x")
    model, found = load_policy(str(tmp_path / "x"))
    assert found.pad_token_id == model.config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) - 1


def test_a_config_whose_padding_is_no_token_is_loaded(language_model: Path, classifier: Path, tmp_path: Path) -> None:
    for name, source in (("lm", language_model), ("rm", classifier)):
        shutil.copytree(source, tmp_path / name)
        edit_json(tmp_path / name / "config.json", pad_token_id=999)
    assert load_policy(str(tmp_path / "lm"))[0].config.pad_token_id == 0
    assert load_reward_model(str(tmp_path / "rm"))[0].config.pad_token_id == 0


@pytest.mark.parametrize(
    "said",
    [
        {"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "flex_attention"},
        {"attn_implementation": "paged|eager"}, {"return_dict": False},
        {"output_attentions": True, "output_hidden_states": True},
    ],
    ids=lambda said: ", ".join(f"{name} {value}" for name, value in said.items()),
)  # fmt: skip
def test_how_a_model_was_run_elsewhere_does_not_decide_how_it_is_run_here(
    language_model: Path, classifier: Path, tmp_path: Path, said: dict[str, Any]
) -> None:
    """Kernels that are not installed, or take no mask for each token; tuples; what a forward pass returns beside."""
    samples = [Sample("Is tea hot?", "Mostly."), Sample("Is tea hot?", "Blue, I think."), Sample("Why?", "So.")]
    expected = Scorer.load(str(classifier))(samples).mean
    for name, source in (("lm", language_model), ("rm", classifier)):
        shutil.copytree(source, tmp_path / name)
        edit_json(tmp_path / name / "config.json", **said)
    torch.testing.assert_close(Scorer.load(str(tmp_path / "rm"))(samples).mean, expected)
    trunk, tokenizer = load_trunk(str(tmp_path / "lm"), 2)
    save_reward_model(tmp_path / "made", trunk, tokenizer, torch.ones(1, 32), HeadLayout(1, "point", (0.0,)))
    assert Scorer.load(str(tmp_path / "made"))(samples).mean.isfinite().all()
    assert load_policy(str(tmp_path / "lm"))[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eos_token_id": "2"}, "'eos_token_id' with value '2' doesn't match any type"),
        ({"bos_token_id": [1]}, "'bos_token_id' with value .1. doesn't match any type"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_a_value_that_no_config_has_is_one_line(
    language_model: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    path = shutil.copytree(language_model, tmp_path / "model") / "config.json"
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}  # checks its sizes itself
    path.write_text(json.dumps(json.loads(path.read_text()) | kind | wrong))
    with pytest.raises(PoiseError, match=f"^cannot read {path}: .*{said}") as caught:
        load_policy(str(path.parent))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps.* got str"),
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers.* must be equal to the number of .layer_types"),
        ({"hidden_act": "foo"}, "nothing is called 'foo'"),
        ({"dtype": "auto"}, "no attribute 'auto'"),
    ],
)
def test_settings_of_a_model_that_cannot_be_are_one_line_with_their_reason(
    classifier: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    """Some readers say in a second line what is wrong, and some raise what is no ValueError."""
    shutil.copytree(classifier, tmp_path / "x")
    edit_json(tmp_path / "x" / "config.json", **wrong)
    with pytest.raises(PoiseError, match=f"^cannot (read|load) {tmp_path / 'x'}.*{said}"):
        load_reward_model(str(tmp_path / "x"))


def test_padding_is_not_the_end_that_the_template_writes(language_model: Path, tmp_path: Path) -> None:
    """A fresh head would read its score before the end of turn."""
    shutil.copytree(language_model, tmp_path / "x")
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "x")
    assert load_trunk(str(tmp_path / "x"), 2)[1].pad_token == "<|endoftext|>"


def test_a_tokenizer_of_sentencepiece_alone_names_what_it_needs(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers asks for tiktoken then, which would not read it, in seven lines."""
    shutil.copytree(language_model, tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").unlink()
    (tmp_path / "x" / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>\x18\x02")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "sentencepiece" else find(name, *of)
    )
    with pytest.raises(PoiseError, match=r"needs packages: pip install sentencepiece protobuf$"):
        load_policy(str(tmp_path / "x"))
    assert not capfd.readouterr().err


def test_the_one_token_without_a_row_of_its_own_may_be_the_padding() -> None:
    """Nothing else in the vocabulary could pad, so the embeddings get a row for it, which no text reads."""
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.bos_token = "<|endoftext|>"
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=rows
        )
    )
    pad_apart(tokenizer, model)
    assert tokenizer.pad_token == "[PAD]"
    assert model.config.pad_token_id == rows == model.get_input_embeddings().num_embeddings - 1


def test_a_tokenizer_of_another_model_cannot_be_padded() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.unk_token = "<|endoftext|>"  # nothing is left to pad with
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small, large = (
        transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**settings, vocab_size=len(tokenizer) + n)
        )
        for n in (-1, 1)
    )
    with pytest.raises(
        PoiseError, match=r"its 259 tokens are more than the 258 of the model; tokenizer and model are of"
    ):
        pad_apart(tokenizer, small)
    pad_apart(tokenizer, large)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 259)
    assert large.config.pad_token_id == 259
    assert large.get_input_embeddings().num_embeddings == 260  # there was a row for it


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("requires you to execute custom code; set the option", r"has code of its own, which Poise never runs$"),
        ("vocab is broken\nat line 3", r"no usable tokenizer in x: vocab is broken$"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(message: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refused)
    with pytest.raises(PoiseError, match=said):
        load_tokenizer("x")


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("tokenizer_config.json", {"pad_token": {"content": "<|endoftext|>"}}, "pad_token has to be either str"),
        ("tokenizer.json", {"model": {"type": "Newer"}}, "data did not match any variant of untagged enum"),
        ("tokenizer.json", {"added_tokens": 5}, "no usable tokenizer"),
    ],
)
def test_files_of_a_tokenizer_that_say_what_cannot_be_are_one_line(
    language_model: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    """Whatever the reader raises, the line names the folder."""
    shutil.copytree(language_model, tmp_path / "x")
    edit_json(tmp_path / "x" / file, **changes)
    with pytest.raises(PoiseError, match=f"no usable tokenizer in {tmp_path / 'x'}: .*") as caught:
        load_tokenizer(str(tmp_path / "x"))
    assert said in str(caught.value)


@pytest.mark.slow  # transformers imports every configuration for its message
def test_a_model_of_another_kind_is_named_by_its_type(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PoiseError, match=r"cannot load .* as a language model: transformers has none of the type vit$"):
        load_policy(str(tmp_path))


def test_a_model_comes_from_its_folder_the_hub_or_the_package(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default one from what was converted before, rather than from the network."""
    found: dict[bool, str | None] = {True: None, False: None}
    asked: list[bool] = []

    def snapshot(_: str, *, local_only: bool) -> str | None:
        asked.append(local_only)
        return found[local_only]

    monkeypatch.setattr(loading, "_hub_snapshot", snapshot)
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    assert resolve_model(tiny_model) == tiny_model
    assert asked == []
    with pytest.raises(PoiseError, match="model 'org/m' is neither a local folder nor reachable on the model hub"):
        resolve_model("org/m")
    found[False] = "from the network"
    assert resolve_model("org/m") == resolve_model(loading.DEFAULT_MODEL) == "from the network"
    converted = tmp_path / loading._CONVERTED
    converted.mkdir(parents=True)
    assert resolve_model(loading.DEFAULT_MODEL) == str(converted)
    found[True] = "from the cache"
    assert resolve_model("org/m") == resolve_model(loading.DEFAULT_MODEL) == "from the cache"


@pytest.mark.parametrize(
    ("text", "why"), [("{broken", "is not JSON"), ('{"eos_token_id": [2, "<|im_end|>"]}', "must be a token's number")]
)
def test_a_damaged_generation_config_is_one_line(language_model: Path, tmp_path: Path, text: str, why: str) -> None:
    """transformers would pass over it, and over the end tokens that it names."""
    shutil.copytree(language_model, tmp_path / "x")
    (tmp_path / "x" / "generation_config.json").write_text(text)
    with pytest.raises(PoiseError, match=why):
        check_model(str(tmp_path / "x"))


def test_every_family_loads_without_a_word(any_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tied output layers and buffers that are not saved are not missing."""
    load_policy(any_model)
    load_trunk(any_model, 2)
    load_trunk(any_model, 0)
    assert "not read" not in capsys.readouterr().err


def test_code_of_a_checkpoint_is_not_run(language_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(language_model, folder)
    text = (folder / "config.json").read_text().replace('"model_type": "qwen3"', '"model_type": "of_its_own"')
    start = text.index("{") + 1
    (folder / "config.json").write_text(f'{text[:start]}"auto_map": {{"AutoConfig": "code.Config"}},{text[start:]}')
    (folder / "code.py").write_text("raise SystemExit('was run')")
    for load in (load_policy, load_reward_model, lambda path: load_trunk(path, 2)):
        with pytest.raises(PoiseError, match=r"cannot read|no usable tokenizer|never runs"):
            load(str(folder))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Phi-3 classifier whose rotary positions change beyond 64 of its 256 tokens."""
    folder = tmp_path_factory.mktemp("models") / "phi3"
    tokenizer = make_tokenizer()
    config = transformers.Phi3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=1,
        max_position_embeddings=256, original_max_position_embeddings=64, sliding_window=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    return save_model(transformers.AutoModelForSequenceClassification.from_config(config), tokenizer, folder)


def test_scores_do_not_depend_on_a_long_text_beside_them(longrope: str) -> None:
    """Beyond 64 tokens the stock model changes its frequencies for every text of the batch."""
    scorer = Scorer.load(longrope)
    short, long = Sample("Hi", "Yes, it is."), Sample("Hi", "Yes, it is. " * 12)
    together, alone = scorer([short, long]).mean, scorer([short]).mean
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[*scorer.extract.encode(short).prompt, *scorer.extract.encode(short).completion]])
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(longrope)(ids).logits.detach()
    torch.testing.assert_close(alone, stock, rtol=1e-4, atol=1e-4)
    assert scorer.num_truncated == 0  # the long text is read whole, in a batch of its own


def test_the_steady_context_of_every_kind_of_positions_is_known() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    nested = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    for found, expected in (
        ({"max_position_embeddings": 256}, 256),
        ({"max_position_embeddings": None}, sys.maxsize),
        ({}, sys.maxsize),
        ({"max_position_embeddings": 256, "rope_parameters": {"rope_type": "yarn"}}, 256),
        ({"max_position_embeddings": 256, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 256),
        ({"max_position_embeddings": 256, "rope_parameters": rope}, 64),
        ({"max_position_embeddings": 256, "rope_parameters": nested}, 64),
        (
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "longrope"},
            },
            32,
        ),
    ):
        assert steady_context_length(SimpleNamespace(**found)) == expected
    beyond = "the 64 tokens beyond which longrope changes the positions of a whole batch; shorten the prompt"
    for parameters, limit in ((rope, beyond), ({}, "the model's context of 256; shorten the prompt or --max-tokens")):
        config = SimpleNamespace(max_position_embeddings=256, rope_parameters=parameters)
        room_or_raise(50, 14, config)
        with pytest.raises(PoiseError, match=f"a prompt of 250 tokens and 14 new ones exceed {limit}"):
            room_or_raise(250, 14, config)


# ---- adapters ----

ADAPTERS = "adapter_model.safetensors"
ADAPTER_DAMAGES: dict[str, tuple[Damage, str]] = {
    "half of the tensors": (without("lora_B"), "it lacks .*lora_B"),
    "one layer missing": (without("layers.1.mlp"), r"it lacks .*layers\.1\.mlp"),
    "another prefix": (renamed(lambda name: f"module.{name}"), "it lacks"),
    "other layers beside": (
        lambda t: {**t, **{n.replace("layers.1.", "layers.7."): v.clone() for n, v in t.items() if "layers.1." in n}},
        "of other layers",
    ),
}


@pytest.fixture(scope="module")
def policy_adapter(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "policy"
    Policy(*load_policy(str(language_model)), adapted_layers=2, rank=2).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def reward_adapter(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-label reward model as PEFT saves it: LoRA, the head, and the config.json that says how many layers."""
    folder = tmp_path_factory.mktemp("adapters") / "reward"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    model.config.save_pretrained(folder)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"])
    peft.get_peft_model(model, config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_adapters_that_did_not_load_are_one_line(
    language_model: Path, policy_adapter: Path, reward_adapter: Path, tmp_path: Path, name: str
) -> None:
    damage, line = ADAPTER_DAMAGES[name]
    if name != "one layer missing":
        with pytest.raises(PoiseError, match=line):
            load_reward_model(damaged(reward_adapter, tmp_path / "rm", damage, ADAPTERS))
    folder = damaged(policy_adapter, tmp_path / "lm", damage, ADAPTERS)
    with pytest.raises(PoiseError, match=line):
        folded(str(language_model), Path(folder))


@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_a_policy_takes_whole_adapters_of_its_own_layers(
    language_model: Path, policy_adapter: Path, tmp_path: Path, name: str
) -> None:
    damage, line = ADAPTER_DAMAGES[name]
    policy = Policy(*load_policy(str(language_model)), adapted_layers=2, rank=2)
    with pytest.raises(PoiseError, match=line) as error:
        policy.load_adapters(damaged(policy_adapter, tmp_path / "x", damage, ADAPTERS))
    assert "\n" not in str(error.value)


def test_adapters_of_another_policy_are_one_line(language_model: Path, policy_adapter: Path, tmp_path: Path) -> None:
    loaded = load_policy(str(language_model))
    Policy(*loaded, adapted_layers=2, rank=2).load_adapters(str(policy_adapter))
    with pytest.raises(PoiseError, match=r"of other layers; it holds .*layers\.1\."):
        Policy(*load_policy(str(language_model)), adapted_layers=1, rank=2).load_adapters(str(policy_adapter))
    with pytest.raises(PoiseError, match=r"it lacks .*layers\.0\."):
        Policy(*load_policy(str(language_model)), adapted_layers=3, rank=2).load_adapters(str(policy_adapter))
    with pytest.raises(PoiseError, match=r"has the shape \(2, 64\), not \(4, 64\)"):
        Policy(*load_policy(str(language_model)), adapted_layers=2, rank=4).load_adapters(str(policy_adapter))
    shutil.copytree(policy_adapter, tmp_path / "x")
    settings = tmp_path / "x" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(PoiseError, match="its lora_alpha is 8, not 4"):
        Policy(*load_policy(str(language_model)), adapted_layers=2, rank=2).load_adapters(str(tmp_path / "x"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_one_line(
    language_model: Path, classifier: Path, policy_adapter: Path, reward_adapter: Path, tmp_path: Path, value: float
) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        name = sorted(name for name in tensors if "layers.1." in name)[0]
        return {**tensors, name: tensors[name].index_fill(0, torch.tensor([0]), value)}

    lm, rm = damaged(language_model, tmp_path / "lm", spoil), damaged(classifier, tmp_path / "rm", spoil)
    adapters = damaged(policy_adapter, tmp_path / "adapters", spoil, ADAPTERS)
    rewards = damaged(reward_adapter, tmp_path / "rewards", spoil, ADAPTERS)
    policy = Policy(*load_policy(str(language_model)), adapted_layers=2, rank=2)
    for load in (
        lambda: load_policy(lm),
        lambda: load_trunk(lm, 2),
        lambda: load_reward_model(rm),
        lambda: folded(lm, policy_adapter),
        lambda: folded(str(language_model), Path(adapters)),
        lambda: policy.load_adapters(adapters),
        lambda: load_reward_model(rewards),
    ):
        with pytest.raises(PoiseError, match=r"layers\.1\..* is not finite"):
            load()


def test_large_weights_are_finite(language_model: Path, tmp_path: Path) -> None:
    """Their sum in float32 is not."""

    def enlarge(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
        return tensors

    load_policy(damaged(language_model, tmp_path / "lm", enlarge))


def test_a_folder_of_adapters_is_no_model(language_model: Path, policy_adapter: Path, tmp_path: Path) -> None:
    """transformers would put them on the model beside them, from pickle, too."""
    shutil.copytree(language_model, tmp_path / "x")
    shutil.copy(policy_adapter / "adapter_config.json", tmp_path / "x")
    torch.save(load_file(policy_adapter / ADAPTERS), tmp_path / "x" / "adapter_model.bin")
    for load in (load_policy, lambda path: load_trunk(path, 2)):
        with pytest.raises(PoiseError, match="it holds adapters; name a whole model"):
            load(str(tmp_path / "x"))


def test_a_reward_models_adapter_needs_its_head(reward_adapter: Path, tmp_path: Path) -> None:
    load_reward_model(str(reward_adapter))
    with pytest.raises(PoiseError, match=r"it lacks .*score"):
        load_reward_model(damaged(reward_adapter, tmp_path / "x", without("score"), ADAPTERS))


def test_an_adapter_that_was_made_without_a_head(language_model: Path, reward_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_adapter, tmp_path / "x")
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "x")
    with pytest.raises(PoiseError, match="lacks score"):
        load_reward_model(str(tmp_path / "x"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, that such adapters cannot be merged
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"init_lora_weights": "pissa_niter_2"}, "drawn at random .init_lora_weights pissa_niter_2.*plain LoRA"),
        ({"lora_bias": True}, "cannot fold the adapter .*lora_bias"),
    ],
)
def test_adapters_that_are_no_sum_with_their_base_are_one_line(
    language_model: Path, tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    """What a random decomposition took from the base, loading would take out anew, and score something else."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    model.config.save_pretrained(tmp_path / "x")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], **options)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "x")
    transformers.AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "x")
    with pytest.raises(PoiseError, match=line):
        load_reward_model(str(tmp_path / "x"))


def test_pickled_adapters_are_refused(
    language_model: Path, policy_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    policy = Policy(*load_policy(str(language_model)), adapted_layers=2, rank=2)
    for number, (source, load) in enumerate(
        (
            (reward_adapter, lambda folder: load_reward_model(str(folder))),
            (policy_adapter, lambda folder: folded(str(language_model), folder)),
            (policy_adapter, lambda folder: policy.load_adapters(str(folder))),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        torch.save(load_file(folder / ADAPTERS), folder / "adapter_model.bin")
        (folder / ADAPTERS).unlink()
        with pytest.raises(PoiseError, match="such as pickle, are not read"):
            load(folder)


def test_adapters_of_another_kind_of_model_are_one_line(reward_adapter: Path, tiny_model: str, tmp_path: Path) -> None:
    """Layers of the same names and shapes are not layers of the same model."""
    shutil.copytree(reward_adapter, tmp_path / "x")
    edit_json(tmp_path / "x" / "adapter_config.json", base_model_name_or_path=tiny_model)
    with pytest.raises(PoiseError, match=r"are of a model of type qwen3, and .* is of type llama"):
        load_reward_model(str(tmp_path / "x"))


def test_adapters_without_a_config_say_what_to_do(reward_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_adapter, tmp_path / "x")
    (tmp_path / "x" / "config.json").unlink()
    for check in (check_model, load_reward_model):
        with pytest.raises(PoiseError, match=r"holds adapters without the config\.json of their model: fold them"):
            check(str(tmp_path / "x"))


def test_adapters_with_a_larger_vocabulary_say_of_which_shape(language_model: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    model.resize_token_embeddings(300)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "x", save_embedding_layers=False)
    with pytest.raises(PoiseError, match=r"size mismatch for .*lm_head.*300"):
        folded(str(language_model), tmp_path / "x")


def test_a_trunk_keeps_the_name_that_it_was_asked_for_by(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters name it as their base: a hub id, and not the folder of this machine's cache."""
    monkeypatch.setattr(reward_model, "resolve_model", {"lab/tiny": tiny_model}.__getitem__)
    assert load_trunk("lab/tiny", 1)[0].name_or_path == "lab/tiny"
