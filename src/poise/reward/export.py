"""`poise export`: a reward model of K heads as the one-label classifier that other tools take.

Heads are linear, so the mean of their rewards is a head itself, exactly. With h the trunk's feature of a text:

    mean_k (w_k . h - o_k)  =  (mean_k w_k) . h  -  mean_k o_k

The offset stays behind in the `poise` block, where Scorer subtracts it: the `score` layer has no bias, and one constant
for all texts changes no preference, no ranking and no normalized reward. The trunk's weights are copied as they are;
the new row is float32, because the mean of bfloat16 rows is not a bfloat16 row.

Heads with adapters of their own read different features, so their mean is no head. One of them is: its adapter goes
into the trunk's weights.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from poise import __version__
from poise.data.types import Sample
from poise.errors import PoiseError, first_line
from poise.functional.objectives import HeadRewards
from poise.models.formats import checkpoint_folder
from poise.models.head_adapters import FOLDER, fold_head
from poise.models.loading import frozen_dtype, load_tokenizer, resolve_model
from poise.models.model_card import front_matter_without_results
from poise.models.model_config import load_config, name_rope_for_version_4
from poise.models.reward_model import (
    REFERENCE,
    HeadLayout,
    load_reward_model,
    read_layout,
    with_heads,
)
from poise.models.run_heads import adapters_of
from poise.models.scorer import Scorer
from poise.models.scoring_template import UNCHANGED, ends_where_read, scoring_template
from poise.models.trained_on import FILE as BASE
from poise.reward.config import ExportConfig as Config
from poise.reward.formats import EXPORT_MARK, WRITTEN_BY, check_export
from poise.runtime.folders import inside, own_file, write_folder_atomic
from poise.runtime.progress import console
from poise.runtime.quiet import quiet_loading
from poise.runtime.records import read_object
from poise.runtime.run_folder import Json, write_json

# Largest difference between an export and its source, as a share of the largest reward: float32 adds the same numbers
# in another order; bfloat16, in which a GPU reads both, rounds the new row (2^-9 of each of its terms).
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_TEXTS = [
    Sample("Review a film.", "A warm, funny film."),
    Sample("Is tea hot?", "No."),
    Sample("Name three colors.", "Red, green and blue. Each of them is also the color of something to eat."),
]


def run(config: Config) -> Path:
    """Write the folder, whole or not at all; returns it."""
    config.check()
    source, target = Path(resolve_model(checkpoint_folder(config.reward))), Path(config.output)
    check_export(target, source)
    settings = load_config(str(source))
    if getattr(settings, "poise", None) is None:
        raise PoiseError(f"{config.reward} has no `poise` block in its config.json: there are no heads to export")
    layout = read_layout(str(source))
    if layout.adapters:
        _check_one_head(config)
    tokenizer = load_tokenizer(str(source))
    with write_folder_atomic(target) as scratch:
        write = _write_folded if layout.adapters else _write_adapter if config.adapter else _write_weights
        exported = write(source, scratch, layout, config)
        if exported.reference_texts and (source / REFERENCE).exists():  # not of a scalar, which no objective reads
            (scratch / REFERENCE).parent.mkdir()
            shutil.copyfile(own_file(source, REFERENCE), scratch / REFERENCE)
        else:
            exported = exported.with_reference(None)
        settings.num_labels = exported.num_labels
        settings.id2label = dict(enumerate(exported.label_names))
        settings.label2id = {name: number for number, name in enumerate(exported.label_names)}
        settings.poise = asdict(exported)
        setattr(settings, EXPORT_MARK, {"scalar": config.scalar, "head": config.head, "engine": config.engine})
        settings.save_pretrained(scratch)
        name_rope_for_version_4(scratch)
        with scoring_template(tokenizer):
            tokenizer.save_pretrained(scratch)
            ends = ends_where_read(tokenizer)
        _compare(source, scratch, config)
        (scratch / "README.md").write_text(_card(source, layout, exported, config, ends=ends), encoding="utf-8")
    console.print(f"{exported.num_labels} label{'s' * (exported.num_labels > 1)} for {config.engine}: {target}")
    return target


def scalar_head(
    weight: Float[Tensor, "labels hidden"], layout: HeadLayout, head: int | None
) -> tuple[Float[Tensor, "1 hidden"], HeadLayout]:
    """(row, layout) of one point head: the mean of all heads' rewards, or that of `head`.

    row = mean_k w_k, offset = mean_k o_k over the K rows of means; raw stds are left out.

    >>> layout = HeadLayout(2, "gaussian", (1.0, 2.0, 0.5, 0.5))
    >>> row, point = scalar_head(torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0], [9.0, 9.0]]), layout, None)
    >>> row.tolist(), point.offset
    ([[2.0, 1.0]], (1.5,))
    """
    if head is not None and not 0 <= head < layout.num_heads:
        raise PoiseError(f"--head {head}: the reward model has heads 0 to {layout.num_heads - 1}")
    kept = slice(layout.num_heads) if head is None else slice(head, head + 1)
    offsets = layout.offset[kept]
    row = weight[kept].double().mean(0, keepdim=True).float()
    return row, HeadLayout(1, "point", (sum(offsets) / len(offsets),), reward_scale=layout.reward_scale)


# ---- checks ----


def _check_one_head(config: Config) -> None:
    """What can be made of heads with adapters of their own: any one of them."""
    if config.scalar == "head" and not config.adapter:
        return
    raise PoiseError(
        f"{config.reward} has heads with adapters of their own, which make no one classifier; choose --scalar head "
        f"--head NUMBER, or use the adapters as they are: PEFT and vLLM read {FOLDER}/head_NUMBER in the "
        f"checkpoint"
    )


# ---- weights ----


def _write_weights(source: Path, target: Path, layout: HeadLayout, config: Config) -> HeadLayout:
    """Copy the safetensors files with the `score` layer that `config` asks for; returns that layer's layout."""
    index = source / "model.safetensors.index.json"
    listing = _read_index(index) if index.exists() else {"weight_map": {}}
    home = listing["weight_map"].get("score.weight", "model.safetensors")
    files = {name: own_file(source, name) for name in {home, *listing["weight_map"].values()}}
    tensors = _read_tensors(files[home]) if files[home].exists() else {}
    if "score.weight" not in tensors:
        raise PoiseError(f"{config.reward} has no score.weight in its safetensors files")
    before = _num_bytes(tensors)
    if config.scalar:
        tensors["score.weight"], layout = scalar_head(tensors["score.weight"], layout, config.head)
    if config.engine == "sglang":
        tensors["score.bias"] = torch.zeros(layout.num_labels, dtype=tensors["score.weight"].dtype)
    with safe_open(files[home], "pt") as file:
        save_file(tensors, target / home, file.metadata())
    for name in files.keys() - {home}:
        if not files[name].exists():
            raise PoiseError(f"{index} names {name}, which is not there")
        shutil.copyfile(files[name], target / name)
    if index.exists():
        listing["weight_map"] |= dict.fromkeys(tensors, home)
        if isinstance(listing.get("metadata"), dict) and isinstance(listing["metadata"].get("total_size"), int):
            listing["metadata"]["total_size"] += _num_bytes(tensors) - before
        write_json(target / index.name, listing)
    return layout


