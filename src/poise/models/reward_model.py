"""The reward model: a stock sequence classifier whose 2K labels are K means and K raw stds.

A checkpoint is a plain `AutoModelForSequenceClassification` folder (safetensors): a decoder trunk, one bias-free
`score` layer, labels laid out [K means | K raw stds], and a `poise` block in config.json that says how to read them:

    mean_k = logit_k - offset_k           in units of the standardized training reward
    std_k  = floor + softplus(logit_{K+k} - offset_{K+k})

A conventional (Bradley-Terry) reward model is the same with K point heads: K labels, std 0. This file is the only
place that knows the layout.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poise.errors import PoiseError, first_line
from poise.functional.objectives import HeadRewards
from poise.functional.typicality import Reference
from poise.models.formats import (
    ENSEMBLE_FILE,
    check_objective,
    checkpoint_folder,
    read_ensemble,
    read_head_block,
)
from poise.models.head_adapters import FOLDER as ADAPTERS
from poise.models.head_adapters import bare, load_head_adapters, save_head_adapters, together
from poise.models.loading import (
    HfModel,
    HfTokenizer,
    device,
    frozen_dtype,
    keep_layers,
    load_adapters,
    load_tokenizer,
    load_weights,
    resolve_model,
)
from poise.models.model_config import load_config, name_rope_for_version_4
from poise.models.padding import pad_apart, with_rows
from poise.models.scoring_template import say_where_others_read, scoring_template
from poise.runtime.folders import write_file_atomic
from poise.runtime.quiet import quiet_loading
from poise.runtime.records import read_object
from poise.runtime.run_folder import write_folder_atomic

_ADAPTER = "adapter_config.json"
_SCORE = "score.weight"
# In a folder of its own: vLLM takes every safetensors file beside config.json for weights.
_LAST_LAYER = "poise/last_layer.safetensors"
REFERENCE = "poise/reference.safetensors"


@dataclass(frozen=True)
class HeadLayout:
    """The `poise` block of a checkpoint's config.json.

    kind: "gaussian" (K means and K raw stds) or "point" (K means).
    offset: one number per label, subtracted from its logit; the `score` layer itself has no bias.
    floor: smallest std a head can report, in units of the standardized reward.
    reward_scale: sigmoid(reward_scale * (mean+ - mean-)) is the Bradley-Terry probability of a preference.
    std_scale: per head, what its std must be multiplied with to be an error bar on validation; () for ones.
    reference_texts: number of texts that distances are measured from (poise/reference.safetensors); 0: there are none.
    reference_shrinkage: of their covariance, in [0, 1].
    adapters: each head reads the trunk through a LoRA adapter of its own (models/head_adapters.py).
    """

    num_heads: int
    kind: Literal["gaussian", "point"]
    offset: tuple[float, ...]
    floor: float = 1e-3
    reward_scale: float = 1.0
    std_scale: tuple[float, ...] = ()
    reference_texts: int = 0
    reference_shrinkage: float = 0.0
    adapters: bool = False

    @property
    def num_labels(self) -> int:
        return self.num_heads * (2 if self.kind == "gaussian" else 1)

    @property
    def label_names(self) -> list[str]:
        """What each label is, for config.json."""
        kinds = ("mean", "raw_std") if self.kind == "gaussian" else ("mean",)
        return [f"{kind}_{k}" for kind in kinds for k in range(self.num_heads)]

    def decode(self, logits: Float[Tensor, "*batch labels"]) -> HeadRewards:
        """Raw logits, from any backend, as rewards. Raises PoiseError if their number does not fit."""
        if logits.shape[-1] != self.num_labels:
            raise PoiseError(
                f"the checkpoint has {logits.shape[-1]} labels but its poise block says {self.num_heads} "
                f"{self.kind} heads, which need {self.num_labels}"
            )
        logits = logits - torch.tensor(self.offset, dtype=logits.dtype, device=logits.device)
        if self.kind == "point":
            return HeadRewards(logits, torch.zeros_like(logits))
        mean, raw = logits.split(self.num_heads, -1)
        return HeadRewards(mean, self.floor + F.softplus(raw))

    def check_objective(self, objective: str) -> None:
        """Raise PoiseError for an objective, as a config names it, that means nothing for these heads."""
        check_objective(objective, self.kind, self.num_heads, self.reference_texts)

    def calibrated(self, heads: HeadRewards) -> HeadRewards:
        """The same rewards with stds as error bars. Not for routing: the scale would change which head is lowest."""
        if not self.std_scale:
            return heads
        return heads._replace(std=heads.std * torch.tensor(self.std_scale, dtype=heads.std.dtype))

    def with_reference(self, reference: Reference | None) -> "HeadLayout":
        """The layout of the same heads in a checkpoint with this reference."""
        texts, shrinkage = (0, 0.0) if reference is None else (reference.num_texts, reference.shrinkage)
        return replace(self, reference_texts=texts, reference_shrinkage=shrinkage)


@dataclass(frozen=True)
class LastLayer:
    """The Bayesian last layer: the exact std, over the Laplace posterior, of what drawn heads can only sample.

    std(x) = |F^T (x - center)|, with F F^T the covariance of the weights, in units of the standardized reward.
    Features are as the trunk gives them; `center` is the mean feature of the training texts, whose reward is 0 whatever
    the weights.
    """

    factor_HH: Float[Tensor, "hidden hidden"]
    center_H: Float[Tensor, " hidden"]

    def std(self, features: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
        """Std of a text's reward, float64, on the CPU."""
        return self.difference_std(features.cpu().double() - self.center_H.double())

    def difference_std(self, difference: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
        """Std of the reward difference of two texts, from the difference of their features."""
        return (difference.cpu().double() @ self.factor_HH.double()).norm(dim=-1)


def load_trunk(
    model: str, num_layers: int, *, dtype: torch.dtype | None = None, place: torch.device | None = None
) -> tuple[HfModel, HfTokenizer]:
    """(classifier with one fresh label, tokenizer): the first `num_layers` layers (0: all) of `model`.

    dtype: of the weights; default `frozen_dtype`. place: where they lie; default `device`.
    """
    folder = resolve_model(model)
    config = load_config(folder)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    if num_layers > depth:
        raise PoiseError(f"{model} has {depth} layers, --num-layers asks for {num_layers}")
    if num_layers:
        keep_layers(config, num_layers)
    config.num_labels = 1
    tokenizer = load_tokenizer(folder)
    classifier = _load_classifier(
        folder, config, dtype or frozen_dtype(), fresh={_SCORE}, num_layers=text.num_hidden_layers, place=place
    )
    classifier.name_or_path = model  # what its adapters will say they belong to: no folder of a cache
    pad_apart(tokenizer, classifier)
    return classifier, tokenizer


def _load_classifier(
    folder: str,
    config: Any,
    dtype: torch.dtype,
    *,
    fresh: Collection[str] = (),
    num_layers: int = 0,
    place: torch.device | None = None,
) -> HfModel:
    """A classifier with a linear `score` layer, on the device or at `place`; the others as for `load_weights`."""
    auto = transformers.AutoModelForSequenceClassification
    classifier = load_weights(
        auto, folder, "reward model", dtype=dtype, config=config, fresh=fresh, num_layers=num_layers
    )
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear):
        raise PoiseError(f"{type(classifier).__name__} is no decoder with a linear `score` layer")
    return classifier.to(place or device()).eval()


