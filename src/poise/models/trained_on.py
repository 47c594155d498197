"""Which weights adapters were trained on: written beside them, and compared before they are put on a model.

adapter_config.json names a folder or a hub id. What is found there may have become another model of equal shapes, on
which adapters mean nothing, and nothing else would tell.

FOLDER/base.json   model_type, and a digest of the weights
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poise.errors import PoiseError
from poise.runtime.records import read_object
from poise.runtime.run_folder import write_json

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfModel = Any

FILE = "base.json"
_NUMBERS = 256  # of each weight are read


@dataclass(frozen=True)
class _Base:
    model_type: str
    weights: str


def remember(model: HfModel) -> None:
    """Keep the digest of a model's weights with it, before anything changes them."""
    model.poise_weights = digest(model)


def digest(model: HfModel) -> str:
    """Of each weight of the decoder, name, shape and evenly spaced numbers as bfloat16 has them.

    So it is the same for a language model and a classifier, and for whatever precision a model is loaded in. Embeddings
    are left out: a classifier's may have got a row for padding.
    """
    state, embeddings = hashlib.blake2b(digest_size=16), model.get_input_embeddings().weight
    for name, weight in sorted(model.base_model.named_parameters()):
        if weight is embeddings:
            continue
        flat = weight.detach().reshape(-1)
        step = max(flat.numel() // _NUMBERS, 1) | 1  # odd: not one column of a matrix alone
        some = flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        state.update(f"{name} {tuple(weight.shape)} ".encode() + some.numpy().tobytes())
    return state.hexdigest()


def write_base(model: HfModel, folder: Path) -> None:
    """Write beside adapters which model they are on; nothing for one that `remember` has not seen without them."""
    if known := getattr(model, "poise_weights", ""):
        write_json(folder / FILE, {"model_type": model.config.model_type, "weights": known})


def check_base(model: HfModel, folder: Path) -> None:
    """Raise PoiseError if the adapters in a folder were trained on another model.

    Adapters of other tools do not say what they were trained on; nor can a model be asked that already carries some and
    was not remembered before.
    """
    carries = not hasattr(model, "poise_weights") and any("lora_" in name for name, _ in model.named_parameters())
    if carries or not (folder / FILE).exists():
        return
    base = _Base(**read_object(folder / FILE, _Base))
    kind, where = model.config.model_type, getattr(model, "name_or_path", "") or "this one"
    if base.model_type != kind:
        raise PoiseError(f"the adapters in {folder} are of a model of type {base.model_type}, and {where} is of {kind}")
    if base.weights != (getattr(model, "poise_weights", "") or digest(model)):
        raise PoiseError(
            f"the adapters in {folder} were trained on other weights than {where} has; name the model of their "
            f"training in adapter_config.json, or delete {FILE} to put them on this one"
        )
