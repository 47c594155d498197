"""The config.json of a model folder: what a model computes is read of it, and not how others ran it."""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from poise.errors import PoiseError, first_line
from poise.runtime.records import read_object

# Ways to attend that take a mask for each token, and what a forward pass returns beside hidden states.
_ATTENTION = (None, "eager", "sdpa")
_NAMES_OF_NEOX = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
_OUTPUTS = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}


def load_config(folder: str) -> Any:
    """The config.json of a model folder.

    Raises PoiseError if transformers knows no such model, or if the model needs code that is not of transformers.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  each family checks its settings in its own way
        if "custom code" in str(error):
            raise PoiseError(f"{folder} is a model with code of its own (auto_map), which Poise never runs") from None
        raise PoiseError(f"cannot read {folder}/config.json: {why_unread(error)}") from None
    # transformers reads a name with a slash as a repository of kernels, downloads its code and runs it.
    asked = getattr(config, "_attn_implementation", None)
    if isinstance(asked, str) and "/" in asked:
        raise PoiseError(f"{folder}/config.json asks for attention code from {asked}, which Poise never runs")
    for part in (config, config.get_text_config()):
        if (getattr(part, "pad_token_id", None) or 0) >= (getattr(part, "vocab_size", None) or sys.maxsize):
            part.pad_token_id = None  # the embedding layer of a model refuses such a number
        _run_as_here(part)
    return config


def _run_as_here(config: Any) -> None:
    """Set back what a config.json says of how a model is run, not of what it computes: here, that is decided here.

    Kernels such as flash_attention_2 may not be installed, and take none of the masks by which texts lie in one row.
    """
    if getattr(config, "_attn_implementation", None) not in _ATTENTION:
        config._attn_implementation = None  # transformers then takes sdpa where the family has it
    for name, plain in _OUTPUTS.items():
        if hasattr(config, name):
            setattr(config, name, plain)


def why_unread(error: Exception) -> str:
    """One line of what a reader of transformers raised: the reason, which some say last."""
    if isinstance(error, KeyError):
        return f"nothing is called {error.args[0]!r}" if error.args else first_line(error)
    if isinstance(error, StrictDataclassError):  # its last line has the reason, after the kind of error
        reason = str(error).splitlines()[-1].partition(". Errors:")[0]
        return reason.partition("Error: ")[2] or reason.strip()
    return first_line(error)


def name_rope_for_version_4(folder: Path) -> None:
    """Repeat, in FOLDER/config.json, the settings of rotary positions under the names that transformers 4 reads.

    It does not know `rope_parameters`: it would take 10,000 for the base and scale nothing, without a word, and engines
    that pin it would score with another model. Version 5 reads a file with both as one with the first alone.
    """
    path = folder / "config.json"
    config = read_object(path, strict=False)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update(found := _rope_of_version_4(part.get("rope_parameters")))
            if part.get("model_type") == "gpt_neox":  # has names of its own
                part.update({old: found[new] for old, new in _NAMES_OF_NEOX.items() if new in found})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")  # as transformers writes it


def _rope_of_version_4(rope: Any) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like of `rope_parameters`; {} of what version 4 had no name for.

    >>> _rope_of_version_4({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0})
    {'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}
    """
    if not isinstance(rope, dict):
        return {}
    if isinstance(full := rope.get("full_attention"), dict):  # one of each kind of layers
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        return _rope_of_version_4(full) | ({} if local is None else {"rope_local_base_freq": local})
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    found = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if rope.get(name) is not None}
    return found | ({} if rope.get("rope_type", "default") == "default" else {"rope_scaling": scaling})