def _write_folded(source: Path, target: Path, layout: HeadLayout, config: Config) -> HeadLayout:
    """One head's adapter folded into the trunk, with its row of the `score` layer."""
    assert config.head is not None  # checked
    classifier, _, _ = load_reward_model(str(source), torch.float32)
    weight, scalar = scalar_head(classifier.score.weight.data, layout, config.head)
    fold_head(classifier, config.head)
    with_heads(classifier, weight)
    if config.engine == "sglang":
        classifier.score.bias = torch.nn.Parameter(torch.zeros(1))
    with quiet_loading():
        classifier.save_pretrained(target)
    return scalar


@dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


def _read_index(path: Path) -> Json:
    """The index of a sharded checkpoint. Its names of files are plain: whatever writes them writes in one folder.

    Raises PoiseError for anything else.
    """
    listing = read_object(path, _Index, strict=False)
    for name in listing["weight_map"].values():
        inside(path.parent, name)
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise PoiseError(f"{path} names {name!r}, which is no safetensors file beside it")
    return listing


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PoiseError(f"cannot read {path}: {first_line(error)}") from None


def _write_adapter(source: Path, target: Path, layout: HeadLayout, config: Config) -> HeadLayout:
    """The adapters of the run that `source` is part of, with the heads of `source` in place of stage 1's."""
    adapter = adapters_of(source.resolve())
    if not (adapter / "adapter_config.json").exists():
        raise PoiseError(f"{config.reward} has no adapters beside it: train it with `--trunk lora`")
    tensors = _read_tensors(own_file(adapter, "adapter_model.safetensors"))
    name = next((name for name in tensors if name.endswith("score.weight")), "")
    weight = _read_tensors(own_file(source, "model.safetensors")).get("score.weight")
    if not name or weight is None:
        raise PoiseError(f"{config.reward} has no score.weight in its safetensors files or its adapters")
    if config.scalar:
        weight, layout = scalar_head(weight, layout, config.head)
    save_file({**tensors, name: weight}, target / "adapter_model.safetensors", {"format": "pt"})
    for file in ("adapter_config.json", BASE):
        if (adapter / file).exists():
            shutil.copyfile(own_file(adapter, file), target / file)
    return layout


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ---- comparison ----