def with_heads(classifier: HfModel, weight: Float[Tensor, "labels hidden"]) -> None:
    """Put a `score` layer of these weights on a classifier, in place."""
    where = {"device": classifier.score.weight.device, "dtype": classifier.dtype}
    classifier.score = nn.Linear(weight.shape[1], weight.shape[0], bias=False, **where)
    classifier.score.weight.data.copy_(weight)
    classifier.num_labels = classifier.config.num_labels = len(weight)


def save_reward_model(
    folder: Path,
    classifier: HfModel,
    tokenizer: HfTokenizer,
    weight: Float[Tensor, "labels hidden"],
    layout: HeadLayout,
    last_layer: LastLayer | None = None,
    reference: Reference | None = None,
) -> None:
    """Write a checkpoint, whole or not at all: the trunk of `classifier` with `weight` as its `score` layer.

    Of a classifier with adapters for each head `weight` is on the features of all (`head_adapters.apart`).
    """
    layout = layout.with_reference(reference)
    previous = classifier.score
    with_heads(classifier, together(weight, layout.num_heads) if layout.adapters else weight)
    classifier.config.problem_type = "regression"
    classifier.config.id2label = dict(enumerate(layout.label_names))
    classifier.config.label2id = {name: number for number, name in enumerate(layout.label_names)}
    classifier.config.poise = asdict(layout)
    try:
        with write_folder_atomic(folder) as scratch, quiet_loading():
            with bare(classifier):
                classifier.save_pretrained(scratch)
            name_rope_for_version_4(scratch)
            if layout.adapters:
                save_head_adapters(scratch / ADAPTERS, classifier)
            with scoring_template(tokenizer):
                tokenizer.save_pretrained(scratch)
            if last_layer is not None:
                _save_tensors(scratch / _LAST_LAYER, factor=last_layer.factor_HH, centre=last_layer.center_H)
            if reference is not None:
                save_reference(scratch, reference)
    finally:
        classifier.score = previous


