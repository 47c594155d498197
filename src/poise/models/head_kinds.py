"""The kinds of heads of one `poise train-reward` run, several of them in one checkpoint.

    CHECKPOINT/poise/heads.json          kind of the checkpoint's own heads; layouts of the others, by kind
    CHECKPOINT/poise/heads.safetensors   the others' `score` weights, and their Bayesian last layers

They lie in a folder of their own, as the Bayesian last layer does: vLLM takes every safetensors file beside config.json
for weights.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from poise.errors import PoiseError, first_line
from poise.models.formats import read_head_block
from poise.models.head_adapters import FOLDER as ADAPTERS
from poise.models.reward_model import HeadLayout, LastLayer, load_last_layer, read_layout
from poise.runtime.records import read_object
from poise.runtime.run_folder import write_atomic

_KINDS, _WEIGHTS = "poise/heads.json", "poise/heads.safetensors"


class HeadSet(NamedTuple):
    """The heads of one kind: `score` weights (labels, hidden) in float32, how to read them, their last layer."""

    weight: Tensor
    layout: HeadLayout
    last_layer: LastLayer | None = None


def read_head_set(folder: Path) -> HeadSet:
    """The heads of a local checkpoint, without its trunk."""
    return HeadSet(_tensor(folder, "score.weight").float(), read_layout(str(folder)), load_last_layer(str(folder)))


def same_trunk(one: Path, other: Path) -> bool:
    """Do two local checkpoints hold the same weights, but for their `score` layer? Read tensor by tensor.

    Heads with adapters of their own share their features with no other heads.
    """
    if (one / ADAPTERS).exists() or (other / ADAPTERS).exists():
        return False
    mine, theirs = _tensors(one), _tensors(other)
    if mine.keys() != theirs.keys():
        return False
    return all(torch.equal(_tensor(one, name), _tensor(other, name)) for name in mine)


def write_more_heads(checkpoint: Path, own: str, others: Mapping[str, HeadSet]) -> None:
    """Add heads of other kinds on the same trunk to a checkpoint whose own heads are of kind `own`."""
    (checkpoint / "poise").mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for kind, heads in others.items():
        tensors[f"{kind}.weight"] = heads.weight
        if heads.last_layer is not None:
            last = heads.last_layer
            tensors |= {f"{kind}.factor": last.factor_HH, f"{kind}.center": last.center_H}
    if tensors:
        save_file({name: value.float().cpu().contiguous() for name, value in tensors.items()}, checkpoint / _WEIGHTS)
    block = {"own": own, "others": {kind: asdict(heads.layout) for kind, heads in others.items()}}
    write_atomic(checkpoint / _KINDS, json.dumps(block, indent=1))


def read_more_heads(checkpoint: Path) -> tuple[str, dict[str, HeadSet]]:
    """(kind of the checkpoint's own heads, the others by kind); ("", {}) of a checkpoint without any such files.

    Raises PoiseError for files that do not fit together.
    """
    path = checkpoint / _KINDS
    if not path.exists():
        return "", {}
    try:
        block = read_object(path)
        tensors = load_file(checkpoint / _WEIGHTS) if block["others"] else {}
        found: dict[str, HeadSet] = {}
        for kind, layout in block["others"].items():
            weight = tensors[f"{kind}.weight"]
            read = HeadLayout(**vars(read_head_block(layout, len(weight), f"{path}, {kind}")))
            factor = tensors.get(f"{kind}.factor")
            last = None if factor is None else LastLayer(factor, tensors[f"{kind}.center"])
            found[kind] = HeadSet(weight, read, last)
        return str(block["own"]), found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise PoiseError(f"cannot read {path}: {first_line(error)}") from None


def _tensors(folder: Path) -> dict[str, Path]:
    """Names of the weights of a checkpoint but for its `score` layer's, each with its file."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: file for name in tensors.keys() if not name.startswith("score.")}  # noqa: SIM118
    return found


def _tensor(folder: Path, name: str) -> Tensor:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  no mapping
                found: Tensor = tensors.get_tensor(name)
                return found
    raise PoiseError(f"{folder} has no {name}")