def _compare(source: Path, target: Path, config: Config) -> None:
    """Raise PoiseError unless the exported folder gives the rewards of its source on a few texts.

    The largest difference counts, as a share of the largest reward. Adapters of stage 1 beside a BRME with a trunk of
    its own (`--stage2-trunk`), for instance, are another reward model.
    """
    expected = Scorer.load(str(source))(_TEXTS)
    if config.scalar:
        mean = expected.mean.mean(-1, keepdim=True) if config.head is None else expected.mean[:, [config.head]]
        expected = HeadRewards(mean, torch.zeros_like(mean))
    try:
        written = Scorer.load(str(target))(_TEXTS)
    except PoiseError as error:
        raise PoiseError(str(error).replace(str(target), config.output)) from None
    for what, want, got in zip(("rewards", "stds", "distances"), expected, written, strict=True):
        if want is None or got is None:
            continue
        difference = ((want - got).abs().max() / want.abs().max().clamp_min(1e-12)).item()
        if not difference <= _TOLERANCE[frozen_dtype()]:
            cause = (
                ": the adapters beside it are not those of its trunk, as after `--stage2-trunk`; export the merged "
                "weights instead, without --adapter" if config.adapter else ""
            )  # fmt: skip
            raise PoiseError(
                f"the export would give other {what} than {config.reward}, by {difference:.2g} of the largest{cause}"
            )


# ---- card ----


def _card(source: Path, layout: HeadLayout, exported: HeadLayout, config: Config, *, ends: bool) -> str:
    heads = f"{layout.num_heads} {layout.kind} head{'s' * (layout.num_heads > 1)}"
    if config.scalar:
        title = f"Reward model with one label: {'mean' if config.head is None else f'head {config.head}'} of {heads}"
        text = f"""\
A stock `AutoModelForSequenceClassification`. Its one logit is the reward plus the constant {exported.offset[0]:.6g},
which changes no preference, no ranking and no normalized reward. How far the heads disagree is lost: this folder is a
conventional reward model, and no robust objective can be computed from it.
"""
    elif config.adapter:
        title = f"Reward model of {heads}, as LoRA adapters"
        text = """\
PEFT adapters and the `score` layer, for the language model that adapter_config.json names; config.json says how many
of its layers they belong to and how to read the labels. `Scorer.load` of Poise merges them when it reads them. With
PEFT alone the base needs this config.json; `AutoPeftModel...` takes no config, reads the base with all its layers, and
gives other numbers without a word:

```python
import peft
from transformers import AutoConfig, AutoModelForSequenceClassification

config = AutoConfig.from_pretrained(".")
base = peft.PeftConfig.from_pretrained(".").base_model_name_or_path
model = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype="float32")
model = peft.PeftModel.from_pretrained(model, ".").eval()  # or its merge_and_unload()
```
"""
    else:
        title = f"Reward model of {heads}, for SGLang"
        text = f"""\
A stock `AutoModelForSequenceClassification` with {exported.num_labels} labels. The `poise` block of config.json says
how to read them.
"""
    if config.engine == "sglang":
        text += """
`score.bias` is zero. It is there because SGLang's classifiers for Qwen have a bias, and some leave it random; the
transformers library calls it unexpected and ignores it. Ask SGLang for `/classify`: its `/v1/classify` applies a
softmax, which makes one label always 1.
"""
    text += "" if ends else f"\nThe chat template {UNCHANGED}.\n"
    return f"{front_matter_without_results(source / 'README.md')}\n# {title}\n\n{text}\n{WRITTEN_BY} {__version__}.\n"