def _save_tensors(path: Path, **tensors: Tensor) -> None:
    with write_file_atomic(path) as partial:
        save_file({name: value.float().contiguous() for name, value in tensors.items()}, partial)


def save_reference(folder: Path, reference: Reference) -> None:
    """Write the file of a checkpoint's reference. Its `poise` block must say so, too (`HeadLayout.with_reference`)."""
    _save_tensors(folder / REFERENCE, factor=reference.factor_HH, center=reference.center_H)


def load_reference(path: str, layout: HeadLayout, hidden_size: int) -> Reference | None:
    """The reference that a checkpoint's `poise` block speaks of; None if it speaks of none.

    None, too, without the file: `save_pretrained` of transformers keeps the block and leaves the file behind. Raises
    PoiseError, one line, for a file that cannot be read or is of other features.
    """
    file = Path(resolve_model(checkpoint_folder(path))) / REFERENCE
    if not layout.reference_texts or not file.exists():
        return None
    try:
        tensors = load_file(file)
        center, factor = tensors["center"], tensors["factor"]
    except (SafetensorError, KeyError, OSError) as error:
        raise PoiseError(f"cannot read {file}: {first_line(error)}") from None
    finite = center.isfinite().all() and factor.isfinite().all()
    if not finite or center.shape != (hidden_size,) or factor.shape != (hidden_size, hidden_size):
        raise PoiseError(f"{file} holds no reference for features of size {hidden_size}; `poise reference` writes one")
    return Reference(center, factor, layout.reference_texts, layout.reference_shrinkage)


def members_of(path: str) -> tuple[str, ...]:
    """The reward models that a name stands for: an ensemble's members, or itself."""
    return read_ensemble(path).members if (Path(path) / ENSEMBLE_FILE).exists() else (path,)


def files_of(path: str, place: Callable[[str], str] = resolve_model) -> list[Path]:
    """Folders that decide what a reward model says: its own, those of an ensemble's members, and an adapter's base.

    place: where a model is. Raises PoiseError, one line, for one that is not there.
    """
    found = [Path(path)] if (Path(path) / ENSEMBLE_FILE).exists() else []
    for member in members_of(path):
        folder = Path(place(checkpoint_folder(member)))
        found.append(folder)
        if (folder / _ADAPTER).exists():
            found.append(Path(place(_adapted_model(folder))))
    return found


