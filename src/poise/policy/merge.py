"""`poise merge`: a policy's LoRA adapters folded into the language model that they were trained on.

With A and B the adapters of a linear map and W its frozen weight (arXiv 2106.09685):

    W' = W + (alpha / r) B A          W, W': (out, in)    A: (r, in)    B: (out, r)

The result is a plain folder of safetensors, for engines and tools that know no adapters.
"""

import shutil
from pathlib import Path

import torch
import transformers

from poise.errors import PoiseError, first_line
from poise.models.end_tokens import agree_on_ends
from poise.models.families import alike, probe_tokens
from poise.models.loading import (
    HfModel,
    HfTokenizer,
    load_adapters,
    load_policy,
    load_tokenizer,
    load_weights,
    make_room_for,
    resolve_model,
)
from poise.models.model_config import name_rope_for_version_4
from poise.models.model_folder import adapted_model
from poise.models.padding import pad_apart
from poise.policy.config import MergeConfig as Config
from poise.policy.formats import policy_folder
from poise.runtime.folders import own_file, write_folder_atomic
from poise.runtime.progress import console
from poise.runtime.quiet import quiet_loading

_SETTINGS = "adapter_config.json"
NOTICED_LOSS = 0.1  # share of a policy's changes that rounding may take without a word


def run(config: Config) -> Path:
    """Write the folder, whole or not at all; returns it. A policy without adapters (`--tune full`) is copied."""
    config.check()
    source, target = policy_folder(config.policy), Path(config.output)
    if not (source / _SETTINGS).exists():
        for path in source.rglob("*"):
            own_file(source, path.relative_to(source).as_posix())
        with write_folder_atomic(target) as scratch:
            shutil.copytree(source, scratch, dirs_exist_ok=True)
        console.print(f"{source} is a whole model, there is nothing to fold: copied to {target}")
        return target
    base = base_of(source)
    model, tokenizer = folded(base, source)
    with write_folder_atomic(target) as scratch, quiet_loading():
        model.save_pretrained(scratch)
        name_rope_for_version_4(scratch)
        tokenizer.save_pretrained(scratch)
    console.print(f"adapters folded into {Path(base).name}: {target}")
    return target


def folded(base: str, adapters: Path) -> tuple[HfModel, HfTokenizer]:
    """(model, tokenizer): the model in folder `base` with the adapters in its weights, padding and ends as in training.

    Summed in float32 and rounded once, to the dtype that the base model is saved in.
    """
    tokenizer = load_tokenizer(str(adapters) if _has_tokenizer(adapters) else base)
    try:
        model = load_weights(transformers.AutoModelForCausalLM, base, "language model", dtype="auto")
        dtype = model.dtype
        make_room_for(model, str(adapters))
        pad_apart(tokenizer, model)
        agree_on_ends(model, tokenizer)  # others stop where the policy learned to
        ids = torch.tensor([probe_tokens(model, range(1, 10))])
        with quiet_loading(), torch.no_grad():
            adapted = load_adapters(model.float(), str(adapters)).eval()
            wanted = _logits(adapted, ids)
            with adapted.disable_adapter():
                start = _logits(adapted, ids)
            merged = adapted.merge_and_unload(safe_merge=True)
            if not alike(merged, _logits(merged, ids), wanted):
                raise PoiseError(
                    "the folded model has other logits than base and adapters; use the adapters as they are"
                )
            rounded = _logits(merged.to(dtype).float(), ids)
        _say_lost(dtype, start, wanted, rounded)
        return merged.to(dtype), tokenizer
    except (PoiseError, ValueError, RuntimeError) as error:
        raise PoiseError(f"cannot fold {adapters} into {base}: {first_line(error)}") from None


def _logits(model: HfModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _say_lost(dtype: torch.dtype, start: torch.Tensor, wanted: torch.Tensor, rounded: torch.Tensor) -> None:
    """Say how much of what training changed is rounded away: changes by RL are often less than bfloat16's spacing.

    All logits are of one text: of the base model, of the policy, and of the folded model after rounding.
    """
    moved, lost = (wanted - start).norm().item(), (rounded - wanted).norm().item()
    if lost > NOTICED_LOSS * moved > 0:
        console.print(
            f"rounded to {str(dtype).removeprefix('torch.')}, as the base model is, the folded one is off by "
            f"{lost / moved:.0%} of what training has changed in the logits of a trial text; base and adapters keep "
            f"all of it, and so does a base model saved in float32", soft_wrap=True,
        )  # fmt: skip


def unfolded(adapters: Path) -> tuple[HfModel, HfTokenizer]:
    """(model, tokenizer) with a policy's adapters beside the weights that they belong to, as in training."""
    model, tokenizer = load_policy(base_of(adapters))
    if _has_tokenizer(adapters):
        tokenizer = load_tokenizer(str(adapters))
        make_room_for(model, str(adapters))
        pad_apart(tokenizer, model)
        agree_on_ends(model, tokenizer)
    return load_adapters(model, str(adapters)).eval(), tokenizer


def _has_tokenizer(adapters: Path) -> bool:
    """Is the tokenizer of their training beside adapters? Its chat template may be another than the model's."""
    return any((adapters / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))


def base_of(adapters: Path) -> str:
    """Folder of the model that the adapters belong to."""
    base = adapted_model(adapters)
    try:
        return resolve_model(base)
    except PoiseError as error:
        raise PoiseError(f"no base model: {error}; write where it is into {adapters / _SETTINGS}") from None