def heads_fingerprint(path: str) -> str:
    """A hash of what a checkpoint's heads are: config.json, `score` weights and adapters of heads, or ensemble.json."""
    place = checkpoint_folder(path)
    folder = Path(place) if (Path(place) / "ensemble.json").exists() else Path(resolve_model(place))
    state = hashlib.blake2b(digest_size=16)
    for name in ("config.json", "ensemble.json"):
        if (folder / name).exists():
            state.update((folder / name).read_bytes())
    for file in sorted(folder.glob(f"{ADAPTERS}/*/*.safetensors")):
        state.update(file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.split(".")[-2:] == ["score", "weight"]:
                    state.update(tensors.get_tensor(name).float().numpy().tobytes())
    return state.hexdigest()


def load_last_layer(path: str) -> LastLayer | None:
    """The Bayesian last layer saved with a checkpoint, if one was."""
    file = Path(resolve_model(checkpoint_folder(path))) / _LAST_LAYER
    if not file.exists():
        return None
    try:
        tensors = load_file(file)
        return LastLayer(tensors["factor"], tensors["centre"])
    except (SafetensorError, KeyError, OSError) as error:
        raise PoiseError(f"cannot read {file}: {first_line(error)}") from None


def read_layout(path: str) -> HeadLayout:
    """How to read a checkpoint's labels, from its config.json alone.

    Any one-label classifier of the hub works as a conventional reward model. Raises PoiseError for several labels
    without a `poise` block, or a block that does not fit the labels.
    """
    config = load_config(resolve_model(checkpoint_folder(path)))
    block = read_head_block(getattr(config, "poise", None), config.num_labels, path)
    return HeadLayout(**vars(block))


def load_reward_model(
    path: str, dtype: torch.dtype | None = None, place: torch.device | None = None
) -> tuple[HfModel, HfTokenizer, HeadLayout]:
    """(classifier, tokenizer, layout) of a checkpoint, or of an adapter checkpoint, its adapters merged.

    Adapters of single heads are put on it. dtype: of the weights; default `frozen_dtype`. place: where they lie;
    default `device`. Raises PoiseError as `read_layout` does, and for weights or a tokenizer that do not fit.
    """
    layout = read_layout(path)
    folder = resolve_model(checkpoint_folder(path))
    config = load_config(folder)
    ours = bool(getattr(config, "poise", None))
    pad = None if ours else config.get_text_config().pad_token_id
    tokenizer = load_tokenizer(folder)
    if not ours:
        say_where_others_read(tokenizer, path)
    if (Path(folder) / _ADAPTER).exists():
        classifier = _load_adapted(folder, config, place)
    else:
        classifier = _load_classifier(folder, config, dtype or frozen_dtype(), place=place)
    if layout.adapters:
        load_head_adapters(classifier, Path(folder) / ADAPTERS, layout.num_heads)
    if not classifier.score.weight.isfinite().all():
        raise PoiseError(f"{path}: {_SCORE} holds numbers that are not finite; train the reward model again")
    if pad is None or not 0 <= pad < len(tokenizer):
        pad_apart(tokenizer, classifier)
    else:  # a stock classifier reads its score at the last token that is not this one, be it the end of a turn
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return classifier, tokenizer, layout


@dataclass(frozen=True)
class _Adapter:
    """adapter_config.json, as far as it is read here."""

    base_model_name_or_path: str


def _adapted_model(folder: Path) -> str:
    """The model that the adapters in a folder were trained on."""
    return str(read_object(folder / _ADAPTER, _Adapter, strict=False)["base_model_name_or_path"])


def _load_adapted(folder: str, config: Any, place: torch.device | None) -> HfModel:
    """The model that an adapter checkpoint names, with as many layers and labels as its config.json says, merged."""
    base, num_layers = resolve_model(_adapted_model(Path(folder))), config.get_text_config().num_hidden_layers
    if (kind := load_config(base).model_type) != config.model_type:
        raise PoiseError(
            f"the adapters in {folder} are of a model of type {config.model_type}, and {base}, which "
            f"{_ADAPTER} names, is of type {kind}"
        )
    text, known = config.get_text_config(), load_config(base).get_text_config().vocab_size
    pad = text.pad_token_id if text.pad_token_id == known == text.vocab_size - 1 else None
    if pad is not None:  # a row that the embeddings got for padding
        text.vocab_size, text.pad_token_id = known, None
    classifier = _load_classifier(base, config, frozen_dtype(), fresh={_SCORE}, num_layers=num_layers, place=place)
    if pad is not None:
        with_rows(classifier, pad + 1)
        classifier.config.get_text_config().pad_token_id = pad
    adapted = load_adapters(classifier, folder, needs="score")
    try:
        return adapted.merge_and_unload().eval()
    except (RuntimeError, ValueError) as error:  # a bias of LoRA where the layer has none, for instance
        raise PoiseError(f"cannot fold the adapter {folder} into {base}: {first_line(error)}") from None
